"""Common parts of the recipe schema: patterns, metric names and the base class of all tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from toolkit.metrics import EPOCH_METRICS, METRICS, MODEL_METRICS, PLUGIN_NAME, VALIDATION_METRICS

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1, inclusive."""

FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A number from 0 to 1, excluding 1."""

NAME_PATTERN = r"^[^\W_]([ .]?[\w+=,@-])*$"
"""Pattern of names that are safe as a folder, W&B name and job name: letters, digits and ``_+=,@-``.

Spaces and dots are allowed only between two other characters, which excludes ``..`` and a space or dot at the end.
"""

NAME_LENGTH = 100

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

PLUGIN_PATTERN = f"^plugin:{PLUGIN_NAME}$"
"""Pattern of a plugin's name (:mod:`toolkit.plugins`) in keys that also take built-in names."""

PluginName = Annotated[str, Field(pattern=PLUGIN_PATTERN, max_length=NAME_LENGTH)]

PLUGIN_METRIC, PLUGIN_COLUMN = f"^val/{PLUGIN_NAME}$", f"^(last_)?(val|test)_{PLUGIN_NAME}$"
"""Patterns of a plugin's metric: in metrics.jsonl, and as a column of a table."""

SLURM_WORD = r"^[\w.,@+-]+$"
"""Pattern of names of SLURM partitions, accounts and similar."""

SLURM_TIME = r"^(\d+|\d+:[0-5]?\d(:[0-5]?\d)?|\d+-\d+(:[0-5]?\d(:[0-5]?\d)?)?)$"
"""Pattern of sbatch time limits: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""

SLURM_FEATURES = r"^[\w.,:&|*()\[\]@+-]+$"
SLURM_MEMORY = r"^\d+[KMGT]?$"
SLURM_OPTION = r"^--[a-z][a-z-]*(=[\w.,:/@%+=&|*()\[\]-]+)?$"
"""Pattern of options that need no quoting in an #SBATCH line: no quotation marks or spaces."""

REGISTRY = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,99})?$"
"""Pattern of a W&B registry, with or without a collection."""

if TYPE_CHECKING:  # type checkers cannot evaluate a Literal of computed names
    EpochMetric = str
    ValidationMetric = str
    Selection = str
    MetricName = str
    ModelMetricName = str
else:
    OwnMetric, OwnColumn = (Annotated[str, Field(pattern=pattern)] for pattern in (PLUGIN_METRIC, PLUGIN_COLUMN))
    EpochMetric = Literal[*EPOCH_METRICS] | OwnMetric
    """Metrics logged every epoch, named as in metrics.jsonl and the trackers."""
    ValidationMetric = Literal[*VALIDATION_METRICS] | OwnMetric
    Selection = Literal[*VALIDATION_METRICS, "last"] | OwnMetric
    """Metric that selects the epoch whose weights are kept; ``last``: the last epoch, whatever its metrics."""
    MetricName = Literal[*METRICS] | OwnColumn
    """Column of a study's table."""
    ModelMetricName = Literal[*MODEL_METRICS] | OwnColumn

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "none"]


class ConfigModel(BaseModel):
    """Base class of all tables: unknown keys are rejected, types are not converted, instances are immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# Units, for Field(json_schema_extra=...): shown in the JSON Schema and the reference page.
EPOCHS: dict[str, JsonValue] = {"unit": "epochs"}
STEPS: dict[str, JsonValue] = {"unit": "steps"}
IMAGES: dict[str, JsonValue] = {"unit": "images"}
PIXELS: dict[str, JsonValue] = {"unit": "pixels"}
SECONDS: dict[str, JsonValue] = {"unit": "seconds"}
MINUTES: dict[str, JsonValue] = {"unit": "minutes"}
