"""Stored prefixes: keys, values and scores of recent sequences, for requests that begin alike.

A prefix is either copied into the row of a longer sequence, or read where it is, by a request that
is computed in one pass (`Chunk.prefix`). While a prefill fills or reads a prefix, it is pinned and
not evicted.

A prefix that was used again is evicted after those that were not: prompts that are scored only once
do not displace it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.sampling.cache_rows import CacheShape, Pool, Row
from tinker_cookbook.local.engine.sampling.known_scores import KnownScores
from tinker_cookbook.local.engine.sampling.prefix_index import (
    BLOCK,
    PrefixIndex,
    hash_beginnings,
    num_shared,
)

__all__ = ["PrefixStore", "StoredPrefix"]

_MAX_PREFIXES = 512
_MAX_CANDIDATES = 8
"""Prefixes that are compared where several share the same blocks."""


class StoredPrefix:
    """Keys and values of the first T tokens of a sequence, and what is known about its scores."""

    def __init__(self, shape: CacheShape, key: int, tokens: np.ndarray) -> None:
        """Allocate memory for a prefix; `key` identifies the weights."""
        self.key = key
        self.tokens = np.ascontiguousarray(tokens, np.int32)
        self.hashes = hash_beginnings(key, self.tokens)
        pool = Pool(shape, len(tokens))
        pool.kv = shape.empty(1, len(tokens))
        self.row = Row(pool, 0)
        """A row of exactly T tokens in a pool that does not know it: in a circle of references the
        memory would wait for the garbage collector, which does not see how large it is."""
        self.hidden: Tensor | None = None
        """Hidden states [T, H] before the final norm, valid from position `hidden_from`."""
        self.hidden_from = len(tokens)
        self.scores = KnownScores(len(tokens))
        self.num_users = 0
        """Number of prefills that fill or read it."""
        self.num_bytes = _num_bytes(shape, len(tokens))

    def usable(self, tokens: np.ndarray, first_hidden: int, alignment: int) -> int:
        """Return how many tokens of another sequence need not be computed; see `find`."""
        limit = len(tokens) - 1  # the last hidden state gives the next token
        if first_hidden < self.hidden_from:
            limit = min(limit, first_hidden)
        shared = min(num_shared(self.tokens, tokens), limit) // alignment * alignment
        return shared if shared >= BLOCK else 0

    def start_from(self, other: StoredPrefix, count: int) -> None:
        """Copy the first `count` tokens of another prefix."""
        self.row.pool.kv[..., :count, :] = other.row.pool.kv[..., :count, :]
        self.hidden_from = count
        if other.hidden is not None and other.hidden_from < count:
            self.keep_hidden(0, other.hidden[:count])
            self.hidden_from = other.hidden_from

    def keep_hidden(self, start: int, hidden: Tensor) -> None:
        """Store the hidden states of positions `start`, `start + 1`, ..."""
        if self.hidden is None:
            self.hidden = torch.empty(
                len(self.tokens), hidden.shape[1], dtype=hidden.dtype, device=hidden.device
            )
        self.hidden[start : start + len(hidden)] = hidden
        self.hidden_from = min(self.hidden_from, start)


class PrefixStore:
    """The stored prefixes of one model, within a limit of bytes."""

    def __init__(self, shape: CacheShape, limit: Callable[[], int]) -> None:
        """`limit` returns how many bytes all prefixes may take at this moment."""
        self._shape = shape
        self._limit = limit
        self._new: OrderedDict[StoredPrefix, None] = OrderedDict()
        """Never used again so far, oldest first; evicted before `_used`."""
        self._used: OrderedDict[StoredPrefix, None] = OrderedDict()
        """Used again, least recently used first."""
        self._unready: dict[StoredPrefix, None] = {}
        """Being filled, or forgotten while in use: nothing else may read them."""
        self._index = PrefixIndex[StoredPrefix]()
        self._with_hidden = PrefixIndex[StoredPrefix]()
        """Those that have all hidden states."""
        self._coming = PrefixIndex[StoredPrefix]()
        """Those that are being filled."""
        self.num_bytes = 0

    def __len__(self) -> int:
        """Number of prefixes that can be found."""
        return len(self._new) + len(self._used)

    def add(self, key: int, tokens: np.ndarray, row: Row) -> None:
        """Store a copy of a finished sequence; if memory is full, nothing is stored."""
        prefix = self._allocate(key, tokens)
        if prefix is not None:
            source = row.pool.kv[:, row.index, ..., : len(tokens), :]
            prefix.row.pool.kv[:, 0] = source
            self._used[prefix] = None
            self._show(prefix)

    def begin(self, key: int, tokens: np.ndarray) -> StoredPrefix | None:
        """Return a pinned prefix that a prefill fills; None if memory is full."""
        prefix = self._allocate(key, tokens)
        if prefix is not None:
            prefix.num_users = 1
            self._unready[prefix] = None
            self._coming.add(prefix, prefix.hashes)
        return prefix

    def finish(self, prefix: StoredPrefix) -> None:
        """Let others find a prefix that is filled now, unless its weights are gone."""
        self._coming.discard(prefix, prefix.hashes)
        if prefix not in self._unready or prefix.key < 0:
            return
        del self._unready[prefix]
        self._new[prefix] = None
        self._show(prefix)

    def find(
        self, hashes: list[int], tokens: np.ndarray, first_hidden: int, alignment: int = 1
    ) -> tuple[StoredPrefix | None, int]:
        """Return the prefix that saves the most tokens of a sequence, and how many.

        Args:
            first_hidden: first position whose hidden state is needed. Where a prefix has no hidden
                states, the tokens from there on are computed.
            alignment: the number is a multiple of this.
        """
        best, most = None, 0
        for index in (self._with_hidden, self._index):
            for prefix in index.find(hashes)[:_MAX_CANDIDATES]:
                usable = prefix.usable(tokens, first_hidden, alignment)
                if usable > most:
                    best, most = prefix, usable
        return best, most

    def num_coming(self, hashes: list[int]) -> int:
        """Return how many of a sequence's tokens a prefill is computing now, in whole blocks."""
        return self._coming.num_shared(hashes, with_items=1)

    def pin(self, prefix: StoredPrefix) -> None:
        """Keep a prefix in memory while it is read."""
        prefix.num_users += 1
        self._new.pop(prefix, None)
        self._used[prefix] = None
        self._used.move_to_end(prefix)

    def release(self, prefix: StoredPrefix) -> None:
        """Undo `pin` or `begin`; a prefix that nobody may find is dropped."""
        prefix.num_users -= 1
        if prefix in self._unready and not prefix.num_users:
            self._coming.discard(prefix, prefix.hashes)
            del self._unready[prefix]
            self.num_bytes -= prefix.num_bytes

    def learn(self, prefix: StoredPrefix, scores: KnownScores, count: int) -> None:
        """Add what is known about the first `count` tokens, where there is room."""
        extra = prefix.scores.extra_bytes(scores)
        if extra and not self._make_room(extra):
            return
        prefix.scores.learn(scores, 0, count, topk=scores.topk)
        prefix.num_bytes += extra
        self.num_bytes += extra

    def forget(self, key: int) -> None:
        """Drop all prefixes of weights that are gone; those in use when their users end."""
        for prefix in [p for p in (*self._new, *self._used) if p.key == key]:
            self._drop(prefix)
        for prefix in self._unready:
            if prefix.key == key:
                prefix.key = -1

    def shrink(self, max_bytes: int) -> None:
        """Evict prefixes until at most `max_bytes` are held or the others are in use."""
        while self.num_bytes > max_bytes:
            found = next((p for p in (*self._new, *self._used) if not p.num_users), None)
            if found is None:
                return
            self._drop(found)

    def _allocate(self, key: int, tokens: np.ndarray) -> StoredPrefix | None:
        if len(tokens) < BLOCK or not self._make_room(_num_bytes(self._shape, len(tokens))):
            return None
        prefix = StoredPrefix(self._shape, key, tokens)
        self.num_bytes += prefix.num_bytes
        return prefix

    def _make_room(self, num_bytes: int) -> bool:
        room = self._limit() - num_bytes
        if room < 0:
            return False
        self.shrink(room)
        return self.num_bytes <= room

    def _show(self, prefix: StoredPrefix) -> None:
        """Let others find a prefix."""
        self._index.add(prefix, prefix.hashes)
        if prefix.hidden_from == 0:
            self._with_hidden.add(prefix, prefix.hashes)
        if len(self) > _MAX_PREFIXES:
            self.shrink(self.num_bytes - 1)  # evicts one

    def _drop(self, prefix: StoredPrefix) -> None:
        """Let nobody find a prefix, and free its memory unless it is in use."""
        self._new.pop(prefix, None)
        self._used.pop(prefix, None)
        self._index.discard(prefix, prefix.hashes)
        self._with_hidden.discard(prefix, prefix.hashes)
        if prefix.num_users:
            prefix.key = -1
            self._unready[prefix] = None
        else:
            self.num_bytes -= prefix.num_bytes


def _num_bytes(shape: CacheShape, num_tokens: int) -> int:
    """Return the bytes of keys, values, hidden states in float32 and one logprob per token."""
    return num_tokens * (shape.bytes_per_token + 4 * shape.hidden_size + 4)
