"""Kinds of damage to the files of runs and studies, and the commands that read them; for fuzz tests with a seed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from cli import Outcome, toolkit

from toolkit.runs import Run

LIMIT_S = 60
"""A command that takes longer counts as hanging."""

VALUES: tuple[Any, ...] = (None, float("nan"), float("inf"), -1, -(10**6), 10**30, 1e308, 0.5, True, "", "text", [], {},
                           [[1]], {"a": {}}, "../../etc", "\0")  # fmt: skip
"""Values that a person or a broken program may write instead of the right one."""

Damage = Callable[[Path, Random], None]


def _written(content: Callable[[bytes, Random], bytes]) -> Damage:
    """Return the damage that replaces the content of a file."""

    def damage(path: Path, random: Random) -> None:
        path.write_bytes(content(path.read_bytes(), random))

    return damage


def _replaced(put: Callable[[Path], Any]) -> Damage:
    """Return the damage that replaces a file by something else with the same name."""

    def damage(path: Path, random: Random) -> None:
        path.unlink()
        put(path)

    return damage


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(1, max(2, len(data)))]


def _bad_utf8(data: bytes, random: Random) -> bytes:
    index = random.randrange(len(data) + 1)
    return data[:index] + b"\xff\xfe\x80" + data[index:]


def _flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(8):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _null_line(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    lines[random.randrange(len(lines))] = b"null"
    return b"\n".join(lines) + b"\n"


def _lost_line(data: bytes, random: Random) -> bytes:
    lines = data.splitlines(keepends=True)
    del lines[random.randrange(len(lines) or 1) :]
    return b"".join(lines)


def _edited(data: bytes, random: Random) -> bytes:
    """Replace or delete one value of a JSON or JSON Lines file, or one cell of a CSV file."""
    lines = data.split(b"\n")
    try:
        return json.dumps(_with_other_value(json.loads(data), random)).encode()
    except ValueError:
        index = random.randrange(max(1, len(lines) - 1))
    try:
        lines[index] = json.dumps(_with_other_value(json.loads(lines[index]), random)).encode()
    except ValueError:
        cells = lines[index].split(b",")
        cells[random.randrange(len(cells))] = str(random.choice(VALUES)).encode()
        lines[index] = b",".join(cells)
    return b"\n".join(lines)


def _with_other_value(value: Any, random: Random) -> Any:
    """Return the JSON value with one entry, at any depth, changed or deleted."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return random.choice(VALUES)
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if random.random() < 0.15:
        del value[key]
    else:
        value[key] = _with_other_value(value[key], random)
    return value


KINDS: dict[str, Damage] = {
    "missing": lambda path, random: path.unlink(),
    "empty": _written(lambda data, random: b""),
    "cut": _written(_cut),
    "bad UTF-8": _written(_bad_utf8),
    "flipped bits": _written(_flipped),
    "random bytes": _written(lambda data, random: random.randbytes(300)),
    "null": _written(lambda data, random: b"null\n"),
    "list": _written(lambda data, random: b"[1, 2]\n"),
    "text": _written(lambda data, random: b'"text"\n'),
    "null line": _written(_null_line),
    "lost lines": _written(_lost_line),
    "deep": _written(lambda data, random: b'{"best": ' + b"[" * 100_000 + b"\n"),
    "deep and whole": _written(lambda data, random: b'{"best": ' + b'{"a": ' * 400 + b"1" + b"}" * 401 + b"\n"),
    "huge number": _written(lambda data, random: b'{"best": {"epoch": ' + b"9" * 5000 + b"}}\n"),
    "edited": _written(_edited),
    "folder": _replaced(Path.mkdir),
    "FIFO": _replaced(os.mkfifo),
    "dangling link": _replaced(lambda path: path.symlink_to("nowhere")),
    "link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "endless device": _replaced(lambda path: path.symlink_to("/dev/zero")),
}


@contextmanager
def limited(seconds: int = LIMIT_S) -> Iterator[None]:
    """Raise TimeoutError after ``seconds``."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not finished after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def reading_commands(run: Path, image: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """Return every command that reads a run directory, by name."""
    return {
        "status": ("status", run.parent.parent),
        "status --json": ("status", run.parent.parent, "--json"),
        "report": ("report", run),
        "check": ("check", run),
        "logs": ("logs", run),
        "evaluate": ("evaluate", run),
        "predict": ("predict", run, image),
        "explain": ("explain", run, "--worst", "1", "-o", out / "explain"),
        "export": ("export", run, "--format", "safetensors", "-o", out / "export"),
        "publish": ("publish", run, "lab/x", "--no-push", "-o", out / "publish"),
        "sync": ("sync", run),
        "diff": ("diff", run, run),
        "validate": ("validate", run / "recipe.toml"),
        "train --resume": ("train", "--resume", run, "--no-report"),
    }


def fault_of(name: str, arguments: tuple[object, ...], run: Path, healthy: Path) -> tuple[str, Outcome | None]:
    """Return what is wrong with a command's reaction to the damage; "" if nothing is."""
    try:
        with limited():
            outcome = toolkit(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}", None
    if "Traceback" in outcome.stderr + outcome.stdout:
        return outcome.stderr.strip().splitlines()[-1], outcome
    if outcome.status not in (0, 1, 2):
        return f"exit status {outcome.status}", outcome
    # Missed expectations and different metrics are results, which are printed on stdout.
    if outcome.status and not outcome.stderr.strip() and name not in ("check", "evaluate"):
        return "it failed without a message", outcome
    if name.startswith("status"):
        if outcome.status != 0:
            return f"exit status {outcome.status}", outcome
        absent = [path.name for path in (run, healthy) if path.name not in outcome.stdout]
        if absent:
            return f"it does not list {absent}", outcome
    return "", outcome


def damaged_copy(original: Run, healthy: Run, folder: Path, file: str, kind: str, seed: int) -> Path:
    """Copy a run to ``folder``/runs/NAME/ID, with one file damaged, next to a healthy one."""
    target = folder / "runs" / original.path.parent.name / original.id
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original.path, target, symlinks=True)
    if not (target.parent / healthy.id).exists():
        shutil.copytree(healthy.path, target.parent / healthy.id, symlinks=True)
    KINDS[kind](target / file, Random(f"{file} {kind} {seed}"))
    return target


def files_of(run: Path) -> list[str]:
    """Return the files of a run that commands read, as paths relative to the run directory."""
    unread = (".svg", ".pdf", ".png", ".html")
    found = [str(path.relative_to(run)) for path in sorted(run.rglob("*")) if path.is_file()]
    return [name for name in found if not name.endswith(unread) and not Path(name).name.startswith(".")]
