"""Sphinx configuration of the documentation; `make docs` builds it, without a network, in build/docs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toolkit  # noqa: E402

project = "toolkit"
author = "the toolkit authors"
copyright = author
release = toolkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"{project} {release}"
templates_path: list[str] = []
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True

OUTSIDE = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "benchmarks": "benchmarks/README.md",
}
"""Pages whose text is a file outside docs/, where GitHub and readers of the repository look for it."""


def read_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the file's text before the page's own, and make links between files of the repository links between pages."""
    file = ROOT / OUTSIDE.get(docname, f"docs/{docname}.md")
    if docname in OUTSIDE:
        source[0] = f"{file.read_text()}\n\n{source[0]}"
    pages = {path: f"{name}.md" for name, path in OUTSIDE.items()}

    def page_link(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        path = os.path.relpath((file.parent / target).resolve(), ROOT)
        if path in pages:
            return f"[{text}]({pages[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return text  # a file or folder of the repository that is not a page

    source[0] = re.sub(r"\[(?P<text>[^\]]*)\]\((?!\w+:)(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)", page_link, source[0])


def setup(app: Sphinx) -> None:
    """Connect the reader (called by Sphinx)."""
    app.connect("source-read", read_outside)
