"""Sampling from models that run through transformers, one sequence at a time.

Each row holds a sequence with its own transformers cache, so nothing is batched. Scheduling and
drawing are the same as for native models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.hf_model import HfModel, HfSequence
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch
from tinker_cookbook.local.engine.sampling.prefix_store import StoredPrefix
from tinker_cookbook.local.engine.types import ImageInput

__all__ = ["HfCache", "HfDecoder"]

_MAX_ROWS = 64
"""Maximum sequences in memory: the size of their caches is not known in advance."""


class HfRow:
    """The place of a sequence and its cache."""

    def __init__(self, pool: HfPool) -> None:
        self.pool = pool
        self.sequence: HfSequence | None = None

    @property
    def index(self) -> int:
        """Place in the pool."""
        return self.pool.rows.index(self)

    def activate(self) -> None:
        """Move the row among those that decode."""
        self.pool.activate(self)


class HfPool:
    """All rows; the first `num_active` belong to sequences that decode."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[HfRow] = []
        self.num_active = 0

    def activate(self, row: HfRow) -> None:
        """Move a prefilled row behind the decoding ones."""
        self.rows.remove(row)
        self.rows.insert(self.num_active, row)
        self.num_active += 1


class HfCache:
    """Rows of sequences, limited in number; it shares and stores no prefixes."""

    def __init__(self, model: HfModel) -> None:
        self.prefixes = None  # how to cut a transformers cache depends on the architecture
        self.max_bytes = 0
        self.bytes_per_token = 0
        self.max_row_tokens = model.max_positions
        self.num_bytes = 0
        self._pool = HfPool(model.max_positions)

    def allocate(self, num_tokens: int, expected: int = 1) -> HfRow | None:
        if len(self._pool.rows) >= _MAX_ROWS:
            return None
        row = HfRow(self._pool)
        self._pool.rows.append(row)
        return row

    def grow(self, row: HfRow, num_tokens: int) -> HfRow:
        return row

    def copy(self, source: HfRow, target: HfRow, num_tokens: int) -> None:
        """Let a row continue from a copy of another one, which holds exactly `num_tokens`."""
        assert source.sequence is not None, "only a row that holds tokens is copied"
        target.sequence = source.sequence.fork()

    def free(self, row: HfRow) -> None:
        if row.index < self._pool.num_active:
            self._pool.num_active -= 1
        self._pool.rows.remove(row)

    def restore(self, prefix: StoredPrefix, row: HfRow, num_tokens: int) -> None:
        raise NotImplementedError("no prefixes are stored")

    def remember(self, key: int, tokens: np.ndarray, row: HfRow) -> None:
        pass


class HfDecoder:
    """Runs batches through a transformers model.

    transformers returns logits, not hidden states, so `forward` returns logits and `logits` passes
    them through.
    """

    exact = False
    overhead_tokens = 0

    def __init__(self, model: HfModel) -> None:
        self._model = model

    def forward(self, batch: Batch[HfRow]) -> Tensor:
        """Return float32 logits [N, V] of all tokens."""
        parts = []
        for number, row in enumerate(batch.decode_rows):
            token = np.asarray(batch.decode_tokens[number : number + 1])
            parts.append(self._extend(row, token, batch.decode_adapters[number]))
        for chunk in batch.chunks:
            parts.append(self._extend(chunk.row, chunk.tokens, chunk.adapter, chunk.images))
        return torch.cat(parts)

    def next_logits(self, batch: Batch[HfRow]) -> Tensor:
        """Return float32 logits [N, V] of a batch without chunks, and write keys and values."""
        return self.logits(self.forward(batch), batch.adapters())

    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return `hidden`, which are logits already."""
        return hidden

    def _extend(
        self,
        row: HfRow | None,
        tokens: np.ndarray,
        adapter: StackedLora | None,
        images: Sequence[ImageInput] = (),
    ) -> Tensor:
        sequence = None if row is None else row.sequence
        if sequence is None:
            sequence = self._model.start(None if adapter is None else adapter.adapter, images)
            if row is not None:
                row.sequence = sequence
        return sequence.extend(torch.from_numpy(tokens.astype(np.int64)))
