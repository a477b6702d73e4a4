"""Reinforcement learning on a generated task, through the toolkit's train loop.

    python -m recipes.rl_basic                                # the default model, on this machine
    python -m recipes.rl_basic base_url=https://... model_name=Qwen/Qwen3-8B

The task is to write about a topic in a given number of words. The further the reply is from that
number, the lower is its reward; a reply that does not end by itself loses 0.1. The held-out
problems have topics that are not trained on. The same command again resumes a stopped run.

Expect the held-out reward to rise from 0.11 (standard error 0.03) to 0.67 (0.02) in the first 10
steps and to 0.93 (0.01) after all 40, as in recorded runs with seeds 0 and 1; seed 2 went from 0.20
(0.04) to 0.61 (0.03), where it always writes five words. A run takes six minutes on two cores.
"""

from __future__ import annotations

import random
import re

import chz

from tinker_cookbook import recipe
from tinker_cookbook.rl import train
from tinker_cookbook.rl.problems import Grade, Problem, generated_data

TOPICS = """apples bees bicycles birds boats books bread bridges candles castles cats chess clocks
clouds coffee deserts dogs dreams farms fire fish forests friends gardens gold hats honey horses ice
islands kites lamps lions maps mirrors money mountains music night oceans owls paper pianos planets
rain rivers roads robots roses salt sand schools ships shoes snow spring stars stones storms summer
tea trains trees tigers towers toys winter wind windows wolves""".split()
WORD_COUNTS = range(3, 9)


def draw(split: str, rng: random.Random) -> Problem:
    """Return a random problem; a fifth of the topics is held out."""
    held_out, trained = TOPICS[::5], [topic for n, topic in enumerate(TOPICS) if n % 5]
    topic = rng.choice(held_out if split == "test" else trained)
    num_words = rng.choice(WORD_COUNTS)
    return Problem(f"Write exactly {num_words} words about {topic}.", answer=f"{num_words} words")


def count_reward(reply: str, num_words: int) -> float:
    """Return 1 for exactly `num_words` words, falling to 0 at none or twice as many."""
    found = len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", reply))
    return max(0.0, 1.0 - abs(found - num_words) / num_words)


def grade(reply: str, problem: Problem) -> Grade:
    """Return the reward; a reply without text is not well formed."""
    num_words = int(problem.answer.split()[0])
    return Grade(count_reward(reply, num_words), well_formed=bool(reply.strip()))


Data = generated_data(draw, grade, name="word_count")


@chz.chz
class Config(train.RunOptions):
    """The settings of this recipe: its data, and those of every RL run."""

    groups_per_batch: int = chz.field(default=4, doc="Problems per step.")
    group_size: int = chz.field(default=8, doc="Replies sampled per problem.")
    num_batches: int = chz.field(default=40, doc="Number of steps.")
    max_tokens: int = 24
    learning_rate: float = 5e-4
    eval_every: int = 20
    remove_constant_reward_groups: bool = True


def build(config: Config) -> train.Config:
    """Return the train loop's settings."""
    return recipe.rl(config, recipe.fill(Data, config))


def build_config_blueprint(model_name: str | None = None) -> chz.Blueprint[train.Config]:
    """Return the train loop's default settings as a blueprint, for programs to change."""
    return recipe.blueprint(Config, build, model_name)


if __name__ == "__main__":
    recipe.main(Config, build)
