"""Sequences that begin with the same tokens: what they share goes through the model once.

The replies of a group in RL follow one prompt, and so do the two answers of a preference pair. A
causal model computes the same states for the prompt in each of them, so a pack holds the prompt
once. Only attention meets it more often: each sequence has its own copy of the prompt's keys and
values, and the gradients of the copies are added up.

    sequences          a b c d e   a b c f   a b c g h
    tokens of a pack   a b c d e         f         g h
    keys               a b c d e   a b c f   a b c g h

Logprobs keep their bits where a token's bits do not depend on its neighbours in the pack. Gradients
are the same sums in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinker_cookbook.local.engine.model.devices import to_device

__all__ = ["Family", "PrefixSharing", "find_families"]

_SHORTEST_PREFIX = 16
"""Minimum number of tokens to share."""
_COPIES = 32
"""Maximum number of keys that the copies of a prefix have, in packs."""


@dataclass(frozen=True)
class Family:
    """Sequences of which the first computes `num_shared` leading tokens for the others."""

    members: list[int]
    num_shared: int

    def num_tokens(self, lengths: Sequence[int]) -> int:
        """Return the number of tokens that go through the model.

        Args:
            lengths: of all sequences, of which `members` holds indices.
        """
        return self.num_keys(lengths) - self.num_shared * (len(self.members) - 1)

    def num_keys(self, lengths: Sequence[int]) -> int:
        """Return the number of keys that attention reads, copies included."""
        return sum(lengths[member] for member in self.members)

    def split(self, lengths: Sequence[int], pack_tokens: int) -> list[Family]:
        """Return families of neighbours, each for one pack.

        What follows the prefixes of a pack has about `pack_tokens` tokens at most; the prefix comes
        on top, since each further pack would compute it again.
        """
        own = [lengths[member] - self.num_shared for member in self.members]
        most_members = max(1, _COPIES * pack_tokens // max(1, self.num_shared))
        count = max(-(-sum(own) // pack_tokens), -(-len(own) // most_members))
        parts: list[list[int]] = [[]]
        size = 0
        for member, added in zip(self.members, own, strict=True):
            if parts[-1] and size + added / 2 > sum(own) / count:
                parts.append([])
                size = 0
            parts[-1].append(member)
            size += added
        return [Family(part, self.num_shared if len(part) > 1 else 0) for part in parts]


def find_families(tokens: Sequence[np.ndarray], kinds: Sequence[object]) -> list[Family]:
    """Return every sequence in one family, ordered by their first members.

    Families are chosen greedily among sequences in lexicographic order: the next one joins if the
    family then saves as many tokens as without it, although what all share may become shorter.

    Args:
        tokens: int32 [N] of each sequence, not negative.
        kinds: sequences of different kinds are in different families.
    """
    # Bytes of big-endian numbers are ordered as the numbers are.
    order = sorted(range(len(tokens)), key=lambda i: tokens[i].astype(">u4").tobytes())
    families: list[Family] = []
    for kind in dict.fromkeys(kinds):
        families += _families_in_order([i for i in order if kinds[i] == kind], tokens)
    return sorted(families, key=lambda family: family.members[0])


def _families_in_order(order: list[int], tokens: Sequence[np.ndarray]) -> list[Family]:
    families: list[Family] = []
    members, num_shared = order[:1], 0
    for before, index in itertools.pairwise(order):
        common = _common_length(tokens[before], tokens[index])
        if len(members) > 1:
            common = min(common, num_shared)
        saved = (len(members) - 1) * num_shared
        if common >= _SHORTEST_PREFIX and len(members) * common >= saved:
            members.append(index)
            num_shared = common
        else:
            families.append(Family(sorted(members), num_shared))
            members, num_shared = [index], 0
    return [*families, Family(sorted(members), num_shared)]


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    """Return the number of equal leading tokens, without the last token of either sequence."""
    most = min(len(first), len(second)) - 1
    different = np.flatnonzero(first[:most] != second[:most])
    return int(different[0]) if len(different) else most


class PrefixSharing:
    """Where the sequences of a pack find the tokens that they share.

    Legend: T tokens of the pack, N keys (the tokens of all sequences, shared ones repeated).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        shared: Sequence[int],
        lenders: Sequence[int],
        device: torch.device,
    ) -> None:
        """
        Args:
            lengths: number of tokens of each sequence, shared ones included.
            shared: number of leading tokens that another sequence computes.
            lenders: number of the sequence that computes them; a lender computes all of its tokens.
        """
        self.shared = list(shared)
        tokens = np.cumsum([0, *(n - s for n, s in zip(lengths, shared, strict=True))])
        keys = np.cumsum([0, *lengths])
        self._borrowed: list[tuple[slice, slice]] = []
        """Tokens of a prefix, and a copy of its keys."""
        sources, own = [], []
        for i, (length, borrowed, lender) in enumerate(zip(lengths, shared, lenders, strict=True)):
            first = int(tokens[lender])
            sources += [np.arange(first, first + borrowed), np.arange(tokens[i], tokens[i + 1])]
            own.append(np.arange(keys[i] + borrowed, keys[i] + length))
            if borrowed:
                copy = slice(int(keys[i]), int(keys[i]) + borrowed)
                self._borrowed.append((slice(first, first + borrowed), copy))
        self.sources = np.concatenate(sources)
        """int64 [N]: the token of each key."""
        self._sources = to_device(self.sources, device)
        self._own = to_device(np.concatenate(own), device)

    def copy(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the values of T tokens for N keys."""
        return values.index_select(axis, self._sources)

    def gather(self, gradient: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the gradient of T tokens, given that of N keys."""
        result = gradient.index_select(axis, self._own)
        by_token, by_key = result.movedim(axis, 0), gradient.movedim(axis, 0)
        for tokens, keys in self._borrowed:
            by_token[tokens] += by_key[keys]
        return result
