"""Find the recipes and the files of each. Recipes are read as files, never imported."""

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tinker_cookbook
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.nearest_name import did_you_mean

__all__ = [
    "Recipe",
    "find_recipe",
    "find_recipes",
    "recipes_folder",
    "refuse_unknown_recipes",
    "run_prefix",
    "unknown_recipe_message",
]


@dataclass(frozen=True)
class Recipe:
    """One recipe: a module, or a package with `__main__.py`."""

    name: str
    """Name behind `recipes.`, such as `sl_basic`, or `preference.rlhf` in a folder of recipes."""
    path: Path
    """The module file, or the package's folder."""

    @property
    def module(self) -> str:
        """Name of the module in a copy of the recipe."""
        return self.path.stem

    @property
    def entry(self) -> Path:
        """The file that starts the recipe; its docstring describes the recipe."""
        return self.path / "__main__.py" if self.path.is_dir() else self.path

    @property
    def docstring(self) -> str:
        """The whole description of the recipe."""
        return ast.get_docstring(ast.parse(self.entry.read_text(encoding="utf-8"))) or ""

    @property
    def summary(self) -> str:
        """The first line of the description."""
        return self.docstring.partition("\n")[0]

    def source_files(self) -> list[Path]:
        """Return the absolute paths of all files of the recipe."""
        if self.path.is_file():
            return [self.path]
        return sorted(
            path
            for path in self.path.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        )

    def data_files(self) -> list[Path]:
        """Return the files of the shared folder `data` whose names are in the recipe's source."""
        sources = [path for path in self.source_files() if path.suffix == ".py"]
        text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
        data = self.path.parent / "data"
        return sorted(path for path in data.glob("*") if path.is_file() and path.name in text)


def recipes_folder() -> Path:
    """Return the folder `recipes`, in an installed package or next to it in a checkout."""
    package = Path(tinker_cookbook.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "__init__.py").is_file():
            return folder
    raise ConfigurationError(
        f"the folder of recipes was not found in or next to {package}; a full install has it. "
        "Install the package again with pip."
    )


def find_recipes() -> dict[str, Recipe]:
    """Return every recipe by name, in alphabetical order; older names are left out."""
    found = {}
    for path in sorted(recipes_folder().iterdir()):
        is_module = path.suffix == ".py" and not path.name.startswith("_") and not _is_alias(path)
        if is_module or (path / "__main__.py").is_file():
            found[path.stem] = Recipe(path.stem, path)
        else:
            inside = sorted(path.glob("*/__main__.py"))
            names = {f"{path.name}.{entry.parent.name}": entry.parent for entry in inside}
            found |= {name: Recipe(name, folder) for name, folder in names.items()}
    return found


def _is_alias(path: Path) -> bool:
    """Return whether a module only gives another name to a recipe."""
    return path.read_text(encoding="utf-8").startswith('"""Another name of the recipe')


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ConfigurationError: for an unknown name, with the nearest one and the list.
    """
    recipes = find_recipes()
    wanted = name.removesuffix(".py").removeprefix("recipes.")
    if wanted in recipes:
        return recipes[wanted]
    raise ConfigurationError(unknown_recipe_message(wanted, recipes))


def unknown_recipe_message(name: str, known: Iterable[str]) -> str:
    """Return the error for an unknown recipe, with the nearest name and the list."""
    names = list(known)
    return f"NAME={name} is not a recipe.{did_you_mean(name, names)} Use one of {', '.join(names)}."


def refuse_unknown_recipes(package: str) -> None:
    """Let `python -m PACKAGE.NAME` suggest the nearest recipe if NAME is unknown.

    Args:
        package: The package of the recipes, `recipes` or `tinker_cookbook.recipes`.
    """
    sys.meta_path.append(_UnknownRecipes(package))


class _UnknownRecipes:
    """The last import finder: it sees only modules that no other finder has found."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Refuse an unknown recipe, and ignore all other modules."""
        del path, target
        package, _, name = fullname.rpartition(".")
        if package != self._package or name == "__main__" or sys.argv[:1] != ["-m"]:
            return
        raise ModuleNotFoundError(unknown_recipe_message(name, find_recipes()), name=fullname)


def run_prefix() -> str:
    """Return the prefix of a recipe's name after `python -m`: of a checkout, or of a wheel."""
    installed = recipes_folder().parent == Path(tinker_cookbook.__file__).parent
    return "tinker_cookbook.recipes." if installed else "recipes."
