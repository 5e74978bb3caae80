"""What the classes of the recipe language have in common: patterns, units, the rules of every table."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1, both included."""

NAME_PATTERN = r"^[^\W_]([ .]?[\w+=,@-])*$"
"""A name that is safe as one folder, one W&B name and one job name: letters, digits and ``_+=,@-``.

A space or dot stands between two others only, so neither ``..`` nor one at the end is possible."""

NAME_LENGTH = 100

SLURM_WORD = r"^[\w.,@+-]+$"
"""Names of partitions, accounts and the like."""

SLURM_TIME = r"^(\d+|\d+:[0-5]?\d(:[0-5]?\d)?|\d+-\d+(:[0-5]?\d(:[0-5]?\d)?)?)$"
"""Time limits as sbatch reads them: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""

SLURM_FEATURES = r"^[\w.,:&|*()\[\]@+-]+$"
SLURM_MEMORY = r"^\d+[KMGT]?$"
SLURM_OPTION = r"^--[a-z][a-z-]*(=[\w.,:/@%+=&|*()\[\]-]+)?$"
"""What can stand in a #SBATCH line as it is, without quotation marks or spaces."""

ValidationMetric = Literal["val/loss", "val/accuracy", "val/top5_accuracy", "val/balanced_accuracy"]
Metric = Literal[
    "train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/top5_accuracy", "val/balanced_accuracy"
]
"""The figures of every epoch, as metrics.jsonl and the trackers call them.

``balanced_accuracy`` is the mean over classes of the share of that class's images classified rightly.
"""

Selection = Literal["val/loss", "val/accuracy", "val/top5_accuracy", "val/balanced_accuracy", "last"]
"""By which figure the kept epoch is chosen; ``last``: it is the last one, whatever the figures."""

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "none"]


class ConfigModel(BaseModel):
    """Common rules of all tables: no unknown keys, no silent conversion of types, no later change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def describe(text: str, *, unit: str | None = None) -> Any:
    """A field's meaning and unit, for the JSON Schema and the reference page."""
    return Field(description=text, json_schema_extra={"unit": unit} if unit else None)
