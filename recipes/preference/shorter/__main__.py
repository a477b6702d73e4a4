"""Self-play for short replies: a tournament in which the shorter reply wins.

    python -m recipes.preference.shorter                      # the default model, on this machine
    python -m recipes.preference.shorter base_url=https://... model_name=Qwen/Qwen3-8B

The judge is not a model, so this recipe shows the tournament alone: several replies to one question
are compared two by two, and the reward of a reply is its wins minus its losses per match. The same
command again resumes a stopped run.

Expect the mean number of tokens per reply (env/all/ac_tokens_per_turn; at most 32) to fall from 31
to 14 in 5 steps and to 3.4 in 10, as in a recorded run with seed 0. The replies no longer answer
the question: a judge that looks only at the length gets only that. kl_penalty_coef= keeps the
policy near the base model.
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe
from tinker_cookbook.rl import train
from tinker_cookbook.rl.preference_envs import PairwisePreferenceRLDatasetBuilder

from .env import ShorterComparisonBuilder, ShorterPreferenceModelBuilder


@chz.chz
class Config(train.RunOptions):
    """The settings of this recipe, and those of every RL run."""

    batch_size: int = chz.field(default=4, doc="Questions per step.")
    group_size: int = chz.field(default=8, doc="Replies per question, which play a tournament.")
    num_batches: int = chz.field(default=10, doc="Number of steps.")
    max_tokens: int = 32
    learning_rate: float = 5e-4
    eval_every: int = 0


def build(config: Config) -> train.Config:
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
    reference = train.KLReferenceConfig(base_model=str(config.model_name))
    return recipe.rl(config, data, kl_reference_config=reference)


if __name__ == "__main__":
    recipe.main(Config, build)
