"""A training run: an adapter on a shared base model, its gradient and its optimizer state.

run = TrainingRun(model, LoraSpec(rank=32, seed=1))
result = run.forward_backward(data, LossSpec("cross_entropy"))
metrics = run.optim_step(AdamSpec(learning_rate=1e-4))
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from tinker_cookbook.local.engine.budget import KEPT_FORWARD_BYTES, has_short_moments
from tinker_cookbook.local.engine.model.adapter_origin import WeightsOrigin, write_card
from tinker_cookbook.local.engine.model.base_model import BaseModel
from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.model.gradients import GradientSink
from tinker_cookbook.local.engine.model.lora import (
    Adapter,
    peft_tensor_name,
    read_lora_spec,
    write_tensors,
)
from tinker_cookbook.local.engine.model.number_formats import FULL
from tinker_cookbook.local.engine.model.pack import Pack, build_pack, group_packs
from tinker_cookbook.local.engine.model.pack_loss import PackLoss
from tinker_cookbook.local.engine.training.batch_checks import check_batch, check_loss
from tinker_cookbook.local.engine.training.built_in_loss import BuiltInPackLoss
from tinker_cookbook.local.engine.training.custom_loss import GraphPackLoss
from tinker_cookbook.local.engine.training.kept_forwards import ForwardMemory
from tinker_cookbook.local.engine.training.optimizer import AdamState, check_adam_spec
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    LoraSpec,
    LossSpec,
    TrainDatum,
    TrainResult,
)
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.utils.durable_files import flush_folder

__all__ = ["TrainingPass", "TrainingRun"]

_OPTIMIZER_FILE = "optimizer.safetensors"


class TrainingRun:
    """One LoRA adapter in training. Not thread-safe."""

    def __init__(self, model: BaseModel, spec: LoraSpec) -> None:
        """Begin with a new adapter; the same seed gives the same run."""
        self.model = model
        self.adapter = Adapter(spec, model.lora_targets(spec), device=model.device)
        self.gradient: torch.Tensor | None = None
        """Gradient summed over all calls since the last step; None before the first."""
        self.adam_state: AdamState | None = None
        self.num_passes = 0
        """Number of requests that began a backward pass; dropout differs between them."""
        self.forwards = ForwardMemory()

    @classmethod
    def from_folder(cls, model: BaseModel, folder: Path, *, with_optimizer: bool) -> TrainingRun:
        """Return a run that continues from a folder written by `save`.

        Raises:
            UserError: if the folder lacks something that is asked for, or belongs to another model.
        """
        run = cls(model, read_lora_spec(folder))
        run.load(folder, with_optimizer=with_optimizer)
        return run

    def forward_backward(
        self, data: Sequence[TrainDatum], loss: LossSpec, *, backward: bool = True
    ) -> TrainResult:
        """Return the logprobs and the loss; with `backward`, add the gradient to `gradient`.

        Raises:
            UserError: if the data or the loss is unusable; `gradient` is unchanged then.
        """
        training_pass = TrainingPass(self, data, loss, backward=backward)
        while not training_pass.step():
            pass
        return training_pass.result()

    def optim_step(self, adam: AdamSpec) -> dict[str, float]:
        """Take one AdamW step on the accumulated gradient, and clear it.

        Without a gradient it is a step on zeros, which still counts and decays the moments.

        Raises:
            UserError: if a setting is unusable; the gradient is kept then.
        """
        check_adam_spec(adam)
        gradient = self.gradient
        if gradient is None:
            gradient = self.model.spare_gradients.take(self.adapter.parameters)
        self.adam_state = self.adam_state or self._fresh_state()
        grad_norm = self.adam_state.step(self.adapter.parameters, gradient, adam)
        self.model.spare_gradients.give(gradient)
        self.gradient = None
        self.adapter.version += 1
        self.forwards.end_step()
        return {
            "grad_norm": grad_norm,
            "learning_rate": float(adam.learning_rate),
            "num_steps": float(self.adam_state.num_steps),
        }

    @property
    def trains_tied_head(self) -> bool:
        """Whether the run adapts an output embedding that is also the input embedding."""
        trains_head = any(target.part == "unembed" for target in self.adapter.targets)
        return trains_head and self.model.ties_embeddings

    def save(
        self,
        folder: Path,
        *,
        base_model_name: str,
        with_optimizer: bool,
        origin: WeightsOrigin | None = None,
        base_format: str = FULL,
    ) -> None:
        """Write the adapter in PEFT's format, and the optimizer state, into an existing folder.

        Args:
            origin: where the base model's weights are from; None if the name says it.
            base_format: how the base weights are stored; see `EngineSettings`.
        """
        origin = origin or WeightsOrigin(base_model_name)
        self.adapter.save_peft(
            folder, base_model_name=base_model_name, origin=origin, base_format=base_format
        )
        tied = self.trains_tied_head
        write_card(folder, base_model_name, origin, tied_head=tied, base_format=base_format)
        if with_optimizer:
            state = self.adam_state or self._fresh_state()
            tensors = {"num_steps": torch.tensor([state.num_steps], dtype=torch.int64)}
            for label, moment in state.moments.float32().items():
                for key, name in self._moment_names(label):
                    tensors[name] = self.adapter.layout.matrix(moment, key)
            write_tensors(folder / _OPTIMIZER_FILE, tensors, {"optimizer": "adamw"})
            flush_folder(folder)

    def load(self, folder: Path, *, with_optimizer: bool) -> None:
        """Load a saved adapter and drop a pending gradient.

        Without the optimizer state, the next step starts with fresh moments.

        Raises:
            UserError: if the folder does not fit this run, or lacks the optimizer state.
        """
        state = None
        if with_optimizer:
            state = self._read_optimizer(folder)
        self.adapter.load_peft(folder)
        self.adam_state = state
        self.gradient = None
        self.forwards.end_step()

    def _read_optimizer(self, folder: Path) -> AdamState:
        path = folder / _OPTIMIZER_FILE
        if not path.exists():
            raise UserError(
                "the checkpoint has no optimizer state; load it without the optimizer, "
                "or use one that was saved for training"
            )
        state = self._fresh_state()
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for label in state.moments.float32():
                moment = torch.zeros_like(self.adapter.parameters)
                for key, name in self._moment_names(label):
                    if name not in names:
                        raise UserError(f"the checkpoint's optimizer state lacks {name}")
                    place, saved = self.adapter.layout.matrix(moment, key), file.get_tensor(name)
                    if saved.shape != place.shape:
                        raise UserError(
                            f"the checkpoint's {name} has shape {tuple(saved.shape)}; this run "
                            f"needs {tuple(place.shape)}. Load it into a run of the same rank"
                        )
                    place.copy_(saved)
                state.moments.assign(label, moment)
            state.num_steps = int(file.get_tensor("num_steps")[0])
        return state

    def _fresh_state(self) -> AdamState:
        """Return the optimizer state before the first step."""
        short = has_short_moments(str(self.model.product_dtype))
        return AdamState(self.adapter.parameters, short=short)

    def _moment_names(self, label: str) -> list[tuple[str, str]]:
        """Return (layout key, name in the file) for every saved matrix of a moment."""
        return [
            (f"{target.path}.{side}", f"{label}.{peft_tensor_name(target.path, side)}")
            for target in self.adapter.targets
            for side in "AB"
        ]


class TrainingPass:
    """One forward or forward_backward request, computed pack by pack.

    The engine's thread does other work between two packs, such as sampling. Gradients are gathered
    in a separate tensor: the run's own changes only when the whole request has succeeded.
    """

    def __init__(
        self,
        run: TrainingRun,
        data: Sequence[TrainDatum],
        loss: LossSpec,
        *,
        backward: bool = True,
    ) -> None:
        """Check everything and plan the packs; compute nothing yet.

        Raises:
            UserError: if the data or the loss is unusable.
        """
        self._run = run
        self._loss, self._config = check_loss(loss)
        self._graph = loss.graph if loss.name == "custom" else None
        model = run.model
        self._data = check_batch(
            data,
            loss.name,
            vocab_size=model.vocab_size,
            max_tokens=model.max_positions,
            graph=self._graph,
            count_image_tokens=model.count_image_tokens,
        )
        # An adapter's dropout would drop the same of a shared token for all of its sequences.
        share = model.shares_prefixes and not run.adapter.spec.dropout
        self._packs = group_packs(self._data, model.pack_tokens, share=share)
        self._next_pack = 0
        self._backward = backward
        run.num_passes += backward
        self._seed = f"{run.adapter.spec.seed}.{run.num_passes}"
        self._gradient: torch.Tensor | None = None
        self._logprobs: list[np.ndarray | None] = [None] * len(data)
        self._loss_sum = 0.0
        self._graph_metrics: dict[str, float] = {}
        self._started = time.perf_counter()

    @property
    def longest(self) -> int:
        """Number of tokens in the longest sequence."""
        return max(len(datum.tokens) for datum in self._data)

    @property
    def num_bytes(self) -> int:
        """Estimated extra memory for this pass, in bytes."""
        model, parameters = self._run.model, self._run.adapter.parameters
        lengths = [len(datum.tokens) for datum in self._data]
        largest = max(
            model.batch_bytes(
                pack.num_tokens(lengths),
                self._data[pack.indices[0]].targets.shape[1],
                self._run.adapter.rank,
                backward=self._backward,
                num_copied_keys=pack.num_copied_keys(lengths),
            )
            for pack in self._packs
        )
        results = 4 * sum(datum.targets.size for datum in self._data)
        return largest + results + (parameters.nbytes if self._backward else 0)

    def step(self) -> bool:
        """Compute the next pack; return True when all are done."""
        if self._next_pack == len(self._packs):
            return True
        model, adapter = self._run.model, self._run.adapter
        pack = build_pack(self._packs[self._next_pack], self._data, self._loss.driver, model.device)
        pack.seed = f"{self._seed}.{self._next_pack}"
        pack_loss = self._build_loss(pack)
        if self._backward:
            if self._gradient is None:
                self._gradient = model.spare_gradients.take(adapter.parameters)
            sink = GradientSink(adapter.layout, self._gradient)
            # A loss that looks at the sampler's logprobs may need another arithmetic.
            kept = self._run.forwards.take(pack)
            logprobs = model.logprobs_and_gradient(adapter, pack, pack_loss, sink, kept=kept)
        else:
            logprobs = self._forward(pack)
            if pack_loss.by_sequence:
                pack_loss.see_all(logprobs)
            else:
                pack_loss.gradient(slice(0, len(logprobs)), logprobs)
        self._loss_sum += pack_loss.total
        for key, value in pack_loss.metrics.items():
            self._graph_metrics[key] = self._graph_metrics.get(key, 0.0) + value
        in_order = torch.empty_like(logprobs)
        in_order[pack.order] = logprobs
        for index, part in zip(pack.indices, in_order.cpu().split(pack.lengths), strict=True):
            values = part.numpy()
            self._logprobs[index] = values[:, 0] if self._data[index].is_flat else values
        self._next_pack += 1
        return self._next_pack == len(self._packs)

    def _forward(self, pack: Pack) -> torch.Tensor:
        """Return the logprobs; keep the pass if `forward_backward` will probably follow."""
        model, adapter, forwards = self._run.model, self._run.adapter, self._run.forwards
        forwards.note(pack)
        num_bytes = self._kept_bytes(len(pack.tokens))
        if num_bytes is None or not forwards.can_keep(num_bytes, KEPT_FORWARD_BYTES):
            return model.logprobs(adapter, pack)
        logprobs, kept = model.logprobs_and_pass(adapter, pack)
        forwards.keep(pack, kept, num_bytes, KEPT_FORWARD_BYTES)
        return logprobs

    def _kept_bytes(self, num_tokens: int) -> int | None:
        """Return the memory of a pass that is kept; None if it cannot be kept."""
        if self._run.adapter.spec.dropout:
            return None  # a backward pass drops inputs of the adapter, this pass did not
        return self._run.model.kept_bytes(num_tokens, self._run.adapter.rank)

    def _build_loss(self, pack: Pack) -> PackLoss:
        if self._graph is None:
            return BuiltInPackLoss(self._loss, self._config, pack.inputs)
        device = self._run.model.device
        inputs = [
            {
                name: to_device(value, device)
                for name, value in self._data[index].graph_inputs.items()
            }
            for index in pack.indices
        ]
        return GraphPackLoss(self._graph, inputs, pack.lengths)

    def result(self) -> TrainResult:
        """Return the result and add the gradient to the run's. Call it once, after the last step.

        Raises:
            UserError: if the loss or its gradient is not finite; the gradient is dropped then.
        """
        if not np.isfinite(self._loss_sum):
            raise UserError(
                f"the loss is {self._loss_sum}; the inputs lead out of the range of float32. "
                "Check weights, advantages and logprobs for extreme values"
            )
        if self._gradient is not None:
            if not bool(torch.isfinite(self._gradient.sum())):
                self._run.model.spare_gradients.give(self._gradient)
                raise UserError(
                    "the gradient is not finite; the inputs lead out of the range of float32. "
                    "Check weights, advantages and logprobs for extreme values"
                )
            if self._run.gradient is None:
                self._run.gradient = self._gradient
            else:
                self._run.gradient.add_(self._gradient)
                self._run.model.spare_gradients.give(self._gradient)
            self._gradient = None
        num_tokens = sum(len(datum.tokens) for datum in self._data)
        metrics = {"loss:sum": self._loss_sum, "num_tokens:sum": float(num_tokens)}
        for key, total in self._graph_metrics.items():
            metrics[key] = total / len(self._data) if key.endswith(":mean") else total
        return TrainResult(
            logprobs=[values for values in self._logprobs if values is not None], metrics=metrics
        )
