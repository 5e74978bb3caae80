"""Ready-made recipes and launch configurations that are included in the package.

``toolkit/files`` links to the repository's folders ``recipes`` and ``launch``; a wheel contains copies of their files.
The name of a ready-made recipe is its path in ``recipes`` without ``.toml``, such as ``studies/digits_seeds``, or the
last part of it if that is unique. Imports neither torch nor pydantic.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import tomli

from toolkit.errors import UserError
from toolkit.similar_names import did_you_mean

FILES = Path(__file__).parent / "files"
RECIPES = FILES / "recipes"
SCHEMA = Path(__file__).parent / "recipe" / "recipe.schema.json"


@dataclass(frozen=True)
class ReadyRecipe:
    """A recipe or study that is included in the package."""

    name: str
    kind: str
    """``recipe`` or ``study``."""
    description: str


def list_recipes() -> list[ReadyRecipe]:
    """Return all ready-made recipes, sorted by folder and name."""
    return [describe(RECIPES / f"{name}.toml") for name in names()]


def describe(recipe: Path) -> ReadyRecipe:
    """Read name, kind and description from the file of a ready-made recipe."""
    data = tomli.loads(recipe.read_text(encoding="utf-8"))
    study = data.get("study", {})
    description = study.get("description") or data["recipe"]["description"]
    name = recipe.relative_to(RECIPES).with_suffix("").as_posix()
    return ReadyRecipe(name, "study" if study else "recipe", description)


def names() -> list[str]:
    """Return the names of all ready-made recipes, except those in recipes/base, which others extend."""
    found = [path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.toml")]
    complete = [path for path in found if path.parts[0] != "base"]
    return [path.as_posix() for path in sorted(complete, key=lambda path: (len(path.parts), path))]


def launch_files() -> list[str]:
    """Return the names of the launch configurations (Accelerate, SkyPilot, Kubeflow), such as ``launch/cpu.yaml``."""
    return sorted(f"launch/{path.name}" for path in (FILES / "launch").glob("*.yaml"))


def find_recipe(text: str) -> str | None:
    """Return the full name of the ready-made recipe ``text``, a name or a path such as recipes/quickstart.toml.

    Returns None if there is none.
    """
    name = os.path.normpath(text).removesuffix(".toml").removeprefix("recipes/")
    known = names()
    if name in known:
        return name
    same = [each for each in known if each.rpartition("/")[2] == name]
    return same[0] if len(same) == 1 else None


def recipe_path(name: str) -> Path:
    """Return the file of a ready-made recipe. Raises UserError if there is none with this name."""
    found = find_recipe(name)
    if found is None:
        known = names()
        last = {each.rpartition("/")[2]: each for each in known}  # so that digits_seed finds studies/digits_seeds
        same = [each for each in known if each.rpartition("/")[2] == name]
        hint = f"did you mean {' or '.join(same)}?" if same else did_you_mean(name, [*known, *last], 3)
        raise UserError(f"there is no ready-made recipe {name!r}; {hint or 'toolkit recipes lists them'}")
    return RECIPES / f"{found}.toml"


def missing_recipe_hint(path: str) -> str | None:
    """Return a hint if the package has a recipe with this name or, if ``path`` is a bare name, with a similar one."""
    name = find_recipe(path)
    if name is None:
        return None if path.endswith(".toml") else did_you_mean(path, names()) or None
    return f"it is included in the package: toolkit recipes copy {name} writes recipes/{name}.toml"


def copy_files(name: str, destination: Path | None, *, overwrite: bool = False) -> list[Path]:
    """Copy a ready-made recipe, the recipes that it extends and the script that creates its data; return the copies.

    The first one is the recipe itself. In ``destination`` (default: ``recipes`` in the current folder), files keep
    their relative paths, so that ``extends`` remains valid. A destination that ends in ``.toml`` is the name of the
    copy, which is possible only for a recipe that extends no other. A name such as ``launch/cpu.yaml`` copies that file
    (default destination: ``launch``). Equal files are kept. Raises UserError, before anything is written, if a file
    with different content exists and ``overwrite`` is not set.
    """
    if name in launch_files():
        folder = Path("launch") if destination is None else destination
        contents = {folder / Path(name).name: (FILES / name).read_bytes()}
    else:
        contents = _recipe_copies(recipe_path(name), Path("recipes") if destination is None else destination)
    changed = [path for path, content in contents.items() if not (path.is_file() and path.read_bytes() == content)]
    in_the_way = [str(path) for path in changed if os.path.lexists(path)]
    if in_the_way and not overwrite:
        raise UserError(f"{', '.join(in_the_way)}: exists with different content; --overwrite replaces it")
    try:
        for path in changed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[path])
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be written: {error.strerror}") from None
    return list(contents)


def _recipe_copies(recipe: Path, destination: Path) -> dict[Path, bytes]:
    """Return the content of each file to write, the recipe first."""
    files = _with_parents(recipe)
    script = recipe.with_suffix(".py")
    if script.is_file():
        files.append(script)
    if destination.suffix == ".toml":
        if len(files) > 1:
            others = ", ".join(str(file.relative_to(RECIPES)) for file in files[1:])
            raise UserError(f"{destination}: {recipe.name} also needs {others}; specify a folder")
        return {destination: _content(recipe)}
    return {destination / file.relative_to(RECIPES): _content(file) for file in files}


def _with_parents(recipe: Path) -> list[Path]:
    """Return the file of a recipe, followed by the file that it extends, and so on."""
    files = [recipe]
    while parent := tomli.loads(files[-1].read_text(encoding="utf-8")).get("extends"):
        files.append(Path(os.path.normpath(files[-1].parent / parent)))
    return files


def _content(file: Path) -> bytes:
    """Return the content of a file; the path of the schema, used by editors, is changed to the installed package."""
    text = file.read_text(encoding="utf-8")
    return re.sub(r"\A#:schema \S+", lambda _: f"#:schema {SCHEMA.as_uri()}", text).encode()


def completions(word: str) -> list[str]:
    """Return the names of recipes and launch configurations that start with ``word``, for shell completion."""
    return [name for name in [*names(), *launch_files()] if name.startswith(word)]
