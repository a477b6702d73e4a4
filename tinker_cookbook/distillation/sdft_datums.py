"""Datums with the scores of the teacher, for programs with their own loop of self-distillation.

The teacher sees a demonstration in its prompt, and then the student's reply. Each function asks it
about all replies at once. Replies that are too long for the teacher are left without a signal, and
counted.

`sdft.main` does the same with a rest bucket, so its users do not need these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.distillation.objectives import (
    REST_FLOOR,
    forward_kl_renormalized,
    rest_entropy,
    reverse_kl_advantages,
)
from tinker_cookbook.distillation.target_cache import Targets
from tinker_cookbook.distillation.teacher import PlacedSequence, Teacher, place
from tinker_cookbook.distillation.top_k import TaughtDatum, build_target_datum
from tinker_cookbook.rl.metrics import add_to_advantages
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel

if TYPE_CHECKING:
    import tinker
    import torch

__all__ = [
    "build_reverse_kl_datums",
    "build_topk_distillation_datums",
    "compute_sdft_advantages",
    "reverse_kl_custom_loss",
]

TEACHER_LOGPROBS = "teacher_logprobs"
"""Field of a datum: the teacher's log probabilities of its [N, K] targets."""
NEVER = -1e4
"""Log probability of a token that is left out."""
MAX_CONTEXT_LENGTH = 32768
SKIPPED_TOKENS = 3


async def compute_sdft_advantages(
    data_D: list[tinker.Datum],
    metadata_D: list[dict[str, int]],
    teacher_client: tinker.SamplingClient,
    teacher_prompts_P: list[tinker.ModelInput],
    max_context_length: int = MAX_CONTEXT_LENGTH,
) -> dict[str, float]:
    """Set the advantage of each sampled token to log q - log p, for `importance_sampling`.

    Args:
        data_D: Datums with `logprobs`, `advantages` and `mask`; replaced in the list.
        metadata_D: For each datum its `group_idx`, as `assemble_training_data` returns them.
        teacher_client: The teacher.
        teacher_prompts_P: The teacher's prompt of each group.
        max_context_length: Maximum tokens of a sequence that the teacher reads.

    Returns:
        `sdft/teacher_kl`, the mean of log p - log q; `sdft/num_skipped`, replies that are too long.
    """
    teacher = Teacher(teacher_client, "teacher", context_window=max_context_length)
    placed_D = _place(data_D, metadata_D, teacher_prompts_P, skip=0)
    kept = _fitting(placed_D, teacher)
    scores = await gather_or_cancel(teacher.score(placed) for placed in kept.values())
    differences = [np.zeros(0)]
    for index, teacher_n in zip(kept, scores, strict=True):
        positions_n, _ = placed_D[index]
        datum = data_D[index]
        student_n = datum.loss_fn_inputs["logprobs"].to_numpy()[positions_n].astype(np.float64)
        differences.append(student_n - teacher_n)
        added_N = -datum.loss_fn_inputs["advantages"].to_numpy().astype(np.float64)
        ones_n = np.ones(len(positions_n))
        added_N[positions_n] += reverse_kl_advantages(student_n, teacher_n, ones_n)
        data_D[index] = add_to_advantages(datum, added_N)
    return {
        "sdft/teacher_kl": _mean(np.concatenate(differences)),
        "sdft/num_skipped": float(len(data_D) - len(kept)),
    }


async def build_topk_distillation_datums(
    data_D: list[tinker.Datum],
    metadata_D: list[dict[str, int]],
    teacher_client: tinker.SamplingClient,
    teacher_prompts_P: list[tinker.ModelInput],
    topk: int = 20,
    max_context_length: int = MAX_CONTEXT_LENGTH,
    vocab_size: int | None = None,
    skip_first_n_tokens: int = SKIPPED_TOKENS,
) -> tuple[list[tinker.Datum], dict[str, float]]:
    """Return datums for the loss `cross_entropy`: the teacher's top K tokens, renormalized.

    One pass needs weights that do not depend on the student, hence the renormalizing. It is biased
    (see `objectives.forward_kl_renormalized`); `sdft.main` uses a rest bucket instead.

    Args:
        data_D: Datums with `mask`.
        metadata_D: For each datum its `group_idx`.
        teacher_client: The teacher.
        teacher_prompts_P: The teacher's prompt of each group.
        topk: Tokens per position.
        max_context_length: Maximum tokens of a sequence that the teacher reads.
        vocab_size: Token ids from here on are left out; None: all are used.
        skip_first_n_tokens: First sampled tokens of each reply that are not trained.

    Returns:
        The datums of the replies that the teacher can read, and `sdft/...` metrics.
    """
    taught_D, metrics = await _ask_top(
        data_D,
        metadata_D,
        teacher_client,
        teacher_prompts_P,
        topk=topk,
        max_context_length=max_context_length,
        vocab_size=vocab_size,
        skip=skip_first_n_tokens,
    )
    datums = []
    for taught in taught_D:
        datum = build_target_datum(taught)
        weights_nK = forward_kl_renormalized(taught.targets.logprobs_nK)
        datums.append(_with_rows(datum, taught, "weights", weights_nK))
    return datums, metrics


async def build_reverse_kl_datums(
    data_D: list[tinker.Datum],
    metadata_D: list[dict[str, int]],
    teacher_client: tinker.SamplingClient,
    teacher_prompts_P: list[tinker.ModelInput],
    topk: int = 20,
    max_context_length: int = MAX_CONTEXT_LENGTH,
    vocab_size: int | None = None,
    skip_first_n_tokens: int = SKIPPED_TOKENS,
) -> tuple[list[tinker.Datum], dict[str, float]]:
    """Return datums for `forward_backward_custom` with `reverse_kl_custom_loss`.

    Arguments and result as in `build_topk_distillation_datums`. The weights are 1 at trained
    positions, and the field `teacher_logprobs` has the teacher's log probabilities.
    """
    taught_D, metrics = await _ask_top(
        data_D,
        metadata_D,
        teacher_client,
        teacher_prompts_P,
        topk=topk,
        max_context_length=max_context_length,
        vocab_size=vocab_size,
        skip=skip_first_n_tokens,
    )
    datums = [
        _with_rows(build_target_datum(taught), taught, TEACHER_LOGPROBS, taught.targets.logprobs_nK)
        for taught in taught_D
    ]
    return datums, metrics


def reverse_kl_custom_loss(
    data: list[tinker.Datum], logprobs_list: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the reverse KL on the targets and the rest bucket, summed over trained positions.

    The value and the gradient are those of `objectives.reverse_kl`.

    Args:
        data: Datums from `build_reverse_kl_datums`.
        logprobs_list: The student's log probabilities of the targets, [N, K] each.

    Returns:
        The loss, and `sdft/reverse_kl`, its mean over trained positions.
    """
    total = logprobs_list[0].new_zeros(())
    count = 0.0
    for datum, student in zip(data, logprobs_list, strict=True):
        shape = tuple(datum.loss_fn_inputs["target_tokens"].shape or ())
        found = student.reshape(shape)
        teacher = _tensor_like(found, datum.loss_fn_inputs[TEACHER_LOGPROBS], shape)
        trained = _tensor_like(found, datum.loss_fn_inputs["weights"], shape)[:, 0]
        # Left-out tokens have an id that another target may have too, so they do not count.
        p, q = found.exp() * (teacher > NEVER), teacher.exp()
        p_rest = (1 - p.sum(-1)).clamp(min=REST_FLOOR)
        q_rest = (1 - q.sum(-1)).clamp(min=REST_FLOOR)
        known = (p * (found - teacher)).sum(-1)
        value = known + p_rest * (p_rest.log() - q_rest.log())
        total = total + (trained * value).sum()
        count += float(trained.sum())
    return total, {"sdft/reverse_kl": float(total.detach()) / max(count, 1.0)}


def _tensor_like(tensor: torch.Tensor, data: tinker.TensorData, shape: tuple) -> torch.Tensor:
    return tensor.new_tensor(data.to_numpy().reshape(shape))


async def _ask_top(
    data_D: Sequence[tinker.Datum],
    metadata_D: Sequence[dict[str, int]],
    teacher_client: tinker.SamplingClient,
    teacher_prompts_P: Sequence[tinker.ModelInput],
    *,
    topk: int,
    max_context_length: int,
    vocab_size: int | None,
    skip: int,
) -> tuple[list[TaughtDatum], dict[str, float]]:
    """Return the replies with the teacher's top tokens, and metrics."""
    teacher = Teacher(teacher_client, "teacher", context_window=max_context_length)
    placed_D = _place(data_D, metadata_D, teacher_prompts_P, skip=skip)
    kept = _fitting(placed_D, teacher)
    found = await gather_or_cancel(teacher.targets(placed, topk, "top") for placed in kept.values())
    taught_D = []
    for index, targets in zip(kept, found, strict=True):
        positions_n, _ = placed_D[index]
        within = _leave_out(targets, vocab_size)
        ones_n = np.ones(len(positions_n))
        taught_D.append(TaughtDatum(data_D[index], positions_n, ones_n, within, "sdft"))
    logprobs = [taught.targets.logprobs_nK for taught in taught_D] or [np.zeros((0, topk))]
    teacher_NK = np.concatenate(logprobs)
    return taught_D, {
        "sdft/teacher_mass": _mean(np.exp(teacher_NK.astype(np.float64)).sum(-1)),
        "sdft/teacher_entropy": _mean(rest_entropy(teacher_NK)),
        "sdft/num_trained_tokens": float(len(teacher_NK)),
        "sdft/num_skipped": float(len(data_D) - len(kept)),
    }


def _place(
    data_D: Sequence[tinker.Datum],
    metadata_D: Sequence[dict[str, int]],
    teacher_prompts_P: Sequence[tinker.ModelInput],
    *,
    skip: int,
) -> list[tuple[np.ndarray, PlacedSequence | None]]:
    """Return the trained positions of each datum, and what the teacher sees."""
    placed = []
    for datum, found in zip(data_D, metadata_D, strict=True):
        sampled_n = np.flatnonzero(datum.loss_fn_inputs["mask"].to_numpy())
        prompt = teacher_prompts_P[found["group_idx"]]
        whole = place(datum, sampled_n, prompt) if len(sampled_n) > skip else None
        if whole is not None:
            whole = PlacedSequence(whole.sequence, whole.tokens_n[skip:])
        placed.append((sampled_n[skip:], whole))
    return placed


def _fitting(
    placed_D: Sequence[tuple[np.ndarray, PlacedSequence | None]], teacher: Teacher
) -> dict[int, PlacedSequence]:
    """Return what the teacher can read, by the number of the datum."""
    return {
        index: placed
        for index, (_, placed) in enumerate(placed_D)
        if placed is not None and teacher.fits(placed)
    }


def _leave_out(targets: Targets, vocab_size: int | None) -> Targets:
    """Return the targets with next to no probability for ids that the student does not have."""
    if vocab_size is None:
        return targets
    outside = targets.tokens_nK >= vocab_size
    return Targets(
        np.where(outside, 0, targets.tokens_nK), np.where(outside, NEVER, targets.logprobs_nK)
    )


def _with_rows(
    datum: tinker.Datum, taught: TaughtDatum, name: str, rows_nK: np.ndarray
) -> tinker.Datum:
    """Return the datum with a field [N, K] that has these rows at the trained positions."""
    import tinker

    shape = [taught.datum.model_input.length, rows_nK.shape[1]]
    values = np.zeros(shape, np.float32)
    values[taught.positions_n] = rows_nK
    data = tinker.TensorData(data=values.reshape(-1), dtype="float32", shape=shape)
    inputs = {**datum.loss_fn_inputs, name: data}
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
