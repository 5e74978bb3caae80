"""Run directories and data that were tampered with before a run is resumed, published, evaluated or exported.

Each case has one right outcome: a refusal that names the cause, or exactly the result of an untouched run. Run with
-m slow; -s shows the counts.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from cli import Outcome, toolkit
from damage import limited
from killing import differences
from tampering import EVALUATED, PUBLISHED, RESUMED, WEIGHTS, Case, Originals, Place, without_times

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 13
LIMIT_S = 60
EQUAL = "metrics equal those of summary.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals.make(tmp_path_factory.mktemp("tampered"))


def fault_of(case: Case, place: Place, command: tuple[object, ...], unlike: Callable[[Outcome], list[str]]) -> str:
    """What is wrong with how a command took the tampering; "" where its outcome is the right one."""
    case.tamper(place)
    try:
        with limited(LIMIT_S):
            outcome = toolkit(*command)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    last = (outcome.stderr.strip() or "nothing").splitlines()[-1]
    if "Traceback" in outcome.stderr + outcome.stdout:
        return f"a stack trace: {outcome.stderr[-500:]}"
    if case.refusal:
        if outcome.status != 2:
            return f"it must refuse, and ends with status {outcome.status}: {last[:300]}"
        return "" if re.search(case.refusal, outcome.stderr) else f"it does not say {case.refusal!r}: {last[:500]}"
    if outcome.status != 0:
        return f"it must succeed, and ends with status {outcome.status}: {last[:500]}"
    if others := unlike(outcome):
        return f"the result is not that of an untouched run: other {', '.join(others)}"
    if case.logged and not re.search(case.logged, place.run.log_file.read_text()):
        return f"log.txt does not say {case.logged!r}: {place.run.log_file.read_text()[-800:]}"
    return ""


def check_all(
    kind: str, cases: list[Case], originals: Originals, of_finished: bool, play: Callable[[Case, Place], str]
) -> None:
    faults = []
    began = time.monotonic()
    for case in Random(SEED).sample(cases, len(cases)):
        fault = play(case, originals.place(of_finished=of_finished))
        faults += [f"seed {SEED}, {kind}, {case.name}: {fault}"] if fault else []
    refused = sum(bool(case.refusal) for case in cases)
    print(
        f"\n{len(cases)} tampered directories, {kind}: {refused} to be refused, {len(cases) - refused} to give the "
        f"result of an untouched run, {len(faults)} wrong, {time.monotonic() - began:.0f} s"
    )
    assert not faults, "\n".join(faults)


def test_tampered_runs_are_resumed_exactly_or_refused(originals: Originals) -> None:
    right = without_times(originals.finished)

    def play(case: Case, place: Place) -> str:
        command = ("train", "--resume", place.run.path, "--no-report")
        return fault_of(case, place, command, lambda _: differences(without_times(place.run), right))

    untouched = Case("untouched", lambda place: None)
    check_all("resumed", [*RESUMED, untouched], originals, False, play)


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_tampered_runs_are_published_unchanged_or_refused(originals: Originals, tmp_path: Path) -> None:
    place = originals.place(of_finished=True)
    assert toolkit("publish", place.run.path, "lab/x", "--no-push", "-o", tmp_path / "right").status == 0
    right = published(tmp_path / "right")

    def play(case: Case, place: Place) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        command = ("publish", place.run.path, "lab/x", "--no-push", "-o", tmp_path / "out")
        fault = fault_of(case, place, command, lambda _: differences(published(tmp_path / "out"), right))
        return fault or ("it left files" if case.refusal and (tmp_path / "out").exists() else "")

    check_all("published", PUBLISHED, originals, True, play)


def test_tampered_runs_are_evaluated_with_equal_metrics_or_refused(originals: Originals) -> None:
    def play(case: Case, place: Place) -> str:
        command = ("evaluate", place.run.path)
        return fault_of(case, place, command, lambda outcome: [] if EQUAL in outcome.stdout else ["metrics"])

    check_all("evaluated", EVALUATED, originals, True, play)


def test_tampered_weights_are_neither_exported_nor_used(originals: Originals, tmp_path: Path) -> None:
    def play(case: Case, place: Place) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        image = place.data / place.run.split["test"][0]
        exported = ("export", place.run.path, "--format", "safetensors", "-o", tmp_path / "out")
        fault = fault_of(case, place, exported, lambda _: [])
        if fault:
            return f"export: {fault}"
        fault = fault_of(Case(case.name, lambda place: None, case.refusal), place,
                         ("predict", place.run.path, image), lambda _: [])  # fmt: skip
        return f"predict: {fault}" if fault else ""

    check_all("exported and predicted", WEIGHTS, originals, True, play)
