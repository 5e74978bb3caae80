"""One HTML file that needs nothing else: templates filled, everything from files escaped, nothing fetched."""

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
    """A column of a table that sorts."""

    name: str
    number: bool = False


@dataclass(frozen=True)
class HtmlCell:
    """What stands in a table."""

    text: str
    value: float | None = None
    """What it sorts by, if not its text."""
    share: float | None = None
    """Drawn as a bar, 0..1."""
    name: bool = False
    """May be long and be broken anywhere."""
    code: bool = False
    link: str = ""
    """A file beside the page, as a relative URL."""


@dataclass(frozen=True)
class HtmlRow:
    """A row; ``kind`` is its class in the style sheet, and what buttons select by."""

    cells: Sequence[HtmlCell]
    kind: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table that sorts and filters."""

    columns: Sequence[HtmlColumn]
    rows: Sequence[HtmlRow]
    text: str = ""
    buttons: Sequence[tuple[str, str]] = ()
    """Names and kinds of rows of the buttons that select rows; the first is pressed."""


@dataclass
class HtmlReport:
    """What every page has."""

    template: str
    title: str
    subtitles: list[str]
    sections: list[tuple[str, str]]
    """Id and name of each."""
    missing: list[str]
    data: dict[str, Any]
    """For the script: charts and cells."""
    content: dict[str, Any] = field(default_factory=dict)
    """For the template."""


def render(page: HtmlReport) -> str:
    """The whole HTML file.

    Text is escaped by the templates; and a content security policy lets no script run but the page's own, and nothing
    be fetched.
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
    """JSON that can stand within an HTML element: no ``<`` or ``&``, no NaN or Infinity."""
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
    """A cell with a name from a file."""
    return HtmlCell(printable(text), name=True)


def integer(value: int) -> HtmlCell:
    """A cell with a whole number."""
    return HtmlCell(f"{value:,}", float(value))


def percent(share: float, digits: int = 2) -> str:
    """0.1234 as 12.34 %."""
    return f"{100 * share:.{digits}f} %"


def number(value: object, form: str = ".4f") -> HtmlCell:
    """A cell with a number, or a dash for what is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return HtmlCell("-")
    return HtmlCell(format(value, form), float(value))


def share(value: object, *, bar: bool = False) -> HtmlCell:
    """A cell with a share as a percentage, or a dash."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return HtmlCell("-")
    return HtmlCell(percent(value), float(value), float(value) if bar else None)
