"""Table of a search: one row per configuration, with its epochs and results, best first."""

from __future__ import annotations

from toolkit.metrics import metric_of
from toolkit.study.results import short_key, short_value, varied_keys
from toolkit.study.soup_results import soup_notes
from toolkit.study.study_results import StudyResults
from toolkit.study.text_table import MISSING, Column, TextTable, number


def build_trial_table(found: StudyResults) -> TextTable:
    """Build the table of trials, with the search metric and other columns, which are empty for unfinished runs."""
    trials, sought = found.shown(found.trials), metric_of(found.table.metric).name
    keys = varied_keys([trial.result for trial in found.trials])
    changes = [trial.result.member.changes for trial in trials]
    soups = [soup.result.metrics for soup in found.soups]
    missing = [MISSING for _ in soups]
    columns = [
        Column("trial", [*(str(trial.trial) for trial in trials), *(soup.name for soup in found.soups)], is_left=True),
        *(
            Column(
                short_key(key, keys),
                [*(short_value(each[key]) if key in each else MISSING for each in changes), *missing],
            )
            for key in keys
        ),
        Column("state", [*(trial.result.state for trial in trials), *missing], is_left=True),
        Column("epochs", [*(str(trial.epochs) for trial in trials), *missing]),
        Column(
            metric_of(sought).heading,
            [number(sought, value) for value in (*(t.value for t in trials), *(each.get(sought) for each in soups))],
        ),
        *(
            Column(
                metric_of(metric).heading,
                [
                    number(metric, value)
                    for value in (*(t.measured(metric) for t in trials), *(each.get(metric) for each in soups))
                ],
            )
            for metric in found.columns
            if metric not in (sought, "epochs")
        ),
    ]
    best = found.trials[0]
    marked = [index for index, trial in enumerate(trials) if trial is best and best.result.is_finished]
    return TextTable.of_columns(found.title, columns, marked, _notes(found))


def _notes(found: StudyResults) -> list[str]:
    finished = sum(trial.result.is_finished for trial in found.trials)
    spent = sum(trial.epochs for trial in found.trials)
    return [
        f"{len(found.trials)} configurations, {finished} trained to the end; {spent:,} epochs trained in all.",
        f"Ordered by the epochs reached, then by {found.table.metric} of the best epoch; never by a test metric.",
        "One run per configuration: differences may be due to chance; train the best ones with several seeds.",
        *([found.table.note] if found.table.note else []),
        *(
            f"Trial {trial.trial}: {trial.result.state}: {trial.result.failure_reason}"
            for trial in found.trials
            if trial.result.failure_reason
        ),
        *soup_notes(found.soups, found.soup_faults, found.confidence),
    ]


def trial_records(found: StudyResults) -> list[dict[str, object]]:
    """Return one record per trial of the table; accuracies are fractions, and missing metrics are None."""
    keys = varied_keys([trial.result for trial in found.trials])
    return [
        {
            "trial": trial.trial,
            **{key: trial.result.member.changes.get(key) for key in keys},
            "state": trial.result.state,
            "epochs": trial.epochs,
            found.table.metric: trial.value,
            **{column: trial.result.metrics.get(column) for column in found.columns if column != "epochs"},
            "run": trial.result.member.run,
        }
        for trial in found.shown(found.trials)
    ]
