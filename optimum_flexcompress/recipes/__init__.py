"""Recipes: named pipelines of stages, run one after the other and resumable."""

from __future__ import annotations

from .runner import RecipeResult, run_recipe
from .schema import Recipe, find_recipe, list_recipes, load_recipe


__all__ = ["Recipe", "RecipeResult", "find_recipe", "list_recipes", "load_recipe", "run_recipe"]
