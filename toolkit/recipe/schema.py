"""The recipe language: one class per TOML table, one field per key.

This module is the single definition of every key: its name, type, unit, default, range and meaning. The
loader, the validator, the JSON Schema, ``docs/recipes.md`` and the resolved recipe of every run are all
derived from it. Nothing here imports torch, so a recipe is checked in a fraction of a second.

Units: epochs for durations, images for batch sizes, pixels for lengths, fractions (0..1) for probabilities
and accuracies.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from toolkit.recipe.base import (
    NAME_LENGTH,
    NAME_PATTERN,
    SLURM_FEATURES,
    SLURM_MEMORY,
    SLURM_OPTION,
    SLURM_TIME,
    SLURM_WORD,
    Activation,
    ConfigModel,
    Fraction,
    Metric,
    Selection,
    describe,
)
from toolkit.recipe.study_schema import StudyConfig

MOST_CHANNELS = 65_536
"""Maximum number of channels of a convolution and maximum width of a hidden layer."""


class ExperimentConfig(ConfigModel):
    """Experiment name, seed and output directory."""

    name: Annotated[
        str,
        Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH),
        describe("Name of the experiment; its runs are stored in <run_root>/<name>/."),
    ]
    description: Annotated[str, describe("One-line description, shown in tables and reports.")] = ""
    seed: Annotated[
        int,
        Field(ge=0, lt=2**32),
        describe("Seed of initialization, sample order and augmentation. The split has its own seed."),
    ] = 0
    run_root: Annotated[str, Field(min_length=1), describe("Folder in which run directories are created.")] = "runs"


class SplitConfig(ConfigModel):
    """How images are split into training, validation and test sets. Depends on the recipe alone."""

    method: Annotated[
        Literal["auto", "official", "stratified", "random", "alternate"],
        describe(
            "How the validation images are chosen. official: the data set's own validation list. stratified: the same "
            "fraction of every class. random: uniformly at random. alternate: odd list positions are used for "
            "validation, even ones for training. auto: official if the data set has one, else stratified."
        ),
    ] = "auto"
    validation: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)],
        describe(
            "Fraction (0..1) or number of training images held out for validation. 0: no validation split, regardless "
            'of the method; requires train.best_metric = "last".'
        ),
    ] = 0.1
    test: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] | Literal["auto"],
        describe(
            "Fraction (0..1) or number of images held out for testing, if the data set has no official test list. "
            "0: no test split; an official test list is not used either. auto: 0.2, but no test split if "
            "the data set has a validation list and no test list."
        ),
    ] = "auto"
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**32)] | Literal["recipe.seed"],
        describe(
            "Seed of the split, independent of recipe.seed so that runs with different seeds share one split. "
            '"recipe.seed": use recipe.seed, so that each seed has its own split.'
        ),
    ] = 0


class NormalizeValues(ConfigModel):
    """Explicit normalization constants."""

    mean: Annotated[
        list[Annotated[float, Field(ge=-10, le=10)]],
        Field(min_length=1, max_length=4),
        describe("Mean of each channel, for pixel values in 0..1."),
    ]
    std: Annotated[
        list[Annotated[float, Field(ge=1e-4, le=1e4)]],
        Field(min_length=1, max_length=4),
        describe("Standard deviation of each channel, for pixel values in 0..1."),
    ]


class DataConfig(ConfigModel):
    """Data set, split, preprocessing and caching."""

    dataset: Annotated[
        Literal["digits", "cifar10", "cifar100", "fashion_mnist", "caltech101", "imagefolder"],
        describe("Name of the data set; `toolkit datasets` describes each."),
    ]
    root: Annotated[str, Field(min_length=1), describe("Data folder; `digits` does not need one.")] = "data"
    download: Annotated[bool, describe("Download the data if it is missing and a download is available.")] = True
    split: Annotated[SplitConfig, describe("How images are split into training, validation and test sets.")] = (
        SplitConfig()
    )
    images_per_class: Annotated[
        int | None,
        Field(ge=1),
        describe("Use only the first N training and validation images of each class.", unit="images"),
    ] = None
    test_images_per_class: Annotated[
        int | None, Field(ge=1), describe("Use only the first N test images of each class.", unit="images")
    ] = None
    class_folders: Annotated[
        Literal["auto", "top", "leaf"],
        describe(
            "imagefolder: which folders are classes. top: the direct subfolders of data.root or of a split's folder, "
            "each with all images below it. leaf: every folder that directly contains images, named by its path, such "
            'as "a/abbey". auto: top, but reject a class folder whose images are all in subfolders.'
        ),
    ] = "auto"
    background_class: Annotated[bool, describe("caltech101: keep BACKGROUND_Google as a class.")] = False
    channels: Annotated[
        Literal[1, 3] | None,
        describe(
            "Input channels of the model; grayscale images are repeated, color images averaged. "
            "Default: 3; 1 for digits and fashion_mnist."
        ),
    ] = None
    image_size: Annotated[
        Annotated[int, Field(ge=4, le=4096)] | None,
        describe(
            "Height and width of the model's input. "
            "Default: the size that the pretrained weights expect, else the data set's native size.",
            unit="pixels",
        ),
    ] = None
    resize: Annotated[
        Annotated[int, Field(ge=4, le=4096)]
        | Annotated[list[Annotated[int, Field(ge=4, le=4096)]], Field(min_length=2, max_length=2)]
        | Literal["none"]
        | None,
        describe(
            "Size before the crop: length of the shorter side, or [height, width] regardless of aspect ratio, or none. "
            "Default: what the pretrained weights expect (some fix both sides, or fix the longer side and pad the "
            "image), else image_size / 0.875 (small images: image_size).",
            unit="pixels",
        ),
    ] = None
    crop: Annotated[
        Literal["center", "none"],
        describe("center: crop to image_size after the resize. none: the resize must already produce that size."),
    ] = "center"
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic"] | None,
        describe("Interpolation of the resize. Default: what the pretrained weights expect, else bilinear."),
    ] = None
    normalize: Annotated[
        Literal["auto", "imagenet", "half", "dataset", "none"] | NormalizeValues,
        describe(
            "Mean and standard deviation. auto: what the pretrained weights expect, else half. imagenet: those of "
            "ImageNet. half: 0.5 and 0.5. dataset: computed from the training images. "
            "Or { mean = [...], std = [...] }."
        ),
    ] = "auto"
    exif: Annotated[
        Literal["apply", "ignore"],
        describe(
            "EXIF orientation tag of image files. apply: rotate images upright, as viewers do. "
            "ignore: keep pixels as stored, as torchvision and timm do."
        ),
    ] = "apply"
    value_range: Annotated[
        Annotated[list[float], Field(min_length=2, max_length=2)] | Literal["auto"],
        describe(
            "[BLACK, WHITE]: the values mapped to 0 and 255 in images with more than 8 bits per sample (16-bit, "
            "32-bit, float). auto: one range for the whole data set, from its largest value: 0 to 255, 1023, 4095, "
            "16383 or 65535; 0 to 1 for float images; an error before training if the values are ambiguous."
        ),
    ] = "auto"
    workers: Annotated[
        Annotated[int, Field(ge=0, le=1024)] | Literal["auto"],
        describe("Data-loading workers per training process; auto: from the number of available CPUs."),
    ] = "auto"
    on_bad_image: Annotated[
        Literal["error", "skip"],
        describe("Unreadable image file. error: stop and name the file. skip: exclude it everywhere and count it."),
    ] = "error"
    max_bad_fraction: Annotated[
        Fraction, describe("With on_bad_image = skip: stop if more than this fraction is bad.")
    ] = 0.01
    cache: Annotated[
        Literal["auto", "off", "disk", "memory", "device"],
        describe(
            "Where to cache results that do not change between epochs (decoded and resized images, features of frozen "
            "layers). They are computed once and stored in the cache folder; images are read from disk, from memory or "
            "from the device, falling back to the next with enough space. auto: if it is worthwhile and fits. "
            "off: no caching."
        ),
    ] = "auto"
    fixed_views: Annotated[
        int | None,
        Field(ge=1, le=1000),
        describe(
            "Number of fixed augmented views per training image, used in rotation: epoch e uses view e mod "
            "fixed_views. Allows caching features of frozen layers despite augmentation. Default: a new random view "
            "every epoch."
        ),
    ] = None

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

    name: Annotated[str, describe("Class in torchvision.transforms.v2; `toolkit transforms` lists them.")]
    apply_p: Annotated[Fraction, describe("Probability of applying it to an image.")] = 1.0
    stage: Annotated[
        Literal["before_resize", "before_crop", "crop", "resize_crop", "after_crop", "tensor"] | None,
        describe(
            "Position in the preprocessing pipeline: before_resize, before_crop (after the resize), crop (replaces the "
            "crop), resize_crop (replaces both), after_crop, tensor (after scaling to 0..1, before normalization). "
            "Default: after_crop; tensor for transforms that need a tensor."
        ),
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the transform class."""
        return dict(self.model_extra or {})


class AugmentConfig(ConfigModel):
    """Random image transforms per split, mixup, CutMix and label smoothing."""

    train: Annotated[list[TransformConfig], describe("Applied to training images, in this order.")] = []
    validation: Annotated[list[TransformConfig], describe("Applied to validation images.")] = []
    test: Annotated[list[TransformConfig], describe("Applied to test images.")] = []
    auto_augment: Annotated[
        str | None,
        describe("timm policy string such as rand-m9-mstd0.5, augmix-m3-w3 or original, applied after the crop."),
    ] = None
    random_erasing: Annotated[
        Fraction, describe("Probability of erasing a rectangle of a training image (after normalization).")
    ] = 0.0
    run_on: Annotated[
        Literal["auto", "workers", "device"],
        describe(
            "Where transforms run. device: on whole batches, on the training device. workers: image by image, in the "
            "data-loading workers. auto: device if every transform of the split supports it (the log names those that "
            "do not); else workers up to the crop and device after it, or workers throughout if the transforms after "
            "the crop do not support batches. Workers and device draw different random numbers."
        ),
    ] = "auto"
    mixup: Annotated[
        float, Field(ge=0, le=1000), describe("Mixup: alpha of Beta(alpha, alpha); 0 disables (Zhang et al. 2018).")
    ] = 0.0
    cutmix: Annotated[
        float, Field(ge=0, le=1000), describe("CutMix: alpha of Beta(alpha, alpha); 0 disables (Yun et al. 2019).")
    ] = 0.0
    mixup_prob: Annotated[Fraction, describe("Probability of applying mixup or CutMix to a batch.")] = 1.0
    mixup_switch_prob: Annotated[
        Fraction, describe("If both are enabled: fraction of mixed batches that use CutMix.")
    ] = 0.5
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=1),
        describe("Probability mass distributed uniformly over all classes in the training loss."),
    ] = 0.0


class HeadConfig(ConfigModel):
    """The new classifier on top of the backbone."""

    hidden: Annotated[
        list[Annotated[int, Field(ge=1, le=MOST_CHANNELS)]], describe("Widths of the hidden layers. Default: none.")
    ] = []
    batch_norm: Annotated[
        bool,
        describe(
            "Batch norm after each hidden layer. Without hidden layers: one before the last layer, without affine "
            "parameters and with eps 1e-6, as in MAE's linear probe (He et al. 2022)."
        ),
    ] = False
    bias: Annotated[
        Literal["auto"] | bool,
        describe("Whether hidden layers have a bias. auto: if no batch norm follows. The last layer always has one."),
    ] = "auto"
    activation: Annotated[Activation, describe("Activation after each hidden layer.")] = "relu"
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)],
        describe("Dropout probability before the last layer and after each hidden layer."),
    ] = 0.0
    scope: Annotated[
        Literal["last_layer", "classifier"],
        describe(
            "Which layers the head replaces. last_layer: only the last Linear. classifier: all fully connected layers "
            "and the pooling before them (VGG, AlexNet)."
        ),
    ] = "last_layer"

    @property
    def has_bias(self) -> bool:
        """Whether hidden layers have a bias."""
        return not self.batch_norm if self.bias == "auto" else self.bias


class ConvBlock(ConfigModel):
    """One ConvNet block: a convolution with optional batch norm, activation, pooling and dropout."""

    channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS), describe("Output channels.")]
    kernel: Annotated[int, Field(ge=1, le=63), describe("Kernel size.", unit="pixels")] = 3
    stride: Annotated[int, Field(ge=1, le=4096), describe("Stride.", unit="pixels")] = 1
    padding: Annotated[int, Field(ge=0, le=63), describe("Zero padding; at most kernel.", unit="pixels")] = 1
    batch_norm: Annotated[bool | None, describe("Batch norm in this block. Default: that of the table.")] = None
    pool: Annotated[int, Field(ge=0, le=4096), describe("Max pooling window and stride; 0: none.", unit="pixels")] = 0
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        describe("Dropout probability, at its position in `order`. Default: that of the table."),
    ] = None

    @model_validator(mode="after")
    def _padding_sees_pixels(self) -> ConvBlock:
        if self.padding > self.kernel:
            raise ValueError(
                f"padding = {self.padding} is more than kernel = {self.kernel}: the border would be all zero"
            )
        return self


class ConvNetConfig(ConfigModel):
    """A ConvNet built from a description (`source = "toolkit"`): blocks, flatten, head."""

    blocks: Annotated[list[ConvBlock], Field(min_length=1), describe("Convolution blocks, from input to output.")]
    batch_norm: Annotated[bool, describe("Batch norm in every block that does not override it.")] = False
    bias: Annotated[
        Literal["auto"] | bool,
        describe(
            "Whether convolutions have a bias. auto: yes, unless batch norm follows with only pooling in between, "
            "which would cancel the bias."
        ),
    ] = "auto"
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)], describe("Dropout probability in every block that does not override it.")
    ] = 0.0
    order: Annotated[
        list[Literal["conv", "norm", "pool", "act", "dropout"]],
        Field(min_length=1),
        describe("Order of the layers in a block."),
    ] = ["conv", "norm", "act", "pool", "dropout"]
    activation: Annotated[Activation, describe("Activation in all blocks.")] = "relu"
    init: Annotated[
        Literal["default", "gaussian"],
        describe(
            "default: PyTorch's initialization. gaussian: weights of convolutions and linear layers from a normal "
            "distribution with mean 0 and standard deviation init_std, biases 0."
        ),
    ] = "default"
    init_std: Annotated[float, Field(gt=0, le=1000), describe("gaussian: standard deviation.")] = 0.05

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

    source: Annotated[
        Literal["toolkit", "torchvision", "timm"],
        describe("Library that provides the architecture; toolkit: defined in [model.convnet]."),
    ]
    name: Annotated[
        str, describe("Name of the architecture; `toolkit models` lists them. With source = toolkit: convnet.")
    ] = "convnet"
    weights: Annotated[
        str,
        describe(
            "Initial weights: none; a torchvision weights name (IMAGENET1K_V2, DEFAULT); a timm tag (in1k, DEFAULT); "
            "file:PATH of a state dict (.safetensors, .pth, .pt); or package:NAME/PATH in an installed package."
        ),
    ] = "none"
    weights_key: Annotated[
        str | None,
        describe(
            "For a weights file that contains more than one model: the entry to load (state_dict_ema), or the prefix "
            "of its parameter names (module.encoder_q). Default: state_dict, model, ..., and the one prefix that fits."
        ),
    ] = None
    args: Annotated[
        dict[str, Any], describe("Additional constructor arguments of the architecture, such as drop_path_rate.")
    ] = {}
    stem: Annotated[
        Literal["imagenet", "small"],
        describe(
            "small: ResNets start with a 3x3 convolution of stride 1 and no pooling, for images of about 32 pixels."
        ),
    ] = "imagenet"
    convnet: Annotated[ConvNetConfig | None, describe("Definition of the ConvNet, with source = toolkit.")] = None
    head: Annotated[HeadConfig, describe("The new classifier on top of the backbone.")] = HeadConfig()

    @model_validator(mode="after")
    def _convnet_where_due(self) -> ModelConfig:
        if self.source == "toolkit" and self.convnet is None:
            raise ValueError("source = 'toolkit' needs a table [model.convnet] with its blocks")
        return self


class TransferConfig(ConfigModel):
    """Which parameters are trained, and their learning-rate multipliers."""

    mode: Annotated[
        Literal["scratch", "finetune", "feature_extractor", "backbone_only", "linear_probe", "gradual"],
        describe(
            "scratch, finetune: all parameters are trained. feature_extractor: the backbone is frozen, all fully "
            "connected layers are trained. backbone_only: the backbone is trained, all fully connected layers are "
            "frozen (see new_layer). linear_probe: only the new head is trained. gradual: like linear_probe, then "
            "layer groups are unfrozen from the top (see unfreeze_at). "
            "Default: finetune if model.weights is pretrained, else scratch."
        ),
    ] = "scratch"
    freeze: Annotated[
        list[str], describe("Also freeze parameters whose names match one of these patterns (features.0.*).")
    ] = []
    train: Annotated[
        list[str],
        describe("Also train parameters whose names match one of these patterns; overrides `mode` and `freeze`."),
    ] = []
    new_layer: Annotated[
        Literal["train", "freeze"],
        describe("backbone_only: whether the new last layer is trained or kept frozen at its random initialization."),
    ] = "train"
    unfreeze_at: Annotated[
        list[Annotated[int, Field(ge=1)]],
        describe(
            "gradual: epochs at the start of which one more layer group is unfrozen, from the top.", unit="epochs"
        ),
    ] = []
    backbone_lr: Annotated[
        float, Field(gt=0, le=1e6), describe("Learning rate of the pretrained backbone, as a multiple of optimizer.lr.")
    ] = 1.0
    head_lr: Annotated[
        float, Field(gt=0, le=1e6), describe("Learning rate of the new head, as a multiple of optimizer.lr.")
    ] = 1.0
    layer_decay: Annotated[
        float,
        Field(gt=0, le=1),
        describe(
            "Layer-wise learning-rate decay: factor from each layer group to the one below it (Clark et al. 2020, "
            "ELECTRA); 1 disables."
        ),
    ] = 1.0
    frozen_batch_norm: Annotated[
        Literal["fixed", "update"],
        describe(
            "Running statistics of frozen batch norm layers. fixed: as loaded. update: updated from the training data."
        ),
    ] = "fixed"


class OptimizerConfig(ConfigModel):
    """The optimizer and its hyperparameters."""

    name: Annotated[
        str,
        describe("sgd, nag, adam, adamw (PyTorch), or any timm optimizer; `toolkit optimizers` lists them."),
    ] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e30), describe("Peak learning rate (after warm-up).")]
    momentum: Annotated[
        float | None,
        Field(ge=0, lt=1),
        describe("sgd, nag and other optimizers with momentum. Default: 0.9 for sgd and nag."),
    ] = None
    weight_decay: Annotated[
        float,
        Field(ge=0, le=1e6),
        describe("L2 penalty (sgd, nag, adam) or decoupled weight decay (adamw and most others)."),
    ] = 0.0
    decay_bias_and_norm: Annotated[
        bool, describe("Whether weight decay also applies to biases and normalization layers.")
    ] = True
    args: Annotated[
        dict[str, Any], describe("Additional arguments of the optimizer, such as betas = [0.9, 0.99] or eps.")
    ] = {}


class SchedulerConfig(ConfigModel):
    """Learning-rate schedule, a function of epochs."""

    name: Annotated[
        Literal["constant", "step", "exponential", "cosine", "one_cycle", "plateau"],
        describe(
            "step: multiply by gamma every step_size epochs. exponential: multiply by gamma every epoch. "
            "plateau: multiply by gamma when the metric stops improving."
        ),
    ] = "constant"
    step_size: Annotated[int | None, Field(ge=1), describe("step: period.", unit="epochs")] = None
    gamma: Annotated[
        float | None,
        Field(gt=0, le=1),
        describe("Decay factor of step (default 0.1), exponential (0.95) and plateau (0.1)."),
    ] = None
    min_lr: Annotated[float, Field(ge=0), describe("cosine, plateau: lower bound on the learning rate.")] = 0.0
    warmup_epochs: Annotated[
        float, Field(ge=0), describe("Length of the linear warm-up from warmup_start_factor x lr to lr.", unit="epochs")
    ] = 0.0
    warmup_start_factor: Annotated[Fraction, describe("Initial warm-up learning rate, as a fraction of lr.")] = 0.01
    metric: Annotated[Metric, describe("plateau: metric to monitor.")] = "val/loss"
    patience: Annotated[
        int, Field(ge=0), describe("plateau: epochs without improvement tolerated before lr is reduced.", unit="epochs")
    ] = 5
    threshold: Annotated[float, Field(ge=0), describe("plateau: smaller changes do not count as improvement.")] = 1e-4
    threshold_mode: Annotated[
        Literal["rel", "abs"],
        describe("plateau: threshold is relative to the best value so far (rel) or in units of the metric (abs)."),
    ] = "rel"
    pct_start: Annotated[
        Annotated[float, Field(gt=0, lt=1)],
        describe("one_cycle: fraction of the epochs after which lr is reached (Smith 2018)."),
    ] = 0.3
    start_factor: Annotated[
        float, Field(gt=0, le=1), describe("one_cycle: first learning rate, as a fraction of lr.")
    ] = 0.04
    end_factor: Annotated[float, Field(gt=0, le=1), describe("one_cycle: last learning rate, as a fraction of lr.")] = (
        4e-6
    )

    @model_validator(mode="after")
    def _step_has_a_period(self) -> SchedulerConfig:
        if self.name == "step" and self.step_size is None:
            raise ValueError("name = 'step' needs step_size (epochs)")
        return self


class TrainConfig(ConfigModel):
    """Training loop: epochs, batch size, precision, model selection."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000), describe("Maximum number of training epochs.", unit="epochs")]
    batch_size: Annotated[
        int,
        Field(ge=1),
        describe("Images per optimizer step, over all processes and accumulation steps.", unit="images"),
    ]
    eval_batch_size: Annotated[
        int | None,
        Field(ge=1),
        describe(
            "Images per evaluation step, over all processes. Default: 2 x batch_size / grad_accum_steps; split into "
            "micro-batches on a GPU that does not have enough memory.",
            unit="images",
        ),
    ] = None
    grad_accum_steps: Annotated[
        int, Field(ge=1), describe("Gradient accumulation: number of micro-batches per batch, to save memory.")
    ] = 1
    drop_last: Annotated[bool, describe("Drop the last, incomplete batch of each epoch.")] = False
    precision: Annotated[
        Literal["auto", "no", "fp16", "bf16"],
        describe("Mixed precision. auto: bf16 on GPUs that support it, else (and on CPUs) no; the log states why."),
    ] = "auto"
    best_metric: Annotated[
        Selection,
        describe(
            "Metric that selects the best epoch, whose weights are kept (ties in accuracy are broken by val/loss, ties "
            "in loss by val/accuracy, then the earlier epoch wins); or last: keep the last epoch's weights."
        ),
    ] = "val/accuracy"
    max_grad_norm: Annotated[float | None, Field(gt=0), describe("Clip gradients to this L2 norm.")] = None
    ema: Annotated[
        float | None,
        Field(gt=0, lt=1),
        describe(
            "Decay per step of an exponential moving average of the weights, which is then evaluated and saved in "
            "their place. It is warmed up from 0 (at step n it is at most 1 - n ** (-2/3), as in timm's ModelEmaV3)."
        ),
    ] = None
    class_weights: Annotated[
        Literal["none", "balanced"],
        describe(
            "balanced: weight the training loss by inverse class frequency; for mixed or smoothed targets each class "
            "probability is weighted separately, as in torch's cross_entropy."
        ),
    ] = "none"
    sampling: Annotated[
        Literal["shuffle", "balanced"],
        describe("shuffle: every image once per epoch. balanced: classes sampled uniformly, with replacement."),
    ] = "shuffle"
    sync_batch_norm: Annotated[
        bool,
        describe(
            "Synchronize batch norm statistics over all processes. false: each process normalizes by its own images, "
            "so the result depends on the number of processes."
        ),
    ] = True
    channels_last: Annotated[
        bool, describe("Channels-last memory format for images and convolutions; faster on most hardware.")
    ] = True
    compile: Annotated[bool, describe("Compile the model with torch.compile.")] = False
    cuda_graphs: Annotated[
        bool,
        describe(
            'Compile the model and replay its kernels as CUDA graphs (mode "reduce-overhead"), for small models that '
            "are limited by kernel-launch overhead. GPUs only."
        ),
    ] = False
    deterministic: Annotated[bool, describe("Use only deterministic algorithms, also on GPUs (slower).")] = False
    log_every: Annotated[
        int, Field(ge=0), describe("Also log loss and accuracy every N steps; 0 disables.", unit="steps")
    ] = 0

    @property
    def images_per_evaluation(self) -> int:
        """``eval_batch_size`` or its default, twice the micro-batch, as evaluation stores no gradients."""
        return self.eval_batch_size or max(1, 2 * self.batch_size // self.grad_accum_steps)


class EarlyStoppingConfig(ConfigModel):
    """Early stopping when a metric stops improving."""

    patience: Annotated[
        int | None,
        Field(ge=1),
        describe("Number of epochs without improvement after which training stops. Default: never.", unit="epochs"),
    ] = None
    metric: Annotated[Metric, describe("Metric to monitor.")] = "val/loss"
    min_delta: Annotated[float, Field(ge=0), describe("Smaller absolute changes do not count as improvement.")] = 0.0


class CheckpointConfig(ConfigModel):
    """Checkpoints for resuming: how often they are saved and how many are kept."""

    every_steps: Annotated[
        int, Field(ge=0), describe("Also save mid-epoch, every N steps; 0 disables.", unit="steps")
    ] = 0
    every_minutes: Annotated[
        float, Field(ge=0), describe("Also save mid-epoch, every N minutes; 0 disables.", unit="minutes")
    ] = 15.0
    keep: Annotated[
        int,
        Field(ge=1),
        describe(
            "Number of most recent checkpoints to keep. At least 2 are kept mid-epoch, as the newest is verified only "
            "by the step after it."
        ),
    ] = 2
    on_write_error: Annotated[
        Literal["continue", "stop"],
        describe("If a checkpoint cannot be written (disk full): continue with the previous one, or stop."),
    ] = "continue"


class TrackingConfig(ConfigModel):
    """Experiment trackers (W&B, TensorBoard). Logs in the run directory are always written."""

    trackers: Annotated[list[Literal["wandb", "tensorboard"]], describe("Trackers to log to; []: none.")] = ["wandb"]
    mode: Annotated[
        Literal["auto", "online", "offline", "disabled"],
        describe(
            "W&B mode. auto: online if logged in and the server is reachable, else offline; the environment variable "
            "WANDB_MODE takes precedence over auto."
        ),
    ] = "auto"
    project: Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH), describe("W&B project.")] = "toolkit"
    entity: Annotated[str | None, describe("W&B user or team; default: your own.")] = None
    group: Annotated[str | None, describe("W&B group; default: the recipe's name.")] = None
    run_name: Annotated[str | None, describe("W&B display name; default: recipe name and run id.")] = None
    tags: Annotated[list[str], describe("W&B tags.")] = []
    notes: Annotated[str, describe("W&B notes.")] = ""


class Expectation(ConfigModel):
    """An expected metric value for this recipe, and its source."""

    at_least: Annotated[float | None, describe("Met if the metric is at least this.")] = None
    at_most: Annotated[float | None, describe("Met if the metric is at most this.")] = None
    value: Annotated[float | None, describe("Met if the metric is within tolerance of this.")] = None
    tolerance: Annotated[float, Field(ge=0), describe("Maximum absolute difference from value.")] = 0.0
    seeds: Annotated[
        list[int], describe("Seeds for which the value was reported; other seeds are not compared. Empty: any seed.")
    ] = []
    source: Annotated[str, Field(min_length=1), describe("Source of the expected value.")]

    @model_validator(mode="after")
    def _one_bound(self) -> Expectation:
        if (self.at_least, self.at_most, self.value) == (None, None, None):
            raise ValueError("give at_least, at_most, or value with tolerance")
        return self


class SlurmConfig(ConfigModel):
    """What `toolkit submit` requests from SLURM. Command-line options override this table; it overrides the profile."""

    profile: Annotated[
        str | None,
        Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH),
        describe("Name of a cluster profile, slurm/profiles/<name>.toml."),
    ] = None
    partition: Annotated[
        str | None, Field(pattern=SLURM_WORD), describe("Partition (queue), or several, comma-separated.")
    ] = None
    account: Annotated[str | None, Field(pattern=SLURM_WORD), describe("Account to charge.")] = None
    qos: Annotated[str | None, Field(pattern=SLURM_WORD), describe("Quality of service.")] = None
    constraint: Annotated[
        str | None, Field(pattern=SLURM_FEATURES), describe("Required node features, such as a100|h100.")
    ] = None
    nodes: Annotated[int | None, Field(ge=1, le=10_000), describe("Number of nodes. Default: 1.")] = None
    gpus_per_node: Annotated[
        int | None, Field(ge=0, le=64), describe("GPUs per node, one training process each. Default: 0.")
    ] = None
    gpu_type: Annotated[str | None, Field(pattern=SLURM_WORD), describe("GPU type, as named by the cluster.")] = None
    processes_per_node: Annotated[
        int | None,
        Field(ge=1, le=256),
        describe("Without GPUs: training processes per node. Default: 1."),
    ] = None
    cpus_per_task: Annotated[
        int | None,
        Field(ge=1, le=4096),
        describe("CPUs per node (one task per node), shared by its processes. Default: that of the cluster."),
    ] = None
    memory: Annotated[
        str | None, Field(pattern=SLURM_MEMORY), describe("Memory per node, such as 64G; plain numbers are megabytes.")
    ] = None
    time: Annotated[
        str | None,
        Field(pattern=SLURM_TIME),
        describe("Time limit of each start of the job: 90 (minutes), 4:00:00 or 2-12:00:00 (days-hours)."),
    ] = None
    max_restarts: Annotated[
        int | None, Field(ge=0, le=10_000), describe("Maximum number of times the job is requeued. Default: 50.")
    ] = None
    signal: Annotated[
        Literal["USR1", "USR2", "HUP", "TERM"] | None,
        describe("Signal SLURM sends before the time limit and on preemption. Default: USR1."),
    ] = None
    signal_before_s: Annotated[
        int | None,
        Field(ge=1, le=65535),
        describe("How long before the time limit the signal is sent. Default: 120.", unit="seconds"),
    ] = None
    options: Annotated[
        list[Annotated[str, Field(pattern=SLURM_OPTION)]] | None,
        describe('Additional sbatch options, such as ["--exclusive", "--reservation=course"].'),
    ] = None


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
    slurm: Annotated[SlurmConfig | None, describe("Resources of a SLURM job.")] = None
    study: Annotated[StudyConfig | None, describe("What varies between runs, if the file is a study.")] = None
    expected_metrics: Annotated[
        dict[str, Expectation],
        describe("Expected metrics of the best model in summary.json (test_accuracy, val_loss, ...)."),
    ] = {}
    assumptions: Annotated[
        dict[str, Annotated[str, Field(pattern=r"^(report|homework|ours)(: .+)?$")]],
        Field(exclude=True),
        describe(
            'Sources of a replication\'s values, by dotted key or table ("model.convnet" = "report"): report, '
            "homework (its sheet, template or public notebook) or ours, with an optional note after a colon."
        ),
    ] = {}
