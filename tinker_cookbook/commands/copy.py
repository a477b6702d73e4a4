"""Copy a recipe and its data into your folder, ready to run and change."""

import argparse
from pathlib import Path

from tinker_cookbook import __version__
from tinker_cookbook.commands.parts.recipe_files import Recipe, find_recipe
from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["add_arguments", "copy_recipe", "run"]

_README = """# {name}

{summary}

A copy of the recipe `{name}` of tinker-cookbook {version}. You can change anything. It needs that
package, with the extra `local` to train on this machine.

    python -m {module} --help
    python -m {module}

Run it from this folder. Settings are given as `key=value`; the same command again resumes a stopped
run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("name", metavar="NAME", help="name that `tinker-cookbook recipes` lists")
    parser.add_argument("folder", metavar="DIR", type=Path, help="target folder; may be new")


def run(args: argparse.Namespace) -> int:
    """Copy the recipe, then print the written files and how to start it."""
    recipe = find_recipe(args.name)
    written = copy_recipe(recipe, args.folder)
    print(*written or [f"{args.folder} already holds this copy"], sep="\n")
    print(f"\nStart it:   cd {args.folder} && python -m {recipe.module}")
    return 0


def copy_recipe(recipe: Recipe, folder: Path) -> list[Path]:
    """Write a runnable copy of `recipe` into `folder`.

    Returns:
        The files written. An existing file with the same content is left alone.

    Raises:
        ConfigurationError: if a file exists with other content (nothing is written then), or the
            folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"DIR={folder} is a file; name a folder, new or existing.")
    contents = _contents(recipe, folder)
    present = [path for path in contents if path.exists()]
    changed = [path.name for path in present if path.read_bytes() != contents[path]]
    if changed:
        raise ConfigurationError(
            f"DIR={folder} already holds other versions of {', '.join(changed)}; "
            "nothing is overwritten. Choose another folder, or move these files away."
        )
    written = [path for path in contents if path not in present]
    try:
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[path])
    except OSError as error:
        raise ConfigurationError(f"DIR={folder} cannot be written: {error}") from error
    return written


def _contents(recipe: Recipe, folder: Path) -> dict[Path, bytes]:
    origin = recipe.path.parent
    files = [*recipe.source_files(), *recipe.data_files()]
    contents = {folder / path.relative_to(origin): path.read_bytes() for path in files}
    readme = _README.format(
        name=recipe.name, module=recipe.module, summary=recipe.summary, version=__version__
    )
    contents[_readme_path(recipe, folder, readme)] = readme.encode()
    return contents


def _readme_path(recipe: Recipe, folder: Path, readme: str) -> Path:
    """Return `README.md`, or another name if the folder already has a different README.md."""
    plain = folder / "README.md"
    ours = not plain.exists() or plain.read_bytes() == readme.encode()
    return plain if ours else folder / f"README-{recipe.name}.md"
