"""Recipes: `python -m recipes.NAME`."""

from tinker_cookbook import interrupts

interrupts.hide_import_traceback()
