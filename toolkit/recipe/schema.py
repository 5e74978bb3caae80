"""The recipe: one class per TOML table, one field per key.

The schema is the single definition of every key: its name, type, unit, default, range and meaning. The loader, the
validator, the JSON Schema, ``docs/recipes.md`` and the resolved recipe of every run are all derived from it. Nothing in
it imports torch, so a recipe is checked in a fraction of a second. Tables of one topic are in a module of their own;
their classes are imported from here.

Units: epochs for durations, images for batch sizes, pixels for lengths, fractions (0..1) for probabilities
and accuracies.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolkit.recipe.base import (
    REGISTRY,
    SECONDS,
    SLURM_FEATURES,
    SLURM_MEMORY,
    SLURM_OPTION,
    SLURM_TIME,
    SLURM_WORD,
    ConfigModel,
    Fraction,
    Name,
    Seed,
)
from toolkit.recipe.data_schema import (
    MAX_CHANNELS,
    NORMALIZATIONS,
    AugmentConfig,
    DataConfig,
    NormalizeValues,
    SplitConfig,
    TransformConfig,
)
from toolkit.recipe.distillation_schema import DistillationConfig
from toolkit.recipe.model_schema import ConvBlock, ConvNetConfig, HeadConfig, ModelConfig, TransferConfig
from toolkit.recipe.optimizer_schema import OptimizerConfig, SchedulerConfig
from toolkit.recipe.study_schema import StudyConfig
from toolkit.recipe.training_schema import CheckpointConfig, EarlyStoppingConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "ConvBlock",
    "ConvNetConfig",
    "DataConfig",
    "DistillationConfig",
    "EarlyStoppingConfig",
    "Expectation",
    "ExperimentConfig",
    "HeadConfig",
    "ModelConfig",
    "NormalizeValues",
    "OptimizerConfig",
    "Recipe",
    "SchedulerConfig",
    "SlurmConfig",
    "SplitConfig",
    "StudyConfig",
    "TrackingConfig",
    "TrainConfig",
    "TransferConfig",
    "TransformConfig",
    "MAX_CHANNELS",
    "NORMALIZATIONS",
]


class ExperimentConfig(ConfigModel):
    """Experiment name, seed and output directory."""

    name: Name = Field(description="Name of the experiment; its runs are stored in <run_root>/<name>/.")
    description: str = Field("", description="One-line description, shown in tables and reports.")
    seed: Seed = Field(
        0, description="Seed of initialization, sample order and augmentation. The split has its own seed."
    )
    run_root: str = Field("runs", min_length=1, description="Folder in which run directories are created.")


class TaskConfig(ConfigModel):
    """The kind of classification."""

    kind: Literal["single_label", "multi_label"] = Field(
        "single_label",
        description="single_label: each image has exactly one class. multi_label: an image may have any number of "
        "labels, which are predicted independently.",
    )
    threshold: Literal["validation"] | Fraction = Field(
        "validation",
        description="multi_label: a label is predicted if its probability is at least this value. validation: use, for "
        "each label, the threshold with the highest F1 on the validation images.",
    )


class TrackingConfig(ConfigModel):
    """Experiment trackers (W&B, TensorBoard, MLflow). The logs in the run directory are always written."""

    trackers: list[Literal["wandb", "tensorboard", "mlflow"]] = Field(
        ["wandb"], description="Trackers to log to; []: none."
    )
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="W&B mode. auto: online if logged in and the server is reachable, else offline; the environment "
        "variable WANDB_MODE takes precedence over auto.",
    )
    project: Name = Field("toolkit", description="W&B project or MLflow experiment.")
    entity: str | None = Field(None, description="W&B user or team; default: your own.")
    group: str | None = Field(None, description="W&B group, and MLflow tag `group`; default: the recipe's name.")
    run_name: str | None = Field(
        None,
        description="Run name in W&B and MLflow; default: recipe name and run id; in W&B, for a run of a study, "
        "its row, seed and fold.",
    )
    upload: list[Literal["results", "model", "images"]] | None = Field(
        None,
        description="What the trackers get besides metrics. results: console output during training; at the end "
        "tables, charts, images, report and lists of the data set's images, on W&B 1 to 10 MB. model (W&B only): the "
        "weights of the best and the last epoch, as a model artifact. images (W&B only): the data set's images, at "
        'most 20,000 and 2 GB. Default: ["results", "model"], or ["results"] for runs of a study.',
    )
    registry: Annotated[str, Field(pattern=REGISTRY)] | None = Field(
        None,
        description="W&B registry to which the model is linked, under the recipe's name or as registry/collection; "
        "implies upload of the model.",
    )
    tags: list[str] = Field([], description="W&B tags; in MLflow, one tag that contains all, separated by commas.")
    notes: str = Field("", description="W&B notes or MLflow description; default: the recipe's description.")


class Expectation(ConfigModel):
    """An expected metric value for this recipe, and its source."""

    at_least: float | None = Field(None, description="Met if the metric is at least this.")
    at_most: float | None = Field(None, description="Met if the metric is at most this.")
    value: float | None = Field(None, description="Met if the metric is within tolerance of this.")
    tolerance: float = Field(0.0, ge=0, description="Maximum absolute difference from value.")
    seeds: list[int] = Field(
        [], description="Seeds for which the value was reported; other seeds are not compared. Empty: any seed."
    )
    source: str = Field(min_length=1, description="Source of the expected value.")

    @model_validator(mode="after")
    def _one_bound(self) -> Expectation:
        if (self.at_least, self.at_most, self.value) == (None, None, None):
            raise ValueError("set at_least, at_most, or value with tolerance")
        return self


class SlurmConfig(ConfigModel):
    """What `toolkit submit` requests from SLURM. Command-line options override this table; it overrides the profile."""

    profile: Name | None = Field(None, description="Name of a cluster profile, slurm/profiles/<name>.toml.")
    partition: str | None = Field(
        None, pattern=SLURM_WORD, description="Partition (queue), or several, comma-separated."
    )
    account: str | None = Field(None, pattern=SLURM_WORD, description="Account to charge.")
    qos: str | None = Field(None, pattern=SLURM_WORD, description="Quality of service.")
    constraint: str | None = Field(
        None, pattern=SLURM_FEATURES, description="Required node features, such as a100|h100."
    )
    nodes: int | None = Field(None, ge=1, le=10_000, description="Number of nodes. Default: 1.")
    gpus_per_node: int | None = Field(
        None, ge=0, le=64, description="GPUs per node, one training process each. Default: 0."
    )
    gpu_type: str | None = Field(None, pattern=SLURM_WORD, description="GPU type, as named by the cluster.")
    processes_per_node: int | None = Field(
        None, ge=1, le=256, description="Without GPUs: training processes per node. Default: 1."
    )
    cpus_per_task: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="CPUs per node (one task per node), shared by its processes. Default: the cluster's.",
    )
    memory: str | None = Field(
        None, pattern=SLURM_MEMORY, description="Memory per node, such as 64G; plain numbers are megabytes."
    )
    time: str | None = Field(
        None,
        pattern=SLURM_TIME,
        description="Time limit of each start of the job: 90 (minutes), 4:00:00 or 2-12:00:00 (days-hours).",
    )
    max_restarts: int | None = Field(
        None, ge=0, le=10_000, description="Maximum number of times the job is requeued. Default: 50."
    )
    signal: Literal["USR1", "USR2", "HUP", "TERM"] | None = Field(
        None, description="Signal SLURM sends before the time limit and on preemption. Default: USR1."
    )
    signal_before_s: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="How long before the time limit the signal is sent. Default: 120.",
        json_schema_extra=SECONDS,
    )
    options: list[Annotated[str, Field(pattern=SLURM_OPTION)]] | None = Field(
        None, description='Additional sbatch options, such as ["--exclusive", "--reservation=course"].'
    )


MULTI_LABEL_TRAIN = {"loss": "bce", "best_metric": "val/map"}
MULTI_LABEL_OUTPUT = {
    "columns": ["train_loss", "val_loss", "val_map", "test_map", "test_micro_f1", "test_macro_f1", "epochs", "seconds"],
    "best_by": "val/map",
}
"""Defaults of [train] and [study.output] with task.kind = "multi_label"."""


class Recipe(ConfigModel):
    """A complete recipe."""

    @property
    def scheduled_epochs(self) -> float:
        """Number of epochs that [scheduler] covers: those of the run without those of lp_ft's probe.

        Infinite with train.steps, because the number of epochs then depends on the number of images.
        """
        if self.train.epochs is None:
            return math.inf
        left = self.train.epochs - self.transfer.epochs_of_probe
        return left if left > 0 else 1  # an error of its own

    @model_validator(mode="before")
    @classmethod
    def _pretrained_weights_are_finetuned(cls, content: Any) -> Any:
        """Default transfer.mode to finetune if model.weights is set."""
        model, transfer = (
            (content.get(key, {}) for key in ("model", "transfer")) if isinstance(content, dict) else ({}, {})
        )
        if not (isinstance(model, dict) and isinstance(transfer, dict)):
            return content
        if model.get("weights", "none") == "none" or "mode" in transfer:
            return content
        return {**content, "transfer": {**transfer, "mode": "finetune"}}

    @model_validator(mode="before")
    @classmethod
    def _multi_label_defaults(cls, content: Any) -> Any:
        """Set the defaults of the loss and of the selection metrics for task.kind = "multi_label"."""
        task = content.get("task") if isinstance(content, dict) else None
        if not (isinstance(task, dict) and task.get("kind") == "multi_label"):
            return content
        found, study = dict(content), content.get("study")
        if isinstance(content.get("train"), dict):
            found["train"] = MULTI_LABEL_TRAIN | content["train"]
        if isinstance(study, dict):
            found["study"] = study = {"output": {}, **study}
            if isinstance(study["output"], dict):
                study["output"] = MULTI_LABEL_OUTPUT | study["output"]
            if isinstance(study.get("bohb"), dict):
                study["bohb"] = {"metric": MULTI_LABEL_OUTPUT["best_by"], **study["bohb"]}
        return found

    recipe: ExperimentConfig
    task: TaskConfig = TaskConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig
    transfer: TransferConfig = TransferConfig()
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    train: TrainConfig
    distillation: DistillationConfig | None = Field(None, description="Knowledge distillation from a teacher.")
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    slurm: SlurmConfig | None = Field(None, description="Resources of a SLURM job.")
    study: StudyConfig | None = Field(None, description="What varies between runs, if the file is a study.")
    expected_metrics: dict[str, Expectation] = Field(
        {}, description="Expected metrics of the best model in summary.json (test_accuracy, val_loss, ...)."
    )
    assumptions: dict[str, Annotated[str, Field(pattern=r"^(report|homework|ours)(: .+)?$")]] = Field(
        {},
        exclude=True,
        description='Sources of a replication\'s values, by dotted key or table ("model.convnet" = "report"): report, '
        "homework (its sheet, template or public notebook) or ours, with an optional note after a colon.",
    )
