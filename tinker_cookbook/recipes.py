"""Makes `tinker_cookbook.recipes.NAME` a name of every recipe in a checkout.

In a checkout the folder `recipes` is next to the package. In a wheel it is inside the package, and
Python imports that folder instead of this file.
"""

from pathlib import Path

from tinker_cookbook.commands.parts import recipe_files
from tinker_cookbook.runs import interrupts

__path__ = [str(Path(__file__).parent.parent / "recipes")]

recipe_files.refuse_unknown_recipes(__name__)
interrupts.hide_import_traceback()
