"""A task on plain tokens that any model can learn: sample tokens with an even number."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import chz
import tinker

from tinker_cookbook.completers import StopCondition
from tinker_cookbook.rl.types import (
    Action,
    ActionExtra,
    Env,
    EnvGroupBuilder,
    RLDataset,
    RLDatasetBuilder,
    StepResult,
)


@dataclass
class EvenTokensEnv(Env):
    prompt: list[int]
    constant_reward: float | None = None
    fails: bool = False

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        return tinker.ModelInput.from_ints(self.prompt), [0]

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        if self.fails:
            raise RuntimeError("this group always fails")
        reward = sum(token % 2 == 0 for token in action) / max(len(action), 1)
        if self.constant_reward is not None:
            reward = self.constant_reward
        return StepResult(reward, True, tinker.ModelInput.empty(), [0], {"even": reward})


@dataclass(frozen=True)
class EvenTokensGroup(EnvGroupBuilder):
    prompt: tuple[int, ...]
    group_size: int
    constant_reward: float | None = None
    fails: bool = False

    async def make_envs(self) -> Sequence[Env]:
        return [
            EvenTokensEnv(list(self.prompt), self.constant_reward, self.fails)
            for _ in range(self.group_size)
        ]


class TokenDataset(RLDataset):
    def __init__(self, builder: TokenDatasetBuilder, num_batches: int, offset: int) -> None:
        self._builder = builder
        self._num_batches = num_batches
        self._offset = offset

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        builder = self._builder
        if self._offset == 0 and index == builder.fail_at:
            raise InterruptedError("the run was stopped here")
        if self._offset == 0 and index == builder.pause_at:
            time.sleep(60)
        return [
            EvenTokensGroup(
                tuple((self._offset + 7 * index + 3 * group + i) % 50 + 10 for i in range(length)),
                builder.group_size,
                builder.constant_reward if builder.is_constant(group) else None,
                group in builder.failing_groups,
            )
            for group, length in enumerate([builder.prompt_length] * builder.groups_per_batch)
        ]

    def __len__(self) -> int:
        return self._num_batches


@chz.chz
class TokenDatasetBuilder(RLDatasetBuilder):
    num_batches: int = 4
    groups_per_batch: int = 4
    group_size: int = 4
    prompt_length: int = 4
    constant_reward: float | None = None
    constant_groups: tuple[int, ...] | None = None
    """Groups of a batch that `constant_reward` applies to; None: all."""
    failing_groups: tuple[int, ...] = ()
    fail_at: int | None = None
    pause_at: int | None = None

    def is_constant(self, group: int) -> bool:
        return self.constant_groups is None or group in self.constant_groups

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        return TokenDataset(self, self.num_batches, 0), TokenDataset(self, 1, 1000)
