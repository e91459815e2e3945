"""Recipes: TOML files in which runs and baselines are data."""

from pomona.recipe.build import build, dump, table_of
from pomona.recipe.read import read_recipe

__all__ = ["build", "dump", "read_recipe", "table_of"]
