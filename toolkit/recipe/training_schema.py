"""The tables [train], [early_stopping] and [checkpoint]."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from toolkit.formatting import plural
from toolkit.recipe.base import (
    EPOCHS,
    IMAGES,
    MINUTES,
    STEPS,
    ConfigModel,
    EpochMetric,
    Fraction,
    FractionBelowOne,
    PluginName,
    Selection,
    Weight,
)


class LossConfig(ConfigModel):
    """Arguments of the training loss; a plugin may have any others."""

    model_config = ConfigDict(extra="allow")

    gamma: float = Field(2.0, ge=0, le=20, description="focal: exponent; larger values give easy examples less weight.")
    alpha: Fraction = Field(
        0.25, description="focal: weight of the classes that are present; the others have weight 1 - alpha."
    )
    gamma_positive: float = Field(0.0, ge=0, le=20, description="asymmetric: exponent for classes that are present.")
    gamma_negative: float = Field(4.0, ge=0, le=20, description="asymmetric: exponent for classes that are absent.")
    clip: FractionBelowOne = Field(
        0.05, description="asymmetric: amount by which probabilities of absent classes are reduced, but not below 0."
    )
    target_threshold: FractionBelowOne | None = Field(
        None,
        description="bce: targets above this become 1, all others 0, after mixing and smoothing, so that each class in "
        "a mixed image counts as present (Wightman et al. 2021, arXiv:2110.00476; timm's bce_target_thresh). Default: "
        "targets remain probabilities.",
    )

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that the recipe sets; these are passed to a plugin."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


LOSS_KEYS = {
    "gamma": "focal",
    "alpha": "focal",
    "gamma_positive": "asymmetric",
    "gamma_negative": "asymmetric",
    "clip": "asymmetric",
    "target_threshold": "bce",
}
"""Loss that uses each key of [train.loss_args]."""


class TrainConfig(ConfigModel):
    """Training loop: length, batch size, precision, model selection."""

    epochs: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="Maximum number of training epochs. With a fraction, such as 9.9, the last epoch ends early.",
        json_schema_extra=EPOCHS,
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000,
        description="Maximum number of optimizer steps, in place of epochs. The last epoch may end early.",
        json_schema_extra=STEPS,
    )
    batch_size: int = Field(
        ge=1,
        description="Images per optimizer step, over all processes and accumulation steps.",
        json_schema_extra=IMAGES,
    )
    eval_batch_size: int | None = Field(
        None,
        ge=1,
        description="Images per evaluation step, over all processes. Default: 2 x batch_size / grad_accum_steps; "
        "split into micro-batches on a GPU that does not have enough memory.",
        json_schema_extra=IMAGES,
    )
    grad_accum_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Gradient accumulation: number of micro-batches per batch, to save memory. auto: the smallest "
        "number with which a training step fits in the device's memory, tried before training; 1 on a CPU. batch_size "
        "stays as it is, so results differ only by rounding, unless batch norm computes statistics of micro-batches.",
    )
    virtual_processes: int | None = Field(
        None,
        ge=2,
        description="Give bit-identical results on any number of processes up to this one: each step's batch is "
        "divided among this number of virtual processes, and each process computes several of them, one "
        "after the other. The run may be resumed on another number of processes. Batch norm uses the images of one "
        "virtual process. On CPUs, every process uses one thread. Default: off.",
    )
    drop_last: bool = Field(False, description="Drop the last, incomplete batch of each epoch.")
    precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto",
        description="Mixed precision. auto: bf16 on GPUs that support it, else (and on CPUs) no; the log states why.",
    )
    best_metric: Selection = Field(
        "val/accuracy",
        description="Metric that selects the best epoch, whose weights are kept (ties are broken by val/loss, ties in "
        "loss by val/accuracy, then the earlier epoch wins); or last: keep the last epoch's weights. Default with "
        "task.kind = multi_label: val/map.",
    )
    max_grad_norm: float | None = Field(
        None, gt=0, description="Clip the gradients to this total L2 norm. Default: no clipping."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per update of an exponential moving average of the weights, which is then evaluated and "
        "saved in their place.",
    )
    ema_steps: int = Field(
        1,
        ge=1,
        le=1_000_000_000,
        description="ema: optimizer steps from one update to the next; the first update is after step 1 of the run. "
        "torchvision's --model-ema-steps, but without its adjustment of the decay (docs/transfer.md has the formula).",
        json_schema_extra=STEPS,
    )
    ema_warmup: bool = Field(
        True,
        description="ema: warm the decay up from 0, so that at update n it is at most 1 - n ** (-2/3), as in timm's "
        "ModelEmaV3 with use_warmup. false: the decay is constant from the second update on.",
    )
    swa_start: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Stochastic weight averaging (SWA, Izmailov et al. 2018, arXiv:1803.05407): number of the first "
        "epoch, from 1, at whose end the weights enter an equal average, which is then evaluated and saved in their "
        "place, with batch norm statistics recomputed on the training images. Default: no SWA.",
        json_schema_extra=EPOCHS,
    )
    swa_lr: float | None = Field(
        None,
        gt=0,
        le=1e30,
        description="SWA: constant learning rate from the start of epoch swa_start on. Default: that of [scheduler].",
    )
    loss: Literal["cross_entropy", "bce", "focal", "asymmetric"] | PluginName = Field(
        "cross_entropy",
        description="Training loss. Default: cross_entropy, or bce with task.kind = multi_label. bce: binary "
        "cross-entropy of each class, averaged over the classes (Wightman et al. 2021, arXiv:2110.00476). focal (Lin "
        "et al. 2017, arXiv:1708.02002) and asymmetric (Ridnik et al. 2021, arXiv:2009.14119): bce with less weight on "
        "easy examples. plugin:NAME: your own code (docs/plugins.md). Validation and test loss are always the "
        "cross-entropy (multi_label: binary cross-entropy).",
    )
    loss_args: LossConfig = Field(LossConfig(), description="Arguments of the loss.")
    metrics: list[PluginName] = Field(
        [],
        description="Plugin metrics that are also computed, for the validation images after each epoch and for the "
        "test images: val/NAME in metrics.jsonl and test_NAME in summary.json. Keys that take a "
        "metric also take these.",
    )
    class_weights: Literal["none", "balanced"] | list[Weight] | dict[str, Weight] = Field(
        "none",
        description="balanced: weight the training loss by inverse class frequency (multi_label: for each label, so "
        "that images with it and images without it have the same total weight). Or the weight of each class, as a list "
        "in class order, or by name, where unnamed classes have weight 1. For mixed or smoothed targets each class "
        "probability is weighted separately, as in torch's cross_entropy.",
    )
    sampling: Literal["shuffle", "balanced"] = Field(
        "shuffle",
        description="shuffle: every image once per epoch. balanced: classes sampled uniformly, with replacement.",
    )
    sync_batch_norm: bool = Field(
        True,
        description="Synchronize batch norm statistics over all processes. false: each process normalizes by its own "
        "images, so the result depends on the number of processes. Not used with virtual_processes.",
    )
    channels_last: bool = Field(
        True, description="Channels-last memory format for images and convolutions; faster on most hardware."
    )
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    cuda_graphs: bool = Field(
        False,
        description='Compile the model and replay its kernels as CUDA graphs (mode "reduce-overhead"), for small '
        "models that are limited by kernel-launch overhead. GPUs only.",
    )
    deterministic: bool = Field(False, description="Use only deterministic algorithms, also on GPUs (slower).")
    log_every: int = Field(
        0, ge=0, description="Also log loss and accuracy every N steps; 0 disables.", json_schema_extra=STEPS
    )

    @field_validator("epochs")
    @classmethod
    def _whole_epochs_are_an_integer(cls, value: float | None) -> float | None:
        return int(value) if value is not None and value == int(value) else value

    @model_validator(mode="after")
    def _length_is_given_once(self) -> TrainConfig:
        if self.epochs is None and self.steps is None:
            raise ValueError("epochs or steps must be given, for example epochs = 30")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("steps and epochs exclude each other: set one of them")
        return self

    @field_validator("loss_args", mode="wrap")
    @classmethod
    def _plugin_has_its_own_arguments(
        cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> LossConfig:
        """Accept any arguments of a plugin, also if those of built-in losses with the same names have other types."""
        if isinstance(value, dict) and info.data.get("loss", "").startswith("plugin:"):
            return LossConfig.model_construct(**value)
        found: LossConfig = validate(value)
        return found

    @model_serializer(mode="wrap")
    def _plugin_has_given_arguments_only(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the defaults of built-in losses out of a plugin's arguments."""
        if not self.loss.startswith("plugin:"):
            return dict(dump(self))
        content: dict[str, Any] = dump(self.model_copy(update={"loss_args": LossConfig()}))
        return content | ({"loss_args": self.loss_args.given} if "loss_args" in content else {})

    @property
    def length_text(self) -> str:
        """The length of a run as the recipe gives it: "30 epochs" or "20,000 steps"."""
        if self.epochs is None:
            return plural(self.steps or 0, "step")
        return f"{self.epochs:,g} epoch{'' if self.epochs == 1 else 's'}"

    @property
    def own_metrics(self) -> list[str]:
        """Names of the plugins in ``metrics``."""
        return [name.removeprefix("plugin:") for name in self.metrics]

    @property
    def min_accum_steps(self) -> int:
        """``grad_accum_steps``, or 1 if it is "auto", until a larger number turns out to be necessary."""
        return 1 if self.grad_accum_steps == "auto" else self.grad_accum_steps

    def images_per_evaluation(self, accum_steps: int) -> int:
        """Return ``eval_batch_size`` or its default, twice the micro-batch, as evaluation stores no gradients."""
        return self.eval_batch_size or max(1, 2 * self.batch_size // accum_steps)


class EarlyStoppingConfig(ConfigModel):
    """Early stopping when a metric stops improving."""

    patience: int | None = Field(
        None,
        ge=1,
        description="Number of epochs without improvement after which training stops. Default: never.",
        json_schema_extra=EPOCHS,
    )
    metric: EpochMetric = Field("val/loss", description="Metric to monitor.")
    min_delta: float = Field(0.0, ge=0, description="Smaller absolute changes do not count as improvement.")


class CheckpointConfig(ConfigModel):
    """Checkpoints for resuming: how often they are saved and how many are kept."""

    every_steps: int = Field(
        0, ge=0, description="Also save mid-epoch, every N steps; 0 disables.", json_schema_extra=STEPS
    )
    every_minutes: float = Field(
        15.0, ge=0, description="Also save mid-epoch, every N minutes; 0 disables.", json_schema_extra=MINUTES
    )
    keep: int = Field(
        2,
        ge=1,
        description="Number of most recent checkpoints to keep. At least 2 are kept mid-epoch, as the newest is "
        "verified only by the step after it.",
    )
    on_write_error: Literal["continue", "stop"] = Field(
        "continue",
        description="If a checkpoint cannot be written (disk full): continue with the previous one, or stop.",
    )
