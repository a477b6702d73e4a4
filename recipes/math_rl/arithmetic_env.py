"""Sums as environments, as programs of the Tinker cookbook import them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import chz

from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder

from .answers import AnswerNotFound, last_number, parse_number

__all__ = ["ArithmeticDataset", "ArithmeticDatasetBuilder", "ArithmeticEnv"]

LARGEST = 100


class ArithmeticEnv(ProblemEnv):
    """One sum; the last number of the reply is the answer."""

    def __init__(
        self,
        x: int,
        y: int,
        renderer: Renderer,
        convo_prefix: list[Message] | None = None,
        **settings,
    ) -> None:
        super().__init__(renderer, convo_prefix, **settings)
        self.x = x
        self.y = y

    def get_question(self) -> str:
        """Return the question."""
        return f"What is {self.x} + {self.y}?"

    def check_answer(self, sample_str: str) -> bool:
        """Return whether the last number is the sum."""
        try:
            return parse_number(last_number(sample_str)) == self.x + self.y
        except AnswerNotFound:
            return False

    def check_format(self, sample_str: str) -> bool:
        """Accept any text."""
        del sample_str
        return True

    def get_reference_answer(self) -> str:
        """Return the sum."""
        return str(self.x + self.y)

    @staticmethod
    def standard_fewshot_prefix() -> list[Message]:
        """Return a solved sum."""
        return [
            {"role": "user", "content": "What is 4 + 5?"},
            {"role": "assistant", "content": "9"},
        ]


class ArithmeticDataset(RLDataset):
    """Batches of sums; the same index gives the same sums."""

    def __init__(
        self,
        batch_size: int,
        renderer: Renderer,
        group_size: int,
        n_batches: int = 100,
        include_fewshot: bool = True,
    ) -> None:
        self.batch_size = batch_size
        self.renderer = renderer
        self.group_size = group_size
        self.n_batches = n_batches
        self.include_fewshot = include_fewshot

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        rng = random.Random(f"arithmetic/{index}")
        return [self._group(rng) for _ in range(self.batch_size)]

    def __len__(self) -> int:
        return self.n_batches

    def _group(self, rng: random.Random) -> ProblemGroupBuilder:
        prefix = ArithmeticEnv.standard_fewshot_prefix() if self.include_fewshot else None
        x, y = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        make = partial(ArithmeticEnv, x, y, self.renderer, convo_prefix=prefix)
        return ProblemGroupBuilder(make, self.group_size, "arithmetic")


@chz.chz
class ArithmeticDatasetBuilder(RLDatasetBuilder):
    """Builder of training sums; none are held out."""

    batch_size: int
    model_name_for_tokenizer: str
    renderer_name: str
    n_batches: int
    group_size: int
    include_fewshot: bool = True

    async def __call__(self) -> tuple[ArithmeticDataset, None]:
        """Return the sums."""
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name_for_tokenizer)
        dataset = ArithmeticDataset(
            self.batch_size, renderer, self.group_size, self.n_batches, self.include_fewshot
        )
        return dataset, None
