"""Distributed multi-GPU training for image classification: one TOML recipe, one command, one run directory.

    from toolkit import fit, load_recipe, open_run
    run = fit(load_recipe("recipes/quickstart.toml"))
    run.predict("photos/")

Heavy dependencies (torch) are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "fit", "load_model", "load_recipe", "open_run", "open_study"]

if TYPE_CHECKING:
    from toolkit.errors import UserError
    from toolkit.recipe import load_recipe
    from toolkit.runs import open_run
    from toolkit.studies import open_study
    from toolkit.training.fit import fit
    from toolkit.training.trained_model import load_model

_MODULES = {
    "UserError": "toolkit.errors",
    "fit": "toolkit.training.fit",
    "load_model": "toolkit.training.trained_model",
    "load_recipe": "toolkit.recipe",
    "open_run": "toolkit.runs",
    "open_study": "toolkit.studies",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
