"""Results of a study's runs, read from their run directories; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.study_schema import METRICS
from toolkit.study.directory import RunState, StudyDirectory, StudyRun, failure_of

LAST = "last_"
"""Prefix of metrics of the last epoch's model; all others belong to the best epoch."""

SPENT = {"epochs": "epochs_run", "seconds": "seconds", "images_per_second": "images_per_s", "parameters": "parameters"}
"""Metrics of the run, not of a model, and their names in summary.json."""


@dataclass(frozen=True)
class RunResult:
    """One member of a study and the contents of its run directory."""

    member: StudyRun
    state: RunState
    figures: dict[str, float] = field(default_factory=dict)
    """The :data:`METRICS` that the run has; empty unless it is finished."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """Records of the epochs trained so far, finished or not."""
    stopped_early: bool = False
    images: dict[str, int] = field(default_factory=dict)
    """Number of images per split."""
    trouble: str = ""
    """Why it has no metrics, if known."""

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished and counts."""
        return self.state == "finished"

    def values(self, metric: str) -> list[float]:
        """Return a metric of metrics.jsonl after each epoch trained so far."""
        return [float(record[metric]) for record in self.epochs if metric in record]


def higher_is_better(figure: str) -> bool:
    """Return whether higher is better: true for accuracies, not for losses. Accepts ``val/loss`` and ``val_loss``."""
    return not figure.endswith("loss")


def best_of(values: Sequence[float], metric: str) -> float | None:
    """Return the best of a metric's values; None if there are none."""
    return (max if higher_is_better(metric) else min)(values, default=None)


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
            return RunResult(member, state, epochs=epochs, trouble=failure.line if failure else "")
        summary = run.summary
        return RunResult(
            member,
            state,
            _figures(summary, epochs),
            epochs,
            bool(summary.get("stopped_early")),
            {str(name): int(count) for name, count in summary.get("images", {}).items()},
        )
    except UserError as fault:
        return RunResult(member, "failed", trouble=str(fault).strip().splitlines()[0])
    except OSError as fault:
        return RunResult(member, "failed", trouble=f"{fault.filename or folder.path} cannot be read: {fault.strerror}")


def _figures(summary: dict[str, Any], epochs: list[dict[str, Any]]) -> dict[str, float]:
    best, last_model = summary.get("best", {}), summary.get("last", {})
    record: dict[str, Any] = next((r for r in epochs if r["epoch"] == best.get("epoch")), {})
    last: dict[str, Any] = epochs[-1] if epochs else {}
    sources: dict[str, Any] = {
        **{f"train_{name}": record.get(f"train/{name}") for name in ("loss", "accuracy")},
        **{f"{LAST}train_{name}": last.get(f"train/{name}") for name in ("loss", "accuracy")},
        "train_accuracy_all_images": _of_all_images(record.get("train/accuracy"), summary),
        **{key: value for key, value in best.items() if key.startswith(("val_", "test_"))},
        **{f"{LAST}{key}": value for key, value in last_model.items()},
        **{figure: summary.get(name) for figure, name in SPENT.items()},
    }
    return {figure: float(sources[figure]) for figure in METRICS if isinstance(sources.get(figure), int | float)}


def _of_all_images(accuracy: float | None, summary: dict[str, Any]) -> float | None:
    """Return an epoch's correct predictions divided by all training images, including those of a dropped last batch."""
    seen, images = summary.get("images_per_epoch"), summary.get("images", {}).get("train")
    return accuracy * seen / images if accuracy is not None and seen and images else None
