"""Plugins are found by name, checked as built-in names are, and recorded; a recipe alone loads none."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest
import tomli
from cli import toolkit
from plugin_modules import WriteModule, write_module

from toolkit import plugins
from toolkit.error_handling import run_with_error_handling
from toolkit.errors import EXIT_FAILURE, UserError
from toolkit.recipe import RecipeError, load_recipe, loads_recipe
from toolkit.recipe.resolve import resolved_toml

__all__ = ["write_module"]

RECIPE = """
[recipe]
name = "small"

[data]
dataset = "digits"

[model]
source = "plugin"
name = "tiny_net"
args = { width = 12 }

[optimizer]
name = "plugin:descent"
lr = 0.1

[scheduler]
name = "plugin:sawtooth"
args = { period = 2 }

[train]
epochs = 4
batch_size = 32
loss = "plugin:poly"
loss_args = { alpha = [0.5, 1.0] }
"""

MODULE = """
from toolkit.plugins import register

@register("model")
def tiny_net(num_classes: int, channels: int, width: int = 8, activation: str = "relu"):
    raise AssertionError("checks must not build it")

@register("optimizer", "descent")
class Descent:
    def __init__(self, params, lr: float, weight_decay: float = 0.0): ...

@register("schedule")
def sawtooth(period: int): ...

@register("loss")
def poly(alpha: list[float], num_classes: int): ...
"""


def diagnostics(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loads_recipe(text)
    return str(caught.value)


@pytest.mark.parametrize("form", ["own", "own.py"])
def test_modules_are_loaded_by_name_or_path_and_passed_on_to_other_processes(
    write_module: WriteModule, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_module(MODULE)
    plugins.use_modules([form])
    assert plugins.names("model") == ["tiny_net"]
    assert plugins.find("optimizer", "descent").takes("lr")
    listed = str(path) if form == "own.py" else "own"
    assert plugins.os.environ[plugins.VARIABLE] == listed
    # Another process has the variable only.
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(plugins, "_loaded", set())
    del sys.modules["own"]
    assert plugins.names("loss") == ["poly"]


def test_a_recipe_with_plugins_is_valid_if_they_are_loaded(write_module: WriteModule) -> None:
    write_module(MODULE)
    text = diagnostics(RECIPE)
    for kind, name in (("model", "tiny_net"), ("optimizer", "descent"), ("schedule", "sawtooth"), ("loss", "poly")):
        assert f"no {kind} plugin {name!r} is loaded" in text
    assert text.count("--plugin MODULE") == 4
    plugins.use_modules(["own"])
    recipe = loads_recipe(RECIPE)
    assert recipe.train.loss_args.given == {"alpha": [0.5, 1.0]}
    assert loads_recipe(resolved_toml(recipe)) == recipe
    assert "gamma" not in resolved_toml(recipe), "defaults of built-in losses are not arguments of a plugin"


def test_a_recipe_can_be_read_without_its_plugins(tmp_path: Path, write_module: WriteModule) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert load_recipe("recipe.toml", with_plugins=False).model.name == "tiny_net"


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ('name = "tiny_net"', 'name = "tinynet"', "no model plugin 'tinynet' is loaded", "did you mean tiny_net?"),
        ("width = 12", "widht = 12", 'tiny_net takes no argument "widht"', "did you mean width?"),
        ("width = 12", "width = 1.5", "model.args.width: expected a whole number, found 1.5", ""),
        (
            "width = 12",
            "channels = 3",
            "model.args: channels cannot be given here",
            "the toolkit passes it to tiny_net",
        ),
        ("period = 2", "", "scheduler.args: sawtooth needs period", "give period = a whole number"),
        ("alpha = [0.5, 1.0]", "alpha = 0.5", "train.loss_args.alpha: expected a list, found 0.5", ""),
        ("lr = 0.1", "lr = 0.1\nmomentum = 0.9", "optimizer.momentum: descent takes no momentum", "remove it"),
        (
            "epochs = 4",
            'epochs = 4\nclass_weights = "balanced"',
            "train.class_weights: the loss poly has no argument class_weights",
            "add class_weights to the loss",
        ),
        (
            "[optimizer]",
            "[augment]\nlabel_smoothing = 0.1\n[optimizer]",
            "augment.label_smoothing: the loss poly has no argument label_smoothing",
            "",
        ),
        (
            'source = "plugin"',
            'source = "plugin"\nweights = "DEFAULT"',
            'source "plugin" has no pretrained weights',
            "",
        ),
        ('"plugin:sawtooth"', '"plugin:"', 'expected "constant"', 'or "plugin:NAME", found the text "plugin:"'),
        ('loss = "plugin:poly"', 'loss = "focal"', "train.loss_args.alpha: expected a number", ""),
        (
            'loss = "plugin:poly"\nloss_args = { alpha = [0.5, 1.0] }',
            'loss = "focal"\nloss_args = { gama = 2 }',
            'train.loss_args: focal takes no argument "gama"',
            "did you mean gamma?",
        ),
    ],
)
def test_names_and_arguments_are_checked_against_the_signature(
    write_module: WriteModule, old: str, new: str, message: str, hint: str
) -> None:
    write_module(MODULE)
    plugins.use_modules(["own"])
    assert old in RECIPE
    text = diagnostics(RECIPE.replace(old, new))
    assert message in text
    assert hint in text


def test_a_factory_that_takes_any_argument_is_not_checked(write_module: WriteModule) -> None:
    write_module(MODULE.replace('width: int = 8, activation: str = "relu"', "**more"))
    plugins.use_modules(["own"])
    assert loads_recipe(RECIPE.replace("width = 12", "whatever = 1")).model.args == {"whatever": 1}


def test_arguments_may_be_tables_and_size_is_an_argument_like_others(write_module: WriteModule) -> None:
    write_module(MODULE.replace('activation: str = "relu"', "options: int | dict[str, int] = 3, *, size: int"))
    plugins.use_modules(["own"])
    assert loads_recipe(RECIPE.replace("width = 12", "options = { a = 1 }, size = 2")).model.args["options"] == {"a": 1}
    assert "tiny_net needs size" in diagnostics(RECIPE)


def test_faulty_modules_are_one_message(write_module: WriteModule, tmp_path: Path) -> None:
    write_module("1 / 0")
    for modules, message in (
        (["missing.py"], "there is no such file"),
        (["a,b.py"], "separates modules by commas, so a path cannot contain one"),
        (["own"], "the plugin module own cannot be imported: ZeroDivisionError"),
        (["missing"], "cannot be imported: ModuleNotFoundError"),
    ):
        with pytest.raises(UserError, match=message):
            plugins.use_modules(modules)
        plugins.os.environ[plugins.VARIABLE] = ""
    (tmp_path / "json.py").touch()
    with pytest.raises(UserError, match="another module is named 'json'"):
        plugins.use_modules(["json.py"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("own.py", "raise SystemExit", "own.py cannot be imported: SystemExit"),
        ("own.v2.py", "", "rename the file, without dots"),
        (
            "own_nets/inner.py",
            "from . import other",
            r"part of a package: in the folder .*, use --plugin own_nets.inner",
        ),
    ],
)
def test_files_that_python_cannot_import_are_one_message(
    file: str, content: str, message: str, write_module: WriteModule, tmp_path: Path
) -> None:
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets/__init__.py").touch()
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        plugins.use_modules([file])


def test_what_plugins_print_is_not_in_the_results(
    write_module: WriteModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module("print('imported')\n" + MODULE)
    plugins.use_modules(["own"])
    printing = plugins.Plugin("metric", "printing", lambda: print("called"))
    printing.build({})
    assert capsys.readouterr() == ("", "imported\ncalled\n")


def test_a_factory_that_exits_is_an_error() -> None:
    with pytest.raises(UserError, match="the metric 'own' failed: SystemExit: 0"):
        plugins.Plugin("metric", "own", lambda: sys.exit(0)).build({})
    assert run_with_error_handling(lambda: sys.exit(0)) == EXIT_FAILURE, "not the status of the user's code"


def test_two_files_cannot_register_the_same_name(write_module: WriteModule) -> None:
    write_module(MODULE)
    write_module(MODULE, "other")
    with pytest.raises(UserError, match="other cannot be imported: UserError: two plugins are named 'tiny_net'"):
        plugins.use_modules(["own", "other"])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="the kinds are model, dataset, transform"):
        plugins.register("network")


def test_the_record_identifies_the_file(write_module: WriteModule) -> None:
    path = write_module(MODULE)
    plugins.use_modules(["own"])
    recipe = loads_recipe(RECIPE)
    found = plugins.records(recipe)
    assert [record["kind"] for record in found] == ["model", "optimizer", "schedule", "loss"]
    assert found[1] == {
        "kind": "optimizer",
        "name": "descent",
        "module": "own",
        "version": None,
        "file": "own.py",
        "loaded_with": "own",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert plugins.records(recipe, ["loss"]) == found[3:]


def test_entry_points_of_installed_packages_are_plugins(write_module: WriteModule, tmp_path: Path) -> None:
    package = tmp_path / "site"
    info = package / "own_nets-1.2.dist-info"
    info.mkdir(parents=True)
    (package / "own_nets.py").write_text("def wide(num_classes: int, factor: float = 2.0): ...\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-nets\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[toolkit.models]\nwide_net = own_nets:wide\nbroken = missing:net\n")
    write_module(MODULE)
    sys.path.append(str(package))
    assert plugins.names("model") == ["broken", "wide_net"]
    assert "own_nets" not in sys.modules, "it is imported only if a recipe names it"
    found = plugins.find("model", "wide_net")
    assert found.arguments == {"factor": {"kinds": ["number"], "required": False, "default": 2.0}}
    assert (found.record["version"], found.record["file"]) == ("1.2", "own_nets.py")
    with pytest.raises(UserError, match="the plugin 'broken', missing:net, cannot be imported"):
        plugins.find("model", "broken")


def test_a_recipe_without_plugins_loads_none(write_module: WriteModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise AssertionError("nothing is looked up")

    monkeypatch.setattr(plugins, "entry_points", fail)
    monkeypatch.setattr(plugins, "_load_listed", fail)
    monkeypatch.setenv(plugins.VARIABLE, "missing")
    text = RECIPE.replace('source = "plugin"\nname = "tiny_net"', 'source = "torchvision"\nname = "resnet18"')
    for old, new in (
        ("args = { width = 12 }", ""),
        ("plugin:descent", "adam"),
        ("plugin:sawtooth", "cosine"),
        ("args = { period = 2 }", ""),
        ("plugin:poly", "bce"),
        ("loss_args = { alpha = [0.5, 1.0] }", ""),
    ):
        assert old in text
        text = text.replace(old, new)
    assert loads_recipe(text).train.loss == "bce"


ALL_KINDS = """
@register("dataset")
def shapes(count: int = 5): ...

@register("transform")
def Fog(strength: float): ...

@register("metric")
def kappa(): ...

@register("loss")
def free(**arguments): ...
"""


def test_a_schema_for_editors_has_the_names_and_arguments_of_plugins(write_module: WriteModule, tmp_path: Path) -> None:
    write_module(MODULE + ALL_KINDS)
    found = toolkit("schema", "--plugin", "own.py", "-o", "my.schema.json")
    assert found.status == 0, found.stderr
    schema = json.loads((tmp_path / "my.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    names = {name for kind in plugins.PROVIDED for name in plugins.names(kind)}
    assert not [name for name in names if not re.search(rf'"(plugin:)?{name}"', json.dumps(schema))]
    assert toolkit("schema").stdout == (tmp_path / "my.schema.json").read_text(), "the plugins are still loaded"

    def faults(text: str) -> int:
        return len(list(jsonschema.Draft7Validator(schema).iter_errors(tomli.loads(text))))

    fog = '[augment]\ntrain = [{ name = "plugin:Fog", stage = "tensor", strength = 0.5 }]\n'
    assert faults(RECIPE + fog) == 0
    assert faults(RECIPE.replace('"plugin:poly"', '"plugin:free"').replace("alpha", "whatever")) == 0
    assert faults(RECIPE.replace("tiny_net", "other_net").replace("width", "depth")) == 0, "not loaded"
    for old, new in (("width", "depth"), ("= 12", '= "wide"'), ("period", "length"), ("alpha", "gamma_")):
        assert faults(RECIPE.replace(old, new)), (old, new)
    assert faults(RECIPE + fog.replace("0.5", '"much"'))
    assert faults(RECIPE + fog.replace("strength", "weakness"))
    assert faults('[data]\ndataset = "plugin"\nname = "shapes"\nargs = { number = 5 }\n')


def test_commands_load_plugins_with_an_option(write_module: WriteModule, tmp_path: Path) -> None:
    write_module(MODULE)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    found = toolkit("validate", "recipe.toml")
    assert found.status == 2
    assert "recipe.toml:10:8: error: model.name: no model plugin 'tiny_net' is loaded" in found.stderr
    found = toolkit("validate", "recipe.toml", "--plugin", "own.py")
    assert found.status == 0, found.stderr
