"""A training step on K target tokens per position: datums, gradient, metrics.

Axes: N positions of a datum, n of them trained, K targets per position, B datums of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.distillation.objectives import (
    TOP_K_DIVERGENCES,
    build_divergence,
    forward_kl,
    forward_kl_renormalized,
    forward_kl_sampled,
    rest_entropy,
    reverse_kl,
)
from tinker_cookbook.distillation.target_cache import Targets
from tinker_cookbook.distillation.teacher import TargetKind
from tinker_cookbook.eval.evaluators import TrainingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.custom_gradient import submit_custom_gradient, with_weights
from tinker_cookbook.utils.nearest_name import nearest_name

if TYPE_CHECKING:
    import tinker

__all__ = [
    "OBJECTIVES",
    "HeldOutTeacherKL",
    "PendingStep",
    "TaughtDatum",
    "check_objective",
    "measure",
    "ratio_error",
    "submit_step",
    "target_kind",
]

RENORMALIZED, SAMPLED = "renormalized", "sampled"
OBJECTIVES = (*TOP_K_DIVERGENCES, RENORMALIZED, SAMPLED)
KL_NAMES = {"teacher_kl", "teacher_kl_reverse"}
FORWARD_DATUMS = 32
"""Datums per forward request of an evaluation."""


@dataclass(frozen=True)
class TaughtDatum:
    """A datum, and what the teacher says about its trained positions."""

    datum: tinker.Datum
    """With `target_tokens` [N], as the data set made it."""
    positions_n: np.ndarray
    """The trained positions."""
    scale_n: np.ndarray
    """Weight of each trained position in the loss."""
    targets: Targets
    name: str
    """Data set, for metrics."""


@dataclass
class PendingStep:
    """A gradient whose requests are in the queue of the service."""

    taught_B: list[TaughtDatum]
    gradients: list[tinker.APIFuture[tinker.ForwardBackwardOutput]]
    student_B: list[np.ndarray]
    """The student's log probabilities of the targets before the step, [n, K] each; empty until
    `finish` if they come with the gradient."""

    async def finish(self) -> list[np.ndarray]:
        """Wait for the gradient; return the student's log probabilities of the targets."""
        outputs = [output for future in self.gradients for output in (await future).loss_fn_outputs]
        if not self.student_B:
            found = [output["logprobs"].to_numpy() for output in outputs]
            self.student_B = _trained_rows(self.taught_B, found)
        return self.student_B


def check_objective(name: str, beta: float, known: Sequence[str] = OBJECTIVES) -> None:
    """Refuse an unknown objective, or a mixture that is none.

    Raises:
        ConfigurationError: naming the known objectives, or the range of `objective_beta`.
    """
    if not 0 < beta < 1:
        raise ConfigurationError(
            f"objective_beta={beta} must be above 0 and below 1; for its limits, use "
            "objective=forward_kl or reverse_kl."
        )
    if name in known:
        return
    near = nearest_name(name, known)
    hint = f" Did you mean {near}?" if near else ""
    raise ConfigurationError(f"objective={name} is unknown; use one of {', '.join(known)}.{hint}")


def target_kind(objective: str) -> TargetKind:
    """Return which tokens of the teacher an objective needs."""
    return "drawn" if objective == SAMPLED else "top"


async def submit_step(
    client: tinker.TrainingClient,
    taught_B: Sequence[TaughtDatum],
    objective: str,
    beta: float = 0.5,
) -> PendingStep:
    """Submit the gradient of the objective, summed over the trained positions of a batch.

    Divergences with a rest bucket need the student's log probabilities and so two requests; the
    other objectives need one.

    Args:
        client: The student.
        taught_B: The batch.
        objective: Name of the objective.
        beta: Share of the teacher in the mixture of `jensen_shannon`.
    """
    taught_B = list(taught_B)
    data = [build_target_datum(taught) for taught in taught_B]
    if objective not in TOP_K_DIVERGENCES:
        weights = [_fixed_weights(taught, objective) for taught in taught_B]
        weighted = [with_weights(*pair) for pair in zip(data, weights, strict=True)]
        return PendingStep(taught_B, [client.forward_backward(weighted, "cross_entropy")], [])
    divergence = build_divergence(objective, beta)
    student_B: list[np.ndarray] = []

    def weigh(part: slice, logprobs: list[np.ndarray]) -> list[np.ndarray]:
        student = _trained_rows(taught_B[part], logprobs)
        student_B.extend(student)
        return [
            _spread(taught, divergence(found, taught.targets.logprobs_nK).weights_TK)
            for taught, found in zip(taught_B[part], student, strict=True)
        ]

    gradients = await submit_custom_gradient(client, data, weigh)
    return PendingStep(taught_B, gradients, student_B)


def build_target_datum(taught: TaughtDatum) -> tinker.Datum:
    """Return the datum with [N, K] targets; its weights are 1 at the trained positions."""
    import tinker

    length = taught.datum.model_input.length
    count = taught.targets.tokens_nK.shape[1]
    tokens = np.zeros((length, count), np.int64)
    tokens[taught.positions_n] = taught.targets.tokens_nK
    weights = np.zeros((length, count), np.float32)
    weights[taught.positions_n] = 1.0
    shape = [length, count]
    return tinker.Datum(
        model_input=taught.datum.model_input,
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens.reshape(-1), dtype="int64", shape=shape),
            "weights": tinker.TensorData(data=weights.reshape(-1), dtype="float32", shape=shape),
        },
    )


def measure(
    taught_B: Sequence[TaughtDatum], student_B: Sequence[np.ndarray], kind: TargetKind
) -> dict[str, float]:
    """Compare student and teacher; means over trained positions, with their weights.

    Args:
        taught_B: The datums.
        student_B: The student's log probabilities of the targets, [n, K] each.
        kind: Which tokens the targets are.

    Returns:
        `teacher_kl`, the KL of teacher and student, and `teacher_kl_stderr`, its standard error
        over sequences; also per data set if there are several. For the most likely tokens it is a
        lower bound (with the rest as one outcome), which is exact if they are the vocabulary, and
        there are `teacher_kl_reverse` with its standard error, `teacher_mass` and `student_mass`
        (the probability of the K tokens), `teacher_entropy` and `student_entropy` (lower bounds),
        and `teacher_more_certain` (the share of positions where the teacher's entropy is lower).
        For drawn tokens it is an estimate, and there is `teacher_entropy`. `trained_length` is the
        mean number of trained tokens per sequence.
    """
    scale_N = np.concatenate([np.abs(taught.scale_n) for taught in taught_B])
    teacher_NK = np.concatenate([taught.targets.logprobs_nK for taught in taught_B])
    compare = _compare_top if kind == "top" else _compare_drawn
    values = compare(np.concatenate(list(student_B)).astype(np.float64), teacher_NK)
    metrics = {name: float(np.average(found, weights=scale_N)) for name, found in values.items()}
    metrics["trained_length"] = len(scale_N) / len(taught_B)
    names_B = np.array([taught.name for taught in taught_B])
    number_N = np.repeat(np.arange(len(taught_B)), [len(taught.positions_n) for taught in taught_B])
    for name in KL_NAMES & values.keys():
        sums_B = np.bincount(number_N, scale_N * values[name], len(taught_B))
        weights_B = np.bincount(number_N, scale_N, len(taught_B))
        metrics |= _means_of_sequences(name, sums_B, weights_B, names_B)
    return metrics


def _means_of_sequences(
    name: str, sums_B: np.ndarray, weights_B: np.ndarray, names_B: np.ndarray
) -> dict[str, float]:
    """Return the standard error of a mean over tokens, and both per data set if several."""
    metrics = {f"{name}_stderr": ratio_error(sums_B, weights_B)}
    data_sets = sorted(set(names_B))
    for data_set in data_sets if len(data_sets) > 1 else []:
        chosen = names_B == data_set
        metrics[f"{name}/{data_set}"] = float(sums_B[chosen].sum() / weights_B[chosen].sum())
        metrics[f"{name}_stderr/{data_set}"] = ratio_error(sums_B[chosen], weights_B[chosen])
    return metrics


def ratio_error(sums_B: np.ndarray, counts_B: np.ndarray) -> float:
    """Return the standard error of sum / count: the tokens of a sequence are not independent."""
    mean = sums_B.sum() / counts_B.sum()
    return float(np.sqrt(((sums_B - mean * counts_B) ** 2).sum()) / counts_B.sum())


class HeldOutTeacherKL(TrainingClientEvaluator):
    """Compares student and teacher on held-out data, with the teacher's most likely tokens."""

    def __init__(self, taught: Sequence[TaughtDatum]) -> None:
        self._taught = list(taught)

    async def __call__(self, training_client: tinker.TrainingClient) -> dict[str, float]:
        """Return the metrics of `measure`, with `test/` before each name."""
        data = [build_target_datum(taught) for taught in self._taught]
        futures = [
            training_client.forward(data[start : start + FORWARD_DATUMS], "cross_entropy")
            for start in range(0, len(data), FORWARD_DATUMS)
        ]
        outputs = [output for future in futures for output in (await future).loss_fn_outputs]
        found = [output["logprobs"].to_numpy() for output in outputs]
        metrics = measure(self._taught, _trained_rows(self._taught, found), "top")
        return {f"test/{name}": value for name, value in metrics.items()}


def _compare_top(student_NK: np.ndarray, teacher_NK: np.ndarray) -> dict[str, np.ndarray]:
    of_teacher, of_student = rest_entropy(teacher_NK), rest_entropy(student_NK)
    return {
        "teacher_kl": forward_kl(student_NK, teacher_NK).value_T,
        "teacher_kl_reverse": reverse_kl(student_NK, teacher_NK).value_T,
        "teacher_entropy": of_teacher,
        "student_entropy": of_student,
        "teacher_more_certain": (of_teacher < of_student).astype(np.float64),
        "teacher_mass": np.exp(teacher_NK.astype(np.float64)).sum(-1),
        "student_mass": np.exp(student_NK).sum(-1),
    }


def _compare_drawn(student_NK: np.ndarray, teacher_NK: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "teacher_kl": (teacher_NK - student_NK).mean(-1),
        "teacher_entropy": -teacher_NK.mean(-1),
    }


def _fixed_weights(taught: TaughtDatum, objective: str) -> np.ndarray:
    """Return the weights [N, K] of an objective that does not depend on the student."""
    targets = taught.targets
    if objective == SAMPLED:
        return _spread(taught, forward_kl_sampled(targets.tokens_nK))
    return _spread(taught, forward_kl_renormalized(targets.logprobs_nK))


def _spread(taught: TaughtDatum, weights_nK: np.ndarray) -> np.ndarray:
    """Return weights [N, K] of all positions from those of the trained ones."""
    length = taught.datum.model_input.length
    weights_NK = np.zeros((length, weights_nK.shape[1]), np.float32)
    weights_NK[taught.positions_n] = taught.scale_n[:, None] * weights_nK
    return weights_NK


def _trained_rows(
    taught_B: Sequence[TaughtDatum], logprobs_B: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return the trained rows [n, K] of log probabilities of all positions."""
    rows = []
    for taught, logprobs in zip(taught_B, logprobs_B, strict=True):
        count = taught.targets.tokens_nK.shape[1]
        rows.append(logprobs.reshape(-1, count)[taught.positions_n])
    return rows
