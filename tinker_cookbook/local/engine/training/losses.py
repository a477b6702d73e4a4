"""The loss functions. Each is one pure function and one `Loss` record; no other module names them.

A loss is a function of `(training_logprobs, inputs, config)`. It returns one value per position;
the loss of a batch is the plain sum over positions, data and calls, never a mean. Gradients come
from autograd over these small tensors. All tensors are float32 (int64 where declared) of shape [M],
one row per position, or [M, K] where a position may have several targets.

Legend: p training logprob, q sampling logprob, r = exp(p - q), A advantage, w weight.

To add a loss, write its function and its record below; docs/adding_a_loss.md has an example.
Source: the Tinker documentation of its losses (tinker-docs.thinkingmachines.ai/tinker/losses).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

__all__ = ["CUSTOM", "LOSSES", "UNAVAILABLE", "Config", "Inputs", "Loss", "Setting"]

Inputs = Mapping[str, torch.Tensor]
"""The declared inputs by name, and `sequence`, which numbers the data of the rows."""
Config = Mapping[str, float]
"""All settings of the loss; those that a request leaves out have their defaults."""
InputType = Literal["float32", "int64"]


@dataclass(frozen=True)
class Setting:
    """A number that `loss_fn_config` may set."""

    default: float
    low: float = 0.0
    high: float = math.inf
    """Bounds of accepted values, inclusive; only finite values are accepted."""
    per_token: bool = False
    """A datum may also give it per position, as a float32 loss input with the same name."""


@dataclass(frozen=True)
class Loss:
    """A loss function, and everything that the rest of the engine needs to know about it."""

    compute: Callable[[torch.Tensor, Inputs, Config], torch.Tensor]
    inputs: Mapping[str, InputType]
    """Keys of `loss_fn_inputs` that each datum must have, in addition to `target_tokens`. They have
    the shape of `target_tokens`."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Keys of `loss_fn_config`; no other keys are accepted."""
    ordered: tuple[str, str] | None = None
    """Two settings of which the first must not be above the second."""
    driver: str = ""
    """An input whose zeros mean that a position has no gradient, so its backward pass is skipped.
    Empty: every position has a gradient."""
    multi_target: bool = False
    """Whether `target_tokens` may be [N, K]."""
    by_sequence: bool = False
    """Whether a position's gradient depends on other positions of its datum."""

    @property
    def per_token_settings(self) -> tuple[str, ...]:
        """Settings that a datum may also give per position."""
        return tuple(name for name, setting in self.settings.items() if setting.per_token)


def cross_entropy(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """Return `-w p`, the weighted negative log likelihood; weights may be negative."""
    return -inputs["weights"] * training_logprobs


def importance_sampling(
    training_logprobs: torch.Tensor, inputs: Inputs, config: Config
) -> torch.Tensor:
    """Return `-r A`."""
    return -_ratio(training_logprobs, inputs) * inputs["advantages"]


def ppo(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """Return `-min(r A, clamp(r) A)` (arXiv:1707.06347)."""
    ratio = _ratio(training_logprobs, inputs)
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clamp(ratio, inputs, config) * advantages)


def cispo(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """Return `-clamp(r) p A`, without a gradient through the ratio (arXiv:2506.13585)."""
    ratio = _ratio(training_logprobs.detach(), inputs)
    return -_clamp(ratio, inputs, config) * training_logprobs * inputs["advantages"]


def dro(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """Return `-(p A - beta / 2 (p - q)^2)` (arXiv:2405.19107)."""
    drift = training_logprobs - inputs["logprobs"]
    return -(training_logprobs * inputs["advantages"] - 0.5 * config["beta"] * drift.square())


def gspo(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """Return PPO's loss with one ratio per sequence: the geometric mean of r over its positions.

    The mean counts positions whose `sequence_ratio_mask` is not 0. Each token keeps its own
    gradient, as `exp(p - stop_gradient(p))` is 1 with the gradient of p (arXiv:2507.18071).
    """
    counted = (inputs["sequence_ratio_mask"] != 0).to(training_logprobs.dtype)
    sequence = inputs["sequence"].long()
    num_sequences = int(sequence.max()) + 1
    drift = (training_logprobs.detach() - inputs["logprobs"]) * counted
    zeros = drift.new_zeros(num_sequences)
    totals = zeros.index_add(0, sequence, drift)
    counts = zeros.index_add(0, sequence, counted).clamp(min=1)
    sequence_ratio = (totals / counts).exp()[sequence]
    ratio = sequence_ratio * (training_logprobs - training_logprobs.detach()).exp()
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clamp(ratio, inputs, config) * advantages)


def _ratio(training_logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return (training_logprobs - inputs["logprobs"]).exp()


def _clamp(ratio: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """Bound the ratio itself; a bound given per token replaces the configured one."""
    low, high = (
        inputs[key] if key in inputs else ratio.new_tensor(config[key])
        for key in ("clip_low_threshold", "clip_high_threshold")
    )
    return torch.minimum(torch.maximum(ratio, low), high)


def _no_formula(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    raise AssertionError("custom_loss computes uploaded losses")


_RL: dict[str, InputType] = {"logprobs": "float32", "advantages": "float32"}
_RL_GSPO: dict[str, InputType] = {**_RL, "sequence_ratio_mask": "float32"}
# Clip bounds of gspo and beta of dro have no documented default; these are this service's.
_CLIP = {
    "clip_low_threshold": Setting(0.8, per_token=True),
    "clip_high_threshold": Setting(1.2, per_token=True),
}
_CLIP_ORDER = ("clip_low_threshold", "clip_high_threshold")

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        cross_entropy, {"weights": "float32"}, driver="weights", multi_target=True
    ),
    "importance_sampling": Loss(importance_sampling, _RL, driver="advantages", multi_target=True),
    "ppo": Loss(ppo, _RL, _CLIP, _CLIP_ORDER, driver="advantages"),
    "cispo": Loss(cispo, _RL, _CLIP, _CLIP_ORDER, driver="advantages"),
    "dro": Loss(dro, _RL, {"beta": Setting(0.05)}),
    "gspo": Loss(gspo, _RL_GSPO, _CLIP, _CLIP_ORDER, driver="advantages", by_sequence=True),
}
"""`loss_fn` of a request -> the loss."""

UNAVAILABLE = {"stable_reinforce": "its formula is not public"}
"""Losses that the SDK names but this service lacks -> the reason."""

CUSTOM = Loss(_no_formula, {}, multi_target=True, by_sequence=True)
"""The record of every uploaded loss; `custom_loss` computes them."""
