"""Chat data sets as programs of the Tinker cookbook import them.

They come from the Hugging Face hub, or from a JSONL file of conversations (`file_path`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.hub_datasets import load_hub_table
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.supervised.data import (
    FromConversationFileBuilder,
    SupervisedDatasetFromHFDataset,
    conversation_to_datums,
)
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

if TYPE_CHECKING:
    import datasets
    import tinker

    from tinker_cookbook.renderers import Message, Renderer

__all__ = ["NoRobotsBuilder", "Tulu3Builder"]

ADVICE = "Give a local copy with file_path=conversations.jsonl (`messages` on each line)."
TULU3_TEST_ROWS = 1024


@chz.chz
class _HubChatBuilder(ChatDatasetBuilder):
    """Builder of conversations from a table with the column `messages`."""

    file_path: str | None = chz.field(default=None, doc="JSONL file to read instead of the hub.")
    test_size: int = chz.field(default=0, doc="Number of held-out conversations of that file.")

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        trained_on = self.common_config.train_on_what or self.default_train_on_what()
        config = chz.replace(self.common_config, train_on_what=trained_on)
        if self.file_path is not None:
            return FromConversationFileBuilder(
                common_config=config, file_path=self.file_path, test_size=self.test_size
            )()
        train, test = self.load_tables()
        if len(train) < config.batch_size:
            raise ConfigurationError(
                f"batch_size={config.batch_size} is more than the {len(train)} training rows; use "
                f"at most {len(train)}."
            )
        to_datums = partial(
            _row_to_datums,
            renderer=self.renderer,
            max_length=config.max_length,
            train_on_what=TrainOnWhat(trained_on),
        )
        return (
            SupervisedDatasetFromHFDataset(train, config.batch_size, flatmap_fn=to_datums),
            SupervisedDatasetFromHFDataset(test, len(test), flatmap_fn=to_datums),
        )

    def default_train_on_what(self) -> TrainOnWhat:
        """Return the tokens to train if the config does not say."""
        return TrainOnWhat.ALL_ASSISTANT_MESSAGES

    def load_tables(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Load the training rows and the held-out ones."""
        raise NotImplementedError


@chz.chz
class NoRobotsBuilder(_HubChatBuilder):
    """No Robots: 9,500 conversations written by people, and 500 held-out ones."""

    def load_tables(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        name = "HuggingFaceH4/no_robots"
        train = load_hub_table(name, split="train", advice=ADVICE)
        return train.shuffle(seed=0), load_hub_table(name, split="test", advice=ADVICE)


@chz.chz
class Tulu3Builder(_HubChatBuilder):
    """The supervised mixture of Tulu 3, of which 1,024 conversations are held out."""

    def default_train_on_what(self) -> TrainOnWhat:
        return TrainOnWhat.LAST_ASSISTANT_MESSAGE

    def load_tables(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        rows = load_hub_table("allenai/tulu-3-sft-mixture", split="train", advice=ADVICE)
        rows = rows.shuffle(seed=0)
        test = rows.select(range(min(TULU3_TEST_ROWS, len(rows))))
        return rows.select(range(len(test), len(rows))), test


def _row_to_datums(
    row: dict[str, list[Message]],
    *,
    renderer: Renderer,
    max_length: int | None,
    train_on_what: TrainOnWhat,
) -> list[tinker.Datum]:
    return conversation_to_datums(
        row["messages"], renderer, max_length, train_on_what=train_on_what
    )
