"""The settings of the recipe, and its train loop."""

from __future__ import annotations

import chz

from tinker_cookbook import recipe
from tinker_cookbook.rl import train
from tinker_cookbook.rl.preference_envs import PairwisePreferenceRLDatasetBuilder

from .env import ShorterComparisonBuilder, ShorterPreferenceModelBuilder

__all__ = ["CLIConfig", "build"]


@chz.chz
class CLIConfig(train.RunOptions):
    """The settings of this recipe, and those of every RL run."""

    batch_size: int = chz.field(default=8, doc="Questions per step.")
    group_size: int = chz.field(default=8, doc="Replies per question, which play a tournament.")
    num_batches: int = chz.field(default=10, doc="Number of steps.")
    max_tokens: int = 32
    learning_rate: float = 3e-4
    eval_every: int = 0


def build(config: CLIConfig) -> train.Config:
    """Return the train loop's settings."""
    data = PairwisePreferenceRLDatasetBuilder(
        comparison_builder=ShorterComparisonBuilder(
            num_comparisons=config.batch_size * config.num_batches
        ),
        batch_size=config.batch_size,
        policy_renderer_name=str(config.renderer_name),
        policy_model_name=str(config.model_name),
        group_size=config.group_size,
        preference_model_builder=ShorterPreferenceModelBuilder(),
    )
    return recipe.rl(config, data, recipe_name="shorter")
