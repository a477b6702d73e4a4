"""Supervised fine-tuning on files of conversations, through the toolkit's train loop.

    python -m recipes.sl_basic                                # this machine: 2.5 minutes on 2 cores
    python -m recipes.sl_basic data=chats.jsonl num_epochs=2
    python -m recipes.sl_basic data=mine.jsonl:0.7,public.parquet:0.3
    python -m recipes.sl_basic base_url=https://... model_name=Qwen/Qwen3-8B

A row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant" ...}]}, or ShareGPT,
Alpaca, prompt and completion, or text; `tinker-cookbook check FILE` says what a file is read as.
Some conversations are held out: their loss, and a sampled answer, are shown before and after.
Expect a held-out loss of 4.29 -> 2.7 in 30 steps with the default model and data, and answers that
end with a remark on the weather. The same command again resumes a stopped run.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import chz

from tinker_cookbook import cli_utils, service
from tinker_cookbook.eval.samples import SampleEvaluatorBuilder, read_samples
from tinker_cookbook.run_directory import default_log_path
from tinker_cookbook.run_options import shared_options
from tinker_cookbook.run_report import report_run, sample_command
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.sources.data_spec import data_name
from tinker_cookbook.supervised.sources.options import DataOptions

PROMPT = "How do I keep bread fresh?"


@chz.chz
class Config(DataOptions, train.RunOptions):
    """The settings of this recipe: those of every supervised run, and its data."""

    test_size: int = chz.field(default=32, doc="Conversations held out.")
    batch_size: int = chz.field(default=8, doc="Conversations per optimizer step.")
    max_length: int = chz.field(default=1024, doc="Longer conversations are cut, in tokens.")
    prompt: str = chz.field(default=PROMPT, doc="Answered before and after the training.")
    save_every: int = chz.field(default=10, doc="Steps between checkpoints; 0: only at the end.")
    learning_rate: float | None = chz.field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, doc="Peak learning rate; default: hyperparam_utils.get_lr of the model."
    )


def build_config(config: Config, model_name: str) -> train.Config:
    """The train loop's settings for a model: data, renderer and the sampled answer."""
    from tinker_cookbook import hyperparam_utils, model_info
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised.data import FromConversationFileBuilder
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    bundled = cli_utils.bundled_file("conversations.jsonl", beside=__file__)
    data_files = config.data_or(bundled)
    renderer_name = config.renderer_name or model_info.get_recommended_renderer_name(model_name)
    data = FromConversationFileBuilder(
        file_path=data_files,
        test_size=config.test_size,
        markup=config.markup,
        mix_until=config.mix_until,
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=model_name,
            renderer_name=renderer_name,
            max_length=config.max_length,
            batch_size=config.batch_size,
            train_on_what=TrainOnWhat(config.train_on_what),
        ),
    )
    log_path = config.log_path or default_log_path(
        "sl_basic", data_name(data_files), Path(model_name).name, config=config
    )
    settings = shared_options(config, train.Config) | {
        "recipe_name": "sl_basic",
        "model_name": model_name,
        "renderer_name": renderer_name,
        "learning_rate": config.learning_rate or hyperparam_utils.get_lr(model_name),
        "log_path": log_path,
        "dataset_builder": data,
        "infrequent_evaluator_builders": [
            SampleEvaluatorBuilder(
                prompts=[config.prompt],
                model_name=model_name,
                renderer_name=renderer_name,
                log_path=log_path,
            )
        ],
    }
    return train.Config(**settings)


def build_config_blueprint(model_name: str | None = None) -> chz.Blueprint[train.Config]:
    """The same settings as a blueprint of the train loop's config, for programs to change."""
    model_name = model_name or service.default_model()
    config = build_config(Config(), model_name)
    return chz.Blueprint(train.Config).apply(chz.beta_to_blueprint_values(config))


def main(config: Config) -> None:
    """Train, then show what has changed."""
    model_name = service.resolve_model(config.base_url, config.model_name)
    train_config = build_config(config, model_name)
    result = asyncio.run(train.main(train_config))
    command = sample_command(result.sampler_path, model_name=model_name, base_url=config.base_url)
    report_run(result.log_path, result.sampler_path, read_samples(result.log_path), command)


if __name__ == "__main__":
    cli_utils.entrypoint(main)
