"""Sixty recipes that an attacker or a broken program might write, given to `toolkit validate` and `toolkit train`.

Each must be refused with exit status 2 in bounded time, by one report that names the fault (with file and line if the
text has lines) and contains no control characters for the terminal; no code runs, and no file is written. Run with
-m slow; -s shows the counts.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from cli import toolkit
from damage import limited

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 13
LIMIT_S = 20
"""Seconds of CPU time; a command usually takes less than one."""

MAX_CHARACTERS = {"train": 20_000, "validate": 200_000}
"""Characters: `train` prints the first 30 faults, `validate` all faults that a recipe of 64 KiB can contain."""

VALID = """\
[recipe]
name = "hostile"
run_root = "runs"

[data]
dataset = "digits"
images_per_class = 3
workers = 0

[model]
source = "toolkit"

[model.convnet]
blocks = [{ channels = 4 }]

[optimizer]
name = "sgd"
lr = 0.1

[train]
epochs = 1
batch_size = 8
precision = "no"

[tracking]
trackers = []
"""


def changed(old: str, new: str) -> str:
    """Return the valid recipe with one line replaced."""
    assert VALID.count(old) == 1, old
    return VALID.replace(old, new)


def added(text: str) -> str:
    return VALID + text


TIMM = 'source = "timm"\nname = "resnet18"'
CODE = "__import__('os').system('touch CODE')"
NAME = 'name = "hostile"'

RECIPES: dict[str, tuple[str | bytes, str]] = {
    # nesting
    "lists 300 deep": ("a = " + "[" * 300 + "]" * 300, "nested too deeply|nested more than 12"),
    "60,000 open lists": ("a = " + "[" * 60_000, "nested too deeply|not valid TOML"),
    "inline tables 20,000 deep": ("a = " + "{a=" * 15_000, "nested too deeply|not valid TOML"),
    "one dotted key of 30,000 parts": ("a" + ".a" * 30_000 + " = 1", "nested too deeply"),
    "a header of 5,000 parts": ("[" + "a." * 5000 + "a]\n", "nested too deeply"),
    "330 headers of 90 parts": ("\n".join(f"[a{i}" + ".b" * 90 + "]" for i in range(330)), "nested more than 12"),
    "arguments 20 deep": (added("[optimizer.args]\nx = " + "[" * 20 + "1" + "]" * 20), "nested more than 12"),
    # numbers
    "an epoch count of 5,000 digits": (changed("epochs = 1", "epochs = " + "9" * 5000), "too many digits"),
    "an integer beyond 64 bits": (changed("batch_size = 8", f"batch_size = {2**64}"), "batch_size"),
    "epochs 10^18": (changed("epochs = 1", f"epochs = {10**18}"), r"train\.epochs: .*1000000"),
    "lr 1e308": (changed("lr = 0.1", "lr = 1e308"), r"optimizer\.lr: "),
    "lr 1e999": (changed("lr = 0.1", "lr = 1e999"), r"optimizer\.lr: .*(finite|infinite)"),
    "lr NaN": (changed("lr = 0.1", "lr = nan"), r"optimizer\.lr: .*(finite|nan|NaN|number)"),
    "lr minus zero": (changed("lr = 0.1", "lr = -0.0"), r"optimizer\.lr: .*> 0 and"),
    "NaN within arguments": (added("[optimizer.args]\nfoo = [nan]"), r"foo"),
    "10^12 hidden units": (added("[model.head]\nhidden = [1000000000000]"), r"model\.head\.hidden"),
    "10^9 channels": (changed("channels = 4", "channels = 1000000000"), "channels"),
    "60,000 digits": ("a = " + "9" * 60_000, "too many digits"),
    "a negative batch": (changed("batch_size = 8", "batch_size = -8"), r"train\.batch_size"),
    "a seed of 2^32": (changed(NAME, NAME + "\nseed = 4294967296"), r"recipe\.seed"),
    # encodings and characters
    "UTF-16": (VALID.encode("utf-16"), "is not UTF-8 text: byte 0xff in line 1"),
    "Latin-1": (changed(NAME, 'name = "café"').encode("latin-1"), "is not UTF-8 text: byte 0xe9 in line 2"),
    "surrogates in UTF-8": (changed(NAME, 'name = "X"').encode().replace(b"X", b"\xed\xa0\x80"), "is not UTF-8 text"),
    "a zero byte": (changed(NAME, 'name = "a\0b"'), "recipe.toml:2:"),
    "an escape character": (changed(NAME, 'name = "a\x1b[31mb"'), "recipe.toml:2:"),
    "an escaped escape character": (changed(NAME, 'name = "a\\u001b[31mb"'), r"recipe\.name"),
    "right to left": (changed(NAME, 'name = "a\u202eb"'), r"recipe\.name"),
    "an unknown key of escapes": (changed(NAME, NAME + '\n"a\\u001b]0;title\\u0007" = 1'), "unknown key"),
    "an escaped line break": (changed(NAME, 'name = "a\\nb"'), r"recipe\.name"),
    "carriage returns alone": (VALID.replace("\n", "\r"), "recipe.toml:1:"),
    "a random file": (Random(SEED).randbytes(3000), "is not UTF-8 text"),
    "64 KiB of nothing": ("#" * (64 * 1024 + 1), "is larger than 64 KiB"),
    # paths
    "a name with parent folders": (changed(NAME, 'name = "../../escaped"'), r"recipe\.name"),
    "an absolute name": (changed(NAME, 'name = "/tmp/escaped"'), r"recipe\.name"),
    "the name ..": (changed(NAME, 'name = ".."'), r"recipe\.name"),
    "an option as name": (changed(NAME, 'name = "-rf"'), r"recipe\.name"),
    "60,000 letters as name": (changed(NAME, 'name = "' + "a" * 60_000 + '"'), r"recipe\.name"),
    "an empty run_root": (changed('run_root = "runs"', 'run_root = ""'), r"recipe\.run_root"),
    "a profile with parent folders": (added('[slurm]\nprofile = "../../../etc/passwd"'), r"slurm\.profile"),
    "a partition that is a command": (added('[slurm]\npartition = "x; touch CODE"'), r"slurm\.partition"),
    "an sbatch option with a line break": (added('[slurm]\noptions = ["--comment=a\\ntouch CODE"]'), r"slurm\.options"),
    # code
    "code as model": (changed('source = "toolkit"', f'source = "timm"\nname = "{CODE}"').replace(
        "[model.convnet]\nblocks = [{ channels = 4 }]\n", ""), r"model\.name"),
    "code as optimizer": (changed('name = "sgd"', f'name = "{CODE}"'), r"optimizer\.name"),
    "an optimizer by its dotted path": (changed('name = "sgd"', 'name = "os.system"'), r"optimizer\.name"),
    "a transform that runs code": (added('[augment]\ntrain = [{ name = "Lambda", lambd = "print" }]'),
                                   r"augment\.train\[0\]\.name"),
    "an attribute as transform": (added('[augment]\ntrain = [{ name = "__builtins__" }]'),
                                  r"augment\.train\[0\]\.name"),
    "code as policy": (added(f'[augment]\nauto_augment = "{CODE}"'), r"augment\.auto_augment"),
    "weights that are a pickle": (changed('source = "toolkit"', 'source = "toolkit"\nweights = "file:evil.pt"'),
                                  r"evil\.pt|weights"),
    "weights from a URL": (changed('source = "toolkit"', 'source = "toolkit"\nweights = "https://x.example/w.pt"'),
                           r"model\.weights"),
    "model arguments that load a file": (changed('source = "toolkit"', f"{TIMM}\nargs = {{ checkpoint_path = 'e' }}"),
                                         r"model\.(args|convnet)"),
    # extends
    "it extends itself": ('extends = "recipe.toml"\n' + VALID, "leads back to the same recipe"),
    "it extends a circle": ('extends = "circle.toml"\n' + VALID, "leads back to the same recipe"),
    "it extends nothing": ('extends = "absent.toml"\n' + VALID, "there is no recipe .*absent.toml"),
    "it extends a folder": ('extends = "."\n' + VALID, "is a folder"),
    "it extends a pipe": ('extends = "pipe"\n' + VALID, "is not a regular file"),
    "it extends a device": ('extends = "/dev/zero"\n' + VALID, "is not a regular file"),
    "it extends a password file": ('extends = "/etc/passwd"\n' + VALID, "/etc/passwd:1:.*not valid TOML"),
    "it extends a zero byte": ('extends = "a\\u0000b"\n' + VALID, "null"),
    "it extends a list": ("extends = [1]\n" + VALID, "expected the path of one recipe"),
    # bombs
    "6,000 unknown keys": ("\n".join(f"k{i} = 1" for i in range(6000)), "unknown"),
    "2,000 unknown transforms": (added("[augment]\ntrain = [" + '{ name = "RandomRotate" },' * 2000 + "]"), "augment"),
    "20,000 tags of the wrong type": (changed("trackers = []", "trackers = []\ntags = [" + "1, " * 15_000 + "]"),
                                      r"tracking\.tags"),
    "a quote that never ends": ('a = """' + '\\"' * 30_000, "not valid TOML"),
}  # fmt: skip
WRONG = ("1", "true", '"text"', "[1, 2]", "[{ a = 1 }]", "1979-05-27T07:32:00Z", "nan")
TABLES = ("recipe", "data", "augment", "model", "transfer", "optimizer", "scheduler", "train", "early_stopping",
          "checkpoint", "tracking", "slurm", "study", "expected_metrics", "data.split", "model.head",
          "model.convnet")  # fmt: skip


def of_wrong_type(table: str) -> str:
    """Return the valid recipe with this table replaced by a value of another type, drawn by the table's name."""
    value = Random(f"{SEED} {table}").choice(WRONG)
    parent, _, key = table.rpartition(".")
    kept = re.sub(rf"(?ms)^\[{re.escape(table)}(\.\w+)?\]\n.*?(?=^\[|\Z)", "", VALID)
    return kept.replace(f"[{parent}]\n", f"[{parent}]\n{key} = {value}\n") if parent else f"{key} = {value}\n{kept}"


RECIPES |= {
    f"{table} is not a table": (of_wrong_type(table), rf"recipe.toml:\d+:\d+: error: {re.escape(table)}\b")
    for table in TABLES
}


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which commands run; the files that recipes name are in it."""
    folder = tmp_path / "home" / "work"
    folder.mkdir(parents=True)
    (folder / "circle.toml").write_text('extends = "recipe.toml"\n')
    os.mkfifo(folder / "pipe")
    (folder / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch CODE'\ntR.")
    monkeypatch.chdir(folder)
    return folder


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def fault_of(command: tuple[str, ...], expected: str, text: str | bytes) -> str:
    """Return what is wrong with how a command handled recipe.toml; "" if nothing is."""
    begin = time.process_time()
    try:
        with limited(3 * LIMIT_S):
            outcome = toolkit(*command)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begin
    message = outcome.stderr
    if outcome.status != 2:
        return f"exit status {outcome.status}: {message[-300:]}"
    if "Traceback" in message + outcome.stdout:
        return f"a stack trace: {message[-300:]}"
    if not re.search(expected, message):
        return f"its message does not match {expected}: {message[:600]}"
    if len(message) > MAX_CHARACTERS[command[0]]:
        return f"{len(message)} characters in {len(message.splitlines())} lines"
    if bad := sorted({char for char in message if not char.isprintable() and char not in "\n\t"}):
        return f"it sends {bad} to the terminal"
    if seconds > LIMIT_S:
        return f"{seconds:.0f} s"
    return ""


def test_every_hostile_recipe_is_refused_with_its_fault(sandbox: Path) -> None:
    counts: Counter[str] = Counter()
    faults = []
    before: set[str] = set()
    began = time.monotonic()
    for name, (text, expected) in Random(SEED).sample(list(RECIPES.items()), len(RECIPES)):
        (sandbox / "recipe.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        before = before or files_below(sandbox.parent.parent)
        for command in (("validate", "recipe.toml"), ("train", "recipe.toml", "--no-report")):
            if name == "weights that are a pickle" and command[0] == "validate":
                continue  # only training opens the weights file
            fault = fault_of(command, expected, text)
            counts["faults" if fault else f"{command[0]}: exit status 2"] += 1
            faults += [f"seed {SEED}, {name}, {' '.join(command)}: {fault}"] if fault else []
        if new := files_below(sandbox.parent.parent) - before:
            faults.append(f"{name}: files written: {sorted(new)}")
            before |= new
    print(f"\n{len(RECIPES)} recipes: {dict(counts)}, {len(faults)} wrong, {time.monotonic() - began:.0f} s")
    assert not faults, "\n".join(faults)
    assert len(RECIPES) >= 60


def test_the_recipe_that_the_hostile_ones_are_made_from_is_valid(sandbox: Path) -> None:
    (sandbox / "recipe.toml").write_text(VALID)
    outcome = toolkit("validate", "recipe.toml", "--json")
    assert outcome.status == 0, outcome.stderr
    assert json.loads(outcome.stdout)
