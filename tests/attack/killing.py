"""Kill runs at random moments, drawn from a seed, and resume them until they finish."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import safetensors
from finished import digit_files
from trainers import Trainers, only_run, outcome, write_recipe

from toolkit.runs import Run

FAILED, STOPPED = 1, 3
"""Exit statuses of a run that lost one of its processes, and of one that was asked to stop and wrote a checkpoint."""
READY = "ready for the first step"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LIMIT_S = 240
SGD = 'name = "sgd"\nlr = 0.05\nmomentum = 0.9\n'
ADAMW = 'name = "adamw"\nlr = 0.01\nweight_decay = 0.05\n'


@dataclass(frozen=True)
class Combination:
    """Settings of one experiment, applied to the recipe of :mod:`trainers`."""

    name: str
    world: int
    text: str
    settings: tuple[str, ...] = ()
    epochs: int = 8
    uses_files: bool = False
    """Whether the images are files in class folders; otherwise the data set is digits."""
    optimizer: str = SGD
    """Lines that replace those of the recipe's [optimizer] table."""


def train(combination: Combination, folder: Path, *resume: object) -> Trainers:
    """Start the combination's training processes in ``folder``."""
    settings = [*combination.settings, f"train.epochs={combination.epochs}"]
    if combination.uses_files:
        data = folder.parent / "data"
        if not data.is_dir():
            digit_files(data)
        settings += ['data.dataset="imagefolder"', f"data.root={json.dumps(str(data))}", "data.image_size=8",
                     "data.channels=1", "data.split.test=0.2"]  # fmt: skip
    recipe = write_recipe(folder, combination.text)
    text = recipe.read_text()
    assert SGD in text
    recipe.write_text(text.replace(SGD, combination.optimizer))
    options = [part for setting in settings for part in ("--set", setting)]
    return Trainers(combination.world, folder, recipe, *options, *resume)


@dataclass
class UninterruptedRun:
    """The outcome of a combination's uninterrupted run, and the durations of its phases in seconds."""

    outcome: dict[str, Any]
    startup_s: float
    training_s: float


def run_uninterrupted(combination: Combination, folder: Path) -> UninterruptedRun:
    began = time.monotonic()
    trainers = train(combination, folder)
    trainers.wait_until(lambda: READY in trainers.text())
    ready = time.monotonic()
    assert trainers.wait(LIMIT_S) == [0] * combination.world, trainers.text()
    return UninterruptedRun(outcome(only_run(folder)), ready - began, time.monotonic() - ready)


@dataclass(frozen=True)
class Kill:
    """Which signal is sent to which ranks, and how many seconds after the start or after training began."""

    number: int
    ranks: tuple[int, ...]
    after_ready: bool
    delay_s: float

    def __str__(self) -> str:
        since = "training began" if self.after_ready else "the start"
        return f"{signal.Signals(self.number).name} to ranks {list(self.ranks)}, {self.delay_s:.3f} s after {since}"


def draw_kill(random: Random, world: int, uninterrupted: UninterruptedRun) -> Kill:
    """Draw a kill: 70 % are SIGKILL; 90 % fall between the first step and shortly after the end of training."""
    number = signal.SIGKILL if random.random() < 0.7 else random.choice(STOP_SIGNALS)
    # If one process dies alone, the others take up to 6 s to end, so this kind is drawn less often.
    is_alone = world > 1 and random.random() < 0.3
    ranks = (random.randrange(world),) if is_alone else tuple(range(world))
    if random.random() < 0.1:
        return Kill(number, ranks, False, random.random() * uninterrupted.startup_s)
    # Within a third of the training time: every start resumes from the last checkpoint, and each run should be
    # killed several times.
    return Kill(number, ranks, True, random.random() * uninterrupted.training_s * random.choice((0.15, 0.35, 1.05)))


def send_kill(trainers: Trainers, kill: Kill, is_finished: Callable[[], bool]) -> str:
    """Send the signal and wait until all processes end. Return the phase that it hit.

    The phase is "starting" or "training", or "" if all processes had ended before. Raises AssertionError if a process
    hangs or ends with a status that does not follow from the signal.
    """
    alive = [process.is_alive for process in trainers.processes]
    if kill.after_ready:
        deadline = time.monotonic() + LIMIT_S
        while READY not in trainers.text() and any(is_alive() for is_alive in alive):
            assert time.monotonic() < deadline, f"{kill}: not ready after {LIMIT_S} s:\n{trainers.text()}"
            time.sleep(0.005)
    time.sleep(kill.delay_s)
    was_running, was_ready = all(is_alive() for is_alive in alive), READY in trainers.text()
    trainers.signal(kill.number, *kill.ranks)
    statuses = trainers.wait(LIMIT_S)
    described = f"{kill}: exit statuses {statuses}\n{trainers.text()}"
    if not was_running or not any(statuses):
        assert not any(statuses), described
        return ""
    if not was_ready:
        return "starting"  # signal handlers are not installed yet, so any exit status is allowed
    # After a SIGKILL, Python's data workers may print a stack trace about the lost connection to their parent.
    assert kill.number == signal.SIGKILL or "Traceback" not in trainers.text(), described
    if is_finished():  # the last file had been written, so the processes only had to exit
        assert {*statuses} <= {0, STOPPED, FAILED, -kill.number}, described
    elif kill.number == signal.SIGKILL:
        assert all(statuses[rank] == -signal.SIGKILL for rank in kill.ranks), described
        assert all(statuses), described
    else:
        assert statuses == [STOPPED] * len(statuses), described
    return "training"


def torn_files(run: Run) -> list[str]:
    """Return the incomplete files that have their final names, read without the toolkit's own readers."""
    torn = []
    for path in sorted(run.path.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            _read_whole(path)
        except Exception as error:
            torn.append(f"{path.relative_to(run.path)}: {type(error).__name__}: {error}")
    return torn


def _read_whole(path: Path) -> None:
    """Raise an exception if a file's content does not have the format that its name implies."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if isinstance(content, dict) and {"file", "sha256", "bytes"} <= content.keys():
            named = path.with_name(content["file"])
            # A checkpoint's manifest is deleted before its content, so the file that a manifest names must exist.
            digest = hashlib.sha256(named.read_bytes()).hexdigest()
            assert digest == content["sha256"], f"{named.name} has a different checksum"
    elif path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                file.get_tensor(name)
    elif path.name == "predictions.csv":
        lines = path.read_text().splitlines()
        test = json.loads((path.parent / "split.json").read_text())["test"]
        assert len(lines) == len(test) + 1, f"{len(lines)} lines for {len(test)} images"
    elif path.name == "metrics.jsonl":  # it is appended to, so only its last line may be incomplete
        for line in path.read_bytes().split(b"\n")[:-1]:
            json.loads(line)
    elif path.suffix == ".toml":
        assert path.read_bytes().endswith(b"\n")


def runs_in(folder: Path) -> list[Run]:
    """Return the run directories of a chain, without those of runs that were killed before they wrote their recipe."""
    return [Run(path) for path in (folder / "runs").glob("*/*") if (path / "recipe.toml").exists()]


def finished(folder: Path) -> bool:
    """Return whether the chain's run is finished, as is a run that was killed after it wrote its summary."""
    return any(run.is_finished for run in runs_in(folder))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of the parts of two outcomes that differ in any byte."""
    return [name for name in expected if found[name] != expected[name]]


@dataclass
class Chains:
    """Runs of one combination, each killed and resumed until it finishes, until the number of kills is reached."""

    combination: Combination
    folder: Path
    kills: int
    seed: int

    def run_all(self, counts: Counter[str]) -> list[str]:
        """Run all chains until the first fault. Return the faults, each with what is needed to reproduce it."""
        random = Random(f"{self.seed} {self.combination.name}")
        uninterrupted = run_uninterrupted(self.combination, self.folder / "plain")
        faults: list[str] = []
        made = 0
        while made < self.kills:
            folder, history = self.folder / f"chain{counts['runs']}", []
            counts["runs"] += 1
            try:
                while not finished(folder):
                    trainers = train(self.combination, folder, "--resume", "auto")
                    if made == self.kills:
                        statuses = trainers.wait(LIMIT_S)
                        assert not any(statuses), f"the resumed run ended with {statuses}:\n{trainers.text()}"
                        continue
                    kill = draw_kill(random, self.combination.world, uninterrupted)
                    history.append(str(kill))
                    hit = send_kill(trainers, kill, partial(finished, folder))
                    if hit:
                        made += 1
                        counts[f"{signal.Signals(kill.number).name} while {hit}"] += 1
                        counts["to one of two processes"] += len(kill.ranks) < self.combination.world
                    torn = [each for run in runs_in(folder) for each in torn_files(run)]
                    assert not torn, f"torn files: {torn}"
                (run,) = runs_in(folder)
                wrong = differences(outcome(run), uninterrupted.outcome)
                assert not wrong, f"{run.path}: {', '.join(wrong)} differ from the uninterrupted run's"
            except AssertionError as error:
                faults.append(
                    f"seed {self.seed}, {self.combination.name}, {folder}, after {'; '.join(history)}: {error}"
                )
                break
        return faults
