"""The decoder for a GPU: steps that only decode run with static shapes, all others as they come.

The rows of a pool are one step (`static_step`), so a batch over several pools takes several steps.
Batches with prompts, with more adapters than the bank has places for, or in a full pool whose rows
do not all decode, are computed by `torch_decoder`.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.model.weights import ModelWeights
from tinker_cookbook.local.engine.sampling.adapter_bank import AdapterBank
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch
from tinker_cookbook.local.engine.sampling.cache_rows import Row
from tinker_cookbook.local.engine.sampling.cuda_graphs import StepGraphs
from tinker_cookbook.local.engine.sampling.static_step import StaticStep, StepPlan, plan_step
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder

__all__ = ["StaticDecoder"]


class StaticDecoder:
    """Runs batches through one base model whose matrices are dense tensors."""

    exact = False

    def __init__(self, arch: ArchConfig, weights: ModelWeights, *, graphs: bool = True) -> None:
        """`graphs` records steps on a GPU."""
        self._plain = TorchDecoder(arch, weights)
        self.overhead_tokens = self._plain.overhead_tokens
        self.cache_shape = self._plain.cache_shape
        self.num_static_batches = 0
        """Number of batches that were computed with static shapes."""
        self._device = weights.device
        self._bank = AdapterBank(weights.dtype, weights.device)
        self._step = StaticStep(self._plain.layers, self._plain.rope, self._bank)
        self._graphs = StepGraphs(weights.device, enabled=graphs)
        self._recorded: tuple[int, ...] = ()
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def num_graphs(self) -> int:
        """Number of recorded steps."""
        return len(self._graphs)

    @torch.inference_mode()
    def forward(self, batch: Batch[Row]) -> Tensor:
        """Return the hidden states [N, H] before the final norm, and write keys and values."""
        self._last = None
        plans = None if batch.chunks else self._plan(batch)
        if plans is None:
            return self._plain.forward(batch)
        self._drop_old_graphs()
        self.num_static_batches += 1
        inputs = to_device(np.concatenate([plan.inputs for plan in plans], axis=1), self._device)
        if len(plans) == 1:
            self._last = self._run(plans[0], inputs)
            return self._last[0]
        parts = []
        for plan, part in zip(plans, inputs.split([p.num_rows for p in plans], 1), strict=True):
            # the next step may overwrite the outputs of this one
            parts.append([output.clone() for output in self._run(plan, part)])
        self._last = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return self._last[0]

    def next_logits(self, batch: Batch[Row]) -> Tensor:
        """Return float32 logits [N, V] of a batch without chunks, and write keys and values."""
        return self.logits(self.forward(batch), batch.adapters())

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 logits [N, V] for hidden states [N, H] of `forward`.

        A static step has computed those of all its rows. They are valid until the next batch.
        """
        if self._last is not None and hidden is self._last[0]:
            return self._last[1]
        return self._plain.logits(hidden, adapters)

    def _plan(self, batch: Batch[Row]) -> list[StepPlan] | None:
        """Return one step per pool; None if the batch cannot be computed so."""
        places = self._bank.place(batch.decode_adapters)
        if places is None:
            return None
        tokens = np.asarray(batch.decode_tokens, np.int64)
        positions = np.asarray(batch.decode_positions, np.int64)
        plans, first = [], 0
        for pool, group in itertools.groupby(batch.decode_rows, key=lambda row: row.pool):
            rows = np.array([row.index for row in group], np.int64)
            part = slice(first, first + len(rows))
            plan = plan_step(pool, rows, tokens[part], positions[part], places[part])
            if plan is None:
                return None
            plans.append(plan)
            first = part.stop
        return plans

    def _run(self, plan: StepPlan, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states and the logits of the rows that have a token."""
        step = self._step
        step.load(plan, inputs)
        self._graphs.run(step.key(plan), lambda: step.compute(plan), step.tables(plan))
        outputs, rows = step.outputs(plan.num_rows), plan.rows
        if rows[-1] == len(rows) - 1:  # they are the first ones
            return outputs[0][: len(rows)], outputs[1][: len(rows)]
        chosen = to_device(rows, self._device)
        return outputs[0][chosen], outputs[1][chosen]

    def _drop_old_graphs(self) -> None:
        """Drop the records if weights or adapters have moved."""
        current = (self._bank.moves, *self._plain.layers.addresses())
        if current != self._recorded:
            self._graphs.clear()
            self._recorded = current
