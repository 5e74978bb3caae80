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
    ConfigModel,
    EpochMetric,
    Fraction,
    MetricName,
    ModelMetricName,
    ValidationMetric,
    describe,
)

MAX_RUNS = 200
"""A study with more runs starts only if the user confirms."""

MOST_TRIALS = 10_000
"""Maximum number of configurations of a search."""

ConfigOverrides = dict[str, Any]
"""Recipe keys, nested as in a recipe; the leaves are as described by the field."""


class PublishedMean(ConfigModel):
    """A published mean over several runs."""

    mean: Annotated[float, describe("Mean over runs; accuracies as fractions.")]
    std: Annotated[float, Field(ge=0), describe("Sample standard deviation over runs (n - 1 in the denominator).")]
    n: Annotated[int, Field(ge=2), describe("Number of runs.")]


PublishedMetrics = dict[MetricName, float | PublishedMean]
"""Published metrics, of a single run or as mean, standard deviation and number of runs."""

_FIGURES = "Published metrics; accuracies as fractions. Over several runs: { mean = ..., std = ..., n = ... }."


class PublishedResults(ConfigModel):
    """Published results of the runs with the given values."""

    where: Annotated[ConfigOverrides, describe("Recipe keys and the values that a run must have; {}: all runs.")] = {}
    figures: Annotated[PublishedMetrics, describe(_FIGURES)]
    source: Annotated[str, describe("Where the results are published.")] = ""
    note: Annotated[str, describe("Notes for the reader, such as contradictions or unclear settings.")] = ""


class StudyRow(ConfigModel):
    """A named row of the results table: its overrides and the published results."""

    name: Annotated[str, Field(min_length=1, max_length=120), describe("Name of the row in the table.")]
    set: Annotated[ConfigOverrides, describe("Recipe keys and their values in this row.")] = {}
    published: Annotated[PublishedMetrics, describe(_FIGURES)] = {}
    published_epochs: Annotated[
        dict[EpochMetric, list[float]], describe("Published metrics per epoch, starting with the first.")
    ] = {}
    source: Annotated[str, describe("Where the results are published, if different from study.source.")] = ""
    note: Annotated[str, describe("Notes for the reader, such as contradictions or unclear settings.")] = ""


class RandomSearchConfig(ConfigModel):
    """Random search over [study.space] (Bergstra and Bengio 2012)."""

    runs: Annotated[int, Field(ge=1, le=MOST_TRIALS), describe("Number of configurations to sample.")]
    seed: Annotated[int, Field(ge=0, lt=2**32), describe("Seed of the search.")] = 0


class BohbSearchConfig(ConfigModel):
    """Model-based search with early stopping of poor configurations (BOHB, Falkner et al. 2018).

    Configurations are proposed by a tree-structured Parzen estimator and trained for ``min_epochs`` epochs; the best
    1/eta of them continue to eta times as many epochs, and so on up to ``max_epochs`` (Hyperband, Li et al. 2018).
    """

    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS), describe("Number of configurations to try, at any budget.")]
    min_epochs: Annotated[int, Field(ge=1), describe("Minimum budget.", unit="epochs")] = 3
    max_epochs: Annotated[int, Field(ge=1), describe("Maximum budget; train.epochs of every run.", unit="epochs")] = 30
    eta: Annotated[int, Field(ge=2), describe("1/eta of the configurations are promoted to the next budget.")] = 3
    brackets: Annotated[
        int | Literal["auto"],
        describe("Number of Hyperband brackets; auto: as many as get more than ten trials each, at least one."),
    ] = "auto"
    startup_trials: Annotated[
        int, Field(ge=1), describe("Number of random configurations before the model proposes any.")
    ] = 10
    metric: Annotated[ValidationMetric, describe("Objective: losses are minimized, accuracies maximized.")] = (
        "val/accuracy"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32), describe("Seed of the search.")] = 0

    @model_validator(mode="after")
    def _budgets_in_order(self) -> BohbSearchConfig:
        if self.min_epochs > self.max_epochs:
            raise ValueError(f"min_epochs = {self.min_epochs} is more than max_epochs = {self.max_epochs}")
        return self


class ResultsTableConfig(ConfigModel):
    """Format of the results table."""

    columns: Annotated[
        list[MetricName], Field(min_length=1), describe("Columns of the table, after the name of the row.")
    ] = [
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "test_accuracy",
        "epochs",
        "seconds",
        "images_per_second",
    ]
    best_by: Annotated[ValidationMetric, describe("Validation metric that selects the best row.")] = "val/accuracy"
    per_epoch: Annotated[
        EpochMetric | None,
        describe(
            "Also write a table of this metric, with one line per epoch and one column per row of the study; x marks "
            "epochs after early stopping."
        ),
    ] = None
    confidence: Annotated[Fraction, describe("Confidence level of the intervals over seeds (Student's t).")] = 0.95


class Claim(ConfigModel):
    """A published claim about two groups of runs, to be confirmed or refuted by the runs of the study."""

    statement: Annotated[str, Field(min_length=1), describe("The claim, as stated in the publication.")]
    source: Annotated[str, describe("Where the claim is published.")] = ""
    metric: Annotated[ModelMetricName, describe("The column to compare.")]
    better: Annotated[
        str | ConfigOverrides, describe("Name of a row, or recipe keys and values that select a group of runs.")
    ]
    than: Annotated[
        list[str] | ConfigOverrides,
        describe(
            "Names of rows, or recipe keys and values that select another group; []: all other rows of the study."
        ),
    ] = []
    holds: Annotated[
        bool, describe("false: the publication claims that it is not better than the others by more than the margin.")
    ] = True
    margin: Annotated[float, Field(ge=0), describe("Minimum difference that is claimed.")] = 0.0

    @model_validator(mode="after")
    def _two_groups_of_one_kind(self) -> Claim:
        if isinstance(self.better, str) != isinstance(self.than, list):
            raise ValueError("better and than are both names of rows, or both recipe keys with values")
        return self


class StudyConfig(ConfigModel):
    """What varies between the runs of a study. Forms are combined as rows x zip x grid x seeds."""

    description: Annotated[str, describe("One-line description of the study.")] = ""
    source: Annotated[str, describe("The publication and table that it reproduces.")] = ""
    note: Annotated[str, describe("Notes for the reader, shown with the table.")] = ""
    not_comparable: Annotated[
        str,
        describe(
            "Why the published values cannot be compared with these runs, such as another network. Shown instead of "
            "the differences; claims remain undecided."
        ),
    ] = ""
    rows: Annotated[list[StudyRow], describe("Named rows, each with its overrides.")] = []
    grid: Annotated[
        ConfigOverrides,
        describe(
            "Recipe keys with lists of values, of which all combinations are run. { values = [...], when = {...} }: "
            "only for combinations with the values in when."
        ),
    ] = {}
    zip: Annotated[ConfigOverrides, describe("Recipe keys with lists of equal length, varied together.")] = {}
    seeds: Annotated[
        Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
        | None,
        describe("Values of recipe.seed: a list, or N for N consecutive seeds starting at the recipe's own."),
    ] = None
    space: Annotated[
        ConfigOverrides,
        describe(
            "Search space of random and bohb: recipe keys with { uniform = [a, b] }, { log_uniform = [a, b] }, "
            "{ integers = [a, b] } or { choice = [...] }, each with an optional when = {...}."
        ),
    ] = {}
    random: Annotated[RandomSearchConfig | None, describe("Random search over the space.")] = None
    bohb: Annotated[BohbSearchConfig | None, describe("BOHB over the space.")] = None
    published: Annotated[list[PublishedResults], describe("Published metrics of single runs of a grid.")] = []
    claims: Annotated[list[Claim], describe("Published claims to check against the runs.")] = []
    output: Annotated[ResultsTableConfig, describe("Format of the results table.")] = ResultsTableConfig()
    max_runs: Annotated[int, Field(ge=1), describe("A study with more runs than this starts only with --yes.")] = (
        MAX_RUNS
    )
    gpus_per_run: Annotated[int, Field(ge=1), describe("GPUs per run, if there are any.")] = 1
    runs_per_gpu: Annotated[int, Field(ge=1), describe("Number of runs that share one GPU, for small models.")] = 1
