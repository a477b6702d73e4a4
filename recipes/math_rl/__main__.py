"""Reinforcement learning on mathematics: reward a reply with the right answer.

    python -m recipes.math_rl                                  # generated sums, on this machine
    python -m recipes.math_rl env=gsm8k base_url=https://... model_name=Qwen/Qwen3-8B \\
        max_tokens=512 max_steps=200
    python -m recipes.math_rl env=math file_path=math.jsonl grader=math_verify

GSM8K and MATH come from the Hugging Face hub, or from a JSONL file with `question` and `answer`.
Numbers are compared exactly, and expressions with the package math-verify. The same command again
resumes a stopped run.

Expect the held-out reward on sums to rise from 0.07 (standard error 0.01) to 0.76 (0.04) in 10
steps, as in a recorded run with seed 0; it was 0.68 (0.05) after 20. The best weights are kept.
"""

from __future__ import annotations

from typing import Literal

import chz

from tinker_cookbook import recipe
from tinker_cookbook.rl import train

from .answer_env import AnswerDatasetBuilder
from .problems import check_source


@chz.chz
class Config(train.RunOptions):
    """The settings of this recipe: its problems, and those of every RL run."""

    env: Literal["arithmetic", "gsm8k", "math"] = chz.field(
        default="arithmetic", doc="Source of the problems."
    )
    file_path: str | None = chz.field(
        default=None, doc="JSONL file with problems, instead of the Hugging Face hub."
    )
    grader: Literal["numeric", "math_verify"] = chz.field(
        default="numeric", doc="How answers are compared: as numbers, or as expressions too."
    )
    include_fewshot: bool = chz.field(default=True, doc="Whether a solved sum precedes each sum.")
    num_problems: int = chz.field(default=240, doc="Number of generated sums.")
    test_size: int = chz.field(default=64, doc="Number of held-out problems.")
    max_steps: int | None = chz.field(
        default=20, doc="Number of steps; 20 suffice for sums, other problems need more."
    )
    groups_per_batch: int = chz.field(default=4, doc="Problems per step.")
    group_size: int = chz.field(default=8, doc="Replies sampled per problem.")
    learning_rate: float = 5e-4
    max_tokens: int = 16
    remove_constant_reward_groups: bool = True

    def log_words(self) -> list[str]:
        return [self.env]


def build(config: Config) -> train.Config:
    """Return the train loop's settings."""
    check_source(config.env, config.file_path)
    return recipe.rl(config, recipe.fill(AnswerDatasetBuilder, config))


if __name__ == "__main__":
    recipe.main(Config, build)
