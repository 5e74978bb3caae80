"""Tables of text cells, and their formatting for a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.recipe.diagnostics import printable

DECLINE = "\N{DOWNWARDS ARROW}"
"""Marks the first value after a column's best one, if it is worse."""
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
BEST = "*"
"""Marks the name of the best row where bold type is not available."""


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

    @property
    def has_marks(self) -> bool:
        """Whether any row is marked as best."""
        return bool(self.marked)


def text(table: TextTable) -> str:
    """Format a table for a terminal; columns are aligned even with wide characters."""
    marks = [BEST if index in table.marked else " " for index in range(len(table.rows))] if table.has_marks else None
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
    body = [[_markdown(cell) for cell in row] for row in table.rows]
    body = [
        [f"**{cell}**" if cell else "" for cell in row] if index in table.marked else row
        for index, row in enumerate(body)
    ]
    lines = ["| " + " | ".join(row) + " |" for row in ([_markdown(cell) for cell in table.head], ruler, *body)]
    notes = [f"- {_markdown(note)}" for note in table.notes]
    return "\n".join([f"**{_markdown(table.title)}**", "", *lines, *(["", *notes] if notes else [])])


def latex(table: TextTable) -> str:
    """Format a table as a LaTeX table environment, which needs the booktabs package; the best rows are bold."""
    columns = "".join("l" if column in table.left else "r" for column in range(len(table.head)))
    body = [[_latex(cell) for cell in row] for row in table.rows]
    body = [
        [rf"\textbf{{{cell}}}" if cell else "" for cell in row] if index in table.marked else row
        for index, row in enumerate(body)
    ]
    lines = [" & ".join(row) + r" \\" for row in body]
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


def csv_text(records: Sequence[Mapping[str, object]]) -> str:
    """Format records as CSV, with a column for each key in order of appearance and empty cells for None."""
    head = list(dict.fromkeys(key for record in records for key in record))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, head, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


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
    "|": r"\textbar{}", "±": r"$\pm$", MINUS: "$-$", DASH: "--", "\N{MULTIPLICATION SIGN}": r"$\times$",
    DECLINE: r"$\downarrow$",
    "[": "{[}", "]": "{]}",
}  # fmt: skip
"""Replacements for LaTeX. ``[`` is in braces: after \\\\ it would start an optional argument."""


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(char, char) for char in _line(cell))
