"""Checkpoints that survive being killed at any moment.

A checkpoint is a file of tensors and plain values plus a small JSON beside it, which is written last and holds the
other's SHA-256: what has no such JSON, or does not match it, is not a checkpoint and the one before is used.

    checkpoints/0007-000123.pt     epochs completed - steps into the next one
    checkpoints/0007-000123.json   {"sha256": ..., "bytes": ..., "epoch": 7, "step": 123}
    checkpoints/best-0005.safetensors   weights of the best epoch so far; the checkpoint names its epoch
    checkpoints/best.safetensors        the same file, under the name that lasts
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from toolkit.errors import UserError
from toolkit.runs import sync_folder, write_atomically

NAME = re.compile(r"(\d{4,})-(\d{6,})\.json")
BEST_NAME = re.compile(r"best-(\d{4,})\.safetensors")
FORMAT = 1
"""Version of the layout of a checkpoint's content."""


def save_checkpoint(folder: Path, epoch: int, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint at ``step`` steps into the epoch after ``epoch`` completed ones; then drop the oldest.

    Raises OSError (disk full, ...) with nothing changed but temporary files removed.
    """
    path = folder / f"{epoch:04d}-{step:06d}.pt"
    _write(path, lambda temporary: torch.save({"format": FORMAT, **content}, temporary))
    manifest = {
        "sha256": _sha256(path),
        "bytes": path.stat().st_size,
        "epoch": epoch,
        "step": step,
        "best_epoch": content.get("best_epoch"),
    }
    write_atomically(path.with_suffix(".json"), json.dumps(manifest).encode())
    _drop_old(folder, keep)
    return path


def load_latest(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The youngest whole checkpoint, on the CPU, or None; a damaged one is named through ``warn`` and passed over."""
    for manifest_path in sorted(folder.glob("*.json"), key=_order, reverse=True):
        if not NAME.fullmatch(manifest_path.name):
            continue
        fault = _fault(manifest_path)
        if fault:
            warn(f"checkpoint {manifest_path.stem} is damaged ({fault}); the one before it is used")
            continue
        content: dict[str, Any] = torch.load(manifest_path.with_suffix(".pt"), map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise UserError(f"{manifest_path.with_suffix('.pt')} was written by another version of this toolkit")
        return content
    return None


def save_best(folder: Path, epoch: int, state: dict[str, torch.Tensor]) -> None:
    """Write the weights of the best epoch so far, under that epoch's own name."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"epoch": str(epoch), "format": "pt"}
    _write(folder / f"best-{epoch:04d}.safetensors", lambda path: save_file(tensors, path, metadata=metadata))


def publish_best(folder: Path, epoch: int) -> Path:
    """Give the best epoch's weights the name ``best.safetensors``."""
    target, temporary = folder / "best.safetensors", folder / ".best.tmp"
    temporary.unlink(missing_ok=True)
    source = folder / f"best-{epoch:04d}.safetensors"
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    sync_folder(folder)
    return target


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors state dict; a UserError where the file is missing or damaged."""
    try:
        state: dict[str, torch.Tensor] = load_file(path)
        return state
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run has no best epoch yet") from None
    except Exception as error:  # safetensors raises its own, private exception types
        raise UserError(f"{path} is damaged: {error}") from None


def _write(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def _fault(manifest_path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads(manifest_path.read_text())
        data = manifest_path.with_suffix(".pt")
        if data.stat().st_size != manifest["bytes"]:
            return f"{data.stat().st_size} bytes instead of {manifest['bytes']}"
        return None if _sha256(data) == manifest["sha256"] else "its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_old(folder: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints, and the best weights that none of those names any more."""
    manifests = sorted((p for p in folder.glob("*.json") if NAME.fullmatch(p.name)), key=_order)
    for old in manifests[:-keep]:
        old.unlink(missing_ok=True)  # first the mark of completion, then the content
        old.with_suffix(".pt").unlink(missing_ok=True)
    named = {json.loads(path.read_text()).get("best_epoch") for path in manifests[-keep:] if _fault(path) is None}
    newest = max((epoch for epoch in named if epoch is not None), default=0)
    for path in folder.glob("best-*.safetensors"):
        match = BEST_NAME.fullmatch(path.name)
        if match and int(match[1]) < newest and int(match[1]) not in named:
            path.unlink(missing_ok=True)
