"""Reinforcement learning over several turns: guess a number, or find a thing by asking.

    python -m recipes.multiturn                                # guess_number, on this machine
    python -m recipes.multiturn game=twenty_questions max_turns=8
    python -m recipes.multiturn base_url=https://... model_name=Qwen/Qwen3-8B

All turns of a game become one training record. The same command again resumes a stopped run.

Expect the held-out reward of guess_number to rise from -0.01 (standard error 0.08) to 0.53 (0.04)
in all 8 steps, as in a recorded run with seed 0.
"""

from __future__ import annotations

from typing import Literal

import chz

from tinker_cookbook import cli_utils, service
from tinker_cookbook.rl import recipe, train

from .envs import MultiturnDatasetBuilder


@chz.chz
class Config(train.RunOptions):
    """The settings of this recipe: those of every RL run, and its game."""

    game: Literal["guess_number", "twenty_questions"] = chz.field(
        default="guess_number", doc="Which game."
    )
    largest: int = chz.field(default=30, doc="Of the numbers to guess; the smallest is 0.")
    max_turns: int = chz.field(default=5, doc="Replies per game.")
    num_batches: int = chz.field(default=8, doc="Steps.")
    groups_per_batch: int = chz.field(default=4, doc="Games per step.")
    group_size: int = chz.field(default=8, doc="Times each game is played.")
    learning_rate: float = chz.field(default=5e-4, doc="Peak learning rate.")
    max_tokens: int = chz.field(default=12, doc="Limit of one reply, in tokens.")
    remove_constant_reward_groups: bool = chz.field(
        default=True, doc="Do not send groups of equal rewards: they have no gradient."
    )


def build_config(config: Config, model_name: str) -> train.Config:
    """The train loop's settings for a model."""
    names = {"recipe_name": "multiturn", "log_names": [config.game]}
    return recipe.build_config(config, MultiturnDatasetBuilder, model_name, **names)


def main(config: Config) -> None:
    """Train, then say where everything is."""
    recipe.run(build_config(config, service.resolve_model(config.base_url, config.model_name)))


if __name__ == "__main__":
    cli_utils.entrypoint(main)
