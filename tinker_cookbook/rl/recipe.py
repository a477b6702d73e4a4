"""From a recipe's settings to a run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker_cookbook.rl import train
from tinker_cookbook.rl.dataset_utils import RenderedDatasetBuilder
from tinker_cookbook.runs.directory import default_log_path
from tinker_cookbook.runs.options import shared_options
from tinker_cookbook.runs.report import read_held_out_samples, report_run, sample_command

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
    """The train loop's settings for a recipe's options.

    Args:
        options: The recipe's settings; those that `data` or the loop has too are passed on.
        data: Makes the data set builder.
        model_name: The model to train.
        recipe_name: Folder of the run, and its name on the service.
        log_names: Words for the run directory's name, before the model.
        own: Further settings of the loop.
    """
    from tinker_cookbook import model_info

    renderer_name = options.renderer_name or model_info.get_recommended_renderer_name(model_name)
    named: dict[str, Any] = {"model_name": model_name, "renderer_name": renderer_name}
    own = named | {"recipe_name": recipe_name} | own
    renderer = {"renderer_name": own["renderer_name"]}
    log_path = options.log_path or default_log_path(
        recipe_name, *log_names, Path(model_name).name, config=options
    )
    return train.Config(
        **shared_options(options, train.Config)
        | own
        | {
            "log_path": log_path,
            "dataset_builder": data(**shared_options(options, data) | named | renderer),
        }
    )


def run(config: train.Config) -> train.RunResult:
    """Train, then say where everything is."""
    result = asyncio.run(train.main(config))
    command = sample_command(
        result.best_sampler_path, model_name=config.model_name, base_url=config.base_url
    )
    samples = read_held_out_samples(result.log_path)
    report_run(result.log_path, result.sampler_path, samples, command)
    print("curve    metrics.jsonl there; replies: transcripts.html")
    return result
