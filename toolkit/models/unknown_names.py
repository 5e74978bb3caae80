"""Shared messages for unknown names and rejected arguments."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.catalog_checks import OWN_MODEL_KEYS
from toolkit.similar_names import did_you_mean


def unknown_name(key: str, name: str, known: Collection[str]) -> UserError:
    """Return the error for a name that is not in ``known``; it lists close matches, or all names if they are few."""
    listed = f"known: {', '.join(known) or 'none'}"
    hint = did_you_mean(name, known, 3, otherwise=listed) if len(known) > 8 else listed
    return UserError(f"{key} = {name!r} is not known; {hint}")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise UserError for arguments that other recipe keys set, or that only control the library's weight loading."""
    for name in arguments:
        if name in OWN_MODEL_KEYS:
            raise UserError(f"model.args.{name} cannot be given: {OWN_MODEL_KEYS[name]}")
