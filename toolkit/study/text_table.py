"""Tables of text cells, and their formatting for a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from toolkit.metrics import metric_of
from toolkit.recipe.diagnostics import printable

DECLINE = "\N{DOWNWARDS ARROW}"
"""Marks the first value after a column's best one, if it is worse."""
MINUS, MISSING = "\N{MINUS SIGN}", "\N{EN DASH}"
"""Sign of negative numbers, and placeholder for missing values."""
BEST = "*"
"""Marks the name of the best row where bold type is not available."""


class Column(NamedTuple):
    """A column of a table, formatted as text."""

    heading: str
    cells: list[str]
    is_left: bool = False
    """Whether the column is left-aligned, like names, or right-aligned, like numbers."""


@dataclass(frozen=True)
class TextTable:
    """A table of plain text cells."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    """Indices of the best rows."""
    notes: Sequence[str] = ()
    """Notes below the table, each of one or more sentences."""
    left: frozenset[int] = frozenset({0})
    """Indices of left-aligned columns; all others are right-aligned."""

    @classmethod
    def of_columns(
        cls, title: str, columns: Sequence[Column], marked: Iterable[int] = (), notes: Sequence[str] = ()
    ) -> TextTable:
        """Build a table from its columns, which have the same number of cells."""
        rows = list(zip(*(column.cells for column in columns), strict=True))
        left = frozenset(index for index, column in enumerate(columns) if column.is_left)
        return cls(title, [column.heading for column in columns], rows, frozenset(marked), notes, left)


def text(table: TextTable) -> str:
    """Format a table for a terminal; columns are aligned even with wide characters."""
    marks = [BEST if index in table.marked else " " for index in range(len(table.rows))] if table.marked else None
    lines = [[_line(cell) for cell in row] for row in (table.head, *table.rows)]
    if marks is not None:
        lines = [[f"{mark} {row[0]}", *row[1:]] for mark, row in zip([" ", *marks], lines, strict=True)]
    widths = [max(width(row[column]) for row in lines) for column in range(len(table.head))]
    aligned = ["  ".join(_pad(c, w, i in table.left) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
               for row in lines]  # fmt: skip
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    shown = [aligned[0], rule, *aligned[1:]]
    return "\n".join([_line(table.title), *(line.rstrip() for line in shown), *(_line(note) for note in table.notes)])


def markdown(table: TextTable) -> str:
    """Format a table as GitHub Markdown; the best rows are bold."""
    ruler = [":---" if column in table.left else "---:" for column in range(len(table.head))]
    body = _escaped_rows(table, _markdown, "**{}**")
    lines = ["| " + " | ".join(row) + " |" for row in ([_markdown(cell) for cell in table.head], ruler, *body)]
    notes = [f"- {_markdown(note)}" for note in table.notes]
    return "\n".join([f"**{_markdown(table.title)}**", "", *lines, *(["", *notes] if notes else [])])


def latex(table: TextTable) -> str:
    """Format a table as a LaTeX table environment, which needs the booktabs package; the best rows are bold."""
    columns = "".join("l" if column in table.left else "r" for column in range(len(table.head)))
    lines = [" & ".join(row) + r" \\" for row in _escaped_rows(table, _latex, r"\textbf{{{}}}")]
    notes = [rf"\\ {{\footnotesize {_latex(note)}}}" for note in table.notes]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(table.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(_latex(cell) for cell in table.head) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
        ]
    )


def _escaped_rows(table: TextTable, escape: Callable[[str], str], bold: str) -> list[list[str]]:
    """Return the rows with escaped cells; cells of the best rows are formatted with ``bold``."""
    rows = [[escape(cell) for cell in row] for row in table.rows]
    return [
        [bold.format(cell) if cell else "" for cell in row] if index in table.marked else row
        for index, row in enumerate(rows)
    ]


def csv_text(records: Sequence[Mapping[str, object]]) -> str:
    """Format records as CSV, with a column for each key in order of appearance and empty cells for None."""
    head = list(dict.fromkeys(key for record in records for key in record))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, head, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def number(metric: str, value: float | None, *, signed: bool = False, mean: bool = False) -> str:
    """Format a metric, or a difference of two, for a cell; a mean of integers has one decimal."""
    if value is None:
        return MISSING
    shown = metric_of(metric).measure
    decimals = 1 if mean and not shown.decimals and value != int(value) else shown.decimals
    return f"{value * shown.scale:{'+' if signed else ''},.{decimals}f}".replace("-", MINUS)


def interval_text(metric: str, interval: tuple[float, float] | None, *, signed: bool = True) -> str:
    """Format an interval of a metric, or of a difference of two, as a cell."""
    if interval is None:
        return MISSING
    low, high = (number(metric, end, signed=signed, mean=True) for end in interval)
    return f"[{low}, {high}]"


def p_value(p: float | None) -> str:
    """Format a p-value as a cell."""
    return MISSING if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def width(line: str) -> int:
    """Return the width of a line in terminal columns: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
               for char in line)  # fmt: skip


def _pad(cell: str, columns: int, is_left: bool) -> str:
    space = " " * (columns - width(cell))
    return cell + space if is_left else space + cell


def _line(cell: str) -> str:
    """Return the cell on one line, without control characters."""
    return printable(" ".join(cell.split()))


def _markdown(cell: str) -> str:
    escaped = re.sub(r"([\\|<*`])", r"\\\1", _line(cell))
    return escaped.replace("](", "]\\(")  # prevents Markdown links


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", MINUS: "$-$", MISSING: "--", "\N{MULTIPLICATION SIGN}": r"$\times$",
    DECLINE: r"$\downarrow$",
    "[": "{[}", "]": "{]}",
}  # fmt: skip
"""Replacements for LaTeX. ``[`` is in braces: after \\\\ it would start an optional argument."""


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(char, char) for char in _line(cell))
