"""The tables [model] and [transfer]: the architecture, its initial weights, and which parameters are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolkit.recipe.base import EPOCHS, PIXELS, Activation, ConfigModel, FractionBelowOne

MOST_CHANNELS = 65_536
"""Maximum number of channels of a convolution, and maximum width of a hidden layer."""


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

    whiten: bool = Field(
        False,
        description="First block: initialize the convolution with the eigenvectors of the covariance of training "
        "patches and their negatives, so that its outputs are uncorrelated; channels must be 2 x input channels x "
        'kernel ** 2. Usually frozen, by transfer.freeze = ["blocks.0.conv.weight"] (Jordan 2024, arXiv:2404.00498).',
    )

    @model_validator(mode="after")
    def _padding_at_most_kernel(self) -> ConvBlock:
        if self.padding > self.kernel:
            raise ValueError(
                f"padding = {self.padding} is more than kernel = {self.kernel}: the border would be all zero"
            )
        return self


class ConvNetConfig(ConfigModel):
    """A ConvNet built from a description (`source = "toolkit"`): blocks, flatten, head."""

    blocks: list[ConvBlock] = Field(min_length=1, description="Convolution blocks, from input to output.")
    batch_norm: bool = Field(False, description="Batch norm in every block that does not override it.")
    batch_norm_momentum: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Weight of the newest batch in the running statistics of batch norm, as in PyTorch.",
    )
    batch_norm_eps: float = Field(1e-5, gt=0, le=1, description="Value added to the variance in batch norm.")
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
    init: Literal["default", "gaussian", "dirac"] = Field(
        "default",
        description="default: PyTorch's initialization. gaussian: weights of convolutions and linear layers from a "
        "normal distribution with mean 0 and standard deviation init_std, biases 0. dirac: the first filters of each "
        "convolution copy one input channel each, biases of convolutions are 0, everything else as by default "
        "(Jordan 2024).",
    )
    init_std: float = Field(0.05, gt=0, le=1000, description="gaussian: standard deviation.")

    def has_batch_norm(self, block: ConvBlock) -> bool:
        """Return whether a block has batch norm: its own setting if given, else that of the table."""
        return self.batch_norm if block.batch_norm is None else block.batch_norm

    def has_bias(self, block: ConvBlock) -> bool:
        """Return whether a block's convolution has a bias."""
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
    def _only_the_first_block_whitens(self) -> ConvNetConfig:
        if any(block.whiten for block in self.blocks[1:]):
            raise ValueError("whiten is only possible in the first block")
        return self

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

    source: Literal["toolkit", "torchvision", "timm", "plugin"] = Field(
        description="Library that provides the architecture; toolkit: defined in [model.convnet]; plugin: your own "
        "code (docs/plugins.md)."
    )
    name: str = Field(
        "convnet",
        description="Name of the architecture; `toolkit models` lists them. toolkit: convnet. plugin: its name.",
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

    @property
    def is_published(self) -> bool:
        """Whether the architecture is a library's, so that it has named weights."""
        return self.source in ("torchvision", "timm")

    @model_validator(mode="after")
    def _convnet_is_defined(self) -> ModelConfig:
        if self.source == "toolkit" and self.convnet is None:
            raise ValueError("source = 'toolkit' needs a table [model.convnet] with its blocks")
        return self


class TransferConfig(ConfigModel):
    """Which parameters are trained, and their learning-rate multipliers."""

    mode: Literal[
        "scratch",
        "finetune",
        "feature_extractor",
        "backbone_only",
        "linear_probe",
        "logistic",
        "knn",
        "gradual",
        "lp_ft",
        "norm_tuning",
        "bias",
        "lora",
    ] = Field(
        "scratch",
        description="scratch, finetune: all parameters are trained. feature_extractor: the backbone is frozen, all "
        "fully connected layers are trained. backbone_only: the backbone is trained, all fully connected layers are "
        "frozen (see new_layer). linear_probe: only the new head is trained. logistic: the new "
        "head is a logistic regression, fitted by L-BFGS on the frozen backbone's features (Kornblith et al. 2019, "
        "arXiv:1805.08974; see C). knn: k-nearest-neighbor classification on these features (Wu et al. 2018, "
        "arXiv:1805.01978; see k). gradual: like linear_probe, then layer "
        "groups are unfrozen from the top (see unfreeze_at). lp_ft: like linear_probe for probe_epochs, then all "
        "parameters are trained (Kumar et al. 2022, arXiv:2202.10054). norm_tuning: the new head and the scale and "
        "shift of all normalization layers are trained (Frankle et al. 2021, arXiv:2003.00152). bias: the new head and "
        "all biases are trained (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199). lora: the new head and "
        "low-rank updates of the frozen weights are trained (Hu et al. 2021, arXiv:2106.09685; see lora_rank). "
        "Default: finetune if model.weights is pretrained, else scratch.",
    )
    C: list[Annotated[float, Field(gt=0, le=1e12)]] = Field(
        [0.001, 0.01, 0.1, 1.0, 10.0, 100.0],
        min_length=1,
        description="logistic: inverses of the regularization strength, as in scikit-learn's LogisticRegression; the "
        "one with the highest validation accuracy is kept.",
    )
    k: list[Annotated[int, Field(ge=1, le=100_000)]] = Field(
        [1, 5, 10, 20, 50, 100, 200],
        min_length=1,
        description="knn: numbers of neighbors; the one with the highest validation accuracy is kept. Numbers above "
        "that of the training images are reduced to it.",
    )
    refit: bool = Field(
        False,
        description="logistic, knn: once C or k is chosen, fit again to the training and validation images, as in "
        "Kornblith et al. 2019. The validation metrics are those before this fit.",
    )
    lora_rank: int = Field(
        8, ge=1, le=4096, description="lora: rank of the update B A of each weight [outputs, inputs]."
    )
    lora_alpha: float = Field(
        8.0, gt=0, le=1e6, description="lora: the update is multiplied by lora_alpha / lora_rank."
    )
    lora_targets: list[str] = Field(
        ["*"],
        min_length=1,
        description="lora: patterns of the names of layers that have an update (*.attn.qkv): Linear layers, "
        "convolutions with groups = 1, and PyTorch's MultiheadAttention, whose name stands for its input projection. "
        "Default: all of these layers except the head.",
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
    probe_epochs: int | None = Field(
        None,
        ge=1,
        description="lp_ft: number of epochs, the first ones of train.epochs, in which only the new head is trained.",
        json_schema_extra=EPOCHS,
    )
    probe_lr: float | None = Field(
        None,
        gt=0,
        le=1e30,
        description="lp_ft: constant learning rate of the probe; [scheduler] and optimizer.lr apply to the epochs "
        "after it. Default: optimizer.lr.",
    )
    probe_augment: bool = Field(
        False,
        description="lp_ft: whether random transforms, mixup and CutMix of [augment] also apply in the probe. Without "
        "them, the features of the frozen backbone are computed once.",
    )
    wise: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [],
        description="lp_ft: WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903). The best model is (1 - alpha) x the "
        "weights after the probe + alpha x those of the best epoch of fine-tuning, for the alpha in this list that is "
        "best on validation, such as [0.0, 0.25, 0.5, 0.75, 1.0]. Default: no interpolation.",
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
    layer_decay_by: Literal["layer_group", "block"] = Field(
        "layer_group",
        description="Unit of layer_decay. layer_group: the parts listed before training. block: each residual or "
        "transformer block, as timm groups them for BEiT, MAE and ConvNeXt (Bao et al. 2022, arXiv:2106.08254); the "
        "head has no decay.",
    )
    l2_sp: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="L2-SP (Li et al. 2018, arXiv:1802.01483): alpha of the loss term alpha / 2 * ||w - w0||^2, where "
        "w are the pretrained parameters that are trained, and w0 their values before training. Their weight decay is "
        "then 0; optimizer.weight_decay applies to new layers only. 0 disables.",
    )
    frozen_batch_norm: Literal["fixed", "update"] = Field(
        "fixed",
        description="Running statistics of frozen batch norm layers. fixed: as loaded. update: updated from the "
        "training data.",
    )

    @property
    def epochs_of_probe(self) -> int:
        """Number of epochs of the probe with mode lp_ft; 0 with other modes."""
        return self.probe_epochs or 0 if self.mode == "lp_ft" else 0

    @property
    def is_fitted(self) -> bool:
        """Whether the last layer is fitted to features once, instead of trained by the optimizer."""
        return self.mode in ("logistic", "knn")
