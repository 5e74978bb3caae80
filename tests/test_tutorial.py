"""The commands of docs/tutorial.md work one after the other in an empty folder, on images in class folders."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from cli import toolkit
from PIL import Image
from sklearn.datasets import load_digits

PAGE = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text()


def commands(page: str) -> list[str]:
    """Return the page's commands, without those on the repository's own recipes."""
    found = re.findall(r"^ {4}(?:\$ )?((?:toolkit|wandb|pip) .*)$", page, re.MULTILINE)
    return [command for command in found if "flowers" not in command and "recipes/" not in command]


def test_a_page_to_share_takes_at_most_six_commands() -> None:
    first_hour = commands(PAGE.partition("## Next")[0])
    assert first_hour[0].startswith("pip install ")
    assert first_hour[-1] == "toolkit sync runs/photos"
    assert len(first_hour) <= 6


@pytest.mark.extended
def test_the_commands_work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    for label in range(4):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:50]):
            Image.fromarray((pixels * 15).astype("uint8")).save(tmp_path / "photos" / str(label) / f"{number}.png")
    shutil.copytree(tmp_path / "photos" / "0", tmp_path / "more")
    study = re.search(r"`learning-rates.toml`:\n\n```toml\n(.*?)```", PAGE, re.DOTALL)
    assert study is not None
    (tmp_path / "learning-rates.toml").write_text(study[1])
    called = [command for command in commands(PAGE) if command.startswith("toolkit ")]
    assert len(called) >= 6
    for command in called:
        outcome = toolkit(*shlex.split(command)[1:])
        if command.startswith("toolkit sync"):
            assert outcome.status == 2
            (message,) = re.findall(r"^ {4}(cannot upload: .*)$", PAGE, re.MULTILINE)
            assert outcome.stderr.splitlines()[-1] == message
        else:
            assert outcome.status == 0, (command, outcome.stderr)
    (first, *_) = sorted((tmp_path / "runs" / "photos").iterdir())
    assert (first / "report.html").is_file()
    assert (tmp_path / "runs" / "learning-rates" / "table.csv").is_file()
