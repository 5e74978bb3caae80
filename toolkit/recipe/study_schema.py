"""The [study] table: what varies over the runs of an experiment, and what was published about them.

A study file is a recipe with one more table; every run of it is that recipe with some keys changed. Keys are written as
in a recipe, nested or dotted:

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

from toolkit.recipe.base import ConfigModel, Fraction, ValidationMetric, describe

MAX_RUNS = 200
"""A study of more runs starts only when the user says yes to their number."""

MOST_TRIALS = 10_000
"""Configurations of a search, at most."""

METRICS = (
    "train_loss",
    "train_accuracy",
    "train_accuracy_all_images",
    "val_loss",
    "val_accuracy",
    "val_top5_accuracy",
    "val_balanced_accuracy",
    "test_loss",
    "test_accuracy",
    "test_top5_accuracy",
    "test_balanced_accuracy",
    "last_train_loss",
    "last_train_accuracy",
    "last_val_accuracy",
    "last_test_accuracy",
    "epochs",
    "parameters",
    "seconds",
    "images_per_second",
)
"""Columns of a study's table: figures of the best epoch (``stopped_``: of the last), and what the run cost."""

MetricName = Literal[
    "train_loss",
    "train_accuracy",
    "train_accuracy_all_images",
    "val_loss",
    "val_accuracy",
    "val_top5_accuracy",
    "val_balanced_accuracy",
    "test_loss",
    "test_accuracy",
    "test_top5_accuracy",
    "test_balanced_accuracy",
    "last_train_loss",
    "last_train_accuracy",
    "last_val_accuracy",
    "last_test_accuracy",
    "epochs",
    "parameters",
    "seconds",
    "images_per_second",
]

Outcome = Literal[
    "train_loss",
    "train_accuracy",
    "train_accuracy_all_images",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "last_train_loss",
    "last_train_accuracy",
    "last_val_accuracy",
    "last_test_accuracy",
]
"""Columns of which claims are made: less loss is better, more accuracy is."""

EpochMetricName = Literal["train/loss", "train/accuracy", "val/loss", "val/accuracy"]
ConfigOverrides = dict[str, Any]
"""Recipe keys, nested as in a recipe, with what the field's description says at their ends."""


class PublishedMean(ConfigModel):
    """A published mean over several runs."""

    mean: Annotated[float, describe("Mean over the runs; accuracies as fractions.")]
    std: Annotated[float, Field(ge=0), describe("Standard deviation of one run, n - 1 in the denominator.")]
    n: Annotated[int, Field(ge=2), describe("Number of runs.")]


PublishedMetrics = dict[MetricName, float | PublishedMean]
"""Published figures, of one run or as mean, standard deviation and number of runs."""

_FIGURES = "Published figures; accuracies as fractions. Of several runs: { mean = ..., std = ..., n = ... }."


class PublishedResults(ConfigModel):
    """What a publication reports about the runs with certain values."""

    where: Annotated[
        ConfigOverrides, describe("Recipe keys and the values that a run must have; {} is every run.")
    ] = {}
    figures: Annotated[PublishedMetrics, describe(_FIGURES)]
    source: Annotated[str, describe("Where it is published.")] = ""
    note: Annotated[str, describe("What a reader should know: contradictions, unclear settings.")] = ""


class StudyRow(ConfigModel):
    """A named row of the table: what is changed for it, and what was published."""

    name: Annotated[str, Field(min_length=1, max_length=120), describe("As it stands in the table.")]
    set: Annotated[ConfigOverrides, describe("Recipe keys and their values in this row.")] = {}
    published: Annotated[PublishedMetrics, describe(_FIGURES)] = {}
    published_epochs: Annotated[
        dict[EpochMetricName, list[float]], describe("Published figures epoch by epoch, the first epoch first.")
    ] = {}
    source: Annotated[str, describe("Where they are published, if elsewhere than the study says.")] = ""
    note: Annotated[str, describe("What a reader should know: contradictions, unclear settings.")] = ""


class RandomSearchConfig(ConfigModel):
    """Configurations drawn at random from [study.space] (Bergstra and Bengio 2012)."""

    runs: Annotated[int, Field(ge=1, le=MOST_TRIALS), describe("Configurations to draw.")]
    seed: Annotated[int, Field(ge=0, lt=2**32), describe("Seeds the drawing.")] = 0


class BohbSearchConfig(ConfigModel):
    """Model-based search with early stopping of poor configurations (Falkner et al. 2018, BOHB).

    Configurations are proposed by a tree-structured Parzen estimator and trained to ``min_epochs``; the best
    1/eta of them go on to eta times as many, and so on up to ``max_epochs`` (Li et al. 2018, Hyperband).
    """

    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS), describe("Configurations to try, at any budget.")]
    min_epochs: Annotated[int, Field(ge=1), describe("Smallest budget.", unit="epochs")] = 3
    max_epochs: Annotated[int, Field(ge=1), describe("Largest budget; train.epochs of every run.", unit="epochs")] = 30
    eta: Annotated[int, Field(ge=2), describe("1/eta of the configurations go on to the next budget.")] = 3
    brackets: Annotated[
        int | Literal["auto"],
        describe("Hyperband's brackets; auto: as many as have more than ten trials each, one at least."),
    ] = "auto"
    startup_trials: Annotated[
        int, Field(ge=1), describe("Configurations drawn at random before the model proposes any.")
    ] = 10
    metric: Annotated[ValidationMetric, describe("Sought: the least loss, the greatest accuracy.")] = "val/accuracy"
    seed: Annotated[int, Field(ge=0, lt=2**32), describe("Seeds the search.")] = 0

    @model_validator(mode="after")
    def _budgets_in_order(self) -> BohbSearchConfig:
        if self.min_epochs > self.max_epochs:
            raise ValueError(f"min_epochs = {self.min_epochs} is more than max_epochs = {self.max_epochs}")
        return self


class ResultsTableConfig(ConfigModel):
    """The shape of the table."""

    columns: Annotated[list[MetricName], Field(min_length=1), describe("Its columns, after the row's name.")] = [
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "test_accuracy",
        "epochs",
        "seconds",
        "images_per_second",
    ]
    best_by: Annotated[ValidationMetric, describe("The validation figure that marks the best row.")] = "val/accuracy"
    per_epoch: Annotated[
        EpochMetricName | None,
        describe("Also a table of this figure, a line an epoch, a column a row; x after the stop."),
    ] = None
    confidence: Annotated[Fraction, describe("Of the intervals over seeds (Student's t).")] = 0.95


class Claim(ConfigModel):
    """A statement of a publication about two groups of runs, which the study's runs confirm or refute."""

    statement: Annotated[str, Field(min_length=1), describe("What the publication says.")]
    source: Annotated[str, describe("Where it says so.")] = ""
    metric: Annotated[Outcome, describe("The column that is compared.")]
    better: Annotated[
        str | ConfigOverrides, describe("Name of a row, or recipe keys with the values of a group of runs.")
    ]
    than: Annotated[
        list[str] | ConfigOverrides,
        describe("Names of rows, or keys with the values of another group; [] is every other row of the study."),
    ] = []
    holds: Annotated[
        bool, describe("false: the publication says that it is not better, by more than the margin, than the others.")
    ] = True
    margin: Annotated[float, Field(ge=0), describe("How much better it is claimed to be, at least.")] = 0.0

    @model_validator(mode="after")
    def _two_groups_of_one_kind(self) -> Claim:
        if isinstance(self.better, str) != isinstance(self.than, list):
            raise ValueError("better and than are both names of rows, or both recipe keys with values")
        return self


class StudyConfig(ConfigModel):
    """What varies over the runs of a study. Forms combine: rows x zip x grid x seeds."""

    description: Annotated[str, describe("What the study shows, in a line.")] = ""
    source: Annotated[str, describe("The publication and table that it repeats.")] = ""
    note: Annotated[str, describe("What a reader should know beside the table.")] = ""
    not_comparable: Annotated[
        str,
        describe(
            "Why the published values cannot be compared with these runs, e.g. another network. Replaces every "
            "difference; claims stay undecided."
        ),
    ] = ""
    rows: Annotated[list[StudyRow], describe("Named rows, each with its changes.")] = []
    grid: Annotated[
        ConfigOverrides,
        describe("Recipe keys with lists of values, all combined. { values = [...], when = {...} }: for some only."),
    ] = {}
    zip: Annotated[ConfigOverrides, describe("Recipe keys with lists of one length, taken in step.")] = {}
    seeds: Annotated[
        Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
        | None,
        describe("Values of recipe.seed: a list, or so many from the recipe's own on."),
    ] = None
    space: Annotated[
        ConfigOverrides,
        describe(
            "For random and bohb, recipe keys with { uniform = [a, b] }, { log_uniform = [a, b] }, "
            "{ integers = [a, b] } or { choice = [...] }, each with an optional when = {...}."
        ),
    ] = {}
    random: Annotated[RandomSearchConfig | None, describe("Random search over the space.")] = None
    bohb: Annotated[BohbSearchConfig | None, describe("BOHB over the space.")] = None
    published: Annotated[list[PublishedResults], describe("Published figures of single runs of a grid.")] = []
    claims: Annotated[list[Claim], describe("Statements of the publication that the runs are to confirm.")] = []
    output: Annotated[ResultsTableConfig, describe("The shape of the table.")] = ResultsTableConfig()
    max_runs: Annotated[int, Field(ge=1), describe("More runs than this start only with --yes.")] = MAX_RUNS
    gpus_per_run: Annotated[int, Field(ge=1), describe("GPUs that one run trains on, where there are any.")] = 1
    runs_per_gpu: Annotated[int, Field(ge=1), describe("Small runs that share one GPU.")] = 1
