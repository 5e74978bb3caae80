"""Transfer learning: which parameters are trained, their learning rates, and the mode of each layer.

A frozen parameter has no gradient, no weight decay and no optimizer state. A module whose parameters are all frozen
runs in evaluation mode: its batch norm statistics stay as loaded, and its dropout and stochastic depth are off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.errors import UserError
from toolkit.models.build import ModelBundle
from toolkit.models.layer_groups import LayerGroup, block_depths, is_under
from toolkit.models.lora import add_lora, base_name, is_lora
from toolkit.recipe.optimizer_schema import ParameterGroup
from toolkit.recipe.schema import OptimizerConfig, TransferConfig

NORMALIZATION_LAYERS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Transfer:
    """A model with its transfer mode applied."""

    built: ModelBundle
    table: TransferConfig
    frozen_by_pattern: frozenset[str]
    """Parameter names matched by ``freeze`` and not by ``train``; they are not unfrozen during training either."""

    @property
    def stages(self) -> list[LayerGroup]:
        """Layer groups, from input to output."""
        return self.built.stages

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that are currently trained."""
        return [name for name, p in self.built.module.named_parameters() if p.requires_grad]

    @property
    def ever_trained(self) -> list[str]:
        """Names of the parameters that are trained in some epoch: ``trainable``, and those that are unfrozen later."""
        due = len(self._unfreeze_at)
        later = self.stages[:-1][len(self.stages) - 1 - due :]
        return [
            name
            for name, parameter in self.built.module.named_parameters()
            if parameter.requires_grad or (name not in self.frozen_by_pattern and any(s.holds(name) for s in later))
        ]

    @property
    def _unfreeze_at(self) -> list[int]:
        """Epochs, from 1, at the start of which one more layer group begins to train, from the top."""
        match self.table.mode:
            case "gradual":
                return self.table.unfreeze_at
            case "lp_ft":
                return [self.table.epochs_of_probe + 1] * (len(self.stages) - 1)
            case _:
                return []

    @property
    def last_unfreezing(self) -> int:
        """Epoch, from 1, at the start of which the last layer group begins to train."""
        return max(self._unfreeze_at, default=1)

    @property
    def pretrained(self) -> list[str]:
        """Names of the parameters that are pretrained and trained in some epoch."""
        return [name for name in self.ever_trained if is_pretrained(self.built, name)]

    def train_mode(self) -> None:
        """Set trainable modules to training mode and frozen ones to evaluation mode. Call before each training pass."""
        module = self.built.module
        if self.table.is_fitted:  # these modes fit to features in evaluation mode, without training steps
            module.eval()
            return
        module.train()
        _set_frozen_eval(module)
        if self.table.frozen_batch_norm == "update":
            for layer in module.modules():
                if isinstance(layer, _BatchNorm):
                    layer.train()

    def unfreeze_for_epoch(self, epoch: int) -> bool:
        """Unfreeze the layer groups due at the start of ``epoch`` (from 1), last group first; return whether any are.

        Only the modes ``gradual`` and ``lp_ft`` unfreeze. After a change, add :func:`param_groups` to the optimizer and
        wrap the model in DDP again.
        """
        due = sum(start <= epoch for start in self._unfreeze_at)
        opened = self.stages[:-1][len(self.stages) - 1 - due :] if due else []
        changed = False
        for name, parameter in self.built.module.named_parameters():
            is_due = any(stage.holds(name) for stage in opened) and name not in self.frozen_by_pattern
            if is_due and not parameter.requires_grad:
                parameter.requires_grad_(True)
                changed = True
        return changed


@dataclass(frozen=True)
class LayerGroupSummary:
    """One row of the layer group table shown before training."""

    name: str
    parameters: int
    trainable: int
    lr: float
    """Peak learning rate; 0 if nothing in the group trains."""
    weight_decay: float
    batch_norm: str
    """State of batch norm: trained, fixed, or updated (frozen, but with new running statistics); "-" without any."""


def apply_transfer(built: ModelBundle, table: TransferConfig) -> Transfer:
    """Set ``requires_grad`` of all parameters and the training mode of all layers; add the factors of mode ``lora``.

    Raises UserError for a pattern without a match, if no parameter would be trained, if ``unfreeze_at`` does not fit
    the layer groups, and if a new first convolution would stay frozen.
    """
    if table.mode == "lora":
        excluded = [*built.heads, *([built.new_stem] if built.new_stem else [])]
        add_lora(built.module, table.lora_rank, table.lora_alpha, table.lora_targets, excluded)
    names = [name for name, _ in built.module.named_parameters()]
    frozen, trained = (
        _matches("transfer.freeze", table.freeze, names, built),
        _matches("transfer.train", table.train, names, built),
    )
    for name, parameter in built.module.named_parameters():
        parameter.requires_grad_(name in trained or (_trains_by_mode(built, table, name) and name not in frozen))
    transfer = Transfer(built, table, frozenset(frozen - trained))
    if table.l2_sp and not transfer.pretrained:
        raise UserError(
            f"transfer.l2_sp needs pretrained parameters that are trained, but transfer.mode = {table.mode!r} trains "
            "new layers only: set l2_sp = 0, or another mode"
        )
    if not transfer.trainable:
        raise UserError(
            f"transfer.mode = {table.mode!r} with freeze = {table.freeze} leaves nothing to train; "
            f"the layer groups are {_listed(built)}"
        )
    if table.mode == "norm_tuning" and not any(isinstance(m, NORMALIZATION_LAYERS) for m in built.module.modules()):
        raise UserError("transfer.mode = 'norm_tuning': the model has no normalization layers; use linear_probe")
    if table.mode == "bias" and not any(_is_bias(name) and not is_under(name, built.heads) for name in names):
        raise UserError("transfer.mode = 'bias': the model has no biases below its head; use linear_probe")
    _check_unfreezing(transfer)
    _check_stem(built, transfer)
    transfer.train_mode()
    return transfer


def _trains_by_mode(built: ModelBundle, table: TransferConfig, name: str) -> bool:
    """Return whether the mode alone, without patterns, trains a parameter from the start."""
    is_head, is_classifier = is_under(name, built.heads), is_under(name, built.classifier)
    match table.mode:
        case "scratch" | "finetune":
            return True
        case "feature_extractor":
            return is_classifier
        case "backbone_only":
            return not is_classifier or (is_head and table.new_layer == "train")
        case "linear_probe" | "logistic" | "knn" | "gradual" | "lp_ft":
            return is_head
        case "bias":
            return is_head or _is_bias(name)
        case "lora":
            return is_head or is_lora(name)
        case "norm_tuning":
            return is_head or isinstance(built.module.get_submodule(name.rpartition(".")[0]), NORMALIZATION_LAYERS)


def is_pretrained(built: ModelBundle, name: str) -> bool:
    """Return whether a pretrained model's parameter has pretrained values: not in a new head or first convolution."""
    return not is_under(name, [*built.heads, *([built.new_stem] if built.new_stem else [])])


def _is_bias(name: str) -> bool:
    """Return whether a parameter is a bias: ``bias``, or one of attention such as ``in_proj_bias`` and ``q_bias``."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def _matches(key: str, patterns: list[str], names: list[str], built: ModelBundle) -> set[str]:
    """Return the names matched by any of the patterns. Raises UserError for a pattern that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(base_name(name), pattern)}
        if not matched:
            raise UserError(
                f"{key}: no parameter's name matches {pattern!r}; names are like {names[0]}, {names[-1]}, "
                f"and the layer groups are {_listed(built)}"
            )
        found |= matched
    return found


def _listed(built: ModelBundle) -> str:
    return ", ".join("/".join(stage.prefixes) for stage in built.stages)


def _check_unfreezing(transfer: Transfer) -> None:
    built, table = transfer.built, transfer.table
    if table.mode == "lp_ft" and table.probe_epochs is None:
        raise UserError(
            "transfer.mode = 'lp_ft' needs probe_epochs, the number of epochs in which only the head is trained"
        )
    if table.mode == "lp_ft" and transfer.ever_trained == transfer.trainable:
        raise UserError(
            f"transfer.mode = 'lp_ft' with freeze = {table.freeze} and train = {table.train} trains the same "
            "parameters after the probe as in it"
        )
    if table.mode != "gradual":
        return
    if not table.unfreeze_at:
        raise UserError(
            "transfer.mode = 'gradual' needs unfreeze_at: the epochs at which one more layer group begins to train"
        )
    if len(table.unfreeze_at) > len(built.stages) - 1:
        raise UserError(
            f"transfer.unfreeze_at has {len(table.unfreeze_at)} epochs, but {len(built.stages) - 1} layer groups are "
            f"below the head: {_listed(built)}"
        )


def _check_stem(built: ModelBundle, transfer: Transfer) -> None:
    """Raise UserError if a new first convolution would stay frozen at its random initialization."""
    stem = built.new_stem
    if stem and not any(is_under(name, [stem]) for name in transfer.trainable):
        raise UserError(
            f"{stem} is new (model.stem = 'small') and would stay frozen at its random initialization; "
            f'add transfer.train = ["{stem}.*"]'
        )


def _set_frozen_eval(module: nn.Module) -> None:
    """Recursively set fully frozen submodules to evaluation mode; ``module`` itself is not fully frozen.

    A child without parameters, such as dropout, gets the mode of the next child that has parameters.
    """
    children = list(module.children())
    is_next_frozen = False
    for child in reversed(children):
        parameters = list(child.parameters())
        if parameters:
            is_next_frozen = not any(p.requires_grad for p in parameters)
        if is_next_frozen:
            child.eval()
        else:
            _set_frozen_eval(child)


def param_groups(
    built: ModelBundle,
    table: TransferConfig,
    optimizer: OptimizerConfig,
    groups: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups for trainable parameters that are in none of ``groups`` yet, input first.

    Each group has params, lr, weight_decay, name and lr_scale, the multiple of optimizer.lr that a scheduler must keep.
    """
    names = [name for name, _ in built.module.named_parameters()]
    _matches("optimizer.groups", [own.pattern for own in optimizer.groups], names, built)
    own = [ParameterGroup(pattern="*"), *optimizer.groups]  # the first one is for names that no pattern matches
    known = {id(p) for group in groups for p in group["params"]}
    found = []
    for title, inside, lr_scale in _lr_groups(built, table):
        divided: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in built.module.named_parameters():
            if name in inside and parameter.requires_grad and id(parameter) not in known:
                number = _own_group(optimizer, name)
                has_decay = own[number].weight_decay is not None or _has_decay(built, table, optimizer, name, parameter)
                divided.setdefault((number, not has_decay), []).append(parameter)
        for number, is_exempt in sorted(divided):
            scale, decay = lr_scale * own[number].lr_scale, own[number].weight_decay
            suffix = f", {own[number].pattern}" if number else ""
            found.append(
                {
                    "params": divided[number, is_exempt],
                    "lr": optimizer.lr * scale,
                    "lr_scale": scale,
                    "weight_decay": 0.0 if is_exempt else optimizer.weight_decay if decay is None else decay,
                    "name": f"{title}{suffix}{' (no decay)' if is_exempt else ''}",
                }
            )
    return found


def _own_group(optimizer: OptimizerConfig, name: str) -> int:
    """Return the number, from 1, of the first parameter group that matches a parameter's name; 0 if none does."""
    numbered = enumerate(optimizer.groups, 1)
    return next((number for number, group in numbered if fnmatchcase(base_name(name), group.pattern)), 0)


def _has_decay(
    built: ModelBundle, table: TransferConfig, optimizer: OptimizerConfig, name: str, parameter: nn.Parameter
) -> bool:
    """Return whether weight decay applies to a parameter; for pretrained parameters, L2-SP replaces it."""
    is_exempt = not optimizer.decay_bias_and_norm and parameter.ndim <= 1
    return not is_exempt and not (table.l2_sp and is_pretrained(built, name))


def describe_groups(built: ModelBundle, optimizer: OptimizerConfig) -> list[str]:
    """Return a line for each of optimizer.groups: its pattern, its number of trained parameters, and its settings."""
    counts = [0] * (len(optimizer.groups) + 1)
    for name, parameter in built.module.named_parameters():
        counts[_own_group(optimizer, name)] += parameter.numel() if parameter.requires_grad else 0
    return [
        f"{group.pattern}: {count:,} trainable parameters, learning rate x {group.lr_scale:g}"
        + ("" if group.weight_decay is None else f", weight decay {group.weight_decay:.3g}")
        for group, count in zip(optimizer.groups, counts[1:], strict=True)
    ]


def _lr_scales(built: ModelBundle, table: TransferConfig) -> list[float]:
    """Return the learning rate of each layer group as a multiple of optimizer.lr, from input to output."""
    below = len(built.stages) - 1
    return [*(table.backbone_lr * table.layer_decay ** (below - index) for index in range(below)), table.head_lr]


def _lr_groups(built: ModelBundle, table: TransferConfig) -> list[tuple[str, set[str], float]]:
    """Return name, parameter names and learning-rate multiple of the groups with one learning rate, input first.

    With layer_decay_by = "block", a layer group with several blocks is divided.
    """
    depths = block_depths(built.module, built.stages) if table.layer_decay_by == "block" else {}
    groups = []
    for stage, lr_scale in zip(built.stages, _lr_scales(built, table), strict=True):
        inside = {name for name, _ in built.module.named_parameters() if stage.holds(name)}
        if not depths or stage is built.stages[-1]:
            groups.append((stage.name, inside, lr_scale))
            continue
        for depth in sorted({depths[name] for name in inside}, reverse=True):
            names = {name for name in inside if depths[name] == depth}
            title = f"{stage.name}, {depth} blocks below the head"
            groups.append((title, names, table.backbone_lr * table.layer_decay**depth))
    return groups


def layer_group_table(transfer: Transfer, optimizer: OptimizerConfig) -> list[LayerGroupSummary]:
    """Return one row per layer group, from input to output; with decay by block, the highest rate of its blocks."""
    of_groups = _lr_groups(transfer.built, transfer.table)
    scales = [max(scale for _, names, scale in of_groups if any(map(stage.holds, names))) for stage in transfer.stages]
    return [_row(transfer, stage, scale, optimizer) for stage, scale in zip(transfer.stages, scales, strict=True)]


def _row(transfer: Transfer, stage: LayerGroup, lr_scale: float, optimizer: OptimizerConfig) -> LayerGroupSummary:
    module = transfer.built.module
    inside = {name: p for name, p in module.named_parameters() if stage.holds(name)}
    trainable = sum(p.numel() for p in inside.values() if p.requires_grad)
    has_decay = trainable and not (transfer.table.l2_sp and all(is_pretrained(transfer.built, name) for name in inside))
    return LayerGroupSummary(
        name=stage.name,
        parameters=sum(p.numel() for p in inside.values()),
        trainable=trainable,
        lr=optimizer.lr * lr_scale if trainable else 0.0,
        weight_decay=optimizer.weight_decay if has_decay else 0.0,
        batch_norm=_batch_norm(module, stage, transfer.table),
    )


def _batch_norm(module: nn.Module, stage: LayerGroup, table: TransferConfig) -> str:
    """Return the state of the batch norm layers in a layer group; if they differ, all states, comma-separated."""
    stage_trains = any(p.requires_grad for name, p in module.named_parameters() if stage.holds(name))

    def mode(layer: _BatchNorm) -> str:
        if any(p.requires_grad for p in layer.parameters()):
            return "trained"
        has_live_statistics = stage_trains and not layer.affine  # else it follows the surrounding layers
        return "updated" if has_live_statistics or table.frozen_batch_norm == "update" else "fixed"

    layers = [layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm) and stage.holds(name)]
    modes = [mode(layer) for layer in layers]
    return ", ".join(dict.fromkeys(modes)) or "-"
