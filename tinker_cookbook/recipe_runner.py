"""The steps of a recipe: complete its settings, train, and report what came out."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import chz

from tinker_cookbook import service
from tinker_cookbook.model_files import find_on_this_machine, read_context_window
from tinker_cookbook.runs.directory import default_log_path
from tinker_cookbook.runs.options import (
    ModelOptions,
    check_reply_length,
    check_row_length,
    shared_options,
)

if TYPE_CHECKING:
    from tinker_cookbook.distillation import sdft, train_off_policy, train_on_policy
    from tinker_cookbook.distillation.datasets import DistillationDatasetConfig
    from tinker_cookbook.preference import train_dpo, train_kto, train_pointwise
    from tinker_cookbook.rl import train as rl_train
    from tinker_cookbook.runs.open_run import RunResult
    from tinker_cookbook.supervised import train as sl_train
    from tinker_cookbook.supervised.types import ChatDatasetBuilder

__all__ = [
    "blueprint",
    "check_lengths_fit",
    "complete",
    "distillation",
    "fill",
    "fill_loop",
    "on_policy",
    "preference",
    "recipe_name",
    "run",
    "self_distillation",
    "train_distillation",
    "train_judge",
    "train_preference",
    "train_rl",
    "train_supervised",
]

C = TypeVar("C", bound=ModelOptions)
"""The settings of a recipe."""
L = TypeVar(
    "L",
    "sl_train.Config",
    "rl_train.Config",
    "train_dpo.Config",
    "train_kto.Config",
    "train_off_policy.Config",
    "train_on_policy.Config",
    "train_pointwise.Config",
    "sdft.Config",
)
"""The settings of a train loop."""
T = TypeVar("T")


def run(config: C, build: Callable[[C], L], prepare: Callable[[C, L], L] | None = None) -> None:
    """Train with these settings, then print what changed and where everything is.

    With `dry_run`, only what would be trained is printed; no service and no run are started.
    """
    config = complete(config)
    check_lengths_fit(config)
    loop = build(config)
    if config.dry_run:
        from tinker_cookbook.commands.parts.dry_run import print_dry_run

        print_dry_run(loop, prepares=prepare is not None, train=train_loop)
        return
    if prepare is not None:
        loop = prepare(config, loop)
    train_loop(loop)


def check_lengths_fit(config: ModelOptions, field: str = "max_tokens") -> None:
    """Refuse replies and rows that the model of a local service cannot read, before other work.

    Other services say their limit when a train loop connects to them.

    Args:
        config: The recipe's settings.
        field: Name of the setting that limits replies; that of rows is `max_length`.
    """
    name = str(config.model_name)
    if service.choose_service(config.base_url).kind != "local":
        return
    folder = Path(name) if Path(name).is_dir() else find_on_this_machine(name, weights=False)
    if folder is not None:
        window = read_context_window(folder)
        check_reply_length(config, name, window, field=field)
        check_row_length(config, name, window)


def train_loop(loop: L) -> None:
    """Train with the loop that these settings are for, then print the summary of the run."""
    from tinker_cookbook.distillation import sdft, train_off_policy, train_on_policy
    from tinker_cookbook.preference import train_dpo, train_kto, train_pointwise
    from tinker_cookbook.supervised import train as sl_train

    if isinstance(loop, sl_train.Config):
        train_supervised(loop)
    elif isinstance(loop, train_dpo.Config | train_kto.Config):
        train_preference(loop)
    elif isinstance(loop, train_pointwise.Config):
        train_judge(loop)
    elif isinstance(loop, train_off_policy.Config | train_on_policy.Config | sdft.Config):
        train_distillation(loop)
    else:
        train_rl(loop)


def train_supervised(loop: sl_train.Config) -> sl_train.RunResult:
    """Train, then print the summary of the run."""
    from tinker_cookbook.eval.samples import read_samples
    from tinker_cookbook.runs.report import report_run, sample_command
    from tinker_cookbook.supervised import train

    result = asyncio.run(train.main(loop))
    command = sample_command(
        result.best_sampler_path, model_name=loop.model_name, base_url=loop.base_url
    )
    report_run(loop.log_path, result.sampler_path, read_samples(loop.log_path), command)
    return result


def train_preference(loop: train_dpo.Config | train_kto.Config) -> RunResult:
    """Train, then print the summary of the run."""
    from tinker_cookbook.preference import train_dpo, train_kto
    from tinker_cookbook.runs.report import report_run, sample_command

    is_pairs = isinstance(loop, train_dpo.Config)
    result = train_dpo.main(loop) if is_pairs else train_kto.main(loop)
    command = sample_command(
        result.sampler_path, model_name=loop.model_name, base_url=loop.base_url
    )
    report_run(loop.log_path, result.sampler_path, [], command)
    return result


def train_judge(loop: train_pointwise.Config | sl_train.Config) -> RunResult:
    """Train a judge of either kind, then print the summary of the run."""
    from tinker_cookbook.preference import train_pointwise
    from tinker_cookbook.runs.report import report_run, sample_command

    if not isinstance(loop, train_pointwise.Config):
        return train_supervised(loop)
    result = asyncio.run(train_pointwise.main(loop))
    command = sample_command(
        result.sampler_path, model_name=loop.model_name, base_url=loop.base_url
    )
    report_run(loop.log_path, result.sampler_path, [], command)
    return result


def train_distillation(
    loop: train_off_policy.Config | train_on_policy.Config | sdft.Config,
) -> RunResult:
    """Train, then print the summary of the run."""
    from tinker_cookbook.distillation import sdft, train_off_policy, train_on_policy
    from tinker_cookbook.runs.report import report_run, sample_command

    if isinstance(loop, train_on_policy.Config):
        result = asyncio.run(train_on_policy.main(loop))
    elif isinstance(loop, sdft.Config):
        result = asyncio.run(sdft.main(loop))
    else:
        result = asyncio.run(train_off_policy.main(loop))
    command = sample_command(
        result.sampler_path, model_name=loop.model_name, base_url=loop.base_url
    )
    report_run(loop.log_path, result.sampler_path, [], command)
    return result


def train_rl(loop: rl_train.Config) -> rl_train.RunResult:
    """Train, then print the summary of the run; the sample command uses the best weights."""
    from tinker_cookbook.rl import train
    from tinker_cookbook.runs.report import read_held_out_samples, report_run, sample_command

    result = asyncio.run(train.main(loop))
    command = sample_command(
        result.best_sampler_path, model_name=loop.model_name, base_url=loop.base_url
    )
    samples = read_held_out_samples(loop.log_path)
    report_run(loop.log_path, result.sampler_path, samples, command)
    print("curve    metrics.jsonl in that folder; replies: transcripts.html")
    return result


def complete(config: C, model_name: str | None = None) -> C:
    """Fill in the settings that may be left open: model, chat format and run directory.

    Args:
        config: The settings that were given.
        model_name: The model's full name; by default the service is asked for it.
    """
    from tinker_cookbook import model_info

    name = model_name or service.resolve_model(config.base_url, config.model_name)
    words = (*config.log_words(), Path(name).name)
    log_path = config.log_path or default_log_path(recipe_name(type(config)), *words, config=config)
    renderer_name = config.renderer_name or model_info.get_recommended_renderer_name(name)
    return chz.replace(config, model_name=name, renderer_name=renderer_name, log_path=log_path)


def fill(target: type[T], config: ModelOptions, **own: Any) -> T:
    """Make an object of a chz class from the settings that it shares with a recipe's config.

    Args:
        target: The class, such as a data set builder.
        config: The recipe's settings.
        own: Fields that the config does not have, or that replace the config's.
    """
    shared = shared_options(config, target)
    if "model_name_for_tokenizer" in chz.chz_fields(target):
        shared["model_name_for_tokenizer"] = config.model_name
    return target(**shared | own)


def fill_loop(loop_class: type[T], config: ModelOptions, own: dict[str, Any]) -> T:
    """Return the settings of a train loop: the recipe's, its name, and `own`."""
    return fill(loop_class, config, **{"recipe_name": recipe_name(type(config))} | own)


def preference(config: ModelOptions, data: ChatDatasetBuilder, **own: Any) -> train_dpo.Config:
    """Return the settings of a preference train loop; arguments as in `recipe.supervised`."""
    from tinker_cookbook.preference import train_dpo

    return fill_loop(train_dpo.Config, config, {"dataset_builder": data} | own)


def distillation(
    config: ModelOptions, data: Sequence[train_off_policy.DatasetWithTeacher], **own: Any
) -> train_off_policy.Config:
    """Return the settings of off-policy distillation; arguments as in `recipe.supervised`."""
    from tinker_cookbook.distillation import train_off_policy

    return fill_loop(train_off_policy.Config, config, {"dataset_configs": list(data)} | own)


def on_policy(
    config: ModelOptions, data: Sequence[DistillationDatasetConfig], **own: Any
) -> train_on_policy.Config:
    """Return the settings of on-policy distillation; arguments as in `recipe.supervised`."""
    from tinker_cookbook.distillation import train_on_policy

    return fill_loop(train_on_policy.Config, config, {"dataset_configs": list(data)} | own)


def self_distillation(config: ModelOptions, data: sdft.SDFTBuilder, **own: Any) -> sdft.Config:
    """Return the settings of self-distillation; arguments as in `recipe.supervised`."""
    from tinker_cookbook.distillation import sdft

    return fill_loop(sdft.Config, config, {"sdft_builder": data} | own)


def recipe_name(config_class: type) -> str:
    """Return the name of the file that defines the settings; for `__main__.py`, of its folder."""
    module = sys.modules[config_class.__module__]
    file = Path(getattr(module, "__file__", None) or "recipe.py").resolve()
    return file.parent.name if file.name == "__main__.py" else file.stem


def blueprint(
    config_class: type[C], build: Callable[[C], L], model_name: str | None = None
) -> chz.Blueprint[L]:
    """Return a recipe's default train loop as a blueprint, for programs that change parts of it."""
    config = config_class()
    name = model_name or service.default_model()
    loop = build(complete(config, name))
    return chz.Blueprint(type(loop)).apply(chz.beta_to_blueprint_values(loop))
