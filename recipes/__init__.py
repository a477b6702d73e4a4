"""The recipes: run one with `python -m recipes.NAME`; installed, `tinker_cookbook.recipes.NAME`."""

from tinker_cookbook.commands.parts import recipe_files
from tinker_cookbook.runs import interrupts

recipe_files.refuse_unknown_recipes(__name__)
interrupts.hide_import_traceback()
