"""Group the data of a request into packs, which are computed in sequence.

A pack concatenates several sequences without padding: T tokens go through the model at once. Tokens
that sequences share at their beginning are among them once (`prefix_sharing`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.model.prefix_sharing import (
    Family,
    PrefixSharing,
    find_families,
)
from tinker_cookbook.local.engine.types import ImageInput

__all__ = ["CheckedDatum", "Pack", "PackPlan", "build_pack", "group_packs", "plan_packs"]


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
    """Number of tokens of each sequence, shared ones included; M is their sum."""
    order: torch.Tensor
    """int64 [M]: the row that each row of the fields below has when the data are concatenated.

    Rows with a gradient come first, so that the backward pass of the head can leave out the rest.
    Last are the rows that have the token and the targets of another one, and no gradient.
    """
    rows: torch.Tensor
    """int64 [M]: the token of each row."""
    num_gradient_rows: int
    """Number of rows with a gradient."""
    repeats: torch.Tensor
    """int64 [R]: for each of the last R rows, the earlier row that has the same logprobs."""
    targets: torch.Tensor
    """int64 [M, K]."""
    inputs: Mapping[str, torch.Tensor]
    """[M, K] each, and `sequence` [M, 1]: the number of the datum in the pack."""
    images: Sequence[tuple[ImageInput, ...]] = field(default_factory=list)
    """The images of each datum; empty for models that read text only."""
    seed: str = ""
    """What an adapter's dropout in this pack is drawn from."""
    sharing: PrefixSharing | None = None
    """The tokens that sequences share; None if they share none."""

    @property
    def num_computed_rows(self) -> int:
        """Number of rows whose logprobs are computed."""
        return len(self.rows) - len(self.repeats)

    def with_repeats(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Return the logprobs [M, K] of all rows, given those of the computed ones."""
        if not len(self.repeats):
            return logprobs
        return torch.cat([logprobs, logprobs[self.repeats]])


@dataclass(frozen=True)
class PackPlan:
    """The data of one pack."""

    families: list[Family]

    @property
    def indices(self) -> list[int]:
        """Indices of the data in the request, in the order of the pack."""
        return [member for family in self.families for member in family.members]

    def num_tokens(self, lengths: Sequence[int]) -> int:
        """Return the number of tokens that go through the model."""
        return sum(family.num_tokens(lengths) for family in self.families)

    def num_copied_keys(self, lengths: Sequence[int]) -> int:
        """Return the number of keys that attention reads from copies; 0 if nothing is shared."""
        if all(family.num_shared == 0 for family in self.families):
            return 0
        return sum(family.num_keys(lengths) for family in self.families)

    def sharing(self, lengths: Sequence[int], device: torch.device) -> PrefixSharing | None:
        """Return where the sequences find what they share; None if they share nothing."""
        if not self.num_copied_keys(lengths):
            return None
        shared: list[int] = []
        lenders: list[int] = []
        for family in self.families:
            lenders += [len(shared)] * len(family.members)
            shared += [0] + [family.num_shared] * (len(family.members) - 1)
        return PrefixSharing([lengths[i] for i in self.indices], shared, lenders, device)


def group_packs(data: Sequence[CheckedDatum], max_tokens: int, *, share: bool) -> list[PackPlan]:
    """Return the packs of a request.

    Args:
        max_tokens: as for `plan_packs`.
        share: whether sequences may share tokens.
    """
    lengths = [len(datum.tokens) for datum in data]
    widths = [datum.targets.shape[1] for datum in data]
    families = [Family([index], 0) for index in range(len(data))]
    if share:
        whole = find_families([datum.tokens for datum in data], widths)
        families = [part for family in whole for part in family.split(lengths, max_tokens)]
    packs = plan_packs(
        [family.num_tokens(lengths) for family in families],
        [widths[family.members[0]] for family in families],
        max_tokens,
    )
    return [PackPlan([families[number] for number in pack]) for pack in packs]


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
    plan: PackPlan, data: Sequence[CheckedDatum], driver: str, device: torch.device
) -> Pack:
    """Concatenate the data.

    Args:
        driver: the input whose zeros mean that a row has no gradient; "" if every row has one.
    """
    chosen = [data[index] for index in plan.indices]
    lengths = [len(datum.tokens) for datum in chosen]
    sharing = plan.sharing([len(datum.tokens) for datum in data], device)
    targets = np.concatenate([datum.targets for datum in chosen])
    inputs = {
        name: np.concatenate([datum.inputs[name] for datum in chosen]) for name in chosen[0].inputs
    }
    sequence = np.repeat(np.arange(len(chosen), dtype=np.float32), lengths)
    inputs["sequence"] = sequence[:, None]
    has_gradient = np.ones(len(targets), bool)
    if driver:
        has_gradient = (inputs[driver] != 0).any(axis=1)
    rows = np.arange(len(targets)) if sharing is None else sharing.sources
    order, repeats = _order_rows(rows, targets, has_gradient)

    shared = sharing.shared if sharing is not None else [0] * len(chosen)
    own = [datum.tokens[first:] for datum, first in zip(chosen, shared, strict=True)]
    return Pack(
        indices=plan.indices,
        tokens=to_device(np.concatenate(own).astype(np.int64), device),
        lengths=lengths,
        order=to_device(order, device),
        rows=to_device(rows[order], device),
        num_gradient_rows=int(has_gradient.sum()),
        repeats=to_device(repeats, device),
        targets=to_device(targets[order], device),
        inputs={name: to_device(values[order], device) for name, values in inputs.items()},
        images=[datum.images for datum in chosen],
        sharing=sharing,
    )


def _order_rows(
    rows: np.ndarray, targets: np.ndarray, has_gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of `Pack`'s rows, and for each of the last ones the row that it repeats.

    Args:
        rows: int64 [M], the token of each row.
        targets: int64 [M, K].
        has_gradient: bool [M].
    """
    computed = np.argsort(~has_gradient, kind="stable")
    if len(np.unique(rows)) == len(rows):
        return computed, np.empty(0, np.int64)
    # The first of all rows with the same token and targets, as a place in `computed`.
    keys = np.column_stack([rows, targets])[computed]
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    place = first[group.reshape(-1)]
    is_repeat = (place != np.arange(len(place))) & ~has_gradient[computed]
    new_place = np.cumsum(~is_repeat) - 1
    order = np.concatenate([computed[~is_repeat], computed[is_repeat]])
    return order, new_place[place[is_repeat]]
