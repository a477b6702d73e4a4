"""The recipes: `python -m recipes.NAME`, or `python -m tinker_cookbook.recipes.NAME` installed."""

import sys

from tinker_cookbook import interrupts


class _UnknownRecipe:
    """Asked after all other finders: `python -m` of a name that is no recipe says the nearest."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        """Refuse an unknown recipe; anything else is not for this finder."""
        del path, target
        package, _, name = fullname.rpartition(".")
        if package != __name__ or name == "__main__" or sys.argv[:1] != ["-m"]:
            return
        from tinker_cookbook.commands._recipe_files import find_recipes, unknown_recipe_message

        raise ModuleNotFoundError(unknown_recipe_message(name, find_recipes()), name=fullname)


sys.meta_path.append(_UnknownRecipe)
interrupts.hide_import_traceback()
