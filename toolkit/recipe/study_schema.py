"""The [study] table: what varies between the runs of an experiment, and published results to compare with.

A study file is a recipe with a [study] table; each of its runs is that recipe with some keys overridden. Keys are
written as in a recipe, nested or dotted:

    [study.grid]
    optimizer.lr = [0.1, 0.01]
    optimizer.momentum = { values = [0.5, 0.9], when = { optimizer.name = "sgd" } }

    [[study.rows]]
    name = "SGD, lr 0.01"
    set.optimizer.lr = 0.01
    published = { val_accuracy = 0.51, test_accuracy = 0.50 }
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolkit.recipe.base import (
    EPOCHS,
    ConfigModel,
    EpochMetric,
    Fraction,
    MetricName,
    ModelMetricName,
    Seed,
    ValidationMetric,
)

MAX_RUNS = 200
"""A study with more runs than this starts only if the user confirms."""

MOST_TRIALS = 10_000
"""Maximum number of configurations of a search."""

ConfigOverrides = dict[str, Any]
"""Recipe keys, nested as in a recipe; what their values mean depends on the field."""


class PublishedMean(ConfigModel):
    """A published mean over several runs."""

    mean: float = Field(description="Mean over runs; accuracies as fractions.")
    std: float = Field(ge=0, description="Sample standard deviation over runs (n - 1 in the denominator).")
    n: int = Field(ge=2, description="Number of runs.")


PublishedMetrics = dict[MetricName, float | PublishedMean]
"""Published metrics, of a single run or as mean, standard deviation and number of runs."""

_METRICS = "Published metrics; accuracies as fractions. Over several runs: { mean = ..., std = ..., n = ... }."


class PublishedResults(ConfigModel):
    """Published results, and the recipe values of the runs that they apply to."""

    where: ConfigOverrides = Field({}, description="Recipe keys and the values that a run must have; {}: all runs.")
    metrics: PublishedMetrics = Field(description=_METRICS)
    source: str = Field("", description="Where the results are published.")
    note: str = Field("", description="Notes for the reader, such as contradictions or unclear settings.")


class StudyRow(ConfigModel):
    """A named row of the results table: its overrides and the published results."""

    name: str = Field(min_length=1, max_length=120, description="Name of the row in the table.")
    set: ConfigOverrides = Field({}, description="Recipe keys and their values in this row.")
    published: PublishedMetrics = Field({}, description=_METRICS)
    published_epochs: dict[EpochMetric, list[float]] = Field(
        {}, description="Published metrics per epoch, starting with the first."
    )
    source: str = Field("", description="Where the results are published, if different from study.source.")
    note: str = Field("", description="Notes for the reader, such as contradictions or unclear settings.")


class RandomSearchConfig(ConfigModel):
    """Random search over [study.space] (Bergstra and Bengio 2012)."""

    runs: int = Field(ge=1, le=MOST_TRIALS, description="Number of configurations to sample.")
    seed: Seed = Field(0, description="Seed of the search.")


class BohbSearchConfig(ConfigModel):
    """Model-based search with early stopping of poor configurations (BOHB, Falkner et al. 2018).

    Configurations are proposed by a tree-structured Parzen estimator and trained for ``min_epochs`` epochs; the best
    1/eta of them continue to eta times as many epochs, and so on up to ``max_epochs`` (Hyperband, Li et al. 2018).
    """

    trials: int = Field(ge=1, le=MOST_TRIALS, description="Number of configurations to try, at any budget.")
    min_epochs: int = Field(3, ge=1, description="Minimum budget.", json_schema_extra=EPOCHS)
    max_epochs: int = Field(
        30, ge=1, description="Maximum budget; train.epochs of every run.", json_schema_extra=EPOCHS
    )
    eta: int = Field(3, ge=2, description="1/eta of the configurations are promoted to the next budget.")
    brackets: int | Literal["auto"] = Field(
        "auto",
        description="Number of Hyperband brackets; auto: as many as get more than ten trials each, at least one.",
    )
    startup_trials: int = Field(10, ge=1, description="Number of random configurations before the model proposes any.")
    metric: ValidationMetric = Field(
        "val/accuracy", description="Objective: losses are minimized, accuracies maximized."
    )
    seed: Seed = Field(0, description="Seed of the search.")

    @model_validator(mode="after")
    def _budgets_in_order(self) -> BohbSearchConfig:
        if self.min_epochs > self.max_epochs:
            raise ValueError(f"min_epochs = {self.min_epochs} is more than max_epochs = {self.max_epochs}")
        return self


class ResultsTableConfig(ConfigModel):
    """Format of the results table."""

    columns: list[MetricName] = Field(
        [
            "train_loss",
            "train_accuracy",
            "val_loss",
            "val_accuracy",
            "test_accuracy",
            "epochs",
            "seconds",
            "images_per_second",
        ],
        min_length=1,
        description="Columns of the table, after the name of the row.",
    )
    best_by: ValidationMetric = Field("val/accuracy", description="Validation metric that selects the best row.")
    per_epoch: EpochMetric | None = Field(
        None,
        description="Also write a table of this metric, with one line per epoch and one column per row of the study; "
        "x marks epochs after early stopping.",
    )
    confidence: Fraction = Field(0.95, description="Confidence level of the intervals over seeds (Student's t).")


class Claim(ConfigModel):
    """A published claim about two groups of runs, to be confirmed or refuted by the runs of the study."""

    statement: str = Field(min_length=1, description="The claim, as stated in the publication.")
    source: str = Field("", description="Where the claim is published.")
    metric: ModelMetricName = Field(description="The column to compare.")
    better: str | ConfigOverrides = Field(
        description="Name of a row, or recipe keys and values that select a group of runs."
    )
    than: list[str] | ConfigOverrides = Field(
        [],
        description="Names of rows, or recipe keys and values that select another group; []: all other rows of the "
        "study.",
    )
    holds: bool = Field(
        True, description="false: the publication claims that the first group is not better by more than the margin."
    )
    margin: float = Field(0.0, ge=0, description="Minimum difference that is claimed.")

    @model_validator(mode="after")
    def _two_groups_of_one_kind(self) -> Claim:
        if isinstance(self.better, str) != isinstance(self.than, list):
            raise ValueError("better and than are both names of rows, or both recipe keys with values")
        return self


class StudyConfig(ConfigModel):
    """What varies between the runs of a study. All combinations of rows x zip x grid x seeds are run."""

    description: str = Field("", description="One-line description of the study.")
    source: str = Field("", description="The publication and table that it reproduces.")
    note: str = Field("", description="Notes for the reader, shown with the table.")
    not_comparable: str = Field(
        "",
        description="Why the published values cannot be compared with these runs, such as another network. Shown "
        "instead of the differences; claims remain undecided.",
    )
    rows: list[StudyRow] = Field([], description="Named rows, each with its overrides.")
    grid: ConfigOverrides = Field(
        {},
        description="Recipe keys with lists of values, of which all combinations are run. { values = [...], when = "
        "{...} }: only for combinations with the values in when.",
    )
    zip: ConfigOverrides = Field({}, description="Recipe keys with lists of equal length, varied together.")
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[Seed], Field(min_length=1)] | None = Field(
        None, description="Values of recipe.seed: a list, or N for N consecutive seeds starting at the recipe's own."
    )
    space: ConfigOverrides = Field(
        {},
        description="Search space of random and bohb: recipe keys with { uniform = [a, b] }, { log_uniform = [a, b] "
        "}, { integers = [a, b] } or { choice = [...] }, each with an optional when = {...}.",
    )
    random: RandomSearchConfig | None = Field(None, description="Random search over the space.")
    bohb: BohbSearchConfig | None = Field(None, description="BOHB over the space.")
    published: list[PublishedResults] = Field([], description="Published metrics of single runs of a grid.")
    claims: list[Claim] = Field([], description="Published claims to check against the runs.")
    output: ResultsTableConfig = Field(ResultsTableConfig(), description="Format of the results table.")
    max_runs: int = Field(MAX_RUNS, ge=1, description="A study with more runs than this starts only with --yes.")
    gpus_per_run: int = Field(1, ge=1, description="GPUs per run, if there are any.")
    runs_per_gpu: int = Field(1, ge=1, description="Number of runs that share one GPU, for small models.")

    @property
    def metric(self) -> str:
        """The metric that BOHB optimizes; for other studies, output.best_by."""
        return self.bohb.metric if self.bohb else self.output.best_by
