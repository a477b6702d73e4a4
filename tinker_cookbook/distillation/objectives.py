"""Distillation objectives: divergences between student and teacher, and their gradients.

Pure functions of NumPy arrays, so a test can compare them with finite differences.

Axes: T positions, K tokens per position. Log probabilities are natural logs at temperature 1. In
all formulas p is the student, q the teacher, and S the set of K tokens whose probabilities are
known. The tokens outside S are one outcome, the rest bucket: p_R = 1 - sum of p over S, q_R = 1 -
sum of q over S. A divergence of these K + 1 outcomes is a lower bound of the divergence over the
whole vocabulary and equals it if S is the vocabulary.

A gradient is given as the weights that the service's loss `cross_entropy` takes: it computes
-sum(weights * log p) and applies the chain rule through the softmax, so weights are minus the
derivatives with respect to the log probabilities of S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

__all__ = [
    "TOP_K_DIVERGENCES",
    "Divergence",
    "DivergenceFunction",
    "build_divergence",
    "forward_kl",
    "forward_kl_renormalized",
    "forward_kl_sampled",
    "jensen_shannon",
    "kl_estimates",
    "rest_entropy",
    "reverse_kl",
    "reverse_kl_advantages",
]

REST_FLOOR = 1e-5
"""Lowest probability of a rest bucket. Log probabilities are float32, so that 1 minus a sum of
probabilities is uncertain by about 1e-6, and the gradients divide by it."""


@dataclass(frozen=True)
class Divergence:
    """A divergence at each position, and its gradient."""

    value_T: np.ndarray
    """In nats."""
    weights_TK: np.ndarray
    """Weights for the loss `cross_entropy`: minus the derivatives by the student's logprobs."""


def forward_kl(student_TK: np.ndarray, teacher_TK: np.ndarray) -> Divergence:
    """Return KL(q || p), whose minimum is p = q on S exactly: the student covers the teacher.

    weights = q_k - q_R p_k / p_R.

    Args:
        student_TK: The student's log probabilities of S.
        teacher_TK: The teacher's log probabilities of S.

    Source: Hinton et al., arXiv:1503.02531, on K tokens and the rest instead of the vocabulary.
    """
    p, q = _outcomes(student_TK), _outcomes(teacher_TK)
    value_T = (q * (np.log(q) - np.log(p))).sum(-1)
    weights_TK = q[:, :-1] - q[:, -1:] * p[:, :-1] / p[:, -1:]
    return Divergence(value_T, weights_TK)


def reverse_kl(student_TK: np.ndarray, teacher_TK: np.ndarray) -> Divergence:
    """Return KL(p || q): the student avoids what the teacher would not say.

    weights = -p_k ((log p_k - log q_k) - (log p_R - log q_R)).

    Args:
        student_TK: The student's log probabilities of S.
        teacher_TK: The teacher's log probabilities of S.

    Source: MiniLLM, arXiv:2306.08543; exact over tokens instead of sampled, arXiv:2504.10637.
    """
    p, q = _outcomes(student_TK), _outcomes(teacher_TK)
    ratio = np.log(p) - np.log(q)
    return Divergence((p * ratio).sum(-1), -p[:, :-1] * (ratio[:, :-1] - ratio[:, -1:]))


def jensen_shannon(student_TK: np.ndarray, teacher_TK: np.ndarray, beta: float = 0.5) -> Divergence:
    """Return beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.

    It lies between forward and reverse KL, and never exceeds log 2 for beta = 1/2.

    weights = -(1 - beta) p_k (log(p_k / m_k) - log(p_R / m_R)).

    Args:
        student_TK: The student's log probabilities of S.
        teacher_TK: The teacher's log probabilities of S.
        beta: Share of the teacher in the mixture m, between 0 and 1.

    Source: the generalized divergence of GKD, arXiv:2306.13649.
    """
    p, q = _outcomes(student_TK), _outcomes(teacher_TK)
    middle = beta * q + (1 - beta) * p
    from_teacher, from_student = np.log(q / middle), np.log(p / middle)
    value_T = (beta * q * from_teacher + (1 - beta) * p * from_student).sum(-1)
    weights_TK = -(1 - beta) * p[:, :-1] * (from_student[:, :-1] - from_student[:, -1:])
    return Divergence(value_T, weights_TK)


DivergenceFunction = Callable[[np.ndarray, np.ndarray], Divergence]
TOP_K_DIVERGENCES: dict[str, DivergenceFunction] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
"""Divergences with a rest bucket, by name. Their gradients need the student's log probabilities."""


def build_divergence(name: str, beta: float = 0.5) -> DivergenceFunction:
    """Return a divergence with a rest bucket; `beta` is used by `jensen_shannon` only."""
    if name == "jensen_shannon":
        return partial(jensen_shannon, beta=beta)
    return TOP_K_DIVERGENCES[name]


def forward_kl_renormalized(teacher_TK: np.ndarray) -> np.ndarray:
    """Return the weights q_k / sum of q over S: cross entropy with the teacher cut to S.

    The minimum is biased: the student gives S the probability 1, whatever the teacher gives it.
    The student's log probabilities are not needed.

    Args:
        teacher_TK: The teacher's log probabilities of S.

    Returns:
        Weights [T, K], whose sum is 1 at each position.

    Source: the bias is shown in arXiv:2503.16870.
    """
    q = np.exp(np.asarray(teacher_TK, np.float64))
    return q / q.sum(-1, keepdims=True)


def forward_kl_sampled(tokens_TK: np.ndarray) -> np.ndarray:
    """Return the weights 1 / K for K tokens drawn independently from the teacher.

    The expected gradient is that of KL(q || p) over the whole vocabulary. A token drawn twice is in
    the array twice. The student's log probabilities are not needed.

    Args:
        tokens_TK: The drawn tokens.

    Source: random sampling distillation, arXiv:2503.16870.
    """
    return np.full(tokens_TK.shape, 1.0 / tokens_TK.shape[-1])


def reverse_kl_advantages(
    student_T: np.ndarray,
    teacher_T: np.ndarray,
    mask_T: np.ndarray,
    coef: float = 1.0,
    discount: float = 0.0,
) -> np.ndarray:
    """Return the advantages of sampled tokens whose expected gradient is that of -KL(p || q).

    A_t = -coef * sum over k >= t of discount^(k - t) (log p_k - log q_k). With discount 0, a token
    pays for its own position only. With 1, it pays for all that follows too: this is the gradient
    of the KL between whole sequences, with a high variance. k counts sampled tokens, so tokens
    between two replies do not discount.

    Args:
        student_T: The log probabilities with which the tokens were sampled.
        teacher_T: The teacher's log probabilities of the same tokens.
        mask_T: Above 0 at sampled tokens. Other positions get 0 and may hold any value.
        coef: Factor on the advantages.
        discount: Between 0 and 1.

    Returns:
        float64 [T].

    Source: arXiv:2306.13649 (on-policy distillation), arXiv:2306.08543 (whole sequences).
    """
    kept_T = np.asarray(mask_T) > 0
    difference = (np.asarray(student_T, np.float64) - np.asarray(teacher_T, np.float64))[kept_T]
    costs = np.empty_like(difference)
    following = 0.0
    for index in range(len(difference) - 1, -1, -1):
        following = difference[index] + discount * following
        costs[index] = following
    advantages_T = np.zeros(len(kept_T))
    advantages_T[kept_T] = -coef * costs
    return advantages_T


def kl_estimates(student_N: np.ndarray, teacher_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two estimates of KL(p || q) for tokens drawn from p; the mean of each is unbiased.

    Args:
        student_N: The student's log probabilities of the drawn tokens.
        teacher_N: The teacher's.

    Returns:
        k1 = log p - log q, which may be negative, and k3 = q/p - 1 + log p - log q, which is never
        negative and varies less where the two are close.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    k1 = np.asarray(student_N, np.float64) - np.asarray(teacher_N, np.float64)
    return k1, np.expm1(-k1) + k1


def rest_entropy(logprobs_TK: np.ndarray) -> np.ndarray:
    """Return the entropy [T] of the K tokens and the rest bucket: a lower bound of the entropy."""
    outcomes = _outcomes(logprobs_TK)
    return -(outcomes * np.log(outcomes)).sum(-1)


def _outcomes(logprobs_TK: np.ndarray) -> np.ndarray:
    """Return the probabilities of the K tokens and of the rest, [T, K + 1]."""
    known = np.exp(np.asarray(logprobs_TK, np.float64))
    # No probability is 0: exp underflows far below any number that matters in a sum.
    known = np.maximum(known, np.finfo(np.float64).tiny)
    rest = np.maximum(1.0 - known.sum(-1, keepdims=True), REST_FLOOR)
    return np.concatenate([known, rest], axis=-1)
