"""The controller of a study: prepares its folder, has its runs trained, shows how far they are."""

from __future__ import annotations

from toolkit.engine.signals import StopRequest
from toolkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from toolkit.study.expand import Expansion, StudyFile
from toolkit.study.folder import StudyFolder, forget_failure
from toolkit.study.prepare import controlled, prepare
from toolkit.study.worker import work


def run_study(study: StudyFile, expansion: Expansion, *, retry: bool = False) -> int:
    """Train all runs of a study that are not finished. Exit status: 0, 1 where a run failed, 3 where it was stopped."""
    with StopRequest() as stop, controlled(study) as folder:
        for remark in prepare(study, folder, expansion):
            print(remark)
        if retry:
            forget_failures(folder)
        if work(folder, stop) == EXIT_INTERRUPTED:
            return EXIT_INTERRUPTED
        return EXIT_FAILURE if any(folder.state(member) == "failed" for member in folder.members) else EXIT_OK


def forget_failures(folder: StudyFolder) -> None:
    """Let all failed runs be tried again."""
    for member in folder.members:
        run = folder.run(member)
        if run is not None:
            forget_failure(run)
