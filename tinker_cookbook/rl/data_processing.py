"""From trajectories to datums: advantages, the merging of turns, and the inputs of the loss.

Turns share one datum if each prompt begins, token for token, with everything before it. Any other
prompt starts a new datum. Sampled tokens are used as they were sampled and never tokenized again.

For example, two turns with the prompts `1 2` and `1 2 5 9 3` and the replies `5 9` and `6` give

    flat        1  2  5  9  3  6       prompt and reply tokens of all turns in order
    mask        0  0  1  1  0  1       1: sampled, hence trained on

and, shifted by one so that position i predicts token i + 1, the datum

    input       1  2  5  9  3
    target      2  5  9  3  6
    mask        0  1  1  0  1

If the second prompt were `1 2 5 8 3`, because the chat format writes the reply differently from how
it was sampled, there would be two datums, and the prompt would be processed twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
    "has_equal_rewards",
    "remove_constant_reward_groups",
    "trajectory_to_data",
]

logger = logging.getLogger(__name__)

FlatObElem: TypeAlias = Union[int, "tinker.ModelInputChunk"]
"""A token, or a chunk that is not text, such as an image."""
FlatOb: TypeAlias = list[FlatObElem]

CLIENT_INPUTS = ("mask", "sampler_logprobs")
"""Arrays of a datum that are used only here; the service would refuse them."""


def compute_advantages(
    trajectory_groups_P: list[TrajectoryGroup],
    *,
    estimator: AdvantageEstimator = "group_mean",
    length_normalization: LengthNormalization = "none",
) -> list[np.ndarray]:
    """Compare each trajectory's total reward with its group.

    Returns:
        float32 [G] for each group.
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
    """Return the number of sampled tokens of all turns."""
    return sum(len(transition.ac.tokens) for transition in trajectory.transitions)


def trajectory_to_data(
    traj: Trajectory,
    traj_advantage: float | Sequence[float] | np.ndarray,
    include_provenance: bool = True,
    train_truncated: bool = True,
) -> list[tinker.Datum]:
    """Turn one trajectory into datums with `target_tokens, logprobs, advantages, mask`.

    Args:
        traj: The trajectory.
        traj_advantage: The advantage of every sampled token, except those of masked turns; or one
            number per turn.
        include_provenance: Whether to record which tokens the service sampled, if it named its
            samples.
        train_truncated: Whether to train on replies that the token limit cut.

    Returns:
        One datum for each series of turns whose prompts extend each other. Series without
        sampled tokens are left out.
    """
    data = []
    current = _Sequence()
    advantages = np.broadcast_to(np.asarray(traj_advantage, np.float64), len(traj.transitions))
    for transition, advantage in zip(traj.transitions, advantages.tolist(), strict=True):
        observation = flatten_chunks(transition.ob.chunks)
        if not current.is_prefix_of(observation):
            data += current.datums(include_provenance)
            current = _Sequence()
        current.add_prompt(observation)
        # A masked turn stays in the context of later turns, but is not trained on.
        masked = transition.metrics.get(PARSE_ERROR_MASKED_METRIC_KEY, 0) >= 1
        masked |= not train_truncated and transition.ac.stop_reason == "length"
        if transition.ac.tokens:
            current.add_action(
                transition.ac.tokens,
                transition.ac.logprobs,
                0.0 if masked else advantage,
                mask=0.0 if masked else 1.0,
                sequence_id=transition.ac.sequence_id,
            )
    return data + current.datums(include_provenance)


def assemble_training_data(
    trajectory_groups_P: list[TrajectoryGroup],
    advantages_P: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]],
    include_provenance: bool = True,
    train_truncated: bool = True,
) -> tuple[list[tinker.Datum], list[dict[str, int]]]:
    """Turn groups into datums.

    Args:
        trajectory_groups_P: The groups.
        advantages_P: For each group, one number per member, or one array per member with one
            number per turn.
        include_provenance: As in `trajectory_to_data`.
        train_truncated: As in `trajectory_to_data`.

    Returns:
        All datums, and for each the `group_idx` and `traj_idx` of its trajectory.
    """
    data_D: list[tinker.Datum] = []
    metadata_D: list[dict[str, int]] = []
    for group_idx, (group, advantages_G) in enumerate(
        zip(trajectory_groups_P, advantages_P, strict=True)
    ):
        for traj_idx, (trajectory, advantage) in enumerate(
            zip(group.trajectories_G, advantages_G, strict=True)
        ):
            data = trajectory_to_data(trajectory, advantage, include_provenance, train_truncated)
            data_D += data
            metadata_D += [{"group_idx": group_idx, "traj_idx": traj_idx}] * len(data)
    return data_D, metadata_D


def has_equal_rewards(group: TrajectoryGroup) -> bool:
    """Return whether all members of a group have the same total reward."""
    return all_same(group.get_total_rewards())


def remove_constant_reward_groups(
    trajectory_groups_P: list[TrajectoryGroup],
    is_constant: Callable[[TrajectoryGroup], bool] = has_equal_rewards,
) -> list[TrajectoryGroup]:
    """Leave out groups with equal rewards; if all groups are such, keep the first and warn."""
    mixed = [group for group in trajectory_groups_P if not is_constant(group)]
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
    """Return the tokens of text chunks as single elements, and other chunks unchanged."""
    flat: FlatOb = []
    for chunk in chunks:
        tokens = getattr(chunk, "tokens", None)
        flat += [chunk] if tokens is None else tokens
    return flat


@dataclass
class _Sequence:
    """A datum under construction; all lists but `samples` have one entry per element of `flat`."""

    flat: FlatOb = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    samples: list[tuple[int, int, str | None]] = field(default_factory=list)
    """Start in `flat`, length, and the service's name of each reply."""

    def is_prefix_of(self, observation: FlatOb) -> bool:
        """Return whether a prompt begins with everything so far; true of an empty sequence."""
        return len(self.flat) <= len(observation) and observation[: len(self.flat)] == self.flat

    def add_prompt(self, observation: FlatOb) -> None:
        """Append the part of the prompt that is new; it is context, with advantage and mask 0."""
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
        """Return the datum in a list, or an empty list if it has no trained token."""
        import tinker

        if not any(self.mask):
            return []
        # Cut what follows the last trained token: it would cost time and change nothing.
        last = max(index for index, kept in enumerate(self.mask) if kept)
        flat = self.flat[: last + 1]
        # Position i predicts element i + 1. A chunk such as an image cannot be a target; its mask
        # is 0, so any token will do.
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
        """Return whether every sample has a name and the SDK can record where tokens come from."""
        import tinker

        known = hasattr(tinker, "SampledProvenanceSpan") and bool(self.samples)
        return known and all(name for _, _, name in self.samples) and not _has_other_chunks(flat)

    def _spans(
        self, start: int, end: int
    ) -> list[tinker.PromptProvenanceSpan | tinker.SampledProvenanceSpan]:
        """Return the origins of the elements [start, end).

        An element is part of a sample, or of the prompt before the next sample. Offsets of prompt
        spans count from the start of the sequence, those of sample spans from the sample's first
        token.
        """
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
    """Undo `flatten_chunks`; neighbouring tokens become one chunk."""
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
