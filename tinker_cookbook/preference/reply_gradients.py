"""From the KTO loss of rated replies to a gradient on the service, without torch in the client.

A batch of S replies comes with S mismatched replies: prompts with the completions of other prompts.
The mean log ratio of those estimates how far the model is from its reference. They are scored first
and get no gradient.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.preference.losses import SingleBatch, SingleLoss, estimate_kl
from tinker_cookbook.preference.pair_gradients import weighted_sums
from tinker_cookbook.runs.custom_gradient import submit_custom_gradient

if TYPE_CHECKING:
    import tinker

__all__ = ["ReplyLossFunction", "ReplyStep", "compute_reply_metrics", "submit_reply_gradient"]

ReplyLossFunction = Callable[[SingleBatch], SingleLoss]


@dataclass(frozen=True)
class ReplyStep:
    """A step on rated replies whose gradient has been submitted."""

    batch: SingleBatch
    loss: SingleLoss
    gradients: list[tinker.APIFuture[tinker.ForwardBackwardOutput]]
    """Await these before the step counts as done."""


async def submit_reply_gradient(
    client: tinker.TrainingClient,
    data: Sequence[tinker.Datum],
    is_good_S: np.ndarray,
    reference_logprobs: np.ndarray,
    loss: ReplyLossFunction,
) -> ReplyStep:
    """Submit the gradient of the mean loss over the replies of a batch.

    Args:
        client: The model in training.
        data: 2S datums, replies and mismatched replies in turns.
        is_good_S: Booleans.
        reference_logprobs: float64 [2S], sequence log probabilities under the reference model.
        loss: The loss of each reply.

    Returns:
        Losses and log ratios from before the step. The gradient requests are in the queue of the
        service: an `optim_step` submitted now applies them.
    """
    replies, mismatched = list(data[0::2]), list(data[1::2])
    reference_S, reference_mismatched = reference_logprobs[0::2], reference_logprobs[1::2]
    # Submitted first, so the service has scored them before the first half of the replies.
    scoring = client.forward(mismatched, "cross_entropy")
    parts: list[tuple[SingleBatch, SingleLoss]] = []
    kl: asyncio.Task[float] | None = None

    async def estimate() -> float:
        outputs = (await scoring).loss_fn_outputs
        found = [output["logprobs"].to_numpy() for output in outputs]
        return estimate_kl(weighted_sums(mismatched, found) - reference_mismatched)

    async def weigh(part: slice, logprobs: list[np.ndarray]) -> list[np.ndarray]:
        nonlocal kl
        kl = kl or asyncio.create_task(estimate())
        ratio_S = weighted_sums(replies[part], logprobs) - reference_S[part]
        batch = SingleBatch(ratio_S, is_good_S[part], await kl)
        result = loss(batch)
        parts.append((batch, result))
        return [
            -slope / len(replies) * datum.loss_fn_inputs["weights"].to_numpy()
            for datum, slope in zip(replies[part], result.by_log_ratio_S, strict=True)
        ]

    gradients = await submit_custom_gradient(client, replies, weigh)
    batch = SingleBatch(
        np.concatenate([batch.log_ratio_S for batch, _ in parts]),
        is_good_S,
        parts[0][0].kl_baseline,
    )
    joined = SingleLoss(
        np.concatenate([result.loss_S for _, result in parts]),
        np.concatenate([result.by_log_ratio_S for _, result in parts]),
    )
    return ReplyStep(batch, joined, gradients)


def compute_reply_metrics(batch: SingleBatch, loss: SingleLoss, beta: float) -> dict[str, float]:
    """Return the metrics of rated replies under a model.

    Rewards are `beta` times the log ratio to the reference. `accuracy` is the share of all couples
    of a good and a bad reply in which the good one has the larger reward (equal ones count half);
    metrics that need a kind of reply that the batch lacks are left out.
    """
    good, bad = batch.log_ratio_S[batch.is_good_S], batch.log_ratio_S[~batch.is_good_S]
    metrics = {
        "dpo_loss": float(loss.loss_S.mean()),
        "kl_baseline": batch.kl_baseline,
        "num_good": len(good),
        "num_bad": len(bad),
    }
    for name, ratios in (("chosen", good), ("rejected", bad)):
        if len(ratios):
            metrics[f"{name}_reward"] = beta * float(ratios.mean())
            metrics[f"{name}_log_ratio"] = float(ratios.mean())
    if len(good) and len(bad):
        difference = good[:, None] - bad[None, :]
        metrics["accuracy"] = float(((difference > 0) + 0.5 * (difference == 0)).mean())
        metrics["margin"] = beta * float(good.mean() - bad.mean())
    return metrics
