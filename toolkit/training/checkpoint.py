"""Checkpoints that survive being killed at any moment.

A checkpoint is a file of tensors and plain values, and a small JSON that is written after it, names it and holds its
SHA-256. What no JSON names, or does not match its checksum, is not a checkpoint, and the one before is used. The JSON
also has the SHA-256 of the best weights so far: without them a run could not finish from that checkpoint.

A checkpoint within an epoch is proven good by the next step, which must have a finite loss; until then the one before
it is kept as well. One whose next loss is not finite gets the key "refused" in its JSON and is not used.

    checkpoints/0007-000123.json            {"file": ..., "sha256": ..., "bytes": ..., "epoch": 7, "step": 123, ...}
    checkpoints/0007-000123-5fe1ab0c.pt     epochs completed - steps into the next one - start of its checksum
    checkpoints/best-0005.safetensors       weights of the best epoch so far; the checkpoint names its epoch
    checkpoints/best.safetensors            the same file, under the name that lasts
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from toolkit.errors import UserError
from toolkit.models.pretrained import has_its_digest, pack_state
from toolkit.reading import DamagedFile, MissingFile, Shape, read_json, require_file
from toolkit.runs import sync_folder, write_atomically

STEM = re.compile(r"\.?(\d{4,})-(\d{6,})[-.]")
"""Epochs and steps at the beginning of a file's name; a temporary one has a dot before it."""
FORMAT = 2
"""Version of the layout of a checkpoint's content."""

CheckpointStep = tuple[int, int]
"""Completed epochs, and completed steps of the one under way."""


class _File(Shape):
    """Size and SHA-256 of a file."""

    bytes: int = Field(ge=0)
    sha256: str


class _Manifest(_File):
    """The JSON of a checkpoint."""

    file: str
    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    best_epoch: int | None = Field(None, ge=1)
    best_weights: _File | None = None
    classes: str | None = None
    refused: str | None = None


class BestWeightsLost(UserError):
    """There are whole checkpoints, but the best weights of none: ``path`` is the newest of these checkpoints."""

    def __init__(self, path: Path, weights: Path, fault: str) -> None:
        super().__init__(f"{weights} is lost ({fault}), and every checkpoint that is left needs it")
        self.path, self.weights = path, weights


def save_checkpoint(folder: Path, place: CheckpointStep, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and then drop the oldest; raises OSError (disk full, ...) with all that was there still whole.

    The file of an earlier checkpoint at the same place is never overwritten: the JSON changes from one to the other.
    """
    # Through memory: torch's own writer and safetensors' hide a full disk behind other exceptions.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    manifest_path = folder / _manifest_name(place)
    path = folder / f"{manifest_path.stem}-{digest[:8]}.pt"
    write_atomically(path, buffer.getbuffer())
    manifest = {
        "file": path.name,
        "sha256": digest,
        "bytes": len(buffer.getbuffer()),
        "epoch": place[0],
        "step": place[1],
        "best_epoch": content.get("best_epoch"),
        "best_weights": content.get("best_weights"),
        "classes": _classes_digest(content.get("classes")),
    }
    write_atomically(manifest_path, json.dumps(manifest).encode())
    _prune(folder, place, keep)
    return path


def find_latest(folder: Path, warn: Callable[[str], None], *, with_best: bool = False) -> Path | None:
    """The file of the newest whole checkpoint, or None. Those that cannot be used are named through ``warn``.

    ``with_best``: the best weights that it names must be whole as well. Raises BestWeightsLost where this leaves none.
    """
    places = sorted({place for path in folder.glob("*") if (place := checkpoint_step(path)) is not None}, reverse=True)
    if not folder.is_dir():
        warn(f"{folder} is missing: the run starts anew")
    lost: BestWeightsLost | None = None
    for place in places:
        manifest = folder / _manifest_name(place)
        path, fault = _examine(manifest)
        problem = f"is {'left aside' if _is_refused(manifest) else 'damaged'} ({fault})"
        if path is not None:
            weights, fault = _examine_best(manifest) if with_best else (manifest, "")
            if not fault:
                return path
            lost = lost or BestWeightsLost(path, weights, fault)
            problem = f"is left aside, for {weights.name} is {fault}"
        next_try = "" if place == places[-1] else "; the one before it is tried"
        warn(f"checkpoint {manifest.stem} {problem}{next_try}")
    if lost is not None:
        raise lost
    if places:
        warn("no whole checkpoint is left: the run starts anew")
    return None


def refuse_checkpoint(folder: Path, place: CheckpointStep, reason: str) -> None:
    """Mark the checkpoint at ``place``, if there is one, as not to be used. Raises OSError (disk full, ...)."""
    path = folder / _manifest_name(place)
    try:
        manifest = read_json(path, _Manifest)
        write_atomically(path, json.dumps({**manifest, "refused": reason}).encode())
    except UserError:
        return  # none, or a damaged one, which is not used either


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor that holds an infinite value or a NaN, if any. Each device is waited for once."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            groups[tensor.device, tensor.dtype][name] = tensor
    for group in groups.values():
        # A sum is fast, and finite only if all values are; one of large finite values may overflow.
        doubtful = torch.stack([tensor.sum() for tensor in group.values()]).isfinite().logical_not().tolist()
        for name, is_doubtful in zip(group, doubtful, strict=True):
            if is_doubtful and not group[name].isfinite().all():
                return name
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. A file that carries code, or of another version, is a UserError."""
    require_file(path)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is refused: it holds more than tensors and plain values, or is no checkpoint "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of this toolkit: use that one, or start a new run")
    return content


def save_best(folder: Path, epoch: int, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write the weights of the best epoch so far, under that epoch's own name. Raises OSError (disk full, ...).

    Returns what a checkpoint's JSON says of the file: its size in bytes and its SHA-256.
    """
    data = pack_state(state, epoch=epoch)
    write_atomically(best_path(folder, epoch), data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def best_fault(folder: Path, epoch: int, facts: dict[str, Any] | None) -> str:
    """What is wrong with the best weights of ``epoch``, "" if nothing. ``facts`` are those of :func:`save_best`.

    None (a checkpoint of an earlier version): only a missing file is seen.
    """
    facts = facts or {}
    path = best_path(folder, epoch)
    try:
        return _file_fault(path, facts.get("bytes"), facts.get("sha256"))
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def link_best(folder: Path, epoch: int) -> Path:
    """Give the best epoch's weights the name ``best.safetensors``."""
    target, temporary = folder / "best.safetensors", folder / ".best.tmp"
    temporary.unlink(missing_ok=True)
    source = best_path(folder, epoch)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    sync_folder(folder)
    return target


def finished_fault(folder: Path, epoch: int, classes: list[str]) -> str:
    """What is unlike the last checkpoint of a finished run: ``best.safetensors``, or the classes of model.json; or "".

    Nothing is compared where that checkpoint is gone, or knows of another best epoch than ``epoch``.
    """
    for path in sorted((p for p in folder.glob("*.json") if checkpoint_step(p) is not None), reverse=True):
        try:
            manifest = read_json(path, _Manifest)
            if manifest.get("refused"):
                continue
            facts = manifest.get("best_weights")
            if facts is None or manifest.get("best_epoch") != epoch:
                return ""
            if fault := _file_fault(folder / "best.safetensors", facts["bytes"], facts["sha256"]):
                return f"best.safetensors is not the file that this run ended with ({fault})"
            if manifest.get("classes") not in (None, _classes_digest(classes)):
                return "model.json names other classes, or in another order, than this run was trained with"
            return ""
        except (OSError, UserError):
            continue  # a damaged one says nothing
    return ""


def _classes_digest(classes: list[str] | None) -> str | None:
    """SHA-256 of the names in their order."""
    return None if classes is None else hashlib.sha256(json.dumps(classes).encode()).hexdigest()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors state dict; a UserError where the file is missing or damaged, as its own digest shows."""
    require_file(path)
    if any("\udc80" <= char <= "\udcff" for char in str(path)):  # bytes that are not UTF-8
        raise UserError(f"{path}: safetensors opens no path that is not UTF-8; rename the folder")
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
        is_intact = has_its_digest(path, tensors)
    except Exception as error:  # safetensors raises its own, private exception types
        raise DamagedFile(path, error) from None
    if not is_intact:
        raise UserError(f"{path} is damaged: its checksum differs; bring back a copy, or train again")
    return tensors


def best_path(folder: Path, epoch: int) -> Path:
    """Where the weights of the best epoch lie."""
    return folder / f"best-{epoch:04d}.safetensors"


def checkpoint_step(path: Path) -> CheckpointStep | None:
    """The place that a checkpoint's file name tells; None for another file."""
    match = STEM.match(path.name)
    return (int(match[1]), int(match[2])) if match else None


def _examine(manifest_path: Path) -> tuple[Path | None, str]:
    """The file of a whole checkpoint; or None and what is wrong with it."""
    try:
        manifest = read_json(manifest_path, _Manifest)
        path = manifest_path.with_name(Path(manifest["file"]).name)
        if (manifest["epoch"], manifest["step"]) != checkpoint_step(manifest_path):
            return None, f"it says epoch {manifest['epoch']} and step {manifest['step']}, unlike its name"
        fault = manifest.get("refused") or _file_fault(path, manifest["bytes"], manifest["sha256"])
    except MissingFile:
        return None, f"half-written: {manifest_path.name} is missing"
    except FileNotFoundError as error:
        return None, f"half-written: {Path(error.filename).name} is missing"
    except (OSError, UserError) as error:
        return None, str(error)
    return (None, fault) if fault else (path, "")


def _examine_best(manifest_path: Path) -> tuple[Path, str]:
    """The best weights that a whole checkpoint names, and what is wrong with them ("": nothing, or it names none)."""
    manifest = read_json(manifest_path, _Manifest)
    epoch, folder = manifest.get("best_epoch"), manifest_path.parent
    if not isinstance(epoch, int):
        return manifest_path, ""
    return best_path(folder, epoch), best_fault(folder, epoch, manifest.get("best_weights"))


def _file_fault(path: Path, size: int | None, sha256: str | None) -> str:
    """How a file differs from what is known of it; "" if it does not. Raises OSError."""
    found = path.stat().st_size
    if not path.is_file():
        return "not a regular file"
    if size is not None and found != size:
        return f"{found} bytes instead of {size}"
    with open(path, "rb") as file:
        digest = sha256 and hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == sha256 else "its checksum differs"


def _manifest_name(place: CheckpointStep) -> str:
    return f"{place[0]:04d}-{place[1]:06d}.json"


def _prune(folder: Path, place: CheckpointStep, keep: int) -> None:
    """Keep the ``keep`` checkpoints up to the one at ``place``, just written, and the best weights that they name.

    Within an epoch at least two are kept: the loss after the new one is not known yet. Later ones are leftovers from
    before the run went back to an earlier checkpoint, because those were damaged or refused.
    """
    if place[1]:
        keep = max(keep, 2)
    manifests = sorted((checkpoint_step(p), p) for p in folder.glob("*.json") if checkpoint_step(p) is not None)
    kept = [path for at, path in manifests if at is not None and at <= place and not _is_refused(path)][-keep:]
    named = set(kept)
    for path in kept:
        try:
            manifest = read_json(path, _Manifest)
            named |= {folder / Path(manifest["file"]).name, best_path(folder, manifest.get("best_epoch") or 0)}
        except UserError:
            continue  # damaged: it names nothing
    for _, path in manifests:  # first the marks of completion, then the content
        if path not in named:
            path.unlink(missing_ok=True)
    for path in (*folder.glob("*.pt"), *folder.glob("best-*.safetensors")):
        if path not in named:
            path.unlink(missing_ok=True)


def _is_refused(manifest_path: Path) -> bool:
    with contextlib.suppress(UserError):  # damaged: it counts as it always did
        return bool(read_json(manifest_path, _Manifest).get("refused"))
    return False
