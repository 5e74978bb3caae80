"""Results of a study's runs, read from their run directories. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from toolkit.errors import UserError
from toolkit.metrics import METRICS
from toolkit.study.directory import RunState, StudyDirectory, StudyRun, failure_of


@dataclass(frozen=True)
class RunResult:
    """One member of a study and the contents of its run directory."""

    member: StudyRun
    state: RunState
    metrics: dict[str, float] = field(default_factory=dict)
    """The :data:`~toolkit.metrics.METRICS` that the run has; empty unless it is finished."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """Records of the epochs trained so far, finished or not."""
    stopped_early: bool = False
    images: dict[str, int] = field(default_factory=dict)
    """Number of images per split."""
    failure_reason: str = ""
    """Why the run has no metrics, if known."""

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished; only finished runs enter the metrics of a row."""
        return self.state == "finished"

    def values(self, metric: str) -> list[float]:
        """Return a metric of metrics.jsonl after each epoch trained so far."""
        return [float(record[metric]) for record in self.epochs if metric in record]


def read_results(folder: StudyDirectory) -> list[RunResult]:
    """Read the results of all members of a study, in table order."""
    return [_result(folder, member) for member in folder.members]


def _result(folder: StudyDirectory, member: StudyRun) -> RunResult:
    run = folder.run(member)
    try:
        state = folder.state(member)
        if run is None or state == "missing":
            return RunResult(member, "missing")
        epochs = run.epochs()
        if state != "finished":
            failure = failure_of(run) if state == "failed" else None
            return RunResult(member, state, epochs=epochs, failure_reason=failure.line if failure else "")
        summary = run.summary
        return RunResult(
            member,
            state,
            {name: value for name, metric in METRICS.items() if (value := metric.read(summary, epochs)) is not None},
            epochs,
            bool(summary.get("stopped_early")),
            {str(name): int(count) for name, count in summary.get("images", {}).items()},
        )
    except UserError as fault:
        return RunResult(member, "failed", failure_reason=str(fault).strip().splitlines()[0])
    except OSError as fault:
        return RunResult(
            member, "failed", failure_reason=f"{fault.filename or folder.path} cannot be read: {fault.strerror}"
        )
