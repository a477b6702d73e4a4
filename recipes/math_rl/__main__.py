"""Reinforcement learning on mathematics: reward a reply whose answer is right.

    python -m recipes.math_rl                                  # generated sums, on this machine
    python -m recipes.math_rl env=gsm8k base_url=https://... model_name=Qwen/Qwen3-8B \\
        max_tokens=512 max_steps=200
    python -m recipes.math_rl env=math file_path=math.jsonl grader=math_verify

GSM8K and MATH come from the Hugging Face hub, or from a JSONL file with `question` and `answer`.
Numbers are compared exactly; expressions with the package math-verify. The same command again
resumes a stopped run.

Expect the held-out reward on sums to rise from 0.07 (standard error 0.01) to 0.76 (0.04) in 10
steps, as in a recorded run with seed 0; it was 0.68 (0.05) after 20. The best weights are kept.
"""

from __future__ import annotations

from typing import Literal

import chz

from tinker_cookbook import cli_utils, service
from tinker_cookbook.rl import recipe, train

from .data import MathDatasetBuilder, check_source


@chz.chz
class Config(train.RunOptions):
    """The settings of this recipe: those of every RL run, and its data."""

    env: Literal["arithmetic", "gsm8k", "math"] = chz.field(
        default="arithmetic", doc="Which problems."
    )
    file_path: str | None = chz.field(default=None, doc="JSONL file instead of the hub.")
    grader: Literal["numeric", "math_verify"] = chz.field(
        default="numeric", doc="How answers are compared."
    )
    include_fewshot: bool = chz.field(default=True, doc="A solved sum before each sum.")
    num_problems: int = chz.field(default=240, doc="Sums that are generated.")
    test_size: int = chz.field(default=64, doc="Problems held out.")
    max_steps: int | None = chz.field(
        default=20, doc="Steps; enough for sums, and more than that for other problems."
    )
    groups_per_batch: int = chz.field(default=4, doc="Problems per step.")
    group_size: int = chz.field(default=8, doc="Replies sampled per problem.")
    learning_rate: float = chz.field(default=5e-4, doc="Peak learning rate.")
    max_tokens: int = chz.field(default=16, doc="Limit of one reply, in tokens.")
    remove_constant_reward_groups: bool = chz.field(
        default=True, doc="Do not send groups of equal rewards: they have no gradient."
    )


def build_config(config: Config, model_name: str) -> train.Config:
    """The train loop's settings for a model."""
    names = {"recipe_name": "math_rl", "log_names": [config.env]}
    return recipe.build_config(config, MathDatasetBuilder, model_name, **names)


def main(config: Config) -> None:
    """Train, then say where everything is."""
    check_source(config.env, config.file_path)
    recipe.run(build_config(config, service.resolve_model(config.base_url, config.model_name)))


if __name__ == "__main__":
    cli_utils.entrypoint(main)
