"""The soups of a study, read from ``soup/`` in its directory, as rows of its table. Does not import torch.

A soup is a folder like a run directory, so that all commands for runs take it, with one more file, ``soup.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from toolkit.errors import UserError
from toolkit.metrics import metric_of
from toolkit.reading import Shape, read_json
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory, StudyRun
from toolkit.study.results import ResultRow, RunResult, metrics_of
from toolkit.study.significance import McNemar, estimate
from toolkit.study.text_table import MINUS, interval_text, number, p_value

FOLDER = "soup"
FILE = "soup.json"
Method = Literal["uniform", "greedy"]
METHODS: tuple[Method, ...] = ("uniform", "greedy")


class Ingredient(Shape):
    """A run that could enter a soup: an entry of soup.json's ``members``, sorted by the metric, best first."""

    title: str
    """Row name, seed and fold."""
    run: str
    """Name of the run directory."""
    value: float
    """The validation metric of the run, evaluated when the soup was made."""
    used: bool


class SoupFile(Shape):
    """Schema of soup.json."""

    method: Method
    metric: str
    """The validation metric, as in metrics.jsonl."""
    value: float
    """The validation metric of the soup."""
    members: list[Ingredient] = Field(min_length=1)
    recomputed_batch_norms: int = Field(ge=0)
    """Number of batch norm layers whose statistics were recomputed."""
    test: dict[str, int] | None
    """Of the test images: ``soup_only`` and ``best_only``, which only the soup and only its best member classify
    correctly, and ``images``; None without test images."""
    warnings: list[str] = Field([])


@dataclass(frozen=True)
class Soup:
    """A soup and its metrics."""

    content: SoupFile
    result: RunResult

    @property
    def name(self) -> str:
        """Name in tables."""
        used = sum(member.used for member in self.content.members)
        return f"{self.content.method} soup ({used} of {len(self.content.members)} runs)"

    @property
    def paired(self) -> McNemar | None:
        """Comparison of the soup with its best member on the test images; None if there are none."""
        test = self.content.test
        return None if test is None else McNemar(test["soup_only"], test["best_only"], test["images"])

    def row(self, confidence: float) -> ResultRow:
        """Return the soup as a row of a results table."""
        metrics = {name: estimate([value], confidence) for name, value in self.result.metrics.items()}
        return ResultRow(self.name, [self.result], metrics)

    def note(self, confidence: float) -> str:
        """Return a sentence that compares the soup with its best member."""
        best = self.content.members[0]
        metric = metric_of(self.content.metric)
        text = (
            f"{self.name}: {metric.heading} {number(metric.name, self.content.value)}, best member {best.title} "
            f"{number(metric.name, best.value)}"
        )
        if len([member for member in self.content.members if member.used]) == 1:
            return f"{self.name}: no other run improved it, so it consists of {best.title} alone."
        if self.paired is None:
            return f"{text}."
        name = "test_accuracy"
        difference = number(name, self.paired.difference, signed=True, mean=True)
        interval = interval_text(name, self.paired.interval(confidence))
        return (
            f"{text}; soup {MINUS} best member on the same test images: {difference} points of accuracy, "
            f"{confidence * 100:g} % interval {interval}, McNemar p {p_value(self.paired.p)}."
        )


def read_soups(folder: StudyDirectory) -> tuple[list[Soup], list[str]]:
    """Return the soups of a study, and messages about those whose files are damaged."""
    soups, faults = [], []
    for method in METHODS:
        run = Run(folder.path / FOLDER / method)
        if not (run.path / FILE).exists():
            continue
        try:
            content = SoupFile.model_validate(read_json(run.path / FILE, SoupFile))
            epochs, summary = run.epoch_records(), run.summary
        except UserError as fault:
            faults.append(f"The {method} soup is not shown: {fault}.")
            continue
        member = StudyRun(f"{method} soup", int(summary.get("seed", 0)), {}, "")
        soups.append(Soup(content, RunResult(member, "finished", metrics_of(summary, epochs), epochs)))
    return soups, faults


def soup_notes(soups: Sequence[Soup], faults: Sequence[str], confidence: float) -> list[str]:
    """Return the notes below a table with soups."""
    if not soups:
        return list(faults)
    notes = ["A soup averages the weights of runs (Wortsman et al. 2022); it is not a run of the study."]
    notes += [soup.note(confidence) for soup in soups]
    notes += [f"The {soup.content.method} soup: {warning}." for soup in soups for warning in soup.content.warnings]
    return [*notes, *faults]


def soup_record(soup: Soup, confidence: float) -> dict[str, Any]:
    """Return the comparison of a soup with its best member as JSON values."""
    content = soup.content
    record: dict[str, Any] = {
        "name": soup.name,
        "method": content.method,
        "members": [member.model_dump() for member in content.members],
        "metric": content.metric,
        "value": content.value,
        "best_member_value": content.members[0].value,
        "recomputed_batch_norms": content.recomputed_batch_norms,
        "warnings": content.warnings,
        "metrics": soup.result.metrics,
    }
    if soup.paired is not None:
        record["test"] = {
            "difference": soup.paired.difference,
            "interval": soup.paired.interval(confidence),
            "mcnemar_p": soup.paired.p,
        }
    return record
