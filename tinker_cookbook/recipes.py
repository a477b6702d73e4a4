"""The recipes, under the name that they have in an installed package.

In a checkout they lie beside the package, so that `python -m recipes.NAME` runs them; this module
stands for their folder. In a wheel they are a folder in the package, which goes before this file.
"""

from pathlib import Path

from tinker_cookbook.commands import _recipe_files
from tinker_cookbook.runs import interrupts

__path__ = [str(Path(__file__).parent.parent / "recipes")]

_recipe_files.refuse_unknown_recipes(__name__)
interrupts.hide_import_traceback()
