"""Class and file names of arbitrary bytes: one reversible encoding in every file and every command."""

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

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("pdf_figures")]

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
    """Return whether text has no terminal escapes or formula prefixes, and only newlines and tabs as separators."""
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
def test_only_unsafe_characters_are_encoded(name: str, encoded: str) -> None:
    assert encode_name(name) == encoded
    assert decode_name(encoded) == name


def test_any_bytes_are_decoded_exactly_and_no_two_names_collide() -> None:
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


def test_messages_are_encoded_except_for_their_line_breaks() -> None:
    assert escape_control_characters("a\tb\nc: 100%\x1b[2J\udce9\ud800") == "a\tb\nc: 100%%1B[2J%E9%ED%A0%80"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a recipe and its data set, with the worst names as class and file names."""
    folder = tmp_path_factory.mktemp("names")
    for label, name in enumerate(WORST):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(100 * label + number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            file = f"{WORST[(label + number) % len(WORST)]}{number}.png"
            Image.fromarray(pixels).save(folder / "data" / name / file)
    paths = {"runs": json.dumps(str(folder / "runs")), "data": json.dumps(str(folder / "data"))}
    (folder / "recipe.toml").write_text(ON_FILES.format(**paths, size=8, epochs=1) + CONVNET)
    return folder


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    return train(home / "recipe.toml")


def run_command(*arguments: object, status: int = 0) -> Outcome:
    outcome = toolkit(*map(str, arguments))
    assert outcome.status == status, outcome.stderr
    assert is_safe(outcome.stdout), outcome.stdout
    assert is_safe(outcome.stderr), outcome.stderr
    return outcome


def written_safely(folder: Path) -> None:
    """Assert that each text file below a folder is UTF-8 without unsafe characters, JSON also once parsed."""
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
    assert rows == run.prediction_records()
    assert [row["path"] for row in rows] == run.split["test"]
    for row in rows:
        path = home / "data" / decode_name(row["path"])
        assert path.is_file()
        assert decode_name(row["label"]) == path.parent.name
        assert row["path"].split("/")[0] == row["label"]
        assert all(cell[0] not in "=+-@\t\r" for cell in row.values())


def test_evaluate_finds_every_image_of_the_run(run: Run) -> None:
    outcome = run_command("evaluate", run.path)
    count = len(run.split["test"])
    assert f"predictions.csv: {count} of {count} rows are the same" in outcome.stdout
    assert "equal those of summary.json" in outcome.stdout


@pytest.mark.parametrize("style", ["csv", "json", "jsonl"])
def test_predict_writes_every_path(home: Path, run: Run, style: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_command("predict", run.path, home / "data", "--format", style, "-o", out)
    text = out.read_bytes().decode()
    assert is_safe(text)
    assert run_command("predict", run.path, home / "data", "--format", style).stdout == text
    if style == "csv":
        rows = list(csv.DictReader(text.splitlines()))
    else:
        rows = json.loads(text) if style == "json" else [json.loads(line) for line in text.splitlines()]
    assert sorted(decode_name(row["path"]) for row in rows) == sorted(map(str, (home / "data").rglob("*.png")))


def test_predict_encodes_the_names_of_bad_files(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "\x1b[2J\r.png"
    bad.write_bytes(b"")
    outcome = run_command("predict", run.path, bad, status=1)
    assert f"{tmp_path}/%1B[2J%0D.png: an empty file" in outcome.stderr


def test_report_explain_and_data_encode_every_name(home: Path, run: Run, tmp_path: Path) -> None:
    run_command("report", run.path, "-o", tmp_path / "report")
    written_safely(tmp_path / "report")
    mistakes = json.loads(run_command("explain", run.path, "--worst", 3, "--json", "-o", tmp_path / "worst").stdout)
    assert {one["path"] for one in mistakes} <= set(run.split["test"])
    files = sorted((home / "data" / "=HYPERLINK(1)").iterdir())[:2]
    explained = json.loads(run_command("explain", run.path, *files, "--json", "-o", tmp_path / "files").stdout)
    assert [decode_name(one["path"]) for one in explained] == [str(file) for file in files]
    found = json.loads(run_command("data", home / "recipe.toml", "--json").stdout)
    assert sorted(map(decode_name, found["images_per_class"])) == sorted(WORST)  # no two names collide
    run_command("data", home / "recipe.toml", "--out", tmp_path / "figures")


def test_export_and_publish_encode_every_name(run: Run, tmp_path: Path) -> None:
    run_command("export", run.path, "--format", "safetensors", "-o", tmp_path / "exported")
    written_safely(tmp_path / "exported")
    card = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert card["classes"] == run.model_card["classes"]
    run_command("publish", run.path, "lab/worst", "--no-push", "-o", tmp_path / "published")
    written_safely(tmp_path / "published")
    readme = (tmp_path / "published" / "README.md").read_text()
    assert "%1B[2J" in readme.replace("\\", "")
    assert r"\<b\>\|\`\*\_\[x\](y)" in readme


def test_status_check_and_sync_encode_every_name(run: Run) -> None:
    assert run.id in run_command("status", run.path.parent).stdout
    run_command("check", run.path)
    run_command("sync", run.path.parent)


def test_study_and_table_encode_every_name(home: Path, tmp_path: Path) -> None:
    study = '\n[study]\nseeds = 2\nrows = [{ name = "one" }]\n'
    (tmp_path / "study.toml").write_text((home / "recipe.toml").read_text() + study)
    run_command("study", tmp_path / "study.toml")
    run_command("table", next((home / "runs").glob("**/study.json")).parent)
    run_command("status", home / "runs")
    written_safely(home / "runs")


def test_every_command_works_in_a_folder_whose_name_is_not_utf8(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"odd \xff\x1b[31m")
    odd.mkdir()
    (odd / "data").symlink_to(home / "data")
    recipe = ON_FILES.format(runs='"runs"', data='"data"', size=8, epochs=1) + CONVNET
    (odd / "recipe.toml").write_text(recipe)
    monkeypatch.chdir(odd)
    path = run_command("train", "recipe.toml", "--no-report").stdout.splitlines()[-1]
    assert "equal those of summary.json" in run_command("evaluate", path).stdout
    run_command("predict", path, odd / "data")
    written_safely(odd / path)
