"""Images cached on disk, in memory or on the device give the same pixels as uncached, for all shipped transforms."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from toolkit.cache import distributed, image_cache, memory_budget, store
from toolkit.cache.distributed import DistributedCache
from toolkit.cache.image_cache import SplitImages
from toolkit.data.datasets import Dataset
from toolkit.data.encoded_sources import ImageFiles
from toolkit.data.image_sources import EncodedImages, InMemoryImages, UnreadableImageError
from toolkit.data.pipeline import plan_preprocessing
from toolkit.data.preprocessing import resolve_preprocessing
from toolkit.data.sampling import SamplingPlan
from toolkit.data.splits import SPLITS
from toolkit.models.build import expected_input
from toolkit.recipe import load_recipe, loads_recipe
from toolkit.recipe.schema import Recipe
from toolkit.study.expand import expand, read_study
from toolkit.training.context import TrainingContext
from toolkit.training.loaders import ImageLoaders

pytestmark = pytest.mark.long

RECIPES = Path(__file__).parent.parent / "recipes"
COUNT = 12
FLIP = '[augment]\ntrain = [{ name = "RandomHorizontalFlip" }]\n'
ON_FILES = """
[recipe]
name = "toy"

[model]
source = "torchvision"
name = "resnet18"

[data]
dataset = "imagefolder"
root = "data"
image_size = 32
resize = 40
workers = 0

[optimizer]
name = "sgd"
lr = 0.1

[train]
epochs = 3
batch_size = 4
"""


@dataclass
class RecordingConsole:
    """A console that records its lines."""

    lines: list[str] = field(default_factory=list)

    def log(self, text: str = "") -> None:
        self.lines.append(text)

    def bar(self, *_: Any) -> Any:
        from toolkit.training.console import Console

        return Console(is_main=False).bar("", 1)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write JPEGs of different sizes, one of them grayscale, and a PNG with transparency."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(COUNT):
        noise = random.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((60 + 5 * i, 50 + 3 * (i % 5)), Image.Resampling.BICUBIC)
        if i == 3:
            image = image.convert("L")
        if i == 5:
            image.putalpha(128)
            image.save(folder / f"{i}.png")
        else:
            image.save(folder / f"{i}.jpg")
    return folder


def files_of(folder: Path, channels: int = 3) -> EncodedImages:
    return EncodedImages(ImageFiles(folder, [f"{i}.png" if i == 5 else f"{i}.jpg" for i in range(COUNT)]), channels)


def setup_of(recipe: Recipe, images: Any, native: int | None) -> tuple[TrainingContext, RecordingConsole]:
    """Return a run's context without the model, on a few images in three splits, and its console."""
    labels = np.arange(COUNT, dtype=np.int64) % 3
    dataset = Dataset("toy", ["a", "b", "c"], images, labels, {}, native, 3)
    splits = {"train": np.array([7, 1, 5, 3, 9]), "validation": np.array([0, 2, 4]), "test": np.array([11, 6, 8, 10])}
    preprocessing = resolve_preprocessing(
        recipe.data,
        expected_input(recipe.model),
        native,
        3,
        lambda plain: ((0.4,) * plain.channels, (0.2,) * plain.channels),
    )
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"),
        is_main_process=True,
        is_local_main_process=True,
        num_processes=1,
        process_index=0,
        local_process_index=0,
    )
    console: Any = RecordingConsole()
    nothing: Any = None
    train = recipe.train.model_copy(update={"drop_last": False})  # there are fewer images than one batch
    setup = TrainingContext(
        recipe=recipe.model_copy(update={"train": train}),
        accelerator=accelerator,
        display=console,
        dataset=dataset,
        task=nothing,
        splits=splits,
        preprocessing=preprocessing,
        stages=[preprocessing],
        built=nothing,
        transfer=nothing,
        stochastic=nothing,
        bad_images=[],
    )
    return setup, console


def unguarded(batches: Iterable[Any], rounds: int) -> Iterator[Any]:
    """Yield all batches, without checking for a stop request."""
    yield from batches


def batches_of(
    setup: TrainingContext, cached: bool, passes: int = 3
) -> tuple[dict[str, list[torch.Tensor]], SplitImages]:
    """Return the model's inputs: two epochs of training images, validation and test."""
    recipe = setup.recipe
    arguments = recipe.augment, setup.preprocessing, recipe.recipe.seed, setup.dataset.native_size
    plans = {split: plan_preprocessing(split, *arguments) for split in SPLITS}
    kept = SplitImages(setup, plans)
    if cached:
        kept.cache(DistributedCache(setup, unguarded), passes)
    images = ImageLoaders(setup, plans, kept)
    plan = SamplingPlan(size=5, seed=1, batch_size=2, grad_accum_steps=1, drop_last=False, world=1, rank=0,
                     views=recipe.data.fixed_views)  # fmt: skip
    train = images.training(plan)
    found = {"train": [batch.images.clone() for epoch in (0, 1) for _, batch in train.epoch(epoch)]}
    train.close()
    for split in ("validation", "test"):
        loader = images.evaluation(split, [np.arange(2), np.arange(2, len(setup.splits[split]))])
        found[split] = [batch.images.clone() for batch in loader]
        loader.close()
    return found, kept


def assert_equal(one: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> None:
    for split in SPLITS:
        for actual, expected in zip(one[split], other[split], strict=True):
            assert torch.equal(actual, expected), split


def shipped() -> dict[str, Recipe]:
    """Return one recipe for each set of transforms of the shipped recipes and studies."""
    found: dict[str, Recipe] = {}
    for path in sorted(RECIPES.rglob("*.toml")):
        if "base" in path.stem or path.parent.name == "base":
            continue
        is_study = "[study" in path.read_text()
        recipes = [run.recipe for run in expand(read_study(path, [])).runs] if is_study else [load_recipe(path)]
        for recipe in recipes:
            data = recipe.data.model_dump(include={"image_size", "resize", "crop", "normalize"}, mode="json")
            augment = recipe.augment.model_dump(exclude={"mixup", "cutmix", "label_smoothing"}, mode="json")
            found.setdefault(json.dumps([data, augment], sort_keys=True), recipe)
    return found


@pytest.mark.extended
def test_every_shipped_set_of_transforms_gives_the_same_pixels(photographs: Path, own_cache: Path) -> None:
    """This includes random augmentation, whose parameters do not depend on where an image is cached."""
    random = np.random.default_rng(1)
    sets = shipped()
    assert len(sets) > 35
    kinds = set()
    for recipe in sets.values():
        images: Any = files_of(photographs, recipe.data.channels or 3)
        native = None
        if recipe.data.dataset in ("cifar10", "cifar100", "digits"):
            native = 8 if recipe.data.dataset == "digits" else 32
            images = InMemoryImages(random.integers(0, 256, (COUNT, native, native, 3), dtype=np.uint8), "toy", 3)
        setup, _ = setup_of(recipe, images, native)
        plain, _ = batches_of(setup, cached=False)
        once, kept = batches_of(setup, cached=True)
        assert_equal(plain, once)
        kinds.add((bool(kept.rows), native is None))
        if native is None:
            assert kept.descriptions, "photographs are always cached"
    assert kinds >= {(True, True), (True, False)}


@pytest.mark.parametrize("tier", ["auto", "disk", "memory", "device"])
@pytest.mark.parametrize("more", ["", FLIP, FLIP + 'run_on = "workers"\n'], ids=["plain", "batches", "workers"])
def test_every_cache_tier_gives_the_same_pixels_and_logs_where_they_are(
    photographs: Path, tier: str, more: str
) -> None:
    setup, console = setup_of(loads_recipe(ON_FILES + more, [f'data.cache="{tier}"']), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=False)
    assert console.text == ""
    once, kept = batches_of(setup, cached=True)
    assert_equal(plain, once)
    where = {"auto": "held in memory", "disk": "read from disk", "memory": "held in memory",
             "device": "held on the device"}[tier]  # fmt: skip
    if (tier, "workers" in more) == ("device", True):
        assert "train, validation, test are not held on the device" not in console.text
    assert any(where in line for line in kept.descriptions), console.text
    assert all(line in console.text for line in kept.descriptions)
    again, kept = batches_of(setup, cached=True)
    assert_equal(plain, again)
    assert console.text.count("decoding images") == 1, "the second run finds them in the cache"


def test_with_a_random_crop_whole_images_are_cached_and_serve_the_fixed_crop(photographs: Path) -> None:
    """One entry serves all splits, because the steps before the crop are the same."""
    more = '[augment]\ntrain = [{ name = "RandomCrop", stage = "crop" }]\n'
    setup, _console = setup_of(loads_recipe(ON_FILES + more), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=False)
    once, kept = batches_of(setup, cached=True)
    assert_equal(plain, once)
    assert len(kept.descriptions) == 1
    assert "train, validation, test" in kept.descriptions[0]
    assert "center crop" not in kept.descriptions[0]


def test_grayscale_input_is_cached_with_one_channel(photographs: Path, own_cache: Path) -> None:
    setup, _ = setup_of(loads_recipe(ON_FILES, ["data.channels=1"]), files_of(photographs, 1), None)
    plain, _ = batches_of(setup, cached=False)
    once, _ = batches_of(setup, cached=True)
    assert_equal(plain, once)
    (data,) = own_cache.glob("images-*/data.bin")
    assert data.stat().st_size == COUNT * 32 * 32


CROPS = {
    "in place of both": '{ name = "RandomResizedCrop", stage = "resize_crop" }',
    "of images that differ in size": '{ name = "RandomCrop", stage = "crop" }',
    "turned before": '{ name = "RandomRotation", degrees = 20, stage = "before_resize" }',
    "in strange colors": '{ name = "RandomSolarize", threshold = 128, stage = "before_crop" }',
}
"""Transforms up to the crop that cannot be made in batches."""


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
def test_per_image_steps_end_with_the_crop(photographs: Path, crop: str) -> None:
    """After the crop, steps run on batches; the crop is bit-identical to one made by workers."""
    alone = f"[augment]\ntrain = [{crop}]\n"
    by_workers, _ = batches_of(
        setup_of(loads_recipe(ON_FILES + alone, ['augment.run_on="workers"']), files_of(photographs), None)[0],
        cached=False,
    )
    for settings in ([], ["data.workers=2"]):
        setup, _ = setup_of(loads_recipe(ON_FILES + alone, settings), files_of(photographs), None)
        way = plan_preprocessing("train", setup.recipe.augment, setup.preprocessing, 0, None)
        assert way.batched is not None
        assert way.why_not_batched.startswith("augment.train")
        for cached in (False, True):
            assert_equal(by_workers, batches_of(setup, cached=cached)[0])

    flipped = f'[augment]\ntrain = [{crop}, {{ name = "RandomHorizontalFlip" }}]\n'
    setup, _ = setup_of(loads_recipe(ON_FILES + flipped), files_of(photographs), None)
    found, _ = batches_of(setup, cached=True)
    assert_equal(batches_of(setup, cached=False)[0], found)
    pairs = list(zip(torch.cat(found["train"]), torch.cat(by_workers["train"]), strict=True))
    flips = [torch.equal(image, plain.flip(2)) for image, plain in pairs]
    assert [torch.equal(image, plain) for image, plain in pairs] == [not flip for flip in flips]
    assert 0 < sum(flips) < len(flips)


def test_all_steps_run_per_image_if_sizes_differ_or_a_step_needs_it(photographs: Path) -> None:
    crop = '{ name = "RandomResizedCrop", stage = "resize_crop" }'
    for more in (
        f'train = [{crop}, {{ name = "RandomSolarize", threshold = 128 }}]',
        f'train = [{crop}]\nauto_augment = "rand-m9"',
    ):
        setup, _ = setup_of(loads_recipe(f"{ON_FILES}[augment]\n{more}\n"), files_of(photographs), None)
        assert plan_preprocessing("train", setup.recipe.augment, setup.preprocessing, 0, None).batched is None
    more = '[augment]\ntrain = [{ name = "RandomCrop", pad_if_needed = true }]\n'
    more += 'validation = [{ name = "CenterCrop" }]\ntest = [{ name = "CenterCrop" }]\n'
    setup, _ = setup_of(loads_recipe(ON_FILES + more, ['data.crop="none"']), files_of(photographs), None)
    way = plan_preprocessing("train", setup.recipe.augment, setup.preprocessing, 0, None)
    assert way.batched is None
    assert "have different sizes" in way.why_not_batched


def test_fixed_views_alternate_over_the_epochs(photographs: Path) -> None:
    for more in (FLIP, FLIP + 'run_on = "workers"\n'):
        setup, _ = setup_of(loads_recipe(ON_FILES + more, ["data.fixed_views=2"]), files_of(photographs), None)
        plain, _ = batches_of(setup, cached=False)
        once, _ = batches_of(setup, cached=True)
        assert_equal(plain, once)
    seen: dict[int, set[bytes]] = {0: set(), 1: set(), 2: set(), 3: set()}
    plans = {split: plan_preprocessing(split, setup.recipe.augment, setup.preprocessing, 0, None) for split in SPLITS}
    plan = SamplingPlan(size=5, seed=1, batch_size=2, grad_accum_steps=1, drop_last=False, world=1, rank=0, views=2)
    loader = ImageLoaders(setup, plans, SplitImages(setup, plans)).training(plan)
    for epoch, images in seen.items():
        images |= {image.numpy().tobytes() for _, batch in loader.epoch(epoch) for image in batch.images}
    loader.close()
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (lambda folder: os.utime(folder / "2.jpg", (1, 1)), False),
        (lambda folder: _rewrite(folder / "2.jpg"), False),
        (lambda folder: None, True),
    ],
    ids=["touched", "other content, same size and time", "nothing"],
)
def test_changed_data_are_decoded_again(
    tmp_path: Path, photographs: Path, own_cache: Path, change: Callable[[Path], Any], is_same: bool
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    setup, console = setup_of(loads_recipe(ON_FILES), files_of(folder), None)
    batches_of(setup, cached=True)
    change(folder)
    plain, _ = batches_of(setup, cached=False)
    once, _ = batches_of(setup, cached=True)
    assert_equal(plain, once)
    assert len(list(own_cache.glob("images-*/"))) == (1 if is_same else 2)
    assert console.text.count("decoding images") == (1 if is_same else 2)


def _rewrite(path: Path) -> None:
    """Write other content of the same length and keep the modification time."""
    state, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_another_way_of_decoding_uses_another_cache_entry(
    photographs: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, _ = setup_of(loads_recipe(ON_FILES), files_of(photographs), None)
    batches_of(setup, cached=True)
    other, _ = setup_of(loads_recipe(ON_FILES, ["data.resize=48"]), files_of(photographs), None)
    batches_of(other, cached=True)
    monkeypatch.setattr("PIL.__version__", "0.0")
    batches_of(setup, cached=True)
    assert len(list(own_cache.glob("images-*/"))) == 3
    same, console = setup_of(
        loads_recipe(ON_FILES, ["optimizer.lr=0.5", 'data.normalize="half"']), files_of(photographs), None
    )
    batches_of(same, cached=True)
    assert "decoding" not in console.text, "later steps do not change the entry"


def test_a_tier_without_enough_room_is_not_chosen(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 images of 32 x 32 x 3 bytes are 36 KiB: with 50 KiB free they fit neither into memory nor onto the device."""
    plain, _ = batches_of(setup_of(loads_recipe(ON_FILES), files_of(photographs), None)[0], cached=False)
    for module in (image_cache, memory_budget):
        monkeypatch.setattr(module, "available_memory", lambda: 50 * 1024)
    for tier, message in (("auto", ""), ("memory", "not held in memory"), ("device", "not held on the device")):
        setup, console = setup_of(loads_recipe(ON_FILES, [f'data.cache="{tier}"']), files_of(photographs), None)
        once, kept = batches_of(setup, cached=True)
        assert_equal(plain, once)
        assert "read from disk" in kept.descriptions[0], tier
        assert message in console.text


def test_whole_images_that_do_not_fit_into_memory_are_not_cached(
    photographs: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random crop is the first step, so that the images to cache are larger than the files."""
    more = '[augment]\ntrain = [{ name = "RandomResizedCrop", stage = "resize_crop" }]\n'
    monkeypatch.setattr(image_cache, "available_memory", lambda: 50 * 1024)
    setup, console = setup_of(loads_recipe(ON_FILES + more), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=False)
    once, kept = batches_of(setup, cached=True)
    assert_equal(plain, once)
    assert kept.done == {"train": 0, "validation": 2, "test": 2}
    assert "decoded images of train are not cached" in console.text


def test_images_stay_off_a_device_that_runs_out_of_memory(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, console = setup_of(loads_recipe(ON_FILES, ['data.cache="device"']), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=False)

    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        arguments = setup.recipe.augment, setup.preprocessing, 0, None
        plans = {split: plan_preprocessing(split, *arguments) for split in SPLITS}
        patched.setattr(torch.Tensor, "to", full)
        kept = SplitImages(setup, plans)
        kept.cache(DistributedCache(setup, unguarded), 3)
    assert "it ran out of memory; they stay in memory or on disk" in console.text
    assert "held in memory" in kept.descriptions[0]
    once, _ = batches_of(setup, cached=True)
    assert_equal(plain, once)


def test_images_needed_once_are_not_cached(photographs: Path, own_cache: Path) -> None:
    setup, console = setup_of(loads_recipe(ON_FILES), files_of(photographs), None)
    _, kept = batches_of(setup, cached=True, passes=1)
    assert kept.descriptions == []
    assert "needed at most once" in console.text
    assert not list(own_cache.glob("images-*/"))
    asked, _ = setup_of(loads_recipe(ON_FILES, ['data.cache="disk"']), files_of(photographs), None)
    assert batches_of(asked, cached=True, passes=1)[1].descriptions, "cached if the recipe requests it"


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_entry_is_rebuilt(photographs: Path, own_cache: Path, damage: str) -> None:
    setup, console = setup_of(loads_recipe(ON_FILES), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=True)
    (path,) = own_cache.glob("images-*/data.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    os.utime(path, (1, 1))
    path.write_bytes(content if damage == "flipped" else content[:-1])
    once, kept = batches_of(setup, cached=True)
    assert_equal(plain, once)
    assert "is damaged" in console.text
    assert "rebuilding it" in console.text
    assert kept.descriptions


def test_a_cache_folder_that_cannot_be_written_is_one_warning(photographs: Path, own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True, exist_ok=True)
    own_cache.write_text("a file with the folder's name")
    setup, console = setup_of(loads_recipe(ON_FILES), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=False)
    once, kept = batches_of(setup, cached=True)
    assert_equal(plain, once)
    assert kept.descriptions == []
    assert console.text.count("warning: ") == 1


def test_a_disk_that_fills_up_is_one_warning(
    photographs: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    setup, console = setup_of(loads_recipe(ON_FILES), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=False)
    monkeypatch.setattr(os, "pwrite", full)
    once, kept = batches_of(setup, cached=True)
    assert_equal(plain, once)
    assert kept.descriptions == []
    assert console.text.count("warning: ") == 1
    assert "No space left on device" in console.text
    assert not [path for path in own_cache.iterdir() if path.suffix != ".lock"], "no partial file is left"


def test_nothing_is_written_to_a_disk_without_room(
    photographs: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "free_disk", lambda folder: 50 * 1024)
    setup, console = setup_of(loads_recipe(ON_FILES), files_of(photographs), None)
    _, kept = batches_of(setup, cached=True)
    assert kept.descriptions == []
    assert "do not fit into the cache" in console.text
    assert not list(own_cache.glob("*images-*/"))


def spoiled(folder: Path, photographs: Path) -> EncodedImages:
    """Copy the photographs; one of the copies can be opened but not decoded."""
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / "7.jpg").read_bytes()
    (folder / "7.jpg").write_bytes(content[: len(content) // 2])
    return files_of(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_several_workers_build_an_entry_together(
    photographs: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """There are six blocks of two images, each written by the first worker that gets to it."""
    monkeypatch.setattr(image_cache, "BLOCK", 2)
    setup, console = setup_of(loads_recipe(ON_FILES, [f"data.workers={workers}"]), files_of(photographs), None)
    plain, _ = batches_of(setup, cached=False)
    once, kept = batches_of(setup, cached=True)
    assert_equal(plain, once)
    assert kept.descriptions
    store._verified.clear()
    again, _ = batches_of(setup, cached=True)
    assert_equal(plain, again)
    assert console.text.count("decoding images") == 1
    assert "damaged" not in console.text


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named_while_an_entry_is_built(
    tmp_path: Path, photographs: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(image_cache, "BLOCK", 2)
    images = spoiled(tmp_path / "spoiled", photographs)
    setup, _ = setup_of(loads_recipe(ON_FILES, ['data.cache="disk"', f"data.workers={workers}"]), images, None)
    # Otherwise the image is found while the size is estimated.
    monkeypatch.setattr(image_cache, "expected_bytes", lambda *_: 1000)
    with pytest.raises(UnreadableImageError, match=r"7\.jpg"):
        batches_of(setup, cached=True)
    assert [path.suffix for path in own_cache.iterdir()] == [".lock"]
    (lock,) = own_cache.iterdir()
    free = store.try_lock(own_cache, lock.stem)
    assert free is not None, "the build lock is released"
    free.release()
