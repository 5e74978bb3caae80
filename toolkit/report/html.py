"""Self-contained HTML reports: rendered from templates, with text escaped and no external resources."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import toolkit
from toolkit.errors import UserError
from toolkit.metrics import Metric
from toolkit.recipe.diagnostics import printable
from toolkit.writing import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class HtmlCell:
    """A cell of a table."""

    text: str
    value: float | None = None
    """Sort key; None: sort by the text."""
    kind: Literal["", "name", "code"] = ""
    """Cells of kind ``name`` and ``code`` may be long and wrap at any character."""
    is_bar: bool = False
    """Whether ``value``, 0..1, is also drawn as a bar."""
    link: str = ""
    """Relative URL of a linked file."""


@dataclass(frozen=True)
class HtmlRow:
    """A row of a table; ``kind`` is its CSS class, which the filter buttons use."""

    cells: Sequence[HtmlCell]
    kind: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table that can be sorted and filtered."""

    head: Sequence[str]
    rows: Sequence[HtmlRow]
    numbers: Container[int] = ()
    """Indices of numeric columns, which are right-aligned and whose first click sorts in descending order."""
    text: str = ""
    """Caption or introduction of the table."""
    buttons: Sequence[tuple[str, str]] = ()
    """Filter buttons: label, and the row kinds that it shows, separated by spaces. The first one is active."""
    notes: Sequence[str] = ()


def write_page(path: Path, template: str, data: dict[str, Any], **content: Any) -> Path:
    """Render a template to one HTML file and return its path. Raises UserError if it cannot be written.

    ``content`` holds the template's variables, ``data`` holds the charts for the page's script. All text is escaped,
    and control characters are replaced. A content security policy allows only the page's own script and no requests.
    """
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    text = render(
        template,
        version=toolkit.__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_json(data),
        **content,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"the report cannot be written to {path}: {error.strerror}") from None
    return path


def render(template: str, **content: Any) -> str:
    """Render a template with its variables. All text is escaped, and control characters are replaced."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(**content)


def _json(value: Any) -> Markup:
    """Serialize to JSON that is safe inside an HTML element: no ``<``, ``>`` or ``&``; NaN and Infinity become null."""
    text = json.dumps(_json_value(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def name(text: str) -> HtmlCell:
    """Return a cell with a name read from a file."""
    return HtmlCell(text, kind="name")


def code(text: str) -> HtmlCell:
    """Return a cell with a key or value."""
    return HtmlCell(text, kind="code")


def integer(value: int) -> HtmlCell:
    """Return a cell with an integer."""
    return HtmlCell(f"{value:,}", float(value))


def percent(share: float, digits: int = 2) -> str:
    """Format 0.1234 as 12.34 %."""
    return f"{100 * share:.{digits}f} %"


def metric_cell(metric: Metric, value: object) -> HtmlCell:
    """Return a cell with the value of a metric, or a dash if ``value`` is not a finite number."""
    if metric.measure.unit == "%":
        return share(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return HtmlCell("-")
    return HtmlCell(f"{value:.{metric.measure.decimals}f}", float(value))


def share(value: object, *, bar: bool = False) -> HtmlCell:
    """Return a cell with a fraction as a percentage, or a dash if ``value`` is not a finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return HtmlCell("-")
    return HtmlCell(percent(value), float(value), is_bar=bar)
