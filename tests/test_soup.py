"""`toolkit soup`: averages of the weights of a study's runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cli import toolkit
from studies import BASE, GRID, study_folder, write_study
from torch import Tensor
from torch.optim.swa_utils import update_bn
from trainers import FROZEN, PRETRAINED, write_recipe

from toolkit.distributed.context import distributed_context
from toolkit.inference.evaluate import split_images
from toolkit.runs import Run
from toolkit.study.directory import StudyDirectory
from toolkit.study.soup import SoupEvaluator, evaluated_recipe
from toolkit.study.soup_members import find_members
from toolkit.training.trained_model import load_model

pytestmark = pytest.mark.long

SAME_START = """
[study.grid]
optimizer.lr = [0.4, 0.2, 0.1, 0.01]
"""
"""Four runs from the same random weights, because they have the same seed."""


def quiet(line: str) -> None:
    """Ignore a message."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with its soups; tests must not change it."""
    folder = tmp_path_factory.mktemp("study")
    assert toolkit("study", write_study(folder, SAME_START, epochs=6)).status == 0
    shutil.copytree(folder / "runs" / "small", folder / "before")
    outcome = toolkit("soup", folder / "runs" / "small")
    assert outcome.status == 0, outcome.stderr
    return folder / "runs" / "small"


def copy_of(study: Path, folder: Path) -> StudyDirectory:
    """Return a copy of a study, without soups, that a test may change."""
    shutil.copytree(study, folder / "small", ignore=shutil.ignore_patterns("soup"))
    return StudyDirectory(folder / "small")


def soup_of(study: Path, method: str) -> tuple[Run, dict[str, Any]]:
    run = Run(study / "soup" / method)
    return run, json.loads((run.path / "soup.json").read_text())


def weights(run: Run) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run.best_weights)


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of state dicts, computed differently from the toolkit; integers are those of the first."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }


def validation_accuracy(run: Run, state: dict[str, Tensor]) -> float:
    """Return the accuracy of a model with the architecture of ``run``, image by image."""
    model = load_model(run.path)
    model.module.load_state_dict(state)
    dataset, indices = split_images(run, "validation", model)
    inputs = torch.stack([model.transform(dataset.images.load(int(index))) for index in indices])
    with torch.no_grad():
        found = model.module(inputs).argmax(1).numpy()
    return float((found == dataset.labels[indices]).mean())


def test_the_uniform_soup_is_the_mean_of_all_weights(trained: Path) -> None:
    run, content = soup_of(trained, "uniform")
    states = [weights(Run(trained / member["run"])) for member in content["members"]]
    assert len(states) == 4
    assert all(member["used"] for member in content["members"])
    for name, value in mean(states).items():
        torch.testing.assert_close(weights(run)[name], value)


def test_the_greedy_soup_adds_what_does_not_lower_validation_accuracy(trained: Path) -> None:
    """Compared with the algorithm of Wortsman et al. 2022 (recipe 1), written out with other code."""
    run, content = soup_of(trained, "greedy")
    members = [Run(trained / member["run"]) for member in content["members"]]
    order = [member.summary["best"]["val_accuracy"] for member in members]
    assert order == sorted(order, reverse=True)
    used = [weights(members[0])]
    accuracy = validation_accuracy(members[0], used[0])
    kept = [True]
    for member in members[1:]:
        with_it = validation_accuracy(member, mean([*used, weights(member)]))
        kept.append(with_it >= accuracy)
        if kept[-1]:
            used, accuracy = [*used, weights(member)], with_it
    assert [member["used"] for member in content["members"]] == kept
    assert content["value"] == pytest.approx(accuracy)
    assert content["value"] >= order[0], "never below its best member"
    for name, value in mean(used).items():
        torch.testing.assert_close(weights(run)[name], value)


def test_the_test_images_are_compared_in_pairs(trained: Path) -> None:
    run, content = soup_of(trained, "uniform")
    soup, best = run.correct_predictions(), Run(trained / content["members"][0]["run"]).correct_predictions()
    gained = sum(soup.values()) - sum(best.values())
    assert content["test"]["soup_only"] - content["test"]["best_only"] == gained
    assert content["test"]["images"] == len(soup) == len(best)


def test_commands_for_runs_take_a_soup(trained: Path, tmp_path: Path) -> None:
    path = trained / "soup" / "uniform"
    evaluated = toolkit("evaluate", path)
    assert "metrics equal those of summary.json" in evaluated.stdout, evaluated.stderr
    for arguments in (
        ("report", path, "-o", tmp_path / "report.html"),
        ("export", path, "--format", "safetensors", "-o", tmp_path / "export"),
        ("check", path),
    ):
        outcome = toolkit(*arguments)
        assert outcome.status == 0, outcome.stderr
    exported = load_model(tmp_path / "export").module.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(Run(path)).items())
    resumed = toolkit("train", "--resume", path)
    assert resumed.status == 2
    assert "is finished: there is nothing to resume" in resumed.stderr


def test_the_table_shows_soups_below_the_rows_and_counts_them_as_no_runs(trained: Path) -> None:
    found = json.loads(toolkit("table", trained, "--json").stdout)
    before = json.loads(toolkit("table", trained.parent.parent / "before", "--json").stdout)
    assert [row.get("soup") for row in found["rows"]] == [None] * 4 + ["uniform", "greedy"]
    assert found["rows"][:4] == before["rows"]
    assert found["agreement"] == before["agreement"]
    assert found["rows"][4]["test_accuracy"] == soup_of(trained, "uniform")[0].summary["best"]["test_accuracy"]
    text = toolkit("table", trained).stdout
    assert "uniform soup (4 of 4 runs)" in text
    assert "4 of 4 runs finished; only these are counted." in text
    assert "soup \N{MINUS SIGN} best member on the same test images:" in text
    assert "95 % interval [" in text


def test_a_study_with_soups_has_nothing_left_to_train(trained: Path) -> None:
    record = (trained / "study.json").read_bytes()
    outcome = toolkit("study", trained.parent.parent / "study.toml")
    assert outcome.status == 0, outcome.stderr
    assert (trained / "study.json").read_bytes() == record
    assert len(list(trained.glob("2*"))) == 4, "no new run"


def test_the_same_soup_is_made_again_byte_by_byte(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    assert toolkit("soup", folder.path).status == 0
    assert toolkit("soup", folder.path).status == 0, "it replaces an earlier one"
    assert sorted(path.name for path in (folder.path / "soup").iterdir()) == ["greedy", "uniform"]
    for name in ("checkpoints/best.safetensors", "metrics.jsonl", "predictions.csv", "soup.json"):
        for method in ("uniform", "greedy"):
            made = (folder.path / "soup" / method / name).read_bytes()
            assert made == (trained / "soup" / method / name).read_bytes()


def test_rows_are_chosen_by_name(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    outcome = toolkit("soup", folder.path, "--row", "lr 0.4", "--row", "lr 0.2", "--json")
    (uniform, _) = json.loads(outcome.stdout)
    assert {member["title"] for member in uniform["members"]} == {"lr 0.4, seed 0", "lr 0.2, seed 0"}
    unknown = toolkit("soup", folder.path, "--row", "lr 0.3")
    assert unknown.status == 2
    assert "--row 'lr 0.3': the study has no such row; did you mean lr 0.4?" in unknown.stderr


# -- batch norm and features ------------------------------------------------------------------------------------------


def test_batch_norm_statistics_equal_those_of_torch_s_update_bn(tmp_path: Path) -> None:
    blocks = "blocks = [{ channels = 4, batch_norm = true, pool = 2 }, { channels = 6, batch_norm = true }]"
    path = write_study(tmp_path, "[study.grid]\noptimizer.lr = [0.2, 0.1]\n", epochs=3)
    path.write_text(path.read_text().replace("blocks = [{ channels = 4, pool = 2 }]", blocks))
    study = study_folder(tmp_path)
    assert toolkit("study", path).status == 0
    assert toolkit("soup", study.path).status == 0
    run, content = soup_of(study.path, "uniform")
    assert content["recomputed_batch_norms"] == 2
    members = find_members(study, [], quiet)
    recipe = evaluated_recipe(members)
    with distributed_context(recipe.train) as accelerator:
        evaluator = SoupEvaluator(recipe, members, set(), accelerator, "val/accuracy")
        batches = [batch.images for _, batch in evaluator.trainer.loaders.train.epoch(0)]
        evaluator.close()
    expected = load_model(members[0].run.path).module
    states = [weights(member.run) for member in members]
    expected.load_state_dict(mean(states))
    update_bn(batches, expected)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(weights(run)[name], value, msg=name)
    averaged = mean(states)
    assert any(not torch.allclose(averaged[n], weights(run)[n]) for n in averaged if n.endswith("running_var"))


def test_a_soup_of_linear_probes_takes_features_from_the_cache_and_keeps_the_backbone(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, FROZEN + "\n[study.grid]\noptimizer.lr = [0.5, 0.1]\n")
    assert toolkit("study", path).status == 0
    study = tmp_path / "runs" / "small"
    outcome = toolkit("soup", study)
    assert outcome.status == 0, outcome.stderr
    run, content = soup_of(study, "uniform")
    assert content["recomputed_batch_norms"] == 0, "the statistics are frozen and equal"
    assert "features of train taken from the cache" in run.log_file.read_text()
    states = [weights(Run(study / member["run"])) for member in content["members"]]
    for name, value in weights(run).items():
        if name.startswith("head"):
            torch.testing.assert_close(value, mean(states)[name])
        else:
            assert torch.equal(value, states[0][name]), name
    assert "metrics equal those of summary.json" in toolkit("evaluate", run.path).stdout


@pytest.mark.extended
def test_runs_of_different_modes_are_averaged_on_images(tmp_path: Path) -> None:
    rows = '[[study.rows]]\nname = "{0}"\nset.transfer.mode = "{0}"\n'
    text = PRETRAINED + "".join(map(rows.format, ("linear_probe", "finetune", "lora")))
    assert toolkit("study", write_recipe(tmp_path, text)).status == 0
    study = tmp_path / "runs" / "small"
    assert toolkit("soup", study).status == 0
    run, content = soup_of(study, "uniform")
    assert content["recomputed_batch_norms"] == 1
    assert "taken from the cache" not in run.log_file.read_text()
    assert "metrics equal those of summary.json" in toolkit("evaluate", run.path).stdout


@pytest.mark.extended
def test_a_search_shows_soups_below_its_trials(tmp_path: Path) -> None:
    text = "[study]\nrandom = { runs = 3, seed = 0 }\nspace.optimizer.lr = { log_uniform = [0.05, 0.5] }\n"
    assert toolkit("study", write_study(tmp_path, text, epochs=1)).status == 0
    study = study_folder(tmp_path).path
    assert toolkit("soup", study).status == 0
    lines = toolkit("table", study).stdout.splitlines()
    shown = [line for line in lines if "soup (" in line][:2]
    assert [line.split()[0] for line in shown] == ["uniform", "greedy"]
    assert "3 configurations, 3 trained to the end" in "\n".join(lines)
    assert len(json.loads(toolkit("table", study, "--json").stdout)["trials"]) == 3


# -- messages ---------------------------------------------------------------------------------------------------------


def refusal(study: Path, *arguments: str) -> str:
    outcome = toolkit("soup", study, *arguments)
    assert outcome.status == 2, outcome.stderr
    return outcome.stderr


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_study_without_finished_runs_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    for run in folder.runs[1:]:
        run.summary_file.unlink()
    assert "only one finished run of" in refusal(folder.path)
    folder.runs[0].summary_file.unlink()
    assert "has finished, so there are no weights to average" in refusal(folder.path)
    assert "is not a study directory" in refusal(folder.runs[0].path)
    assert not (folder.path / "soup").exists()


def test_runs_without_weights_are_left_out_with_a_warning(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    folder.runs[1].best_weights.unlink()
    outcome = toolkit("soup", folder.path)
    assert outcome.status == 0, outcome.stderr
    assert "warning: left out 1 run without weights (checkpoints/best.safetensors): lr 0.2, seed 0" in outcome.stderr
    _, content = soup_of(folder.path, "uniform")
    assert len(content["members"]) == 3
    assert "left out 1 run without weights" in toolkit("table", folder.path).stdout
    for run in folder.runs:
        run.best_weights.unlink(missing_ok=True)
    assert "no longer have weights (checkpoints/best.safetensors)" in refusal(folder.path)


def test_runs_that_cannot_be_averaged_are_named(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path)
    card = folder.runs[0].checkpoints / "model.json"
    original = card.read_text()
    change_json(card, model=json.loads(original)["model"] | {"source": "torchvision", "name": "resnet18"})
    found = refusal(folder.path)
    assert "the finished runs differ in model.name (torchvision resnet18: lr 0.4; toolkit convnet: lr 0.2" in found
    assert "Choose rows that share it with --row" in found
    card.write_text(original)
    change_json(card, classes=["a", "b"])
    assert "differ in their classes (1: lr 0.4; 2: lr 0.2, lr 0.1, lr 0.01)" in refusal(folder.path)
    card.write_text(original)
    change_json(folder.runs[2].path / "split.json", hash="0")
    assert "differ in the split of the data" in refusal(folder.path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            'set = {{ transfer.mode = "logistic", transfer.C = [{C}.0], transfer.refit = true, train.epochs = 1 }}',
            "were also trained on them (transfer.refit = true)",
        ),
        (
            'set = {{ transfer.mode = "logistic", transfer.C = [{C}.0], data.split.validation = 0, '
            'train.best_metric = "last", train.epochs = 1 }}',
            "a soup is evaluated on validation images, but these runs have none (data.split.validation)",
        ),
    ],
    ids=["refit", "no validation images"],
)
def test_runs_that_validation_images_cannot_judge_are_refused(tmp_path: Path, settings: str, expected: str) -> None:
    rows = [f'[[study.rows]]\nname = "{number}"\n' + settings.replace("{C}", str(number)) for number in (1, 2)]
    outcome = toolkit("study", write_recipe(tmp_path, PRETRAINED + "\n".join(rows)))
    assert outcome.status == 0, outcome.stderr
    assert expected in refusal(tmp_path / "runs" / "small")


@pytest.mark.extended
def test_different_starting_weights_are_a_warning(tmp_path: Path) -> None:
    """GRID has two seeds, and each draws its own initial weights."""
    assert BASE.find("weights") == -1
    assert toolkit("study", write_study(tmp_path, GRID.replace("[0.2, 0.1, 0.05]", "[0.2]"), epochs=1)).status == 0
    study = study_folder(tmp_path).path
    outcome = toolkit("soup", study)
    assert outcome.status == 0
    warning = "the runs were trained from different random initial weights (recipe.seed, with no pretrained weights)"
    assert warning in outcome.stderr
    assert warning in toolkit("table", study).stdout


def test_a_damaged_soup_is_a_note_below_the_table(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "small")
    (tmp_path / "small" / "soup" / "greedy" / "soup.json").write_text("{}")
    text = toolkit("table", tmp_path / "small").stdout
    assert "uniform soup (4 of 4 runs)" in text
    assert "The greedy soup is not shown:" in text
