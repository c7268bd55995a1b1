"""Training: recipes, data, the loop, and runs on disk."""

from __future__ import annotations

from logsnr.training.config import Recipe, load_recipe, recipe_from
from logsnr.training.data import Dataset, load_data
from logsnr.training.loop import StepInfo, Summary, train

__all__ = ["Dataset", "Recipe", "StepInfo", "Summary", "load_data", "load_recipe", "recipe_from", "train"]
