"""The recipe under the names that programs of the Tinker cookbook import."""

from __future__ import annotations

from tinker_cookbook import recipe

from .__main__ import Config as CLIConfig
from .__main__ import build

__all__ = ["CLIConfig", "build", "cli_main"]


def cli_main(config: CLIConfig) -> None:
    """Train with these settings."""
    recipe.run(config, build)
