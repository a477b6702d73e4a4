"""Group the data of a request into packs, which are computed in sequence.

A pack concatenates several sequences without padding: T tokens go through the model at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.types import ImageInput

__all__ = ["CheckedDatum", "Pack", "build_pack", "plan_packs"]


@dataclass(frozen=True)
class CheckedDatum:
    """A datum whose arrays are dense, two-dimensional and consistent."""

    tokens: np.ndarray
    """int32 [N]."""
    targets: np.ndarray
    """int64 [N, K]."""
    inputs: dict[str, np.ndarray]
    """[N, K] each, float32 or int64 as the loss declares."""
    is_flat: bool
    """Whether the targets arrived as [N]; the logprobs are returned in that shape."""
    graph_inputs: dict[str, np.ndarray] = field(default_factory=dict)
    """The inputs of an uploaded loss: float32 or int64, with the rank that it declared."""
    images: tuple[ImageInput, ...] = ()


@dataclass
class Pack:
    """Sequences that go through the model together. T tokens, M rows with K targets each."""

    indices: list[int]
    """Index of each datum in the request."""
    tokens: torch.Tensor
    """int64 [T]."""
    lengths: list[int]
    rows: torch.Tensor
    """int64 [M]: the token that each row of the fields below belongs to.

    Rows with a gradient come first, so that the backward pass of the head can leave out the rest.
    """
    num_gradient_rows: int
    """Number of rows with a gradient."""
    targets: torch.Tensor
    """int64 [M, K]."""
    inputs: Mapping[str, torch.Tensor]
    """[M, K] each, and `sequence` [M, 1]: the number of the datum in the pack."""
    images: Sequence[tuple[ImageInput, ...]] = field(default_factory=list)
    """The images of each datum; empty for models that read text only."""
    seed: str = ""
    """What an adapter's dropout in this pack is drawn from."""


def plan_packs(lengths: Sequence[int], widths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the data indices of each pack, in ascending order.

    A pack holds data with equal target width, up to `max_tokens` tokens; a longer sequence is
    alone. The packs of a request have about equal sizes, since a small last pack would be slow.
    They hold neighbours, unless fewer packs are possible.
    """
    packs: list[list[int]] = []
    first = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or widths[end] != widths[first]:
            packs.extend(_split_evenly(list(range(first, end)), lengths, max_tokens))
            first = end
    return packs


def _split_evenly(indices: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    total = sum(lengths[index] for index in indices)
    count = max(1, -(-total // max_tokens))
    packs = _split_neighbours(indices, lengths, max_tokens, total / count)
    for fewer in range(count, len(packs)):
        found = _split_by_length(indices, lengths, max_tokens, fewer)
        if found is not None:
            return found
    return packs


def _split_neighbours(
    indices: list[int], lengths: Sequence[int], max_tokens: int, goal: float
) -> list[list[int]]:
    """Return packs of neighbours with about `goal` tokens each."""
    packs: list[list[int]] = [[]]
    in_pack = 0
    for index in indices:
        length = lengths[index]
        # Up to half of a datum may exceed the goal; nothing may exceed the limit.
        if packs[-1] and (in_pack + length > max_tokens or in_pack + length / 2 > goal):
            packs.append([])
            in_pack = 0
        packs[-1].append(index)
        in_pack += length
    return packs


def _split_by_length(
    indices: list[int], lengths: Sequence[int], max_tokens: int, count: int
) -> list[list[int]] | None:
    """Put each datum, longest first, into the smallest of `count` packs; None if one overflows."""
    packs: list[list[int]] = [[] for _ in range(count)]
    sizes = [(0, number) for number in range(count)]
    for index in sorted(indices, key=lambda index: -lengths[index]):
        size, number = heapq.heappop(sizes)
        if size + lengths[index] > max_tokens:
            return None
        packs[number].append(index)
        heapq.heappush(sizes, (size + lengths[index], number))
    return sorted(sorted(pack) for pack in packs)


def build_pack(
    indices: list[int], data: Sequence[CheckedDatum], driver: str, device: torch.device
) -> Pack:
    """Concatenate the data.

    Args:
        driver: the input whose zeros mean that a row has no gradient; "" if every row has one.
    """
    chosen = [data[index] for index in indices]
    lengths = [len(datum.tokens) for datum in chosen]
    targets = np.concatenate([datum.targets for datum in chosen])
    inputs = {
        name: np.concatenate([datum.inputs[name] for datum in chosen]) for name in chosen[0].inputs
    }
    sequence = np.repeat(np.arange(len(chosen), dtype=np.float32), lengths)
    inputs["sequence"] = sequence[:, None]
    has_gradient = np.ones(len(targets), bool)
    if driver:
        has_gradient = (inputs[driver] != 0).any(axis=1)
    order = np.argsort(~has_gradient, kind="stable")

    tokens = np.concatenate([datum.tokens for datum in chosen]).astype(np.int64)
    return Pack(
        indices=indices,
        tokens=to_device(tokens, device),
        lengths=lengths,
        rows=to_device(order, device),
        num_gradient_rows=int(has_gradient.sum()),
        targets=to_device(targets[order], device),
        inputs={name: to_device(values[order], device) for name, values in inputs.items()},
        images=[datum.images for datum in chosen],
    )
