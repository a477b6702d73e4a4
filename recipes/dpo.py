"""Another name of the recipe `preference.dpo`, which has the description.

python -m recipes.dpo                                     # the same as recipes.preference.dpo
"""

from tinker_cookbook import recipe
from tinker_cookbook.recipes.preference.dpo.__main__ import Config, build  # pyright: ignore[reportMissingImports]

__all__ = ["Config", "build"]

if __name__ == "__main__":
    recipe.main(Config, build)
