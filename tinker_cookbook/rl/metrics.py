"""Divergence between sampler and trainer, entropy, and the KL penalty. D datums, T positions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.rl.data_processing import flatten_chunks, unflatten_chunks
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.sdk_compat import call

if TYPE_CHECKING:
    import tinker

__all__ = [
    "SamplingGap",
    "add_to_advantages",
    "compute_kl_sample_train",
    "compute_post_kl",
    "discounted_future_sum_vectorized",
    "incorporate_kl_penalty",
    "measure_sampling_gap",
    "score_sequences",
]


@trace.scope
async def score_sequences(
    sampling_client: tinker.SamplingClient, sequence_inputs: list[tinker.ModelInput]
) -> list[list[float | None]]:
    """Return the log probability of every token of each sequence; None for the first token."""
    import tinker

    params = tinker.SamplingParams(max_tokens=1)
    responses = await asyncio.gather(
        *(
            call(
                sampling_client,
                "sample",
                prompt=sequence,
                num_samples=1,
                sampling_params=params,
                include_prompt_logprobs=True,
            )
            for sequence in sequence_inputs
        )
    )
    return [list(response.prompt_logprobs) for response in responses]


def compute_kl_sample_train(
    data_D: Sequence[tinker.Datum], training_logprobs_D: Sequence[np.ndarray]
) -> dict[str, float]:
    """Compare the sampler's log probabilities of the sampled tokens with the trainer's.

    Args:
        data_D: Datums with `logprobs` (the sampler's) and `mask`.
        training_logprobs_D: float [T] each, from a forward pass with the sampled weights.

    Returns:
        `optim/kl_sample_train_v1`: mean of q - p, q the sampler's and p the trainer's.
        `optim/kl_sample_train_v2`: mean of (q - p)^2 / 2, in which differences cannot cancel.
        `optim/entropy`: mean of -q, an estimate of the sampler's entropy per token.
        Empty without sampled tokens.

    Source: estimators k1 and k2 of http://joschu.net/blog/kl-approx.html.
    """
    sampled, difference = _compare(data_D, training_logprobs_D)
    if not len(sampled):
        return {}
    return {
        "optim/kl_sample_train_v1": float(difference.mean()),
        "optim/kl_sample_train_v2": float(0.5 * (difference**2).mean()),
        "optim/entropy": float(-sampled.mean()),
    }


@dataclass(frozen=True)
class SamplingGap:
    """The difference between sampler and trainer on the same weights, in nats per token.

    It is the floor of every measurement that compares the two. If both compute in the same number
    format, it is zero up to rounding.
    """

    mean: float
    largest: float
    half_mean_square: float
    """The value of `optim/kl_sample_train_v2` on the same weights."""
    num_tokens: int

    def describe(self) -> str:
        """Return a line for the start of a run."""
        return (
            f"floor    sampler and trainer differ by {self.mean:.1e} nats per token on the same "
            f"weights (at most {self.largest:.1e}; {self.num_tokens:,} tokens)"
        )


def measure_sampling_gap(
    data_D: Sequence[tinker.Datum], training_logprobs_D: Sequence[np.ndarray]
) -> SamplingGap | None:
    """Measure the gap on datums that the trainer scored with the weights that sampled them.

    Args:
        data_D: Datums with `logprobs` (the sampler's) and `mask`.
        training_logprobs_D: float [T] each.

    Returns:
        The gap, or None without sampled tokens.
    """
    sampled, difference = _compare(data_D, training_logprobs_D)
    if not len(sampled):
        return None
    size = np.abs(difference)
    return SamplingGap(
        mean=float(size.mean()),
        largest=float(size.max()),
        half_mean_square=float(0.5 * (size**2).mean()),
        num_tokens=len(size),
    )


def _compare(
    data_D: Sequence[tinker.Datum], training_logprobs_D: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 [N] of all sampled tokens: the sampler's logprobs, and their difference.

    The difference is the sampler's log probability minus the trainer's.
    """
    sampled, trained = [np.zeros(0)], [np.zeros(0)]
    for datum, training_logprobs_T in zip(data_D, training_logprobs_D, strict=True):
        kept_T = datum.loss_fn_inputs["mask"].to_numpy() > 0
        inputs = datum.loss_fn_inputs  # a correction keeps the sampler's under another name
        sampler_T = inputs.get("sampler_logprobs", inputs["logprobs"]).to_numpy()
        sampled.append(sampler_T[kept_T].astype(np.float64))
        trained.append(np.asarray(training_logprobs_T)[kept_T].astype(np.float64))
    sampled_N = np.concatenate(sampled)
    return sampled_N, sampled_N - np.concatenate(trained)


@trace.scope
async def compute_post_kl(
    data_D: Sequence[tinker.Datum], post_sampling_client: tinker.SamplingClient
) -> dict[str, float]:
    """Measure how far the step moved the policy on the sampled tokens (estimators k1 and k2).

    Args:
        data_D: The step's datums.
        post_sampling_client: The weights after the step.
    """
    differences = await _differences(data_D, post_sampling_client)
    difference = np.concatenate([diff_T[kept_T] for diff_T, kept_T in differences])
    if not len(difference):
        return {}
    return {
        "kl_pre_post_v1": float(difference.mean()),
        "kl_pre_post_v2": float(0.5 * (difference**2).mean()),
    }


@trace.scope
async def incorporate_kl_penalty(
    data_D: list[tinker.Datum],
    base_sampling_client: tinker.SamplingClient,
    kl_penalty_coef: float,
    kl_discount_factor: float,
) -> tuple[list[tinker.Datum], dict[str, float]]:
    """Change the advantages so that the policy stays close to a reference model.

    `coef * (mean difference - its difference)` is added to the advantage of each sampled token,
    where the difference is the sampler's log probability minus the reference's. The mean is the
    baseline: on average the penalty does not change the advantages.

    Args:
        data_D: Datums with `logprobs`, `advantages` and `mask`.
        base_sampling_client: The reference model.
        kl_penalty_coef: Coefficient of the penalty.
        kl_discount_factor: Discount factor of later penalties: above 0, the penalties of later
            tokens count towards a token too.

    Returns:
        New datums, and the mean difference as `kl_policy_base`.
    """
    differences = await _differences(data_D, base_sampling_client)
    total = sum(float(diff_T[kept_T].sum()) for diff_T, kept_T in differences)
    count = sum(int(kept_T.sum()) for _, kept_T in differences)
    mean = total / max(count, 1)
    penalized_D = []
    for datum, (difference_T, kept_T) in zip(data_D, differences, strict=True):
        penalty_T = kl_penalty_coef * kept_T * (mean - difference_T)
        if kl_discount_factor > 0:
            penalty_T = discounted_future_sum_vectorized(penalty_T, kl_discount_factor) * kept_T
        penalized_D.append(add_to_advantages(datum, penalty_T))
    return penalized_D, {"kl_policy_base": mean}


def discounted_future_sum_vectorized(x: np.ndarray, gamma: float) -> np.ndarray:
    """Return y[t] = x[t] + gamma * x[t + 1] + gamma^2 * x[t + 2] + ...

    Args:
        x: float [T].
        gamma: Discount, 0 to 1.

    Returns:
        [T], in float64 if x is, else float32.
    """
    x = np.asarray(x)
    sums = np.empty(len(x), dtype=np.float64)
    following = 0.0
    for index in range(len(x) - 1, -1, -1):
        following = float(x[index]) + gamma * following
        sums[index] = following
    return sums if x.dtype == np.float64 else sums.astype(np.float32)


async def _differences(
    data_D: Sequence[tinker.Datum], sampling_client: tinker.SamplingClient
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return per datum the sampler's minus the client's logprobs, and which positions count."""
    sequences = [_whole_sequence(datum) for datum in data_D]
    scores_D = await score_sequences(sampling_client, sequences)
    differences = []
    for datum, scores in zip(data_D, scores_D, strict=True):
        # Position i of a datum predicts token i + 1, whose log probability is the i + 1st score.
        scores_T = np.asarray([np.nan if s is None else s for s in scores[1:]], dtype=np.float64)
        kept_T = datum.loss_fn_inputs["mask"].to_numpy() > 0
        difference_T = datum.loss_fn_inputs["logprobs"].to_numpy().astype(np.float64) - scores_T
        differences.append((np.where(kept_T, difference_T, 0.0), kept_T))
    return differences


def _whole_sequence(datum: tinker.Datum) -> tinker.ModelInput:
    """Return all tokens of the datum: its input and the last target."""
    last = int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])
    return unflatten_chunks([*flatten_chunks(datum.model_input.chunks), last])


def add_to_advantages(datum: tinker.Datum, added_T: np.ndarray) -> tinker.Datum:
    """Return a datum with a number added to the advantage of each position."""
    import dataclasses

    import tinker

    advantages_T = datum.loss_fn_inputs["advantages"].to_numpy() + added_T.astype(np.float32)
    inputs = {
        **datum.loss_fn_inputs,
        "advantages": tinker.TensorData.from_numpy(advantages_T.astype(np.float32)),
    }
    if dataclasses.is_dataclass(datum):
        return dataclasses.replace(datum, loss_fn_inputs=inputs)
    return datum.model_copy(update={"loss_fn_inputs": inputs})
