"""What the scheduler asks of a model: a batch to compute, and a cache that holds its sequences.

`torch_decoder`, `native_decoder` and `kv_cache` serve native models; `hf_decoder` serves models
that run through transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.prefix_store import PrefixStore, StoredPrefix
from tinker_cookbook.local.engine.types import ImageInput

__all__ = ["Batch", "BatchDecoder", "CachePool", "CacheRow", "Chunk", "RowT", "SequenceCache"]


class CachePool(Protocol):
    """Rows of one capacity."""

    @property
    def capacity(self) -> int:
        """Maximum tokens per row."""
        ...


class CacheRow(Protocol):
    """The place of one sequence in a cache."""

    @property
    def pool(self) -> CachePool: ...
    @property
    def index(self) -> int:
        """Place within the pool. It changes when other rows are freed."""
        ...

    def activate(self) -> None:
        """Move the row among those that decode; they are the first rows of their pool."""
        ...


RowT = TypeVar("RowT", bound=CacheRow)
"""The type of row that a decoder and its cache share."""


@dataclass(frozen=True)
class Chunk(Generic[RowT]):
    """Consecutive tokens of one sequence: a part of its prompt, or its draft tokens."""

    tokens: np.ndarray
    start: int
    """Position of the first token; keys and values of all earlier positions are in `row`, or in
    `prefix`."""
    row: RowT | None
    """None for a whole prompt that nothing follows: its keys and values are not kept."""
    adapter: StackedLora | None
    images: Sequence[ImageInput] = ()
    """Images of a prompt's first chunk; their positions count from the start of the prompt."""
    prefix: RowT | None = None
    """Without `row`: where the keys and values of the positions before `start` are read. Other
    chunks may read them too. `start` is then a multiple of four."""


@dataclass
class Batch(Generic[RowT]):
    """The tokens of one forward pass, without padding.

    Axis N of all results: first one token per decoding sequence, grouped by pool and in the order
    of the pool's rows, then the tokens of all chunks, one chunk after another.
    """

    decode_tokens: list[int] = field(default_factory=list)
    decode_positions: list[int] = field(default_factory=list)
    decode_adapters: list[StackedLora | None] = field(default_factory=list)
    decode_same: list[tuple[int, int]] = field(default_factory=list)
    """Per decoding sequence: the number of an earlier one that begins with the same tokens, and how
    many tokens these are (0: none known). Attention reads the shared keys once. May be empty."""
    decode_rows: list[RowT] = field(default_factory=list)
    chunks: list[Chunk[RowT]] = field(default_factory=list)

    def tokens(self) -> np.ndarray:
        """Return all token ids, int64 [N]."""
        parts = [np.asarray(self.decode_tokens, np.int64)]
        return np.concatenate([*parts, *(chunk.tokens for chunk in self.chunks)]).astype(np.int64)

    def positions(self) -> np.ndarray:
        """Return the position of every token in its sequence, int64 [N]."""
        parts = [np.asarray(self.decode_positions, np.int64)]
        for chunk in self.chunks:
            parts.append(np.arange(chunk.start, chunk.start + len(chunk.tokens)))
        return np.concatenate(parts).astype(np.int64)

    def adapters(self) -> list[tuple[StackedLora | None, int]]:
        """Return (adapter, number of consecutive tokens) over the whole batch."""
        spans = [(adapter, 1) for adapter in self.decode_adapters]
        return spans + [(chunk.adapter, len(chunk.tokens)) for chunk in self.chunks]


class BatchDecoder(Protocol[RowT]):
    """Computes batches whose rows belong to its own kind of cache."""

    exact: bool
    """Whether a token's numbers are bit-identical in any batch and chunk."""
    overhead_tokens: int
    """Fixed cost of a forward pass, expressed as a number of tokens."""

    def forward(self, batch: Batch[RowT]) -> Tensor:
        """Return one hidden state per token, [N, ...], and write keys and values to the cache."""
        ...

    def next_logits(self, batch: Batch[RowT]) -> Tensor:
        """Return float32 logits [N, V] of a batch without chunks, and write keys and values.

        They equal those of `forward` and `logits`, and are valid until the next pass.
        """
        ...

    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 logits [M, V] for M hidden states.

        Args:
            hidden: any rows of what `forward` returned.
            adapters: (adapter, number of consecutive rows), M rows in total.
        """
        ...


class SequenceCache(Protocol[RowT]):
    """Holds the keys and values of sequences, one row per sequence; see `kv_cache.KvCache`."""

    max_bytes: int

    @property
    def prefixes(self) -> PrefixStore | None:
        """Prefixes for later requests; None if a row cannot start with another sequence's part."""
        ...

    @property
    def bytes_per_token(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def max_row_tokens(self) -> int: ...
    def allocate(self, num_tokens: int, expected: int = 1) -> RowT | None: ...
    def grow(self, row: RowT, num_tokens: int) -> RowT | None: ...
    def copy(self, source: RowT, target: RowT, num_tokens: int) -> None: ...
    def free(self, row: RowT) -> None: ...
    def restore(self, prefix: StoredPrefix, row: RowT, num_tokens: int) -> None: ...
    def remember(self, key: int, tokens: np.ndarray, row: RowT) -> None: ...
