"""Setup of a study before it starts or resumes: create its directories, and check that existing ones belong to it.

Does not import torch. Existing runs are found by the hash of their resolved recipes, so that no run is trained twice
even if the study's file was edited.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.locks import held, try_acquire
from toolkit.plugins import find
from toolkit.recipe import Recipe, diff, recipe_hash, resolved_toml
from toolkit.recipe.diagnostics import dotted
from toolkit.recipe.resolve import resolved_content
from toolkit.recipe.toml_writer import toml_document
from toolkit.runs import Run, create_run, runs_of
from toolkit.study.bohb import bracket_sizes
from toolkit.study.directory import CONTROLLER, STUDY_COPY, WRITING, StudyDirectory, StudyRun, epochs_done
from toolkit.study.expand import ExpandedStudy, PlannedRun, StudySpec
from toolkit.writing import write_atomically


@contextlib.contextmanager
def study_lock(study: StudySpec) -> Iterator[StudyDirectory]:
    """Lock the study's directory. Raises UserError if another process holds it or it is not writable."""
    folder = StudyDirectory(study.folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = try_acquire(folder.path / CONTROLLER, log=lambda line: print(line, file=sys.stderr))
    except OSError as error:
        raise UserError(f"recipe.run_root: cannot write in {folder.path}: {error.strerror}") from None
    if lock is None:
        raise UserError(
            f"{folder.path} is in use by another running `toolkit study`; to join it from here: "
            f"toolkit study {study.path} --worker"
        )
    try:
        yield folder
    finally:
        lock.release()


def init_study(study: StudySpec, folder: StudyDirectory, expansion: ExpandedStudy) -> list[str]:
    """Create study.json and the missing run directories. Return messages to the user.

    Raises UserError, without changing anything, if the directory belongs to another study.
    """
    notes = check_same_study(study, folder, expansion)
    if study.table.bohb is None:
        known = RunIndex(folder, study.path)
        folder.write(study_record(study, complete=True), [known.member(run) for run in expansion.runs])
        return notes
    bracket_sizes(study.table.bohb)  # raises UserError for inconsistent settings
    with held(folder.path / WRITING):  # workers that were started elsewhere may be adding runs
        write_atomically(folder.path / STUDY_COPY, toml_document(study.merged.data).encode())
        folder.write(study_record(study, complete=False), folder.members if folder.exists else [])
    return notes


def study_record(study: StudySpec, *, complete: bool) -> dict[str, Any]:
    """Return the content of study.json, except for its members."""
    return {
        "name": study.name,
        "file": os.path.abspath(study.path),
        "study": study.table.model_dump(),
        "lower_is_better": [name for name in study.base.train.own_metrics if not find("metric", name).higher_is_better],
        "assumptions": study.base.assumptions,
        "search": search_of(study),
        "complete": complete,
    }


def search_of(study: StudySpec) -> dict[str, Any] | None:
    """Return the parts of a search that must not change when it is resumed; None if the study is not a search."""
    table = study.table
    search = table.bohb or table.random
    if search is None:
        return None
    # Raising the number of trials or samples continues the same search.
    settings = search.model_dump(exclude={"trials", "runs"})
    recipe = resolved_content(study.base.model_copy(update={"study": None}))
    return {"space": table.space, "settings": settings, "recipe": recipe}


class RunIndex:
    """Index of a study's run directories by the hash of their recipes.

    ``members``: entries of study.json with known hashes, whose recipes need not be read.
    """

    def __init__(self, folder: StudyDirectory, file: str = "", members: Sequence[StudyRun] = ()) -> None:
        self.folder, self.file = folder, file
        self.by_hash = {member.hash: run for member in members if (run := folder.run(member)) is not None}
        known = {member.run for member in members}
        for run in runs_of(str(folder.path.parent), folder.path.name):
            if run.id in known:
                continue
            with contextlib.suppress(UserError):  # a run with a damaged recipe is ignored
                key = recipe_hash(run.recipe)
                other = self.by_hash.get(key)
                if other is None or _progress(run) > _progress(other):
                    self.by_hash[key] = run

    def member(self, planned: PlannedRun) -> StudyRun:
        """Return the planned run as a member with a run directory, which is created if it does not exist."""
        run = self.by_hash.get(planned.member.hash) or self._create(planned)
        self.by_hash[planned.member.hash] = run
        return replace(planned.member, run=run.id)

    def _create(self, planned: PlannedRun) -> Run:
        run = create_run(str(self.folder.path.parent), self.folder.path.name)
        run.write_json("origins.json", planned.loaded.origins_dict(self.file))
        run.write_text("recipe.toml", resolved_toml(planned.recipe))
        return run


def _has_started(run: Run) -> bool:
    """Return whether the run has a finished epoch, or files that cannot be read."""
    try:
        return run.is_finished or bool(run.epoch_records())
    except UserError:
        return True


def _progress(run: Run) -> tuple[bool, int]:
    return run.is_finished, epochs_done(run)


def check_same_study(study: StudySpec, folder: StudyDirectory, expansion: ExpandedStudy) -> list[str]:
    """Raise UserError if the directory contains another study. Return messages to the user.

    Rows may be added and removed; runs of removed rows are kept. A search must not change.
    """
    if not folder.exists:
        return []
    differences = list(_differences(folder.record["search"], search_of(study)))
    if differences:
        raise UserError(
            f"{folder.path} contains a study with {' and '.join(differences)}. Give this one its own recipe.name in "
            f"{study.path}, or move {folder.path} away"
        )
    if study.table.bohb is not None:
        return []
    started = [m for m in folder.members if (run := folder.run(m)) is not None and _has_started(run)]
    hashes = {run.member.hash for run in expansion.runs}
    gone = [member for member in started if _member_hash(folder, member) not in hashes]
    if started and len(gone) == len(started):
        raise UserError(_other_runs(study, folder, gone, expansion))
    return [f"{len(gone)} run(s) in {folder.path} no longer belong to any row; they are kept"] if gone else []


def _differences(stored: dict[str, Any] | None, current: dict[str, Any] | None) -> Iterator[str]:
    """Yield the differences between the search in the directory and the current one, as parts of a message."""
    if stored is None or current is None:
        if stored != current:
            yield "runs that are listed, not searched for" if stored is None else "a search"
        return
    if stored["space"] != current["space"]:
        yield "another space"
    if stored["settings"] != current["settings"]:
        yield "other settings"
    if _stored_hash(stored["recipe"]) != _stored_hash(current["recipe"]):
        yield "another base recipe"


def _stored_hash(content: dict[str, Any]) -> str:
    """Return the hash of a stored recipe with defaults for keys added since; empty if it is no longer valid."""
    try:
        return recipe_hash(Recipe.model_validate(content))
    except ValueError:
        return ""


def _member_hash(folder: StudyDirectory, member: StudyRun) -> str:
    """Return a member's hash, recomputed from its run directory, since older versions may have hashed differently."""
    run = folder.run(member)
    with contextlib.suppress(UserError):
        return member.hash if run is None else recipe_hash(run.recipe)
    return member.hash


def _other_runs(study: StudySpec, folder: StudyDirectory, gone: Iterable[StudyRun], expansion: ExpandedStudy) -> str:
    found = ""
    old = folder.run(next(iter(gone)))
    if old is not None and expansion.runs:
        with contextlib.suppress(UserError):
            changes = diff(old.recipe, expansion.runs[0].recipe)
            found = "; ".join(f"{dotted(key)}: {one!r} -> {two!r}" for key, one, two in changes[:3])
    return (
        f"{folder.path} contains a study with other runs{f' ({found})' if found else ''}. Give this one its own "
        f"recipe.name in {study.path}, or move {folder.path} away"
    )


def study_folder(path: Path) -> StudyDirectory:
    """Open the directory of an existing study. Raises UserError if there is none."""
    folder = StudyDirectory(path)
    folder.record  # noqa: B018  (raises UserError)
    return folder
