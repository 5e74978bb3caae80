"""Expanding a study file into runs, and one clear message for each error in it, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from studies import BASE, write_study

from toolkit.data.datasets import open_dataset
from toolkit.data.splits import split_dataset
from toolkit.recipe import RecipeError, load_recipe, recipe_hash
from toolkit.study.expand import ExpandedStudy, expand, read_study


def expanded(folder: Path, study: str, *overrides: str) -> ExpandedStudy:
    return expand(read_study(write_study(folder, study), overrides))


def rows(folder: Path, study: str, *overrides: str) -> list[tuple[str, int]]:
    return [(run.member.row, run.member.seed) for run in expanded(folder, study, *overrides).runs]


def message(folder: Path, study: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        expanded(folder, study, *overrides)
    return str(caught.value)


# -- grids, rows, zips and seeds --------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_lists_with_the_last_varying_fastest(tmp_path: Path) -> None:
    found = expanded(tmp_path, "[study.grid]\noptimizer.lr = [0.1, 0.01]\ntrain.batch_size = [8, 16, 32]\n")
    assert [run.member.row for run in found.runs] == [
        f"lr {lr}, batch_size {size}" for lr in ("0.1", "0.01") for size in (8, 16, 32)
    ]
    last = found.runs[-1]
    assert last.member.changes == {"optimizer.lr": 0.01, "train.batch_size": 32}
    assert (last.recipe.optimizer.lr, last.recipe.train.batch_size) == (0.01, 32)
    assert found.count == 6


def test_a_runs_recipe_equals_one_written_by_hand(tmp_path: Path) -> None:
    found = expanded(tmp_path, "[study]\nseeds = [3]\n[study.grid]\noptimizer.lr = [0.1]\n")
    by_hand = tmp_path / "by_hand.toml"
    by_hand.write_text(BASE.format(root=tmp_path / "runs", epochs=2))
    recipe = load_recipe(by_hand, ["optimizer.lr=0.1", "recipe.seed=3"])
    assert found.runs[0].recipe == recipe
    assert found.runs[0].member.hash == recipe_hash(recipe)
    assert found.runs[0].recipe.study is None


@pytest.mark.parametrize(
    "text", ["optimizer.lr = [0.1, 0.2]", '"optimizer.lr" = [0.1, 0.2]', "optimizer = { lr = [0.1, 0.2] }"]
)
def test_keys_may_be_written_nested_or_dotted(tmp_path: Path, text: str) -> None:
    assert rows(tmp_path, f"[study.grid]\n{text}\n") == [("lr 0.1", 0), ("lr 0.2", 0)]


def test_lists_of_zip_are_paired_by_position(tmp_path: Path) -> None:
    found = expanded(tmp_path, "[study.zip]\noptimizer.lr = [0.1, 0.2]\ntrain.batch_size = [8, 16]\n")
    assert [tuple(run.member.changes.values()) for run in found.runs] == [(0.1, 8), (0.2, 16)]


def test_rows_have_their_own_names_and_published_values(tmp_path: Path) -> None:
    found = expanded(
        tmp_path,
        """
        [study]
        source = "a report, table 1"
        [[study.rows]]
        name = "fast"
        set.optimizer.lr = 0.5
        published = { val_accuracy = 0.9 }
        published_epochs = { "val/loss" = [2.0, 1.0] }
        note = "unclear"
        [[study.rows]]
        name = "slow"
        """,
    )
    fast, slow = (run.member for run in found.runs)
    assert (fast.row, fast.changes, fast.published, fast.note) == (
        "fast",
        {"optimizer.lr": 0.5},
        {"val_accuracy": 0.9},
        "unclear",
    )
    assert fast.published_epochs == {"val/loss": [2.0, 1.0]}
    assert (slow.row, slow.changes, slow.published) == ("slow", {}, {})


def test_a_published_value_may_be_a_mean_over_several_runs(tmp_path: Path) -> None:
    text = """
        [study]
        published = [{{ where = {{}}, metrics = {{ val_accuracy = {{ mean = 0.8, std = 0.01, n = 3 }} }} }}]
        [[study.rows]]
        name = "fast"
        published = {{ test_accuracy = {{ mean = 0.7591, std = 0.0034, n = {n} }}, val_loss = 0.5 }}
        """
    (run,) = expanded(tmp_path, text.format(n=10)).runs
    assert run.member.published == {"val_accuracy": 0.8, "test_accuracy": 0.7591, "val_loss": 0.5}
    assert run.member.published_spread == {
        "val_accuracy": {"std": 0.01, "n": 3}, "test_accuracy": {"std": 0.0034, "n": 10}
    }  # fmt: skip
    assert "published.test_accuracy.n: expected a whole number >= 2, found 1" in message(tmp_path, text.format(n=1))
    wrong = text.format(n=10).replace("val_loss = 0.5", 'val_loss = "0.5"')
    assert "expected a number or a table { mean = ..., std = ..., n = ... }" in message(tmp_path, wrong)


def test_rows_zip_grid_and_seeds_can_be_combined(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        """
        [study]
        seeds = [7, 8]
        grid.train.batch_size = [8, 16]
        zip.scheduler.warmup_epochs = [0.5, 1.0]
        [[study.rows]]
        name = "a"
        [[study.rows]]
        name = "b"
        set.optimizer.lr = 0.5
        """,
    )
    assert len(found) == 2 * 2 * 2 * 2
    assert found[0] == ("a, warmup_epochs 0.5, batch_size 8", 7)
    assert found[-1] == ("b, warmup_epochs 1, batch_size 16", 8)


def test_a_number_of_seeds_counts_from_the_recipes_seed(tmp_path: Path) -> None:
    assert [seed for _, seed in rows(tmp_path, "[study]\nseeds = 3\n", "recipe.seed=5")] == [5, 6, 7]


def test_seeds_share_one_split_or_have_one_split_each(tmp_path: Path) -> None:
    found = expanded(
        tmp_path,
        """
        [study]
        seeds = [7, 8]
        [[study.rows]]
        name = "one split"
        [[study.rows]]
        name = "own splits"
        set.data.split.seed = "recipe.seed"
        """,
    )
    found_values = [(run.member.row, run.recipe.recipe.seed, run.recipe.data.split.seed) for run in found.runs]
    assert found_values == [("one split", 7, 0), ("one split", 8, 0), ("own splits", 7, 7), ("own splits", 8, 8)]
    dataset = open_dataset(found.runs[0].recipe.data)
    validated = [split_dataset(dataset, run.recipe.data)["validation"].tolist() for run in found.runs]
    assert validated[0] == validated[1]
    assert validated[2] != validated[3]


def test_a_conditional_key_varies_only_if_its_condition_holds(tmp_path: Path) -> None:
    found = expanded(
        tmp_path,
        """
        [study.grid]
        optimizer.momentum = { values = [0.5, 0.9], when = { optimizer.name = ["sgd", "nag"] } }
        optimizer.name = ["sgd", "adamw", "nag"]
        """,
    )
    found_values = [(run.recipe.optimizer.name, run.recipe.optimizer.momentum) for run in found.runs]
    assert sorted(found_values, key=str) == sorted(
        [("sgd", 0.5), ("sgd", 0.9), ("nag", 0.5), ("nag", 0.9), ("adamw", None)], key=str
    )
    assert [run.member.row for run in found.runs if run.recipe.optimizer.name == "adamw"] == ["adamw"]


def test_a_condition_may_refer_to_a_rows_value_or_the_recipes_own(tmp_path: Path) -> None:
    text = """
        [study.grid]
        optimizer.momentum = {{ values = [0.5, 0.9], when = {{ {when} }} }}
        [[study.rows]]
        name = "a"
        [[study.rows]]
        name = "b"
        set.optimizer.name = "nag"
        """
    assert len(rows(tmp_path, text.format(when='optimizer.name = "sgd"'))) == 3
    assert len(rows(tmp_path, text.format(when='data.dataset = "digits"'))) == 4


def test_a_condition_on_an_inactive_key_does_not_hold(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        """
        [study.grid]
        train.max_grad_norm = { values = [1.0, 2.0], when = { optimizer.momentum = 0.5 } }
        optimizer.momentum = { values = [0.5, 0.9], when = { optimizer.name = "sgd" } }
        optimizer.name = ["sgd", "adamw"]
        """,
    )
    assert len(found) == 2 + 1 + 1  # sgd 0.5 with two norms, sgd 0.9, adamw


def test_values_may_be_tables_and_lists(tmp_path: Path) -> None:
    found = expanded(
        tmp_path,
        """
        [study.grid]
        augment.train = [[], [{ name = "RandomHorizontalFlip" }, { name = "RandomRotation", degrees = 10 }]]
        """,
    )
    assert [run.member.row for run in found.runs] == ["train none", "train RandomHorizontalFlip+RandomRotation"]
    assert [len(run.recipe.augment.train) for run in found.runs] == [0, 2]


def test_values_with_equal_labels_are_numbered(tmp_path: Path) -> None:
    one, other = (f'[{{ name = "RandomRotation", degrees = {degrees} }}]' for degrees in (10, 20))
    found = rows(tmp_path, f"[study.grid]\naugment.train = [{one}, {other}]\n")
    assert [row for row, _ in found] == ["train #1", "train #2"]


def test_keys_with_the_same_last_part_are_labeled_in_full(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        '[study.grid]\nearly_stopping.patience = [1]\nscheduler.patience = [2]\nscheduler.name = ["plateau"]\n',
    )
    assert found == [("early_stopping.patience 1, scheduler.patience 2, plateau", 0)]


def test_equal_rows_share_a_run_and_a_note_says_so(tmp_path: Path) -> None:
    found = expanded(
        tmp_path,
        """
        [[study.rows]]
        name = "as it is"
        [[study.rows]]
        name = "spelt out"
        set.optimizer.lr = 0.05
        """,
    )
    assert found.count == 1
    assert len(found.runs) == 2
    assert found.notes == ["rows 'as it is' and 'spelt out' are the same run, which is trained once"]


def test_a_value_given_twice_is_one_row_and_a_note_says_so(tmp_path: Path) -> None:
    found = expanded(tmp_path, "[study.grid]\noptimizer.lr = [0.1, 0.1]\n")
    assert [run.member.row for run in found.runs] == ["lr 0.1"]
    assert found.notes == ["row 'lr 0.1' appears twice; it is trained once"]


def test_published_values_are_matched_to_runs_by_varied_values(tmp_path: Path) -> None:
    found = expanded(
        tmp_path,
        """
        [study.grid]
        optimizer.lr = [0.1, 0.2]
        train.batch_size = [8, 16]
        [[study.published]]
        where = { optimizer.lr = 0.2, train.batch_size = [8, 32] }
        metrics = { val_accuracy = 0.75 }
        source = "table 2"
        """,
    )
    found_values = {run.member.row: (run.member.published, run.member.source) for run in found.runs}
    assert found_values["lr 0.2, batch_size 8"] == ({"val_accuracy": 0.75}, "table 2")
    assert all(found_values[row] == ({}, "") for row in found_values if row != "lr 0.2, batch_size 8")


def test_more_draws_of_a_random_search_only_append_runs(tmp_path: Path) -> None:
    text = """
        [study]
        seeds = 2
        [study.random]
        runs = {runs}
        [study.space]
        optimizer.lr = {{ log_uniform = [1e-4, 1e-1] }}
        optimizer.name = {{ choice = ["sgd", "adamw"] }}
        optimizer.momentum = {{ uniform = [0.1, 0.9], when = {{ optimizer.name = "sgd" }} }}
        """
    few, more = (expanded(tmp_path, text.format(runs=runs)) for runs in (5, 8))
    assert (few.count, more.count) == (10, 16)
    assert [run.member for run in more.runs][:10] == [run.member for run in few.runs]
    for run in more.runs:
        assert 1e-4 <= run.recipe.optimizer.lr <= 1e-1
        assert ("optimizer.momentum" in run.member.changes) == (run.recipe.optimizer.name == "sgd")


def test_a_study_can_extend_a_recipe_and_take_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE.format(root=tmp_path / "runs", epochs=2))
    path = tmp_path / "study.toml"
    path.write_text('extends = "base.toml"\n[study.grid]\noptimizer.lr = [0.1, 0.2]\n')
    found = expand(read_study(path, ["train.epochs=7", "study.grid.optimizer.lr=[0.5]"]))
    assert [(run.recipe.optimizer.lr, run.recipe.train.epochs) for run in found.runs] == [(0.5, 7)]


def test_keys_that_every_run_sets_may_be_missing_in_the_recipe(tmp_path: Path) -> None:
    path = write_study(tmp_path, "[study.grid]\noptimizer.lr = [0.1, 0.2]\n")
    path.write_text(path.read_text().replace("lr = 0.05\n", ""))
    assert [run.recipe.optimizer.lr for run in expand(read_study(path)).runs] == [0.1, 0.2]


EXPECT = '[expected_metrics]\ntest_accuracy = { at_least = 0.98, source = "the base" }\n'


def expected_accuracies(found: ExpandedStudy) -> list[float | None]:
    """Return the lowest test accuracy that each run's recipe expects."""
    return [
        run.recipe.expected_metrics["test_accuracy"].at_least if run.recipe.expected_metrics else None
        for run in found.runs
    ]


def test_expected_metrics_are_not_inherited_by_a_studys_runs(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE.format(root=tmp_path, epochs=2) + EXPECT)
    path = tmp_path / "study.toml"
    path.write_text("""extends = "base.toml"
        [[study.rows]]
        name = "as it stands"
        [[study.rows]]
        name = "with its own"
        set.optimizer.lr = 0.2
        set.expected_metrics.test_accuracy = { at_least = 0.5, source = "a table" }
        """)
    found = expand(read_study(path))
    assert expected_accuracies(found) == [None, 0.5]
    assert found.runs[1].member.changes == {"optimizer.lr": 0.2}
    assert not found.notes


def test_a_study_files_expected_metrics_apply_to_runs_that_change_only_the_seed(tmp_path: Path) -> None:
    found = expanded(tmp_path, EXPECT + "[study]\nseeds = 2\n")
    assert expected_accuracies(found) == [0.98, 0.98]
    assert not found.notes
    found = expanded(
        tmp_path, EXPECT + '[[study.rows]]\nname = "a"\n[[study.rows]]\nname = "b"\nset.optimizer.lr = 0.2\n'
    )
    assert expected_accuracies(found) == [0.98, None]
    assert found.notes == [
        "[expected_metrics] describes the unchanged recipe; runs that change it are not compared with it"
    ]


def test_keys_that_do_not_affect_the_experiment_do_not_create_another_run(tmp_path: Path) -> None:
    text = "[study]\nseeds = 1\n"
    hashes = {
        expanded(tmp_path, text, *overrides).runs[0].member.hash
        for overrides in ([], ['tracking.trackers=["tensorboard"]'], ["checkpoint.keep=5"], ['recipe.description="x"'])
    }
    assert len(hashes) == 1


def test_reading_and_expanding_a_study_does_not_import_torch(tmp_path: Path) -> None:
    path = write_study(tmp_path, "[study.grid]\noptimizer.lr = [0.1, 0.2]\n")
    code = (
        "import sys\nfrom toolkit.study.expand import expand, read_study\n"
        f"assert expand(read_study({str(path)!r})).count == 2\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- errors -----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "nothing varies": ("[study]\n", "[study] varies nothing: set one or more of rows, grid, zip"),
    "empty grid": ("[study]\ngrid = {}\n", "study.grid is empty, so there are no runs"),
    "empty rows": ("[study]\nrows = []\n", "study.rows is empty"),
    "empty list": ("[study.grid]\noptimizer.lr = []\n", "study.grid.optimizer.lr: the list is empty"),
    "no list": ("[study.grid]\noptimizer.lr = 0.1\n", "study.grid.optimizer.lr: expected a list of values, found 0.1"),
    "unknown form": ("[study]\ngird.optimizer.lr = [0.1]\n", "did you mean grid?"),
    "unknown key": ("[study.grid]\noptimizer.lrr = [0.1, 0.2]\n", "unknown key optimizer.lrr"),
    "unknown table": ("[study.grid]\noptimiser.lr = [0.1]\n", "unknown table [optimiser]"),
    "wrong value": (
        "[study.grid]\noptimizer.lr = [0.1, -1]\n",
        "optimizer.lr: expected a number > 0 and <= 1e+30, found -1",
    ),
    "wrong type": (
        '[study.grid]\noptimizer.lr = ["0.1"]\n',
        'optimizer.lr: expected a number > 0 and <= 1e+30, found the text "0.1"',
    ),
    "row without a name": ("[[study.rows]]\nset.optimizer.lr = 0.1\n", "study.rows[0] lacks name"),
    "blank name": ('[[study.rows]]\nname = " "\n', "study.rows[0].name is blank"),
    "same name": ('[[study.rows]]\nname = "a"\n[[study.rows]]\nname = "a"\n', "'a' is already the name of row 0"),
    "row with an unknown key": ('[[study.rows]]\nname = "a"\nset.train.epoch = 3\n', "unknown key train.epoch"),
    "unequal zip": (
        "[study.zip]\noptimizer.lr = [0.1]\ntrain.epochs = [1, 2]\n",
        "optimizer.lr has 1, train.epochs has 2",
    ),
    "in grid and zip": (
        "[study]\ngrid.optimizer.lr = [0.1]\nzip.optimizer.lr = [0.2]\n",
        "varies in study.grid and in study.zip",
    ),
    "in row and grid": (
        '[study]\ngrid.optimizer.lr = [0.1]\n[[study.rows]]\nname = "a"\nset.optimizer.lr = 0.2\n',
        "optimizer.lr is set by the row 'a' and varies in study.grid",
    ),
    "seed in grid": ("[study.grid]\nrecipe.seed = [1, 2]\n", "recipe.seed cannot vary: give study.seeds"),
    "name in grid": ('[study.grid]\nrecipe.name = ["a", "b"]\n', "recipe.name cannot vary"),
    "slurm in grid": ("[study.grid]\nslurm.nodes = [1, 2]\n", "slurm.nodes cannot vary: [slurm] is not part of a run"),
    "promise in grid": (
        "[study.grid]\nexpected_metrics.test_accuracy.at_least = [0.1, 0.2]\n",
        "expected_metrics.test_accuracy.at_least cannot vary: [expected_metrics] is not part of a run",
    ),
    "same seed": ("[study]\nseeds = [1, 1]\n", "study.seeds: duplicate seed"),
    "no seeds": ("[study]\nseeds = 0\n", "study.seeds"),
    "unknown condition": (
        "[study.grid]\noptimizer.momentum = { values = [0.5], when = { optimizer.nam = 1 } }\n",
        "optimizer.momentum: when optimizer.nam: no such key",
    ),
    "circle": (
        "[study.grid]\ntrain.ema = { values = [0.5], when = { train.max_grad_norm = 1.0 } }\n"
        "train.max_grad_norm = { values = [1.0], when = { train.ema = 0.5 } }\n",
        "study.grid: conditions are circular: train.ema on train.max_grad_norm on train.ema",
    ),
    "unknown word beside values": (
        "[study.grid]\noptimizer.lr = { values = [0.1], if = 3 }\n",
        "takes values and when, not if",
    ),
    "setting of a row without set": (
        '[study]\nseeds = 1\n[[study.rows]]\nname = "a"\noptimizer.lr = 0.1\n',
        "hint: to change keys of [optimizer] in study.rows[0]: set.optimizer",
    ),
    "combination that cannot be": (
        '[study.grid]\noptimizer.name = ["sgd", "adamw"]\noptimizer.momentum = [0.5, 0.9]\n',
        "optimizer.momentum",
    ),
    "too many": (
        "[study.grid]\n" + "".join(f"{key} = {[*range(1, 401)]}\n" for key in ("optimizer.lr", "train.epochs")),
        "160,000 combinations",
    ),
    "two searches": (
        "[study]\nrandom.runs = 2\nbohb.trials = 2\nspace.optimizer.lr = { uniform = [0.1, 0.2] }\n",
        "give random or bohb, not both",
    ),
    "search without space": ("[study.bohb]\ntrials = 3\n", "study.bohb needs [study.space]"),
    "space without search": (
        "[study.space]\noptimizer.lr = { uniform = [0.1, 0.2] }\n",
        "study.space needs study.random or study.bohb",
    ),
    "search and grid": (
        "[study]\nrandom.runs = 2\nspace.optimizer.lr = { uniform = [0.1, 0.2] }\ngrid.train.batch_size = [8]\n",
        "study.grid cannot be combined with study.random",
    ),
    "bad range": ("[study]\nrandom.runs = 2\nspace.optimizer.lr = { uniform = [0.2, 0.1] }\n", "the lower one first"),
    "budgets": (
        "[study]\nbohb = { trials = 3, min_epochs = 9, max_epochs = 3 }\nspace.train.ema = { uniform = [0.1, 0.2] }\n",
        "min_epochs = 9 is more than max_epochs = 3",
    ),
    "published of an unknown key": (
        "[study]\nseeds = 1\n[[study.published]]\nwhere.optimizer.rate = 1\nmetrics = { val_loss = 1 }\n",
        "no such key optimizer.rate",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_error_has_its_message(tmp_path: Path, mistake: str) -> None:
    text, error_text = MISTAKES[mistake]
    assert error_text in message(tmp_path, text)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_without_a_study_table_suggests_toolkit_train(tmp_path: Path) -> None:
    assert "has no [study] table: it is one run. To train it: toolkit train" in message(tmp_path, "")


def test_an_error_in_a_row_is_shown_at_its_position_in_the_study_file(tmp_path: Path) -> None:
    error_text = message(tmp_path, "[study.grid]\noptimizer.lr = [0.1, 0.2, -3.0]\n")
    path = tmp_path / "study.toml"
    line = path.read_text().splitlines().index("optimizer.lr = [0.1, 0.2, -3.0]") + 1
    assert f"{path}:{line}:27: error: optimizer.lr: expected a number > 0 and <= 1e+30, found -3.0" in error_text
    assert "in the row 'lr -3'" in error_text


def test_all_errors_of_all_runs_are_reported_at_once_and_each_once(tmp_path: Path) -> None:
    error_text = message(
        tmp_path,
        """
        [study]
        seeds = 3
        [[study.rows]]
        name = "a"
        set.train.epochs = 0
        [[study.rows]]
        name = "b"
        set.optimizer.lrr = 1
        """,
        "train.batch_size=0",
    )
    assert "3 errors in the recipe" in error_text
    for part in ("train.epochs: expected", "unknown key optimizer.lrr", "train.batch_size: expected"):
        assert error_text.count(part) == 1
