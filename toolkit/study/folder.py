"""The folder of a study: which runs it consists of, and how far each has come. Files only; needs no torch.

    <run_root>/<recipe name>/         (the recipe name is the study's)
      study.json                      what varies, and the members known so far (a search adds to them)
      <run id>/                       run directories, as everywhere
      table.csv table.md table.tex figures/

Only the controller writes study.json; workers write in run directories alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["missing", "paused", "running", "finished", "failed"]
"""missing: no run directory yet. paused: it has one, nobody trains in it, it is not at its end."""


@dataclass(frozen=True)
class Member:
    """One run of a study."""

    row: str
    """Name of its row in the table: the row's own name, or the varied values; seeds of a row share it."""
    seed: int
    changes: dict[str, Any]
    """Varied keys, dotted, with their values; without the seed."""
    hash: str
    """Of its resolved recipe (:func:`toolkit.recipe.recipe_hash`); finds its run directory again."""
    run: str | None = None
    """Name of its run directory in the study's folder, once there is one."""
    published: dict[str, float] = field(default_factory=dict)
    published_epochs: dict[str, list[float]] = field(default_factory=dict)
    source: str = ""
    note: str = ""


@dataclass(frozen=True)
class StudyFolder:
    """A study on disk, as the table, the figures and the report read it."""

    path: Path
