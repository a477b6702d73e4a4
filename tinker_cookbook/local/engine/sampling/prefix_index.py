"""Which token sequences begin like a given one: an index over hashes of their beginnings. No torch.

A beginning of 8, 16, 24, ... tokens has one hash, of its tokens and of the weights that compute
them. If two sequences share a beginning they share the hashes of all shorter ones, so the longest
that an index knows is found by bisection. Equal hashes are a hint; `num_shared` compares tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Generic, TypeVar

import numpy as np

from tinker_cookbook.local.engine.sampling.random_numbers import hash_positions

__all__ = ["BLOCK", "PrefixIndex", "hash_beginnings", "num_shared"]

BLOCK = 8
"""Tokens between two hashes. Shorter prefixes are not shared: computing them is as fast."""

ItemT = TypeVar("ItemT")


def hash_beginnings(key: int, tokens: np.ndarray) -> list[int]:
    """Return the hashes of the first 8, 16, 24, ... tokens; `key` identifies the weights."""
    whole = len(tokens) // BLOCK * BLOCK
    return np.cumsum(hash_positions(key, tokens[:whole]))[BLOCK - 1 :: BLOCK].tolist()


def num_shared(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many leading tokens two sequences share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


class PrefixIndex(Generic[ItemT]):
    """Items by the hashes of the beginnings of their tokens."""

    def __init__(self) -> None:
        self._items: dict[int, dict[ItemT, None]] = {}
        """Hash -> the items that begin so, oldest first."""

    def add(self, item: ItemT, hashes: list[int]) -> None:
        """Add an item; `hashes` are those of its tokens, see `hash_beginnings`."""
        for value in hashes:
            self._items.setdefault(value, {})[item] = None

    def discard(self, item: ItemT, hashes: list[int]) -> None:
        """Remove an item, if it is here, given the same hashes."""
        for value in hashes:
            items = self._items.get(value, {})
            items.pop(item, None)
            if not items:
                self._items.pop(value, None)

    def num_shared(self, hashes: list[int], *, with_items: int) -> int:
        """Return how many tokens, in whole blocks, at least `with_items` items begin with."""
        return BLOCK * self._depth(hashes, with_items)

    def find(self, hashes: list[int]) -> list[ItemT]:
        """Return the items that share the most tokens, in whole blocks, newest first."""
        depth = self._depth(hashes, 1)
        return list(reversed(self._items[hashes[depth - 1]])) if depth else []

    def _depth(self, hashes: list[int], with_items: int) -> int:
        """Return the number of blocks that at least `with_items` items share with the hashes."""
        return bisect_left(
            hashes, True, key=lambda value: len(self._items.get(value, ())) < with_items
        )
