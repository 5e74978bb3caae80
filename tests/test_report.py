"""`toolkit report RUN`: the files it writes, and its messages about incomplete runs."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Outcome, toolkit
from finished import CONVNET, digit_files, train_on_files
from matplotlib.figure import Figure
from PIL import Image
from report_runs import HOSTILE, SCRIPT, write_run

from toolkit.formatting import batch_split, plural
from toolkit.report import run_report
from toolkit.runs import Run

pytestmark = pytest.mark.long

FIGURES = {
    "loss", "accuracy", "learning-rate", "confusion", "class-accuracy", "reliability", "filters", "filter-effect",
    "class-histogram",
}  # fmt: skip
PHOTOGRAPHS = {"mistakes", "samples"}
QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


def report(*arguments: object) -> Outcome:
    return toolkit("report", *(str(argument) for argument in arguments))


def page(outcome: Outcome) -> str:
    return Path(outcome.stdout.splitlines()[-1]).read_text()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path)


def _unwritten(figure: Figure, folder: Path, name: str, kinds: Sequence[str]) -> list[Path]:
    return [folder / f"{name}.{kind}" for kind in kinds]


@pytest.fixture
def unprinted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw all figures and render those of the page, but skip the files for print; halves the time."""
    monkeypatch.setattr(run_report, "save", _unwritten)


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures as objects, without writing or rendering them; takes a tenth of the time."""
    monkeypatch.setattr(run_report, "save", _unwritten)
    monkeypatch.setattr(run_report, "page_svg", lambda figure, label: f"<svg><title>{html.escape(label)}</title></svg>")


@pytest.mark.usefixtures("pdf_figures")
def test_a_report_has_all_figures_and_one_page(run: Run) -> None:
    outcome = report(run.path)
    assert (outcome.status, outcome.stderr) == (0, "")
    expected = {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "pdf")}
    expected |= {f"{name}.{kind}" for name in PHOTOGRAPHS for kind in ("png", "pdf")}
    assert {path.name for path in run.figures.iterdir()} == expected
    assert outcome.stdout.splitlines()[-1] == str(run.report_file)
    text = page(outcome)
    for figure in ("71.43 %", "72.22 %", "90.00 %", "35.9 to 91.8 %", "stopped early after epoch 5"):
        assert figure in text
    assert "expected test_accuracy &gt;= 0.7, measured 0.7143: met; source: made up" in text


@pytest.mark.usefixtures("unprinted")
def test_the_page_makes_no_request_and_escapes_all_text(tmp_path: Path) -> None:
    for number, (classes, images) in enumerate(((HOSTILE, True), (SCRIPT, False))):
        run = write_run(tmp_path / str(number), classes, images=images)
        text = page(report(run.path))
        found = _Elements(text)
        assert found.links
        assert all(link.startswith(("#", "data:image/")) for link in found.links)
        assert all(place.startswith("url(#") for place in re.findall(r"url\([^)]*\)", text))
        assert found.names.count("script") == 2, "only the page's data and script"
        assert "alert(1)" in text, "names are escaped"
        assert not [name for name in found.attributes if name.startswith("on")], "no event handlers"
        assert "default-src 'none'" in text


class _Elements(HTMLParser):
    """Collects the elements that a browser finds on a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        for name, value in attrs:
            self.attributes.append(name)
            if name in ("src", "srcset", "href", "xlink:href", "action", "poster", "data"):
                self.links.append(value or "")


@pytest.mark.usefixtures("unrendered")
def test_the_options_output_figures_only_and_json(run: Run, tmp_path: Path) -> None:
    found = json.loads(report(run.path, "-o", tmp_path / "deep" / "er.html", "--json").stdout)
    assert found["report"] == str(tmp_path / "deep" / "er.html")
    assert len(found["figures"]) == 2 * len(FIGURES | PHOTOGRAPHS)
    assert found["missing"] == []
    assert (tmp_path / "deep" / "er.html").exists()
    assert not run.report_file.exists()
    outcome = report(run.path, "--figures-only")
    assert "html" not in outcome.stdout
    assert not run.report_file.exists()


@pytest.mark.usefixtures("unrendered")
def test_first_layer_filters_are_drawn_by_their_number(run: Run) -> None:
    assert "The filters that training has changed most, on test/" in page(report(run.path))
    assert "The requested filters, on test/" in page(report(run.path, "--filters", "3, 1"))
    assert "numbered from 1 to 4" in report(run.path, "--filters", "0").stderr
    for wrong in ("x", "1,,2", "-1"):
        outcome = report(run.path, f"--filters={wrong}")
        assert outcome.status == 2
        assert "give filter numbers separated by commas" in outcome.stderr


# Incomplete runs


@pytest.mark.usefixtures("unrendered")
def test_an_unfinished_run_is_reported_up_to_its_last_epoch(run: Run) -> None:
    (run.path / "summary.json").unlink()
    (run.path / "predictions.csv").unlink()
    outcome = report(run.path)
    assert outcome.status == 0
    assert "not shown: test metrics" in outcome.stderr
    text = page(outcome)
    assert "not finished; 5 epochs done" in text
    assert "best: 3" in text, "by train.best_metric"
    assert "Confusion" not in text


def test_a_run_without_a_finished_epoch_is_refused(run: Run) -> None:
    run.write_metrics(0, b'{"epoch": 0.5, "step": 1, "lr": 0.1, "train/step_loss": 2.0}\n')
    for _ in range(2):
        outcome = report(run.path)
        assert outcome.status == 2
        assert f"{run.path} has no finished epoch yet" in outcome.stderr
        assert "Traceback" not in outcome.stderr
        run.metrics_file.unlink(missing_ok=True)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    outcome = report(tmp_path)
    assert outcome.status == 2
    assert f"{tmp_path} is not a run directory" in outcome.stderr


@pytest.mark.usefixtures("unrendered")
def test_an_output_folder_that_cannot_be_written_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = report(run.path, "-o", tmp_path / "file" / "x.html")
    assert outcome.status == 2
    assert f"{tmp_path / 'file' / 'x.html'} cannot be written: Not a directory" in outcome.stderr


GARBAGE: dict[str, list[bytes]] = {
    "recipe.toml": [b"", b"[data]\nx = ", b"\xff\xfe"],
    "environment.json": [b"", b"[1]", b'{"packages": 3}'],
    "split.json": [b"{", b'{"train": 1}', b'{"train": [1], "validation": [], "test": []}'],
    "summary.json": [b"{", b'{"best": 1}', b'{"best": {"epoch": 3, "test_accuracy": "x"}, "stopped": {"epoch": 5}}'],
    "predictions.csv": [b"", b"path,label\n", b"path,label,prediction,probability\nx,unknown,plain,0.5\n", b"\xff\xff"],
    "checkpoints/model.json": [b"{", b'{"classes": []}', b'{"classes": ["a"], "preprocessing": {}}'],
    "checkpoints/best.safetensors": [b"", b"not weights at all"],
    "checkpoints/first_layer.safetensors": [b"", b"not weights at all"],
    "origins.json": [b"{", b'{"keys": 3}'],
}


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("summary.json", "predictions.csv") else pytest.mark.extended)
        for name in GARBAGE
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_reported(run: Run, name: str, tmp_path: Path) -> None:
    for number, content in enumerate(GARBAGE[name]):
        damaged = Run(tmp_path / f"damaged{number}")
        shutil.copytree(run.path, damaged.path)
        (damaged.path / name).write_bytes(content)
        outcome = report(damaged.path)
        assert outcome.status == 0, (content, outcome.stderr)
        assert "Traceback" not in outcome.stderr
        text = page(outcome)
        assert "Learning rate" in text
        if not content.startswith((b'{"packages', b'{"keys')):
            assert "not shown: " in outcome.stderr
            assert "<b>Not shown:</b>" in text


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("name", [*GARBAGE, "metrics.jsonl"])
def test_a_missing_file_is_named_and_the_rest_is_reported(run: Run, name: str) -> None:
    (run.path / name).unlink(missing_ok=True)
    outcome = report(run.path)
    if name == "metrics.jsonl":
        assert (outcome.status, "it has no metrics.jsonl" in outcome.stderr) == (2, True)
    elif name == "recipe.toml":
        assert (outcome.status, "is not a run directory" in outcome.stderr) == (2, True)
    else:
        assert outcome.status == 0, outcome.stderr
        assert ("not shown: " in outcome.stderr) == (name != "origins.json")


@pytest.mark.usefixtures("unrendered")
def test_damaged_lines_of_metrics_are_counted_and_left_out(run: Run) -> None:
    lines = run.metrics_file.read_bytes().splitlines(keepends=True)
    run.metrics_file.write_bytes(b"".join([lines[0], b"{garbage\n", *lines[2:], b'{"epoch": 6, "val/lo']))
    outcome = report(run.path)
    assert outcome.status == 0
    assert "1 of 5 lines of metrics.jsonl: damaged (line 2)" in outcome.stderr, "an incomplete last line is not damage"
    assert json.loads(_data(page(outcome)))["charts"]["loss"]["series"][1]["x"] == [1, 3, 4, 5]


def _data(text: str) -> str:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text)
    assert found is not None
    return found[1]


@pytest.mark.usefixtures("unrendered")
def test_losses_that_are_not_finite_are_gaps_in_the_curve(run: Run) -> None:
    lines = run.metrics_file.read_text().splitlines()
    lines[1] = re.sub(r'"train/loss": [\d.]+', '"train/loss": NaN', lines[1])
    run.metrics_file.write_text("\n".join(lines) + "\n")
    assert json.loads(_data(page(report(run.path))))["charts"]["loss"]["series"][0]["y"][1] is None


@pytest.mark.usefixtures("unrendered")
def test_a_report_without_the_data_set_has_no_images(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    outcome = report(run.path)
    assert outcome.status == 0
    assert "not shown: images: data.root = " in outcome.stderr
    text = page(outcome)
    assert "<img" not in text
    assert "Images per class" in text, "the run recorded them"
    assert "test/plain" not in text or "Worst mistakes" in text
    assert "samples.png" not in outcome.stdout
    with_root = report(run.path, "--data-root", tmp_path / "elsewhere")
    assert with_root.stderr == ""
    assert page(with_root).count("<img ") == 2 + 2 * 3, "two mistakes, and three classes raw and normalized"


@pytest.mark.usefixtures("unrendered")
def test_a_data_set_with_other_classes_is_not_used(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    digit_files(tmp_path / "data", train=1, test=1)
    outcome = report(run.path)
    assert outcome.status == 0
    assert "now has different classes (10) than the run was trained on (3)" in outcome.stderr


@pytest.mark.usefixtures("unrendered")
def test_unreadable_images_are_left_out(run: Run, tmp_path: Path) -> None:
    for path in (tmp_path / "data" / "test").glob("*/2.png"):
        path.write_bytes(b"no image")
    outcome = report(run.path)
    assert outcome.status == 0
    assert "1 of 2 images of the worst mistakes: missing or damaged" in outcome.stderr


@pytest.mark.usefixtures("unprinted")
def test_a_report_on_many_classes_stays_small(tmp_path: Path) -> None:
    classes = [f"class {number:03d}" for number in range(300)]
    run = write_run(tmp_path, classes, images=False)
    outcome = report(run.path)
    assert outcome.status == 0
    assert run.report_file.stat().st_size < 1_000_000


# The recipe


@pytest.mark.usefixtures("unrendered")
def test_the_recipe_table_highlights_keys_that_differ_from_the_default(run: Run) -> None:
    text = page(report(run.path))
    assert "Highlighted: values that differ from the defaults. The run did not record" in text
    rows = _recipe_rows(text)
    assert rows["train.epochs"][0] == "changed", "the key has no default"
    assert rows["early_stopping.patience"] == ("changed", "2", "not set")
    assert rows["recipe.seed"] == ("default", "0", "0")
    keys = {"train.epochs": "recipes/a.toml:12", "optimizer.lr": "--set", "data.root": "recipes/base/b.toml:3"}
    run.write_json("origins.json", {"file": "recipes/a.toml", "keys": {"recipe.seed": "default", **keys}})
    text = page(report(run.path))
    assert "Highlighted: values set by recipes/a.toml itself or by --set" in text
    rows = _recipe_rows(text)
    kinds = {key: rows[key][0] for key in (*keys, "recipe.seed")}
    assert kinds == {
        "train.epochs": "changed", "optimizer.lr": "changed", "data.root": "base", "recipe.seed": "default"
    }  # fmt: skip


def _recipe_rows(text: str) -> dict[str, tuple[str, str, str]]:
    """Return kind, value and default of each key."""
    table = text[text.index('<table id="recipe-table"') :]
    rows = re.findall(r'<tr class="(\w+)"[^>]*>(.*?)</tr>', table[: table.index("</table>")])
    cells = [(kind, re.findall(r"<code>(.*?)</code>", row)) for kind, row in rows]
    return {found[0]: (kind, found[1], found[2]) for kind, found in cells}


# At the end of a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_on_files(tmp_path_factory.mktemp("trained"), CONVNET)


@pytest.mark.usefixtures("unprinted")
def test_a_trained_run_has_all_files_that_its_report_needs(trained: Run) -> None:
    outcome = report(trained.path)
    assert (outcome.status, outcome.stderr) == (0, "")
    text = page(outcome)
    assert f"{100 * trained.summary['best']['test_accuracy']:.2f} %" in text
    assert "Filters of the first layer before and after training" in text
    assert _recipe_rows(text)["optimizer.momentum"][0] == "changed"
    lines = (trained.path.parents[2] / "recipe.toml").read_text().splitlines()
    assert trained.origins["keys"]["data.workers"].endswith(f"recipe.toml:{lines.index('workers = 0') + 1}")


@pytest.mark.usefixtures("unrendered")
def test_a_run_writes_its_report_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _small(tmp_path)
    outcome = toolkit("train", str(QUICKSTART), *settings)
    assert outcome.status == 0, outcome.stderr
    run = Run(Path(outcome.stdout.splitlines()[-1]))
    assert run.report_file.exists()
    assert f"report: {run.report_file}" in outcome.stderr.splitlines()

    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("a fault of ours\nwith details")

    monkeypatch.setattr(run_report, "write_report", fail)
    outcome = toolkit("train", str(QUICKSTART), *settings)
    run = Run(Path(outcome.stdout.splitlines()[-1]))
    assert outcome.status == 0, "the run itself succeeded"
    warning = f"warning: no report (a fault of ours); to try again: toolkit report {run.path}"
    assert outcome.stderr.splitlines().count(warning) == 1
    assert run.is_finished
    assert not run.report_file.exists()


def _small(folder: Path) -> list[str]:
    given = (f"recipe.run_root={json.dumps(str(folder / 'runs'))}", "train.epochs=1", "data.images_per_class=5",
             "data.test_images_per_class=3", "tracking.trackers=[]", "data.workers=0",
             "model.convnet.blocks=[{channels=2, pool=4}]")  # fmt: skip
    return [part for setting in given for part in ("--set", setting)]


def test_sample_images_are_shown_as_the_model_gets_them(tmp_path: Path) -> None:
    """Each sample shows the file, the evaluation input and an augmented input, which here is flipped vertically."""
    run = train_on_files(tmp_path, CONVNET, 'augment.train=[{ name = "RandomVerticalFlip", p = 1.0 }]')
    text = page(report(run.path))
    samples = re.findall(r'<li><div class="images">(.+?)</div><b>(\d)</b></li>', text)
    assert [name for _, name in samples] == [str(digit) for digit in range(10)]
    for images, _ in samples:
        _, plain, augmented = (_pixels(uri) for uri in re.findall(r'src="data:image/png;base64,([^"]+)"', images))
        assert np.abs(augmented - plain[::-1]).max() <= 1
        assert np.abs(augmented - plain).max() > 1


def _pixels(base64_png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(base64_png))), dtype=np.int64)


@pytest.mark.parametrize(("count", "text"), [(0, "0 processes"), (1, "1 process"), (2, "2 processes")])
def test_nouns_agree_with_their_counts(count: int, text: str) -> None:
    assert plural(count, "process", "processes") == text
    assert plural(count, "epoch") == text.replace("processes", "epochs").replace("process", "epoch")


@pytest.mark.parametrize(
    ("processes", "grad_accum_steps", "text"),
    [
        (1, 1, "64"),
        (2, 1, "64 = 2 processes x 32 images"),
        (1, 4, "64 = 4 accumulation steps x 16 images"),
        (2, 32, "64 = 2 processes x 32 accumulation steps x 1 image"),
    ],
)
def test_micro_batches_and_processes_of_a_batch_are_formatted(processes: int, grad_accum_steps: int, text: str) -> None:
    assert batch_split(64, processes, grad_accum_steps) == text
