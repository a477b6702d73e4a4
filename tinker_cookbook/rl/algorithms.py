"""The algorithms of reinforcement learning: baselines, normalization, losses, and known recipes.

An update of the policy is a sum over sampled tokens of `loss(p, q, A)`, where `p` is the trainer's
log probability of the token, `q` the sampler's (the "old" one), and `A` the token's advantage. Four
settings of a run (`rl.config.RunOptions`) choose the algorithm, and each is defined in this file:

1. `advantage_estimator`: the baseline that turns the rewards of a group into advantages.
2. `length_normalization`: how much the tokens of a long reply count.
3. `loss_fn`: the loss, one of `LOSSES`.
4. `loss_fn_config`: the settings of that loss.

`ALGORITHMS` lists the combinations that have a name: GRPO, Dr. GRPO, RLOO, DAPO, CISPO, GSPO, DRO.
The losses are computed by the service; the local service does so in
`local/engine/training/losses.py`.

A reference model is not an input of any loss here. `kl_penalty_coef` subtracts the difference to it
from the advantages before they are sent (`rl.metrics.incorporate_kl_penalty`).

In names of arrays, G is the number of members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tinker_cookbook.exceptions import ConfigurationError

__all__ = [
    "ALGORITHMS",
    "LOSSES",
    "AdvantageEstimator",
    "Algorithm",
    "LengthNormalization",
    "Loss",
    "RLLoss",
    "center_rewards",
    "compute_group_advantages",
    "compute_length_scale",
    "leave_one_out",
    "standardize_rewards",
]

AdvantageEstimator: TypeAlias = Literal["group_mean", "group_std", "leave_one_out"]
LengthNormalization: TypeAlias = Literal["none", "trajectory", "batch"]
RLLoss: TypeAlias = Literal[
    "importance_sampling", "ppo", "cispo", "gspo", "dro", "stable_reinforce"
]

STD_EPSILON = 1e-6


# ---- losses ----


@dataclass(frozen=True)
class Loss:
    """A loss of the service, and what the client has to send for it.

    Every loss takes `target_tokens`, `logprobs` (those of the sampler) and `advantages`.
    """

    formula: str
    """The loss of one token; `r = exp(p - q)` is the probability ratio of trainer and sampler."""
    settings: tuple[str, ...] = ()
    """The keys that `loss_fn_config` may have."""
    extra_inputs: Mapping[str, str] = field(default_factory=dict)
    """Further inputs by the service's name, and the array of the datum each is taken from."""
    needs_sampling_records: bool = False
    """Whether the sampler must record more than log probabilities, and name its samples."""
    on_local_service: bool = True
    """Whether the local service offers it."""


CLIP_SETTINGS = ("clip_low_threshold", "clip_high_threshold")
"""Bounds of the ratio itself: a clip range of 0.2 is 0.8 and 1.2."""

LOSSES: dict[RLLoss, Loss] = {
    # Corrects, token by token, for samples of other weights; equals REINFORCE where p = q.
    "importance_sampling": Loss("-r A"),
    # No gradient for a token that has already moved out of the clip range. arXiv:1707.06347
    "ppo": Loss("-min(r A, clip(r) A)", CLIP_SETTINGS),
    # Clips the weight of a token and keeps its gradient. arXiv:2506.13585
    "cispo": Loss("-clip(r) p A, without a gradient through r", CLIP_SETTINGS),
    # As ppo, with one ratio per sequence: the geometric mean over its sampled tokens. The mask says
    # which tokens those are. arXiv:2507.18071
    "gspo": Loss(
        "-min(s A, clip(s) A), where s is the ratio of the whole sequence",
        CLIP_SETTINGS,
        {"sequence_ratio_mask": "mask"},
    ),
    # A quadratic penalty holds the policy to the sampler instead of a clip range. arXiv:2405.19107
    "dro": Loss("-(p A - beta / 2 (p - q)^2)", ("beta",)),
    # Some services only: its formula is not public.
    "stable_reinforce": Loss("not public", needs_sampling_records=True, on_local_service=False),
}


# ---- named algorithms ----


@dataclass(frozen=True)
class Algorithm:
    """The settings of a run that make a published algorithm."""

    advantage_estimator: AdvantageEstimator
    length_normalization: LengthNormalization
    loss_fn: RLLoss
    loss_fn_config: dict[str, float] | None = None
    """None: the defaults of the service."""
    remove_constant_reward_groups: bool = False
    source: str = ""
    differs: str = ""
    """What the published algorithm has and these settings do not give."""

    def settings(self) -> dict[str, Any]:
        """Return the fields as keyword arguments of `rl.train.Config`."""
        names = (
            "advantage_estimator",
            "length_normalization",
            "loss_fn",
            "loss_fn_config",
            "remove_constant_reward_groups",
        )
        return {name: getattr(self, name) for name in names}


ALGORITHMS: dict[str, Algorithm] = {
    "reinforce": Algorithm(  # the default of every run
        "group_mean", "none", "importance_sampling", source="arXiv:2503.20783 without clipping"
    ),
    "rloo": Algorithm("leave_one_out", "none", "importance_sampling", source="arXiv:2402.14740"),
    "grpo": Algorithm(
        "group_std",
        "trajectory",
        "ppo",
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        source="arXiv:2402.03300",
        differs="a KL term in the loss; set kl_penalty_coef and kl_reference_config instead",
    ),
    "dr_grpo": Algorithm(
        "group_mean",
        "none",
        "ppo",
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        source="arXiv:2503.20783",
    ),
    "dapo": Algorithm(
        "group_std",
        "batch",
        "ppo",
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28},
        remove_constant_reward_groups=True,
        source="arXiv:2503.14476",
        differs="new groups instead of those with equal rewards, and a penalty for long replies; "
        "set max_refill_rounds and overlong_buffer",
    ),
    "cispo": Algorithm(
        "group_std",
        "batch",
        "cispo",
        {"clip_low_threshold": 0.0},
        source="arXiv:2506.13585",
        differs="the upper bound, which the paper does not state",
    ),
    "gspo": Algorithm(
        "group_std",
        "trajectory",
        "gspo",
        {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
        source="arXiv:2507.18071",
    ),
    "dro": Algorithm(
        "group_mean",
        "none",
        "dro",
        {"beta": 0.05},
        source="arXiv:2405.19107",
        differs="a learned value function as baseline; here it is the group's mean",
    ),
}
"""Published algorithms by name: `train.Config(**ALGORITHMS["grpo"].settings(), ...)`.

Losses sum over tokens where papers take means over replies and batches. That is a constant factor
on the gradient, which Adam divides out.
"""


# ---- advantages ----


def center_rewards(rewards_G: np.ndarray) -> np.ndarray:
    """Subtract the group's mean reward.

    Args:
        rewards_G: float [G].

    Returns:
        float32 [G] with sum 0. Equal rewards and a group of one give 0, hence no gradient.

    Source: arXiv:2402.03300 (GRPO). arXiv:2503.20783 explains why not to divide by the standard
    deviation: that gives tasks more weight if they are nearly solved or nearly hopeless.
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
    """Subtract the mean reward of the other members, which is an unbiased baseline.

    The result is `center_rewards` times G / (G - 1). A group of one gives 0.

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


# ---- length ----


def compute_length_scale(
    num_action_tokens: Sequence[int], normalization: LengthNormalization
) -> np.ndarray:
    """Return the factor on each trajectory's advantage.

    The losses sum over tokens. With `none`, every token has the same weight, whatever the length of
    its reply. `trajectory` divides by the number of tokens of the trajectory: every reply has the
    same weight, and a token of a long reply less. `batch` divides by the mean number of tokens per
    trajectory: every token has the same weight, on a scale that does not depend on the lengths.

    Args:
        num_action_tokens: Number of sampled tokens of each trajectory of the batch.
        normalization: `none`, `trajectory` or `batch`.

    Returns:
        float32, one per trajectory.

    Raises:
        ConfigurationError: if the normalization is unknown.

    Source: `trajectory` arXiv:2402.03300 (GRPO); `none` arXiv:2503.20783 (Dr. GRPO); `batch`
    arXiv:2503.14476 (the token-level loss of DAPO, up to the number of trajectories).
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
