"""The tables [optimizer] and [scheduler]."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolkit.recipe.base import (
    EPOCHS,
    STEPS,
    ConfigModel,
    EpochMetric,
    Fraction,
    FractionBelowOne,
    PluginName,
)


class ParameterGroup(ConfigModel):
    """A parameter group: parameters with a separate learning rate or weight decay."""

    pattern: str = Field(
        min_length=1,
        description="Pattern of the parameters' names, such as *.bias; the first group that matches is used.",
    )
    lr_scale: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Learning rate as a multiple of optimizer.lr, in addition to transfer.head_lr, backbone_lr and "
        "layer_decay.",
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="Weight decay. Default: that of other parameters (optimizer.weight_decay, decay_bias_and_norm).",
    )


class OptimizerConfig(ConfigModel):
    """The optimizer and its hyperparameters."""

    name: str = Field(
        "sgd",
        description="sgd, nag, adam, adamw (PyTorch), or any timm optimizer; `toolkit optimizers` lists them. "
        "plugin:NAME: your own code (docs/plugins.md).",
    )
    lr: float = Field(gt=0, le=1e30, description="Peak learning rate (after warm-up).")
    momentum: FractionBelowOne | None = Field(
        None, description="Momentum of sgd, nag and other optimizers that have it. Default: 0.9 for sgd and nag."
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="L2 penalty (sgd, nag, adam) or decoupled weight decay (adamw and most others)."
    )
    decay_bias_and_norm: bool = Field(
        True, description="Whether weight decay also applies to biases and normalization layers."
    )
    groups: list[ParameterGroup] = Field(
        [],
        description="Parameter groups with a separate learning rate or weight decay, by patterns of parameter names.",
    )
    args: dict[str, Any] = Field(
        {}, description="Additional arguments of the optimizer, such as betas = [0.9, 0.99] or eps."
    )
    sam: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Sharpness-aware minimization (SAM; Foret et al. 2021, arXiv:2010.01412): radius rho of the "
        "neighborhood whose worst loss is minimized, for example 0.05. Each step takes two forward and backward "
        "passes.",
    )
    sam_adaptive: bool = Field(
        False,
        description="Adaptive SAM (ASAM; Kwon et al. 2021, arXiv:2102.11600): the radius of each weight is "
        "proportional to its absolute value plus 0.01; typical values of sam are 0.5 to 2.",
    )
    lookahead: int | None = Field(
        None,
        ge=1,
        description="Lookahead (Zhang et al. 2019, arXiv:1907.08610): after each such number of steps the slow "
        "weights move toward the weights by lookahead_alpha, and training continues from them. The slow weights are "
        "evaluated and saved. The paper uses 5 or 10, timm 6.",
        json_schema_extra=STEPS,
    )
    lookahead_alpha: float = Field(0.5, gt=0, le=1, description="Step size of Lookahead's slow weights.")
    schedule_free: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Schedule-Free learning (Defazio et al. 2024, arXiv:2405.15682): gradients are computed between "
        "the weights of the optimizer and their average, at this share of the average, e.g. 0.9. The average is "
        "evaluated and saved. It replaces momentum and the decay of the learning rate.",
    )


class SchedulerConfig(ConfigModel):
    """Learning-rate schedule, a function of epochs."""

    name: (
        Literal[
            "constant",
            "step",
            "multi_step",
            "exponential",
            "linear",
            "polynomial",
            "cosine",
            "cosine_restarts",
            "flat_cosine",
            "wsd",
            "one_cycle",
            "plateau",
        ]
        | PluginName
    ) = Field(
        "constant",
        description="constant: lr in every epoch. step: multiply by gamma every step_size epochs. multi_step: multiply "
        "by gamma at each of the milestones. exponential: multiply by gamma every epoch. linear: fall linearly from lr "
        "to end_factor x lr. polynomial, cosine: fall from lr to min_lr, as (remaining fraction of the epochs) ** "
        "power or along half a cosine. cosine_restarts: cosine cycles of T_0, T_0 x T_mult, ... epochs. "
        "flat_cosine: lr, then a cosine to min_lr in the last decay_fraction of the epochs (fastai's fit_flat_cos). "
        "wsd: warm-up, lr, then a fall of decay_type to min_lr in the last decay_fraction of the epochs (Hu et al. "
        "2024). one_cycle: rise from start_factor x lr to lr, then fall to end_factor x lr. plateau: multiply by gamma "
        "when the metric stops improving. plugin:NAME: your own code (docs/plugins.md).",
    )
    args: dict[str, Any] = Field({}, description="plugin: arguments of the schedule.")
    step_size: int | None = Field(
        None, ge=1, description="step: epochs between two reductions.", json_schema_extra=EPOCHS
    )
    milestones: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="multi_step: epochs at which lr is multiplied by gamma.", json_schema_extra=EPOCHS
    )
    gamma: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Decay factor of step (default 0.1), multi_step (0.1), exponential (0.95) and plateau (0.1).",
    )
    min_lr: float = Field(
        0.0,
        ge=0,
        description="polynomial, cosine, cosine_restarts, flat_cosine, wsd, plateau: lower bound on the learning rate.",
    )
    power: float = Field(1.0, gt=0, le=100, description="polynomial: exponent; 1 is a linear decay.")
    T_0: float | None = Field(
        None,
        ge=0.01,
        description="cosine_restarts: length of the first cycle, which begins after the warm-up.",
        json_schema_extra=EPOCHS,
    )
    T_mult: int = Field(
        1, ge=1, le=100, description="cosine_restarts: length of each cycle as a multiple of the one before it."
    )
    cycle_decay: float = Field(
        1.0, gt=0, le=1, description="cosine_restarts: height of each cycle as a multiple of the one before it."
    )
    decay_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="flat_cosine (default 0.25), wsd (0.2): fraction of the epochs, at the end of the run, in which lr "
        "falls.",
    )
    decay_type: Literal["1-sqrt", "linear"] = Field(
        "1-sqrt",
        description="wsd: 1-sqrt: fall as 1 - sqrt(fraction of the decay that has passed), which Haegele et al. 2024 "
        "(arXiv:2405.18392) found to be better than a linear decay. linear: fall linearly.",
    )
    warmup_epochs: float = Field(
        0.0,
        ge=0,
        description="Length of the linear warm-up from warmup_start_factor x lr to lr.",
        json_schema_extra=EPOCHS,
    )
    warmup_steps: int | None = Field(
        None,
        ge=1,
        description="Length of the warm-up in optimizer steps, in place of warmup_epochs.",
        json_schema_extra=STEPS,
    )
    warmup_start_factor: Fraction = Field(0.01, description="Initial warm-up learning rate, as a fraction of lr.")
    metric: EpochMetric = Field("val/loss", description="plateau: metric to monitor.")
    patience: int = Field(
        5,
        ge=0,
        description="plateau: epochs without improvement tolerated before lr is reduced.",
        json_schema_extra=EPOCHS,
    )
    threshold: float = Field(1e-4, ge=0, description="plateau: smaller changes do not count as improvement.")
    threshold_mode: Literal["rel", "abs"] = Field(
        "rel",
        description="plateau: threshold is relative to the best value so far (rel) or in units of the metric (abs).",
    )
    pct_start: float = Field(
        0.3, gt=0, lt=1, description="one_cycle: fraction of the epochs after which lr is reached (Smith 2018)."
    )
    start_factor: float = Field(0.04, gt=0, le=1, description="one_cycle: first learning rate, as a fraction of lr.")
    end_factor: float = Field(
        4e-6, ge=0, le=1, description="linear, one_cycle: last learning rate, as a fraction of lr."
    )

    @model_validator(mode="after")
    def _has_its_lengths(self) -> SchedulerConfig:
        if self.name == "step" and self.step_size is None:
            raise ValueError("name = 'step' needs step_size (epochs)")
        if self.name == "multi_step" and not self.milestones:
            raise ValueError("name = 'multi_step' needs milestones (epochs), for example milestones = [30, 60, 80]")
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise ValueError("milestones must be increasing")
        if self.warmup_steps is not None and self.warmup_epochs:
            raise ValueError("warmup_steps and warmup_epochs exclude each other: set one of them")
        if self.name == "cosine_restarts" and self.T_0 is None:
            raise ValueError("name = 'cosine_restarts' needs T_0, the number of epochs of the first cycle")
        return self


SCHEDULE_KEYS = {
    "step_size": ("step",),
    "milestones": ("multi_step",),
    "gamma": ("step", "multi_step", "exponential", "plateau"),
    "min_lr": ("polynomial", "cosine", "cosine_restarts", "flat_cosine", "wsd", "plateau"),
    "power": ("polynomial",),
    "T_0": ("cosine_restarts",),
    "T_mult": ("cosine_restarts",),
    "cycle_decay": ("cosine_restarts",),
    "decay_fraction": ("flat_cosine", "wsd"),
    "decay_type": ("wsd",),
    "metric": ("plateau",),
    "patience": ("plateau",),
    "threshold": ("plateau",),
    "threshold_mode": ("plateau",),
    "pct_start": ("one_cycle",),
    "start_factor": ("one_cycle",),
    "end_factor": ("linear", "one_cycle"),
}
"""The schedules that use each key; keys not listed apply to all schedules."""
