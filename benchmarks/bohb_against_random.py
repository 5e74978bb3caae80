"""Compare BOHB with random search at equal numbers of epochs, on digits, three workers each, over several search seeds.

    python benchmarks/bohb_against_random.py [--seeds 5] [--workers 3] [--runs FOLDER] [--set KEY=VALUE]

For each seed: recipes/studies/digits_bohb.toml, then recipes/studies/digits_random.toml with as many runs as fit in the
epochs that BOHB trained, rounded up. Finished runs in FOLDER are not trained again. Prints the result of each search
and the paired comparison, in Markdown, and plots the best value so far (SVG and PDF).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from toolkit.errors import EXIT_INTERRUPTED
from toolkit.report.plot_style import plot_style, save
from toolkit.study.bohb import budgets
from toolkit.study.directory import StudyDirectory
from toolkit.study.expand import expand, read_study
from toolkit.study.plot_types import incumbent_curve
from toolkit.study.plots import incumbents
from toolkit.study.runner import run_study
from toolkit.study.significance import compare
from toolkit.study.study_results import StudyResults, TableOptions, read_outcomes
from toolkit.study.text_table import TextTable, markdown
from toolkit.study.worker_pool import slots_for

STUDIES = Path(__file__).parent.parent / "recipes" / "studies"
FIGURES = ("val_loss", "val_accuracy", "test_accuracy")


def main() -> None:
    """Train the missing runs, compare the searches and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    pairs = []
    for seed in range(options.seeds):
        bohb = searched("bohb", seed, options, "bohb", [])
        epochs = sum(len(result.epochs) for result in bohb.results)
        assert bohb.table.bohb is not None
        runs = math.ceil(epochs / bohb.table.bohb.max_epochs)
        pairs.append((bohb, searched("random", seed, options, "random", [f"study.random.runs={runs}"])))
    print(markdown(findings(pairs)), "\n")
    print(markdown(comparison(pairs)))
    draw(pairs, options.runs)


def searched(kind: str, seed: int, options: argparse.Namespace, table: str, more: list[str]) -> StudyResults:
    """Run or complete a search and return its result."""
    name = f"digits-{kind}-{seed}"
    settings = [f'recipe.name="{name}"', f'recipe.run_root="{options.runs}"', f"study.{table}.seed={seed}", *more]
    study = read_study(STUDIES / f"digits_{kind}.toml", [*settings, *options.set])
    if run_study(study, expand(study), slots_for(options.workers, 1, 1, ())) == EXIT_INTERRUPTED:
        raise SystemExit(EXIT_INTERRUPTED)
    return read_outcomes(StudyDirectory(study.folder), TableOptions())


def best(found: StudyResults) -> dict[str, float]:
    """Return the metrics of the best finished run by the objective."""
    return found.trials[0].result.metrics


def findings(pairs: list[tuple[StudyResults, StudyResults]]) -> TextTable:
    """Return a table with one row per search."""
    head = [
        "search",
        "seed",
        "configurations",
        "epochs trained",
        "if retrained",
        "val. loss",
        "val. acc. %",
        "test acc. %",
    ]
    rows = []
    for seed, pair in enumerate(pairs):
        for name, found in zip(("BOHB", "random"), pair, strict=True):
            loss, accuracy, test = (best(found)[figure] for figure in FIGURES)
            epochs = sum(len(result.epochs) for result in found.results)
            cells = [f"{loss:.4f}", f"{accuracy * 100:.2f}", f"{test * 100:.2f}"]
            rows.append([name, str(seed), str(len(found.results)), str(epochs), str(if_retrained(found)), *cells])
    return TextTable("The best configuration of each search", head, rows)


def if_retrained(found: StudyResults) -> int:
    """Return the epochs that the search would need if every budget were trained from the first epoch."""
    table = found.table.bohb
    steps = budgets(table.min_epochs, table.max_epochs, table.eta) if table else []
    reached = [len(result.epochs) for result in found.results]
    return sum(sum(step for step in steps if step < epochs) + epochs for epochs in reached)


def comparison(pairs: list[tuple[StudyResults, StudyResults]]) -> TextTable:
    """Return a table of the paired differences, BOHB minus random search, over the seeds."""
    head = [
        "figure",
        "BOHB, mean",
        "random, mean",
        "difference",
        "95 % interval",
        "t-test p",
        "permutation p",
        "better",
    ]
    rows = []
    for figure in FIGURES:
        ours, theirs = [best(one)[figure] for one, _ in pairs], [best(other)[figure] for _, other in pairs]
        found = compare(ours, theirs, 0.95)
        low, high = found.difference.interval or (math.nan, math.nan)
        sign = -1 if figure.endswith("loss") else 1
        better = sum(sign * (a - b) > 0 for a, b in zip(ours, theirs, strict=True))
        rows.append([figure, f"{sum(ours) / len(ours):.4f}", f"{sum(theirs) / len(theirs):.4f}",
                     f"{found.difference.mean:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{found.t_test or math.nan:.4f}",
                     f"{found.exact or math.nan:.4f}", f"{better} of {len(pairs)}"])  # fmt: skip
    return TextTable("BOHB against random search", head, rows)


def draw(pairs: list[tuple[StudyResults, StudyResults]], folder: Path) -> None:
    """Plot the best value so far against the epochs trained: the mean over the seeds, once all of them have one."""
    curves = {
        name: mean_of([incumbents(pair[index]) for pair in pairs])
        for index, name in enumerate(("BOHB", "random search"))
    }
    with plot_style(print):
        figure = incumbent_curve(curves, "val/loss", f"Digits, mean of {len(pairs)} seeds")
        figure.axes[0].set_yscale("log")
        save(figure, folder, "bohb-against-random")


def mean_of(searches: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of step functions at each point where one of them changes, over their common range."""
    first, last = max(points[0][0] for points in searches), min(points[-1][0] for points in searches)
    places = sorted({cost for points in searches for cost, _ in points if first <= cost <= last})
    return [(cost, sum(_at(points, cost) for points in searches) / len(searches)) for cost in places]


def _at(points: list[tuple[float, float]], cost: float) -> float:
    return [value for spent, value in points if spent <= cost][-1]


if __name__ == "__main__":
    main()
