"""Credit: how the rewards of a group become the advantages of its tokens.

The usual way is one advantage per trajectory: its total reward compared with the group's. The
settings here change what is compared:

- A soft penalty for replies that come close to the token limit (`overlong_buffer`).
- Replies that the token limit cut are not trained on (`train_truncated=False`).
- One advantage per turn: what was earned from that turn on, compared with the same turn of the
  other members (`credit="turn"`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from tinker_cookbook.rl.algorithms import (
    AdvantageEstimator,
    LengthNormalization,
    compute_group_advantages,
    compute_length_scale,
)
from tinker_cookbook.rl.data_processing import compute_advantages, has_equal_rewards
from tinker_cookbook.rl.types import Trajectory, TrajectoryGroup

__all__ = [
    "Advantages",
    "Credit",
    "CreditAssignment",
    "compute_overlong_penalty",
    "compute_turn_advantages",
    "penalize_overlong",
]

CreditAssignment: TypeAlias = Literal["trajectory", "turn"]
Advantages: TypeAlias = Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]]
"""For each group: float32 [G], or for each member float32 [turns]."""

ZERO = 1e-7
"""Advantages up to this size are rounding errors."""


@dataclass(frozen=True)
class Credit:
    """The settings of a run, applied to its groups."""

    estimator: AdvantageEstimator = "group_mean"
    length_normalization: LengthNormalization = "none"
    assignment: CreditAssignment = "trajectory"
    turn_discount: float = 1.0
    max_tokens: int = 0
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

    def shape(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """Return the group with the rewards that are compared."""
        if not self.overlong_buffer:
            return group
        return penalize_overlong(
            group, self.max_tokens, self.overlong_buffer, self.overlong_penalty
        )

    def is_constant(self, group: TrajectoryGroup) -> bool:
        """Return whether a shaped group has nothing to learn from."""
        if self.assignment == "trajectory":
            return has_equal_rewards(group)
        advantages_G = _turn_advantages(group, self.estimator, self.turn_discount)
        return all(np.abs(turns).max(initial=0.0) <= ZERO for turns in advantages_G)

    def advantages(self, groups_P: Sequence[TrajectoryGroup]) -> Advantages:
        """Return the advantages of shaped groups."""
        if self.assignment == "trajectory":
            return compute_advantages(
                list(groups_P),
                estimator=self.estimator,
                length_normalization=self.length_normalization,
            )
        return compute_turn_advantages(
            groups_P,
            estimator=self.estimator,
            length_normalization=self.length_normalization,
            discount=self.turn_discount,
        )


def compute_overlong_penalty(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """Return the soft penalty of a long reply: 0 down to -1.

    It is 0 for up to `max_tokens - buffer` tokens, and falls linearly to -1 at `max_tokens`.

    Source: arXiv:2503.14476 (DAPO), equation 13.
    """
    over = num_tokens - (max_tokens - buffer)
    return -min(max(over, 0) / buffer, 1.0)


def penalize_overlong(
    group: TrajectoryGroup, max_tokens: int, buffer: int, penalty: float
) -> TrajectoryGroup:
    """Return the group with `penalty` times the soft penalty added to the reward of each turn."""
    return dataclasses.replace(
        group,
        trajectories_G=[
            dataclasses.replace(
                trajectory,
                transitions=[
                    dataclasses.replace(
                        turn,
                        reward=turn.reward
                        + penalty
                        * compute_overlong_penalty(len(turn.ac.tokens), max_tokens, buffer),
                    )
                    for turn in trajectory.transitions
                ],
            )
            for trajectory in group.trajectories_G
        ],
    )


def compute_returns(trajectory: Trajectory, final_reward: float, discount: float) -> np.ndarray:
    """Return float64 [turns]: what was earned from each turn on.

    The reward of the group counts as earned in the last turn.
    """
    returns = np.array([turn.reward for turn in trajectory.transitions], dtype=np.float64)
    if len(returns):
        returns[-1] += final_reward
    for index in range(len(returns) - 2, -1, -1):
        returns[index] += discount * returns[index + 1]
    return returns


def compute_turn_advantages(
    groups_P: Sequence[TrajectoryGroup],
    *,
    estimator: AdvantageEstimator = "group_mean",
    length_normalization: LengthNormalization = "none",
    discount: float = 1.0,
) -> list[list[np.ndarray]]:
    """Compare each turn with the same turn of the other members of its group.

    A turn that no other member reached has nothing to be compared with; its advantage is 0.

    Returns:
        For each group and member, float32 [turns].

    Source: turn-level advantages of arXiv:2505.11821, with discounted returns instead of one
    reward per turn.
    """
    advantages_P = [_turn_advantages(group, estimator, discount) for group in groups_P]
    if length_normalization == "none":
        return advantages_P
    lengths = [
        sum(len(turn.ac.tokens) for turn in trajectory.transitions)
        for group in groups_P
        for trajectory in group.trajectories_G
    ]
    scales = iter(compute_length_scale(lengths, length_normalization))
    return [[turns * next(scales) for turns in group] for group in advantages_P]


def _turn_advantages(
    group: TrajectoryGroup, estimator: AdvantageEstimator, discount: float
) -> list[np.ndarray]:
    returns_G = [
        compute_returns(trajectory, final_reward, discount)
        for trajectory, final_reward in zip(
            group.trajectories_G, group.final_rewards_G, strict=True
        )
    ]
    advantages_G = [np.zeros(len(returns), dtype=np.float32) for returns in returns_G]
    for turn in range(max(map(len, returns_G), default=0)):
        members = [index for index, returns in enumerate(returns_G) if turn < len(returns)]
        reached = [returns_G[index][turn] for index in members]
        for index, advantage in zip(
            members, compute_group_advantages(reached, estimator), strict=True
        ):
            advantages_G[index][turn] = advantage
    return advantages_G
