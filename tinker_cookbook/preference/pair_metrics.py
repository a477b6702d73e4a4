"""Metrics of pairs, and what they warn of."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from tinker_cookbook.preference.losses import PairBatch, PairLoss

__all__ = ["DisplacementWatch", "compute_pair_metrics"]

logger = logging.getLogger(__name__)

DISPLACED_NATS = 5.0
"""Chosen completions count as displaced when they have lost this much log probability."""


def compute_pair_metrics(batch: PairBatch, loss: PairLoss, beta: float) -> dict[str, float]:
    """Return the metrics of pairs under a model.

    Rewards are the implicit rewards of DPO: `beta` times the log ratio to the reference. A pair
    whose completions have equal rewards counts as half right.
    """
    chosen_P, rejected_P = batch.chosen_log_ratio_P, batch.rejected_log_ratio_P
    difference_P = chosen_P - rejected_P
    longer_P = batch.chosen_length_P - batch.rejected_length_P
    return {
        "dpo_loss": float(loss.loss_P.mean()),
        "accuracy": float(((difference_P > 0) + 0.5 * (difference_P == 0)).mean()),
        "margin": beta * float(difference_P.mean()),
        "chosen_reward": beta * float(chosen_P.mean()),
        "rejected_reward": beta * float(rejected_P.mean()),
        "chosen_log_ratio": float(chosen_P.mean()),
        "rejected_log_ratio": float(rejected_P.mean()),
        "chosen_log_ratio_per_token": float(chosen_P.sum() / batch.chosen_length_P.sum()),
        "chosen_length": float(batch.chosen_length_P.mean()),
        "rejected_length": float(batch.rejected_length_P.mean()),
        "margin_length_correlation": _correlation(difference_P, longer_P),
        "num_pairs": len(chosen_P),
    }


class DisplacementWatch:
    """Warns once when the margin grows because both completions become unlikely.

    Source: likelihood displacement, arXiv:2410.08847.
    """

    def __init__(self) -> None:
        self._has_warned = False

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Look at the metrics of a step."""
        if self._has_warned or metrics["chosen_log_ratio"] > -DISPLACED_NATS:
            return
        if metrics["margin"] > 0:
            self._has_warned = True
            logger.warning(
                "step %d: chosen completions have become less likely than under the reference "
                "(%.1f nats on average) while the margin grows (%.2f). Replies may degrade: lower "
                "learning_rate, raise dpo_beta, or use a loss with a supervised term "
                "(dpo_with_nll, cpo, orpo).",
                step,
                metrics["chosen_log_ratio"],
                metrics["margin"],
            )


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Pearson correlation; 0 where one of them does not vary."""
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
