"""What the scheduler asks of a model: a batch to compute, and a cache that holds its sequences.

`torch_decoder`, `native_decoder` and `kv_cache` serve native models, `hf_decoder` those through
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.types import ImageInput

__all__ = ["Batch", "BatchDecoder", "Chunk", "SequenceCache"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive prompt tokens of one sequence."""

    tokens: np.ndarray
    start: int
    """Position of the first token; what is before it is in `row`."""
    row: Any
    """None: nothing is before it and nothing comes after, so it needs no cache."""
    adapter: StackedLora | None
    images: Sequence[ImageInput] = ()
    """Inside this chunk, which is a prompt's first; positions count from the prompt's start."""


@dataclass
class Batch:
    """Decoding rows first, those of a pool together and in its order, then the chunks."""

    decode_tokens: list[int] = field(default_factory=list)
    decode_positions: list[int] = field(default_factory=list)
    decode_adapters: list[StackedLora | None] = field(default_factory=list)
    decode_same: list[tuple[int, int]] = field(default_factory=list)
    """Per decoding row: an earlier one whose sequence has the same first tokens, and how many these
    are; 0 where none is known. Empty: nothing is known."""
    decode_rows: list[Any] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def sequences(self) -> list[Any]:
        """The sequences that are decoded, in the order of their rows."""
        return [row.owner for row in self.decode_rows]

    def tokens(self) -> np.ndarray:
        """int64 [N]."""
        parts = [np.asarray(self.decode_tokens, np.int64)]
        return np.concatenate([*parts, *(chunk.tokens for chunk in self.chunks)]).astype(np.int64)

    def positions(self) -> np.ndarray:
        """int64 [N]."""
        parts = [np.asarray(self.decode_positions, np.int64)]
        for chunk in self.chunks:
            parts.append(np.arange(chunk.start, chunk.start + len(chunk.tokens)))
        return np.concatenate(parts).astype(np.int64)

    def adapters(self) -> list[tuple[StackedLora | None, int]]:
        """(adapter, number of consecutive tokens) over the batch."""
        spans = [(adapter, 1) for adapter in self.decode_adapters]
        return spans + [(chunk.adapter, len(chunk.tokens)) for chunk in self.chunks]


class BatchDecoder(Protocol):
    """Computes batches; rows are those of the cache that belongs to it."""

    exact: bool
    """Whether a token's numbers are the same bits in any batch and chunk."""
    overhead_tokens: int
    """What a forward pass costs whatever is in it, as so many more tokens."""

    def forward(self, batch: Batch) -> Tensor:
        """Return a hidden state per token, [N, ...], and fill the caches."""
        ...

    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 logits [N, V] of some hidden states."""
        ...


class SequenceCache(Protocol):
    """Holds sequences in rows; see `kv_cache.KvCache`."""

    shares_prefixes: bool
    """Whether a row can begin as a part of another sequence."""
    max_bytes: int

    @property
    def bytes_per_token(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def max_row_tokens(self) -> int: ...
    def active_pools(self) -> list[Any]: ...
    def allocate(self, num_tokens: int, expected: int = 1) -> Any: ...
    def grow(self, row: Any, num_tokens: int) -> Any: ...
    def copy(self, source: Any, target: Any, num_tokens: int) -> None: ...
    def free(self, row: Any) -> None: ...
    def restore(self, key: int, tokens: np.ndarray, row: Any, *, longer_than: int) -> int: ...
    def remember(self, key: int, tokens: np.ndarray, row: Any) -> None: ...
    def forget(self, key: int) -> None: ...
