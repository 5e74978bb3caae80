"""The contents of study plots, on studies whose results follow a formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import toolkit
from matplotlib.figure import Figure
from study_folders import FakeRun, write_study

from toolkit.recipe.study_schema import BohbSearchConfig
from toolkit.study.bohb import BohbScheduler
from toolkit.study.directory import StudyDirectory
from toolkit.study.plots import (
    comparable,
    incumbents,
    parameter_importance,
    study_figures,
    training_order,
)
from toolkit.study.search_space import random_configurations, read_space
from toolkit.study.study_results import StudyResults, TableOptions, read_outcomes

pytestmark = pytest.mark.usefixtures("pdf_figures")

SPACE: dict[str, Any] = {
    "optimizer": {
        "lr": {"log_uniform": [1e-6, 1e-1]},
        "weight_decay": {"log_uniform": [1e-6, 1e-1]},
        "name": {"choice": ["sgd", "adamw"]},
        "momentum": {"uniform": [0, 0.99], "when": {"optimizer": {"name": "sgd"}}},
    }
}


def accuracies(changes: dict[str, Any]) -> list[float]:
    """Return 30 accuracies: best at lr 1e-3, weakly dependent on weight decay, not on the optimizer's name."""
    off = abs(math.log10(changes["optimizer.lr"]) + 3) + 0.1 * abs(math.log10(changes["optimizer.weight_decay"]) + 4)
    return [round(0.95 - 0.1 * off - 0.3 * math.exp(-epoch / 5), 6) for epoch in range(1, 31)]


def outcomes_of(folder: StudyDirectory) -> StudyResults:
    return read_outcomes(folder, TableOptions())


def bohb_study(path: Path, trials: int = 40) -> tuple[StudyResults, BohbScheduler, list[tuple[int, int]]]:
    """Write a search by one worker; return its directory and order as (trial, epochs reached)."""
    table = BohbSearchConfig(trials=trials, brackets=1)
    search, order = BohbScheduler(table, read_space(SPACE, {})), []
    while (assignment := search.ask()) is not None:
        search.tell(assignment.trial, accuracies(assignment.changes)[: assignment.until_epoch])
        order.append((assignment.trial, assignment.until_epoch))
    runs = [FakeRun(f"trial {t.number}", 0, t.changes, t.values, 0.5, "finished" if len(t.values) == 30 else "paused")
            for t in search.trials]  # fmt: skip
    study = {"description": "BOHB", "space": SPACE, "bohb": {"trials": trials, "brackets": 1}}
    return outcomes_of(write_study(path / "bohb", study, runs)), search, order


def drawn(found: StudyResults) -> dict[str, Figure]:
    return {drawn.name: drawn.figure for drawn in study_figures(found)}


def dropout_study(path: Path) -> StudyResults:
    """Write a study of nine dropout rates, each with two seeds of 10 and 12 epochs."""
    runs = [
        FakeRun(f"dropout {level / 10}", seed, {"model.convnet.dropout": level / 10},
                [0.5 + 0.01 * epoch + 0.01 * seed for epoch in range(10 + 2 * seed)], 0.6)
        for level in range(1, 10) for seed in range(2)
    ]  # fmt: skip
    return outcomes_of(write_study(path / "dropout", {"description": "Dropout", "rows": [{"name": "x"}]}, runs))


def test_rows_are_in_one_plot_with_their_standard_deviation(tmp_path: Path) -> None:
    axes = drawn(dropout_study(tmp_path))["curves-val-accuracy"].axes[0]
    assert len(axes.lines) == 9
    # The mean of both seeds, in percent, over the ten epochs that both have; the standard deviation of 0.00 and 0.01.
    assert np.asarray(axes.lines[0].get_ydata()) == pytest.approx([50.5 + epoch for epoch in range(10)])
    band = axes.collections[0].get_paths()[0].vertices
    assert np.ptp(band[band[:, 0] == 1][:, 1]) == pytest.approx(2 * 100 * 0.01 / math.sqrt(2))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation accuracy (%)")
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 9


def test_runs_colored_by_a_parameter(tmp_path: Path) -> None:
    """As in figure M12: 18 curves, from light for the smallest to dark for the largest value, with a color bar."""
    figure = drawn(dropout_study(tmp_path))["curves-by-dropout"]
    axes, scale = figure.axes
    assert len(axes.lines) == 18
    lightness = [sum(line.get_color()[:3]) for line in axes.lines[::2]]
    assert lightness == sorted(lightness, reverse=True)
    assert scale.get_ylabel() == "model.convnet.dropout"
    assert axes.lines[1].get_xdata()[-1] == 12


def test_batch_sizes_are_colored_on_a_logarithmic_scale(tmp_path: Path) -> None:
    """In Mereu's table 6, 32 to 512 in powers of two are at equal distances on the color scale."""
    sizes = [32, 64, 128, 256, 512]
    runs = [FakeRun(f"batch {n}", 0, {"train.batch_size": n}, [0.5, 0.6]) for n in sizes]
    figure = drawn(outcomes_of(write_study(tmp_path / "s", {"rows": [{"name": "x"}]}, runs)))["curves-by-batch_size"]
    scale = figure.axes[1]
    assert scale.get_yscale() == "log"
    assert [tick.get_text() for tick in scale.get_yticklabels()] == [str(n) for n in sizes]


def test_training_accuracy_has_curves_of_its_own(tmp_path: Path) -> None:
    axes = drawn(dropout_study(tmp_path))["curves-train-accuracy"].axes[0]
    assert axes.get_ylabel() == "training accuracy (%)"
    assert list(axes.lines[0].get_ydata()) == pytest.approx([55.5 + epoch for epoch in range(10)]), (
        "0.05 above validation"
    )


def test_a_plot_over_a_varied_value_has_validation_and_test(tmp_path: Path) -> None:
    axes = drawn(dropout_study(tmp_path))["levels-dropout"].axes[0]
    assert axes.get_xlabel() == "model.convnet.dropout"
    assert axes.get_ylabel() == "accuracy (%)"
    validation, test = axes.containers
    assert list(validation[0].get_xdata()) == pytest.approx([level / 10 for level in range(1, 10)])
    # Accuracy at the best epoch: 0.59 for seed 0, 0.62 for seed 1.
    assert list(validation[0].get_ydata()) == pytest.approx([60.5] * 9)
    assert list(test[0].get_ydata()) == pytest.approx([60.0] * 9)


def test_only_a_logarithmic_range_has_a_logarithmic_color_scale(tmp_path: Path) -> None:
    figures = drawn(bohb_study(tmp_path)[0])
    assert figures["curves-by-lr"].axes[1].get_yscale() == "log"
    assert figures["curves-by-momentum"].axes[1].get_yscale() == "linear"


def test_importance_follows_the_formula_of_the_results(tmp_path: Path) -> None:
    """Over 120 random configurations the learning rate explains nearly all variance, the optimizer's name none."""
    space = read_space(SPACE, {})
    runs = [FakeRun(f"{n}", 0, c, accuracies(c)) for n, c in enumerate(random_configurations(space, 120, 0))]
    found = outcomes_of(write_study(tmp_path / "s", {"space": SPACE, "random": {"runs": 120}}, runs))
    shares = parameter_importance(found, comparable(found)[0])
    momentum = next(name for name in shares if name.startswith("optimizer.momentum (in "))
    assert shares["optimizer.lr"] > 0.9
    assert shares["optimizer.weight_decay"] < 0.1
    assert shares["optimizer.name"] < 0.05
    assert shares[momentum] < 0.05
    assert sum(shares[f"optimizer.{name}"] for name in ("lr", "weight_decay", "name")) == pytest.approx(1)


def test_importance_is_computed_for_a_grid_but_not_for_too_few_runs(tmp_path: Path) -> None:
    runs = [
        FakeRun(f"{lr} {batch}", 0, {"optimizer.lr": lr, "train.batch_size": batch}, [0.5 + (lr == 0.1) * 0.3])
        for lr in (0.1, 0.01, 0.001) for batch in (32, 64, 128)
    ]  # fmt: skip
    study = {"grid": {"optimizer.lr": [0.1, 0.01, 0.001]}}
    found = outcomes_of(write_study(tmp_path / "s", study, runs))
    shares = parameter_importance(found, comparable(found)[0])
    assert shares["optimizer.lr"] == pytest.approx(1)
    few = outcomes_of(write_study(tmp_path / "few", study, runs[:7]))
    assert parameter_importance(few, comparable(few)[0]) == {}
    assert "importance" not in drawn(few)


def test_all_configurations_of_a_search_are_compared_within_the_smallest_budget(tmp_path: Path) -> None:
    found, search, _ = bohb_study(tmp_path)
    runs, what = comparable(found)
    assert what == "configurations, within 3 epochs"
    assert [value for _, value in runs] == [max(accuracies(t.changes)[:3]) for t in search.trials]


def test_best_so_far_follows_the_order_of_one_worker(tmp_path: Path) -> None:
    found, search, order = bohb_study(tmp_path)
    numbers = {result.member.row: number for number, result in enumerate(found.results)}
    assert [(numbers[result.member.row], until) for result, _, until in training_order(found)] == order
    points = incumbents(found)
    assert points[-1] == (sum(len(t.values) for t in search.trials), max(max(t.values) for t in search.trials))
    best = [value for _, value in points]
    assert best == sorted(best)
    assert points[0] == (3, max(accuracies(search.trials[0].changes)[:3]))


def test_best_so_far_counts_every_epoch_of_a_search_by_several_workers(tmp_path: Path) -> None:
    """It includes a configuration that a single worker would not have promoted."""
    changes = random_configurations(read_space(SPACE, {}), 4, seed=0)
    runs = [FakeRun(f"{n}", 0, c, accuracies(c)[:epochs], state="paused")
            for n, (c, epochs) in enumerate(zip(changes, (10, 10, 3, 3), strict=True))]  # fmt: skip
    folder = write_study(tmp_path / "s", {"space": SPACE, "bohb": {"trials": 9, "brackets": 1}}, runs)
    assert incumbents(outcomes_of(folder))[-1][0] == 26


def test_parallel_coordinates_have_one_line_per_configuration(tmp_path: Path) -> None:
    found, search, _ = bohb_study(tmp_path)
    figure = drawn(found)["parallel-coordinates"]
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(lines) == 40
    with_momentum = sum("optimizer.momentum" in t.changes for t in search.trials)
    assert sum(len(line.get_xdata()) == 4 for line in lines) == with_momentum
    assert figure.axes[1].get_ylabel() == "validation accuracy (%)"


def test_the_command_writes_svg_and_pdf(tmp_path: Path) -> None:
    dropout_study(tmp_path)
    outcome = toolkit("table", tmp_path / "dropout", "--figures")
    assert outcome.status == 0
    files = {path.name for path in (tmp_path / "dropout" / "figures").iterdir()}
    names = {
        "curves-train-loss",
        "curves-train-accuracy",
        "curves-val-loss",
        "curves-val-accuracy",
        "curves-by-dropout",
        "levels-dropout",
    }
    assert files == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    assert all((tmp_path / "dropout" / "figures" / name).stat().st_size > 1000 for name in files)


def test_a_study_without_results_has_no_plots(tmp_path: Path) -> None:
    runs = [FakeRun("a", state="missing"), FakeRun("b", val_accuracy=[], state="paused")]
    assert drawn(outcomes_of(write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, runs))) == {}
    study = {"space": SPACE, "bohb": {"trials": 9}}
    assert drawn(outcomes_of(write_study(tmp_path / "t", study, runs))) == {}


def test_names_with_dollar_signs_are_not_rendered_as_formulas(tmp_path: Path) -> None:
    runs = [FakeRun(f"$x_{n}$ \\frac", 0, {"a.b": f"$y^{n}"}, [0.5, 0.6]) for n in range(3)]
    write_study(tmp_path / "s", {"description": "$\\", "rows": [{"name": "a"}]}, runs)
    assert toolkit("table", tmp_path / "s", "--figures").status == 0
