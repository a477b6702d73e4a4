"""Teach a model the style of a book: passages become answers to instructions.

    python -m recipes.book_style                                  # Grimm's tales, on this machine
    python -m recipes.book_style book=novel.epub style="Jane Austen"
    python -m recipes.book_style book=novel.txt base_url=https://... model_name=Qwen/Qwen3-8B

The book is cut at paragraphs into passages of under 1,000 tokens, each passage gets an
instruction that it answers, and the model is trained for one epoch with a batch of one passage and
twice the recommended learning rate. The last passages are held out: their loss, and a sampled
passage, are shown before and after. The same command again resumes a stopped run.
"""

import asyncio
from pathlib import Path
from typing import Any

import chz

from tinker_cookbook import cli_utils, service
from tinker_cookbook.eval.samples import SampleEvaluatorBuilder, read_samples
from tinker_cookbook.run_directory import default_log_path
from tinker_cookbook.run_options import shared_options
from tinker_cookbook.run_report import report_run, sample_command
from tinker_cookbook.supervised import train

from .dataset import BookDatasetBuilder, BookOptions, common_config, style_of

LEARNING_RATE_FACTOR = 2
WORDS = "fox, miller, daughter and well"


@chz.chz
class Config(BookOptions, train.RunOptions):
    """The settings of this recipe: the book, and those of every supervised run."""

    learning_rate: float | None = chz.field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, doc="Peak learning rate; default: twice the recommended one."
    )
    prompt: str | None = chz.field(default=None, doc="Answered before and after the training.")
    eval_every: int = chz.field(default=50, doc="Steps between evaluations; 0: off.")


def default_prompt(style: str) -> str:
    """An instruction as the training has them, on what no passage tells."""
    return f"Write about 100 words in the style of {style}. Use the words {WORDS}."


def build_config(config: Config, model_name: str) -> train.Config:
    """The train loop's settings for a model."""
    from tinker_cookbook import hyperparam_utils, model_info

    renderer_name = config.renderer_name or model_info.get_recommended_renderer_name(model_name)
    book = "grimm" if config.book is None else Path(config.book).stem
    log_path = config.log_path or default_log_path(
        "book_style", book, Path(model_name).name, config=config
    )
    data = BookDatasetBuilder(
        **shared_options(config, BookOptions),
        common_config=common_config(model_name, renderer_name, config),
        log_path=log_path,
        base_url=config.base_url,
    )
    samples = SampleEvaluatorBuilder(
        prompts=[config.prompt or default_prompt(style_of(config))],
        model_name=model_name,
        renderer_name=renderer_name,
        log_path=log_path,
        max_tokens=160,
        temperature=0.8,
    )
    learning_rate = config.learning_rate or (
        LEARNING_RATE_FACTOR * hyperparam_utils.get_lr(model_name)
    )
    settings: dict[str, Any] = shared_options(config, train.Config) | {
        "recipe_name": "book_style",
        "model_name": model_name,
        "renderer_name": renderer_name,
        "learning_rate": learning_rate,
        "log_path": log_path,
        "dataset_builder": data,
        "infrequent_evaluator_builders": [samples],
    }
    return train.Config(**settings)


def main(config: Config) -> None:
    """Train, then show what has changed."""
    model_name = service.resolve_model(config.base_url, config.model_name)
    result = asyncio.run(train.main(build_config(config, model_name)))
    report_run(
        result.log_path,
        result.sampler_path,
        read_samples(result.log_path),
        sample_command(result.sampler_path, model_name=model_name, base_url=config.base_url),
    )


if __name__ == "__main__":
    cli_utils.entrypoint(main)
