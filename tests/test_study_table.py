"""`toolkit table`: known answers for the statistics, and complete expected table texts."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from cli import toolkit
from scipy import stats
from study_folders import FakeRun, write_study

from toolkit.study.significance import compare, estimate, t_quantile, welch
from toolkit.study.text_table import TextTable, latex, markdown, text, width

COLUMNS = ["train_loss", "val_accuracy", "test_accuracy", "epochs"]


# -- statistics -------------------------------------------------------------------------------------------------------


def test_mean_standard_deviation_and_interval_of_five_values() -> None:
    """For 1..5 the standard deviation is sqrt(10 / 4); tables give 2.776445 for t with 4 degrees of freedom."""
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0], 0.95)
    assert found.mean == 3
    assert found.n == 5
    assert found.std == pytest.approx(math.sqrt(2.5))
    assert found.half_width == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert found.interval == pytest.approx((3 - 1.963243, 3 + 1.963243), rel=1e-6)


@pytest.mark.parametrize(
    ("confidence", "freedom", "t"), [(0.95, 1, 12.7062), (0.95, 9, 2.2622), (0.99, 4, 4.6041), (0.9, 30, 1.6973)]
)
def test_quantiles_of_students_t_match_published_tables(confidence: float, freedom: int, t: float) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(t, abs=5e-5)


def test_one_run_has_no_standard_deviation() -> None:
    found = estimate([0.7], 0.95)
    assert (found.mean, found.std, found.half_width, found.interval) == (0.7, None, None, None)


def test_a_paired_comparison_of_three_differences() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / sqrt 3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)."""
    found = compare([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], 0.95)
    t = 2 * math.sqrt(3)
    assert found.difference.mean == 2
    assert found.difference.std == 1
    assert found.t_test == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.exact == 0.25  # all of the same sign: 2 of 8
    assert found.least_exact == 0.25


def test_the_permutation_test_counts_sign_patterns() -> None:
    """Differences 3, -1, 2 have sum 4; of the 8 sums +-6, +-4, +-2, 0, 0 four are at least as far from 0."""
    assert compare([3.0, -1.0, 2.0], [0.0, 0.0, 0.0], 0.95).exact == 0.5


def test_the_permutation_test_of_equal_rows_has_p_1() -> None:
    found = compare([0.5, 0.6], [0.5, 0.6], 0.95)
    assert (found.difference.mean, found.t_test, found.exact) == (0, None, 1.0)


def test_rounding_does_not_hide_a_tie() -> None:
    """0.1 + 0.2 and 0.3 differ in the last bit: the sums that are equal must count as equal."""
    assert compare([0.1, 0.2, -0.3], [0.0, 0.0, 0.0], 0.95).exact == 1.0


def test_one_pair_has_no_significance_test() -> None:
    found = compare([0.9], [0.1], 0.95)
    assert (found.t_test, found.exact, found.difference.interval) == (None, None, None)


def test_many_pairs_have_only_the_t_test() -> None:
    found = compare([float(i % 5) for i in range(20)], [1.0] * 20, 0.95)
    assert found.exact is None
    assert found.t_test is not None


# -- tables -----------------------------------------------------------------------------------------------------------


def seeded_study(path: Path) -> Path:
    """Write three rows over three seeds: one finished, one with a failed run, one not started."""
    runs = [
        FakeRun("sgd", s, {"optimizer.name": "sgd"}, [0.5, 0.60 + 0.01 * s, 0.55], 0.61 + 0.02 * s,
                published={"val_accuracy": 0.58}, note="read from a figure")
        for s in range(3)
    ]  # fmt: skip
    runs += [FakeRun("adam", s, {"optimizer.name": "adam"}, [0.5, 0.7 + 0.02 * s], 0.6) for s in range(2)]
    runs += [FakeRun("adam", 2, {"optimizer.name": "adam"}, [0.9], state="failed")]
    runs += [FakeRun("nag", s, {"optimizer.name": "nag"}, state="missing") for s in range(3)]
    study = {
        "description": "Optimizers",
        "source": "somebody, table 1",
        "note": "Of small images.",
        "rows": [{"name": "sgd"}],
        "output": {"columns": COLUMNS},
    }
    return write_study(path / "small", study, runs).path


def plain(shown: str) -> str:
    """Replace dashes and minus signs by hyphens, which are easier to read in a test."""
    return shown.replace("\N{EN DASH}", "-").replace("\N{MINUS SIGN}", "-").replace("\N{DOWNWARDS ARROW}", "v")


def test_a_note_shared_by_several_rows_is_shown_once_with_their_names(tmp_path: Path) -> None:
    runs = [FakeRun(name, note=note) for name, note in (("a", "torn"), ("b", ""), ("c", "torn"), ("d", "read"))]
    outcome = toolkit("table", write_study(tmp_path / "small", {}, runs).path)
    assert [line for line in outcome.stdout.splitlines() if line.endswith(("torn", "read"))] == [
        "a; c: torn",
        "d: read",
    ]


def test_the_text_table_of_a_study_over_seeds(tmp_path: Path) -> None:
    outcome = toolkit("table", seeded_study(tmp_path))
    assert outcome.status == 0
    assert (
        plain(outcome.stdout)
        == """\
Optimizers
  setting    runs       train loss   val. acc. %  published  diff.   test acc. %  epochs  open
---------------------------------------------------------------------------------------------------
  sgd           3  0.3400 ± 0.0100  61.00 ± 1.00      58.00  +3.00  63.00 ± 2.00   3 ± 0
* adam     2 of 3  0.2400 ± 0.0141  71.00 ± 1.41                    60.00 ± 0.00   2 ± 0  1 failed
  nag      0 of 3                -             -                               -       -  3 missing
5 of 9 runs finished; only these are counted.
Best so far by val/accuracy (never by a test metric): adam.
Mean ± standard deviation (n - 1) over the runs of a row.
Published: somebody, table 1; diff.: measured - published.
Of small images.
sgd: read from a figure
adam, seed 2: failed: the loss is nan
"""
    )


def test_confidence_intervals_can_replace_standard_deviations(tmp_path: Path) -> None:
    """sgd's validation accuracy: 61 +- 4.302653 * 1 / sqrt 3 (t of 2 degrees of freedom)."""
    outcome = toolkit("table", seeded_study(tmp_path), "--intervals", "--columns", "val_accuracy")
    assert "61.00 [58.52, 63.48]" in outcome.stdout
    assert "Mean [95 % confidence interval, Student's t]" in outcome.stdout


def test_csv_markdown_and_latex_files_have_the_same_content(tmp_path: Path) -> None:
    folder = seeded_study(tmp_path)
    assert toolkit("table", folder).status == 0
    with open(folder / "table.csv", newline="") as file:
        sgd, adam, nag = csv.DictReader(file)
    assert float(sgd["val_accuracy"]) == pytest.approx(0.61)
    assert float(sgd["val_accuracy_std"]) == pytest.approx(0.01)
    assert float(sgd["val_accuracy_published"]) == 0.58
    assert float(sgd["val_accuracy_difference"]) == pytest.approx(0.03)
    assert (adam["best"], adam["runs"], adam["finished"]) == ("True", "3", "2")
    assert (nag["val_accuracy"], nag["open"]) == ("", "3 missing")
    assert plain((folder / "table.md").read_text()).splitlines()[2:8] == [
        "**Optimizers**",
        "",
        "| setting | runs | train loss | val. acc. % | published | diff. | test acc. % | epochs | open |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :--- |",
        "| sgd | 3 | 0.3400 ± 0.0100 | 61.00 ± 1.00 | 58.00 | +3.00 | 63.00 ± 2.00 | 3 ± 0 |  |",
        "| **adam** | **2 of 3** | **0.2400 ± 0.0141** | **71.00 ± 1.41** |  |  | **60.00 ± 0.00** | **2 ± 0** "
        "| **1 failed** |",
    ]
    tex = (folder / "table.tex").read_text()
    assert r"sgd & 3 & 0.3400 $\pm$ 0.0100 & 61.00 $\pm$ 1.00 & 58.00 & +3.00 &" in tex
    assert r"\textbf{adam} & \textbf{2 of 3} &" in tex
    with open(folder / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["row"], run["seed"], run["state"]) for run in runs[:3]] == [
        ("sgd", str(s), "finished") for s in range(3)
    ]
    assert [run["val_accuracy"] for run in runs[5:]] == [""] * 4


def test_the_json_output_of_a_study(tmp_path: Path) -> None:
    found = json.loads(toolkit("table", seeded_study(tmp_path), "--json").stdout)
    assert [row["row"] for row in found["rows"]] == ["sgd", "adam", "nag"]
    assert found["rows"][0]["test_accuracy_low"] == pytest.approx(0.63 - 4.302653 * 0.02 / math.sqrt(3))
    assert found["rows"][2]["val_accuracy"] is None


def test_only_finished_runs_enter_the_table(tmp_path: Path) -> None:
    """A failed, a paused and a running run with better epochs than all others change nothing."""
    runs = [FakeRun("a", 0, val_accuracy=[0.6]), FakeRun("a", 1, val_accuracy=[0.99], state="paused")]
    runs += [FakeRun("b", 0, val_accuracy=[0.5]), FakeRun("c", 0, val_accuracy=[0.99], state="failed")]
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, runs).path
    rows = {row["row"]: row for row in json.loads(toolkit("table", folder, "--json").stdout)["rows"]}
    assert rows["a"]["val_accuracy"] == 0.6
    assert rows["a"]["val_accuracy_std"] is None
    assert rows["c"]["val_accuracy"] is None
    assert [row["row"] for row in rows.values() if row["best"]] == ["a"]


def test_the_best_row_is_chosen_by_validation(tmp_path: Path) -> None:
    """By test accuracy b would be the best, by validation loss c."""
    runs = [
        FakeRun("a", val_accuracy=[0.8], test_accuracy=0.5),
        FakeRun("b", val_accuracy=[0.7], test_accuracy=0.9),
        FakeRun("c", val_accuracy=[0.75], test_accuracy=0.6),
    ]
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, runs).path
    assert "\n* a " in toolkit("table", folder).stdout
    study = {"rows": [{"name": "a"}], "output": {"best_by": "val/loss"}}
    (tmp_path / "t").mkdir()
    lowest = [FakeRun("a", val_accuracy=[0.8]), FakeRun("b", val_accuracy=[0.85])]
    assert "\n* b " in toolkit("table", write_study(tmp_path / "t" / "s", study, lowest).path).stdout


def test_metrics_of_the_best_and_the_last_epoch(tmp_path: Path) -> None:
    """The best epoch is the second; training metrics are of that epoch too, ``last_`` metrics of the last epoch."""
    run = FakeRun("a", val_accuracy=[0.5, 0.7, 0.6], test_accuracy=0.66, published={"last_train_loss": 0.3})
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, [run]).path
    expected = {
        "train_loss": 0.25, "train_accuracy": 0.75, "train_accuracy_all_images": 0.75 * 2560 / 2892,
        "val_loss": 0.3, "val_accuracy": 0.7, "test_accuracy": 0.66,
        "last_train_loss": 0.35, "last_train_accuracy": 0.65, "last_val_accuracy": 0.6,
        "last_test_accuracy": 0.65, "epochs": 3, "seconds": 7.5,
    }  # fmt: skip
    columns = ",".join(expected)
    (row,) = json.loads(toolkit("table", folder, "--columns", columns, "--json").stdout)["rows"]
    assert [row[name] for name in expected] == pytest.approx(list(expected.values()))
    assert row["last_train_loss_difference"] == pytest.approx(0.05), "the value of the last epoch, not of the best"
    shown = toolkit("table", folder, "--columns", columns).stdout
    assert re.search(r"last train loss +published +diff\. +last train acc\. %", shown)


def test_a_published_mean_is_compared_by_welchs_test(tmp_path: Path) -> None:
    values = [0.7610, 0.7575, 0.7655]
    spread = {"test_accuracy": {"std": 0.0034, "n": 10}}
    runs = [
        FakeRun("a", seed, test_accuracy=value, published={"test_accuracy": 0.7591}, published_spread=spread)
        for seed, value in enumerate(values)
    ]
    runs += [FakeRun("b", test_accuracy=0.7, published={"test_accuracy": 0.7591}, published_spread=spread)]
    runs += [FakeRun("c", state="missing", published={"test_accuracy": 0.7591}, published_spread=spread)]
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, runs).path
    arguments = ("table", folder, "--columns", "test_accuracy")
    a, b, _ = json.loads(toolkit(*arguments, "--json").stdout)["rows"]
    reference = stats.ttest_ind_from_stats(
        np.mean(values), np.std(values, ddof=1), 3, 0.7591, 0.0034, 10, equal_var=False
    )
    assert a["test_accuracy_welch_p"] == pytest.approx(reference.pvalue)
    assert (a["test_accuracy_published_std"], a["test_accuracy_published_n"]) == (0.0034, 10)
    assert b["test_accuracy_welch_p"] is None, "one run has no standard deviation"
    shown = plain(toolkit(*arguments).stdout)
    assert "76.13 ± 0.40  75.91 ± 0.34  +0.22" in shown
    assert (
        "a, test acc. %: the published mean is over 10 runs. Welch's t-test, measured - published over 3 and 10 runs: "
        f"+0.22, 95 % interval [-0.60, +1.05], p {reference.pvalue:.4f}." in shown
    )
    assert (
        "b, test acc. %: the published mean is over 10 runs; Welch's t-test needs at least two measured runs" in shown
    )


def test_welchs_test_has_scipys_interval() -> None:
    one, other = [3.1, 2.9, 3.6, 3.3], [2.5, 2.7, 1.9]
    found = welch(estimate(one, 0.95), estimate(other, 0.95))
    reference = stats.ttest_ind(one, other, equal_var=False)
    assert found is not None
    assert (found.p, found.freedom) == pytest.approx((reference.pvalue, reference.df))
    assert found.interval(0.9) == pytest.approx(tuple(reference.confidence_interval(0.9)))
    assert welch(estimate([1.0, 1.0], 0.95), estimate([2.0, 2.0], 0.95)) is None, "no test without variance"


def test_rows_can_be_grouped_by_a_key(tmp_path: Path) -> None:
    runs = [
        FakeRun(f"{lr} {name}", 0, {"optimizer.lr": lr, "optimizer.name": name}, [value])
        for lr, name, value in ((0.1, "sgd", 0.5), (0.1, "adam", 0.6), (0.01, "sgd", 0.7), (0.01, "adam", 0.9))
    ]
    folder = write_study(tmp_path / "s", {"grid": {"optimizer.lr": [0.1, 0.01]}}, runs).path
    rows = json.loads(toolkit("table", folder, "--by", "optimizer.name", "--json").stdout)["rows"]
    assert [(row["row"], row["val_accuracy"]) for row in rows] == [("name sgd", 0.6), ("name adam", 0.75)]
    outcome = toolkit("table", folder, "--by", "optimizer.nam")
    assert outcome.status == 2
    assert "--by optimizer.nam: no run of the study varies it; did you mean optimizer.name?" in outcome.stderr


def test_rows_of_one_run_have_no_significance_test(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, [FakeRun("a"), FakeRun("b")]).path
    shown = toolkit("table", folder, "--compare", "a", "b").stdout
    assert "One run per row: the spread over seeds is not known, so differences may be due to chance." in shown
    assert "One seed: significance cannot be tested" in shown
    assert "±" not in shown


def test_two_rows_are_compared_over_their_common_seeds(tmp_path: Path) -> None:
    """Both rows have seeds 0, 1, 2; a seed of only one row is ignored. The differences are 1, 2 and 3 points."""
    runs = [FakeRun("a", s, val_accuracy=[0.71 + 0.01 * s]) for s in range(3)]
    runs += [FakeRun("a", 7, val_accuracy=[0.1])]
    runs += [FakeRun("b", s, val_accuracy=[0.7]) for s in range(3)]
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, runs).path
    arguments = ("table", folder, "--columns", "val_accuracy", "--compare", "a", "b")
    found = json.loads(toolkit(*arguments, "--json").stdout)["comparison"]["val_accuracy"]
    assert found["pairs"] == 3
    assert found["difference"] == pytest.approx(0.02)
    assert found["t_test_p"] == pytest.approx(0.0741799)
    assert found["permutation_p"] == 0.25
    shown = plain(toolkit(*arguments).stdout)
    assert "val. acc. %      3            +2.00  [-0.48, +4.48]    0.0742         0.2500" in shown
    assert "with 3 pairs it cannot be below 0.2500" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "a", "x"), "--compare 'x': the table has no such row"),
        (("--compare", "a", "c"), "have no finished runs with the same seed"),
        (("--columns", "val_acuracy"), "--columns val_acuracy: there is no such metric; did you mean val_accuracy?"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    runs = [FakeRun("a"), FakeRun("b"), FakeRun("c", state="missing")]
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, runs).path
    outcome = toolkit("table", folder, *arguments)
    assert outcome.status == 2
    assert message in outcome.stderr
    assert outcome.stdout == ""


def test_a_path_that_is_not_a_study_is_refused(tmp_path: Path) -> None:
    outcome = toolkit("table", tmp_path)
    assert outcome.status == 2
    assert "is not a study directory" in outcome.stderr


def test_a_damaged_run_is_shown_and_the_others_enter_the_table(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, [FakeRun("a", 0), FakeRun("a", 1)]).path
    (folder / "20260101-000000-0000" / "summary.json").write_text('{"best":')
    shown = toolkit("table", folder).stdout
    assert "1 of 2" in shown
    assert "summary.json is damaged" in shown


def test_a_table_can_be_shown_from_a_read_only_folder(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", {"rows": [{"name": "a"}]}, [FakeRun("a")]).path
    (folder / "table.csv").mkdir()
    outcome = toolkit("table", folder)
    assert outcome.status == 0
    assert "warning: the tables cannot be written" in outcome.stderr


# -- by epoch ---------------------------------------------------------------------------------------------------------


def test_an_epoch_table_has_a_column_per_value_and_x_after_early_stopping(tmp_path: Path) -> None:
    """The layout is that of table G8, with the published values in the same layout below."""
    runs = [
        FakeRun(
            "0.1",
            val_accuracy=[0.466, 0.584, 0.58],
            published={"test_accuracy": 0.47},
            published_epochs={"val/accuracy": [0.4, 0.5]},
        ),
        FakeRun("0.2", val_accuracy=[0.433]),
        FakeRun("0.3", state="missing"),
    ]
    study = {"description": "Dropout", "rows": [{"name": "0.1"}], "output": {"per_epoch": "val/accuracy"}}
    folder = write_study(tmp_path / "s", study, runs).path
    shown = plain(toolkit("table", folder).stdout)
    assert (
        """
Dropout: val. acc. % by epoch
epoch           0.1     0.2  0.3
--------------------------------
1             46.60  *43.30    -
2            *58.40       x    -
3            v58.00       x    -
test acc. %   50.00   50.00    -
*: the best epoch of the column; v: the epoch after it, if it is worse.
x: after the last epoch of the run.
-: no finished run: 0.3.

Dropout: val. acc. % by epoch, as published
epoch           0.1  0.2  0.3
-----------------------------
1             40.00    -    -
2            *50.00    -    -
test acc. %   47.00    -    -
"""
        in shown
    )
    with open(folder / "epochs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["epoch"], line["val_accuracy"], line["val_accuracy_published"]) for line in lines] == [
        ("0.1", "1", "0.466", "0.4"),
        ("0.1", "2", "0.584", "0.5"),
        ("0.1", "3", "0.58", ""),
        ("0.2", "1", "0.433", ""),
    ]


def test_rows_can_be_sorted_by_a_column_and_limited_to_the_first(tmp_path: Path) -> None:
    """The grid's best rows are printed; the files keep all rows in the study's order."""
    found = [(f"row {n}", 0.5 + 0.01 * (n * 7 % 12)) for n in range(12)]
    runs = [FakeRun(name, 0, {"a.b": name}, [value], 1 - value) for name, value in found]
    runs.append(FakeRun("open", state="missing"))
    folder = write_study(tmp_path / "s", {"rows": [{"name": "x"}], "output": {"columns": ["val_loss"]}}, runs).path
    best = [name for name, _ in sorted(found, key=lambda item: -item[1])]

    def names(*arguments: str) -> list[str]:
        outcome = toolkit("table", folder, "--json", *arguments)
        assert outcome.status == 0, outcome.stderr
        return [str(row["row"]) for row in json.loads(outcome.stdout)["rows"]]

    assert names("--sort", "val_accuracy", "--top", "3") == best[:3]
    assert names("--sort", "test_accuracy") == [*best[::-1], "open"], "rows without the metric are last"
    assert names("--sort", "val_loss", "--top", "2") == best[:2], "the smallest loss first"
    assert names("--top", "2") == best[:2], "by output.best_by"
    assert names() == [*(name for name, _ in found), "open"]
    shown = toolkit("table", folder, "--sort", "val_accuracy", "--top", "2").stdout
    lines = shown.splitlines()
    assert (lines[3].startswith(f"* {best[0]} "), lines[4].startswith(f"  {best[1]} ")) == (True, True)
    assert "val. acc. %" in lines[1]
    assert "Sorted by val. acc. %, the best first; the first 2 of 13 rows." in shown
    with open(folder / "table.csv", newline="") as file:
        assert [line["row"] for line in csv.DictReader(file)] == [*(name for name, _ in found), "open"]
    assert (
        "--sort val_acc: there is no such column; did you mean val_"
        in toolkit("table", folder, "--sort", "val_acc").stderr
    )


def test_loss_and_accuracy_by_epoch(tmp_path: Path) -> None:
    """The layout is that of table G2: epoch, training loss, validation accuracy, if both were published."""
    published = {"train/loss": [1.4041, 1.0399], "val/accuracy": [0.522, 0.653]}
    runs = [FakeRun("base", val_accuracy=[0.5, 0.6, 0.7], published_epochs=published)]
    study = {"description": "G2", "rows": [{"name": "base"}], "output": {"per_epoch": "val/accuracy"}}
    shown = plain(toolkit("table", write_study(tmp_path / "s", study, runs).path).stdout)
    assert (
        """
G2: base, by epoch
epoch  train loss  train loss, published  val. acc. %  val. acc. %, published
-----------------------------------------------------------------------------
1          0.4500                 1.4041        50.00                   52.20
2          0.3500                 1.0399        60.00                   65.30
3          0.2500                      x        70.00                       x
"""
        in shown
    )


# -- trials of a search -----------------------------------------------------------------------------------------------


def searched(path: Path) -> Path:
    """Write a BOHB search of four trials: the second was trained to the end, the last failed."""
    space = {"optimizer": {"lr": {"log_uniform": [1e-4, 1.0]}}}
    runs = [
        FakeRun("0", 0, {"optimizer.lr": 0.001}, [0.4, 0.5, 0.91], state="paused"),
        FakeRun("1", 0, {"optimizer.lr": 0.0123456}, [0.6, 0.7, 0.8, 0.9], 0.88),
        FakeRun("2", 0, {"optimizer.lr": 0.1, "optimizer.momentum": 0.5}, [0.6, 0.7, 0.95], state="paused"),
        FakeRun("3", 0, {"optimizer.lr": 0.9}, [0.1], state="failed"),
    ]
    study = {
        "description": "Search",
        "space": space,
        "bohb": {"trials": 4, "min_epochs": 3, "max_epochs": 4},
        "output": {"columns": ["val_accuracy", "test_accuracy"]},
    }
    return write_study(path / "s", study, runs).path


def test_trials_are_listed_with_the_best_first(tmp_path: Path) -> None:
    """A trial trained to the end is listed before one with a better value after fewer epochs."""
    assert (
        plain(toolkit("table", searched(tmp_path)).stdout)
        == """\
Search
  trial       lr  momentum  state     epochs  val. acc. %  test acc. %
----------------------------------------------------------------------
* 1      0.01235         -  finished       4        90.00        88.00
  2          0.1       0.5  paused         3        95.00            -
  0        0.001         -  paused         3        91.00            -
  3          0.9         -  failed         1        10.00            -
4 configurations, 1 trained to the end; 11 epochs trained in all.
Ordered by the epochs reached, then by val/accuracy of the best epoch; never by a test metric.
One run per configuration: differences may be due to chance; train the best ones with several seeds.
Trial 3: failed: the loss is nan
"""
    )
    with open(tmp_path / "s" / "table.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["trial"], first["optimizer.lr"], first["epochs"], first["val/accuracy"]) == (
        "1", "0.0123456", "4", "0.9")  # fmt: skip


def test_rows_of_a_random_search_over_seeds_are_listed_with_the_best_first(tmp_path: Path) -> None:
    runs = [FakeRun(f"lr {lr}", s, {"optimizer.lr": lr}, [lr + 0.1 * s]) for lr in (0.2, 0.6, 0.4) for s in range(2)]
    space = {"optimizer": {"lr": {"uniform": [0.0, 1.0]}}}
    study = {"space": space, "random": {"runs": 3}, "seeds": 2, "output": {"columns": ["val_accuracy"]}}
    shown = toolkit("table", write_study(tmp_path / "s", study, runs).path).stdout
    assert re.findall(r"lr 0\.\d", shown.split("of 6 runs")[0]) == ["lr 0.6", "lr 0.4", "lr 0.2"]
    assert "65.00 ± 7.07" in shown


# -- cells ------------------------------------------------------------------------------------------------------------


def test_columns_with_wide_characters_are_aligned() -> None:
    sheet = TextTable("t", ["name", "a"], [["学习率", "1.0"], ["plain", "2.0"], ["e\u0301", "3"]])
    lines = text(sheet).splitlines()
    assert len({width(line) for line in lines[1:]}) == 1
    assert width("学习率") == 6


HOSTILE = r"50 % & $x_1$ #{a} ~ ^ \ <b> | [c](d) `e` *f*" + "\x1b[31m\n"


def test_latex_is_escaped() -> None:
    line = latex(TextTable(HOSTILE, ["h", HOSTILE], [[HOSTILE, "1"]], frozenset({0}), [HOSTILE])).splitlines()
    body = next(row for row in line if row.startswith(r"\textbf"))
    assert body.count(" & ") == 1
    assert r"50 \% \& \$x\_1\$ \#\{a\} \textasciitilde{} \textasciicircum{} \textbackslash{}" in body
    assert body.endswith(r" \\")
    unescaped = re.sub(r"\\[a-zA-Z]+|\\.", "", "\n".join(line[2:]))
    assert unescaped.count("{") == unescaped.count("}")
    assert not set(unescaped) & set("$#~^_%")
    assert "\x1b" not in body


def test_markdown_is_escaped() -> None:
    shown = markdown(TextTable("t", ["h", "i"], [[HOSTILE, "1"]]))
    row = shown.splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert r"\<b>" in row
    assert "](d)" not in row
    assert "\x1b" not in row


def test_showing_a_table_does_not_import_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = seeded_study(tmp_path)
    code = (
        "import sys; from toolkit.study.export_tables import *; from toolkit.study.study_results import *; "
        "from toolkit.study.directory import StudyDirectory; "
        f"from pathlib import Path; read_outcomes(StudyDirectory(Path({str(folder)!r})), TableOptions()); "
        "print([m for m in ('torch', 'optuna', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
