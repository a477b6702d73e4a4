"""A reward model, trained on comparisons of two replies.

    python -m recipes.preference.reward_model                 # the default model, on this machine
    python -m recipes.preference.reward_model kind=pointwise
    python -m recipes.preference.reward_model data=comparisons.jsonl test_size=200

Without `data=`, friendly and unfriendly replies to requests for help are generated; those of the
held-out comparisons are phrased in other ways. kind=pairwise trains a classifier that sees two
replies and answers A, B or Tie. kind=pointwise trains a score for one reply with the Bradley-Terry
loss. The same command again resumes a stopped run.
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe
from tinker_cookbook.preference import train_pointwise
from tinker_cookbook.preference.bradley_terry import PointwiseDatasetBuilder
from tinker_cookbook.preference.judge_quality import JudgeEvaluatorBuilder
from tinker_cookbook.preference.judges import JudgeKind
from tinker_cookbook.preference.preference_datasets import (
    ChatDatasetBuilderFromComparisons,
    ComparisonBuilderFromJsonl,
)
from tinker_cookbook.supervised import train as sl_train

from .help_requests import HelpRequestComparisons


@chz.chz
class Config(train_pointwise.PointwiseOptions):
    """The settings of this recipe, and those of every run that trains a judge."""

    kind: JudgeKind = chz.field(
        default="pairwise", doc="Kind of judge: pairwise sees two replies; pointwise scores one."
    )
    data: str | None = chz.field(
        default=None, doc="File, folder or several of comparisons; default: generated ones."
    )
    num_comparisons: int = chz.field(default=256, doc="Number of generated comparisons.")
    test_size: int = chz.field(default=48, doc="Number of held-out comparisons.")
    batch_size: int = chz.field(default=8, doc="Comparisons per optimizer step.")
    learning_rate: float = 5e-4
    lora_rank: int = 16
    max_steps: int | None = 20
    eval_every: int = 10
    save_every: int = 10


def build(config: Config) -> sl_train.Config | train_pointwise.Config:
    """Return the settings of the train loop, which depends on the kind of judge."""
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    if config.data is None:
        comparisons = recipe.fill(HelpRequestComparisons, config)
    else:
        comparisons = ComparisonBuilderFromJsonl(
            train_path=config.data, test_size=config.test_size, seed=config.seed
        )
    common = recipe.fill(ChatDatasetBuilderCommonConfig, config, max_length=None)
    evaluator = recipe.fill(JudgeEvaluatorBuilder, config, comparison_builder=comparisons)
    evaluators = [evaluator] if config.test_size else []
    if config.kind == "pointwise":
        data = PointwiseDatasetBuilder(common_config=common, comparison_builder=comparisons)
        return recipe.fill(
            train_pointwise.Config, config, dataset_builder=data, evaluator_builders=evaluators
        )
    # A batch has each comparison in both orders, so it has the same number of comparisons.
    both = chz.replace(common, batch_size=2 * config.batch_size)
    data = ChatDatasetBuilderFromComparisons(
        common_config=both, comparison_builder=comparisons, swap=True
    )
    return recipe.fill(
        sl_train.Config,
        config,
        recipe_name="reward_model",
        dataset_builder=data,
        evaluator_builders=evaluators,
    )


if __name__ == "__main__":
    recipe.main(Config, build)  # pyright: ignore[reportArgumentType]  # either kind of settings
