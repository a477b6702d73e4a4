"""Trajectories to datums.

Turns whose prompt extends, token for token, everything before it share one datum; any other prompt
starts a new one. Sampled tokens are used as they were sampled, never tokenised again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np

from tinker_cookbook.rl.algorithms import (
    LOSSES,
    AdvantageEstimator,
    LengthNormalization,
    compute_group_advantages,
    compute_length_scale,
)
from tinker_cookbook.rl.types import PARSE_ERROR_MASKED_METRIC_KEY, Trajectory, TrajectoryGroup
from tinker_cookbook.utils.misc_utils import all_same

if TYPE_CHECKING:
    import tinker

__all__ = [
    "FlatOb",
    "FlatObElem",
    "assemble_training_data",
    "compute_advantages",
    "count_action_tokens",
    "drop_client_inputs",
    "remove_constant_reward_groups",
    "trajectory_to_data",
]

logger = logging.getLogger(__name__)

FlatObElem: TypeAlias = Union[int, "tinker.ModelInputChunk"]
"""A token, or a chunk that is no text."""
FlatOb: TypeAlias = list[FlatObElem]

CLIENT_INPUTS = ("mask",)
"""Loss inputs that the service does not know."""


def compute_advantages(
    trajectory_groups_P: list[TrajectoryGroup],
    *,
    estimator: AdvantageEstimator = "group_mean",
    length_normalization: LengthNormalization = "none",
) -> list[np.ndarray]:
    """Compare each trajectory's total reward with its group.

    Returns:
        Per group, float32 [G].
    """
    advantages_P = [
        compute_group_advantages(group.get_total_rewards(), estimator)
        for group in trajectory_groups_P
    ]
    if length_normalization == "none":
        return advantages_P
    lengths = [
        count_action_tokens(trajectory)
        for group in trajectory_groups_P
        for trajectory in group.trajectories_G
    ]
    scale = compute_length_scale(lengths, length_normalization)
    edges = np.cumsum([0, *(len(advantages_G) for advantages_G in advantages_P)])
    return [
        advantages_G * scale[edges[index] : edges[index + 1]]
        for index, advantages_G in enumerate(advantages_P)
    ]


def count_action_tokens(trajectory: Trajectory) -> int:
    """Sampled tokens of all turns."""
    return sum(len(transition.ac.tokens) for transition in trajectory.transitions)


def trajectory_to_data(
    traj: Trajectory, traj_advantage: float, include_provenance: bool = True
) -> list[tinker.Datum]:
    """Turn one trajectory into datums with `target_tokens, logprobs, advantages, mask`.

    Args:
        traj: The trajectory.
        traj_advantage: Given to every sampled token, except those of masked turns.
        include_provenance: Record which tokens the service sampled itself, where it named them.

    Returns:
        One datum per run of turns whose prompts extend each other; none without sampled tokens.
    """
    data = []
    current = _Sequence()
    for transition in traj.transitions:
        observation = flatten_chunks(transition.ob.chunks)
        if not current.is_prefix_of(observation):
            data += current.datums(include_provenance)
            current = _Sequence()
        current.add_prompt(observation)
        masked = transition.metrics.get(PARSE_ERROR_MASKED_METRIC_KEY, 0) >= 1
        if transition.ac.tokens:
            current.add_action(
                transition.ac.tokens,
                transition.ac.logprobs,
                0.0 if masked else traj_advantage,
                mask=0.0 if masked else 1.0,
                sequence_id=transition.ac.sequence_id,
            )
    return data + current.datums(include_provenance)


def assemble_training_data(
    trajectory_groups_P: list[TrajectoryGroup],
    advantages_P: list[np.ndarray],
    include_provenance: bool = True,
) -> tuple[list[tinker.Datum], list[dict[str, int]]]:
    """Turn groups into datums.

    Returns:
        All datums, and for each the `group_idx` and `traj_idx` it comes from.
    """
    data_D: list[tinker.Datum] = []
    metadata_D: list[dict[str, int]] = []
    for group_idx, (group, advantages_G) in enumerate(
        zip(trajectory_groups_P, advantages_P, strict=True)
    ):
        for traj_idx, (trajectory, advantage) in enumerate(
            zip(group.trajectories_G, advantages_G, strict=True)
        ):
            data = trajectory_to_data(trajectory, float(advantage), include_provenance)
            data_D += data
            metadata_D += [{"group_idx": group_idx, "traj_idx": traj_idx}] * len(data)
    return data_D, metadata_D


def remove_constant_reward_groups(
    trajectory_groups_P: list[TrajectoryGroup],
) -> list[TrajectoryGroup]:
    """Leave out groups whose rewards are all equal; if all are, keep the first, with a warning."""
    mixed = [group for group in trajectory_groups_P if not all_same(group.get_total_rewards())]
    if not mixed and trajectory_groups_P:
        logger.warning(
            "all %d groups have equal rewards within: there is nothing to learn from in this "
            "batch; make the task easier or harder, or group_size larger",
            len(trajectory_groups_P),
        )
        return trajectory_groups_P[:1]
    return mixed


def drop_client_inputs(data_D: Sequence[tinker.Datum], loss_fn: str) -> list[tinker.Datum]:
    """Return the datums as the service takes them: without `mask`, with all inputs of the loss."""
    import tinker

    # A loss that only some service knows has no entry; it gets the inputs that every loss takes.
    loss = LOSSES.get(loss_fn)  # pyright: ignore[reportArgumentType, reportCallIssue]
    extra_inputs = {} if loss is None else loss.extra_inputs
    sent = []
    for datum in data_D:
        inputs = {
            key: value for key, value in datum.loss_fn_inputs.items() if key not in CLIENT_INPUTS
        }
        inputs |= {name: datum.loss_fn_inputs[own] for name, own in extra_inputs.items()}
        sent.append(
            tinker.Datum(
                model_input=datum.model_input,
                loss_fn_inputs=inputs,
                model_input_spans=getattr(datum, "model_input_spans", None),
                loss_fn_input_spans=getattr(datum, "loss_fn_input_spans", None),
            )
        )
    return sent


def flatten_chunks(chunks: Sequence[tinker.ModelInputChunk]) -> FlatOb:
    """Tokens of text chunks one by one; other chunks as they are."""
    flat: FlatOb = []
    for chunk in chunks:
        tokens = getattr(chunk, "tokens", None)
        flat += [chunk] if tokens is None else tokens
    return flat


@dataclass
class _Sequence:
    """One datum being put together; the lists have one entry per element of `flat`."""

    flat: FlatOb = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    samples: list[tuple[int, int, str | None]] = field(default_factory=list)
    """Start, length and service's name of each sampled run."""

    def is_prefix_of(self, observation: FlatOb) -> bool:
        return len(self.flat) <= len(observation) and observation[: len(self.flat)] == self.flat

    def add_prompt(self, observation: FlatOb) -> None:
        new = observation[len(self.flat) :]
        self._add(new, [0.0] * len(new), 0.0, 0.0)

    def add_action(
        self,
        tokens: list[int],
        logprobs: list[float],
        advantage: float,
        *,
        mask: float,
        sequence_id: str | None,
    ) -> None:
        self.samples.append((len(self.flat), len(tokens), sequence_id))
        self._add(tokens, logprobs, advantage, mask)

    def _add(
        self, elements: Sequence[FlatObElem], logprobs: list[float], advantage: float, mask: float
    ) -> None:
        self.flat += elements
        self.logprobs += logprobs
        self.advantages += [advantage] * len(elements)
        self.mask += [mask] * len(elements)

    def datums(self, include_provenance: bool) -> list[tinker.Datum]:
        """The datum, or nothing if no token of it was sampled to be trained."""
        import tinker

        if not any(self.mask):
            return []
        last = max(index for index, kept in enumerate(self.mask) if kept)
        flat = self.flat[: last + 1]
        targets = [element if isinstance(element, int) else 0 for element in flat[1:]]
        per_position = {
            "logprobs": self.logprobs,
            "advantages": self.advantages,
            "mask": self.mask,
        }
        inputs = {
            name: tinker.TensorData.from_numpy(np.asarray(values[1 : last + 1], dtype=np.float32))
            for name, values in per_position.items()
        }
        inputs["target_tokens"] = tinker.TensorData.from_numpy(np.asarray(targets, dtype=np.int64))
        datum = tinker.Datum(model_input=unflatten_chunks(flat[:-1]), loss_fn_inputs=inputs)
        if include_provenance and self._has_provenance(flat):
            datum = datum.with_provenance(
                model_input=self._spans(0, last), loss_fn_inputs=self._spans(1, last + 1)
            )
        return [datum]

    def _has_provenance(self, flat: FlatOb) -> bool:
        """Whether the service named every sample, and the SDK can say where tokens come from."""
        import tinker

        known = hasattr(tinker, "SampledProvenanceSpan") and bool(self.samples)
        return known and all(name for _, _, name in self.samples) and not _has_other_chunks(flat)

    def _spans(
        self, start: int, end: int
    ) -> list[tinker.PromptProvenanceSpan | tinker.SampledProvenanceSpan]:
        """Where the elements [start, end) come from: the prompt of the next sample, or a sample."""
        import tinker

        spans: list[tinker.PromptProvenanceSpan | tinker.SampledProvenanceSpan] = []
        position = start
        for first, length, name in self.samples:
            prompt_end = min(first, end)
            if position < prompt_end:
                spans.append(
                    tinker.PromptProvenanceSpan(
                        sequence_id=name or "", offset=position, length=prompt_end - position
                    )
                )
                position = prompt_end
            sample_end = min(first + length, end)
            if position < sample_end:
                spans.append(
                    tinker.SampledProvenanceSpan(
                        sequence_id=name or "",
                        offset=position - first,
                        length=sample_end - position,
                    )
                )
                position = sample_end
        return spans


def _has_other_chunks(flat: FlatOb) -> bool:
    return any(not isinstance(element, int) for element in flat)


def unflatten_chunks(flat: FlatOb) -> tinker.ModelInput:
    """The opposite of `flatten_chunks`; neighbouring tokens become one chunk."""
    import tinker

    chunks: list[tinker.ModelInputChunk] = []
    tokens: list[int] = []
    for element in flat:
        if isinstance(element, int):
            tokens.append(element)
            continue
        if tokens:
            chunks.append(tinker.EncodedTextChunk(tokens=tokens))
            tokens = []
        chunks.append(element)
    if tokens:
        chunks.append(tinker.EncodedTextChunk(tokens=tokens))
    return tinker.ModelInput(chunks=chunks)
