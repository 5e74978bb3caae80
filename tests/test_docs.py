"""All files, tests and pages that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PITFALLS = 44


def names_of_tests() -> set[str]:
    """Return the names of all test functions."""
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_modules_and_pages_that_the_documentation_names_exist(page: Path) -> None:
    text = page.read_text()
    if page.name == "reliability.md":  # elsewhere such names are metrics
        named = set(re.findall(r"`(test_\w+)`", text))
        assert named <= names_of_tests(), named - names_of_tests()
    paths = set(re.findall(r"`((?:tests|toolkit|launch|slurm|benchmarks)/[\w/.-]+\.(?:py|yaml|sh|md))`", text))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = set(re.findall(r"\]\((?!https?:)([^)#\s]+)", text))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "file", [*PAGES, *sorted((ROOT / "toolkit").rglob("*.py"))], ids=lambda file: str(file.relative_to(ROOT))
)
def test_no_install_command_asks_the_package_index_for_this_project(file: Path) -> None:
    """On the index, the name belongs to another project, which `pip install 'toolkit[explain]'` would install."""
    assert re.findall(r"pip install [^`\n]*?(?<![\w./-])toolkit(?![\w-])[^`\n]*", file.read_text()) == []


def test_every_known_pitfall_has_its_row() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = {
        int(number): line
        for line in text.splitlines()
        if (number := line.partition("|")[2].partition("|")[0].strip()).isdigit()
    }
    assert sorted(rows) == list(range(1, PITFALLS + 1))
    for number, row in rows.items():
        assert len(row.split("|")) == 5, number
        assert "not covered yet" not in row.lower(), number
