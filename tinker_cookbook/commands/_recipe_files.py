"""Earlier name of `tinker_cookbook.commands.parts.recipe_files`, which copied recipes import."""

from tinker_cookbook.commands.parts.recipe_files import *  # noqa: F403
