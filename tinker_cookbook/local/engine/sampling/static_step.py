"""One decoding step of the rows of one pool, with shapes that repeat from step to step.

Rows and lengths are rounded up, inputs are copied into fixed memory and outputs appear in fixed
memory. So the work of a step can be recorded once and repeated (`cuda_graphs`). Row n of the step
is row n of the pool; rows without a token are computed and dropped.

Axes: R rows of the step, C length of the cache that is read, Q query heads, K key/value heads, D
head dimension, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.model.ops import RopeTable
from tinker_cookbook.local.engine.sampling.adapter_bank import NO_ADAPTER, AdapterBank, BankRouter
from tinker_cookbook.local.engine.sampling.cache_rows import Pool
from tinker_cookbook.local.engine.sampling.torch_layers import TorchLayers

__all__ = ["MAX_ROWS", "StaticStep", "StepPlan", "plan_step"]

MAX_ROWS = 128
_SMALLEST_LENGTH = 64
_TOKEN, _POSITION, _WRITE_ROW, _PLACE = range(4)


@dataclass(frozen=True)
class StepPlan:
    """The shapes and the inputs of one step."""

    pool: Pool
    num_rows: int
    """R."""
    length: int
    """C."""
    num_places: int
    """Number of places of the adapter bank that are computed; 0: the base model alone."""
    inputs: np.ndarray
    """int64 [4, R]: token, its position, the row that its keys go to, the place of its adapter."""
    rows: np.ndarray
    """int64: the rows of the step that have a token."""


def plan_step(
    pool: Pool, rows: np.ndarray, tokens: np.ndarray, positions: np.ndarray, places: np.ndarray
) -> StepPlan | None:
    """Plan a step of some rows of a pool, int64 each; None if it does not fit.

    A row of another sequence that has no token in this step must not be written to. Its keys go to
    a spare row of the pool; without one, the step does not fit.
    """
    num_rows = min(_round_up(int(rows.max()) + 1, 1), pool.kv.shape[1])
    if num_rows > MAX_ROWS:
        return None
    in_use = len(pool.rows)
    write_rows = np.arange(num_rows)
    if len(rows) < min(num_rows, in_use):
        if not pool.num_spare:
            return None
        write_rows[:in_use] = in_use
    write_rows[rows] = rows
    inputs = np.zeros((4, num_rows), np.int64)
    inputs[_PLACE] = NO_ADAPTER
    inputs[_WRITE_ROW] = write_rows
    for number, values in ((_TOKEN, tokens), (_POSITION, positions), (_PLACE, places)):
        inputs[number, rows] = values
    length = min(_round_up(int(positions.max()) + 1, _SMALLEST_LENGTH), pool.capacity)
    num_places = _round_up(int(places.max()) + 1, 0)
    return StepPlan(pool, num_rows, length, num_places, inputs, rows)


def _round_up(number: int, smallest: int) -> int:
    """Return the next power of two, or `smallest` if that is more; 0 remains 0."""
    return max(smallest, 1 << (number - 1).bit_length()) if number else smallest


class StaticStep:
    """The fixed memory of the steps of one model, and their computation."""

    def __init__(self, layers: TorchLayers, rope: RopeTable, bank: AdapterBank) -> None:
        self._layers, self._rope, self._bank = layers, rope, bank
        device = layers.weights.device
        self._inputs = torch.zeros(4, MAX_ROWS, dtype=torch.int64, device=device)
        self._outputs: dict[int, tuple[Tensor, Tensor]] = {}

    def load(self, plan: StepPlan, inputs: Tensor) -> None:
        """Copy the inputs [4, R], which are on the device, to where `compute` reads them."""
        self._inputs[:, : plan.num_rows].copy_(inputs)

    def outputs(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return where a step of R rows writes: hidden states [R, H] and logits [R, V], float32.

        The next step of about as many rows overwrites them.
        """
        size = _round_up(num_rows, 1)
        if size not in self._outputs:
            arch, device = self._layers.arch, self._inputs.device
            self._outputs[size] = (
                torch.empty(size, arch.hidden_size, device=device),
                torch.empty(size, arch.vocab_size, device=device),
            )
        hidden, logits = self._outputs[size]
        return hidden[:num_rows], logits[:num_rows]

    def key(self, plan: StepPlan) -> tuple[int, ...]:
        """Return what a record of `compute` depends on, apart from the weights and the bank."""
        kv = plan.pool.kv
        return (kv.data_ptr(), *kv.shape, plan.num_rows, plan.length, plan.num_places)

    def tables(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines that `compute` reads; a record must keep them."""
        return self._rope.up_to(plan.length)

    def compute(self, plan: StepPlan) -> None:
        """Compute the step: it waits for nothing and reads no number on the processor."""
        tokens, positions, write_rows, places = self._inputs[:, : plan.num_rows]
        rope = [table[positions][:, None] for table in self.tables(plan)]
        router = BankRouter(self._bank, places, plan.num_places)
        mask = _mask(positions, plan.length, plan.pool.kv.dtype)

        def attend(q: Tensor, kv: Tensor, layer: int) -> Tensor:
            stored = plan.pool.kv[layer]  # [rows of the pool, K, 2, capacity, D]
            stored.permute(0, 3, 2, 1, 4)[write_rows, positions] = kv
            keys, values = stored[: plan.num_rows, :, :, : plan.length].unbind(2)  # [R, K, C, D]
            # query heads that share a key head take the axis of query positions, as in eager steps
            grouped = q.unflatten(1, (keys.shape[1], -1))
            out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            return out.flatten(1)

        x = self._layers.hidden(tokens, rope, router, attend)
        hidden, logits = self.outputs(plan.num_rows)
        hidden.copy_(x)
        logits.copy_(self._layers.logits(x, router))


def _mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return [R, 1, 1, C]: minus infinity for tokens behind each row's own, otherwise 0.

    A mask of truth values would be turned into this one in every layer.
    """
    later = torch.arange(length, device=positions.device) > positions[:, None]
    mask = torch.zeros(later.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(later, -math.inf)[:, None, None]
