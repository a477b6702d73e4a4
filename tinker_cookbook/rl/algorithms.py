"""Advantages: how much better a trajectory did than the others of its group.

P groups of a batch, G members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from tinker_cookbook.exceptions import ConfigurationError

__all__ = [
    "AdvantageEstimator",
    "LengthNormalization",
    "center_rewards",
    "compute_group_advantages",
    "compute_length_scale",
    "leave_one_out",
    "standardize_rewards",
]

AdvantageEstimator: TypeAlias = Literal["group_mean", "group_std", "leave_one_out"]
LengthNormalization: TypeAlias = Literal["none", "trajectory", "batch"]

STD_EPSILON = 1e-6


def center_rewards(rewards_G: np.ndarray) -> np.ndarray:
    """Subtract the group's mean reward.

    Args:
        rewards_G: float [G].

    Returns:
        float32 [G], summing to 0. Equal rewards, and a group of one, give 0: no gradient.

    Source: arXiv:2402.03300 (GRPO); arXiv:2503.20783 on not dividing by the standard deviation,
    which would weigh nearly solved and nearly hopeless tasks more.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    return (rewards_G - rewards_G.mean()).astype(np.float32)


def standardize_rewards(rewards_G: np.ndarray) -> np.ndarray:
    """Subtract the group's mean and divide by its standard deviation (population, plus 1e-6).

    Source: arXiv:2402.03300, section 4.1.2.
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    centered_G = rewards_G - rewards_G.mean()
    return (centered_G / (rewards_G.std() + STD_EPSILON)).astype(np.float32)


def leave_one_out(rewards_G: np.ndarray) -> np.ndarray:
    """Subtract the mean of the other members' rewards, an unbiased baseline.

    Equals `center_rewards` times G / (G - 1). A group of one gives 0.

    Source: arXiv:2402.14740 (RLOO); Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for
    Free!".
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    size = len(rewards_G)
    if size < 2:
        return np.zeros(size, dtype=np.float32)
    others_G = (rewards_G.sum() - rewards_G) / (size - 1)
    return (rewards_G - others_G).astype(np.float32)


_ESTIMATORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group_mean": center_rewards,
    "group_std": standardize_rewards,
    "leave_one_out": leave_one_out,
}


def compute_group_advantages(
    rewards_G: Sequence[float] | np.ndarray, estimator: AdvantageEstimator = "group_mean"
) -> np.ndarray:
    """Turn the rewards of one group into advantages.

    Args:
        rewards_G: Total reward of each trajectory.
        estimator: `group_mean`, `group_std` or `leave_one_out`.

    Returns:
        float32 [G].

    Raises:
        ConfigurationError: if the estimator is unknown.
    """
    if estimator not in _ESTIMATORS:
        raise ConfigurationError(
            f"advantage_estimator={estimator!r} is unknown; use one of "
            f"{', '.join(get_args(AdvantageEstimator))}."
        )
    return _ESTIMATORS[estimator](np.asarray(rewards_G, dtype=np.float64))


def compute_length_scale(
    num_action_tokens: Sequence[int], normalization: LengthNormalization
) -> np.ndarray:
    """The factor on each trajectory's advantage, given the sampled tokens of all trajectories.

    The losses sum over tokens. `none` keeps that: every token counts the same, whatever the length
    of its reply. `trajectory` divides by the trajectory's own number of tokens, so that every reply
    counts the same and long ones are moved less per token. `batch` divides by the batch's mean
    number of tokens per trajectory: `none`, on a scale that does not depend on the lengths.

    Args:
        num_action_tokens: Sampled tokens of each trajectory of the batch.
        normalization: `none`, `trajectory` or `batch`.

    Returns:
        float32, one per trajectory.

    Raises:
        ConfigurationError: if the normalization is unknown.

    Source: `trajectory` is that of arXiv:2402.03300; `none` arXiv:2503.20783 (Dr. GRPO); `batch`
    arXiv:2503.14476 (DAPO's token-level loss), up to the number of trajectories.
    """
    lengths = np.maximum(np.asarray(num_action_tokens, dtype=np.float64), 1.0)
    if normalization == "none":
        scale = np.ones(len(lengths))
    elif normalization == "trajectory":
        scale = 1.0 / lengths
    elif normalization == "batch":
        scale = np.full(len(lengths), 1.0 / lengths.mean()) if len(lengths) else lengths
    else:
        raise ConfigurationError(
            f"length_normalization={normalization!r} is unknown; use one of "
            f"{', '.join(get_args(LengthNormalization))}."
        )
    return scale.astype(np.float32)
