"""The recipe language: one TOML file defines an experiment. Nothing here imports torch."""

from toolkit.recipe.diagnostics import Diagnostic, RecipeError
from toolkit.recipe.load import LoadedRecipe, load, load_recipe, loads, loads_recipe
from toolkit.recipe.resolve import diff, recipe_hash, resolved_toml
from toolkit.recipe.schema import Recipe

__all__ = [
    "Diagnostic",
    "LoadedRecipe",
    "Recipe",
    "RecipeError",
    "diff",
    "load",
    "load_recipe",
    "loads",
    "loads_recipe",
    "recipe_hash",
    "resolved_toml",
]
