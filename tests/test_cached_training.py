"""Runs with and without cached images and features have the same metrics, and report everything that is cached."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from finished import CONVNET, ON_FILES, digit_files, train_on_files
from trainers import FROZEN, Trainers, at_call, kill_self, only_run, write_recipe

from toolkit.cache import frozen_features
from toolkit.cache.frozen_features import Features
from toolkit.cache.store import CacheEntryWriter
from toolkit.recipe import load_recipe
from toolkit.runs import Run
from toolkit.training.fit import fit

pytestmark = pytest.mark.long

AUGMENTED = (
    FROZEN
    + """
[augment]
train = [{{ name = "RandomAffine", degrees = 20 }}]
"""
)
SHORT = ("train.epochs=4",)


def run_of(recipe: Path, *settings: str) -> Run:
    return fit(load_recipe(recipe, [*SHORT, *settings]), quiet=True)


def log_of(run: Run) -> str:
    return run.log_file.read_text()


def assert_close(one: Run, other: Run, tolerance: float = 1e-5) -> None:
    """Check that all losses and accuracies of every epoch agree within the tolerance."""
    for found, expected in zip(one.metric_records(), other.metric_records(), strict=True):
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value == pytest.approx(expected[key], abs=tolerance), key
    found, expected = one.summary["best"], other.summary["best"]
    assert found == pytest.approx(expected, abs=tolerance)


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("[fi]*-*/"))


def test_a_run_on_cached_features_of_frozen_layers_gives_the_same_metrics(tmp_path: Path, own_cache: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    plain = run_of(recipe, 'data.cache="off"')
    assert plain.summary["cached"] == []
    assert not own_cache.exists()
    once = run_of(recipe)
    (description,) = once.summary["cached"]
    assert description.startswith("inputs of head")
    assert "computed once for 220 images" in description
    assert f"cached: {description}" in log_of(once)
    assert_close(once, plain)


def test_fixed_views_give_the_same_metrics_with_and_without_cached_features(tmp_path: Path, own_cache: Path) -> None:
    recipe = write_recipe(tmp_path, AUGMENTED)
    every = run_of(recipe)
    assert every.summary["cached"] == [], "with a new version per epoch, no features are fixed"
    once, plain = run_of(recipe, "data.fixed_views=3"), run_of(recipe, "data.fixed_views=3", 'data.cache="off"')
    (description,) = once.summary["cached"]
    assert "3 versions of each training image" in description
    assert_close(once, plain)
    assert len(entries(own_cache)) == 3 + 2, "three of train, one of validation and of test"
    losses = [epoch["train/loss"] for epoch in every.epoch_records()]
    assert losses != [epoch["train/loss"] for epoch in once.epoch_records()]


def test_fixed_views_by_data_workers_give_the_same_metrics(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, AUGMENTED)
    settings = ("data.fixed_views=2", 'augment.run_on="workers"')
    assert_close(run_of(recipe, *settings), run_of(recipe, *settings, 'data.cache="off"'))


def test_runs_with_the_same_frozen_layers_share_their_features(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = Features._compute
    monkeypatch.setattr(Features, "_compute", lambda *args: computed.append(1) or compute(*args))
    recipe = write_recipe(tmp_path, FROZEN)
    first = run_of(recipe)
    assert len(computed) == 3
    for settings in (("optimizer.lr=0.1",), ("train.batch_size=10", "train.epochs=2"), ("recipe.seed=5",),
                     ("optimizer.momentum=0.5", "model.head.dropout=0.1", "augment.label_smoothing=0.1")):  # fmt: skip
        assert "taken from the cache" in log_of(run_of(recipe, *settings))
    assert len(computed) == 3
    again = run_of(recipe)
    assert again.metrics_file.read_bytes() == first.metrics_file.read_bytes(), "equal to the last bit"
    before = entries(own_cache)
    run_of(recipe, 'data.normalize="none"')
    assert len(computed) == 6
    assert len(entries(own_cache)) == len(before) + 3, "different inputs have different features"


def test_other_frozen_weights_have_other_features(tmp_path: Path, own_cache: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    run_of(recipe)
    path = tmp_path / "weights.safetensors"
    weights = safetensors.torch.load_file(path)
    name = next(name for name in weights if name.endswith("weight") and "head" not in name)
    weights[name].view(-1)[0] += 1e-3
    safetensors.torch.save_file(weights, path)
    before = len(entries(own_cache))
    assert "taken from the cache" not in log_of(run_of(recipe))
    assert len(entries(own_cache)) == before + 3


def test_features_that_do_not_fit_into_memory_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    plain = run_of(recipe, 'data.cache="off"')
    monkeypatch.setattr(frozen_features, "available_memory", lambda: 1000)
    small = run_of(recipe)
    assert small.summary["cached"] == []
    assert "frozen features are not cached: its features need" in log_of(small)
    assert small.metrics_file.read_bytes() == plain.metrics_file.read_bytes()


def test_features_need_no_cache_folder(tmp_path: Path, own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(tmp_path, FROZEN)
    kept = run_of(recipe)
    for path in own_cache.iterdir():
        path.rename(tmp_path / path.name)
    own_cache.rmdir()
    own_cache.write_text("a file is in the place of the folder")
    without = run_of(recipe)
    assert log_of(without).count("warning: ") == 1
    assert without.summary["cached"] == kept.summary["cached"], "they are computed once for this run"
    assert without.metrics_file.read_bytes() == kept.metrics_file.read_bytes()


def test_damaged_features_are_recomputed(tmp_path: Path, own_cache: Path) -> None:
    recipe = write_recipe(tmp_path, FROZEN)
    first = run_of(recipe)
    for number, path in enumerate(sorted(own_cache.glob("features-*/data.bin"))):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.unlink()
        path.write_bytes(content[: len(content) - (number == 0)])
    again = run_of(recipe)
    assert log_of(again).count("is damaged") == 3
    assert again.metrics_file.read_bytes() == first.metrics_file.read_bytes()


def test_features_do_not_depend_on_the_number_of_processes(tmp_path: Path, own_cache: Path) -> None:
    for world in (1, 2, 3):
        recipe = write_recipe(tmp_path / str(world), FROZEN)
        settings = ("--set", "train.epochs=2", "--set", "train.batch_size=12")
        prepare = functools.partial(use_cache, own_cache / str(world))
        trainers = Trainers(world, tmp_path / str(world), recipe, *settings, prepare=prepare)
        assert trainers.wait() == [0] * world, trainers.text()
    first = entries(own_cache / "1")
    assert len(first) == 3
    for world in (2, 3):
        assert entries(own_cache / str(world)) == first
        for name in first:
            one, other = (own_cache / w / name / "data.bin" for w in ("1", str(world)))
            np.testing.assert_allclose(np.fromfile(other, np.float32), np.fromfile(one, np.float32), atol=1e-6)
        assert_close(only_run(tmp_path / str(world)), only_run(tmp_path / "1"))


def use_cache(folder: Path, rank: int) -> None:
    os.environ["TOOLKIT_CACHE"] = str(folder)


@pytest.mark.parametrize("tier", ["auto", "disk", "memory", "device"])
def test_images_cached_anywhere_give_the_same_run(tmp_path: Path, tier: str) -> None:
    augment = '[augment]\ntrain = [{ name = "RandomHorizontalFlip" }]\n'
    settings = ("train.epochs=2",)
    plain = train_on_files(tmp_path, CONVNET + augment, *settings, 'data.cache="off"')
    kept = train_on_files(tmp_path, CONVNET + augment, *settings, f'data.cache="{tier}"')
    assert plain.summary["cached"] == []
    (description,) = kept.summary["cached"]
    assert "preprocessed once" in description
    assert f"cached: {description}" in log_of(kept)
    assert kept.metrics_file.read_bytes() == plain.metrics_file.read_bytes(), "equal to the last bit"
    assert (kept.path / "predictions.csv").read_bytes() == (plain.path / "predictions.csv").read_bytes()
    assert kept.best_weights.read_bytes() == plain.best_weights.read_bytes()


def wait_for(path: Path, text: str, rank: int) -> None:
    """Delay this run's publishing of cache entries until another run has logged ``text``."""
    publish = CacheEntryWriter.publish

    def late(*arguments: Any) -> Any:
        deadline = time.monotonic() + 90
        while text not in (path.read_text() if path.exists() else ""):
            assert time.monotonic() < deadline, f"no run logged {text!r}"
            time.sleep(0.02)
        return publish(*arguments)

    CacheEntryWriter.publish = late  # type: ignore[method-assign]


def image_run(folder: Path, data: Path) -> Path:
    """Write a recipe on image files, with its runs in ``folder``."""
    (folder / "runs").mkdir(parents=True)
    path = folder / "recipe.toml"
    text = ON_FILES.format(runs=f'"{folder}/runs"', data=f'"{data}"', size=16, epochs=2).replace('"tiny"', '"small"')
    path.write_text(text + CONVNET)
    return path


@pytest.mark.parametrize("kind", ["images", "features"])
def test_of_two_runs_that_need_the_same_cache_entry_one_builds_it(tmp_path: Path, own_cache: Path, kind: str) -> None:
    data = digit_files(tmp_path / "data")
    recipes = [
        image_run(tmp_path / run, data) if kind == "images" else write_recipe(tmp_path / run, FROZEN)
        for run in ("one", "two")
    ]
    shown = tmp_path / "two" / "shown.txt"
    prepare = functools.partial(wait_for, shown, f"another run is building cache entry {kind}")
    one = Trainers(1, tmp_path / "one", recipes[0], prepare=prepare)
    one.wait_until(lambda: any(own_cache.glob(f".{kind}-*")))
    two = Trainers(1, tmp_path / "two", recipes[1])
    assert one.wait() == [0], one.text()
    assert two.wait() == [0], two.text()
    assert "waiting for it" in two.text()
    runs = [only_run(tmp_path / run) for run in ("one", "two")]
    assert runs[0].metrics_file.read_bytes() == runs[1].metrics_file.read_bytes()
    assert len(entries(own_cache)) == (1 if kind == "images" else 3)


def die_before_publishing(rank: int) -> None:
    CacheEntryWriter.publish = lambda *_: kill_self()  # type: ignore[assignment, method-assign]


def test_a_run_killed_while_it_builds_leaves_no_entry_and_no_lock(tmp_path: Path, own_cache: Path) -> None:
    recipe = image_run(tmp_path, digit_files(tmp_path / "data"))
    killed = Trainers(1, tmp_path, recipe, prepare=die_before_publishing)
    assert killed.wait() == [-9]
    assert entries(own_cache) == []
    after = Trainers(1, tmp_path, recipe, "--resume", "auto")
    assert after.wait() == [0], after.text()
    assert len(entries(own_cache)) == 1
    assert "waiting" not in after.text()


def on_separate_machines(cache: Path, rank: int) -> None:
    """Make each process the only one of its machine, with its own cache."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TOOLKIT_CACHE": str(cache / str(rank))}


@pytest.mark.parametrize("kind", [pytest.param("images", marks=pytest.mark.extended), "features"])
def test_every_machine_has_its_own_cache_and_the_same_training(tmp_path: Path, own_cache: Path, kind: str) -> None:
    data = digit_files(tmp_path / "data")
    settings = ("--set", "train.epochs=2", "--set", "train.batch_size=12")
    off = ("--set", 'data.cache="off"')
    both = functools.partial(on_separate_machines, own_cache)
    ways: dict[str, tuple[int, tuple[str, ...], Any]] = {
        "plain": (2, off, None), "one machine": (2, (), None), "two machines": (2, (), both)
    }  # fmt: skip
    for name, (world, more, prepare) in ways.items():
        folder = tmp_path / name
        recipe = image_run(folder, data) if kind == "images" else write_recipe(folder, FROZEN)
        trainers = Trainers(world, folder, recipe, *settings, *more, prepare=prepare)
        assert trainers.wait() == [0] * world, trainers.text()
    plain, one, two = (only_run(tmp_path / name) for name in ways)
    assert one.summary["cached"]
    assert two.metrics_file.read_bytes() == one.metrics_file.read_bytes()
    if kind == "images":
        assert plain.metrics_file.read_bytes() == one.metrics_file.read_bytes(), "equal to the last bit"
    else:
        assert_close(plain, one)
    assert entries(own_cache / "0") == entries(own_cache / "1") == entries(own_cache) != []


def stop_at_first_block(rank: int) -> None:
    at_call(CacheEntryWriter, "add", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize("kind", ["images", "features"])
def test_a_run_can_be_stopped_while_it_builds(tmp_path: Path, own_cache: Path, kind: str) -> None:
    if kind == "images":
        recipe = image_run(tmp_path, digit_files(tmp_path / "data"))
    else:
        recipe = write_recipe(tmp_path, FROZEN)
    stopped = Trainers(1, tmp_path, recipe, prepare=stop_at_first_block)
    assert stopped.wait() == [3], stopped.text()
    assert "stopped before training" in stopped.text()
    after = Trainers(1, tmp_path, recipe, "--resume", "auto")
    assert after.wait() == [0], after.text()
    assert only_run(tmp_path).summary["cached"]
