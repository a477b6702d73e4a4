"""Guess a number from 0 to 1024 in ten turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import chz

from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.rl.message_env import EnvFromMessageEnv
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset, RLDatasetBuilder

from ...multiturn.games import UNREADABLE_REWARD, NumberGame

__all__ = [
    "GuessNumberDataset",
    "GuessNumberDatasetBuilder",
    "GuessNumberEnv",
    "GuessNumberEnvGroupBuilder",
]

UPPER_BOUND = 1024
MAX_TURNS = 10


class GuessNumberEnv(EnvFromMessageEnv):
    """One game; the rules and rewards are those of `NumberGame`."""

    def __init__(self, gold_answer: int, renderer: Renderer) -> None:
        super().__init__(
            renderer,
            NumberGame(gold_answer, UPPER_BOUND, MAX_TURNS),
            failed_parse_reward=UNREADABLE_REWARD,
            context_overflow_reward=UNREADABLE_REWARD,
        )
        self.gold_answer = gold_answer


@dataclass(frozen=True)
class GuessNumberEnvGroupBuilder(EnvGroupBuilder):
    """One number, guessed several times."""

    answer: int
    renderer: Renderer
    num_envs: int

    async def make_envs(self) -> Sequence[Env]:
        """Make new games."""
        return [GuessNumberEnv(self.answer, self.renderer) for _ in range(self.num_envs)]

    def logging_tags(self) -> list[str]:
        """Return the name of the game."""
        return ["guess_number"]


@dataclass(frozen=True)
class GuessNumberDataset(RLDataset):
    """Numbers in batches."""

    answers: Sequence[int]
    renderer: Renderer
    batch_size: int
    group_size: int

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        start = index * self.batch_size
        return [
            GuessNumberEnvGroupBuilder(answer, self.renderer, self.group_size)
            for answer in self.answers[start : start + self.batch_size]
        ]

    def __len__(self) -> int:
        return len(self.answers) // self.batch_size


@chz.chz
class GuessNumberDatasetBuilder(RLDatasetBuilder):
    """Builder of all numbers, shuffled; a tenth of them is held out."""

    batch_size: int
    model_name: str
    renderer_name: str
    train_group_size: int
    test_group_size: int = 4
    seed: int = 0

    async def __call__(self) -> tuple[RLDataset, RLDataset]:
        """Return the training games and the held-out ones."""
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name)
        numbers = list(range(UPPER_BOUND + 1))
        random.Random(self.seed).shuffle(numbers)
        cut = len(numbers) // 10
        test = GuessNumberDataset(numbers[:cut], renderer, cut, self.test_group_size)
        train = GuessNumberDataset(numbers[cut:], renderer, self.batch_size, self.train_group_size)
        return train, test
