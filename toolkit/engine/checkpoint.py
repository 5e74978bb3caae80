"""Checkpoints that survive being killed at any moment.

A checkpoint is a file of tensors and plain values, and a small JSON that is written after it, names it and holds its
SHA-256. What no JSON names, or does not match its checksum, is not a checkpoint, and the one before is used.

    checkpoints/0007-000123.json            {"file": ..., "sha256": ..., "bytes": ..., "epoch": 7, "step": 123, ...}
    checkpoints/0007-000123-5fe1ab0c.pt     epochs completed - steps into the next one - start of its checksum
    checkpoints/best-0005.safetensors       weights of the best epoch so far; the checkpoint names its epoch
    checkpoints/best.safetensors            the same file, under the name that lasts
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from toolkit.errors import UserError
from toolkit.runs import sync_folder, write_atomically

STEM = re.compile(r"\.?(\d{4,})-(\d{6,})[-.]")
"""Epochs and steps at the beginning of a file's name; a temporary one has a dot before it."""
FORMAT = 2
"""Version of the layout of a checkpoint's content."""

Place = tuple[int, int]
"""Completed epochs, and completed steps of the one under way."""


def save_checkpoint(folder: Path, place: Place, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and then drop the oldest; raises OSError (disk full, ...) with all that was there still whole.

    The file of an earlier checkpoint at the same place is never overwritten: the JSON changes from one to the other.
    """
    # Through memory: torch's own writer and safetensors' hide a full disk behind other exceptions.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    manifest_path = folder / f"{place[0]:04d}-{place[1]:06d}.json"
    path = folder / f"{manifest_path.stem}-{digest[:8]}.pt"
    write_atomically(path, buffer.getbuffer())
    manifest = {
        "file": path.name,
        "sha256": digest,
        "bytes": len(buffer.getbuffer()),
        "epoch": place[0],
        "step": place[1],
        "best_epoch": content.get("best_epoch"),
    }
    write_atomically(manifest_path, json.dumps(manifest).encode())
    _drop_old(folder, place, keep)
    return path


def find_latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The file of the youngest whole checkpoint, or None; damaged and half-written ones are named through ``warn``."""
    places = {place for path in folder.iterdir() if (place := _place(path)) is not None}
    for place in sorted(places, reverse=True):
        path, fault = _examine(folder / f"{place[0]:04d}-{place[1]:06d}.json")
        if path is not None:
            return path
        warn(f"checkpoint {place[0]:04d}-{place[1]:06d} is damaged ({fault}); the one before it is used")
    if places:
        warn("no whole checkpoint is left: the run starts anew")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. A file that carries code, or of another version, is a UserError."""
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


def save_best(folder: Path, epoch: int, state: dict[str, torch.Tensor]) -> None:
    """Write the weights of the best epoch so far, under that epoch's own name. Raises OSError (disk full, ...)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # One entry: safetensors writes several in a random order, and equal weights shall be equal files.
    data = safetensors.torch.save(tensors, metadata={"epoch": str(epoch)})
    write_atomically(_best_path(folder, epoch), data)


def publish_best(folder: Path, epoch: int) -> Path:
    """Give the best epoch's weights the name ``best.safetensors``."""
    target, temporary = folder / "best.safetensors", folder / ".best.tmp"
    temporary.unlink(missing_ok=True)
    source = _best_path(folder, epoch)
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
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run has no best epoch yet") from None
    except Exception as error:  # safetensors raises its own, private exception types
        raise UserError(f"{path} is damaged: {error}") from None
    return tensors


def _best_path(folder: Path, epoch: int) -> Path:
    return folder / f"best-{epoch:04d}.safetensors"


def _place(path: Path) -> Place | None:
    match = STEM.match(path.name)
    return (int(match[1]), int(match[2])) if match else None


def _examine(manifest_path: Path) -> tuple[Path | None, str]:
    """The file of a whole checkpoint; or None and what is wrong with it."""
    try:
        manifest = json.loads(manifest_path.read_text())
        path = manifest_path.with_name(Path(manifest["file"]).name)
        size = path.stat().st_size
        if size != manifest["bytes"]:
            return None, f"{size} bytes instead of {manifest['bytes']}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        return None, f"half-written: {Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, str(error)
    return (path, "") if digest == manifest["sha256"] else (None, "its checksum differs")


def _drop_old(folder: Path, place: Place, keep: int) -> None:
    """Keep the ``keep`` checkpoints up to the one at ``place``, just written, and the best weights that they name.

    Later ones are leftovers from before the run went back to an earlier checkpoint, because those were damaged.
    """
    manifests = sorted((_place(p), p) for p in folder.glob("*.json") if _place(p) is not None)
    kept = [path for at, path in manifests if at is not None and at <= place][-keep:]
    named = set(kept)
    for path in kept:
        try:
            manifest = json.loads(path.read_text())
            named |= {folder / Path(manifest["file"]).name, _best_path(folder, manifest["best_epoch"] or 0)}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: it names nothing
    for _, path in manifests:  # first the marks of completion, then the content
        if path not in named:
            path.unlink(missing_ok=True)
    for path in (*folder.glob("*.pt"), *folder.glob("best-*.safetensors")):
        if path not in named:
            path.unlink(missing_ok=True)
