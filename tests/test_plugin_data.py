"""Plugins of the user's own code: data sets (tests/test_data_sources.py trains from one), transforms and metrics."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import launch
from finished import CONVNET
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_digits
from torchvision.transforms import v2
from trainers import RECIPE as SMALL
from trainers import Trainers, at_call, kill_self

from toolkit import plugins
from toolkit.augment.transforms import build_transform, try_transform
from toolkit.data.dataset_report import analyze_dataset
from toolkit.data.datasets import open_dataset
from toolkit.data.image_sources import InMemoryImages, UnreadableImageError
from toolkit.data.preprocessing import Preprocessing
from toolkit.data.shard_pack import pack
from toolkit.errors import UserError
from toolkit.recipe import RecipeError, loads_recipe
from toolkit.recipe.schema import AugmentConfig, DataConfig, Recipe, TransformConfig
from toolkit.runs import Run, open_run
from toolkit.training.fit import fit
from toolkit.training.train_step import TrainStep

SHAPES = ("circle", "square", "triangle")


class Shapes:
    """Drawn shapes, made when an item is read; a label is the number of a class."""

    def __init__(self, count: int = 90, **attributes: Any) -> None:
        self.targets = [i % 3 for i in range(count)]
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, i: int) -> Image.Image:
        image = Image.new("L", (16, 16))
        x, y = np.random.default_rng(i).integers(0, 6, 2).tolist()
        draw = ImageDraw.Draw(image)
        match i % 3:
            case 0:
                draw.ellipse((x, y, x + 9, y + 9), fill=255)
            case 1:
                draw.rectangle((x, y, x + 9, y + 9), fill=255)
            case 2:
                draw.polygon([(x, y + 9), (x + 9, y + 9), (x + 5, y)], fill=255)
        return image

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return self.image(i), self.targets[i]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that registers a plugin until the end of the test."""
    monkeypatch.setattr(plugins, "_registered", dict(plugins._registered))

    def add(kind: str, name: str, factory: Callable[..., Any]) -> None:
        plugins.register(kind, name)(factory)

    return add


def opened(register: Callable[..., None], found: Any, **keys: Any) -> Any:
    """Open what a factory returns as the data set of a recipe."""
    register("dataset", "mine", lambda: found)
    return open_dataset(DataConfig(dataset="plugin", name="mine", **keys))


def test_items_may_be_pillow_images_arrays_and_tensors_of_any_layout(register: Callable[..., None]) -> None:
    """Pixels are the same for all of them, also for floats from 0 to 1, as torchvision's ToTensor makes them."""
    one = Shapes()
    expected = np.asarray(one.image(4))
    kinds = [
        one.image(4),
        one.image(4).convert("RGB"),
        expected,
        expected[..., None],
        torch.tensor(expected)[None],
        torch.tensor(expected).expand(3, -1, -1),
    ]
    for number, image in enumerate(kinds):
        one.image = lambda i, image=image: image  # type: ignore[method-assign]
        register("dataset", f"kind-{number}", lambda: one)
        found = open_dataset(DataConfig(dataset="plugin", name=f"kind-{number}", channels=1))
        assert np.array_equal(found.images.load(7)[..., 0], expected), number


def test_labels_are_numbers_or_names_and_classes_may_be_named(register: Callable[..., None]) -> None:
    found = opened(register, Shapes(), channels=1)
    assert found.classes == ["0", "1", "2"]
    assert found.labels.tolist() == [i % 3 for i in range(90)]
    named = Shapes(targets=[SHAPES[i % 3] for i in range(90)])
    register("dataset", "named", lambda: named)
    assert open_dataset(DataConfig(dataset="plugin", name="named")).classes == list(SHAPES)
    register("dataset", "numbered", lambda: Shapes(classes=SHAPES, targets=torch.tensor(Shapes().targets)))
    assert open_dataset(DataConfig(dataset="plugin", name="numbered")).classes == list(SHAPES)


def test_without_targets_the_labels_are_read_from_the_items(register: Callable[..., None]) -> None:
    class Items:
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> tuple[Any, Any]:
            return np.zeros((4, 4), dtype=np.uint8), np.int64(i % 2)

    assert opened(register, Items()).labels.tolist() == [0, 1] * 6


def test_groups_weights_names_and_official_splits_are_used(register: Callable[..., None]) -> None:
    train = Shapes(
        30, groups=[i // 10 for i in range(30)], weights=[1.0] * 29 + [3.0], names=[f"n{i}" for i in range(30)]
    )
    test = Shapes(9, groups=[9] * 9, weights=[1.0] * 9)
    found = opened(register, {"test": test, "train": train})
    assert found.lists["train"].tolist() == list(range(30))
    assert found.lists["test"].tolist() == list(range(30, 39))
    assert found.groups.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 9
    assert found.weights.tolist() == [1.0] * 29 + [3.0] + [1.0] * 9
    assert [found.images.name(i) for i in (0, 29, 30)] == ["n0", "n29", "test/0"]


def test_several_labels_are_arrays_of_zeros_and_ones_or_lists(register: Callable[..., None]) -> None:
    rows = [[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 0]] * 5
    for targets in (
        np.array(rows),
        torch.tensor(rows, dtype=torch.float32),
        [np.flatnonzero(row).tolist() for row in rows],
    ):
        found = opened(register, Shapes(targets=targets), class_names=list(SHAPES))
        assert found.is_multi_label
        assert found.labels.tolist() == rows
        plugins._registered.pop(("dataset", "mine"))
    assert opened(register, Shapes(targets=np.array(rows))).classes == ["0", "1", "2"]


FAULTY = {
    "a generator": ((image for image in ()), "is a generator without __len__: images are read by index"),
    "no training split": ({"test": Shapes()}, "has no split 'train'"),
    "another split": (
        {"train": Shapes(), "dev": Shapes()},
        "has the split 'dev'; the splits are train, validation, test",
    ),
    "a regression": (Shapes(targets=[0.5] * 9), "9 rows of mine cannot be used: row 0: the label 0.5 is not a name"),
    "a class without a name": (Shapes(classes=SHAPES[:2]), "the label '2' is not in data.class_names"),
    "too few targets": (SimpleNamespace(targets=[0]), "without __len__"),
    "a name of two images": (Shapes(names=["a"] * 90), "has more than one image named 'a'"),
    "no images": (Shapes(0), "the data set 'mine' has no images"),
    "one class": (Shapes(targets=[1] * 9), "mine has only the class '1'; a classifier needs two or more classes"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_what_is_not_a_data_set_of_labeled_images_is_explained(fault: str, register: Callable[..., None]) -> None:
    found, message = FAULTY[fault]
    with pytest.raises(UserError) as caught:
        opened(register, found)
    assert message in str(caught.value)


@pytest.mark.parametrize("attribute", ["targets", "names", "groups", "weights"])
def test_attributes_have_one_value_per_image(attribute: str, register: Callable[..., None]) -> None:
    class Short(Shapes):
        def __len__(self) -> int:
            return 90

    with pytest.raises(UserError, match=f"the data set 'mine' has 90 images, but 2 {attribute}"):
        opened(register, Short(**{attribute: [0, 1]}))


def test_an_item_that_is_tried_may_fail_if_it_is_left_out(register: Callable[..., None]) -> None:
    class Failing(Shapes):
        def __getitem__(self, i: int) -> tuple[Any, Any]:
            if i == 0:
                raise ValueError("lost")
            return super().__getitem__(i)

    with pytest.raises(UserError, match="the data set 'mine' fails at train/0: ValueError: lost"):
        opened(register, Failing())
    assert len(opened(register, Failing(), on_bad_image="skip").images) == 90


def test_packed_items_are_those_of_the_data_set(register: Callable[..., None], tmp_path: Path) -> None:
    plain = opened(register, Shapes())
    pack(DataConfig(dataset="plugin", name="mine"), tmp_path / "shards", 2**20, lambda line: None)
    packed = open_dataset(DataConfig(dataset="shards", root=str(tmp_path / "shards")))
    assert packed.labels.tolist() == plain.labels.tolist()
    assert all(np.array_equal(packed.images.load(i), plain.images.load(i)) for i in range(90))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: None, "augment.train: plugin:own must return an image, not NoneType"),
        (lambda image: image.convert("RGBA"), "augment.train makes images with 4 channels, but the model takes 1"),
    ],
)
def test_a_transform_must_return_an_image_for_the_model(
    transform: Callable[..., Any], message: str, register: Callable[..., None]
) -> None:
    register("transform", "own", lambda: transform)
    augment = AugmentConfig(train=[TransformConfig(name="plugin:own")])
    preprocessing = Preprocessing(1, (16, 16), None, False, "bilinear", (0.5,), (0.5,))
    images = InMemoryImages(np.zeros((1, 16, 16), np.uint8), "own", 1)
    with pytest.raises(UserError, match=message):
        try_transform(build_transform("train", augment, preprocessing), images, 0)


def test_an_item_that_fails_is_named(register: Callable[..., None]) -> None:
    class Failing(Shapes):
        def __getitem__(self, i: int) -> tuple[Any, Any]:
            if i == 40:
                raise ValueError("lost")
            return super().__getitem__(i)

    found = opened(register, Failing())
    with pytest.raises(UnreadableImageError, match=r"train/40: damaged \(lost\)"):
        found.images.load(40)


RECIPE = """
[recipe]
name = "shapes"
run_root = "{root}"

[data]
dataset = "plugin"
name = "shapes"
image_size = 16
channels = 1
workers = 0

[model]
source = "toolkit"
convnet = {{ blocks = [{{ channels = 6, pool = 2 }}] }}

[optimizer]
lr = 0.05

[train]
epochs = 1
batch_size = 16
precision = "no"

[tracking]
trackers = []
"""


def recipe_with(root: Any, *settings: str) -> Recipe:
    return loads_recipe(RECIPE.format(root=root), list(settings))


def log_of(run: Run) -> str:
    return run.log_file.read_text()


def test_a_data_set_that_augments_images_itself_is_refused(register: Callable[..., None]) -> None:
    class Random(Shapes):
        reads = 0

        def image(self, i: int) -> Image.Image:
            self.reads += 1
            return ImageOps.invert(super().image(i)) if self.reads % 2 else super().image(i)

    with pytest.raises(UserError, match=r"gives another image when train/.* is read again"):
        opened(register, Random(30))


def test_images_are_cached_only_with_a_version(register: Callable[..., None], tmp_path: Path) -> None:
    register("dataset", "shapes", Shapes)
    recipe = recipe_with(tmp_path, 'data.cache="memory"')
    plain = fit(recipe, quiet=True)
    assert "not cached: shapes has no attribute `version`" in log_of(plain)
    plugins._registered.pop(("dataset", "shapes"))
    register("dataset", "shapes", lambda: Shapes(version="1"))
    cached = fit(recipe, quiet=True)
    assert "cached: images of train" in log_of(cached)
    assert cached.epoch_records()[-1]["val/loss"] == plain.epoch_records()[-1]["val/loss"]


def test_toolkit_data_describes_a_data_set_of_the_users_own(register: Callable[..., None], tmp_path: Path) -> None:
    register("dataset", "shapes", lambda: Shapes(classes=SHAPES))
    found = analyze_dataset(recipe_with(tmp_path), lambda line: None)
    assert {split: sum(counts) for split, counts in found.counts.items()} == {"train": 65, "validation": 7, "test": 18}


def digits() -> Any:
    """The digits as a data set of the user's own."""
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)

    class Digits:
        targets, classes, version = found.target, tuple("0123456789"), "1"

        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, i: int) -> tuple[Any, Any]:
            return pixels[i], found.target[i]

    return Digits()


class Flip:
    """A transform of the user's own that draws from the three global generators."""

    def __init__(self, p: float, generator: str = "torch") -> None:
        self.p, self.generator = p, generator

    def __call__(self, image: Image.Image) -> Image.Image:
        draws = {"torch": lambda: float(torch.rand(1)), "numpy": np.random.random, "python": random.random}
        return ImageOps.mirror(image) if draws[self.generator]() < self.p else image


def accuracy() -> Callable[..., float]:
    return lambda labels, probabilities: float((probabilities.argmax(1) == labels).mean())


PLUGINS = ("--set", 'data.dataset="plugin"', "--set", 'data.name="digits"', "--set", 'train.metrics=["plugin:right"]')
IMAGES = (
    "--set",
    "data.image_size=8",
    "--set",
    "data.channels=1",
    "--set",
    'augment.run_on="workers"',
    "--set",
    "data.workers=0",
)


def with_transform(name: str) -> tuple[str, ...]:
    entry = f'{{ name = "{name}", p = 0.5 }}'
    return "--set", f"augment.train=[{entry}]"


@pytest.fixture
def registered(register: Callable[..., None]) -> None:
    register("dataset", "digits", digits)
    register("transform", "flip", Flip)
    register("transform", "torchvision_flip", v2.RandomHorizontalFlip)
    register("metric", "right", accuracy)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_plugins_give_the_run_of_their_built_in_counterparts(processes: int, registered: None, tmp_path: Path) -> None:
    """Compare the digits with a flip, built in and as plugins; as plugins also killed and resumed."""
    expected = run_of(processes, tmp_path / "built-in", *IMAGES, *with_transform("RandomHorizontalFlip"))
    arguments = (*IMAGES, *PLUGINS, *with_transform("plugin:torchvision_flip"))
    found = run_of(processes, tmp_path / "plugins", *arguments)
    killed = run_of(processes, tmp_path / "killed", *arguments, status=-9, prepare=kill_at_step_6)
    resumed = run_of(processes, tmp_path / "killed", *arguments, "--resume", str(killed.path))
    for run in (found, resumed):
        for record in (records := run.epoch_records()):
            assert record.pop("val/right") == record["val/accuracy"]
        assert records == expected.epoch_records()
        for model in ("best", "last"):
            assert run.summary[model]["test_right"] == run.summary[model]["test_accuracy"]
        assert run.best_weights.read_bytes() == expected.best_weights.read_bytes()


def kill_at_step_6(rank: int) -> None:
    at_call(TrainStep, "_update", 6, kill_self)


def run_of(processes: int, folder: Path, *arguments: str, status: int = 0, **named: Any) -> Run:
    folder.mkdir(exist_ok=True)
    recipe = folder / "small.toml"
    recipe.write_text(SMALL.format(root=folder / "runs") + CONVNET)
    trainers = Trainers(processes, folder, recipe, *arguments, **named)
    assert trainers.wait()[0] == status, trainers.text()
    (path,) = (folder / "runs" / "small").iterdir()
    return open_run(path)


@pytest.mark.parametrize("generator", ["torch", "numpy", "python"])
def test_random_numbers_of_a_transform_depend_on_the_example_alone(
    generator: str, registered: None, tmp_path: Path
) -> None:
    """Whichever global generator it uses: with data workers, two runs are equal."""
    entry = f'{{ name = "plugin:flip", p = 0.5, generator = "{generator}" }}'
    settings = ['data.dataset="plugin"', 'data.name="digits"', "data.image_size=8", f"augment.train=[{entry}]"]
    settings += ["data.images_per_class=9", "data.test_images_per_class=3"]
    runs = [fit(recipe_with(tmp_path, *settings, f"data.workers={workers}"), quiet=True) for workers in (0, 2)]
    assert runs[0].epoch_records() == runs[1].epoch_records()


def test_names_and_arguments_of_transforms_and_metrics_are_checked(registered: None) -> None:
    text = RECIPE.format(root="runs").replace('name = "shapes"\nimage', 'name = "digits"\nimage')
    faults = {
        'augment.train=[{ name = "plugin:flop", p = 0.5 }]': "no transform plugin 'flop' is loaded",
        'augment.train=[{ name = "plugin:flip" }]': "flip needs p",
        'augment.train=[{ name = "plugin:flip", p = 0.5, generatr = "torch" }]': 'flip takes no argument "generatr"',
        'train.metrics=["plugin:left"]': "no metric plugin 'left' is loaded",
        'data.name="digit"': "no dataset plugin 'digit' is loaded",
        "data.args={ size = 8 }": 'digits takes no argument "size"',
    }
    for setting, message in faults.items():
        with pytest.raises(RecipeError) as caught:
            loads_recipe(text, [setting])
        assert message in str(caught.value)
    with pytest.raises(RecipeError, match='must be given with dataset = "plugin"'):
        loads_recipe(text.replace('name = "digits"\n', ""))


FAULTY_METRICS: dict[str, tuple[Callable[..., Any], str]] = {
    "nan": (lambda labels, probabilities: math.nan, "the metric 'mine' is nan for random labels"),
    "vector": (lambda labels, probabilities: probabilities.max(1), "the metric 'mine' failed: TypeError"),
    "raises": (lambda labels: 1.0, "the metric 'mine' failed: TypeError"),
}


@pytest.mark.parametrize("fault", FAULTY_METRICS)
def test_a_faulty_metric_is_found_before_training(
    fault: str, register: Callable[..., None], registered: None, tmp_path: Path
) -> None:
    function, message = FAULTY_METRICS[fault]
    register("metric", "mine", lambda: function)
    settings = ['data.name="digits"', "data.image_size=8", 'train.metrics=["plugin:mine"]']
    with pytest.raises(UserError) as caught:
        fit(recipe_with(tmp_path, *settings), quiet=True)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_metric_may_not_have_the_name_of_a_built_in_one(
    register: Callable[..., None], registered: None, tmp_path: Path
) -> None:
    register("metric", "macro_f1", accuracy)
    settings = ['data.name="digits"', "data.image_size=8", 'train.metrics=["plugin:macro_f1"]']
    with pytest.raises(UserError, match="'macro_f1' is the name of a built-in metric"):
        fit(recipe_with(tmp_path, *settings), quiet=True)


def error_rate() -> Callable[..., float]:
    return lambda labels, probabilities: 1 - accuracy()(labels, probabilities)


def test_a_metric_selects_the_best_epoch_stops_and_lowers_the_learning_rate(
    register: Callable[..., None], tmp_path: Path
) -> None:
    """The error does what the accuracy does, because it says that lower values are better."""
    plugins.register("metric", higher_is_better=False)(error_rate)
    runs = []
    for metric in ("val/accuracy", "val/error_rate"):
        settings = ["train.epochs=8", "optimizer.lr=0.2", 'scheduler.name="plateau"', "scheduler.patience=0"]
        settings += ['scheduler.threshold_mode="abs"', "scheduler.threshold=0.02", "early_stopping.patience=3"]
        settings += ["early_stopping.min_delta=0.02", 'train.metrics=["plugin:error_rate"]', "data.images_per_class=20"]
        settings += [f'{key}="{metric}"' for key in ("train.best_metric", "scheduler.metric", "early_stopping.metric")]
        runs.append(fit(on_digits(tmp_path, *settings), quiet=True))
    records = runs[0].epoch_records()
    assert runs[1].epoch_records() == records
    assert len({record["lr"] for record in records}) > 1
    assert runs[0].summary["stopped_early"]
    assert runs[1].summary["best"] == runs[0].summary["best"]
    assert runs[0].summary["best"]["epoch"] > 1
    assert "validation error_rate" in runs[1].report().read_text()


def test_names_of_monitored_metrics_are_checked(register: Callable[..., None], registered: None) -> None:
    faults = {
        'train.best_metric="val/acuracy"': 'no metric "val/acuracy"(.*\n)+  hint: did you mean val/accuracy',
        'train.best_metric="val/rihgt"': "hint: did you mean val/right",
        'scheduler.metric="val/other"': 'hint: or add "plugin:other" to train.metrics',
        'early_stopping.metric="test/right"': 'expected .* or "val/NAME" of a plugin in train.metrics, found',
    }
    for setting, message in faults.items():
        with pytest.raises(RecipeError, match=message):
            on_digits("runs", 'train.metrics=["plugin:right"]', setting)
    with pytest.raises(UserError, match="only metrics have a direction"):
        plugins.register("loss", higher_is_better=True)


def on_digits(root: Any, *settings: str) -> Recipe:
    """Return a recipe for another data set than the one that fit is given."""
    text = RECIPE.format(root=root).replace('dataset = "plugin"\nname = "shapes"', 'dataset = "digits"')
    return loads_recipe(text, list(settings))


def flip() -> Flip:
    return Flip(0.5)


def hit_rate() -> Callable[..., float]:
    return accuracy()


@pytest.mark.usefixtures("register")
def test_fit_takes_a_data_set_transforms_and_metrics_and_records_their_names(tmp_path: Path) -> None:
    """The recipe that is trained names them, so that giving them again resumes the run."""
    recipe = on_digits(tmp_path, "train.epochs=2")
    given = {"dataset": Shapes(), "transforms": [flip], "metrics": [hit_rate]}
    paused = fit(recipe, **given, until=1, quiet=True)  # type: ignore[arg-type]
    run = fit(recipe, **given, resume=paused.path, quiet=True)  # type: ignore[arg-type]
    recorded = run.recipe
    assert (recorded.data.dataset, recorded.data.name) == ("plugin", "Shapes")
    assert [entry.name for entry in recorded.augment.train] == ["plugin:flip"]
    assert recorded.train.metrics == ["plugin:hit_rate"]
    named = {(one["kind"], one["name"], one["file"]) for one in run.environment["plugins"]}
    file = Path(__file__).name
    assert named == {("dataset", "Shapes", file), ("transform", "flip", file), ("metric", "hit_rate", file)}
    assert run.summary["best"]["test_hit_rate"] == run.summary["best"]["test_accuracy"]


@pytest.mark.usefixtures("register")
def test_a_callback_gets_each_epoch_and_may_end_the_training(tmp_path: Path) -> None:
    """Also if the last epoch's model is to be kept."""
    seen: list[tuple[Path, int]] = []

    def stop_at_2(run: Run, record: dict[str, Any]) -> bool:
        seen.append((run.path, record["epoch"]))
        return record["epoch"] == 2

    recipe = on_digits(tmp_path, "train.epochs=5", 'train.best_metric="last"')
    run = fit(recipe, dataset=Shapes(), callbacks=[stop_at_2], quiet=True)
    assert seen == [(run.path, 1), (run.path, 2)]
    assert run.summary["stopped_early"]
    assert run.summary["epochs_run"] == run.summary["best"]["epoch"] == 2
    assert "stopped by a callback" in log_of(run)


def stop_at_once(run: Run, record: dict[str, Any]) -> bool:
    return True


def fit_on_this_process(root: Path) -> int:
    recipe = on_digits(root, "train.epochs=3")
    return int(fit(recipe, dataset=Shapes(), callbacks=[stop_at_once], quiet=True).summary["epochs_run"])


@pytest.mark.long
@pytest.mark.usefixtures("register")
def test_a_callback_of_the_main_process_ends_the_training_of_all(tmp_path: Path) -> None:
    assert launch(2, fit_on_this_process, tmp_path) == [1, 1]
