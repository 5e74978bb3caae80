"""The command line: validate, show, diff and lists; shell conventions; names that try to leave the run root."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from cli import toolkit
from study_folders import FakeRun, write_study

from toolkit.cli.main import app
from toolkit.data.dataset_info import DATASETS
from toolkit.data.preprocessing import resolve_channels, resolve_preprocessing
from toolkit.data.torchvision_info import TORCHVISION_SETS
from toolkit.formatting import duration
from toolkit.models.build import expected_input
from toolkit.recipe import catalog, load_recipe
from toolkit.recipe.schema import DataConfig
from toolkit.recipe.toml_writer import toml_value
from toolkit.runs import open_run
from toolkit.training.console import Console

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
QUICKSTART = RECIPES / "quickstart.toml"
BROKEN = '[recipe]\nname = "x"\n[data]\ndataset = "digits"\n[model]\nsource = "timm"\nname = "resnet5O"\n' \
         '[optimizer]\nname = "sgd"\nlr = -1.0\n[train]\nepochs = 1\nbatch_size = 8\nepoch = 3\n'  # fmt: skip
"""Three faults: the model's name, the learning rate, an unknown key."""


def commands() -> dict[str, Any]:
    """Return the subcommands by name, as objects of click (or of Typer's copy of it)."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


# Help, documentation, completion


def test_every_command_has_one_example_that_parses() -> None:
    found = {}
    for name, command in commands().items():
        (example,) = re.findall(r"Example: (.+)", command.help or "")
        found[name] = example
    assert len(found) >= 12
    for name, example in found.items():
        words = [word.strip('"') for word in example.split()]
        if words[0] == "toolkit":  # train's example starts the launcher
            assert words[1] == name
            commands()[name].make_context(name, words[2:])


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## `toolkit ([a-z-]+)", text, re.MULTILINE)
    assert sorted(headings) == sorted(commands())


def test_version() -> None:
    outcome = toolkit("--version")
    assert (outcome.status, outcome.stdout) == (0, f"toolkit {version('image-classification-toolkit')}\n")


SHARED = {"-o": ["-o", "--out"], "--out": ["-o", "--out"], "--json": ["--json"], "--debug": ["--debug"]}
"""Options that mean the same in every command, with all their names."""


def test_options_are_the_same_in_all_commands() -> None:
    for name, command in commands().items():
        values = [param for param in command.params if not getattr(param, "is_flag", False)]
        for param in values:
            assert param.metavar, f"{name}: {param.name} has no placeholder of its own in the help"
            assert param.metavar == param.metavar.upper(), f"{name}: {param.name}"
        for param in command.params:
            for option in param.opts:
                if option in SHARED:
                    assert param.opts == SHARED[option], f"{name}: {param.opts}"
        opts = {option for param in command.params for option in param.opts}
        assert "--debug" in opts, name
        assert "--json" in opts or name == "logs", name  # logs prints a file unchanged


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Write run directories of two recipes that contain only the recipe; the one of b is newer."""
    monkeypatch.chdir(tmp_path)
    paths = "runs/a/20260101-000000-0000", "runs/b/20260102-000000-0000"
    for path, older in (*((path, False) for path in paths), ("runs/a/20251231-000000-0000", True)):
        Path(path).mkdir(parents=True)
        epochs = 9 if older else 7
        settings = (f"train.epochs={epochs}", f'recipe.name="{path[5]}"', "data.images_per_class=8",
                    "data.test_images_per_class=5", "train.batch_size=16", "tracking.trackers=[]")  # fmt: skip
        text = toolkit("show", str(QUICKSTART), *(part for setting in settings for part in ("--set", setting)))
        (Path(path) / "recipe.toml").write_text(text.stdout)
    return paths


def test_a_recipe_s_folder_means_its_newest_run_and_latest_means_the_newest_of_all(two_runs: tuple[str, str]) -> None:
    newest_a, newest_b = two_runs
    for argument, expected in (("runs/a", newest_a), ("runs/b/", newest_b), ("latest", newest_b)):
        outcome = toolkit("evaluate", argument)
        assert outcome.stderr.startswith(f"run {expected}\n"), "the choice is logged"
        assert expected in outcome.stderr.splitlines()[-1], "and the command works on it"
    assert toolkit("diff", "runs/a", newest_a).stdout == "the recipes are equal\n"
    assert 'recipe.name: "a" -> "b"' in toolkit("diff", "runs/a", "latest").stdout
    for command in ("predict", "explain", "export", "publish", "report", "check", "logs", "cancel", "train"):
        arguments = {"predict": ["x.png"], "publish": ["lab/x"], "export": ["--format", "onnx"]}.get(command, [])
        words = ["--no-report", "--resume", "runs/a"] if command == "train" else ["runs/a", *arguments]
        assert f"run {newest_a}\n" in toolkit(command, *words).stderr, command


def test_status_and_sync_accept_latest(two_runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = json.loads(toolkit("status", "latest", "--json").stdout)
    assert [row["run"] for row in shown] == [two_runs[1]]
    uploaded: list[Path] = []
    monkeypatch.setattr("toolkit.wandb_sync.sync", lambda run, log: uploaded.append(run.path))
    toolkit("sync", "latest", "--debug")
    assert uploaded == [Path(two_runs[1])]


def test_status_of_a_study_has_a_row_for_each_of_its_runs(tmp_path: Path) -> None:
    runs = [FakeRun("lr 0.1", 0), FakeRun("lr 0.2", 0), FakeRun("lr 0.2", 1)]
    folder = write_study(tmp_path / "small", {"seeds": 2}, runs)
    expected = sorted(f"small/{member.run}" for member in folder.members)
    for name in expected:
        (tmp_path / name / "recipe.toml").write_text(QUICKSTART.read_text())
    shown = json.loads(toolkit("status", tmp_path / "small", "--json").stdout)
    assert len(expected) == 3
    assert sorted(row["run"].removeprefix(f"{tmp_path}/") for row in shown) == expected
    assert {row["state"] for row in shown} == {"finished"}
    text = toolkit("status", tmp_path / "small").stdout
    assert all(run in text for run in expected)


def test_documentation_lists_the_commands_that_take_overrides() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"\*\*Overrides\.\*\* (.+?) take `--set", text, re.DOTALL)
    documented = re.findall(r"`([a-z-]+)`", sentence)
    takes = [name for name, command in commands().items() if any("--set" in param.opts for param in command.params)]
    assert sorted(documented) == sorted(takes)


def test_help_names_every_command_in_a_whole_sentence() -> None:
    outcome = toolkit("--help")
    assert outcome.status == 0
    assert "\x1b" not in outcome.stdout
    for name in commands():
        (line,) = re.findall(rf"^  {name} +(.+)$", outcome.stdout, re.MULTILINE)
        assert name == "train" or not line.endswith("..."), line


@pytest.mark.parametrize("arguments", [["nonsense"], ["plan"], ["plan", "x.toml", "--processes", "none"], ["--bad"]])
def test_wrong_usage_has_the_exit_status_of_bad_input(arguments: list[str]) -> None:
    outcome = toolkit(*arguments)
    assert outcome.status == 2
    assert outcome.stdout == ""
    assert "Usage: " in outcome.stderr
    assert "Traceback" not in outcome.stderr


def run_separately(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `toolkit ARGUMENTS` in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "toolkit.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_the_completion_script_and_completion_work() -> None:
    program = [sys.executable, "-c", "from toolkit.cli.main import app; app(prog_name='toolkit')"]

    def complete(**environment: str) -> str:
        done = subprocess.run(program, capture_output=True, text=True, env=os.environ | environment)
        return done.stdout

    assert "_TOOLKIT_COMPLETE=complete_bash" in complete(_TOOLKIT_COMPLETE="source_bash")
    words = {"COMP_WORDS": "toolkit va", "COMP_CWORD": "1"}
    assert complete(_TOOLKIT_COMPLETE="complete_bash", **words).split() == ["validate"]
    shown = subprocess.run(
        [*program, "--show-completion", "zsh"], capture_output=True, text=True,
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )  # fmt: skip
    assert "compdef" in shown.stdout


def test_validation_and_lists_do_not_import_torch() -> None:
    program = """
import sys
import termios
import toolkit.cli.main
heavy = {"torch", "numpy", "pydantic", "rich", "matplotlib", "wandb"} & sys.modules.keys()
assert not heavy, f"toolkit --help imports {heavy}"
quickstart, other = sys.argv[1:]
for arguments in (["validate", quickstart], ["show", quickstart], ["diff", quickstart, other], ["models", "vgg"],
                  ["transforms"], ["optimizers"], ["datasets"]):
    try:
        toolkit.cli.main.app(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
    assert not {"torch", "numpy"} & sys.modules.keys(), arguments
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(QUICKSTART), str(RECIPES / "vgg16_caltech.toml")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# validate


def test_validate_accepts_every_shipped_recipe() -> None:
    recipes = sorted(RECIPES.glob("*.toml"))
    outcome = toolkit("validate", *map(str, recipes))
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout == "".join(f"{path}: ok\n" for path in recipes)
    assert len(recipes) >= 20


def test_validate_reports_all_faults_of_all_recipes(tmp_path: Path) -> None:
    broken, missing = tmp_path / "broken.toml", tmp_path / "missing.toml"
    broken.write_text(BROKEN)
    outcome = toolkit("validate", str(QUICKSTART), str(broken), str(missing))
    assert outcome.status == 2
    assert outcome.stdout.splitlines() == [f"{QUICKSTART}: ok", f"{broken}: 3 errors", f"{missing}: 1 error"]
    for position in (f"{broken}:7:", f"{broken}:10:", f"{broken}:14:"):
        assert position in outcome.stderr


def test_validate_json_has_every_fault_with_its_position(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text(BROKEN)
    outcome = toolkit("validate", "--json", str(QUICKSTART), str(broken))
    assert outcome.status == 2
    good, bad = json.loads(outcome.stdout)
    assert good == {"recipe": str(QUICKSTART), "ok": True, "diagnostics": []}
    assert [(d["key"], d["line"]) for d in bad["diagnostics"]] == [
        ("model.name", 7), ("optimizer.lr", 10), ("train.epoch", 14)
    ]  # fmt: skip
    assert "resnet50" in bad["diagnostics"][0]["hint"]


def test_validate_counts_warnings_but_passes() -> None:
    outcome = toolkit("validate", str(QUICKSTART), "--set", "early_stopping.patience=50")
    assert outcome.status == 0
    assert outcome.stdout == f"{QUICKSTART}: ok (1 warning)\n"
    assert "early_stopping.patience" in outcome.stderr


# show and diff


def test_show_prints_the_origin_of_each_value() -> None:
    recipe = RECIPES / "resnet50_caltech.toml"
    lines = recipe.read_text().splitlines()
    rate = lines.index("lr = 4.61e-2") + 1
    outcome = toolkit("show", str(recipe), "--set", "train.epochs=7")
    assert outcome.status == 0
    assert f"lr = 0.0461  # {recipe}:{rate}\n" in outcome.stdout
    assert "epochs = 7  # --set\n" in outcome.stdout
    assert "grad_accum_steps = 1  # default\n" in outcome.stdout
    base = RECIPES / "base" / "caltech101.toml"
    inherited = base.read_text().splitlines().index("drop_last = true") + 1
    assert f"drop_last = true  # {base}:{inherited}\n" in outcome.stdout


def test_the_output_of_show_is_the_same_recipe(tmp_path: Path) -> None:
    copy = tmp_path / "copy.toml"
    copy.write_text(toolkit("show", str(RECIPES / "vit_small_caltech.toml")).stdout)
    recipe = load_recipe(RECIPES / "vit_small_caltech.toml")
    assert load_recipe(copy) == recipe.model_copy(update={"assumptions": {}})  # not part of what is trained


def test_show_json() -> None:
    values = json.loads(toolkit("show", str(QUICKSTART), "--json", "--set", "train.epochs=7").stdout)
    assert values["train.epochs"] == {"value": 7, "origin": "--set"}
    assert values["recipe.seed"] == {"value": 0, "origin": "default"}


@pytest.mark.parametrize("name", ["quickstart", "vit_small_caltech", "resnet50_caltech", "efficientnet_lite0_caltech"])
def test_show_prints_the_input_settings_that_the_weights_determine(name: str) -> None:
    """They equal the values that training resolves from the libraries' own configurations."""
    recipe = load_recipe(RECIPES / f"{name}.toml")
    weights = expected_input(recipe.model)
    facts = DATASETS[recipe.data.dataset]
    data = resolve_channels(recipe.data, pretrained=weights is not None)
    trained = resolve_preprocessing(data, weights, facts.size, facts.channels, lambda plain: (plain.mean, plain.std))
    shown = json.loads(toolkit("show", str(RECIPES / f"{name}.toml"), "--json").stdout)
    entries = {key: shown[f"data.{key}"] for key in ("image_size", "channels", "resize", "interpolation")}
    values = {key: entry.get("becomes", entry)["value"] for key, entry in entries.items()}
    assert values == json.loads(json.dumps({key: trained.to_dict()[key] for key in values}))
    if recipe.data.normalize == "auto":
        becomes = {"mean": list(trained.mean), "std": list(trained.std)}
        assert shown["data.normalize"]["becomes"]["value"] == becomes
        text = toolkit("show", str(RECIPES / f"{name}.toml")).stdout
        assert f"# normalize = {toml_value(becomes)}  # " in text


def resolved(folder: Path, *settings: str) -> Path:
    """Write the parts of a run directory that diff reads."""
    folder.mkdir()
    overrides = [part for setting in settings for part in ("--set", setting)]
    (folder / "recipe.toml").write_text(toolkit("show", str(QUICKSTART), *overrides).stdout)
    return folder


def test_diff_of_recipes_and_of_runs(tmp_path: Path) -> None:
    one, two = resolved(tmp_path / "one"), resolved(tmp_path / "two", "train.epochs=7", "train.ema=0.9")
    assert toolkit("diff", str(QUICKSTART), str(one)).stdout == "the recipes are equal\n"
    changed = "train.epochs: 20 -> 7\ntrain.ema: (not set) -> 0.9\n"
    assert toolkit("diff", str(QUICKSTART), str(two)).stdout == changed
    for folder, accuracy in ((one, 0.5), (two, 0.75)):
        summary = {"best": {"test_accuracy": accuracy, "epoch": 3}, "last": {"epoch": 7}, "seed": 0}
        (folder / "summary.json").write_text(json.dumps(summary))
    outcome = toolkit("diff", str(one), str(two))
    assert outcome.stdout == changed + "metric best.test_accuracy: 0.5 -> 0.75\n"
    found = json.loads(toolkit("diff", "--json", str(one), str(two)).stdout)
    assert found == {
        "recipe": {"train.epochs": [20, 7], "train.ema": [None, 0.9]},
        "metrics": {"best.test_accuracy": [0.5, 0.75]},
    }


def outputs() -> list[list[str]]:
    """Return a command line for each option that names a file or folder to write, up to the option's value."""
    found = [["pack", "x"], ["recipes", "copy", "x"]]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        arguments = ["x" for one in command.params if one.param_type_name == "argument" and one.required]
        options = [one.opts[0] for one in command.params if {"-o", "--write-table", "--out-of-fold"} & set(one.opts)]
        found += [[name, *arguments, option] for option in options]
    return found


@pytest.mark.parametrize("arguments", outputs(), ids=" ".join)
def test_an_output_that_cannot_be_written_is_one_message_before_any_work(arguments: list[str]) -> None:
    found = toolkit(*arguments, f"{os.devnull}/x")
    assert (found.status, found.stdout) == (2, "")
    assert f"{os.devnull}/x cannot be written: Not a directory; choose another path" in found.stderr


def test_diff_refuses_a_folder_that_is_not_a_run_directory(tmp_path: Path) -> None:
    outcome = toolkit("diff", str(QUICKSTART), str(tmp_path))
    assert outcome.status == 2
    assert outcome.stderr == f"{tmp_path} is not a run directory: it has no recipe.toml\n"


# Lists


def test_models_by_pattern_source_and_weights() -> None:
    found = toolkit("models", "RESNET50", "--source", "torchvision").stdout
    assert found == "torchvision  resnet50\ntorchvision  wide_resnet50_2\n"
    with_weights = toolkit("models", "resnet50", "--source", "torchvision", "--weights").stdout.splitlines()
    assert with_weights[0] == "torchvision  resnet50         IMAGENET1K_V2, IMAGENET1K_V1"
    assert toolkit("models", "vgg1[13]").stdout.splitlines() == [
        "torchvision  vgg11", "torchvision  vgg13", "timm         vgg11", "timm         vgg13"
    ]  # fmt: skip
    (entry,) = json.loads(toolkit("models", "alexnet", "--json").stdout)
    assert entry["weights"][0]["image_size"] == 224
    everything = toolkit("models").stdout.splitlines()
    assert len(everything) == 1 + len(catalog.model_names("torchvision")) + len(catalog.model_names("timm"))


def test_transforms_and_optimizers() -> None:
    assert toolkit("transforms", "horizontal").stdout == "RandomHorizontalFlip  p = 0.5\n"
    assert "degrees (required)" in toolkit("transforms", "randomrotation").stdout
    assert toolkit("optimizers", "sgd").stdout.startswith("sgd ")
    assert len(toolkit("optimizers").stdout.splitlines()) == len(catalog.optimizers())


def test_datasets_are_those_of_the_schema_and_of_the_files() -> None:
    names = DataConfig.model_json_schema()["properties"]["dataset"]["enum"]
    listed = [line.split()[0] for line in toolkit("datasets").stdout.splitlines()]
    assert [name for name in listed if "/" not in name] == names == list(DATASETS)
    assert [name.partition("/")[2] for name in listed if "/" in name] == list(TORCHVISION_SETS)
    assert 'annotation_level = "variant"' in toolkit("datasets", "torchvision/FGVC").stdout
    from toolkit.data.datasets import open_dataset

    digits, facts = open_dataset(DataConfig(dataset="digits")), DATASETS["digits"]
    assert (len(digits.classes), len(digits.labels), digits.native_size, digits.native_channels) == (
        facts.classes, (facts.images or (0, 0))[0], facts.size, facts.channels
    )  # fmt: skip


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    outcome = toolkit("models", "resnet5O")
    assert outcome.status == 2
    assert outcome.stdout == ""
    assert "no model matches 'resnet5O'; did you mean resnet50" in outcome.stderr


# Shell conventions


def test_a_closed_output_pipe_is_not_an_error() -> None:
    program = f"{sys.executable} -m toolkit.cli.main models --json --weights | head -1"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_an_error_has_a_stack_trace_only_with_debug() -> None:
    assert "Traceback" not in toolkit("show", "missing.toml").stderr
    outcome = toolkit("show", "missing.toml", "--debug")
    assert outcome.status == 2
    assert "Traceback" in outcome.stderr
    assert "there is no recipe missing.toml" in outcome.stderr


def test_a_name_that_the_terminal_cannot_show_is_not_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / f"{'long-' * 40}日本.toml"
    recipe.write_text(QUICKSTART.read_text())
    done = run_separately("validate", str(recipe), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/{'long-' * 40}\\u65e5\\u672c.toml: ok\n"
    shown = toolkit("validate", str(recipe))
    assert shown.stdout == f"{recipe}: ok\n", "complete, not cut to the terminal's width"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_terminals_only_and_without_color_if_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(stream: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with Console(is_main=True).bar("epoch 1", 10) as bar:
            bar.advance(10)
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert shown(io.StringIO()) == ""
    color_code = re.compile(r"\x1b\[[\d;]*[34]\d[\d;]*m")
    assert color_code.search(shown(Terminal()))
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown(Terminal())
    assert "epoch 1" in plain
    assert not color_code.search(plain)


# Names that try to leave the run root

HOSTILE = ["..", "../x", "a/../../x", "/etc/x", "a/b", "a\\b", ".hidden", "-rf", "~", "x\ny", "x\0y", "x\x1b[2J",
           "a..b", "$(touch x)", "`touch x`", "a;touch x", "a|b", "a'b", 'a"b', "x ", " x", "x.", "",
           "a" * 101]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", ["train", "data", "plan"])
def test_no_name_of_a_recipe_leaves_the_run_root(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    outcome = toolkit(command, str(QUICKSTART), "--set", f"recipe.name={json.dumps(name)}")
    assert outcome.status == 2
    assert "recipe.name" in outcome.stderr
    assert "\x1b" not in outcome.stderr
    assert list(tmp_path.rglob("*")) == [work], "nothing was created"


@pytest.mark.parametrize(
    "argument", ["extends='/etc/passwd'", "recipe.name='x'\nrecipe.run_root='/'", "x", "=1", "a.b=1"]
)
def test_no_override_adds_another_file_or_line(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert toolkit("train", str(QUICKSTART), "--set", argument).status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", [30, 50, 80, 200])
def test_progress_is_one_line_on_a_terminal_of_any_width(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with Console(is_main=True).bar("epoch 3/10", 1000) as bar:
        bar.started -= 0.2
        bar.advance(250, lambda: ["loss 0.1234", "best 0.9800", "5 min left for all epochs"])
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line.strip() for line in re.split("[\r\n]", plain) if line.strip()]
    assert max(map(len, lines)) <= columns
    assert all("epoch" in line for line in lines), "no line is continued on a second one"
    assert ("━" in plain) == (columns >= 60)
    assert ("25%" in plain) == (columns >= 30)
    assert ("loss 0.1234" in plain, "best 0.9800" in plain, "5 min left" in plain) == (
        (columns >= 80,) * 2 + (columns >= 140,)
    )


def test_progress_is_shown_by_the_main_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Console(is_main=False).bar("epoch 1", 10) as bar:
        bar.advance(10)
    with Console(is_main=True, shows=False).bar("epoch 1", 10) as bar:
        bar.advance(10)
    assert stream.getvalue() == ""


def test_progress_shows_loss_remaining_time_and_evaluation(tmp_path: Path) -> None:
    """Progress is shown on a terminal and not in log.txt, and the result as a card. Nothing mentions the C library."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    command = [sys.executable, "-m", "toolkit.train", str(QUICKSTART), "--no-report", "--set", "train.epochs=6",
               "--set", "tracking.trackers=[]", "--set", f"recipe.run_root={json.dumps(str(tmp_path))}"]  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(command, stderr=slave, stdout=slave, env=environment)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while chunk := os.read(master, 65536):
            shown += chunk
    assert process.wait(60) == 0
    text = shown.decode(errors="replace")
    assert re.search(r"epoch [1-6]/6.*images/s.*loss \d+\.\d{4}", text)
    assert re.search(r"epoch 6/6.*best 0\.\d{4}", text)
    assert "left for all epochs" in text
    assert "evaluating on validation" in text
    assert "evaluating on test" in text
    assert "glibc" not in text
    (run,) = (tmp_path / "quickstart").iterdir()
    assert "left for all epochs" not in (run / "log.txt").read_text()
    card, best = text.replace("\r", ""), open_run(run).summary["best"]
    assert f"  best (epoch {best['epoch']})  last (epoch 6)\n" in card
    assert re.search(rf"\ntest accuracy +{best['test_accuracy']:.4f} ", card)
    assert card.endswith(
        f"\nrun      {run}\nreport   toolkit report {run}\npredict  toolkit predict {run} IMAGE...\n"
        f"share    toolkit publish {run} USER/NAME\n"
    )


def test_durations_are_formatted_in_readable_units() -> None:
    assert [duration(s) for s in (5, 12.34, 300, 7500)] == ["5 s", "12.3 s", "5 min", "2 h 05 min"]
