"""Supervised fine-tuning on files of conversations, through the toolkit's train loop.

    python -m recipes.sl_basic                                # this machine: 2.5 minutes on 2 cores
    python -m recipes.sl_basic data=chats.jsonl num_epochs=2
    python -m recipes.sl_basic data=mine.jsonl:0.7,public.parquet:0.3
    python -m recipes.sl_basic base_url=https://... model_name=Qwen/Qwen3-8B

A row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant" ...}]}, or in the
form of ShareGPT, Alpaca, prompt and completion, or text; `tinker-cookbook check FILE` prints how a
file is read. Expect a loss on held-out conversations of 4.29 -> 2.7 in 30 steps with the default
data, and answers that end with a remark on the weather. The same command resumes a stopped run.
"""

from __future__ import annotations

import chz

from tinker_cookbook import cli_utils, recipe
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.sources.data_spec import data_name
from tinker_cookbook.supervised.sources.options import DataOptions


@chz.chz
class Config(DataOptions, train.RunOptions):
    """The settings of this recipe: its data, and those of every supervised run."""

    test_size: int = chz.field(default=32, doc="Number of held-out conversations.")
    batch_size: int = chz.field(default=8, doc="Conversations per optimizer step.")
    max_length: int = chz.field(default=1024, doc="Tokens after which a conversation is cut.")
    prompt: str = chz.field(
        default="How do I keep bread fresh?", doc="Question answered before and after training."
    )
    save_every: int = 10
    learning_rate: float | None = chz.field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, doc="Peak learning rate; default: hyperparam_utils.get_lr of the model."
    )

    def data_files(self) -> str:
        """Return the files to train on."""
        return self.data_or(cli_utils.bundled_file("conversations.jsonl", __file__))

    def log_words(self) -> list[str]:
        return [data_name(self.data_files())]


def build(config: Config) -> train.Config:
    """Return the train loop's settings: the data, and a question for the model."""
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised.data import FromConversationFileBuilder
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    common = recipe.fill(
        ChatDatasetBuilderCommonConfig, config, train_on_what=TrainOnWhat(config.train_on_what)
    )
    data = recipe.fill(
        FromConversationFileBuilder, config, file_path=config.data_files(), common_config=common
    )
    return recipe.supervised(config, data, prompts=[config.prompt])


def build_config_blueprint(model_name: str | None = None) -> chz.Blueprint[train.Config]:
    """Return the train loop's default settings as a blueprint, for programs to change."""
    return recipe.blueprint(Config, build, model_name)


if __name__ == "__main__":
    recipe.main(Config, build)
