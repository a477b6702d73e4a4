"""The loss functions: from the trainer's logprobs of the targets to one loss value per position.

Each is a pure function of `(training_logprobs, inputs, config)`; all tensors are float32 [M] or,
where several targets per position are allowed, [M, K]. The loss of a batch is the plain sum: over
positions, data and calls, never a mean. Gradients come from autograd over these small tensors.

Source: the Tinker documentation of its losses (tinker-docs.thinkingmachines.ai/tinker/losses).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["CUSTOM", "LOSSES", "BuiltInPackLoss", "Loss", "loss_and_gradient"]

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]


def cross_entropy(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """`-w p`: negative log likelihood, weighted; any real weight is allowed."""
    return -inputs["weights"] * training_logprobs


def importance_sampling(
    training_logprobs: torch.Tensor, inputs: Inputs, config: Config
) -> torch.Tensor:
    """`-r A` with the ratio `r = exp(p - q)` of trainer and sampler."""
    return -_ratio(training_logprobs, inputs) * inputs["advantages"]


def ppo(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """`-min(r A, clamp(r) A)`, token by token (arXiv:1707.06347)."""
    ratio = _ratio(training_logprobs, inputs)
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clamp(ratio, inputs, config) * advantages)


def cispo(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """`-clamp(r) p A` without a gradient through the ratio (arXiv:2506.13585)."""
    ratio = _ratio(training_logprobs.detach(), inputs)
    return -_clamp(ratio, inputs, config) * training_logprobs * inputs["advantages"]


def dro(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """`-(p A - beta / 2 (p - q)^2)` (arXiv:2405.19107)."""
    drift = training_logprobs - inputs["logprobs"]
    return -(training_logprobs * inputs["advantages"] - 0.5 * config["beta"] * drift.square())


def gspo(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """PPO with one ratio per sequence: the geometric mean over its masked positions.

    `inputs["sequence"]` numbers the sequences; the mean counts positions whose
    `sequence_ratio_mask` is not 0. Each token keeps its own gradient (arXiv:2507.18071).
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
    """Bounds are on the ratio itself; a bound given per token replaces the configured one."""
    low, high = (
        inputs[key] if key in inputs else ratio.new_tensor(config[key])
        for key in ("clip_low_threshold", "clip_high_threshold")
    )
    return torch.minimum(torch.maximum(ratio, low), high)


def _no_formula(training_logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    raise AssertionError("an uploaded loss is computed by graph_loss")


@dataclass(frozen=True)
class Loss:
    """A loss function and what it takes."""

    compute: Callable[[torch.Tensor, Inputs, Config], torch.Tensor]
    required_inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Settings with their defaults; no other settings are accepted."""
    multi_target: bool = False
    """Targets may be [N, K]."""
    by_sequence: bool = False
    """A position's gradient depends on the other positions of its datum."""
    driver: str = "advantages"
    """The input whose zeros mean: no gradient at this position."""

    @property
    def compares(self) -> bool:
        """Whether it may set the trainer's logprobs against others, such as the sampler's."""
        return "weights" not in self.required_inputs


_RL_INPUTS = ("logprobs", "advantages")
_CLIP_INPUTS = ("clip_low_threshold", "clip_high_threshold")
_CLIP_DEFAULTS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("weights",), (), {}, multi_target=True, driver="weights"),
    "importance_sampling": Loss(importance_sampling, _RL_INPUTS, (), {}, multi_target=True),
    "ppo": Loss(ppo, _RL_INPUTS, _CLIP_INPUTS, _CLIP_DEFAULTS),
    "cispo": Loss(cispo, _RL_INPUTS, _CLIP_INPUTS, _CLIP_DEFAULTS),
    "dro": Loss(dro, _RL_INPUTS, (), {"beta": 0.05}, driver=""),
    "gspo": Loss(
        gspo,
        (*_RL_INPUTS, "sequence_ratio_mask"),
        _CLIP_INPUTS,
        _CLIP_DEFAULTS,
        by_sequence=True,
    ),
}
"""Clip bounds of gspo and beta of dro have no documented default; these are this service's."""

CUSTOM = Loss(_no_formula, (), multi_target=True, by_sequence=True, driver="")
"""Stands for uploaded losses, which `graph_loss` computes."""


def loss_and_gradient(
    loss: Loss, training_logprobs: torch.Tensor, inputs: Inputs, config: Config
) -> tuple[float, torch.Tensor]:
    """The summed loss and its gradient with respect to the logprobs."""
    leaf = training_logprobs.detach().requires_grad_()
    with torch.enable_grad():
        values = loss.compute(leaf, inputs, config)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return float(values.detach().double().sum()), gradient


class BuiltInPackLoss:
    """A loss of `LOSSES` for one pack, asked for its gradient slice by slice."""

    def __init__(self, loss: Loss, config: Config, inputs: Inputs) -> None:
        """`inputs` are float32 [M, K] (and `sequence` [M, 1])."""
        self.by_sequence = loss.by_sequence
        self.compares = loss.compares
        self.total = 0.0
        self.metrics: dict[str, float] = {}
        self._loss, self._config, self._inputs = loss, config, inputs
        self._gradient: torch.Tensor | None = None

    def see_all(self, training_logprobs: torch.Tensor) -> None:
        """Compute everything at once, from logprobs [M, 1]; for losses `by_sequence`."""
        inputs = {name: values[:, 0] for name, values in self._inputs.items()}
        self.total, gradient = loss_and_gradient(
            self._loss, training_logprobs[:, 0], inputs, self._config
        )
        self._gradient = gradient[:, None]

    def gradient(self, rows: slice, training_logprobs: torch.Tensor) -> torch.Tensor:
        """[C, K] for the logprobs [C, K] of these rows; adds their loss to `total`."""
        if self._gradient is not None:
            return self._gradient[rows]
        inputs = {name: values[rows] for name, values in self._inputs.items()}
        value, gradient = loss_and_gradient(self._loss, training_logprobs, inputs, self._config)
        self.total += value
        return gradient
