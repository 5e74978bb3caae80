"""Shared wording for names that are not known and arguments that are not taken."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.catalog_checks import OWN_MODEL_KEYS


def unknown_name(key: str, name: str, known: Collection[str]) -> UserError:
    """An error for a name that is not among ``known``: names the nearest ones, or all where they are few."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near and len(known) > 8 else f"there is {', '.join(known) or 'none'}"
    return UserError(f"{key} = {name!r} is not known; {hint}")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise UserError for arguments that other keys of the recipe decide, or that only steer the library's loader."""
    for name in arguments:
        if name in OWN_MODEL_KEYS:
            raise UserError(f"model.args.{name} cannot be given: {OWN_MODEL_KEYS[name]}")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
