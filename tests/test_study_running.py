"""A study in one process resumes from any interruption, and each run equals the same run trained alone."""

from __future__ import annotations

import gc
import io
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli import toolkit
from studies import BASE, GRID, outcomes, runs_of, start, study_folder, write_study
from trainers import outcome

from toolkit.errors import Interrupted
from toolkit.recipe import load_recipe, loads_recipe
from toolkit.runs import open_run
from toolkit.study import worker
from toolkit.study.directory import failure_of, state_of
from toolkit.training.fit import fit
from toolkit.training.trainer import Trainer

pytestmark = pytest.mark.long

TWO = "[study.grid]\noptimizer.lr = [0.1, 0.05]\n"

STATEFUL = """
[augment]
train = [{ name = "RandomAffine", degrees = 20 }]
mixup = 0.4
"""


def study(path: Path, *arguments: str, status: int = 0) -> str:
    """Run `toolkit study`; return its output."""
    result = toolkit("study", path, *arguments)
    assert result.status == status, result.stdout + result.stderr
    return result.stdout + result.stderr


# -- pausing ----------------------------------------------------------------------------------------------------------


def test_a_run_that_pauses_after_some_epochs_is_bit_identical(tmp_path: Path) -> None:
    text = BASE.format(root=tmp_path / "whole", epochs=4) + STATEFUL + '[scheduler]\nname = "cosine"\n'
    whole = outcome(fit(loads_recipe(text)))
    recipe = loads_recipe(text, [f'recipe.run_root="{tmp_path / "parts"}"'])
    run = fit(recipe, until=1)
    assert (len(run.epoch_records()), run.is_finished, state_of(run)) == (1, False, "paused")
    for until, finished in ((1, False), (3, False), (None, True)):
        run = fit(recipe, resume=run.path, until=until)
        assert run.is_finished is finished
    assert outcome(run) == whole


def test_a_pause_after_the_last_epoch_or_after_early_stopping_finishes_the_run(tmp_path: Path) -> None:
    text = BASE.format(root=tmp_path, epochs=3)
    assert fit(loads_recipe(text), until=3).is_finished
    assert fit(loads_recipe(text), until=9).is_finished
    stops = loads_recipe(text, ["early_stopping.patience=1", "early_stopping.min_delta=100.0"])
    run = fit(stops, until=2)
    assert (run.is_finished, run.summary["stopped_early"], len(run.epoch_records())) == (True, True, 2)


def test_a_quiet_run_writes_the_same_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = loads_recipe(BASE.format(root=tmp_path, epochs=1))
    run = fit(recipe, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert "epoch 1/1" in run.log_file.read_text()


# -- running ----------------------------------------------------------------------------------------------------------


def test_each_run_of_a_study_equals_the_same_run_trained_alone(tmp_path: Path) -> None:
    """Earlier runs in the process have no effect, even with deterministic algorithms or another optimizer."""
    path = write_study(
        tmp_path,
        STATEFUL
        + """
        [[study.rows]]
        name = "deterministic"
        set.train.deterministic = true
        [[study.rows]]
        name = "adamw"
        set = { optimizer.name = "adamw", train.ema = 0.9, train.batch_size = 8 }
        [[study.rows]]
        name = "plain"
        """,
    )
    study(path)
    results = outcomes(tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
    alone = write_study(tmp_path / "alone", STATEFUL, name="recipe.toml")
    assert toolkit("train", alone, "--no-report").status == 0
    (run,) = (tmp_path / "alone" / "runs" / "small").iterdir()
    assert outcome(open_run(run)) == results["plain, seed 0"]
    assert results["plain, seed 0"]["weights"] != results["adamw, seed 0"]["weights"]


def test_a_run_keeps_its_own_recipe_and_the_origin_of_each_value(tmp_path: Path) -> None:
    path = write_study(tmp_path, TWO, epochs=1)
    study(path)
    (_, run), _ = runs_of(tmp_path)
    assert "study" not in (run.path / "recipe.toml").read_text()
    assert load_recipe(run.path / "recipe.toml").optimizer.lr == 0.1
    line = path.read_text().splitlines().index("optimizer.lr = [0.1, 0.05]") + 1
    assert run.origins["keys"]["optimizer.lr"] == f"{path}:{line}"
    assert run.origins["keys"]["optimizer.momentum"] == "default"


def test_finished_runs_are_never_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_study(tmp_path, TWO, epochs=1)
    study(path)
    before = outcomes(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was trained")

    monkeypatch.setattr(worker, "fit", refuse)
    assert "2 of 2 runs finished" in study(path)
    assert outcomes(tmp_path) == before
    # Without study.json the study finds its runs by their recipes.
    (study_folder(tmp_path).path / "study.json").unlink()
    study(path)
    assert outcomes(tmp_path) == before


def test_only_added_rows_are_trained(tmp_path: Path) -> None:
    path = write_study(tmp_path, TWO, epochs=1)
    study(path)
    before = {title: run.path for title, run in runs_of(tmp_path)}
    write_study(tmp_path, "[study.grid]\noptimizer.lr = [0.2, 0.1, 0.05]\n", epochs=1)
    study(path)
    after = {title: run.path for title, run in runs_of(tmp_path)}
    assert list(after) == ["lr 0.2, seed 0", "lr 0.1, seed 0", "lr 0.05, seed 0"]
    assert all(after[title] == before[title] for title in before)
    write_study(tmp_path, "[study.grid]\noptimizer.lr = [0.1]\n", epochs=1)
    output = study(path)
    assert "2 run(s) in" in output
    assert all(run_path.exists() for run_path in after.values())


def test_a_study_resumed_after_interruptions_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_study(tmp_path / "whole", TWO, epochs=3)
    study(whole)
    path = write_study(tmp_path / "parts", TWO, epochs=3)
    for count in (4, 8, 10):  # numbers of steps after which SIGTERM arrives
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_after_step", interrupting(count))
            result = toolkit("study", path)
        assert result.status == 3, result.stderr
        assert "Run the same command again to resume it" in result.stderr
    study(path)
    assert outcomes(tmp_path / "parts") == outcomes(tmp_path / "whole")


def interrupting(count: int) -> Any:
    """Return training's _after_step with a SIGTERM at the ``count``-th call."""
    calls, original = [0], Trainer._after_step

    def after_step(self: Trainer, *arguments: Any) -> bool:
        calls[0] += 1
        if calls[0] == count:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    return after_step


def test_a_failed_run_does_not_end_the_study_and_is_retried_on_request(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    path = write_study(
        tmp_path,
        f"""
        [[study.rows]]
        name = "needs a file"
        set = {{ model.weights = "file:{weights}", transfer.mode = "finetune" }}
        [[study.rows]]
        name = "diverges"
        set = {{ optimizer.lr = 1e30 }}
        [[study.rows]]
        name = "valid"
        """,
    )
    output = study(path, status=1)
    assert "needs a file, seed 0: failed: " in output
    assert "weights.safetensors" in output
    assert "diverges, seed 0: failed: the loss is not finite" in output
    states = {title: state_of(run) for title, run in runs_of(tmp_path)}
    assert list(states.values()) == ["failed", "failed", "finished"]
    valid = outcome(dict(runs_of(tmp_path))["valid, seed 0"])
    # Failed runs are listed again, but retried only with --retry.
    broken = {title: failure_of(run) for title, run in runs_of(tmp_path)}
    study(path, status=1)
    assert {title: failure_of(run) for title, run in runs_of(tmp_path)} == broken
    import safetensors.torch

    from toolkit.models.build import build_model

    module = build_model(loads_recipe(BASE.format(root="r", epochs=1)).model, 10, 3, 8).module
    safetensors.torch.save_file(module.state_dict(), weights)
    output = study(path, "--retry", status=1)
    states = {title: state_of(run) for title, run in runs_of(tmp_path)}
    assert list(states.values()) == ["finished", "failed", "finished"]
    assert outcome(dict(runs_of(tmp_path))["valid, seed 0"]) == valid


def test_memory_does_not_grow_from_run_to_run(tmp_path: Path) -> None:
    tensors = []

    def count(run: Any) -> None:
        gc.collect()
        tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    from toolkit.distributed.signals import GracefulStop
    from toolkit.study.expand import expand, read_study
    from toolkit.study.init import init_study, study_lock
    from toolkit.study.worker import train_run, worker_loop

    found = read_study(write_study(tmp_path, "[study]\nseeds = 5\n", epochs=1))
    with GracefulStop() as stop, study_lock(found) as folder:
        init_study(found, folder, expand(found))
        assert worker_loop(folder, stop, train_run, after=count) == 0
    assert len(tensors) == 5
    assert tensors[1:] == [tensors[1]] * 4


def test_the_live_table_shows_progress_time_left_and_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from toolkit.study import progress as progress_module
    from toolkit.study.directory import claim
    from toolkit.study.expand import expand, read_study
    from toolkit.study.init import init_study, study_lock
    from toolkit.study.progress import StudyProgress

    found = read_study(write_study(tmp_path, TWO, epochs=4))
    with study_lock(found) as folder:
        init_study(found, folder, expand(found))
    progress = StudyProgress(folder)
    (_, first), _ = runs_of(tmp_path)
    lines = [
        {"epoch": epoch, "train/loss": 1.0, "val/loss": 1.0, "val/accuracy": value}
        for epoch, value in ((1, 0.5), (2, 0.75), (3, 0.625))
    ]
    first.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Three of eight epochs took 30 seconds.
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: progress.started + 30))
    held = claim(first)
    assert held is not None
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(progress._table())
    shown = console.export_text().splitlines()
    held.release()
    assert shown[0].startswith(
        "2 runs: 1 running, 1 paused; 50 s left; best so far val/accuracy 0.7500: lr 0.1, seed 0"
    )
    assert any(line.split() == ["lr", "0.1,", "seed", "0", "3/4", "0.7500"] for line in shown)
    assert not any("lr 0.05, seed" in line for line in shown[1:])


# -- refused input and printed output ---------------------------------------------------------------------------------


def test_a_plan_counts_existing_runs_and_writes_nothing(tmp_path: Path) -> None:
    path = write_study(tmp_path, GRID, epochs=1)
    plan = json.loads(toolkit("study", path, "--plan", "--json").stdout)
    assert not (tmp_path / "runs").exists()
    assert (plan["runs"], plan["finished"], plan["epochs_left"], plan["seconds_left"]) == (12, 0, 12, None)
    images = plan["members"][0]["images_per_epoch"]
    flops = plan["members"][0]["training_flops_per_image"]
    assert images == 10 * 8
    assert plan["flops_left"] == pytest.approx(12 * images * flops)
    text = toolkit("study", path, "--plan").stdout
    assert "12 runs" in text
    assert "lr 0.2, momentum 0.5" in text
    write_study(tmp_path, TWO, epochs=1)
    study(path)
    write_study(tmp_path, "[study.grid]\noptimizer.lr = [0.2, 0.1, 0.05]\n", epochs=1)
    plan = json.loads(toolkit("study", path, "--plan", "--json").stdout)
    assert [member["state"] for member in plan["members"]] == ["missing", "finished", "finished"]
    assert (plan["runs"], plan["finished"], plan["epochs_left"]) == (3, 2, 1)
    speeds = [run.summary["images_per_s"] for _, run in runs_of(tmp_path)]
    assert min(speeds) * 0.99 <= images / plan["seconds_left"] <= max(speeds) * 1.01
    assert "about" in toolkit("study", path, "--plan").stdout


def test_the_plan_of_a_search_counts_its_total_and_remaining_epochs(tmp_path: Path) -> None:
    search = """
        [study]
        bohb = { trials = 4, min_epochs = 1, max_epochs = 2, eta = 2 }
        space.optimizer.lr = { log_uniform = [1e-3, 1.0] }
        """
    path = write_study(tmp_path, search)
    plan = json.loads(toolkit("study", path, "--plan", "--json").stdout)
    # Four configurations for one epoch, two of them for one more.
    assert (plan["epochs_left"], plan["seconds_left"]) == (6, None)
    grid = json.loads(toolkit("study", write_study(tmp_path / "grid", TWO, epochs=3), "--plan", "--json").stdout)
    assert plan["flops_left"] == grid["flops_left"]
    assert "up to 4 configurations, 6 epochs in all" in toolkit("study", path, "--plan").stdout
    study(path)
    text = toolkit("study", path, "--plan").stdout
    assert "nothing is left to train" in text
    assert "6 epochs in all" in text


def test_more_runs_than_the_limit_need_the_yes_option(tmp_path: Path) -> None:
    path = write_study(tmp_path, "[study]\nmax_runs = 1\n" + TWO, epochs=1)
    assert "has 2 runs, more than study.max_runs = 1" in study(path, status=2)
    assert not (tmp_path / "runs").exists()
    assert "2 runs" in toolkit("study", path, "--plan").stdout
    study(path, "--yes")


def test_a_folder_with_another_study_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path, TWO, epochs=1)
    study(path)
    kept = {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    other = write_study(tmp_path, "[study.grid]\noptimizer.lr = [0.5, 0.7]\n", epochs=1, name="other.toml")
    output = study(other, status=2)
    assert f"{study_folder(tmp_path).path} contains a study with other runs (optimizer.lr: 0.1 -> 0.5)" in output
    assert "Give this one its own recipe.name" in output
    search = "[study]\nrandom.runs = 2\nspace.optimizer.lr = { uniform = [0.1, 0.2] }\n"
    output = study(write_study(tmp_path, search, epochs=1, name="search.toml"), status=2)
    assert "contains a study with runs that are listed, not searched for" in output
    assert {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()} == kept


def test_two_searches_of_different_spaces_do_not_share_a_folder(tmp_path: Path) -> None:
    text = "[study]\nrandom.runs = {runs}\nspace.optimizer.lr = {{ uniform = [0.1, {high}] }}\n"
    path = write_study(tmp_path, text.format(runs=1, high=0.2), epochs=1)
    study(path)
    write_study(tmp_path, text.format(runs=1, high=0.3), epochs=1)
    assert "contains a study with another space" in study(path, status=2)
    write_study(tmp_path, text.format(runs=2, high=0.2), epochs=1)
    study(path)
    assert [state_of(run) for _, run in runs_of(tmp_path)] == ["finished", "finished"]


SEARCH = (
    "[study]\nbohb = { trials = 2, min_epochs = 1, max_epochs = 1 }\nspace.optimizer.lr = { uniform = [0.1, 0.2] }\n"
)


@pytest.mark.parametrize("text", [TWO, SEARCH], ids=["grid", "search"])
def test_a_study_resumes_after_a_recipe_key_was_added_to_the_toolkit(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are matched by recipe with the new key's default, not by a stored hash."""
    path = write_study(tmp_path, text, epochs=1)
    study(path)
    file = study_folder(tmp_path).path / "study.json"
    record = json.loads(file.read_text())
    for _, run in runs_of(tmp_path):
        recipe = run.path / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("drop_last = false\n", ""))
        assert "drop_last" not in recipe.read_text()
    for member in record["members"]:
        member["hash"] = "0" * 64
    if record["search"]:
        del record["search"]["recipe"]["train"]["drop_last"]
    file.write_text(json.dumps(record))
    before = outcomes(tmp_path)
    monkeypatch.setattr(worker, "fit", None)
    study(path)
    assert outcomes(tmp_path) == before
    if record["search"]:
        output = study(path, "--set", "train.batch_size=8", status=2)
        assert "contains a study with another base recipe" in output


@pytest.mark.parametrize("where", ["a file", "nowhere"])
def test_storage_that_cannot_be_written_is_one_message(tmp_path: Path, where: str) -> None:
    path = write_study(tmp_path, TWO, epochs=1)
    (tmp_path / "file").write_text("")
    root = {"a file": str(tmp_path / "file" / "runs"), "nowhere": "/proc/nowhere"}[where]
    output = study(path, "--set", f'recipe.run_root="{root}"', status=2)
    assert "recipe.run_root: cannot write in" in output
    assert "Traceback" not in output


def test_toolkit_train_refers_a_study_to_toolkit_study(tmp_path: Path) -> None:
    path = write_study(tmp_path, TWO, epochs=1)
    result = toolkit("train", path)
    assert result.status == 2
    assert f"is a study of many runs: toolkit study {path}" in result.stderr
    assert "has no [study] table" in study(write_study(tmp_path, "", name="recipe.toml"), status=2)


def test_a_study_has_one_controller_at_a_time(tmp_path: Path) -> None:
    from toolkit.study.expand import read_study
    from toolkit.study.init import study_lock

    path = write_study(tmp_path, TWO, epochs=1)
    with study_lock(read_study(path)):
        assert "is in use by another running `toolkit study`" in study(path, status=2)
    study(path)


def test_an_interrupt_pauses_a_study(tmp_path: Path) -> None:
    import os
    import time

    path = write_study(tmp_path, TWO, epochs=5000)
    process = start(tmp_path / "shown.txt", "study", path)
    try:
        folder, deadline = study_folder(tmp_path), time.monotonic() + 250
        while not (folder.exists and any(run.epoch_records() for _, run in runs_of(tmp_path))):
            assert time.monotonic() < deadline, (tmp_path / "shown.txt").read_text()
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(250)
        assert process.exitcode == 3, (tmp_path / "shown.txt").read_text()
    finally:
        process.kill()
    assert "stopped; 2 runs:" in (tmp_path / "shown.txt").read_text()


def test_an_interrupt_propagates_through_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted("last")

    path = write_study(tmp_path, TWO, epochs=1)
    monkeypatch.setattr(worker, "fit", interrupted)
    study(path, status=3)
    assert all(state_of(run) == "paused" for _, run in runs_of(tmp_path))
