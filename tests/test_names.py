"""Class and file names of any bytes: one reversible encoding in every file, through every command."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from cli import Outcome, toolkit
from finished import CONVNET, ON_FILES, train
from PIL import Image

from toolkit.filenames import decode_name, encode_name, escape_control_characters
from toolkit.runs import Run

pytestmark = pytest.mark.long

WORST = [
    os.fsdecode(b"latin-\xe9\xff"),
    "new\nline",
    "carriage\rreturn",
    "tab\tulator",
    "quo\"te's",
    "com,ma",
    "\x1b[2J\x1b]0;title\x07",
    "=HYPERLINK(1)",
    "+1",
    "-1",
    "@SUM(A1)",
    "\uff1dwide",
    "right\u202eleft",
    "zero\u200bwidth",
    "long" * 50,
    " lead",
    "trail ",
    "caf\u00e9",
    "cafe\u0301",
    "100%41",
    "<b>|`*_[x](y)",
]
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def is_safe(text: str) -> bool:
    """Nothing that commands a terminal or begins a formula; only newlines and tabs between lines and columns."""
    return all(unicodedata.category(char) not in UNSAFE for char in text.replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("train/cat/001.png", "train/cat/001.png"),
        ("a b-c_d (1).jpg", "a b-c_d (1).jpg"),
        ("=1+1/-x/+/a@b", "%3D1+1/%2Dx/%2B/a@b"),
        (os.fsdecode(b"caf\xe9"), "caf%E9"),
        ("caf\u00e9", "caf\u00e9"),
        (" a \u00a0", "%20a%20%C2%A0"),
        ("\r\n\t\x1b\u202e", "%0D%0A%09%1B%E2%80%AE"),
        ("100%", "100%25"),
        ("", ""),
    ],
)
def test_only_what_must_be_is_encoded(name: str, encoded: str) -> None:
    assert encode_name(name) == encoded
    assert decode_name(encoded) == name


def test_any_bytes_come_back_and_no_two_names_meet() -> None:
    rng = np.random.default_rng(0)
    few = b"%=-@ \t\r\n\x1b\xe2\x80\xae\xc3\xa9aA2/5\xff"
    names = {os.fsdecode(bytes(rng.choice(list(few), rng.integers(1, 9)).tolist())) for _ in range(5000)}
    names |= {os.fsdecode(bytes(rng.integers(1, 256, 6).tolist())) for _ in range(5000)}
    encoded = {encode_name(name) for name in names}
    assert len(encoded) == len(names)
    assert {decode_name(text) for text in encoded} == names
    for text in encoded:
        assert is_safe(text)
        assert not set(text) & {"\n", "\t"}
        assert all(not part or (part == part.strip() and part[0] not in "=+-@") for part in text.split("/"))


def test_messages_are_encoded_but_for_their_lines() -> None:
    assert escape_control_characters("a\tb\nc: 100%\x1b[2J\udce9\ud800") == "a\tb\nc: 100%%1B[2J%E9%ED%A0%80"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its data set: a class for each of the worst names, with files of other such names."""
    folder = tmp_path_factory.mktemp("names")
    for label, name in enumerate(WORST):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(100 * label + number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            file = f"{WORST[(label + number) % len(WORST)]}{number}.png"
            Image.fromarray(pixels).save(folder / "data" / name / file)
    places = {"runs": json.dumps(str(folder / "runs")), "data": json.dumps(str(folder / "data"))}
    (folder / "recipe.toml").write_text(ON_FILES.format(**places, size=8, epochs=1) + CONVNET)
    return folder


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    return train(home / "recipe.toml")


def fine(*arguments: object, status: int = 0) -> Outcome:
    outcome = toolkit(*map(str, arguments))
    assert outcome.status == status, outcome.stderr
    assert is_safe(outcome.stdout), outcome.stdout
    assert is_safe(outcome.stderr), outcome.stderr
    return outcome


def written_safely(folder: Path) -> None:
    """Every text file below a folder is UTF-8 without unsafe characters, in JSON after reading it too."""
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".csv", ".txt", ".toml", ".html", ".md"):
            text = path.read_bytes().decode()
            assert is_safe(text), path
            assert "\r" not in text, path
            for line in [text] if path.suffix == ".json" else text.splitlines() if path.suffix == ".jsonl" else []:
                assert is_safe(json.dumps(json.loads(line), ensure_ascii=False)), path


def test_training_keeps_every_name(home: Path, run: Run) -> None:
    written_safely(run.path)
    assert [decode_name(name) for name in run.model_card["classes"]] == sorted(WORST)
    names = [decode_name(name) for split in ("train", "validation", "test") for name in run.split[split]]
    assert sorted(names) == sorted(str(p.relative_to(home / "data")) for p in (home / "data").rglob("*.png"))


def test_predictions_are_one_line_each_and_read_back_exactly(home: Path, run: Run) -> None:
    with open(run.path / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len((run.path / "predictions.csv").read_text().splitlines()) == len(rows) + 1
    assert rows == run.predictions()
    assert [row["path"] for row in rows] == run.split["test"]
    for row in rows:
        path = home / "data" / decode_name(row["path"])
        assert path.is_file()
        assert decode_name(row["label"]) == path.parent.name
        assert row["path"].split("/")[0] == row["label"]
        assert all(cell[0] not in "=+-@\t\r" for cell in row.values())


def test_evaluate_finds_every_image_again(run: Run) -> None:
    outcome = fine("evaluate", run.path)
    count = len(run.split["test"])
    assert f"predictions.csv: {count} of {count} rows are the same" in outcome.stdout
    assert "equal those of summary.json" in outcome.stdout


@pytest.mark.parametrize("style", ["csv", "json", "jsonl"])
def test_predict_gives_back_every_path(home: Path, run: Run, style: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fine("predict", run.path, home / "data", "--format", style, "-o", out)
    text = out.read_bytes().decode()
    assert is_safe(text)
    assert fine("predict", run.path, home / "data", "--format", style).stdout == text
    if style == "csv":
        rows = list(csv.DictReader(text.splitlines()))
    else:
        rows = json.loads(text) if style == "json" else [json.loads(line) for line in text.splitlines()]
    assert sorted(decode_name(row["path"]) for row in rows) == sorted(map(str, (home / "data").rglob("*.png")))


def test_predict_names_bad_files_safely(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "\x1b[2J\r.png"
    bad.write_bytes(b"")
    outcome = fine("predict", run.path, bad, status=1)
    assert f"{tmp_path}/%1B[2J%0D.png: an empty file" in outcome.stderr


def test_report_explain_and_data(home: Path, run: Run, tmp_path: Path) -> None:
    fine("report", run.path, "-o", tmp_path / "report")
    written_safely(tmp_path / "report")
    mistakes = json.loads(fine("explain", run.path, "--worst", 3, "--json", "-o", tmp_path / "worst").stdout)
    assert {one["path"] for one in mistakes} <= set(run.split["test"])
    files = sorted((home / "data" / "=HYPERLINK(1)").iterdir())[:2]
    explained = json.loads(fine("explain", run.path, *files, "--json", "-o", tmp_path / "files").stdout)
    assert [decode_name(one["path"]) for one in explained] == [str(file) for file in files]
    found = json.loads(fine("data", home / "recipe.toml", "--json").stdout)
    assert sorted(map(decode_name, found["images_per_class"])) == sorted(WORST)  # no two names fall together
    fine("data", home / "recipe.toml", "--out", tmp_path / "figures")


def test_export_and_publish(run: Run, tmp_path: Path) -> None:
    fine("export", run.path, "--format", "safetensors", "-o", tmp_path / "exported")
    written_safely(tmp_path / "exported")
    card = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert card["classes"] == run.model_card["classes"]
    fine("publish", run.path, "lab/worst", "--no-push", "-o", tmp_path / "published")
    written_safely(tmp_path / "published")
    readme = (tmp_path / "published" / "README.md").read_text()
    assert "%1B[2J" in readme.replace("\\", "")
    assert r"\<b\>\|\`\*\_\[x\](y)" in readme


def test_status_check_and_sync(run: Run) -> None:
    assert run.id in fine("status", run.path.parent).stdout
    fine("check", run.path)
    fine("sync", run.path.parent)


def test_study_and_table(home: Path, tmp_path: Path) -> None:
    study = '\n[study]\nseeds = 2\nrows = [{ name = "one" }]\n'
    (tmp_path / "study.toml").write_text((home / "recipe.toml").read_text() + study)
    fine("study", tmp_path / "study.toml")
    fine("table", next((home / "runs").glob("**/study.json")).parent)
    fine("status", home / "runs")
    written_safely(home / "runs")


def test_all_is_done_in_a_folder_whose_name_is_not_utf8(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"odd \xff\x1b[31m")
    odd.mkdir()
    (odd / "data").symlink_to(home / "data")
    recipe = ON_FILES.format(runs='"runs"', data='"data"', size=8, epochs=1) + CONVNET
    (odd / "recipe.toml").write_text(recipe)
    monkeypatch.chdir(odd)
    path = fine("train", "recipe.toml", "--no-report").stdout.splitlines()[-1]
    assert "equal those of summary.json" in fine("evaluate", path).stdout
    fine("predict", path, odd / "data")
    written_safely(odd / path)
