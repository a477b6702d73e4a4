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
from collections.abc import Sequence
from functools import partial

import chz

from tinker_cookbook import recipe
from tinker_cookbook.rl import train
from tinker_cookbook.rl.dataset_utils import RenderedDatasetBuilder
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset

TOPICS = """apples bees bicycles birds boats books bread bridges candles castles cats chess clocks
clouds coffee deserts dogs dreams farms fire fish forests friends gardens gold hats honey horses ice
islands kites lamps lions maps mirrors money mountains music night oceans owls paper pianos planets
rain rivers roads robots roses salt sand schools ships shoes snow spring stars stones storms summer
tea trains trees tigers towers toys winter wind windows wolves""".split()
WORD_COUNTS = range(3, 9)


def count_reward(reply: str, num_words: int) -> float:
    """Return 1 for exactly `num_words` words, falling to 0 at none or twice as many."""
    found = len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", reply))
    return max(0.0, 1.0 - abs(found - num_words) / num_words)


class WordCountEnv(ProblemEnv):
    """One request for a text of a certain length."""

    def __init__(self, topic: str, num_words: int, **settings) -> None:
        super().__init__(**settings)
        self.topic = topic
        self.num_words = num_words

    def get_question(self) -> str:
        """Return the message of the user."""
        return f"Write exactly {self.num_words} words about {self.topic}."

    def check_answer(self, sample_str: str) -> float:
        """Return the reward."""
        return count_reward(sample_str, self.num_words)

    def check_format(self, sample_str: str) -> bool:
        """Return whether the reply has text; the base class checks that it ended by itself."""
        return bool(sample_str.strip())

    def get_reference_answer(self) -> str:
        """Return the wanted number, for the transcript."""
        return f"{self.num_words} words"


class WordCountDataset(RLDataset):
    """Random topics and lengths; the same index gives the same batch."""

    def __init__(self, topics: Sequence[str], data: WordCountDatasetBuilder, num_batches: int):
        self._topics = topics
        self._data = data
        self._num_batches = num_batches
        self._renderer = data.build_renderer()

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        rng = random.Random(f"{self._data.seed}/{index}")
        return [
            ProblemGroupBuilder(
                partial(
                    WordCountEnv,
                    topic=rng.choice(self._topics),
                    num_words=rng.choice(WORD_COUNTS),
                    renderer=self._renderer,
                ),
                self._data.group_size,
                "word_count",
            )
            for _ in range(self._data.groups_per_batch)
        ]

    def __len__(self) -> int:
        return self._num_batches


@chz.chz
class WordCountDatasetBuilder(RenderedDatasetBuilder):
    """Builder of training problems, and of held-out ones about other topics."""

    num_batches: int
    test_problems: int = 32
    test_group_size: int = 4

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return both; a fifth of the topics is held out."""
        train_topics = [topic for number, topic in enumerate(TOPICS) if number % 5]
        test_data = chz.replace(
            self,
            seed=self.seed + 1_000_003,
            groups_per_batch=self.test_problems,
            group_size=self.test_group_size,
        )
        return (
            WordCountDataset(train_topics, self, self.num_batches),
            WordCountDataset(TOPICS[::5], test_data, 1),
        )


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
    return recipe.rl(config, recipe.fill(WordCountDatasetBuilder, config))


def build_config_blueprint(model_name: str | None = None) -> chz.Blueprint[train.Config]:
    """Return the train loop's default settings as a blueprint, for programs to change."""
    return recipe.blueprint(Config, build, model_name)


if __name__ == "__main__":
    recipe.main(Config, build)
