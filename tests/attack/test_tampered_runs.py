"""Run directories and data that were tampered with before a run is resumed, published, evaluated or exported.

Each case has one correct outcome: a refusal that names the cause, or exactly the result of an untouched run. Run with
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
from tampering import EVALUATED, PUBLISHED, RESUMED, WEIGHTS, Case, CaseFiles, Originals, without_times

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 13
LIMIT_S = 60
EQUAL = "metrics equal those of summary.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals.make(tmp_path_factory.mktemp("tampered"))


def fault_of(
    case: Case, files: CaseFiles, command: tuple[object, ...], find_differences: Callable[[Outcome], list[str]]
) -> str:
    """Return what is wrong with how a command handled the tampering; "" if its outcome is correct."""
    case.tamper(files)
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
            return f"it must refuse, but ended with status {outcome.status}: {last[:300]}"
        return (
            ""
            if re.search(case.refusal, outcome.stderr)
            else f"its message does not match {case.refusal!r}: {last[:500]}"
        )
    if outcome.status != 0:
        return f"it must succeed, but ended with status {outcome.status}: {last[:500]}"
    if differing := find_differences(outcome):
        return f"the result is not that of an untouched run: {', '.join(differing)} differ"
    if case.logged and not re.search(case.logged, files.run.log_file.read_text()):
        return f"log.txt does not match {case.logged!r}: {files.run.log_file.read_text()[-800:]}"
    return ""


def check_all(
    kind: str, cases: list[Case], originals: Originals, of_finished: bool, run_case: Callable[[Case, CaseFiles], str]
) -> None:
    faults = []
    began = time.monotonic()
    for case in Random(SEED).sample(cases, len(cases)):
        fault = run_case(case, originals.fresh_copy(of_finished=of_finished))
        faults += [f"seed {SEED}, {kind}, {case.name}: {fault}"] if fault else []
    refused = sum(bool(case.refusal) for case in cases)
    print(
        f"\n{len(cases)} tampered directories, {kind}: {refused} to be refused, {len(cases) - refused} to give the "
        f"result of an untouched run, {len(faults)} wrong, {time.monotonic() - began:.0f} s"
    )
    assert not faults, "\n".join(faults)


def test_tampered_runs_are_resumed_exactly_or_refused(originals: Originals) -> None:
    expected = without_times(originals.finished)

    def run_case(case: Case, files: CaseFiles) -> str:
        command = ("train", "--resume", files.run.path, "--no-report")
        return fault_of(case, files, command, lambda _: differences(without_times(files.run), expected))

    untouched = Case("untouched", lambda files: None)
    check_all("resumed", [*RESUMED, untouched], originals, False, run_case)


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_tampered_runs_are_published_unchanged_or_refused(originals: Originals, tmp_path: Path) -> None:
    files = originals.fresh_copy(of_finished=True)
    assert toolkit("publish", files.run.path, "lab/x", "--no-push", "-o", tmp_path / "right").status == 0
    expected = published(tmp_path / "right")

    def run_case(case: Case, files: CaseFiles) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        command = ("publish", files.run.path, "lab/x", "--no-push", "-o", tmp_path / "out")
        fault = fault_of(case, files, command, lambda _: differences(published(tmp_path / "out"), expected))
        return fault or ("it left files" if case.refusal and (tmp_path / "out").exists() else "")

    check_all("published", PUBLISHED, originals, True, run_case)


def test_tampered_runs_are_evaluated_with_equal_metrics_or_refused(originals: Originals) -> None:
    def run_case(case: Case, files: CaseFiles) -> str:
        command = ("evaluate", files.run.path)
        return fault_of(case, files, command, lambda outcome: [] if EQUAL in outcome.stdout else ["metrics"])

    check_all("evaluated", EVALUATED, originals, True, run_case)


def test_tampered_weights_are_neither_exported_nor_used(originals: Originals, tmp_path: Path) -> None:
    def run_case(case: Case, files: CaseFiles) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        image = files.data / files.run.split["test"][0]
        exported = ("export", files.run.path, "--format", "safetensors", "-o", tmp_path / "out")
        fault = fault_of(case, files, exported, lambda _: [])
        if fault:
            return f"export: {fault}"
        fault = fault_of(Case(case.name, lambda files: None, case.refusal), files,
                         ("predict", files.run.path, image), lambda _: [])  # fmt: skip
        return f"predict: {fault}" if fault else ""

    check_all("exported and predicted", WEIGHTS, originals, True, run_case)
