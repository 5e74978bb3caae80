"""The recipe language: one class per TOML table, one field per key.

This module is the single definition of every key: its name, type, unit, default, range and meaning. The
loader, the validator, the JSON Schema, ``docs/recipes.md`` and the resolved recipe of every run are all
derived from it. Nothing here imports torch, so a recipe is checked in a fraction of a second.

Units: epochs for durations, images for batch sizes, pixels for lengths, fractions (0..1) for probabilities
and accuracies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from toolkit.data.dataset_info import DATASETS
from toolkit.recipe.base import (
    EPOCHS,
    IMAGES,
    MINUTES,
    PIXELS,
    SECONDS,
    SLURM_FEATURES,
    SLURM_MEMORY,
    SLURM_OPTION,
    SLURM_TIME,
    SLURM_WORD,
    STEPS,
    Activation,
    ConfigModel,
    EpochMetric,
    Fraction,
    FractionBelowOne,
    Name,
    Seed,
    Selection,
)
from toolkit.recipe.study_schema import StudyConfig

if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]

MOST_CHANNELS = 65_536
"""Maximum number of channels of a convolution and maximum width of a hidden layer."""

ImageSize = Annotated[int, Field(ge=4, le=4096)]
"""Height or width of images, in pixels."""


class ExperimentConfig(ConfigModel):
    """Experiment name, seed and output directory."""

    name: Name = Field(description="Name of the experiment; its runs are stored in <run_root>/<name>/.")
    description: str = Field("", description="One-line description, shown in tables and reports.")
    seed: Seed = Field(
        0, description="Seed of initialization, sample order and augmentation. The split has its own seed."
    )
    run_root: str = Field("runs", min_length=1, description="Folder in which run directories are created.")


class SplitConfig(ConfigModel):
    """How images are split into training, validation and test sets. Depends on the recipe alone."""

    method: Literal["auto", "official", "stratified", "random", "alternate"] = Field(
        "auto",
        description="How the validation images are chosen. official: the data set's own validation list. stratified: "
        "the same fraction of every class. random: uniformly at random. alternate: odd list positions are used for "
        "validation, even ones for training. auto: official if the data set has one, else stratified.",
    )
    validation: FractionBelowOne | Annotated[int, Field(ge=0)] = Field(
        0.1,
        description="Fraction (0..1) or number of training images held out for validation. 0: no validation split, "
        'regardless of the method; requires train.best_metric = "last".',
    )
    test: FractionBelowOne | Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Fraction (0..1) or number of images held out for testing, if the data set has no official test "
        "list. 0: no test split; an official test list is not used either. auto: 0.2, but no test split if the data "
        "set has a validation list and no test list.",
    )
    seed: Seed | Literal["recipe.seed"] = Field(
        0,
        description="Seed of the split, independent of recipe.seed so that runs with different seeds share one "
        'split. "recipe.seed": use recipe.seed, so that each seed has its own split.',
    )


NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation of the three color channels, for the names that data.normalize allows."""


class NormalizeValues(ConfigModel):
    """Explicit normalization constants."""

    mean: list[Annotated[float, Field(ge=-10, le=10)]] = Field(
        min_length=1, max_length=4, description="Mean of each channel, for pixel values in 0..1."
    )
    std: list[Annotated[float, Field(ge=1e-4, le=1e4)]] = Field(
        min_length=1, max_length=4, description="Standard deviation of each channel, for pixel values in 0..1."
    )


class DataConfig(ConfigModel):
    """Data set, split, preprocessing and caching."""

    dataset: DatasetName = Field(description="Name of the data set; `toolkit datasets` describes each.")
    root: str = Field("data", min_length=1, description="Data folder; `digits` does not need one.")
    download: bool = Field(True, description="Download the data if it is missing and a download is available.")
    split: SplitConfig = Field(
        SplitConfig(), description="How images are split into training, validation and test sets."
    )
    images_per_class: int | None = Field(
        None,
        ge=1,
        description="Use only the first N training and validation images of each class.",
        json_schema_extra=IMAGES,
    )
    test_images_per_class: int | None = Field(
        None, ge=1, description="Use only the first N test images of each class.", json_schema_extra=IMAGES
    )
    class_folders: Literal["auto", "top", "leaf"] = Field(
        "auto",
        description="imagefolder: which folders are classes. top: the direct subfolders of data.root or of a split's "
        "folder, each with all images below it. leaf: every folder that directly contains images, named by its "
        'path, such as "a/abbey". auto: top, but a class folder whose images are all in subfolders is an error.',
    )
    background_class: bool = Field(False, description="caltech101: keep BACKGROUND_Google as a class.")
    channels: Literal[1, 3] | None = Field(
        None,
        description="Number of input channels of the model. Grayscale images are repeated to fill 3 channels, color "
        "images are averaged to 1. Default: 3 with pretrained weights, else that of the data set "
        f"(1 for {' and '.join(name for name, info in DATASETS.items() if info.channels == 1)}, 3 for the others).",
    )
    image_size: ImageSize | None = Field(
        None,
        description="Height and width of the model's input. Default: the size that the pretrained weights expect, "
        "else the data set's native size.",
        json_schema_extra=PIXELS,
    )
    resize: ImageSize | Annotated[list[ImageSize], Field(min_length=2, max_length=2)] | Literal["none"] | None = Field(
        None,
        description="Size before the crop: length of the shorter side, or [height, width] regardless of aspect "
        "ratio, or none. Default: what the pretrained weights expect (some fix both sides, or fix the longer side "
        "and pad the image), else image_size / 0.875 (small images: image_size).",
        json_schema_extra=PIXELS,
    )
    crop: Literal["center", "none"] = Field(
        "center",
        description="center: crop to image_size after the resize. none: the resize must already produce that size.",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = Field(
        None, description="Interpolation of the resize. Default: what the pretrained weights expect, else bilinear."
    )
    normalize: Literal["auto", "imagenet", "half", "dataset", "none"] | NormalizeValues = Field(
        "auto",
        description="Mean and standard deviation. auto: what the pretrained weights expect, else half. imagenet: "
        "those of ImageNet. half: 0.5 and 0.5. dataset: computed from the training images. Or { mean = [...], std = "
        "[...] }.",
    )
    exif: Literal["apply", "ignore"] = Field(
        "apply",
        description="EXIF orientation tag of image files. apply: rotate images upright, as viewers do. ignore: keep "
        "pixels as stored, as torchvision and timm do.",
    )
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | Literal["auto"] = Field(
        "auto",
        description="[BLACK, WHITE]: the values mapped to 0 and 255 in images with more than 8 bits per sample "
        "(16-bit, 32-bit, float). auto: one range for the whole data set, from its largest value: 0 to 255, 1023, "
        "4095, 16383 or 65535; 0 to 1 for float images; an error before training if the values are ambiguous.",
    )
    workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = Field(
        "auto", description="Data-loading workers per training process; auto: from the number of available CPUs."
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error",
        description="How to treat an unreadable image file. error: stop with its name. skip: exclude it from all "
        "splits, and report the number.",
    )
    max_bad_fraction: Fraction = Field(
        0.01, description="With on_bad_image = skip: stop if more than this fraction of the images is unreadable."
    )
    cache: Literal["auto", "off", "disk", "memory", "device"] = Field(
        "auto",
        description="Where to cache results that do not change between epochs (decoded and resized images, features "
        "of frozen layers). They are computed once and stored in the cache folder; images are read from disk, from "
        "memory or from the device, falling back to the next with enough space. auto: if it is worthwhile and fits. "
        "off: no caching.",
    )
    fixed_views: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Number of fixed augmented views per training image, used in rotation: epoch e uses view e mod "
        "fixed_views. Allows caching features of frozen layers despite augmentation. Default: a new random view "
        "every epoch.",
    )

    @model_validator(mode="after")
    def _mean_and_std_alike(self) -> DataConfig:
        if isinstance(self.normalize, NormalizeValues) and len(self.normalize.mean) != len(self.normalize.std):
            raise ValueError("normalize: mean and std must have the same number of values")
        return self

    @model_validator(mode="after")
    def _black_below_white(self) -> DataConfig:
        if self.value_range != "auto" and not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range: the first value, of black, must be smaller than the second, of white")
        return self

    @property
    def known_range(self) -> tuple[float, float] | None:
        """``value_range`` as (black, white); None if it has to be determined from the data."""
        return None if self.value_range == "auto" else (self.value_range[0], self.value_range[1])


class TransformConfig(BaseModel):
    """One augmentation: the name of a torchvision.transforms.v2 class, with its arguments as further keys."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    name: str = Field(description="Class in torchvision.transforms.v2; `toolkit transforms` lists them.")
    apply_p: Fraction = Field(1.0, description="Probability of applying it to an image.")
    stage: Literal["before_resize", "before_crop", "crop", "resize_crop", "after_crop", "tensor"] | None = Field(
        None,
        description="Position in the preprocessing pipeline: before_resize, before_crop (after the resize), crop "
        "(replaces the crop), resize_crop (replaces both), after_crop, tensor (after scaling to 0..1, before "
        "normalization). Default: after_crop; tensor for transforms that need a tensor.",
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the transform class."""
        return dict(self.model_extra or {})


class AugmentConfig(ConfigModel):
    """Random image transforms per split, mixup, CutMix and label smoothing."""

    train: list[TransformConfig] = Field([], description="Applied to training images, in this order.")
    validation: list[TransformConfig] = Field([], description="Applied to validation images.")
    test: list[TransformConfig] = Field([], description="Applied to test images.")
    auto_augment: str | None = Field(
        None,
        description="timm policy string such as rand-m9-mstd0.5, augmix-m3-w3 or original, applied after the crop.",
    )
    random_erasing: Fraction = Field(
        0.0, description="Probability of erasing a rectangle of a training image (after normalization)."
    )
    run_on: Literal["auto", "workers", "device"] = Field(
        "auto",
        description="Where transforms run. device: on whole batches, on the training device. workers: image by "
        "image, in the data-loading workers. auto: device if every transform of the split supports it (the log names "
        "those that do not); else workers up to the crop and device after it, or workers throughout if the "
        "transforms after the crop do not support batches. Workers and device draw different random numbers.",
    )
    mixup: float = Field(
        0.0, ge=0, le=1000, description="Mixup: alpha of Beta(alpha, alpha); 0 disables (Zhang et al. 2018)."
    )
    cutmix: float = Field(
        0.0, ge=0, le=1000, description="CutMix: alpha of Beta(alpha, alpha); 0 disables (Yun et al. 2019)."
    )
    mixup_prob: Fraction = Field(1.0, description="Probability of applying mixup or CutMix to a batch.")
    mixup_switch_prob: Fraction = Field(
        0.5, description="If both are enabled: fraction of mixed batches that use CutMix."
    )
    label_smoothing: FractionBelowOne = Field(
        0.0, description="Probability mass distributed uniformly over all classes in the training loss."
    )


class HeadConfig(ConfigModel):
    """The new classifier on top of the backbone."""

    hidden: list[Annotated[int, Field(ge=1, le=MOST_CHANNELS)]] = Field(
        [], description="Widths of the hidden layers. Default: none."
    )
    batch_norm: bool = Field(
        False,
        description="Batch norm after each hidden layer. Without hidden layers: one before the last layer, without "
        "affine parameters and with eps 1e-6, as in MAE's linear probe (He et al. 2022).",
    )
    bias: Literal["auto"] | bool = Field(
        "auto",
        description="Whether hidden layers have a bias. auto: only if no batch norm follows. The last layer always "
        "has one.",
    )
    activation: Activation = Field("relu", description="Activation after each hidden layer.")
    dropout: FractionBelowOne = Field(
        0.0, description="Dropout probability before the last layer and after each hidden layer."
    )
    scope: Literal["last_layer", "classifier"] = Field(
        "last_layer",
        description="Which layers the head replaces. last_layer: only the last Linear. classifier: all fully "
        "connected layers and the pooling before them (VGG, AlexNet).",
    )

    @property
    def has_bias(self) -> bool:
        """Whether hidden layers have a bias."""
        return not self.batch_norm if self.bias == "auto" else self.bias


class ConvBlock(ConfigModel):
    """One ConvNet block: a convolution with optional batch norm, activation, pooling and dropout."""

    channels: int = Field(ge=1, le=MOST_CHANNELS, description="Output channels.")
    kernel: int = Field(3, ge=1, le=63, description="Kernel size.", json_schema_extra=PIXELS)
    stride: int = Field(1, ge=1, le=4096, description="Stride.", json_schema_extra=PIXELS)
    padding: int = Field(
        1, ge=0, le=63, description="Zero padding on each side; at most kernel.", json_schema_extra=PIXELS
    )
    batch_norm: bool | None = Field(
        None, description="Batch norm in this block. Default: batch_norm of [model.convnet]."
    )
    pool: int = Field(0, ge=0, le=4096, description="Max pooling window and stride; 0: none.", json_schema_extra=PIXELS)
    dropout: FractionBelowOne | None = Field(
        None, description="Dropout probability, at its position in `order`. Default: dropout of [model.convnet]."
    )

    @model_validator(mode="after")
    def _padding_sees_pixels(self) -> ConvBlock:
        if self.padding > self.kernel:
            raise ValueError(
                f"padding = {self.padding} is more than kernel = {self.kernel}: the border would be all zero"
            )
        return self


class ConvNetConfig(ConfigModel):
    """A ConvNet built from a description (`source = "toolkit"`): blocks, flatten, head."""

    blocks: list[ConvBlock] = Field(min_length=1, description="Convolution blocks, from input to output.")
    batch_norm: bool = Field(False, description="Batch norm in every block that does not override it.")
    bias: Literal["auto"] | bool = Field(
        "auto",
        description="Whether convolutions have a bias. auto: yes, unless batch norm follows with only pooling in "
        "between, which would cancel the bias.",
    )
    dropout: FractionBelowOne = Field(0.0, description="Dropout probability in every block that does not override it.")
    order: list[Literal["conv", "norm", "pool", "act", "dropout"]] = Field(
        ["conv", "norm", "act", "pool", "dropout"], min_length=1, description="Order of the layers in a block."
    )
    activation: Activation = Field("relu", description="Activation in all blocks.")
    init: Literal["default", "gaussian"] = Field(
        "default",
        description="default: PyTorch's initialization. gaussian: weights of convolutions and linear layers from a "
        "normal distribution with mean 0 and standard deviation init_std, biases 0.",
    )
    init_std: float = Field(0.05, gt=0, le=1000, description="gaussian: standard deviation.")

    def has_batch_norm(self, block: ConvBlock) -> bool:
        """Whether a block has batch norm: its own setting if given, else that of the table."""
        return self.batch_norm if block.batch_norm is None else block.batch_norm

    def has_bias(self, block: ConvBlock) -> bool:
        """Whether a block's convolution has a bias."""
        if self.bias != "auto":
            return self.bias
        if not self.has_batch_norm(block) or self.order.index("norm") < self.order.index("conv"):
            return True
        between = self.order[self.order.index("conv") : self.order.index("norm")]
        has_activation = "act" in between and self.activation != "none"
        return has_activation or ("dropout" in between and self.dropout_of(block) > 0)

    def dropout_of(self, block: ConvBlock) -> float:
        """Dropout probability of a block: its own setting if given, else that of the table."""
        return self.dropout if block.dropout is None else block.dropout

    @model_validator(mode="after")
    def _order_complete(self) -> ConvNetConfig:
        if len(set(self.order)) != len(self.order) or "conv" not in self.order:
            raise ValueError("order must contain conv, and each layer at most once")
        used = {
            "norm": any(self.has_batch_norm(b) for b in self.blocks),
            "pool": any(b.pool for b in self.blocks),
            "dropout": any(self.dropout_of(b) for b in self.blocks),
        }
        missing = [layer for layer, is_used in used.items() if is_used and layer not in self.order]
        if missing:
            raise ValueError(f"order lacks {', '.join(missing)}, which a block uses")
        return self


class ModelConfig(ConfigModel):
    """Architecture, initial weights and head."""

    source: Literal["toolkit", "torchvision", "timm"] = Field(
        description="Library that provides the architecture; toolkit: defined in [model.convnet]."
    )
    name: str = Field(
        "convnet", description="Name of the architecture; `toolkit models` lists them. With source = toolkit: convnet."
    )
    weights: str = Field(
        "none",
        description="Initial weights: none; a torchvision weights name (IMAGENET1K_V2, DEFAULT); a timm tag (in1k, "
        "DEFAULT); file:PATH of a state dict (.safetensors, .pth, .pt); or package:NAME/PATH in an installed "
        "package.",
    )
    weights_key: str | None = Field(
        None,
        description="For a weights file that contains more than one model: the entry to load (state_dict_ema), or "
        "the prefix of its parameter names (module.encoder_q). Default: state_dict, model, ..., and the one prefix "
        "that fits.",
    )
    args: dict[str, Any] = Field(
        {}, description="Additional constructor arguments of the architecture, such as drop_path_rate."
    )
    stem: Literal["imagenet", "small"] = Field(
        "imagenet",
        description="First layers of a ResNet. imagenet: as published. small: a 3x3 convolution of stride 1 without "
        "pooling, for images of about 32 pixels.",
    )
    convnet: ConvNetConfig | None = Field(None, description="Definition of the ConvNet, with source = toolkit.")
    head: HeadConfig = Field(HeadConfig(), description="The new classifier on top of the backbone.")

    @model_validator(mode="after")
    def _convnet_where_due(self) -> ModelConfig:
        if self.source == "toolkit" and self.convnet is None:
            raise ValueError("source = 'toolkit' needs a table [model.convnet] with its blocks")
        return self


class TransferConfig(ConfigModel):
    """Which parameters are trained, and their learning-rate multipliers."""

    mode: Literal["scratch", "finetune", "feature_extractor", "backbone_only", "linear_probe", "gradual"] = Field(
        "scratch",
        description="scratch, finetune: all parameters are trained. feature_extractor: the backbone is frozen, all "
        "fully connected layers are trained. backbone_only: the backbone is trained, all fully connected layers are "
        "frozen (see new_layer). linear_probe: only the new head is trained. gradual: like linear_probe, then layer "
        "groups are unfrozen from the top (see unfreeze_at). Default: finetune if model.weights is pretrained, else "
        "scratch.",
    )
    freeze: list[str] = Field(
        [], description="Also freeze parameters whose names match one of these patterns (features.0.*)."
    )
    train: list[str] = Field(
        [], description="Also train parameters whose names match one of these patterns; this overrides mode and freeze."
    )
    new_layer: Literal["train", "freeze"] = Field(
        "train",
        description="backbone_only: whether the new last layer is trained or kept frozen at its random initialization.",
    )
    unfreeze_at: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="gradual: epochs at the start of which one more layer group is unfrozen, from the top.",
        json_schema_extra=EPOCHS,
    )
    backbone_lr: float = Field(
        1.0, gt=0, le=1e6, description="Learning rate of the pretrained backbone, as a multiple of optimizer.lr."
    )
    head_lr: float = Field(
        1.0, gt=0, le=1e6, description="Learning rate of the new head, as a multiple of optimizer.lr."
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Layer-wise learning-rate decay: factor from each layer group to the one below it (Clark et al. "
        "2020, ELECTRA); 1 disables.",
    )
    frozen_batch_norm: Literal["fixed", "update"] = Field(
        "fixed",
        description="Running statistics of frozen batch norm layers. fixed: as loaded. update: updated from the "
        "training data.",
    )


class OptimizerConfig(ConfigModel):
    """The optimizer and its hyperparameters."""

    name: str = Field(
        "sgd", description="sgd, nag, adam, adamw (PyTorch), or any timm optimizer; `toolkit optimizers` lists them."
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
    args: dict[str, Any] = Field(
        {}, description="Additional arguments of the optimizer, such as betas = [0.9, 0.99] or eps."
    )


class SchedulerConfig(ConfigModel):
    """Learning-rate schedule, a function of epochs."""

    name: Literal["constant", "step", "exponential", "cosine", "one_cycle", "plateau"] = Field(
        "constant",
        description="step: multiply by gamma every step_size epochs. exponential: multiply by gamma every epoch. "
        "plateau: multiply by gamma when the metric stops improving.",
    )
    step_size: int | None = Field(
        None, ge=1, description="step: epochs between two reductions.", json_schema_extra=EPOCHS
    )
    gamma: float | None = Field(
        None, gt=0, le=1, description="Decay factor of step (default 0.1), exponential (0.95) and plateau (0.1)."
    )
    min_lr: float = Field(0.0, ge=0, description="cosine, plateau: lower bound on the learning rate.")
    warmup_epochs: float = Field(
        0.0,
        ge=0,
        description="Length of the linear warm-up from warmup_start_factor x lr to lr.",
        json_schema_extra=EPOCHS,
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
    end_factor: float = Field(4e-6, gt=0, le=1, description="one_cycle: last learning rate, as a fraction of lr.")

    @model_validator(mode="after")
    def _step_has_a_period(self) -> SchedulerConfig:
        if self.name == "step" and self.step_size is None:
            raise ValueError("name = 'step' needs step_size (epochs)")
        return self


class TrainConfig(ConfigModel):
    """Training loop: epochs, batch size, precision, model selection."""

    epochs: int = Field(ge=1, le=1_000_000, description="Maximum number of training epochs.", json_schema_extra=EPOCHS)
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
    grad_accum_steps: int = Field(
        1, ge=1, description="Gradient accumulation: number of micro-batches per batch, to save memory."
    )
    drop_last: bool = Field(False, description="Drop the last, incomplete batch of each epoch.")
    precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto",
        description="Mixed precision. auto: bf16 on GPUs that support it, else (and on CPUs) no; the log states why.",
    )
    best_metric: Selection = Field(
        "val/accuracy",
        description="Metric that selects the best epoch, whose weights are kept (ties in accuracy are broken by "
        "val/loss, ties in loss by val/accuracy, then the earlier epoch wins); or last: keep the last epoch's "
        "weights.",
    )
    max_grad_norm: float | None = Field(
        None, gt=0, description="Clip the gradients to this total L2 norm. Default: no clipping."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per step of an exponential moving average of the weights, which is then evaluated and "
        "saved in their place. It is warmed up from 0 (at step n it is at most 1 - n ** (-2/3), as in timm's "
        "ModelEmaV3).",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: weight the training loss by inverse class frequency; for mixed or smoothed targets "
        "each class probability is weighted separately, as in torch's cross_entropy.",
    )
    sampling: Literal["shuffle", "balanced"] = Field(
        "shuffle",
        description="shuffle: every image once per epoch. balanced: classes sampled uniformly, with replacement.",
    )
    sync_batch_norm: bool = Field(
        True,
        description="Synchronize batch norm statistics over all processes. false: each process normalizes by its own "
        "images, so the result depends on the number of processes.",
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

    @property
    def images_per_evaluation(self) -> int:
        """``eval_batch_size`` or its default, twice the micro-batch, as evaluation stores no gradients."""
        return self.eval_batch_size or max(1, 2 * self.batch_size // self.grad_accum_steps)


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


class TrackingConfig(ConfigModel):
    """Experiment trackers (W&B, TensorBoard). Logs in the run directory are always written."""

    trackers: list[Literal["wandb", "tensorboard"]] = Field(["wandb"], description="Trackers to log to; []: none.")
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="W&B mode. auto: online if logged in and the server is reachable, else offline; the environment "
        "variable WANDB_MODE takes precedence over auto.",
    )
    project: Name = Field("toolkit", description="W&B project.")
    entity: str | None = Field(None, description="W&B user or team; default: your own.")
    group: str | None = Field(None, description="W&B group; default: the recipe's name.")
    run_name: str | None = Field(None, description="W&B display name; default: recipe name and run id.")
    tags: list[str] = Field([], description="W&B tags.")
    notes: str = Field("", description="W&B notes.")


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
            raise ValueError("give at_least, at_most, or value with tolerance")
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


class Recipe(ConfigModel):
    """A complete recipe."""

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

    recipe: ExperimentConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig
    transfer: TransferConfig = TransferConfig()
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    train: TrainConfig
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
