"""Out-of-fold predictions of a study: for each image, by the model not trained on it. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from toolkit.errors import UserError
from toolkit.runs import Run
from toolkit.study.directory import FOLD, StudyDirectory, StudyRun
from toolkit.study.text_table import csv_text
from toolkit.writing import write_atomically


def write_out_of_fold(folder: StudyDirectory, path: Path) -> int:
    """Write the test predictions of all folds to a CSV file, for each row and seed of a study; return their number.

    The columns are row, seed, fold and those of predictions.csv. Raises UserError if the study has no folds, a fold is
    not finished, or the folds do not predict each image exactly once.
    """
    models: dict[tuple[str, int], list[StudyRun]] = {}
    for member in folder.members:
        models.setdefault((member.row, member.seed), []).append(member)
    records = [record for members in models.values() for record in _predictions(folder, members)]
    try:
        write_atomically(path, csv_text(records).encode())
    except OSError as error:
        raise UserError(f"--out-of-fold {path}: cannot be written: {error.strerror}") from None
    return len(records)


def _predictions(folder: StudyDirectory, members: Sequence[StudyRun]) -> Iterator[dict[str, object]]:
    """Yield the test predictions of all folds for one row and seed."""
    where = f"out-of-fold predictions of row {members[0].row!r}, seed {members[0].seed}"
    runs = _runs(folder, members, where)
    fold_of: dict[str, int] = {}
    for fold, run in runs.items():
        for row in run.prediction_records():
            known = fold_of.setdefault(row["path"], fold)
            if known != fold:
                raise UserError(
                    f"{where}: {row['path']} is a test image of fold {known} and of fold {fold}, so the folds are "
                    "validation splits, whose predictions are not kept; for folds of test images set data.split.test = "
                    '"auto" and use data without a test list'
                )
            yield {"row": members[0].row, "seed": members[0].seed, "fold": fold, **row}
    split = runs[0].split
    left = {name for names in (split["train"], split["validation"]) for name in names} - fold_of.keys()
    if left:
        raise UserError(
            f"{where}: {len(left)} images are not in any fold (data.test_images_per_class), such as {min(left)}"
        )


def _runs(folder: StudyDirectory, members: Sequence[StudyRun], where: str) -> dict[int, Run]:
    """Return the run of each fold, in order. Raises UserError if one is missing or not finished."""
    states = {member.fold: folder.state(member) for member in members if member.fold is not None}
    runs = {member.fold: run for member in members if member.fold is not None and (run := folder.run(member))}
    finished = {fold: runs[fold] for fold in sorted(states) if states[fold] == "finished"}
    folds = next(iter(finished.values())).recipe.data.split.folds if finished else len(states)
    if not folds:
        raise UserError(f"{where}: the study has no folds; set data.split.folds, and vary {FOLD} in study.grid")
    missing = [f"fold {n} is {states.get(n, 'not in the study')}" for n in range(folds) if n not in finished]
    if missing:
        raise UserError(f"{where} need all {folds} folds, but {', '.join(missing)}")
    return finished
