"""Ways to tamper with a run directory and its data between two commands, and the correct outcome of each."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_folders import write_images, write_recipe

from toolkit.recipe import load_recipe
from toolkit.runs import Run
from toolkit.training.fit import fit


@dataclass
class CaseFiles:
    """Files of one case: a copy of a run, its data, and another run of the same model with another seed."""

    run: Run
    data: Path
    other: Run

    @property
    def checkpoints(self) -> Path:
        return self.run.checkpoints

    def edit(self, name: str, *changes: tuple[str, str]) -> None:
        """Replace texts in one of the run's files; each must occur in it."""
        path = self.run.path / name
        text = path.read_text()
        for old, new in changes:
            assert old in text, f"{name} has no {old!r}"
            text = text.replace(old, new, 1)
        path.write_text(text)

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.run.path / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def content_of(self, stem: str) -> Path:
        """Return the file that holds a checkpoint's tensors."""
        (path,) = self.checkpoints.glob(f"{stem}-*.pt")
        return path


def flip(path: Path, index: int = -3) -> None:
    """Flip one bit without changing the file's modification time and size."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@dataclass
class Originals:
    """The runs that cases copy, all on the same data: some paused after two of four epochs, some finished."""

    folder: Path
    paused: Run
    finished: Run
    other_paused: Run
    other_finished: Run

    @classmethod
    def make(cls, folder: Path) -> Originals:
        write_images(folder / "data")
        shutil.copytree(folder / "data", folder / "kept")
        runs = []
        for seed in (0, 7):
            settings = [f"recipe.seed={seed}", "optimizer.lr=0.02", 'train.best_metric="val/loss"']
            recipe = load_recipe(write_recipe(folder), settings)
            runs += [fit(recipe, until=2, quiet=True), fit(recipe, quiet=True)]
        for run in runs:
            shutil.move(run.path, folder / "originals" / run.id)
        paused, finished, *others = (Run(folder / "originals" / run.id) for run in runs)
        losses = [record["val/loss"] for record in finished.epoch_records()]
        assert losses == sorted(losses, reverse=True), "each checkpoint must refer to different best weights"
        return cls(folder, paused, finished, *others)

    def fresh_copy(self, *, of_finished: bool) -> CaseFiles:
        """Copy everything, to the same paths in every case."""
        shutil.rmtree(self.folder / "data")
        shutil.copytree(self.folder / "kept", self.folder / "data")
        run = self.finished if of_finished else self.paused
        target = self.folder / "runs" / "small" / run.id
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run.path, target)
        return CaseFiles(Run(target), self.folder / "data", self.other_finished if of_finished else self.other_paused)


@dataclass(frozen=True)
class Case:
    """One way to tamper, and its only correct outcome."""

    name: str
    tamper: Callable[[CaseFiles], object]
    refusal: str = ""
    """A pattern of the refusal's message; "": the command must give the result of an untouched run."""
    logged: str = ""
    """If the command must give a result: a pattern that log.txt must match."""


def _recipe(*changes: tuple[str, str]) -> Callable[[CaseFiles], object]:
    return lambda files: files.edit("recipe.toml", *changes)


def _swap_data(files: CaseFiles) -> None:
    one, two, aside = files.data / "c0/03.bmp", files.data / "c1/03.bmp", files.data / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def _copy(files: CaseFiles, pattern: str) -> None:
    for path in files.other.checkpoints.glob(pattern):
        shutil.copy(path, files.checkpoints)


def _other_checkpoint(files: CaseFiles) -> None:
    for path in [*files.checkpoints.glob("0*.json"), *files.checkpoints.glob("*.pt")]:
        path.unlink()
    _copy(files, "*")


def _swap_manifests(files: CaseFiles) -> None:
    one, two = (files.checkpoints / f"000{n}-000000.json" for n in (1, 2))
    texts = one.read_text(), two.read_text()
    one.write_text(texts[1])
    two.write_text(texts[0])


def _all_content(damage: Callable[[Path], object]) -> Callable[[CaseFiles], object]:
    return lambda files: [damage(path) for path in files.checkpoints.glob("*.pt")]


def _move(files: CaseFiles, old: str, new: str) -> None:
    (files.data / new).parent.mkdir(exist_ok=True)
    (files.data / old).rename(files.data / new)


def _touch(files: CaseFiles, pattern: str) -> None:
    for path in files.data.glob(pattern):
        os.utime(path)


def _new_image(files: CaseFiles, name: str) -> None:
    path = files.data / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(files.data / "c1/02.bmp", path)
    flip(path)


def _split_moved(content: dict[str, Any]) -> None:
    content["test"].append(content["train"].pop())


NEWEST, BEFORE = "checkpoints/0002-000000", "checkpoints/0001-000000"
BEST, BEST_BEFORE = "checkpoints/best-0002.safetensors", "checkpoints/best-0001.safetensors"
FELL_BACK = "checkpoint 0002-000000 is damaged .*trying the previous one"
SKIPPED = r"checkpoint 0002-000000 is skipped, because best-0002\.safetensors is "


def _file(name: str, damage: Callable[[Path], object]) -> Callable[[CaseFiles], object]:
    return lambda files: damage(files.run.path / name)


def _text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


RESUMED = [
    # recipe.toml
    Case("lr edited", _recipe(("lr = 0.02", "lr = 0.01")), r"another recipe \(optimizer\.lr: 0\.02 -> 0\.01\)"),
    Case("epochs edited", _recipe(("epochs = 4", "epochs = 3")), r"train\.epochs: 4 -> 3"),
    Case("batch size edited", _recipe(("batch_size = 12", "batch_size = 10")), r"train\.batch_size: 12 -> 10"),
    Case("seed edited", _recipe(("seed = 0\nrun_root", "seed = 7\nrun_root")), r"recipe\.seed: 0 -> 7"),
    Case("split edited", _recipe(("validation = 0.2", "validation = 0.3")), r"data\.split\.validation: 0\.2 -> 0\.3"),
    Case("model edited", _recipe(("channels = 4", "channels = 5")), r"model\.convnet"),
    Case("loss edited", _recipe(("label_smoothing = 0.0", "label_smoothing = 0.1")), r"label_smoothing: 0\.0 -> 0\.1"),
    Case("two keys edited", _recipe(("lr = 0.02", "lr = 0.01"), ("epochs = 4", "epochs = 3")), r"lr: .*; train\.ep"),
    Case("recipe cut", _file("recipe.toml", cut), r"recipe\.toml"),
    Case("recipe empty", _file("recipe.toml", _text("")), r"recipe\.toml"),
    Case("recipe missing", _file("recipe.toml", Path.unlink), r"there is no recipe .*recipe\.toml"),
    Case("recipe of another run", lambda p: shutil.copy(p.other.path / "recipe.toml", p.run.path),
         r"recipe\.seed: 0 -> 7"),
    Case("a comment added", lambda p: p.edit("recipe.toml", ("[train]", "# mine\n[train]"))),
    Case("description edited", _recipe(('description = ""', 'description = "mine"'))),
    Case("checkpoint.keep edited", _recipe(("keep = 2", "keep = 1"))),
    Case("tracking edited", _recipe(('notes = ""', 'notes = "mine"'))),
    # checkpoints
    Case("all checkpoints of another run", _other_checkpoint, r"another recipe \(recipe\.seed: 7 -> 0\)"),
    Case("a newer checkpoint of another run", lambda p: (
        shutil.copy(next(p.other.checkpoints.glob("0002-000000.json")), p.checkpoints),
        _copy(p, "0002-000000-*.pt"), _copy(p, "best-*")), r"another recipe \(recipe\.seed: 7 -> 0\)"),
    Case("newest content flipped", lambda p: flip(p.content_of("0002-000000")), logged=FELL_BACK),
    Case("newest content flipped in the middle", lambda p: flip(p.content_of("0002-000000"), 5000), logged=FELL_BACK),
    Case("newest content cut", lambda p: cut(p.content_of("0002-000000")), logged=FELL_BACK),
    Case("newest content empty", lambda p: os.truncate(p.content_of("0002-000000"), 0), logged=FELL_BACK),
    Case("newest content missing", lambda p: p.content_of("0002-000000").unlink(), logged=FELL_BACK),
    Case("newest content replaced by the one before", lambda p: shutil.copy(
        p.content_of("0001-000000"), p.content_of("0002-000000")), logged=FELL_BACK),
    Case("newest content replaced by another run's", lambda p: shutil.copy(
        next(p.other.checkpoints.glob("0002-000000-*.pt")), p.content_of("0002-000000")), logged=FELL_BACK),
    Case("every content flipped", _all_content(flip), logged="no intact checkpoint is left: the run starts over"),
    Case("checkpoints folder missing", lambda p: shutil.rmtree(p.checkpoints), logged="is missing: the run starts"),
    # manifests
    Case("newest manifest missing", _file(f"{NEWEST}.json", Path.unlink), logged=FELL_BACK),
    Case("newest manifest cut", _file(f"{NEWEST}.json", cut), logged=FELL_BACK),
    Case("newest manifest with another epoch", lambda p: p.edit_json(f"{NEWEST}.json", lambda c: c.update(epoch=3)),
         logged=FELL_BACK),
    Case("newest manifest has another checksum", lambda p: p.edit_json(
        f"{NEWEST}.json", lambda c: c.update(sha256="0" * 64)), logged=FELL_BACK),
    Case("newest manifest names a file elsewhere", lambda p: p.edit_json(
        f"{NEWEST}.json", lambda c: c.update(file="../../../etc/passwd")), logged=FELL_BACK),
    Case("newest manifest names the content before", lambda p: p.edit_json(
        f"{NEWEST}.json", lambda c: c.update(json.loads((p.run.path / f"{BEFORE}.json").read_text())
                                             | {"epoch": 2}))),
    Case("newest manifest without best weights' checksum", lambda p: p.edit_json(
        f"{NEWEST}.json", lambda c: c.pop("best_weights"))),
    Case("manifests swapped", _swap_manifests, logged="unlike its name"),
    Case("a manifest of a later epoch", lambda p: shutil.copy(
        p.run.path / f"{BEFORE}.json", p.checkpoints / "0003-000000.json"), logged="0003-000000 is damaged"),
    Case("a half-written later checkpoint", lambda p: (p.checkpoints / ".0003-000000.json.1.tmp").write_text("{")),
    # best weights
    Case("best weights flipped", _file(BEST, flip), logged=SKIPPED),
    Case("best weights missing", _file(BEST, Path.unlink), logged=SKIPPED),
    Case("best weights cut", _file(BEST, cut), logged=SKIPPED),
    Case("best weights of another run", lambda p: _copy(p, "best-0002*"), logged=SKIPPED),
    Case("best weights of the epoch before", lambda p: shutil.copy(p.run.path / BEST_BEFORE, p.run.path / BEST),
         logged=SKIPPED),
    Case("all best weights flipped", lambda p: [flip(path) for path in p.checkpoints.glob("best-*")],
         r"best-0002\.safetensors is lost \(its checksum differs\)"),
    Case("best weights that the newest checkpoint does not need", _file(BEST_BEFORE, flip)),
    # other files of the run
    Case("metrics missing", _file("metrics.jsonl", Path.unlink), r"metrics\.jsonl"),
    Case("metrics cut", _file("metrics.jsonl", cut), r"metrics\.jsonl"),
    Case("metrics edited", lambda p: p.edit("metrics.jsonl", ('"lr": 0.02', '"lr": 0.03')), r"metrics\.jsonl"),
    Case("metrics with an incomplete last line", lambda p: (p.run.metrics_file.open("a").write('{"epoch": 3, "tr'))),
    Case("split.json missing", _file("split.json", Path.unlink)),
    Case("split.json: a training image in the test split", lambda p: p.edit_json("split.json", _split_moved)),
    Case("split.json: another hash", lambda p: p.edit_json("split.json", lambda c: c.update(hash="0" * 64))),
    Case("split.json cut", _file("split.json", cut)),
    Case("model.json missing", _file("checkpoints/model.json", Path.unlink)),
    Case("model.json: classes swapped", lambda p: p.edit_json(
        "checkpoints/model.json", lambda c: c["classes"].reverse())),
    Case("files.safetensors missing", _file("checkpoints/files.safetensors", Path.unlink)),
    Case("environment.json missing", _file("environment.json", Path.unlink)),
    Case("a hand-written summary", _file("summary.json", _text("{}")), "is finished: there is nothing to resume"),
    # data
    Case("an image added", lambda p: _new_image(p, "c0/99.bmp"), r"1 image\(s\) added: c0/99\.bmp"),
    Case("an image removed", lambda p: (p.data / "c2/00.bmp").unlink(), r"1 image\(s\) removed: c2/00\.bmp"),
    Case("an image relabeled", lambda p: _move(p, "c0/00.bmp", "c3/100.bmp"), r"1 image\(s\) moved: c0/00\.bmp -> c3"),
    Case("an image renamed", lambda p: _move(p, "c0/00.bmp", "c0/zz.bmp"), r"c0/00\.bmp -> c0/zz\.bmp"),
    Case("two images swapped", _swap_data, r"2 image\(s\) moved: c1/03\.bmp -> c0/03\.bmp"),
    Case("a class renamed", lambda p: _move(p, "c3", "c4"), r"1 class\(es\) gone: c3; 1 new class\(es\): c4"),
    Case("a class removed", lambda p: shutil.rmtree(p.data / "c3"), r"1 class\(es\) gone: c3"),
    Case("a class added", lambda p: _new_image(p, "c9/00.bmp"), r"1 new class\(es\): c9"),
    Case("an image replaced", lambda p: (flip(p.data / "c2/07.bmp"), _touch(p, "c2/07.bmp")),
         r"1 file\(s\) replaced: c2/07\.bmp"),
    Case("an image cut", lambda p: cut(p.data / "c2/07.bmp"), r"c2/07\.bmp"),
    Case("all data gone", lambda p: shutil.rmtree(p.data) or p.data.mkdir(), "has no class folders|holds"),
    Case("the data copied", lambda p: _touch(p, "*/*.bmp")),
    Case("a text file and a hidden folder added", lambda p: (
        (p.data / "c0/notes.txt").touch(), (p.data / "c0/.trash").mkdir(), _new_image(p, "c0/.trash/1.bmp"))),
]  # fmt: skip
"""`toolkit train --resume RUN` after tampering with a run that paused after two of four epochs."""

_FLIPPED = r"best\.safetensors is damaged: its checksum differs"
_OTHERS = r"best\.safetensors is not the file that this run ended with"
_FINISHED = "checkpoints/best.safetensors"
WEIGHTS = [
    Case("best weights flipped", _file(_FINISHED, flip), _FLIPPED),
    Case("best weights cut", _file(_FINISHED, cut), r"best\.safetensors"),
    Case("best weights empty", lambda p: os.truncate(p.run.best_weights, 0), r"best\.safetensors"),
    Case("best weights of another run", lambda p: shutil.copy(p.other.best_weights, p.run.best_weights), _OTHERS),
    Case("best weights are text", _file(_FINISHED, _text("weights")), r"best\.safetensors"),
    Case("model.json missing", _file("checkpoints/model.json", Path.unlink), r"model\.json"),
    Case("model.json cut", _file("checkpoints/model.json", cut), r"model\.json"),
    Case(
        "model.json: classes swapped",
        lambda p: p.edit_json("checkpoints/model.json", lambda c: c["classes"].reverse()),
        r"model\.json|other classes",
    ),
    Case(
        "model.json: a class missing",
        lambda p: p.edit_json("checkpoints/model.json", lambda c: c["classes"].pop()),
        r"model\.json",
    ),
]
"""Cases for every command that needs a finished run's model."""
PUBLISHED = [
    *WEIGHTS,
    Case("lr edited", _recipe(("lr = 0.02", "lr = 0.01")), r"optimizer\.lr: 0\.02 -> 0\.01"),
    Case("recipe of another run", lambda p: shutil.copy(p.other.path / "recipe.toml", p.run.path), r"recipe\.seed"),
    Case("summary missing", _file("summary.json", Path.unlink), "is not finished"),
    Case("summary cut", _file("summary.json", cut), r"summary\.json"),
    Case("tracking edited", _recipe(('notes = ""', 'notes = "mine"'))),
]
EVALUATED = [
    *WEIGHTS,
    Case("split.json: a training image in the test split", lambda p: p.edit_json("split.json", _split_moved),
         r"split\.json"),
    Case("split.json missing", _file("split.json", Path.unlink), r"split\.json"),
    Case("split.json cut", _file("split.json", cut), r"split\.json"),
    Case("a test image removed", lambda p: (p.data / p.run.split["test"][0]).unlink(),
         "1 of the 12 test images .* are no longer in the data set"),
    Case("a test image relabeled", lambda p: _move(p, p.run.split["test"][0], "c3/zz.bmp"),
         "1 of the 12 test images .* are no longer in the data set"),
    Case("a class added", lambda p: _new_image(p, "c9/00.bmp"), "now has different classes.*new: c9"),
    Case("an image added", lambda p: _new_image(p, "c0/99.bmp")),
    Case("predictions cut", _file("predictions.csv", cut), r"predictions\.csv"),
]  # fmt: skip


def without_times(run: Run) -> dict[str, Any]:
    """Return the parts of a run that must be equal: no times, and no record of which images were already cached."""
    varying = re.compile("seconds|images_per_s|peak_memory_gib|cached")
    return {
        "weights": run.best_weights.read_bytes(),
        "metrics": run.metrics_file.read_bytes(),
        "predictions": (run.path / "predictions.csv").read_bytes(),
        **{f"summary's {key}": value for key, value in run.summary.items() if not varying.search(key)},
        "split": {key: run.split[key] for key in ("hash", "train", "validation", "test")},
        "classes": run.model_card["classes"],
    }
