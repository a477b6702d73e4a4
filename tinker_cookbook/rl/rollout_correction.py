"""Corrects for samples that do not come from the policy that the trainer updates.

The sampler's log probabilities q of the sampled tokens differ from the trainer's p if the sampler
uses older weights (asynchronous loop) or computes differently (another number format, other
kernels). With a correction, the trainer scores the batch once before the update. Each advantage is
multiplied by a weight made of the ratio exp(p - q), and p replaces q as the policy that the loss
compares with, so that clipping measures only what the update itself changes.

| correction          | weight of a token                                                      |
|---------------------|------------------------------------------------------------------------|
| `token_truncate`    | min(r, limit), with r = exp(p - q) of the token                        |
| `token_mask`        | r if 1 / limit <= r <= limit, else the token is not trained on         |
| `sequence_truncate` | min(R, limit), with R the product of all r of the datum                |
| `sequence_mask`     | R if 1 / limit <= R <= limit, else the datum is not trained on         |

Sources: truncation, F. Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
RL Training" (fengyao.notion.site/off-policy-rl); masks and sequence weights, J. Liu et al. 2025,
"When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from tinker_cookbook.utils import trace
from tinker_cookbook.utils.sdk_compat import awaitable

if TYPE_CHECKING:
    import tinker

__all__ = ["RolloutCorrection", "compute_correction_weights", "correct_rollouts"]

RolloutCorrection: TypeAlias = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]

MAX_LOG_RATIO = 20.0
"""Larger log ratios are treated as this one, so that a weight stays finite."""


def compute_correction_weights(
    log_ratio_T: np.ndarray, sampled_T: np.ndarray, correction: RolloutCorrection, limit: float
) -> np.ndarray:
    """Return the weight of each position of one datum.

    Args:
        log_ratio_T: float [T], the trainer's minus the sampler's log probability.
        sampled_T: bool [T], which positions were sampled; the others get weight 0.
        correction: The kind of weight; see the table of this module.
        limit: Largest weight, above 1.

    Returns:
        float64 [T]; 0 for what is not trained on.
    """
    log_ratio_T = np.where(sampled_T, log_ratio_T, 0.0).astype(np.float64)
    if correction.startswith("sequence"):
        log_ratio_T = np.full(len(log_ratio_T), log_ratio_T.sum())
    ratio_T = np.exp(np.clip(log_ratio_T, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    if correction.endswith("truncate"):
        weight_T = np.minimum(ratio_T, limit)
    else:
        weight_T = np.where((ratio_T >= 1 / limit) & (ratio_T <= limit), ratio_T, 0.0)
    return np.where(sampled_T, weight_T, 0.0)


@trace.scope
async def correct_rollouts(
    data_D: Sequence[tinker.Datum],
    training_client: tinker.TrainingClient,
    correction: RolloutCorrection,
    limit: float,
) -> tuple[list[tinker.Datum], dict[str, float]]:
    """Score a batch with the trainer, and weight its advantages.

    Args:
        data_D: Datums with `target_tokens`, `logprobs`, `advantages` and `mask`.
        training_client: The policy before the update.
        correction: The kind of weight.
        limit: Largest weight.

    Returns:
        New datums, in which `logprobs` are the trainer's and `sampler_logprobs` are the sampler's;
        and the metrics `correction/weight` (mean weight of the sampled tokens),
        `correction/limited` (share of the tokens that were truncated or masked) and
        `correction/kl` (mean of q - p).
    """
    if not data_D:
        return [], {}
    output = await awaitable(
        training_client.forward([_scored(datum) for datum in data_D], "cross_entropy")
    )
    corrected_D, weights, ratios = [], [], []
    for datum, scores in zip(data_D, output.loss_fn_outputs, strict=True):
        trainer_T = scores["logprobs"].to_numpy().astype(np.float64)
        sampled_T = datum.loss_fn_inputs["mask"].to_numpy() > 0
        log_ratio_T = trainer_T - datum.loss_fn_inputs["logprobs"].to_numpy()
        weight_T = compute_correction_weights(log_ratio_T, sampled_T, correction, limit)
        corrected_D.append(_corrected(datum, trainer_T, weight_T))
        weights.append(weight_T[sampled_T])
        ratios.append(log_ratio_T[sampled_T])
    weight_N, log_ratio_N = np.concatenate(weights), np.concatenate(ratios)
    limited_N = (weight_N == 0) | (weight_N == limit)
    return corrected_D, {
        "correction/weight": float(weight_N.mean()),
        "correction/limited": float(limited_N.mean()),
        "correction/kl": float(-log_ratio_N.mean()),
    }


def _scored(datum: tinker.Datum) -> tinker.Datum:
    """Return the datum as the loss `cross_entropy` takes it."""
    import tinker

    inputs = {
        "target_tokens": datum.loss_fn_inputs["target_tokens"],
        "weights": datum.loss_fn_inputs["mask"],
    }
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def _corrected(datum: tinker.Datum, trainer_T: np.ndarray, weight_T: np.ndarray) -> tinker.Datum:
    import tinker

    old = datum.loss_fn_inputs
    sampled_T = old["mask"].to_numpy() > 0
    changed = {
        "logprobs": np.where(sampled_T, trainer_T, 0.0),
        "advantages": old["advantages"].to_numpy() * weight_T,
        "sampler_logprobs": old["logprobs"].to_numpy(),
    }
    inputs = {
        name: tinker.TensorData.from_numpy(np.asarray(values, dtype=np.float32))
        for name, values in changed.items()
    }
    return tinker.Datum(
        model_input=datum.model_input,
        loss_fn_inputs={**old, **inputs},
        model_input_spans=getattr(datum, "model_input_spans", None),
        loss_fn_input_spans=getattr(datum, "loss_fn_input_spans", None),
    )
