"""User-defined models, data sets, transforms, losses, metrics, optimizers and schedules that recipes select by name.

A plugin is a factory: a function or class that is called with the arguments in the recipe, and with the values in
:data:`PROVIDED` for its kind that its signature accepts. A recipe cannot load code; the caller can, in three ways:

- an installed package has an entry point in the group ``toolkit.models``, ``toolkit.datasets``, ...;
- ``--plugin MODULE`` (or the environment variable TOOLKIT_PLUGINS) names modules that call :func:`register`;
- a program calls :func:`register`, or passes the factory to :func:`toolkit.fit`.

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar

from toolkit.errors import UserError, first_line
from toolkit.metrics import set_direction
from toolkit.signatures import describe_argument
from toolkit.similar_names import did_you_mean

if TYPE_CHECKING:
    from toolkit.recipe.schema import Recipe

F = TypeVar("F", bound=Callable[..., Any])
KeyPath = tuple[str | int, ...]

VARIABLE = "TOOLKIT_PLUGINS"
"""Environment variable with the modules to load, separated by commas: importable names, or paths of Python files.

Processes of launchers, studies and SLURM jobs inherit it."""

PREFIX = "plugin:"
"""Prefix of a plugin's name in recipe keys that also accept built-in names."""

PROVIDED: dict[str, tuple[str, ...]] = {
    "model": ("num_classes", "channels", "image_size"),
    "dataset": (),
    "transform": ("image_size",),
    "loss": ("num_classes", "class_weights", "label_smoothing"),
    "metric": ("num_classes",),
    "optimizer": ("params", "lr", "weight_decay", "momentum"),
    "schedule": ("epochs", "warmup_epochs"),
}
"""Arguments that only the toolkit, not a recipe, passes to factories, by kind, if their signature has them."""


@dataclass(frozen=True)
class Plugin:
    """A factory that recipes can select by name."""

    kind: str
    """Key of :data:`PROVIDED`."""
    name: str
    factory: Callable[..., Any]
    distribution: str | None = None
    """Installed package whose entry point it is; None for a module of --plugin and for objects given by the caller."""
    code: Any = None
    """Object whose file is that of the plugin; None: the factory."""
    loaded_with: str | None = None
    """What --plugin loaded it: the name of a module or file; None if the program registered it."""

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        try:
            return dict(inspect.signature(self.factory, eval_str=True).parameters)
        except (NameError, TypeError, ValueError) as error:
            raise UserError(f"the signature of the {self.kind} {self.name!r} cannot be read: {error}") from None

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """The arguments that a recipe can set, described as in :mod:`toolkit.recipe.catalog`."""
        named = (p for p in self._parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        return {p.name: _description(p) for p in named if p.name not in PROVIDED[self.kind]}

    @property
    def takes_any(self) -> bool:
        """Whether the factory accepts any keyword argument (``**kwargs``)."""
        return any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    @property
    def higher_is_better(self) -> bool:
        """Whether higher values of a metric are better."""
        return bool(getattr(self.factory, "higher_is_better", True))

    def takes(self, name: str) -> bool:
        """Return whether the factory's signature has this argument."""
        return name in self._parameters

    def build(self, arguments: dict[str, Any], **provided: Any) -> Any:
        """Call the factory with the recipe's arguments and with those of ``provided`` that its signature has.

        Raises UserError if the factory raises an error.
        """
        taken = {name: value for name, value in provided.items() if self.takes(name)}
        try:
            with _prints_to_stderr():
                return self.factory(**arguments, **taken)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # user code may raise any exception
            raise UserError(
                f"the {self.kind} {self.name!r} failed: {type(error).__name__}: {first_line(error)}"
            ) from error

    @cached_property
    def _module(self) -> ModuleType | None:
        code = self.factory if self.code is None else self.code
        if isinstance(code, functools.partial):
            code = code.func
        return inspect.getmodule(code) or inspect.getmodule(type(code))

    @property
    def file(self) -> str | None:
        """Path of the Python file that defines the factory; None if it was typed into an interpreter."""
        file = getattr(self._module, "__file__", None)
        return os.path.realpath(file) if file and os.path.isfile(file) else None

    @cached_property
    def record(self) -> dict[str, str | None]:
        """Identity of the plugin, for the run directory: names, version, and hash of the file when first read."""
        return {
            "kind": self.kind,
            "name": self.name,
            "module": getattr(self._module, "__name__", None),
            "version": version(self.distribution) if self.distribution else _version(self._module),
            "file": self.file and os.path.basename(self.file),
            "loaded_with": self.loaded_with,
            "sha256": self.file and hashlib.sha256(Path(self.file).read_bytes()).hexdigest(),
        }


def _description(parameter: inspect.Parameter) -> dict[str, Any]:
    """Describe an argument of a plugin, which may also be a table, and has no default but its own."""
    members = typing.get_args(parameter.annotation) or (parameter.annotation,)
    takes_table = any((typing.get_origin(member) or member) is dict for member in members)
    described = describe_argument(parameter) | {"required": parameter.default is parameter.empty}
    return described | ({"kinds": []} if takes_table else {})


_registered: dict[tuple[str, str], Plugin] = {}
_loaded: set[str] = set()
_loading: list[str] = []
"""Modules that are being imported; the last one registers plugins now."""


def register(kind: str, name: str | None = None, *, higher_is_better: bool | None = None) -> Callable[[F], F]:
    """Decorate a factory to register it as a plugin: ``@register("model")``, by default under its own name.

    ``kind``: model, dataset, transform, loss, metric, optimizer or schedule. ``higher_is_better``: whether higher
    values of a metric are better, stored as an attribute of the factory, which may also set it itself; by default they
    are. Raises UserError if another factory has the name.
    """
    if kind not in PROVIDED:
        raise UserError(f"register({kind!r}): the kinds are {', '.join(PROVIDED)}")
    if higher_is_better is not None and kind != "metric":
        raise UserError(f"register({kind!r}, higher_is_better=...): only metrics have a direction")

    def decorate(factory: F) -> F:
        if higher_is_better is not None:
            factory.higher_is_better = higher_is_better  # type: ignore[attr-defined]
        add(Plugin(kind, name or factory.__name__, factory, loaded_with=_loading[-1] if _loading else None))
        return factory

    return decorate


def add(plugin: Plugin, *, replace: bool = False) -> None:
    """Add a plugin. Raises UserError if one of another file has its name, unless it may ``replace`` it."""
    known = None if replace else _registered.get((plugin.kind, plugin.name))
    if known is not None and known.file != plugin.file:
        raise UserError(
            f"two plugins are named {plugin.name!r} ({plugin.kind}): one in {known.file}, one in {plugin.file}; give "
            "one of them another name"
        )
    _registered[plugin.kind, plugin.name] = plugin
    if plugin.kind == "metric":
        set_direction(plugin.name, higher_is_better=plugin.higher_is_better)


def use_modules(named: list[str]) -> None:
    """Load modules, and record them in the environment for the processes that this one starts.

    Each is an importable name, or the path of a Python file. Raises UserError.
    """
    listed = [*modules(), *(_absolute(module) for module in named)]
    if divided := next((name for name in listed if "," in name), None):
        raise UserError(
            f"--plugin {divided}: repeat the option for several modules. {VARIABLE} separates modules by commas, so a "
            "path cannot contain one"
        )
    os.environ[VARIABLE] = ",".join(dict.fromkeys(listed))
    _load_listed()


def find(kind: str, name: str) -> Plugin:
    """Return a plugin. Raises UserError if there is none with this name."""
    _load_listed()
    if (kind, name) not in _registered:
        entry = _entries(kind).get(name)
        if entry is None:
            raise UserError(f"{unknown(kind, name)}: {how_to_load(kind, name)}")
        add(Plugin(kind, name, _load_entry(entry), entry.dist.name if entry.dist else None))
    return _registered[kind, name]


def is_loaded(kind: str, name: str) -> bool:
    """Return whether there is a plugin with this name."""
    _load_listed()
    return (kind, name) in _registered or name in _entries(kind)


def unknown(kind: str, name: str) -> str:
    """Return the message for a plugin that is not loaded."""
    return f"no {kind} plugin {name!r} is loaded"


def how_to_load(kind: str, name: str) -> str:
    """Return the advice for a plugin that is not loaded: a similar name, or the option that loads its module."""
    known = names(kind)
    listed = f" (loaded: {', '.join(known)})" if known else ""
    return did_you_mean(name, known, otherwise=f"name the module that registers it with --plugin MODULE{listed}")


def names(kind: str) -> list[str]:
    """Return the names of a kind's plugins, sorted: registered ones, and entry points, which are not imported yet."""
    _load_listed()
    return sorted({name for of, name in _registered if of == kind} | _entries(kind).keys())


def loaded(kinds: Collection[str] = tuple(PROVIDED)) -> list[Plugin]:
    """Return all plugins of these kinds, by kind and name; packages with entry points are imported for it."""
    return [find(kind, name) for kind in kinds for name in names(kind)]


class NamedPlugin(NamedTuple):
    """A plugin that is used in a recipe."""

    kind: str
    name: str
    key: KeyPath
    """Recipe key that selects it."""
    arguments: dict[str, Any]
    arguments_key: KeyPath
    """Recipe key of the table with its arguments."""


def named_plugins(recipe: Recipe) -> Iterator[NamedPlugin]:
    """Yield the plugins that are used in a recipe."""
    model, optimizer, schedule, train = recipe.model, recipe.optimizer, recipe.scheduler, recipe.train
    if model.source == "plugin":
        yield NamedPlugin("model", model.name, ("model", "name"), model.args, ("model", "args"))
    if recipe.data.dataset == "plugin" and recipe.data.name is not None:
        yield NamedPlugin("dataset", recipe.data.name, ("data", "name"), recipe.data.args, ("data", "args"))
    others = [
        NamedPlugin("optimizer", optimizer.name, ("optimizer", "name"), optimizer.args, ("optimizer", "args")),
        NamedPlugin("schedule", schedule.name, ("scheduler", "name"), schedule.args, ("scheduler", "args")),
        NamedPlugin("loss", train.loss, ("train", "loss"), train.loss_args.given, ("train", "loss_args")),
    ]
    for split in ("train", "validation", "test"):
        for index, entry in enumerate(getattr(recipe.augment, split)):
            path: KeyPath = ("augment", split, index)
            others.append(NamedPlugin("transform", entry.name, (*path, "name"), entry.arguments, path))
    for index, name in enumerate(train.metrics):
        others.append(NamedPlugin("metric", name, ("train", "metrics", index), {}, ("train", "metrics", index)))
    for use in others:
        if use.name.startswith(PREFIX):
            yield use._replace(name=use.name.removeprefix(PREFIX))


def records(recipe: Recipe, kinds: Collection[str] = tuple(PROVIDED)) -> list[dict[str, str | None]]:
    """Return the identity of each plugin of these kinds that a recipe uses, each once; see :attr:`Plugin.record`."""
    used = dict.fromkeys((use.kind, use.name) for use in named_plugins(recipe) if use.kind in kinds)
    return [find(kind, name).record for kind, name in used]


def _entries(kind: str) -> dict[str, EntryPoint]:
    """Return the entry points of installed packages for a kind of plugin, by name."""
    return {entry.name: entry for entry in entry_points(group=f"toolkit.{kind}s")}


def modules() -> list[str]:
    """Return the modules of --plugin and :data:`VARIABLE`."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def _absolute(module: str) -> str:
    """Return the absolute path of a module that is a file; other names are unchanged."""
    return os.path.abspath(module) if module.endswith(".py") else module


def _load_listed() -> None:
    for module in modules():
        if module not in _loaded:
            _loaded.add(module)
            _import(module)


def _import(module: str) -> None:
    """Import a module by its name or path. Its folder, or the current one, is appended to ``sys.path``."""
    folder, name = os.getcwd(), module
    if module.endswith(".py"):
        if not os.path.isfile(module):
            raise UserError(f"--plugin {module}: there is no such file")
        folder, name = os.path.dirname(module), Path(module).stem
        if "." in name:
            raise UserError(f"--plugin {module}: Python cannot import {name!r}; rename the file, without dots")
    if folder not in sys.path:
        sys.path.append(folder)
    _loading.append(os.path.basename(module))
    try:
        with _prints_to_stderr():
            imported = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # user code may raise any exception
        raise UserError(
            f"the plugin module {module} cannot be imported: {type(error).__name__}: {first_line(error)}"
            + _package_hint(module)
        ) from error
    finally:
        _loading.pop()
    found = getattr(imported, "__file__", None)
    if module.endswith(".py") and (found is None or not os.path.samefile(found, module)):
        raise UserError(f"--plugin {module}: another module is named {name!r} ({found}); rename the file")


def _prints_to_stderr() -> contextlib.redirect_stdout[TextIO]:
    """Return a context in which user code prints to stderr: results on stdout must be readable with --json."""
    return contextlib.redirect_stdout(sys.stderr)


def _package_hint(module: str) -> str:
    """Return the advice for a file of a package, whose relative imports work only under its full name."""
    path = Path(module)
    if not module.endswith(".py") or not (path.parent / "__init__.py").is_file():
        return ""
    names = [] if path.stem == "__init__" else [path.stem]
    while (path.parent / "__init__.py").is_file():
        path = path.parent
        names.insert(0, path.name)
    return f". It is part of a package: in the folder {path.parent}, use --plugin {'.'.join(names)}"


def _load_entry(entry: EntryPoint) -> Callable[..., Any]:
    try:
        with _prints_to_stderr():
            factory: Callable[..., Any] = entry.load()
    except (Exception, SystemExit) as error:  # the package's code may raise any exception
        raise UserError(
            f"the plugin {entry.name!r}, {entry.value}, cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    return factory


def _version(module: Any) -> str | None:
    """Return the version of the installed package that a module belongs to; None if it is not installed."""
    package = getattr(module, "__name__", "").partition(".")[0]
    found = packages_distributions().get(package)
    return version(found[0]) if found else None
