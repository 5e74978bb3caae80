"""Code of the user's own that a recipe names: models, data sets, transforms, losses, metrics, optimizers, schedules.

A plugin is a factory: a function or class that is called with the arguments in the recipe, and with those values of
:data:`PROVIDED` for its kind that its signature names. A recipe cannot load code; the caller does, in one of these ways:

- an installed package has an entry point in the group ``toolkit.models``, ``toolkit.datasets``, ...;
- ``--plugin MODULE`` (or the environment variable TOOLKIT_PLUGINS) names modules that call :func:`register`;
- a program calls :func:`register`, or passes the factory to :func:`toolkit.fit`.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.errors import UserError, first_line
from toolkit.recipe.catalog.signatures import describe_argument
from toolkit.similar_names import did_you_mean

if TYPE_CHECKING:
    from toolkit.recipe.schema import Recipe

F = TypeVar("F", bound=Callable[..., Any])

VARIABLE = "TOOLKIT_PLUGINS"
"""Environment variable with the modules to load, separated by commas: importable names, or paths of Python files.

It passes them on to the processes of launchers, studies and SLURM jobs."""

PREFIX = "plugin:"
"""Beginning of a plugin's name in recipe keys that also take built-in names."""

PROVIDED: dict[str, tuple[str, ...]] = {
    "model": ("num_classes", "channels", "image_size"),
    "dataset": (),
    "transform": ("image_size",),
    "loss": ("num_classes", "class_weights", "label_smoothing"),
    "metric": ("num_classes",),
    "optimizer": ("params", "lr", "weight_decay", "momentum"),
    "schedule": ("epochs",),
}
"""Arguments that the toolkit passes to factories of each kind if their signature names them; a recipe cannot."""


@dataclass(frozen=True)
class Plugin:
    """A factory that recipes can name."""

    kind: str
    """Key of :data:`PROVIDED`."""
    name: str
    factory: Callable[..., Any]
    distribution: str | None = None
    """Installed package whose entry point it is; None for a module of --plugin and for objects given by the caller."""

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        try:
            return dict(inspect.signature(self.factory, eval_str=True).parameters)
        except (NameError, TypeError, ValueError) as error:
            raise UserError(f"the signature of the {self.kind} {self.name!r} cannot be read: {error}") from None

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """The arguments that a recipe can give, described as in :mod:`toolkit.recipe.catalog`."""
        named = (p for p in self._parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        return {p.name: describe_argument(p) for p in named if p.name not in PROVIDED[self.kind]}

    @property
    def takes_any(self) -> bool:
        """Whether the factory takes arguments that its signature does not name."""
        return any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    def takes(self, name: str) -> bool:
        """Return whether the factory's signature names this argument."""
        return name in self._parameters

    def build(self, arguments: dict[str, Any], **provided: Any) -> Any:
        """Call the factory with the recipe's arguments and with those of ``provided`` that its signature names.

        Raises UserError if the factory raises an error.
        """
        taken = {name: value for name, value in provided.items() if self.takes(name)}
        try:
            return self.factory(**arguments, **taken)
        except UserError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise UserError(
                f"the {self.kind} {self.name!r} failed: {type(error).__name__}: {first_line(error)}"
            ) from error

    def record(self) -> dict[str, str | None]:
        """Return what identifies the plugin, for the run directory: names, version, and the hash of its file."""
        module = inspect.getmodule(self.factory) or inspect.getmodule(type(self.factory))
        file = getattr(module, "__file__", None)
        return {
            "kind": self.kind,
            "name": self.name,
            "module": getattr(module, "__name__", None),
            "version": version(self.distribution) if self.distribution else _version(module),
            "file": file and os.path.basename(file),
            "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and os.path.isfile(file) else None,
        }


_registered: dict[tuple[str, str], Plugin] = {}
_loaded: set[str] = set()


def register(kind: str, name: str | None = None) -> Callable[[F], F]:
    """Decorate a factory, so that recipes can name it: ``@register("model")``, by default under its own name.

    ``kind``: model, dataset, transform, loss, metric, optimizer or schedule. Raises UserError if another factory has
    the name.
    """
    if kind not in PROVIDED:
        raise UserError(f"register({kind!r}): the kinds are {', '.join(PROVIDED)}")

    def decorate(factory: F) -> F:
        add(Plugin(kind, name or factory.__name__, factory))
        return factory

    return decorate


def add(plugin: Plugin) -> None:
    """Add a plugin. Raises UserError if its name is already that of another factory, unless it is reloaded."""
    known = _registered.get((plugin.kind, plugin.name))
    if known is not None and known.record() != plugin.record():
        raise UserError(
            f"two plugins are named {plugin.name!r} ({plugin.kind}): one in {known.record()['module']}, one in "
            f"{plugin.record()['module']}; give one of them another name"
        )
    _registered[plugin.kind, plugin.name] = plugin


def use_modules(modules: list[str]) -> None:
    """Load modules, and record them in the environment for the processes that this one starts.

    Each is an importable name, or the path of a Python file. Raises UserError.
    """
    listed = [*_listed(), *(_absolute(module) for module in modules)]
    os.environ[VARIABLE] = ",".join(dict.fromkeys(listed))
    _load_listed()


def find(kind: str, name: str) -> Plugin:
    """Return a plugin. Raises UserError if there is none of this name."""
    known = plugins(kind)
    if name in known:
        return known[name]
    raise UserError(unknown(kind, name))


def unknown(kind: str, name: str) -> str:
    """Return the message for a plugin that is not loaded."""
    known = plugins(kind)
    listed = f"; loaded are {', '.join(known)}" if known else ""
    return (
        f"no {kind} plugin is named {name!r}{did_you_mean(name, known, prefix='; ', otherwise=listed)}; the module that "
        f"registers it must be loaded with --plugin MODULE, or listed in {VARIABLE}"
    )


def plugins(kind: str) -> dict[str, Plugin]:
    """Return the plugins of a kind by name: registered ones, and entry points of installed packages."""
    _load_listed()
    for entry in entry_points(group=f"toolkit.{kind}s"):
        if (kind, entry.name) not in _registered:
            add(Plugin(kind, entry.name, _load_entry(entry), entry.dist.name if entry.dist else None))
    return {name: plugin for (of, name), plugin in sorted(_registered.items()) if of == kind}


def named_plugins(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield kind and name of each plugin that a recipe names."""
    if recipe.model.source == "plugin":
        yield "model", recipe.model.name
    if recipe.data.dataset == "plugin" and recipe.data.name is not None:
        yield "dataset", recipe.data.name
    augment = recipe.augment
    names = [("transform", entry.name) for entry in (*augment.train, *augment.validation, *augment.test)]
    names += [("metric", name) for name in recipe.train.metrics]
    names += [("loss", recipe.train.loss), ("optimizer", recipe.optimizer.name), ("schedule", recipe.scheduler.name)]
    for kind, name in dict.fromkeys(names):
        if name.startswith(PREFIX):
            yield kind, name.removeprefix(PREFIX)


def _listed() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def _absolute(module: str) -> str:
    """Return the absolute path of a module that is a file; other names are unchanged."""
    return os.path.abspath(module) if module.endswith(".py") else module


def _load_listed() -> None:
    for module in _listed():
        if module not in _loaded:
            _loaded.add(module)
            _import(module)


def _import(module: str) -> None:
    """Import a module by its name or path. Its folder, or the current one, is put at the end of the search path."""
    folder, name = os.getcwd(), module
    if module.endswith(".py"):
        if not os.path.isfile(module):
            raise UserError(f"--plugin {module}: there is no such file")
        folder, name = os.path.dirname(module), Path(module).stem
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        imported = importlib.import_module(name)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(
            f"the plugin module {module} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    found = getattr(imported, "__file__", None)
    if module.endswith(".py") and (found is None or not os.path.samefile(found, module)):
        raise UserError(f"--plugin {module}: another module is named {name!r} ({found}); rename the file")


def _load_entry(entry: EntryPoint) -> Callable[..., Any]:
    try:
        factory: Callable[..., Any] = entry.load()
    except Exception as error:  # the package's own code may raise anything
        raise UserError(
            f"the plugin {entry.name!r} of {entry.value} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    return factory


def _version(module: Any) -> str | None:
    """Return the version of the installed package that a module belongs to; None if it is not installed."""
    package = getattr(module, "__name__", "").partition(".")[0]
    found = packages_distributions().get(package)
    return version(found[0]) if found else None
