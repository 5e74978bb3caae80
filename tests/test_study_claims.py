"""Verdicts on claims, agreement with published values, and comparability, on runs with known answers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli import toolkit
from scipy import stats
from studies import BASE
from study_folders import FakeRun, write_study

from toolkit.study.significance import McNemar, pairs_needed

CLAIM = {"statement": "a beats b", "source": "someone, 1", "metric": "val_accuracy", "better": "a", "than": ["b"]}


def run_seeds(row: str, values: Sequence[float], first: int = 0, **more: Any) -> list[FakeRun]:
    return [FakeRun(row, seed, val_accuracy=[value], **more) for seed, value in enumerate(values, first)]


def outcome(folder: Path, runs: Sequence[FakeRun], assumptions: dict[str, str] | None = None, **claim: Any) -> Any:
    """Return the output of ``toolkit table --json`` for a study with one claim."""
    study = write_study(folder / "small", {"claims": [CLAIM | claim]}, runs)
    if assumptions:
        study.write({**study.record, "assumptions": assumptions}, study.members)
    shown = toolkit("table", str(study.path), "--json")
    assert shown.status == 0, shown.stderr
    return json.loads(shown.stdout)


def judged(folder: Path, runs: Sequence[FakeRun], **claim: Any) -> dict[str, Any]:
    (found,) = outcome(folder, runs, **claim)["claims"]
    assert isinstance(found, dict)
    return found


# -- over seeds -------------------------------------------------------------------------------------------------------


def test_reproduced_over_the_same_seeds(tmp_path: Path) -> None:
    """Differences 0.03, 0.04, 0.05: 0.04 +- 4.302653 * 0.01 / sqrt 3, although the rows overlap."""
    found = judged(tmp_path, run_seeds("a", [0.53, 0.64, 0.75]) + run_seeds("b", [0.5, 0.6, 0.7]))
    assert (found["verdict"], found["runs"], found["seeds_to_decide"]) == ("reproduced", "3 pairs", None)
    assert found["effect"] == pytest.approx(0.04)
    assert found["seeds_low"] == pytest.approx(0.04 - 4.302653 * 0.01 / math.sqrt(3), abs=1e-6)
    assert found["seeds_high"] == pytest.approx(0.04 + 4.302653 * 0.01 / math.sqrt(3), abs=1e-6)


def test_not_reproduced_if_the_opposite_is_significant(tmp_path: Path) -> None:
    found = judged(tmp_path, run_seeds("a", [0.5, 0.6, 0.7]) + run_seeds("b", [0.53, 0.64, 0.75]))
    assert found["verdict"] == "not reproduced"


def test_undecided_with_the_number_of_seeds_that_would_decide(tmp_path: Path) -> None:
    """Differences 0.01, 0.02, -0.015: mean 0.005, standard deviation 0.0180278."""
    found = judged(tmp_path, run_seeds("a", [0.51, 0.62, 0.685]) + run_seeds("b", [0.5, 0.6, 0.7]))
    assert found["verdict"] == "undecidable"
    assert found["seeds_to_decide"] == pairs_needed(0.005, 0.0180278, 0.95)


def test_a_smaller_loss_is_better(tmp_path: Path) -> None:
    """Losses are 1 minus the accuracy."""
    runs = run_seeds("a", [0.53, 0.64, 0.75]) + run_seeds("b", [0.5, 0.6, 0.7])
    found = judged(tmp_path, runs, metric="val_loss")
    assert found["verdict"] == "reproduced"
    assert found["effect"] == pytest.approx(0.04)


@pytest.mark.parametrize(("margin", "verdict"), [(0.0, "reproduced"), (0.04, "undecidable"), (0.07, "not reproduced")])
def test_a_claimed_margin_is_compared_with_the_confidence_interval(tmp_path: Path, margin: float, verdict: str) -> None:
    """The interval is 0.0152 to 0.0648."""
    runs = run_seeds("a", [0.53, 0.64, 0.75]) + run_seeds("b", [0.5, 0.6, 0.7])
    assert judged(tmp_path, runs, margin=margin)["verdict"] == verdict


@pytest.mark.parametrize(("margin", "verdict"), [(0.0, "not reproduced"), (0.04, "undecidable"), (0.07, "reproduced")])
def test_a_claim_of_no_improvement_is_judged(tmp_path: Path, margin: float, verdict: str) -> None:
    runs = run_seeds("a", [0.53, 0.64, 0.75]) + run_seeds("b", [0.5, 0.6, 0.7])
    assert judged(tmp_path, runs, margin=margin, holds=False)["verdict"] == verdict


def test_rows_with_different_seeds_are_compared_by_welchs_test(tmp_path: Path) -> None:
    a, b = [0.60, 0.61, 0.62], [0.50, 0.52, 0.51]
    found = judged(tmp_path, run_seeds("a", a) + run_seeds("b", b, first=10))
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found["verdict"], found["runs"]) == ("reproduced", "3 and 3 runs")
    assert (found["seeds_low"], found["seeds_high"]) == pytest.approx((low, high))


def test_the_best_row_must_beat_every_other(tmp_path: Path) -> None:
    a, b = run_seeds("a", [0.53, 0.64, 0.75]), run_seeds("b", [0.5, 0.6, 0.7])
    close = run_seeds("c", [0.54, 0.63, 0.75])
    assert judged(tmp_path / "1", [*a, *b], than=[])["verdict"] == "reproduced"
    found = judged(tmp_path / "2", [*a, *b, *close], than=[])
    assert (found["verdict"], found["compared_with"]) == ("undecidable", "c")
    better = run_seeds("d", [0.58, 0.70, 0.80])
    assert judged(tmp_path / "3", [*a, *b, *better], than=[])["compared_with"] == "d"


def test_groups_selected_by_keys_are_paired_by_all_other_keys(tmp_path: Path) -> None:
    """Decay 0.9 is better by 0.03, 0.04, 0.05 at three learning rates with very different accuracies."""
    runs = [
        FakeRun(f"{gamma} {lr}", 0, {"scheduler.gamma": gamma, "optimizer.lr": lr}, [value])
        for lr, low, high in ((0.1, 0.2, 0.23), (0.01, 0.5, 0.54), (0.001, 0.8, 0.85))
        for gamma, value in ((0.9, high), (0.99, low))
    ]
    found = judged(tmp_path, runs, better={"scheduler": {"gamma": 0.9}}, than={"scheduler": {"gamma": 0.99}})
    assert (found["verdict"], found["runs"]) == ("reproduced", "3 pairs")
    assert found["effect"] == pytest.approx(0.04)


# -- one run per row --------------------------------------------------------------------------------------------------


def test_rows_of_one_run_are_compared_over_test_images(tmp_path: Path) -> None:
    """Only a is correct on 20 images, only b on 5; p equals that of scipy's exact binomial test."""
    a = FakeRun("a", right=[True] * 120 + [False] * 5 + [False] * 75)
    b = FakeRun("b", right=[True] * 100 + [False] * 20 + [True] * 5 + [False] * 75)
    found = judged(tmp_path, [a, b], metric="test_accuracy")
    test = stats.binomtest(20, 25)
    bounds = test.proportion_ci()
    assert found["verdict"] == "reproduced"
    assert f"p {test.pvalue:.4f}" in found["reason"]
    assert found["effect"] == pytest.approx(15 / 200)
    assert (found["images_low"], found["images_high"]) == pytest.approx(
        ((2 * bounds.low - 1) * 25 / 200, (2 * bounds.high - 1) * 25 / 200)
    )
    assert found["seeds_low"] is None


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 2), (0, 5), (0, 6), (6, 0), (40, 20), (40, 22)])
def test_the_interval_over_images_agrees_with_the_exact_test(first: int, second: int) -> None:
    test = McNemar(first, second, 500)
    assert test.p == pytest.approx(stats.binomtest(first, first + second).pvalue if first + second else 1.0)
    low, high = test.interval(0.95)
    assert (low > 0 or high < 0) == (test.p < 0.05)


@pytest.mark.parametrize("metric", ["val_accuracy", "test_accuracy"])
def test_one_run_without_predictions_leaves_a_claim_undecided(tmp_path: Path, metric: str) -> None:
    found = judged(tmp_path, [FakeRun("a", 0, {}, [0.9], 0.9), FakeRun("b", 0, {}, [0.1], 0.1)], metric=metric)
    assert (found["verdict"], found["effect"]) == ("undecidable", pytest.approx(0.8))


def test_an_unfinished_row_leaves_a_claim_undecided(tmp_path: Path) -> None:
    found = judged(tmp_path, [*run_seeds("a", [0.5, 0.6]), FakeRun("b", state="missing")])
    assert (found["verdict"], found["reason"]) == ("undecidable", "b has no finished run with this metric")


def test_the_power_calculation_matches_published_tables() -> None:
    """Effect of half a standard deviation, 80 % power, 5 %: 34 pairs, or 64 in each of two samples (Cohen 1988)."""
    assert pairs_needed(0.5, 1.0, 0.95) == 34
    assert pairs_needed(0.5, math.sqrt(2), 0.95, samples=2) == 64
    assert pairs_needed(0.0, 1.0, 0.95) is None


def test_runs_under_other_conditions_leave_a_claim_undecided(tmp_path: Path) -> None:
    """The runs of the first test of this file, but trained on a part of the images."""
    a = run_seeds("a", [0.53, 0.64, 0.75])
    b = run_seeds("b", [0.5, 0.6, 0.7], not_comparable="the run used part of the images")
    found = judged(tmp_path, a + b)
    assert (found["verdict"], found["effect"]) == ("undecidable", None)
    assert found["reason"] == "not comparable: the run used part of the images"


# -- agreement and comparability --------------------------------------------------------------------------------------


def published_rows(not_comparable: str = "") -> list[FakeRun]:
    """Measured 0.5, 0.6, 0.8 over 100 test images; published 0.52, 0.75, 0.70."""
    return [
        FakeRun(row, 0, {}, [0.5], measured, images={"test": 100}, published={"test_accuracy": published},
                not_comparable=not_comparable)
        for row, measured, published in (("a", 0.5, 0.52), ("b", 0.6, 0.75), ("c", 0.8, 0.7))
    ]  # fmt: skip


def test_agreement_of_single_runs(tmp_path: Path) -> None:
    """Ranks 1 2 3 and 1 3 2: 1 - 6 * 2 / 24. Binomial errors 0.05, 0.049, 0.04: 0.02 is within two of them."""
    (found,) = outcome(tmp_path, published_rows())["agreement"]
    assert found["rank_correlation"] == pytest.approx(0.5)
    assert found["mean_difference"] == pytest.approx(0.09)
    assert found["within"] == pytest.approx(1 / 3)
    assert (found["rows"], found["noise"]) == (3, "test images")


def test_agreement_over_several_studies_is_that_of_all_their_rows(tmp_path: Path) -> None:
    """Two studies of one and two rows agree as one study of all three does; each row alone has no agreement."""
    first, *others = published_rows()
    one = write_study(tmp_path / "one", {}, [first]).path
    other = write_study(tmp_path / "other", {"claims": [CLAIM | {"better": "b", "than": ["c"]}]}, others).path
    whole = outcome(tmp_path, published_rows())
    shown = toolkit("table", str(one), str(other), "--columns", "test_accuracy", "--json")
    assert shown.status == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["agreement"] == [each for each in whole["agreement"] if each["metric"] == "test_accuracy"]
    assert len(found["agreement"]) == 1
    assert [claim["claim"] for claim in found["claims"]] == ["a beats b"]
    text = toolkit("table", str(one), str(other)).stdout
    assert "rank correlation" in text
    assert "a beats b" in text
    refused = toolkit("table", str(one), str(other), "--sort", "test_accuracy")
    assert (refused.status, "only --columns and --json" in refused.stderr) == (2, True)


def test_agreement_over_seeds_uses_their_standard_deviation(tmp_path: Path) -> None:
    """With standard deviations of 0.1 the mean 0.5 is within 0.2 of 0.65 and the mean 0.6 beyond 0.2 of 0.9."""
    runs = [
        *run_seeds("a", [0.4, 0.5, 0.6], published={"val_accuracy": 0.65}),
        *run_seeds("b", [0.5, 0.6, 0.7], published={"val_accuracy": 0.9}),
    ]
    (found,) = outcome(tmp_path, runs)["agreement"]
    assert (found["within"], found["noise"], found["rank_correlation"]) == (0.5, "seeds", None)


def test_rows_that_are_not_comparable_print_no_difference(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "small", {}, published_rows("the run used part of the images")).path
    shown = toolkit("table", str(folder), "--columns", "test_accuracy")
    assert shown.status == 0
    assert shown.stdout.count("not comparable: the run used part of the images") == 3
    assert "15.00" not in shown.stdout
    assert "rank correlation" not in shown.stdout
    for name in ("table.md", "table.tex"):
        assert (folder / name).read_text().count("not comparable: the run used part of the images") == 3
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["test_accuracy_difference"] for row in rows] == ["", "", ""]
    assert {row["not_comparable"] for row in rows} == {"the run used part of the images"}


def test_a_study_under_other_conditions_has_no_column_of_differences(tmp_path: Path) -> None:
    settings = {"not_comparable": "another network"}
    folder = write_study(tmp_path / "small", settings, published_rows("another network")).path
    shown = toolkit("table", str(folder), "--columns", "test_accuracy").stdout
    assert "diff." not in shown
    assert "published" in shown
    assert shown.count("Not comparable: another network.") == 1
    assert "rank correlation" not in shown


def test_a_study_on_a_part_of_the_data_prints_no_difference_and_no_verdict(tmp_path: Path) -> None:
    """Run through the command line; the claim also names a row without a published value."""
    rows = """
[[study.rows]]
name = "as it is"
published = { test_accuracy = 0.9 }
[[study.rows]]
name = "SGD"
set.optimizer.name = "sgd"
[study.output]
columns = ["test_accuracy"]
[[study.claims]]
statement = "x"
metric = "test_accuracy"
better = "SGD"
than = ["as it is"]
"""
    base = "".join(
        line
        for line in BASE.format(root=tmp_path / "runs", epochs=1).splitlines(keepends=True)
        if "images_per_class" not in line
    )
    path = tmp_path / "study.toml"
    path.write_text(base + rows)
    trained = toolkit("study", str(path), "--set", "data.images_per_class=5")
    assert trained.status == 0, trained.stderr
    assert ", 1 epoch\n" in trained.stderr
    found = json.loads(toolkit("table", str(tmp_path / "runs" / "small"), "--json").stdout)
    first, second = found["rows"]
    assert (first["test_accuracy_published"], first["test_accuracy_difference"]) == (0.9, None)
    assert first["test_accuracy"] is not None
    assert first["not_comparable"] == "the run used part of the images"
    assert "not_comparable" not in second, "the row has no published value"
    (claim,) = found["claims"]
    assert (claim["verdict"], claim["reason"]) == ("undecidable", "not comparable: the run used part of the images")
    assert found["agreement"] == []
    assert "not comparable: the run used part of the images" in trained.stdout


def test_verdicts_and_assumptions_are_in_all_files(tmp_path: Path) -> None:
    runs = run_seeds("a", [0.53, 0.64, 0.75]) + run_seeds("b", [0.5, 0.6, 0.7])
    found = outcome(tmp_path, runs, {"train.epochs": "ours: not stated", "optimizer": "report"})
    assert "Not stated in the publication, assumed here: train.epochs (not stated)." in found["notes"]
    folder = tmp_path / "small"
    for name in ("table.md", "table.tex", "claims.csv"):
        assert "reproduced" in (folder / name).read_text(), name
    report = toolkit("report", str(folder))
    assert report.status == 0, report.stderr
    page = (folder / "report.html").read_text()
    for text in ("a beats b", "reproduced", "someone, 1", "assumed here: train.epochs (not stated)"):
        assert text in page, text


# -- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ('better = "as it iss"\nthan = ["SGD"]', "there is no row 'as it iss'"),
        ('better = "SGD"\nthan = ["SGD"]', "a row is compared with itself"),
        ("better = { optimizer.lr = 3.0 }\nthan = { optimizer.lr = 0.05 }", "no run has the values of better"),
        ('better = "SGD"\nthan = { optimizer.lr = 0.05 }', "better and than are both names of rows"),
        ('better = "SGD"\nmetric = "test_loss"', "test_loss is not a column of the table"),
    ],
)
def test_claims_about_missing_rows_or_metrics_are_refused(tmp_path: Path, claim: str, message: str) -> None:
    file = tmp_path / "study.toml"
    metric = "" if "metric" in claim else 'metric = "val_accuracy"\n'
    file.write_text(
        '[recipe]\nname = "s"\n[data]\ndataset = "digits"\n[model]\nsource = "toolkit"\n'
        'convnet.blocks = [{ channels = 4 }]\n[optimizer]\nname = "adam"\nlr = 0.1\n[train]\nepochs = 1\n'
        'batch_size = 8\n[study]\n[[study.rows]]\nname = "as it is"\n[[study.rows]]\nname = "SGD"\n'
        f'set.optimizer.lr = 0.05\n[[study.claims]]\nstatement = "x"\n{metric}{claim}\n'
    )
    found = toolkit("study", str(file), "--plan")
    assert found.status != 0
    assert message in found.stderr
