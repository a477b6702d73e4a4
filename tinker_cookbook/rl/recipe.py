"""The frame of RL recipes that have their own `main`; new recipes use `tinker_cookbook.recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker_cookbook.recipe_runner import complete, fill, train_rl
from tinker_cookbook.rl import train
from tinker_cookbook.rl.dataset_utils import RenderedDatasetBuilder
from tinker_cookbook.runs.directory import default_log_path

__all__ = ["build_config", "run"]


def build_config(
    options: train.RunOptions,
    data: type[RenderedDatasetBuilder],
    model_name: str,
    *,
    recipe_name: str,
    log_names: Sequence[str] = (),
    **own: Any,
) -> train.Config:
    """Return the train loop's settings for a recipe's options.

    Args:
        options: The recipe's settings; those that `data` or the loop has too are passed on.
        data: Class of the data set builder.
        model_name: The model to train.
        recipe_name: Folder of the run, and its name on the service.
        log_names: Words for the run directory's name, before the model.
        own: Further settings of the loop.
    """
    log_path = options.log_path or default_log_path(
        recipe_name, *log_names, Path(model_name).name, config=options
    )
    config = complete(options, model_name)
    renderer = {"renderer_name": own.get("renderer_name", config.renderer_name)}
    named = {"recipe_name": recipe_name, "log_path": log_path}
    return fill(
        train.Config, config, **named | own | {"dataset_builder": fill(data, config, **renderer)}
    )


def run(config: train.Config) -> train.RunResult:
    """Train, then print where everything is."""
    return train_rl(config)
