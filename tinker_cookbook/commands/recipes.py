"""List the recipes, one line each."""

import argparse

from tinker_cookbook.commands.parts.recipe_files import find_recipe, find_recipes, run_prefix

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe this recipe in full")


def run(args: argparse.Namespace) -> int:
    """Print the list, or the description of one recipe."""
    if args.name is not None:
        print(find_recipe(args.name).docstring)
        return 0
    recipes = find_recipes()
    width = max((len(name) for name in recipes), default=0) + 2
    for name, recipe in recipes.items():
        print(f"{name:<{width}}{recipe.summary}")
    print()
    print(f"Run one:   python -m {run_prefix()}NAME key=value ...   (--help lists its settings)")
    print("Make it yours:   tinker-cookbook copy NAME FOLDER")
    return 0
