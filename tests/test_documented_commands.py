"""Every command in the documentation is executed, either here or by another test that ELSEWHERE names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from cli import toolkit
from finished import digit_files

from toolkit.cli.main import app

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

ELSEWHERE = {
    r"toolkit new .*": "test_new_recipe.py::test_",
    r"toolkit probe .*": "test_probe.py::test_the_command_writes_a_table_a_page_and_a_recipe",
    r"toolkit train (digits_png|caltech101)\.toml": "test_new_recipe.py::test_",
    r"toolkit plugins( \[PATTERN\])?|toolkit models --plugins": (
        "test_plugin_commands.py::test_plugins_are_listed_with_their_arguments"
    ),
    r"toolkit train (flowers|DATA|digits\.toml|digits_png|caltech101)": (
        "test_train_data.py::test_a_folder_is_trained_and_its_recipe_kept"
    ),
    r"toolkit (train photos\.toml.*|predict runs/photos .*|study learning-rates\.toml)": (
        "test_tutorial.py::test_the_commands_work_in_an_empty_folder"
    ),
    r"toolkit (table|report) runs/learning-rates": "test_study_table.py::test_",
    r"toolkit (train cifar10_teacher|study distillation)\.toml": (
        "test_distillation.py::test_an_interrupted_student_continues_bit_for_bit_and_needs_no_teacher_afterwards"
    ),
    r"toolkit soup .*": "test_soup.py::test_the_same_soup_is_made_again_byte_by_byte",
    r"toolkit submit .*": "test_slurm_cluster.py::test_a_run_on_two_nodes_equals_a_run_in_one_process",
    r"toolkit submit (STUDY|recipes/studies/|search).*": (
        "test_slurm_arrays.py::test_a_resubmitted_array_trains_only_the_run_that_failed"
    ),
    r"toolkit submit .*--to ray.*": (
        "test_ray.py::test_after_a_lost_process_and_a_stop_request_the_results_are_those_of_an_uninterrupted_run"
    ),
    r"toolkit (cancel|logs) .*": "test_slurm.py::test_status_logs_and_cancel_report_that_there_are_no_jobs",
    r"toolkit status runs/(digits-seeds|search)": "test_slurm.py::test_status_of_a_study_names_the_row_of_each_run",
    r"toolkit publish .*": "test_publish.py::test_with_a_login_everything_is_pushed",
    r"toolkit sync .+": "test_sync.py::test_a_run_is_uploaded_completely_and_once",
    r"toolkit report .*--wandb": (
        "test_wandb_report.py::test_a_report_has_table_curves_comparison_and_notes_of_the_studys_runs"
    ),
    r"toolkit report RUN --filters 3,17": "test_report.py::test_first_layer_filters_are_drawn_by_their_number",
    r"toolkit find-lr .*": (
        "test_lr_finder.py::test_the_command_prints_a_table_and_the_setting_and_writes_into_the_folder_given"
    ),
    r"toolkit .*--plugin (my_net|my_train\.py|MODULE)( .*)?|toolkit predict runs/tiny image\.png": (
        "test_plugin_page.py::test_the_examples_give_the_output_that_is_shown"
    ),
    r"toolkit recipes (show|copy) .*": (
        "test_ready_recipes.py::test_copy_takes_along_what_a_recipe_needs_and_says_what_to_do_next"
    ),
    r"toolkit train quickstart": (
        "test_ready_recipes.py::test_commands_take_the_name_of_a_ready_recipe_where_no_file_has_it"
    ),
    r"toolkit bench .*": "test_bench.py::test_metrics_of_the_quickstart_are_consistent",
    r"toolkit bench .*--compare\]?": "test_bench.py::test_comparing_with_the_plain_loop_needs_no_source_checkout",
    r"toolkit --(install|show)-completion": "test_cli.py::test_the_completion_script_and_completion_work",
    r"toolkit export RUN --format lora": "test_lora.py::test_the_update_can_be_stored_without_the_pretrained_weights",
    r"toolkit export RUN --format onnx.*": (
        "test_export.py::test_an_exported_model_computes_the_same_for_any_number_of_images"
    ),
    r"toolkit (train|study) --resume.*|toolkit train .*--resume auto": "test_resume.py::test_",
    r"toolkit study FILE --worker": "test_study_workers.py::test_",
    r"toolkit train RUN/recipe.toml": (
        "test_study_running.py::test_a_run_keeps_its_own_recipe_and_the_origin_of_each_value"
    ),
    r"toolkit train recipes/(convnet|efficientnet).*|toolkit train recipes/alexnet.*": (
        "test_train.py::test_every_shipped_recipe_passes_a_dry_run"
    ),
    r"toolkit train recipes/two_digits.toml": "test_train.py::test_every_shipped_recipe_passes_a_dry_run",
    r"toolkit predict runs/two-digits .*": (
        "test_multi_label.py::test_predict_lists_the_class_or_all_labels_above_their_thresholds"
    ),
    r"toolkit study recipes/(papers|studies)/.*": "test_papers.py::test_every_study_passes_validation_and_planning",
    r"toolkit study (dead|typo)\.toml": "test_study_forms.py::test_each_error_has_its_message",
    r"toolkit study momentum\.toml.*": (
        "test_study_forms.py::test_all_errors_of_all_runs_are_reported_at_once_and_each_once"
    ),
    r"toolkit study diverges\.toml": (
        "test_study_running.py::test_a_failed_run_does_not_end_the_study_and_is_retried_on_request"
    ),
    r"toolkit study other\.toml": "test_study_running.py::test_a_folder_with_another_study_is_refused",
    r"toolkit study dropout\.toml --set 'recipe.run_root.*": (
        "test_study_running.py::test_storage_that_cannot_be_written_is_one_message"
    ),
    r"toolkit study dropout\.toml --set study.max_runs.*": (
        "test_study_running.py::test_more_runs_than_the_limit_need_the_yes_option"
    ),
    r"toolkit sweep .*": (
        "test_wandb_sweep.py::test_wandbs_agent_trains_with_the_servers_values_as_a_run_of_the_sweep"
    ),
    r"toolkit table runs/\S+ runs/\S+": (
        "test_study_claims.py::test_agreement_over_several_studies_is_that_of_all_their_rows"
    ),
    r"toolkit table .*--by .*": "test_study_table.py::test_rows_can_be_grouped_by_a_key",
    r"toolkit table .*--compare .*": "test_study_table.py::test_two_rows_are_compared_over_their_common_seeds",
    r"toolkit table .*--out-of-fold .*": "test_study_folds.py::test_each_image_is_predicted_once_out_of_its_fold",
    r"toolkit table runs/digits-bohb --figures": "test_study_table.py::test_trials_are_listed_with_the_best_first",
    r"toolkit pack .*": "test_data_shards.py::test_the_command_packs_and_reports",
    r"toolkit data recipes/.*": "test_cli_data.py::test_",
    r"toolkit data .*--write-table.*": "test_write_table.py::test_",
    r"toolkit explain .*": "test_explain.py::test_",
    r"toolkit calibrate .*": "test_calibrate.py::test_",
    r"toolkit .*--tta.*": "test_tta.py::test_",
    r"toolkit embed .*": "test_embed.py::test_",
    r"toolkit predict RUN @.*": "test_predict.py::test_",
}
"""Commands that need what this test lacks (a cluster, a server, hours, a faulty file): the tests that execute them.

The last matching pattern applies. A name that ends in ``test_`` means the whole file.
"""


def documented() -> list[str]:
    """Return the `toolkit` commands in the pages' code blocks and code spans."""
    found: set[str] = set()
    for page in PAGES:
        text = page.read_text()
        joined = re.sub(r"\\\n *", "", text)
        lines = re.findall(r"^(?: {4,}|```(?:sh|console)?\n)(?:\$ )?(toolkit .*)$", joined, re.MULTILINE)
        for command in [*lines, *re.findall(r"`(toolkit [^`]+)`", re.sub(r"\s+", " ", text))]:
            found.add(re.sub(r" +(#|>) .*", "", command))
    return sorted(found)


def is_complete(command: str) -> bool:
    """Return whether the command has all required arguments; otherwise the page only mentions it."""
    _, name, *arguments = shlex.split(re.sub(r"\[([^\]' ]*)\]", "", command))
    if name not in COMMANDS:
        return True
    try:
        COMMANDS[name].make_context(name, arguments)
    except typer.BadParameter as error:
        return "Missing" not in type(error).__name__
    except typer.Exit:  # --help
        return True
    return command != "toolkit train"  # RECIPE or --resume


DOCUMENTED = documented()
CALLED = [command for command in DOCUMENTED if is_complete(command)]


def covering_test(command: str) -> str | None:
    """Return the test elsewhere that executes the command; None if this file does."""
    tests = [test for pattern, test in ELSEWHERE.items() if re.fullmatch(pattern, command)]
    return tests[-1] if tests else None


def test_the_documentation_has_many_commands() -> None:
    assert len(CALLED) > 80
    assert {command.split()[1] for command in CALLED} >= set(COMMANDS)


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_options_exist(command: str) -> None:
    _, name, *arguments = shlex.split(re.sub(r"\[([^\]' ]*)\]", r"\1", command))
    if name == "COMMAND" or name.startswith("-") or "--help" in arguments:
        return
    assert name in COMMANDS
    if command in CALLED and "|" not in "".join(arguments):
        COMMANDS[name].make_context(name, arguments)
    else:
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {a for a in arguments if a.startswith("-")} <= options


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_tests_that_execute_other_commands_exist_and_are_needed(pattern: str) -> None:
    file, _, name = ELSEWHERE[pattern].partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^def {name}" + ("" if name == "test_" else "\\("), text, re.MULTILINE), ELSEWHERE[pattern]
    assert any(covering_test(command) == ELSEWHERE[pattern] for command in CALLED), f"no page shows {pattern}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the commands run, with recipes, a finished run, a finished study and images."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    quickstart = folder / "recipes" / "quickstart.toml"
    short = quickstart.read_text().replace("epochs = 20", "epochs = 1").split("[expected_metrics]")[0]
    quickstart.write_text(f"{short}\n[tracking]\ntrackers = []\n")
    expected = "\n[expected_metrics]\ntest_accuracy = { at_least = 0.01, source = 'chance' }\n"
    (folder / "recipe.toml").write_text(f'extends = "recipes/quickstart.toml"\n{expected}')
    study = re.search(
        r"^```toml\n(extends = .*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert study is not None
    (folder / "dropout.toml").write_text(study[1])
    digit_files(folder / "flowers")
    digits = [path.relative_to(folder / "flowers").as_posix() for path in (folder / "flowers").rglob("*.png")]
    rows = [f"{path},{path.split('/')[1]}" for path in sorted(digits)]
    (folder / "flowers" / "labels.csv").write_text("\n".join(["image,label", *rows]))
    for name, page in (("flowers.toml", "tutorial.md"), ("labels.toml", "data.md")):
        recipe = re.search(rf"`{name}`:\n\n```toml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
        assert recipe is not None
        offline = recipe[1]
        for online, local in {  # pretrained weights need a network, and give the image size
            'name = "resnet50"\nweights = "a1_in1k"': 'name = "test_resnet"',
            'mode = "finetune"\nbackbone_lr = 0.1': 'mode = "scratch"\n',
            "\n[augment]": "image_size = 16\n[augment]",
        }.items():
            assert online in offline
            offline = offline.replace(online, local)
        (folder / name).write_text(offline)
    return folder


PLACEHOLDERS = {
    r"runs/quickstart/\S+": "RUN",
    r"runs/(giunta-dropout|mereu-table08|digits-\w+)": "STUDY",
    r"\bSTUDY_DIR\b": "STUDY",
    r"\bDIR\b": "STUDY",
    r"\bRUN\|STUDY\b": "RUN",
    r"\bFILE\b": "dropout.toml",
    r"\bRECIPE\b": "recipe.toml",
    r"\bA B\b": "recipe.toml recipes/quickstart.toml",
    r"\bPATH\.\.\.": "flowers/test/0",
    r"\[PATH\.\.\.\]": "",
    r"\bPATH\b": "RUN",
    r"\bscans\b": "flowers/test",
    r"\bPATTERN\b": "a",
    r"\bCOMMAND\b": "train",
    r"\blist\|(clean|show\|copy)\b": "list",
    r"\.\.\.|[\[\]](?![^']*')": "",
}


def filled_in(command: str) -> str:
    """Replace placeholders and names of runs in a command by files in ``folder``."""
    for pattern, value in PLACEHOLDERS.items():
        command = re.sub(pattern, value, command)
    return re.sub(r"\bRUN\b|runs/quickstart", "latest", command).replace("STUDY", "runs/head-dropout")


@pytest.mark.parametrize("command", sorted({filled_in(c) for c in CALLED if covering_test(c) is None}))
def test_documented_commands_run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if "latest" in command and not (folder / "runs" / "quickstart").is_dir():
        assert toolkit("train", "recipe.toml", "--no-report").status == 0
    if "head-dropout" in command and not (folder / "runs" / "head-dropout").is_dir():
        assert toolkit("study", "dropout.toml").status == 0
    arguments = [
        name for a in shlex.split(command)[1:] for name in (sorted(map(str, Path().glob(a))) if "*" in a else [a])
    ]
    if arguments[0] == "train" and "--dry-run" not in arguments:
        arguments.append("--no-report")  # which `toolkit report` writes here once
    outcome = toolkit(*arguments)
    assert outcome.status == (2 if "train.epoch=5" in command else 0), outcome.stderr
    assert outcome.stdout or outcome.stderr
