"""The recipe language: one class a TOML table, one field a key.

This module is the single home of every key: its name, type, unit, default, range and meaning. The
loader, the checker, the JSON Schema, ``docs/recipes.md`` and the resolved recipe of every run are all
derived from it. Nothing here imports torch, so that a recipe is checked in a fraction of a second.

Units are the field's: epochs for periods of time, images for batch sizes, pixels for lengths,
fractions (0..1) for probabilities and accuracies.
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
"""Channels of a convolution and width of a hidden layer, at most."""


class ExperimentConfig(ConfigModel):
    """Name, seed and whereabouts of the experiment."""

    name: Annotated[
        str,
        Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH),
        describe("Name of the experiment; its runs lie in <run_root>/<name>/."),
    ]
    description: Annotated[str, describe("One line for tables, reports and people.")] = ""
    seed: Annotated[
        int,
        Field(ge=0, lt=2**32),
        describe("Seeds initialisation, order of examples and augmentation. The split has a seed of its own."),
    ] = 0
    run_root: Annotated[str, Field(min_length=1), describe("Folder that receives the run directories.")] = "runs"


class SplitConfig(ConfigModel):
    """How training, validation and test images are told apart. A function of the recipe alone."""

    method: Annotated[
        Literal["auto", "official", "stratified", "random", "alternate"],
        describe(
            "official: the data set's own validation list. stratified: the same share of every class. random: any "
            "images. alternate: odd positions of the list validate, even ones train. "
            "auto: official where there is one, else stratified."
        ),
    ] = "auto"
    validation: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)],
        describe(
            "Share (0..1) or number of the training images kept for validation. 0: no validation split, whatever the "
            'method; needs train.best_metric = "last".'
        ),
    ] = 0.1
    test: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] | Literal["auto"],
        describe(
            "Share (0..1) or number of images kept for the test, if the data set has no test list of its own. "
            "0: no test split; a test list of the data set's own is not used either. auto: 0.2, but no test split if "
            "the data set has a validation list and no test list."
        ),
    ] = "auto"
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**32)] | Literal["recipe.seed"],
        describe(
            'Seeds the drawing; apart from recipe.seed, so that runs of several seeds share one split. "recipe.seed": '
            "the same number, so that each seed has a split of its own."
        ),
    ] = 0


class NormalizeValues(ConfigModel):
    """Normalisation by stated values."""

    mean: Annotated[
        list[Annotated[float, Field(ge=-10, le=10)]],
        Field(min_length=1, max_length=4),
        describe("Mean of each channel, pixels in 0..1."),
    ]
    std: Annotated[
        list[Annotated[float, Field(ge=1e-4, le=1e4)]],
        Field(min_length=1, max_length=4),
        describe("Deviation of each channel, pixels in 0..1."),
    ]


class DataConfig(ConfigModel):
    """Which images, how they are split, and how an image becomes the model's input."""

    dataset: Annotated[
        Literal["digits", "cifar10", "cifar100", "fashion_mnist", "caltech101", "imagefolder"],
        describe("Name of the data set; `toolkit datasets` explains each."),
    ]
    root: Annotated[str, Field(min_length=1), describe("Folder of the data; `digits` needs none.")] = "data"
    download: Annotated[bool, describe("Fetch the data where it is missing and can be fetched.")] = True
    split: Annotated[SplitConfig, describe("How training, validation and test images are told apart.")] = SplitConfig()
    images_per_class: Annotated[
        int | None,
        Field(ge=1),
        describe("Keep only the first so many training and validation images of each class.", unit="images"),
    ] = None
    test_images_per_class: Annotated[
        int | None, Field(ge=1), describe("Keep only the first so many test images of each class.", unit="images")
    ] = None
    class_folders: Annotated[
        Literal["auto", "top", "leaf"],
        describe(
            "imagefolder: which folders are classes. top: those directly in data.root or in a split's folder, with all "
            'images below them. leaf: every folder that holds images itself, named by its path, such as "a/abbey". '
            "auto: top, but refuse folders in which only further folders hold images."
        ),
    ] = "auto"
    background_class: Annotated[bool, describe("caltech101: keep BACKGROUND_Google as a class.")] = False
    channels: Annotated[
        Literal[1, 3] | None,
        describe(
            "Channels of the model's input; greyscale is repeated, colour averaged. "
            "Default: 3, digits and fashion_mnist 1."
        ),
    ] = None
    image_size: Annotated[
        Annotated[int, Field(ge=4, le=4096)] | None,
        describe(
            "Height and width of the model's input. "
            "Default: what the weights were trained with, else the data set's own.",
            unit="pixels",
        ),
    ] = None
    resize: Annotated[
        Annotated[int, Field(ge=4, le=4096)]
        | Annotated[list[Annotated[int, Field(ge=4, le=4096)]], Field(min_length=2, max_length=2)]
        | Literal["none"]
        | None,
        describe(
            "Before the crop: length of the short side, or [height, width] whatever the aspect, or none. "
            "Default: what the weights expect (some fix both sides, or the long side and pad the image), "
            "else image_size / 0.875 (small images: image_size).",
            unit="pixels",
        ),
    ] = None
    crop: Annotated[
        Literal["center", "none"],
        describe("Crop to image_size after the resize, or require that the resize gave that size."),
    ] = "center"
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic"] | None,
        describe("Of the resize. Default: what the weights expect, else bilinear."),
    ] = None
    normalize: Annotated[
        Literal["auto", "imagenet", "half", "dataset", "none"] | NormalizeValues,
        describe(
            "auto: what the weights expect, else half. imagenet: its mean and deviation. half: 0.5 and 0.5. "
            "dataset: computed from the training images. Or { mean = [...], std = [...] }."
        ),
    ] = "auto"
    exif: Annotated[
        Literal["apply", "ignore"],
        describe(
            "The orientation that cameras and phones store in image files. apply: images are turned upright, as people "
            "see them. ignore: pixels stay as they are stored, as in torchvision and timm."
        ),
    ] = "apply"
    value_range: Annotated[
        Annotated[list[float], Field(min_length=2, max_length=2)] | Literal["auto"],
        describe(
            "[BLACK, WHITE]: the values that become 0 and 255 in images with more than 8 bits per sample (16-bit, "
            "32-bit, float). auto: one range for the whole data set, by its largest value: 0 to 255, 1023, 4095, 16383 "
            "or 65535; float images 0 to 1; training does not begin where the values leave this in doubt."
        ),
    ] = "auto"
    workers: Annotated[
        Annotated[int, Field(ge=0, le=1024)] | Literal["auto"],
        describe("Processes that prepare images, for each training process; auto: by the CPUs that were granted."),
    ] = "auto"
    on_bad_image: Annotated[
        Literal["error", "skip"],
        describe("A file that is no readable image: stop and name it, or leave it out everywhere and count it."),
    ] = "error"
    max_bad_fraction: Annotated[Fraction, describe("With on_bad_image = skip: refuse beyond this share.")] = 0.01
    cache: Annotated[
        Literal["auto", "off", "disk", "memory", "device"],
        describe(
            "Work that cannot change (decoding, resizing, features of frozen layers) is done once and kept in the "
            "cache folder; its images are held on disk, in memory or on the device, or the next of these that has "
            "room. auto: where it pays and fits. off: nothing is kept."
        ),
    ] = "auto"
    fixed_views: Annotated[
        int | None,
        Field(ge=1, le=1000),
        describe(
            "Only so many augmented versions of each training image, which take turns: epoch e has version e mod "
            "views. Makes features of frozen layers possible with augmentation. Default: a new version each epoch."
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
        """``value_range`` as two numbers; None: it is still to be found."""
        return None if self.value_range == "auto" else (self.value_range[0], self.value_range[1])


class TransformConfig(BaseModel):
    """One augmentation: a torchvision.transforms.v2 class by name, with that class's own arguments beside it."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    name: Annotated[str, describe("A class of torchvision.transforms.v2; `toolkit transforms` lists them.")]
    apply_p: Annotated[Fraction, describe("Probability that it is applied to an image at all.")] = 1.0
    stage: Annotated[
        Literal["before_resize", "before_crop", "crop", "resize_crop", "after_crop", "tensor"] | None,
        describe(
            "Where it stands: before_resize, before_crop (after the resize), crop (in place of the crop), "
            "resize_crop (in place of both), after_crop, tensor (after scaling to 0..1, before normalisation). "
            "Default: after_crop; for transforms that need a tensor, tensor."
        ),
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The class's own arguments."""
        return dict(self.model_extra or {})


class AugmentConfig(ConfigModel):
    """Random changes of the images, for each split apart, and mixing of examples."""

    train: Annotated[list[TransformConfig], describe("Applied to training images, in this order.")] = []
    validation: Annotated[list[TransformConfig], describe("Applied to validation images.")] = []
    test: Annotated[list[TransformConfig], describe("Applied to test images.")] = []
    auto_augment: Annotated[
        str | None,
        describe("A timm policy string such as rand-m9-mstd0.5, augmix-m3-w3 or original, after the crop."),
    ] = None
    random_erasing: Annotated[
        Fraction, describe("Probability that a rectangle of a training image is erased (after normalisation).")
    ] = 0.0
    run_on: Annotated[
        Literal["auto", "workers", "device"],
        describe(
            "device: for whole batches, where the model trains. workers: image by image, by data.workers. auto: device "
            "where every transform of the split can be made so (the log names what prevents it), else workers up to "
            "the crop or, where what follows cannot be made for batches either, to the end. The two draw other random "
            "numbers."
        ),
    ] = "auto"
    mixup: Annotated[
        float, Field(ge=0, le=1000), describe("Alpha of mixup's Beta(alpha, alpha); 0 is off (Zhang et al. 2018).")
    ] = 0.0
    cutmix: Annotated[
        float, Field(ge=0, le=1000), describe("Alpha of CutMix's Beta(alpha, alpha); 0 is off (Yun et al. 2019).")
    ] = 0.0
    mixup_prob: Annotated[Fraction, describe("Probability that a batch is mixed at all.")] = 1.0
    mixup_switch_prob: Annotated[Fraction, describe("Where both are on: share of mixed batches that CutMix takes.")] = (
        0.5
    )
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1), describe("Probability mass spread evenly over all classes in the training loss.")
    ] = 0.0


class HeadConfig(ConfigModel):
    """The new classifier on top of the backbone."""

    hidden: Annotated[
        list[Annotated[int, Field(ge=1, le=MOST_CHANNELS)]], describe("Widths of hidden layers; none by default.")
    ] = []
    batch_norm: Annotated[
        bool,
        describe(
            "Batch norm after each hidden layer. Without hidden layers: one before the last layer, without weight and "
            "bias and with eps 1e-6, as MAE's linear probe has it (He et al. 2022)."
        ),
    ] = False
    bias: Annotated[
        Literal["auto"] | bool,
        describe(
            "Whether hidden layers have a bias. auto: where no batch norm follows. The last layer always has one."
        ),
    ] = "auto"
    activation: Annotated[Activation, describe("After each hidden layer.")] = "relu"
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)], describe("Before the last layer, and after each hidden one.")
    ] = 0.0
    scope: Annotated[
        Literal["last_layer", "classifier"],
        describe(
            "last_layer: only the last Linear is replaced. classifier: all fully connected layers "
            "and the pooling before them (VGG, AlexNet)."
        ),
    ] = "last_layer"

    @property
    def has_bias(self) -> bool:
        """Whether hidden layers have a bias."""
        return not self.batch_norm if self.bias == "auto" else self.bias


class ConvBlock(ConfigModel):
    """One block of a ConvNet: a convolution and what follows it."""

    channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS), describe("Output channels.")]
    kernel: Annotated[int, Field(ge=1, le=63), describe("Kernel size.", unit="pixels")] = 3
    stride: Annotated[int, Field(ge=1, le=4096), describe("Stride.", unit="pixels")] = 1
    padding: Annotated[int, Field(ge=0, le=63), describe("Zero padding; kernel at most.", unit="pixels")] = 1
    batch_norm: Annotated[bool | None, describe("Batch norm in this block. Default: the table's.")] = None
    pool: Annotated[int, Field(ge=0, le=4096), describe("Max pooling window and stride; 0 is none.", unit="pixels")] = 0
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        describe("Dropout at the place `order` gives it. Default: the table's."),
    ] = None

    @model_validator(mode="after")
    def _padding_sees_pixels(self) -> ConvBlock:
        if self.padding > self.kernel:
            raise ValueError(
                f"padding = {self.padding} is more than kernel = {self.kernel}: the border would be all zero"
            )
        return self


class ConvNetConfig(ConfigModel):
    """A ConvNet by description, for `source = "toolkit"`: blocks, flatten, head."""

    blocks: Annotated[list[ConvBlock], Field(min_length=1), describe("The convolution blocks, input first.")]
    batch_norm: Annotated[bool, describe("Batch norm in every block that does not say otherwise.")] = False
    bias: Annotated[
        Literal["auto"] | bool,
        describe(
            "Whether convolutions have a bias. auto: not where batch norm follows with nothing but pooling between, "
            "as it takes any bias away again."
        ),
    ] = "auto"
    dropout: Annotated[
        Annotated[float, Field(ge=0, lt=1)], describe("Dropout in every block that does not say otherwise.")
    ] = 0.0
    order: Annotated[
        list[Literal["conv", "norm", "pool", "act", "dropout"]],
        Field(min_length=1),
        describe("Order of the layers in a block."),
    ] = ["conv", "norm", "act", "pool", "dropout"]
    activation: Annotated[Activation, describe("Of all blocks.")] = "relu"
    init: Annotated[
        Literal["default", "gaussian"],
        describe(
            "default: PyTorch's. gaussian: weights of convolutions and linear layers from N(0, init_std), biases 0."
        ),
    ] = "default"
    init_std: Annotated[float, Field(gt=0, le=1000), describe("Standard deviation of the Gaussian.")] = 0.05

    def has_batch_norm(self, block: ConvBlock) -> bool:
        """Whether a block has batch norm, by its own word or the table's."""
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
        """A block's dropout, by its own word or the table's."""
        return self.dropout if block.dropout is None else block.dropout

    @model_validator(mode="after")
    def _order_complete(self) -> ConvNetConfig:
        if len(set(self.order)) != len(self.order) or "conv" not in self.order:
            raise ValueError("order must hold conv, and each layer once at most")
        used = {
            "norm": any(self.has_batch_norm(b) for b in self.blocks),
            "pool": any(b.pool for b in self.blocks),
            "dropout": any(self.dropout_of(b) for b in self.blocks),
        }
        missing = [layer for layer, is_used in used.items() if is_used and layer not in self.order]
        if missing:
            raise ValueError(f"order leaves out {', '.join(missing)}, which a block asks for")
        return self


class ModelConfig(ConfigModel):
    """The architecture and its weights."""

    source: Annotated[
        Literal["toolkit", "torchvision", "timm"],
        describe("Where the architecture comes from; toolkit: described in [model.convnet]."),
    ]
    name: Annotated[
        str, describe("Name of the architecture; `toolkit models` lists them. With source = toolkit: convnet.")
    ] = "convnet"
    weights: Annotated[
        str,
        describe(
            "none; a torchvision weights name (IMAGENET1K_V2, DEFAULT); a timm tag (in1k, DEFAULT); "
            "or file:PATH of a state dict (.safetensors, .pth, .pt), or package:NAME/PATH inside an installed package."
        ),
    ] = "none"
    weights_key: Annotated[
        str | None,
        describe(
            "For a weights file that holds more than one model: the entry to take (state_dict_ema), or the prefix of "
            "its parameters' names (module.encoder_q). Default: state_dict, model, ..., and the one prefix that fits."
        ),
    ] = None
    args: Annotated[
        dict[str, Any], describe("Further arguments of the architecture's own constructor, such as drop_path_rate.")
    ] = {}
    stem: Annotated[
        Literal["imagenet", "small"],
        describe(
            "small: ResNets begin with a 3x3 convolution of stride 1 and no pooling, for images of 32 pixels or so."
        ),
    ] = "imagenet"
    convnet: Annotated[ConvNetConfig | None, describe("The ConvNet, with source = toolkit.")] = None
    head: Annotated[HeadConfig, describe("The new classifier on top.")] = HeadConfig()

    @model_validator(mode="after")
    def _convnet_where_due(self) -> ModelConfig:
        if self.source == "toolkit" and self.convnet is None:
            raise ValueError("source = 'toolkit' needs a table [model.convnet] with its blocks")
        return self


class TransferConfig(ConfigModel):
    """Which parameters train, and how fast."""

    mode: Annotated[
        Literal["scratch", "finetune", "feature_extractor", "backbone_only", "linear_probe", "gradual"],
        describe(
            "scratch, finetune: everything trains. feature_extractor: the backbone is frozen, every fully connected "
            "layer trains. backbone_only: the reverse. linear_probe: only the new head trains. "
            "gradual: as linear_probe, then stage after stage from the top. "
            "Default: finetune where model.weights names pretrained ones, else scratch."
        ),
    ] = "scratch"
    freeze: Annotated[
        list[str], describe("Also freeze parameters whose name matches one of these patterns (features.0.*).")
    ] = []
    train: Annotated[
        list[str], describe("Also train parameters whose name matches one of these patterns; has the last word.")
    ] = []
    new_layer: Annotated[
        Literal["train", "freeze"],
        describe("backbone_only: whether the new last layer trains or stays at its random start too."),
    ] = "train"
    unfreeze_at: Annotated[
        list[Annotated[int, Field(ge=1)]],
        describe("gradual: the epochs at whose start one more stage, from the top, begins to train.", unit="epochs"),
    ] = []
    backbone_lr: Annotated[
        float, Field(gt=0, le=1e6), describe("Learning rate of the pretrained part, as a multiple of optimizer.lr.")
    ] = 1.0
    head_lr: Annotated[
        float, Field(gt=0, le=1e6), describe("Learning rate of the new head, as a multiple of optimizer.lr.")
    ] = 1.0
    layer_decay: Annotated[
        float,
        Field(gt=0, le=1),
        describe(
            "Learning rate of each stage, as a multiple of the stage above it (Clark et al. 2020, ELECTRA); 1 is off."
        ),
    ] = 1.0
    frozen_batch_norm: Annotated[
        Literal["fixed", "update"],
        describe(
            "Statistics of batch norms whose parameters are frozen: as they were loaded, or updated from the data."
        ),
    ] = "fixed"


class OptimizerConfig(ConfigModel):
    """How parameters move."""

    name: Annotated[
        str, describe("sgd, nag, adam, adamw (PyTorch's), or any timm optimiser; `toolkit optimizers` lists them.")
    ] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e30), describe("Learning rate, at its height.")]
    momentum: Annotated[
        float | None, Field(ge=0, lt=1), describe("sgd, nag and optimisers that take one. Default 0.9 for sgd and nag.")
    ] = None
    weight_decay: Annotated[
        float, Field(ge=0, le=1e6), describe("L2 penalty (sgd, nag, adam) or decoupled decay (adamw and most others).")
    ] = 0.0
    decay_bias_and_norm: Annotated[
        bool, describe("Whether weight decay also acts on biases and normalisation layers.")
    ] = True
    args: Annotated[
        dict[str, Any], describe("Further arguments of the optimiser, such as betas = [0.9, 0.99] or eps.")
    ] = {}


class SchedulerConfig(ConfigModel):
    """The learning rate over time, as a function of epochs alone."""

    name: Annotated[
        Literal["constant", "step", "exponential", "cosine", "one_cycle", "plateau"],
        describe(
            "step: times gamma every step_size epochs. exponential: times gamma every epoch. "
            "plateau: times gamma when the metric rests."
        ),
    ] = "constant"
    step_size: Annotated[int | None, Field(ge=1), describe("step: its period.", unit="epochs")] = None
    gamma: Annotated[
        float | None, Field(gt=0, le=1), describe("step (default 0.1), exponential (0.95), plateau (0.1): the factor.")
    ] = None
    min_lr: Annotated[float, Field(ge=0), describe("cosine, plateau: never below this.")] = 0.0
    warmup_epochs: Annotated[
        float, Field(ge=0), describe("Linear rise from warmup_start_factor x lr at the beginning.", unit="epochs")
    ] = 0.0
    warmup_start_factor: Annotated[Fraction, describe("Where the rise begins, as a share of lr.")] = 0.01
    metric: Annotated[Metric, describe("plateau: what it watches.")] = "val/loss"
    patience: Annotated[
        int, Field(ge=0), describe("plateau: epochs without improvement that are tolerated.", unit="epochs")
    ] = 5
    threshold: Annotated[float, Field(ge=0), describe("plateau: smaller changes are no improvement.")] = 1e-4
    threshold_mode: Annotated[
        Literal["rel", "abs"],
        describe("plateau: threshold is a share of the best value so far (rel) or in units of the metric (abs)."),
    ] = "rel"
    pct_start: Annotated[
        Annotated[float, Field(gt=0, lt=1)],
        describe("one_cycle: share of the epochs at which lr is reached (Smith 2018)."),
    ] = 0.3
    start_factor: Annotated[float, Field(gt=0, le=1), describe("one_cycle: first learning rate, as a share of lr.")] = (
        0.04
    )
    end_factor: Annotated[float, Field(gt=0, le=1), describe("one_cycle: last learning rate, as a share of lr.")] = 4e-6

    @model_validator(mode="after")
    def _step_has_a_period(self) -> SchedulerConfig:
        if self.name == "step" and self.step_size is None:
            raise ValueError("name = 'step' needs step_size (epochs)")
        return self


class TrainConfig(ConfigModel):
    """The loop."""

    epochs: Annotated[
        int, Field(ge=1, le=1_000_000), describe("Passes over the training images, at most.", unit="epochs")
    ]
    batch_size: Annotated[
        int,
        Field(ge=1),
        describe("Images per optimiser step, over all processes and accumulation steps.", unit="images"),
    ]
    eval_batch_size: Annotated[
        int | None,
        Field(ge=1),
        describe(
            "Images per evaluation step, over all processes. Default: twice batch_size / accumulation; a GPU without "
            "memory for so many takes them in smaller parts.",
            unit="images",
        ),
    ] = None
    grad_accum_steps: Annotated[
        int, Field(ge=1), describe("Parts into which a batch is divided, one after the other, to save memory.")
    ] = 1
    drop_last: Annotated[bool, describe("Leave out the last, smaller batch of an epoch.")] = False
    precision: Annotated[
        Literal["auto", "no", "fp16", "bf16"],
        describe("Mixed precision; auto: bf16 on GPUs that compute in it, else (and on CPUs) no; the log says why."),
    ] = "auto"
    best_metric: Annotated[
        Selection,
        describe(
            "How the epoch whose weights are kept is chosen: the best by this figure (equal accuracies are decided by "
            "val/loss, equal losses by val/accuracy, then the earlier epoch wins), or last, the last one."
        ),
    ] = "val/accuracy"
    max_grad_norm: Annotated[float | None, Field(gt=0), describe("Clip the gradient to this L2 norm.")] = None
    ema: Annotated[
        float | None,
        Field(gt=0, lt=1),
        describe(
            "Decay, per step, of an exponential moving average of the weights, which is then what is evaluated and "
            "kept. It rises to this value from 0 (at step n it is at most 1 - n ** (-2/3), as timm's ModelEmaV3)."
        ),
    ] = None
    class_weights: Annotated[
        Literal["none", "balanced"],
        describe(
            "balanced: training loss weighted by the inverse frequency of the class; of a mixed or smoothed target "
            "each class's share by its own weight, as torch's cross_entropy does."
        ),
    ] = "none"
    sampling: Annotated[
        Literal["shuffle", "balanced"],
        describe("shuffle: every image once an epoch. balanced: classes drawn evenly, with replacement."),
    ] = "shuffle"
    sync_batch_norm: Annotated[
        bool,
        describe(
            "Batch norm over the whole batch of all processes. false: each process normalizes by its own images, so "
            "that another number of processes is another experiment."
        ),
    ] = True
    channels_last: Annotated[bool, describe("Memory format of images and convolutions; faster on most hardware.")] = (
        True
    )
    compile: Annotated[bool, describe("Compile the model with torch.compile.")] = False
    cuda_graphs: Annotated[
        bool,
        describe(
            'Compile the model and replay its kernels as CUDA graphs (mode "reduce-overhead"): for small models, whose '
            "kernels are over before the next is launched. GPUs only."
        ),
    ] = False
    deterministic: Annotated[bool, describe("Only deterministic algorithms, also on a GPU (slower).")] = False
    log_every: Annotated[
        int, Field(ge=0), describe("Also log loss and accuracy every so many steps; 0 is off.", unit="steps")
    ] = 0

    @property
    def images_per_evaluation(self) -> int:
        """eval_batch_size, or its default: without gradients more fits than in training."""
        return self.eval_batch_size or max(1, 2 * self.batch_size // self.grad_accum_steps)


class EarlyStoppingConfig(ConfigModel):
    """Stop when the metric no longer improves."""

    patience: Annotated[
        int | None,
        Field(ge=1),
        describe("Epochs without improvement after which training stops; without it, never.", unit="epochs"),
    ] = None
    metric: Annotated[Metric, describe("What is watched.")] = "val/loss"
    min_delta: Annotated[float, Field(ge=0), describe("Smaller absolute changes are no improvement.")] = 0.0


class CheckpointConfig(ConfigModel):
    """What is kept to go on after a stop."""

    every_steps: Annotated[
        int, Field(ge=0), describe("Also within an epoch, every so many steps; 0 is off.", unit="steps")
    ] = 0
    every_minutes: Annotated[
        float, Field(ge=0), describe("Also within an epoch, after so much time; 0 is off.", unit="minutes")
    ] = 15.0
    keep: Annotated[
        int,
        Field(ge=1),
        describe(
            "How many of the last checkpoints are kept. Within an epoch at least 2: the next step proves the newest."
        ),
    ] = 2
    on_write_error: Annotated[
        Literal["continue", "stop"],
        describe("A checkpoint that cannot be written (disk full): go on with the one before, or stop."),
    ] = "continue"


class TrackingConfig(ConfigModel):
    """Who else is told: W&B, TensorBoard. The run directory is always written."""

    trackers: Annotated[list[Literal["wandb", "tensorboard"]], describe("Which trackers; [] is none.")] = ["wandb"]
    mode: Annotated[
        Literal["auto", "online", "offline", "disabled"],
        describe(
            "W&B: auto is online where there is a login and a server, else offline. "
            "WANDB_MODE has precedence over auto."
        ),
    ] = "auto"
    project: Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH), describe("W&B project.")] = "toolkit"
    entity: Annotated[str | None, describe("W&B user or team; default: your own.")] = None
    group: Annotated[str | None, describe("W&B group; default: the recipe's name.")] = None
    run_name: Annotated[str | None, describe("W&B display name; default: recipe name and run id.")] = None
    tags: Annotated[list[str], describe("W&B tags.")] = []
    notes: Annotated[str, describe("W&B notes.")] = ""


class Expectation(ConfigModel):
    """A figure that a run of this recipe should reach, and who says so."""

    at_least: Annotated[float | None, describe("Met when the figure is this or more.")] = None
    at_most: Annotated[float | None, describe("Met when the figure is this or less.")] = None
    value: Annotated[float | None, describe("Met when the figure is within tolerance of this.")] = None
    tolerance: Annotated[float, Field(ge=0), describe("For value.")] = 0.0
    seeds: Annotated[
        list[int], describe("Seeds for which it was stated; other seeds are not comparable. Empty: any.")
    ] = []
    source: Annotated[str, Field(min_length=1), describe("Where the figure comes from.")]

    @model_validator(mode="after")
    def _one_bound(self) -> Expectation:
        if (self.at_least, self.at_most, self.value) == (None, None, None):
            raise ValueError("give at_least, at_most, or value with tolerance")
        return self


class SlurmConfig(ConfigModel):
    """What `toolkit submit` asks of SLURM. Options of the command win over this table, this table over the profile."""

    profile: Annotated[
        str | None,
        Field(pattern=NAME_PATTERN, max_length=NAME_LENGTH),
        describe("Name of a cluster profile, slurm/profiles/<name>.toml."),
    ] = None
    partition: Annotated[str | None, Field(pattern=SLURM_WORD), describe("Partition (queue), or several by comma.")] = (
        None
    )
    account: Annotated[str | None, Field(pattern=SLURM_WORD), describe("Account that is charged.")] = None
    qos: Annotated[str | None, Field(pattern=SLURM_WORD), describe("Quality of service.")] = None
    constraint: Annotated[
        str | None, Field(pattern=SLURM_FEATURES), describe("Features that the nodes must have: a100|h100.")
    ] = None
    nodes: Annotated[int | None, Field(ge=1, le=10_000), describe("Nodes. Default: 1.")] = None
    gpus_per_node: Annotated[
        int | None, Field(ge=0, le=64), describe("GPUs of each node, one training process each. Default: 0.")
    ] = None
    gpu_type: Annotated[str | None, Field(pattern=SLURM_WORD), describe("Kind of GPU, as the cluster calls it.")] = None
    processes_per_node: Annotated[
        int | None,
        Field(ge=1, le=256),
        describe("Without GPUs: training processes on each node. Default: 1."),
    ] = None
    cpus_per_task: Annotated[
        int | None,
        Field(ge=1, le=4096),
        describe("CPUs of each node (there is one task a node), shared by its processes. Default: the cluster's."),
    ] = None
    memory: Annotated[
        str | None, Field(pattern=SLURM_MEMORY), describe("Memory of each node: 64G; plain numbers are megabytes.")
    ] = None
    time: Annotated[
        str | None,
        Field(pattern=SLURM_TIME),
        describe("Time limit of one start of the job: 90 (minutes), 4:00:00 or 2-12:00:00 (days-hours)."),
    ] = None
    max_restarts: Annotated[
        int | None, Field(ge=0, le=10_000), describe("How often the job may be requeued. Default: 50.")
    ] = None
    signal: Annotated[
        Literal["USR1", "USR2", "HUP", "TERM"] | None,
        describe("What SLURM sends before the time limit and on pre-emption. Default: USR1."),
    ] = None
    signal_before_s: Annotated[
        int | None,
        Field(ge=1, le=65535),
        describe("How long before the time limit it is sent. Default: 120.", unit="seconds"),
    ] = None
    options: Annotated[
        list[Annotated[str, Field(pattern=SLURM_OPTION)]] | None,
        describe('Further options of sbatch, such as ["--exclusive", "--reservation=course"].'),
    ] = None


class Recipe(ConfigModel):
    """A whole recipe."""

    @model_validator(mode="before")
    @classmethod
    def _pretrained_weights_are_finetuned(cls, content: Any) -> Any:
        """The default of transfer.mode depends on model.weights."""
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
    slurm: Annotated[SlurmConfig | None, describe("What a job on a cluster asks for.")] = None
    study: Annotated[StudyConfig | None, describe("What varies, where the file is a study of many runs.")] = None
    expected_metrics: Annotated[
        dict[str, Expectation],
        describe("Figures of summary.json's best model (test_accuracy, val_loss, ...) that a run should reach."),
    ] = {}
    assumptions: Annotated[
        dict[str, Annotated[str, Field(pattern=r"^(report|homework|ours)(: .+)?$")]],
        Field(exclude=True),
        describe(
            'Where the values of a replication come from, by dotted key or table ("model.convnet" = "report"): report, '
            "homework (its sheet, template or public notebook) or ours, with an optional remark after a colon."
        ),
    ] = {}
