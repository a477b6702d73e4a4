"""Teach a model the style of a book: passages become answers to instructions.

    python -m recipes.book_style                                  # Grimm's tales, on this machine
    python -m recipes.book_style book=novel.epub style="Jane Austen"
    python -m recipes.book_style book=novel.txt base_url=https://... model_name=Qwen/Qwen3-8B

The book is cut into passages of less than 1,000 tokens that end with a paragraph. Each passage gets
an instruction that it answers. The model is trained for one epoch, with one passage per step and
twice the recommended learning rate. The last passages are held out: their loss and a sampled
passage are shown before and after training. The same command again resumes a stopped run.
"""

from __future__ import annotations

from pathlib import Path

import chz

from tinker_cookbook import recipe
from tinker_cookbook.eval.samples import SampleEvaluatorBuilder
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

from .dataset import BookDatasetBuilder, BookOptions, style_of

LEARNING_RATE_FACTOR = 2
WORDS = "fox, miller, daughter and well"


@chz.chz
class Config(BookOptions, train.RunOptions):
    """The settings of this recipe: the book, and those of every supervised run."""

    learning_rate: float | None = chz.field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, doc="Peak learning rate; default: twice the recommended one."
    )
    prompt: str | None = chz.field(
        default=None,
        doc="Request answered before and after training; default: one like those of the training.",
    )
    eval_every: int = 50

    def log_words(self) -> list[str]:
        return ["grimm" if self.book is None else Path(self.book).stem]


def default_prompt(style: str) -> str:
    """Return an instruction like those of the training, about a story that is not in the book."""
    return f"Write about 100 words in the style of {style}. Use the words {WORDS}."


def build(config: Config) -> train.Config:
    """Return the train loop's settings: the passages, and a request for the model."""
    from tinker_cookbook import hyperparam_utils

    common = recipe.fill(
        ChatDatasetBuilderCommonConfig,
        config,
        max_length=None,  # no passage is cut off
        batch_size=1,
    )
    samples = recipe.fill(
        SampleEvaluatorBuilder,
        config,
        prompts=[config.prompt or default_prompt(style_of(config))],
        max_tokens=160,
        temperature=0.8,
    )
    recommended = hyperparam_utils.get_lr(str(config.model_name))
    return recipe.supervised(
        config,
        recipe.fill(BookDatasetBuilder, config, common_config=common),
        learning_rate=config.learning_rate or LEARNING_RATE_FACTOR * recommended,
        infrequent_evaluator_builders=[samples],
    )


if __name__ == "__main__":
    recipe.main(Config, build)
