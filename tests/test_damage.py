"""Damaged and hand-edited files give one message that names the file, and a damaged run does not hide the others."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from cli import Outcome, toolkit
from damage import KINDS, damaged_copy, fault_of, files_of, reading_commands
from finished import CONVNET, train_on_files
from studies import runs_of, study_folder, write_study
from study_folders import FakeRun
from study_folders import write_study as write_fake_study
from trainers import EMA, STATEFUL, Trainers, at_call, kill_self, only_run, outcome, uninterrupted, write_recipe

from toolkit.errors import UserError
from toolkit.reading import Shape, read_csv, read_json, read_json_lines
from toolkit.report.run_data import load_run_data
from toolkit.runs import Run, open_run
from toolkit.study.directory import failure_of, open_runs, set_target_epoch
from toolkit.training.checkpoint import find_latest
from toolkit.training.train_step import TrainStep

pytestmark = pytest.mark.long

CHEAP = ("status", "status --json", "check", "logs", "sync", "validate")
READS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def original(folder: Path) -> Run:
    return train_on_files(folder, CONVNET, epochs=2)


@pytest.fixture(scope="module")
def healthy(folder: Path, original: Run) -> Run:
    """Return another run, which stays undamaged."""
    return train_on_files(folder, CONVNET, "recipe.seed=1")


@pytest.fixture
def run(original: Run, healthy: Run, tmp_path: Path) -> Run:
    """Return a copy of the run to damage, next to the healthy one."""
    for one in (original, healthy):
        shutil.copytree(one.path, tmp_path / "runs" / "tiny" / one.id)
    return Run(tmp_path / "runs" / "tiny" / original.id)


# -- the reader -------------------------------------------------------------------------------------------------------


class _Shape(Shape):
    count: int
    name: str = ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b'{"count": 1', "Expecting ',' delimiter: line 1 column 12 (char 11)"),
        (b'{"count": "\xff"}', "it is not UTF-8 text (invalid start byte at byte 11)"),
        (b"null", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"{}", "count is missing"),
        (b'{"count": NaN}', "count is not an integer"),
        (b'{"count": true}', "count is not an integer"),
        (b'{"count": 1.5}', "count is not an integer"),
        (b'{"count": 1, "name": null}', "name is not a string"),
        (b'{"count": 9223372036854775808}', "922337203685... is out of range"),
        (b'{"count": -' + b"9" * 5000 + b"}", "-99999999999... is out of range"),
        (b'{"count": ' + b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": ' + b"[" * 30 + b"]" * 30 + b', "count": 1}', "it is nested too deeply"),
    ],
)
def test_a_file_that_is_not_the_expected_json_is_reported_as_damaged(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, _Shape)
    assert str(caught.value) == f"{path} is damaged: {message}"


def test_json_may_have_more_entries_than_required(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"count": 9223372036854775807, "more": [{"deep": [1, null, NaN]}]}')
    found = read_json(path, _Shape)
    assert (found["count"], found["more"][0]["deep"][:2]) == (2**63 - 1, [1, None])


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.symlink_to("nowhere"), "is missing"),
        (lambda path: path.mkdir(), "is damaged: it is a folder"),
        (os.mkfifo, "is damaged: it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is damaged: it is not a regular file"),
        (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_folders_pipes_and_devices_are_refused_without_waiting(
    tmp_path: Path, put: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "file"
    put(path)
    for read in (read_json, lambda path: list(read_json_lines(path)), lambda path: read_csv(path, ["a"])):
        with pytest.raises(UserError, match=message):
            read(path)


def test_damaged_json_lines_do_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"count": 1}\nnull\n{"count": "\xff"}\n{"count": {}}\n{"count": 2}\n{"count": 3')
    found = list(read_json_lines(path, _Shape))
    assert [line if isinstance(line, dict) else None for line in found] == [
        {"count": 1},
        None,
        None,
        None,
        {"count": 2},
    ]
    assert str(found[3]) == "count is not an integer"
    path.write_bytes(b'{"count": 1}')
    assert list(read_json_lines(path, _Shape)) == [{"count": 1}], "a complete last line without a line break is read"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line should be a,b"),
        ("a\n1\n", "its first line should be a,b"),
        ("a,b\n1,2\n1\n", "line 3 has 1 cells instead of 2"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells instead of 2"),
        ('a,b\n"1,2\n', "unexpected end of data"),
    ],
)
def test_a_damaged_csv_file_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_csv(path, ["a", "b"])


# -- commands ---------------------------------------------------------------------------------------------------------


def test_any_damage_to_any_file_gives_a_message(original: Run, healthy: Run, tmp_path: Path) -> None:
    """Tested with the fast commands; tests/attack has the others."""
    image = next((original.path.parents[2] / "data").rglob("*.png"))
    random = Random(0)
    everything = [(file, kind, name) for file in files_of(original.path) for kind in KINDS for name in CHEAP]
    faults = []
    for number, (file, kind, name) in enumerate(random.sample(everything, READS)):
        run = damaged_copy(original, healthy, tmp_path / "work", file, kind, number)
        arguments = reading_commands(run, image, tmp_path)[name]
        fault, _ = fault_of(name, arguments, run, run.parent / healthy.id)
        faults += [f"{file}, {kind}, {name}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("file", "kind", "problem"),
    [
        ("summary.json", "null", "summary.json is damaged: not a JSON object"),
        ("summary.json", "deep", "summary.json is damaged: it is nested too deeply"),
        ("summary.json", "FIFO", "summary.json is damaged: it is not a regular file"),
        ("metrics.jsonl", "null", "metrics.jsonl:1: damaged line (not a JSON object)"),
        ("metrics.jsonl", "folder", "metrics.jsonl is damaged: it is a folder"),
        ("recipe.toml", "missing", "there is no recipe"),
        ("recipe.toml", "bad UTF-8", "recipe.toml is not UTF-8 text"),
    ],
)
def test_status_shows_a_damaged_run_on_its_own_row(run: Run, healthy: Run, file: str, kind: str, problem: str) -> None:
    KINDS[kind](run.path / file, Random(0))
    accuracy = healthy.summary["best"]["test_accuracy"]
    outcome = toolkit("status", run.path.parents[1])
    assert outcome.status == 0
    rows = {line.split()[0]: line for line in outcome.stdout.splitlines()}
    assert f"test accuracy {accuracy:.4f}" in rows[f"tiny/{healthy.id}"]
    assert rows[f"tiny/{run.id}"].split()[2] == "damaged"
    assert problem in rows[f"tiny/{run.id}"]
    listed = {state["run"]: state for state in json.loads(toolkit("status", run.path.parents[1], "--json").stdout)}
    assert {Path(path).name: state["state"] for path, state in listed.items()} == {
        run.id: "damaged", healthy.id: "finished"
    }  # fmt: skip
    assert problem in listed[str(run.path)]["detail"]


def one_line(outcome: Outcome) -> str:
    assert outcome.status == 2, outcome
    assert len(outcome.stderr.strip().splitlines()) == 1, outcome.stderr
    return outcome.stderr.strip()


def test_a_metric_in_the_summary_that_is_not_a_number_is_reported(run: Run) -> None:
    summary = run.summary
    run.write_json("summary.json", {**summary, "best": float("nan")})
    assert one_line(toolkit("check", run.path)).endswith("summary.json is damaged: best is not a JSON object")
    run.write_json("summary.json", {**summary, "best": {**summary["best"], "val_loss": "low"}})
    assert one_line(toolkit("check", run.path)).endswith("summary.json is damaged: best.val_loss is not a number")


def test_predictions_with_fewer_rows_than_the_split_are_reported(run: Run) -> None:
    rows = run.prediction_records()
    run.write_predictions([list(row.values()) for row in rows[:-2]])
    problem = f"predictions.csv is damaged: {len(rows) - 2} rows of {len(rows)} test images"
    assert problem in one_line(toolkit("evaluate", run.path))


def test_a_report_leaves_out_one_line_of_metrics_with_bad_utf8(run: Run) -> None:
    epochs = run.epoch_records()
    data = run.metrics_file.read_bytes().splitlines(keepends=True)
    run.metrics_file.write_bytes(b"".join([b'{"epoch": "\xff"}\n', *data]))
    facts = load_run_data(run)
    assert [record["epoch"] for record in facts.epochs] == [1, 2]
    assert [record["val/loss"] for record in facts.epochs] == [record["val/loss"] for record in epochs]
    assert facts.missing == [f"1 of {len(data) + 1} lines of metrics.jsonl: damaged (line 1)"]


def test_files_without_read_permission_are_reported(original: Run, healthy: Run) -> None:
    """A user has no permission to read a single file, or the run directory."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    run = Run(folder / "runs" / "tiny" / original.id)
    try:
        for one in (original, healthy):
            shutil.copytree(one.path, run.path.with_name(one.id))
        (run.path / "summary.json").chmod(0)
        with without_root():
            outcome = toolkit("check", run.path)
            listed = toolkit("status", folder / "runs")
        assert one_line(outcome) == f"{run.path / 'summary.json'} cannot be read: Permission denied"
        assert "summary.json cannot be read: Permission denied" in listed.stdout
        assert f"test accuracy {healthy.summary['best']['test_accuracy']:.4f}" in listed.stdout
        run.path.chmod(0)
        with without_root():
            assert "Permission denied" in one_line(toolkit("check", run.path))
            assert toolkit("status", folder / "runs").status == 0
    finally:
        run.path.chmod(0o755)
        shutil.rmtree(folder)


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Drop root's permissions if root runs the tests, since root can read files of mode 0."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"epoch": -1}, "epoch is wrong: Input should be greater than or equal to 0"),
        ({"step": None}, "step is not an integer"),
        ({"epoch": 7}, "it contains epoch 7 and step 0, unlike its name"),
        ({"file": 3}, "file is not a string"),
        ({"bytes": "x"}, "bytes is not an integer"),
    ],
)
def test_if_a_manifest_is_damaged_the_checkpoint_before_it_is_used(
    run: Run, change: dict[str, object], fault: str
) -> None:
    first, last = sorted(run.checkpoints.glob("*-*.json"))
    manifest = json.loads(last.read_text())
    last.write_text(json.dumps({**manifest, **change}))
    warnings: list[str] = []
    found = find_latest(run.checkpoints, warnings.append)
    assert found is not None
    assert found.name == json.loads(first.read_text())["file"]
    assert len(warnings) == 1
    assert fault in warnings[0]


def test_a_run_without_its_checkpoints_starts_over(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run", STATEFUL)

    def prepare(rank: int) -> None:
        at_call(TrainStep, "_update", 9, kill_self)

    killed = Trainers(1, tmp_path / "run", recipe, *EMA, prepare=prepare)
    killed.wait()
    run = only_run(tmp_path / "run")
    shutil.rmtree(run.checkpoints)
    again = Trainers(1, tmp_path / "run", "--resume", run.path)
    assert again.wait() == [0], again.text()
    assert f"{run.checkpoints} is missing: the run starts over" in again.text()
    assert outcome(run) == uninterrupted(1, STATEFUL, *EMA)


# -- studies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json"])
@pytest.mark.parametrize("kind", ["null", "folder", "FIFO", "deep", "bad UTF-8"])
def test_a_damaged_run_of_a_study_is_named_and_the_others_are_counted(tmp_path: Path, file: str, kind: str) -> None:
    path = tmp_path / "small"
    write_fake_study(path, {"seeds": 2}, [FakeRun("row", 0, test_accuracy=0.5), FakeRun("row", 1, test_accuracy=0.7)])
    KINDS[kind](path / "20260101-000000-0000" / file, Random(0))
    outcome = toolkit("table", path)
    assert outcome.status == 0, outcome.stderr
    assert "1 of 2 runs finished" in outcome.stdout
    assert "70.00" in outcome.stdout
    assert f"20260101-000000-0000/{file}" in outcome.stdout, "the notes name what is damaged"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"members": None}, "members is not a list"),
        ({"members": [{"row": "x"}]}, "members.0.seed is missing"),
        ({"complete": 3}, "complete is neither true nor false"),
        ({"study": {"seeds": "many"}}, "seeds"),
        ({"format": 99}, "was written by another version of this toolkit"),
    ],
)
def test_a_damaged_study_gives_one_message(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    path = tmp_path / "small"
    write_fake_study(path, {"seeds": 1}, [FakeRun("row")])
    (path / "study.json").write_text(json.dumps(json.loads((path / "study.json").read_text()) | change))
    outcome = toolkit("table", path)
    assert outcome.status == 2
    assert problem in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert toolkit("report", path).status == 2


def test_a_run_outside_its_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small"
    folder = write_fake_study(path, {"seeds": 1}, [FakeRun("row")])
    record = json.loads((path / "study.json").read_text())
    record["members"][0]["run"] = "../../elsewhere"
    (path / "study.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"members\.0\.run is wrong"):
        list(folder.members)


def test_a_study_trains_its_other_runs_and_names_the_damaged_one(tmp_path: Path) -> None:
    path = write_study(tmp_path, "[study]\nseeds = 2\n", epochs=1)
    assert toolkit("study", path).status == 0
    runs = dict(runs_of(tmp_path))
    damaged, other = (run for _, run in sorted(runs.items()))
    for run in (damaged, other):
        (run.path / "summary.json").unlink()
    damaged.metrics_file.write_bytes(b"null\n")
    set_target_epoch(damaged, 2)  # as a search does, which reads how many epochs a run has finished
    outcome = toolkit("study", path)
    assert outcome.status == 1
    assert "metrics.jsonl:1: damaged line (not a JSON object)" in outcome.stderr + outcome.stdout
    assert open_run(other.path).is_finished
    failure = failure_of(damaged)
    assert failure is not None
    assert "damaged line" in failure.line
    assert list(open_runs(study_folder(tmp_path))) == []
