"""Preference losses: how much a model should prefer one completion to another.

Each loss is a pure function of NumPy arrays. The client does not need torch, and a test can compare
a loss with finite differences. To add one, write a function from `PairBatch` to `PairLoss`. Pass it
to the train loop, or add its builder to `PAIR_LOSSES`.

Axes: P pairs, S single completions. All arrays are float64. Log probabilities are natural logs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinker_cookbook.exceptions import ConfigurationError

__all__ = [
    "PAIR_LOSSES",
    "PairBatch",
    "PairLoss",
    "PairLossFunction",
    "SingleBatch",
    "SingleLoss",
    "check_kto",
    "cpo",
    "dpo",
    "dpo_with_nll",
    "estimate_kl",
    "hinge",
    "ipo",
    "kto",
    "length_corrected_dpo",
    "length_normalized_dpo",
    "orpo",
    "robust_dpo",
    "simpo",
]


@dataclass(frozen=True)
class PairBatch:
    """Pairs of completions of the same prompt, each completion as one number per model.

    A sequence log probability is the sum over the completion's tokens of weight times log
    probability; a length is the sum of the weights, which is the number of trained tokens.
    """

    chosen_P: np.ndarray
    """Sequence log probabilities of the better completions under the trained model."""
    rejected_P: np.ndarray
    """The same of the worse completions."""
    reference_chosen_P: np.ndarray
    """Sequence log probabilities of the better completions under the reference model."""
    reference_rejected_P: np.ndarray
    """The same of the worse completions."""
    chosen_length_P: np.ndarray
    """Trained tokens of the better completions; at least 1."""
    rejected_length_P: np.ndarray
    """Trained tokens of the worse completions; at least 1."""

    @property
    def chosen_log_ratio_P(self) -> np.ndarray:
        """Log probability of the better completions relative to the reference."""
        return self.chosen_P - self.reference_chosen_P

    @property
    def rejected_log_ratio_P(self) -> np.ndarray:
        """Log probability of the worse completions relative to the reference."""
        return self.rejected_P - self.reference_rejected_P

    @property
    def log_ratio_difference_P(self) -> np.ndarray:
        """How much more the trained model prefers the better completion than the reference does."""
        return self.chosen_log_ratio_P - self.rejected_log_ratio_P


@dataclass(frozen=True)
class PairLoss:
    """The loss of every pair, and its derivatives by the two sequence log probabilities."""

    loss_P: np.ndarray
    by_chosen_P: np.ndarray
    """Derivative of each pair's loss by the log probability of its better completion."""
    by_rejected_P: np.ndarray
    """Derivative of each pair's loss by the log probability of its worse completion."""


PairLossFunction = Callable[[PairBatch], PairLoss]


def dpo(
    *, beta: float = 0.1, label_smoothing: float = 0.0, reference_free: bool = False
) -> PairLossFunction:
    """Build direct preference optimization: -log sigmoid(beta h).

    h is `log_ratio_difference_P`. With `label_smoothing` e the loss is
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): a share e of the labels is wrong.

    Args:
        beta: Strength of the pull towards the reference model, above 0.
        label_smoothing: Assumed share of wrong labels, from 0 to below 0.5.
        reference_free: Take a reference that gives both completions the same probability.

    Source: arXiv:2305.18290; smoothing: "A note on DPO with noisy preferences", E. Mitchell, 2023.
    """
    _check_positive("beta", beta)
    _check_share("label_smoothing", label_smoothing)

    def compute(batch: PairBatch) -> PairLoss:
        difference_P = batch.chosen_P - batch.rejected_P
        h_P = difference_P if reference_free else batch.log_ratio_difference_P
        return _of_difference(*_logistic(beta * h_P, label_smoothing), beta)

    return compute


def dpo_with_nll(*, beta: float = 0.1, nll_weight: float = 1.0) -> PairLossFunction:
    """Build DPO with a supervised term: -log sigmoid(beta h) + w NLL(chosen).

    The second term is the mean negative log likelihood per token of the better completion. It keeps
    the better completion likely, where DPO alone may lower both completions.

    Source: arXiv:2404.19733.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        loss_P, slope_P = _logistic(beta * batch.log_ratio_difference_P, 0.0)
        weight_P = nll_weight / batch.chosen_length_P
        return PairLoss(
            loss_P - weight_P * batch.chosen_P, beta * slope_P - weight_P, -beta * slope_P
        )

    return compute


def robust_dpo(*, beta: float = 0.1, label_smoothing: float = 0.1) -> PairLossFunction:
    """Build DPO with an unbiased correction for a share of flipped labels.

    The loss is [(1 - e) (-log sigmoid(beta h)) - e (-log sigmoid(-beta h))] / (1 - 2 e); it can be
    negative.

    Source: arXiv:2403.00409.
    """
    _check_positive("beta", beta)
    _check_share("label_smoothing", label_smoothing)

    def compute(batch: PairBatch) -> PairLoss:
        margin_P = beta * batch.log_ratio_difference_P
        right_P, flipped_P = _softplus(-margin_P), _softplus(margin_P)
        keep, flip = 1 - label_smoothing, label_smoothing
        loss_P = (keep * right_P - flip * flipped_P) / (keep - flip)
        slope_P = (-keep * _sigmoid(-margin_P) - flip * _sigmoid(margin_P)) / (keep - flip)
        return _of_difference(loss_P, slope_P, beta)

    return compute


def ipo(*, beta: float = 0.1, per_token: bool = True) -> PairLossFunction:
    """Build identity preference optimization: (h - 1 / (2 beta))^2.

    Args:
        beta: Regularization (tau in the paper), above 0: the margin aimed at is 1 / (2 beta).
        per_token: Use the mean log ratio of each completion's tokens in h instead of the sum.

    Source: arXiv:2310.12036; TRL's trainer uses means, as its authors report of the paper's.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        chosen_scale_P = 1 / batch.chosen_length_P if per_token else np.ones_like(batch.chosen_P)
        rejected_scale_P = 1 / batch.rejected_length_P if per_token else chosen_scale_P
        h_P = (
            batch.chosen_log_ratio_P * chosen_scale_P
            - batch.rejected_log_ratio_P * rejected_scale_P
        )
        error_P = h_P - 1 / (2 * beta)
        return PairLoss(error_P**2, 2 * error_P * chosen_scale_P, -2 * error_P * rejected_scale_P)

    return compute


def hinge(*, beta: float = 0.1) -> PairLossFunction:
    """Build the hinge loss max(0, 1 - beta h), which stops at a margin of 1 / beta.

    Source: arXiv:2305.10425 (SLiC-HF), with DPO's log ratios.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        slack_P = 1 - beta * batch.log_ratio_difference_P
        return _of_difference(np.maximum(slack_P, 0), -(slack_P > 0).astype(float), beta)

    return compute


def length_normalized_dpo(*, beta: float = 1.0) -> PairLossFunction:
    """Build DPO on the mean log ratio per token instead of the sum.

    Source: arXiv:2411.15124 (Tulu 3), section on DPO.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        h_P = (
            batch.chosen_log_ratio_P / batch.chosen_length_P
            - batch.rejected_log_ratio_P / batch.rejected_length_P
        )
        loss_P, slope_P = _logistic(beta * h_P, 0.0)
        return PairLoss(
            loss_P,
            beta * slope_P / batch.chosen_length_P,
            -beta * slope_P / batch.rejected_length_P,
        )

    return compute


def length_corrected_dpo(*, beta: float = 0.1, alpha: float = 0.01) -> PairLossFunction:
    """Build DPO against length: -log sigmoid(beta h + alpha (|chosen| - |rejected|)).

    A preference that the lengths explain already has a margin, so it is learned less; a better
    completion that is shorter is learned more. This is DPO for a reward of r(y) - alpha |y|.

    Source: arXiv:2403.19159.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        longer_P = batch.chosen_length_P - batch.rejected_length_P
        margin_P = beta * batch.log_ratio_difference_P + alpha * longer_P
        return _of_difference(*_logistic(margin_P, 0.0), beta)

    return compute


def simpo(*, beta: float = 2.0, gamma: float = 1.0) -> PairLossFunction:
    """Build SimPO: -log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma).

    It does not use a reference model. `gamma` is the target margin.

    Source: arXiv:2405.14734.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        h_P = batch.chosen_P / batch.chosen_length_P - batch.rejected_P / batch.rejected_length_P
        loss_P, slope_P = _logistic(beta * h_P - gamma, 0.0)
        return PairLoss(
            loss_P,
            beta * slope_P / batch.chosen_length_P,
            -beta * slope_P / batch.rejected_length_P,
        )

    return compute


def cpo(*, beta: float = 0.1, nll_weight: float = 1.0) -> PairLossFunction:
    """Build contrastive preference optimization: -log sigmoid(beta (S_c - S_r)) + w NLL(chosen).

    S are sequence log probabilities without a reference model; the second term is the mean
    negative log likelihood per token of the better completion.

    Source: arXiv:2401.08417.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        loss_P, slope_P = _logistic(beta * (batch.chosen_P - batch.rejected_P), 0.0)
        weight_P = nll_weight / batch.chosen_length_P
        return PairLoss(
            loss_P - weight_P * batch.chosen_P, beta * slope_P - weight_P, -beta * slope_P
        )

    return compute


def orpo(*, beta: float = 0.1) -> PairLossFunction:
    """Build odds ratio preference optimization: NLL(chosen) - beta log sigmoid(log odds ratio).

    With m the mean log probability per token, log odds = m - log(1 - exp(m)). It does not use a
    reference model and contains the supervised loss.

    Source: arXiv:2403.07691.
    """
    _check_positive("beta", beta)

    def compute(batch: PairBatch) -> PairLoss:
        chosen_odds_P, chosen_slope_P = _log_odds(batch.chosen_P / batch.chosen_length_P)
        rejected_odds_P, rejected_slope_P = _log_odds(batch.rejected_P / batch.rejected_length_P)
        loss_P, slope_P = _logistic(chosen_odds_P - rejected_odds_P, 0.0)
        return PairLoss(
            beta * loss_P - batch.chosen_P / batch.chosen_length_P,
            (beta * slope_P * chosen_slope_P - 1) / batch.chosen_length_P,
            -beta * slope_P * rejected_slope_P / batch.rejected_length_P,
        )

    return compute


PAIR_LOSSES: dict[str, Callable[..., PairLossFunction]] = {
    "dpo": dpo,
    "dpo_with_nll": dpo_with_nll,
    "robust_dpo": robust_dpo,
    "ipo": ipo,
    "hinge": hinge,
    "length_normalized_dpo": length_normalized_dpo,
    "length_corrected_dpo": length_corrected_dpo,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}
"""Builders of the pair losses by name; each takes its own settings as keyword arguments."""
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo"})
"""Names of losses that never read the reference's log probabilities."""


@dataclass(frozen=True)
class SingleBatch:
    """Single completions, each labelled good or bad."""

    log_ratio_S: np.ndarray
    """Sequence log probabilities relative to the reference model."""
    is_good_S: np.ndarray
    """Booleans."""
    kl_baseline: float
    """Estimate of the KL divergence between trained model and reference, at least 0, in nats."""


@dataclass(frozen=True)
class SingleLoss:
    """The loss of every completion, and its derivative by the sequence log probability."""

    loss_S: np.ndarray
    by_log_ratio_S: np.ndarray


def kto(
    batch: SingleBatch,
    *,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> SingleLoss:
    """Compute Kahneman-Tversky optimization for completions with a thumb up or down.

    The loss is w (1 - sigmoid(beta (r - z))) for a good completion, and with z - r instead of
    r - z for a bad one; r is the log ratio and z the KL baseline, through which no gradient flows.

    Args:
        batch: The completions.
        beta: Strength of the pull towards the reference model, above 0.
        good_weight: Weight of good completions. Good and bad weights times their numbers should
            have a ratio between 1 and 4/3.
        bad_weight: Weight of bad completions.

    Source: arXiv:2402.01306.
    """
    check_kto(beta=beta, good_weight=good_weight, bad_weight=bad_weight)
    sign_S = np.where(batch.is_good_S, 1.0, -1.0)
    weight_S = np.where(batch.is_good_S, good_weight, bad_weight)
    value_S = _sigmoid(beta * sign_S * (batch.log_ratio_S - batch.kl_baseline))
    slope_S = -weight_S * beta * sign_S * value_S * (1 - value_S)
    return SingleLoss(weight_S * (1 - value_S), slope_S)


def check_kto(*, beta: float, good_weight: float, bad_weight: float) -> None:
    """Check the settings of `kto`.

    Raises:
        ConfigurationError: naming the setting.
    """
    _check_positive("beta", beta)
    _check_positive("good_weight", good_weight)
    _check_positive("bad_weight", bad_weight)


def estimate_kl(log_ratio_S: np.ndarray) -> float:
    """Estimate the KL divergence between trained model and reference for `kto`.

    It is the mean log ratio of completions to prompts that they do not answer, at least 0. Such
    pairs are cheap to make, and the model does not learn to lower their log ratio on purpose.

    Source: arXiv:2402.01306, section 4.1.
    """
    return max(0.0, float(np.mean(log_ratio_S)))


def _of_difference(loss_P: np.ndarray, slope_P: np.ndarray, beta: float) -> PairLoss:
    """Return the loss of a function of beta times the difference of the log ratios."""
    return PairLoss(loss_P, beta * slope_P, -beta * slope_P)


def _logistic(margin_P: np.ndarray, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """Return -(1-e) log sigmoid(m) - e log sigmoid(-m), and its derivative by m."""
    loss_P = (1 - smoothing) * _softplus(-margin_P) + smoothing * _softplus(margin_P)
    return loss_P, _sigmoid(margin_P) - (1 - smoothing)


def _log_odds(mean_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log(p / (1 - p)) for log probabilities below 0, and its derivative."""
    # A model that is certain (mean 0) would have infinite odds; the limit keeps them finite.
    mean_P = np.minimum(mean_P, -1e-12)
    rest_P = -np.expm1(mean_P)
    return mean_P - np.log(rest_P), 1 / rest_P


def _softplus(x: np.ndarray) -> np.ndarray:
    """Return log(1 + exp(x)) without overflow."""
    return np.logaddexp(0.0, x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigurationError(f"{name}={value} must be greater than 0.")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 0.5:
        raise ConfigurationError(f"{name}={value} must be from 0 to below 0.5.")
