"""Self-contained HTML reports: rendered from templates, with text escaped and no external resources."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import toolkit
from toolkit.recipe.diagnostics import printable

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class HtmlColumn:
    """A column of a sortable table."""

    name: str
    number: bool = False


@dataclass(frozen=True)
class HtmlCell:
    """A cell of a table."""

    text: str
    value: float | None = None
    """Sort key; default: the text."""
    share: float | None = None
    """Drawn as a bar, 0..1."""
    name: bool = False
    """Whether the text may be long and wrap anywhere."""
    code: bool = False
    link: str = ""
    """Relative URL of a linked file."""


@dataclass(frozen=True)
class HtmlRow:
    """A row of a table; ``kind`` is its CSS class, which buttons filter by."""

    cells: Sequence[HtmlCell]
    kind: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table that can be sorted and filtered."""

    columns: Sequence[HtmlColumn]
    rows: Sequence[HtmlRow]
    text: str = ""
    buttons: Sequence[tuple[str, str]] = ()
    """Filter buttons: the label, and the kinds of rows shown. The first is active."""


@dataclass
class HtmlReport:
    """Content of a report page."""

    template: str
    title: str
    subtitles: list[str]
    sections: list[tuple[str, str]]
    """Id and title of each section."""
    missing: list[str]
    data: dict[str, Any]
    """Charts and confusion matrix cells for the page's script."""
    content: dict[str, Any] = field(default_factory=dict)
    """Template variables."""


def render(page: HtmlReport) -> str:
    """Render the HTML file.

    The templates escape all text; a content security policy allows only the page's own script and no external requests.
    """
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(page.template).render(
        title=printable(page.title),
        subtitles=[printable(line) for line in page.subtitles],
        sections=page.sections,
        missing=page.missing,
        version=toolkit.__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_json(page.data),
        **page.content,
    )


def _json(value: Any) -> Markup:
    """Serialize to JSON that is safe inside an HTML element: no ``<``, ``>`` or ``&``; NaN and Infinity become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def name(text: str) -> HtmlCell:
    """Return a cell with a name read from a file."""
    return HtmlCell(printable(text), name=True)


def integer(value: int) -> HtmlCell:
    """Return a cell with an integer."""
    return HtmlCell(f"{value:,}", float(value))


def percent(share: float, digits: int = 2) -> str:
    """Format 0.1234 as 12.34 %."""
    return f"{100 * share:.{digits}f} %"


def number(value: object, form: str = ".4f") -> HtmlCell:
    """Return a cell with a number, or a dash if ``value`` is not a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return HtmlCell("-")
    return HtmlCell(format(value, form), float(value))


def share(value: object, *, bar: bool = False) -> HtmlCell:
    """Return a cell with a fraction as a percentage, or a dash if ``value`` is not a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return HtmlCell("-")
    return HtmlCell(percent(value), float(value), float(value) if bar else None)
