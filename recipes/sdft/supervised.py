"""The skill of `recipes.sdft` by supervised training on the right answers, for comparison.

    python -m recipes.sdft.supervised

The same names, test and number of names per step as in self-distillation; the targets are the
records. Compare test/base_kl of the two runs at equal test/accuracy.
"""

from __future__ import annotations

import random

import chz

from tinker_cookbook import recipe
from tinker_cookbook.renderers import Message, TrainOnWhat
from tinker_cookbook.supervised import (
    ChatDatasetBuilderCommonConfig,
    SupervisedDataset,
    SupervisedDatasetFromHFDataset,
    conversation_to_datum,
    train,
)
from tinker_cookbook.supervised.types import ChatDatasetBuilder
from tinker_cookbook.utils.lr_scheduling import LRSchedule

from .skill import SkillEvaluatorBuilder, ask, split_names, write_record


@chz.chz
class RecordsBuilder(ChatDatasetBuilder):
    """Builder of the training data: questions with records."""

    num_shots: int
    num_steps: int
    seed: int = 0

    def __call__(self) -> tuple[SupervisedDataset, None]:
        """Return the batches of all steps."""
        from datasets import Dataset

        common, renderer = self.common_config, self.renderer
        _, trained, _ = split_names(self.num_shots, common.batch_size, self.seed)
        rows = [
            {"name": name}
            for step in range(self.num_steps)
            for name in random.Random(f"{self.seed}/{step}").sample(trained, common.batch_size)
        ]

        def to_datum(row: dict):
            messages: list[Message] = [
                {"role": "user", "content": ask(row["name"])},
                {"role": "assistant", "content": write_record(row["name"])},
            ]
            return conversation_to_datum(
                messages, renderer, common.max_length, TrainOnWhat.LAST_ASSISTANT_MESSAGE
            )

        return SupervisedDatasetFromHFDataset(
            Dataset.from_list(rows), common.batch_size, map_fn=to_datum
        ), None


@chz.chz
class Config(train.RunOptions):
    """The settings of this recipe."""

    num_shots: int = chz.field(
        default=4, doc="Names that self-distillation shows; they are not trained on here either."
    )
    num_steps: int = chz.field(default=20, doc="Number of steps.")
    batch_size: int = chz.field(default=16, doc="Names per step.")
    max_length: int = chz.field(default=128, doc="Maximum tokens per example.")
    learning_rate: float = 5e-4
    lr_schedule: LRSchedule = "constant"
    lora_rank: int = 16
    eval_every: int = 1
    save_every: int = 4


def build(config: Config) -> train.Config:
    """Return the train loop's settings."""
    common = recipe.fill(ChatDatasetBuilderCommonConfig, config)
    data = recipe.fill(RecordsBuilder, config, common_config=common)
    _, _, test = split_names(config.num_shots, config.batch_size, config.seed)
    evaluator = recipe.fill(SkillEvaluatorBuilder, config, names=test)
    return recipe.supervised(config, data, evaluator_builders=[evaluator])


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments; by default, those of the command line."""
    recipe.main(Config, build, argv=argv)


if __name__ == "__main__":
    main()
