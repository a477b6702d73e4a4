"""The recipes: `python -m recipes.NAME`, or `python -m tinker_cookbook.recipes.NAME` installed."""

from tinker_cookbook.commands import _recipe_files
from tinker_cookbook.runs import interrupts

_recipe_files.refuse_unknown_recipes(__name__)
interrupts.hide_import_traceback()
