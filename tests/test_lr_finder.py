"""toolkit find-lr: the steps, the suggestions, and that they are the same on any number of processes."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from cli import toolkit
from distributed import launch

from toolkit import lr_finder
from toolkit.errors import UserError
from toolkit.lr_finder import RangeStep, RangeTest, find_lr
from toolkit.recipe import load_recipe
from toolkit.training.fit import fit
from toolkit.training.train_step import TrainStep

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("pdf_figures")]

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


@pytest.fixture(scope="module")
def quickstart() -> RangeTest:
    """Return the range test of the quickstart with the default settings."""
    return find_lr(load_recipe(QUICKSTART))[0]


def test_the_learning_rate_rises_until_the_loss_diverges(quickstart: RangeTest) -> None:
    lrs = [step.lr for step in quickstart.steps]
    assert lrs[0] == pytest.approx(1e-7)
    ratios = [after / before for before, after in itertools.pairwise(lrs)]
    assert ratios == pytest.approx([10 ** (8 / 99)] * len(ratios))
    assert quickstart.diverged
    assert len(lrs) < 100
    averages = [step.average for step in quickstart.steps]
    assert averages[-1] > 4 * min(averages) or not math.isfinite(quickstart.steps[-1].loss)
    assert all(average <= 4 * min(averages[: index + 1]) for index, average in enumerate(averages[:-1]))


def test_the_average_is_the_weighted_mean_of_all_losses_so_far(quickstart: RangeTest) -> None:
    losses = [step.loss for step in quickstart.steps[:30]]
    weights = [0.98 ** (29 - index) for index in range(30)]
    mean = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert quickstart.steps[29].average == pytest.approx(mean)


def test_a_run_with_the_suggestion_reaches_the_accuracy_that_the_recipe_expects(
    quickstart: RangeTest, tmp_path: Path
) -> None:
    assert quickstart.is_reliable
    settings = [f"optimizer.lr={lr_finder.rounded(quickstart.valley)}", f"recipe.run_root='{tmp_path}'"]
    run = fit(load_recipe(QUICKSTART, [*settings, "train.epochs=10", "tracking.trackers=[]"]))
    assert run.summary["best"]["test_accuracy"] >= 0.97


def test_two_processes_agree_with_one(quickstart: RangeTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    first, second = launch(2, toolkit, "find-lr", QUICKSTART, "--json")
    assert first.status == second.status == 0, first.stderr + second.stderr
    assert second.stdout == ""
    found = json.loads(first.stdout)
    losses = [step["loss"] for step in found["steps"]]
    low = sum(step.lr < 1e-3 for step in quickstart.steps)  # at high rates, training amplifies rounding
    assert losses[:low] == pytest.approx([step.loss for step in quickstart.steps[:low]], rel=1e-3)
    assert found["valley"] == pytest.approx(quickstart.valley, rel=0.5)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "lr-finder", "lr_finder.csv", "lr_finder.svg", "quickstart"
    ]  # fmt: skip


def test_the_learning_rates_of_all_layer_groups_rise_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    update = TrainStep._update

    def record(self: TrainStep, number: int) -> None:
        seen.append(sorted({group["lr"] for group in self.optimizer.param_groups}))
        update(self, number)

    monkeypatch.setattr(TrainStep, "_update", record)
    settings = ["transfer.head_lr=10", "data.images_per_class=10", "train.batch_size=16", "train.grad_accum_steps=2"]
    found, _ = find_lr(load_recipe(QUICKSTART, settings), steps=25, max_lr=1e-2)
    assert seen == [pytest.approx([step.lr, 10 * step.lr]) for step in found.steps]
    assert len(seen) == 25, "over several epochs"


def test_the_command_prints_a_table_and_the_setting_and_writes_into_the_folder_given(tmp_path: Path) -> None:
    small = ["data.images_per_class=10", "train.batch_size=16"]
    changes = [part for setting in small for part in ("--set", setting)]
    outcome = toolkit("find-lr", QUICKSTART, "--steps", "30", "--max-lr", "1", "-o", tmp_path, *changes)
    assert outcome.status == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["optimizer.lr", "loss", "average"]
    assert [Path(line).name for line in lines[-2:]] == ["lr_finder.csv", "lr_finder.svg"]
    with (tmp_path / "lr_finder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(number) for number in range(1, 31)]
    assert float(rows[-1]["lr"]) == pytest.approx(1)
    (setting,) = [line for line in lines if line.startswith("to use it: ")]
    assert setting.startswith(
        f"to use it: {shlex.join(['toolkit', 'train', str(QUICKSTART), *changes])} --set optimizer.lr="
    )
    assert 1e-7 < float(setting.partition("lr=")[2]) < 1


def steps_of(averages: list[float]) -> list[RangeStep]:
    """Return steps with the given average losses, at learning rates 1, 2, 3, ..."""
    return [RangeStep(float(number), average, average) for number, average in enumerate(averages, 1)]


@pytest.mark.parametrize(
    "losses", [[3, 2, 4, 1, 5, 0, 6, 7], [5, 4, 3, 2, 1, 0, 9], [1, 2, 3, 4], [4, 9, 3, 8, 2, 7, 1]]
)
def test_the_valley_is_the_longest_decreasing_subsequence(losses: list[float]) -> None:
    def falls(chosen: tuple[int, ...]) -> bool:
        return all(losses[before] > losses[after] for before, after in itertools.pairwise(chosen))

    subsets = [c for size in range(1, len(losses) + 1) for c in itertools.combinations(range(len(losses)), size)]
    longest = max(len(chosen) for chosen in subsets if falls(chosen))
    end = min(chosen[-1] for chosen in subsets if len(chosen) == longest and falls(chosen))
    start, third = end - longest, longest / 3
    assert lr_finder.valley(losses) == max(start, 0) + int(third) + int(third / 2)


def test_suggestions_leave_out_the_first_tenth_and_the_last_five_steps() -> None:
    averages = [9.0, 5.0, *(8.0 - index for index in range(8)), 1.5, 1.2, 0.1, 0.2, 3.0, 4.0, 5.0]
    found = lr_finder.suggest(steps_of([float(value) for value in averages]), planned=20)
    assert found.minimum == pytest.approx(1.0)  # average 1 at learning rate 10
    assert found.steepest in range(3, 10)
    assert found.fall == pytest.approx(1 - 1 / 8)


def bad(*arguments: Any) -> str:
    outcome = toolkit("find-lr", *arguments)
    assert outcome.status == 2
    return outcome.stderr


def test_wrong_arguments_get_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the learning rate must rise: 1 to 0.1 does not" in bad(QUICKSTART, "--min-lr", "1", "--max-lr", "0.1")
    assert "is a study of many runs" in bad("digits_seeds")
    with pytest.raises(UserError, match=r"the loss diverged at learning rate 12\): set a smaller --min-lr"):
        lr_finder.suggest(steps_of([1.0] * 11 + [9.0]), planned=100)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_hardly_falls_is_called_unreliable() -> None:
    recipe = load_recipe(QUICKSTART)
    found = lr_finder.suggest(steps_of([2.0 - 0.001 * number for number in range(30)]), planned=30)
    assert not found.is_reliable
    assert "the loss fell by only 1.1%, so the suggestion is not reliable" in lr_finder.range_test_text(
        found, recipe, "toolkit train x.toml"
    )
