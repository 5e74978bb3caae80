"""Layers of a recipe: files linked by ``extends``, and ``--set`` arguments."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import tomli

from toolkit.errors import first_line
from toolkit.ready_recipes import missing_recipe_hint
from toolkit.recipe.diagnostics import Diagnostic, Location, RecipeError, dotted
from toolkit.recipe.earlier_versions import update_recipe
from toolkit.recipe.resolve import is_resolved
from toolkit.recipe.toml_positions import KeyPath, Span, scan
from toolkit.recipe.toml_writer import toml_value
from toolkit.similar_names import similar_names

MAX_BYTES = 64 * 1024
"""Maximum size in bytes of a recipe with all it extends. Long recipes have 5 KB; the limit stops malicious files."""

MAX_PARENTS = 8
MAX_NESTING = 12
"""Maximum nesting of tables and lists; the recipe language itself needs 5."""

SET = "--set"
REPLACES: dict[KeyPath, str] = {
    ("train", "epochs"): "steps",
    ("train", "steps"): "epochs",
    ("scheduler", "warmup_epochs"): "warmup_steps",
    ("scheduler", "warmup_steps"): "warmup_epochs",
}
"""Pairs of keys of one table that exclude each other: if a later source sets one, it removes the other."""
_BARE_WORD = re.compile(r"\s*(?P<word>(?:[^\W\d]|~?/|\.\.?/)[\w./:+~-]*)\s*(?:#.*)?\Z")
_DOTTED_RUN = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){100}""")


@dataclass(frozen=True)
class ConfigLayer:
    """One TOML text with its values and their positions."""

    name: str
    """Path as shown to the user, or ``--set``."""
    text: str
    data: dict[str, Any]
    spans: dict[KeyPath, Span]
    note: str | None = None
    """For inherited values: the chain of files through which they were inherited."""

    def location(self, path: KeyPath, *, at_key: bool) -> Location | None:
        """Return the location of a key or value, or of the innermost enclosing entry that has one."""
        while path and path not in self.spans:
            path, at_key = path[:-1], True
        if not path:
            return None
        span = self.spans[path]
        return _location(self.name, self.text, span.key if at_key else span.value)


@dataclass
class LayeredConfig:
    """The merged values of all sources, in which later sources override earlier ones, and the source of each."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, ConfigLayer] = field(default_factory=dict)

    def add(self, source: ConfigLayer) -> None:
        """Merge a source into the values: tables are merged key by key, everything else is replaced.

        A key in :data:`REPLACES` also removes the key that it excludes if an earlier source has set it.
        """
        self._add(self.data, source.data, (), source)

    def _add(self, into: dict[str, Any], new: dict[str, Any], path: KeyPath, source: ConfigLayer) -> None:
        for key, value in new.items():
            key_path = (*path, key)
            self.origins[key_path] = source
            if (other := REPLACES.get(key_path)) is not None and other not in new:
                into.pop(other, None)
                self.origins.pop((*path, other), None)
            if isinstance(value, dict):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                self._add(into[key], value, key_path, source)
            else:
                into[key] = value

    def has(self, path: KeyPath) -> bool:
        """Return whether any source sets this key."""
        return value_at(self.data, path) is not None

    def origin(self, path: KeyPath) -> ConfigLayer | None:
        """Return the source of a value, or of the innermost table or list around it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path)


def value_at(data: Any, path: KeyPath) -> Any:
    """Return the value at a path in nested tables and lists; None if there is none, as TOML has no null."""
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def read_chain(path: str | os.PathLike[str]) -> list[ConfigLayer]:
    """Read a recipe file and all that it extends, base first; parents lose [expected_metrics]. Raises RecipeError."""
    sources: list[ConfigLayer] = []
    seen: list[str] = []
    chain: list[str] = []
    name, extends_location, size = os.fspath(path), None, 0
    while True:
        real, chain = os.path.realpath(name) if "\0" not in name else name, [*chain, name]
        if real in seen:
            raise _error("extends leads back to the same recipe", extends_location, _chain(chain))
        if len(seen) > MAX_PARENTS:
            raise _error(f"more than {MAX_PARENTS} recipes extend one another", extends_location, _chain(chain))
        seen.append(real)
        text = _read(name, extends_location, chain)
        note = f"inherited: {_chain(chain)}" if len(chain) > 1 else None
        size += len(text.encode())
        if size > MAX_BYTES:
            raise _error(f"the recipes together are larger than {MAX_BYTES // 1024} KiB", extends_location, note)
        source = parse(name, text, note)
        parent = source.data.pop("extends", None)
        if len(chain) > 1:  # [expected_metrics] applies to one recipe, not to those that extend it
            source.data.pop("expected_metrics", None)
        sources.insert(0, source)
        if parent is None:
            return sources
        extends_location = source.location(("extends",), at_key=False)
        if not isinstance(parent, str) or not parent:
            raise _error("extends: expected the path of one recipe, as text", extends_location)
        name = os.path.normpath(os.path.join(os.path.dirname(name), parent))


def parse(name: str, text: str, note: str | None = None) -> ConfigLayer:
    """Parse TOML text with positions. Raises RecipeError if it is not valid TOML or nested too deeply."""
    text = text.replace("\r\n", "\n")
    try:
        if _DOTTED_RUN.search(text):  # tomli takes quadratic time in the number of parts of a key
            raise RecursionError
        data = tomli.loads(text)
    except RecursionError:
        raise RecipeError(
            [Diagnostic("error", "lists, tables or keys are nested too deeply", file=name, note=note)]
        ) from None
    except tomli.TOMLDecodeError as error:
        raise RecipeError([_syntax_error(name, text, error, note)]) from None
    except ValueError:  # Python's own error for numbers with thousands of digits
        message = "not valid TOML: a number with too many digits"
        raise RecipeError([Diagnostic("error", message, file=name, note=note)]) from None
    deep = _too_deep(data)
    if deep:
        message = f"{dotted(deep[:4])}: nested more than {MAX_NESTING} levels deep"
        raise RecipeError([Diagnostic("error", message, file=name, note=note)])
    if is_resolved(text):
        update_recipe(data)
    return ConfigLayer(name, text, data, scan(text), note)


def parse_overrides(arguments: Sequence[str]) -> list[ConfigLayer]:
    """Parse the ``--set`` arguments: ``table.key=value``, or a JSON object of dotted keys with their values.

    Raises RecipeError listing all that are neither.
    """
    sources: list[ConfigLayer] = []
    errors: list[Diagnostic] = []
    for argument in arguments:
        try:
            texts = _from_json(argument) if argument.lstrip().startswith("{") else [argument]
            sources += [_parse_override(text) for text in texts]
        except RecipeError as error:
            errors += error.diagnostics
    if errors:
        raise RecipeError(errors)
    return sources


def _from_json(argument: str) -> list[str]:
    """Convert a JSON object of dotted keys, as the agent of a W&B sweep passes it, to ``table.key=value`` arguments."""
    try:
        if len(argument) > MAX_BYTES:
            raise ValueError("it is too long")
        values = json.loads(argument)
        if None in values.values():
            raise ValueError("null is not a value; leave the key out instead")
        texts = [f"{key}={toml_value(value)}" for key, value in values.items()]
        "".join(texts).encode()  # fails for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        message = f"expected table.key=value, or a JSON object of keys and values ({first_line(error)})"
        raise RecipeError([Diagnostic("error", message, location=_location(SET, argument, 0))]) from None
    return texts


def _parse_override(argument: str) -> ConfigLayer:
    key, equals, value = argument.partition("=")
    start = _location(SET, argument, 0)
    if not equals or not key.strip() or "\n" in argument or "\r" in argument or len(argument) > MAX_BYTES:
        raise RecipeError([Diagnostic("error", "expected table.key=value, on one line", location=start)])
    try:
        source = parse(SET, argument)
    except RecipeError as error:
        at_value = _location(SET, argument, len(key) + 1)
        word = _BARE_WORD.match(value)
        if word and word["word"] not in ("true", "false", "inf", "nan"):
            message = f"{word['word']} is not a TOML value"
            hint = f"put text into quotes: --set '{key.strip()}=\"{value.strip()}\"'"
            raise RecipeError([Diagnostic("error", message, location=at_value, hint=hint)]) from None
        if not value.strip():
            raise RecipeError([Diagnostic("error", "expected a value after =", location=at_value)]) from None
        raise error from None
    if "extends" in source.data:
        raise RecipeError([Diagnostic("error", "extends is only allowed in a recipe file", location=start)])
    return source


def _read(name: str, extends_location: Location | None, chain: list[str]) -> str:
    """Read the text of a recipe file; ``extends_location`` is the location of the ``extends`` that names it, if any."""
    note = _chain(chain) if len(chain) > 1 else None
    try:
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):
            what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
            raise _error(f"{name} {what}, expected a recipe file", extends_location, note)
        with open(name, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _error(f"there is no recipe {name}", extends_location, note, _missing_file_hint(name)) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _error(f"cannot read {name}: {reason}", extends_location, note) from None
    if len(content) > MAX_BYTES:
        raise _error(f"{name} is larger than {MAX_BYTES // 1024} KiB, too large for a recipe", extends_location, note)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _error(
            f"{name} is not UTF-8 text: byte {content[error.start]:#04x} in line {line}", extends_location, note
        ) from None


def _missing_file_hint(name: str) -> str | None:
    """Return a hint: a recipe of the package, a similar name in the same folder, or that the folder does not exist."""
    if ready := missing_recipe_hint(name):
        return ready
    folder = os.path.dirname(name) or "."
    try:
        with os.scandir(folder) as entries:
            known = [entry.name for _, entry in zip(range(1000), entries, strict=False) if entry.name.endswith(".toml")]
    except (OSError, ValueError):
        return f"the folder {folder} does not exist"
    similar = similar_names(PurePath(name).name, known, 1)
    return f"did you mean {os.path.join(os.path.dirname(name), similar[0])}?" if similar else None


def _syntax_error(name: str, text: str, error: tomli.TOMLDecodeError, note: str | None) -> Diagnostic:
    message = error.msg[:1].lower() + error.msg[1:]
    hint = _syntax_hint(message, text[error.pos :].split("\n")[0])
    return Diagnostic("error", f"not valid TOML: {message}", (), _location(name, text, error.pos), hint, note)


def _syntax_hint(message: str, rest: str) -> str | None:
    if "cannot overwrite" in message or "twice" in message:
        return "this key or table is already defined above"
    word = _BARE_WORD.match(rest)
    if message == "invalid value" and word:
        lower = word["word"].lower()
        return f"write {lower}" if lower in ("true", "false") else f'put text into quotes: "{word["word"]}"'
    return None


def _too_deep(data: dict[str, Any]) -> KeyPath | None:
    """Return a path that is nested too deeply, if there is one. Not recursive, because the nesting may be very deep."""
    stack: list[tuple[KeyPath, Any]] = [((), data)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict | list) and len(path) >= MAX_NESTING:
            return path
        if isinstance(value, dict):
            stack += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [((*path, index), item) for index, item in enumerate(value)]
    return None


def _error(message: str, location: Location | None, note: str | None = None, hint: str | None = None) -> RecipeError:
    """Return an error about a file, located at the ``extends`` that names it, if any."""
    return RecipeError([Diagnostic("error", message, ("extends",) if location else (), location, hint, note)])


def _chain(names: list[str]) -> str:
    return " extends ".join(names)


def _location(name: str, text: str, offset: int) -> Location:
    start = text.rfind("\n", 0, offset) + 1
    return Location(name, text.count("\n", 0, offset) + 1, offset - start + 1, text[start:].split("\n", 1)[0])
