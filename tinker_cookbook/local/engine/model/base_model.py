"""The interface of a base model to the trainer, and its native implementation.

`NativeModel` runs the families that `architecture` describes on the engine's own kernels;
`hf_model.HfModel` runs every other causal model through transformers: slower, the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig, read_arch
from tinker_cookbook.local.engine.model.devices import choose_dtype
from tinker_cookbook.local.engine.model.gradients import GradientSink, SpareGradients
from tinker_cookbook.local.engine.model.head import Head
from tinker_cookbook.local.engine.model.lora import Adapter, LoraTarget, lora_targets
from tinker_cookbook.local.engine.model.matrices import DenseMatrix
from tinker_cookbook.local.engine.model.pack import Pack
from tinker_cookbook.local.engine.model.pack_loss import PackLoss
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, ShapePacker
from tinker_cookbook.local.engine.model.transformer import ForwardPass, PackedTransformer
from tinker_cookbook.local.engine.model.twin import float32_twin, twin_bytes
from tinker_cookbook.local.engine.model.weights import ModelWeights, describe_weights, load_weights
from tinker_cookbook.local.engine.native.build import load_kernels
from tinker_cookbook.local.engine.native.products import Products
from tinker_cookbook.local.engine.types import ImageInput, LoraSpec

__all__ = [
    "PACK_TOKENS_CPU",
    "BaseModel",
    "NativeModel",
    "describe_native_model",
    "load_base_model",
    "reuse_freed_memory",
]

_ACTIVATION_BYTES = 2 * 2**30
"""Memory that a forward pass may keep for the backward pass; blocks beyond it are recomputed."""
PACK_TOKENS_CPU = 1024
_PACK_TOKENS_ACCELERATOR = 8192


class BaseModel(Protocol):
    """A frozen model that adapters are trained on. Used by one thread."""

    spare_gradients: SpareGradients

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """Maximum number of tokens in a sequence."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def pack_tokens(self) -> int:
        """Number of tokens that should go through the model together."""
        ...

    @property
    def count_image_tokens(self) -> Callable[[ImageInput, str], int] | None:
        """A function that counts the positions of an image; None where the model reads text only.

        Its second argument says where the image is; a UserError begins with it.
        """
        ...

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding."""
        ...

    def lora_targets(self, spec: LoraSpec) -> tuple[LoraTarget, ...]:
        """Return the modules that a run with this spec trains."""
        ...

    def batch_bytes(self, num_tokens: int, num_targets: int, rank: int, *, backward: bool) -> int:
        """Return the estimated extra memory for a pack, in bytes.

        Args:
            num_targets: number of targets per token.
        """
        ...

    def logprobs(self, adapter: Adapter, pack: Pack) -> torch.Tensor:
        """Return the logprobs of the pack's targets, float32 [M, K]."""
        ...

    def logprobs_and_gradient(
        self,
        adapter: Adapter,
        pack: Pack,
        loss: PackLoss,
        sink: GradientSink,
        *,
        kept: ForwardPass | None = None,
    ) -> torch.Tensor:
        """Return the logprobs, and add the LoRA gradients of the loss to `sink`.

        Args:
            kept: the forward pass over the same pack with the same weights; None computes it.
        """
        ...

    def kept_bytes(self, num_tokens: int, rank: int) -> int | None:
        """Return the memory of a forward pass that can be run backward later.

        None if this model cannot keep a pass of this size, or would compute it differently.
        """
        ...

    def logprobs_and_pass(self, adapter: Adapter, pack: Pack) -> tuple[torch.Tensor, ForwardPass]:
        """Return the logprobs, and the forward pass for a later `logprobs_and_gradient`."""
        ...


class NativeModel:
    """A base model on the engine's own kernels."""

    count_image_tokens = None

    def __init__(
        self,
        arch: ArchConfig,
        weights: ModelWeights,
        *,
        compiled: bool = True,
        pack_tokens: int | None = None,
        activation_bytes: int = _ACTIVATION_BYTES,
    ) -> None:
        """
        Args:
            compiled: use the compiled kernels where they exist.
            pack_tokens: number of tokens computed together; None chooses by device.
            activation_bytes: memory that the forward pass may keep for the backward pass. Blocks
                beyond it are recomputed, with bit-identical results.
        """
        self.arch = arch
        self.weights = weights
        self.transformer = PackedTransformer(arch, weights)
        self.head = Head(weights.head)
        self._compiled = compiled
        self._exact: tuple[PackedTransformer, Head] | None = None
        self.spare_gradients = SpareGradients()
        default = PACK_TOKENS_CPU if weights.on_cpu else _PACK_TOKENS_ACCELERATOR
        self.pack_tokens = pack_tokens or default
        self.activation_bytes = activation_bytes

    @property
    def vocab_size(self) -> int:
        return self.arch.vocab_size

    @property
    def max_positions(self) -> int:
        return self.arch.max_positions

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def ties_embeddings(self) -> bool:
        return self.weights.ties_embeddings

    def lora_targets(self, spec: LoraSpec) -> tuple[LoraTarget, ...]:
        return lora_targets(self.arch, spec)

    @torch.no_grad()
    def logprobs(self, adapter: Adapter, pack: Pack) -> torch.Tensor:
        transformer, head = self._exact_parts() or (self.transformer, self.head)
        hidden, _ = transformer.forward(adapter, pack.tokens, pack.lengths)
        return head.logprobs(adapter, hidden[pack.rows], pack.targets)

    def kept_bytes(self, num_tokens: int, rank: int) -> int | None:
        if self._has_twin or self._num_blocks_to_keep(num_tokens, rank) < self.arch.num_layers:
            return None
        block = self.transformer.activation_bytes(num_tokens, rank)
        return self.arch.num_layers * block.full + 4 * num_tokens * self.arch.hidden_size

    @torch.no_grad()
    def logprobs_and_pass(self, adapter: Adapter, pack: Pack) -> tuple[torch.Tensor, ForwardPass]:
        hidden, tape = self.transformer.forward(
            adapter, pack.tokens, pack.lengths, keep_blocks=self.arch.num_layers
        )
        logprobs = self.head.logprobs(adapter, hidden[pack.rows], pack.targets)
        return logprobs, (hidden, tape)

    @torch.no_grad()
    def logprobs_and_gradient(
        self,
        adapter: Adapter,
        pack: Pack,
        loss: PackLoss,
        sink: GradientSink,
        *,
        kept: ForwardPass | None = None,
    ) -> torch.Tensor:
        exact = self._exact_parts() if loss.compares else None
        transformer, head = exact or (self.transformer, self.head)
        hidden, tape = kept or transformer.forward(
            adapter,
            pack.tokens,
            pack.lengths,
            keep_blocks=self._num_blocks_to_keep(len(pack.tokens), adapter.rank),
            backward_dtype=self.weights.dtype if exact else None,
        )
        # Rows with a gradient come first: only they go through the head's backward pass.
        selected, split = hidden[pack.rows], pack.num_gradient_rows
        if loss.by_sequence:
            loss.see_all(head.logprobs(adapter, selected, pack.targets))
        logprobs, selected_grad = head.logprobs_and_gradient(
            adapter, selected[:split], pack.targets[:split], loss.gradient, sink
        )
        rest = head.logprobs(adapter, selected[split:], pack.targets[split:])
        hidden_grad = torch.zeros_like(hidden, dtype=self.weights.dtype)
        hidden_grad[pack.rows[:split]] = selected_grad.to(hidden_grad.dtype)
        del hidden, selected, selected_grad
        if split:
            self.transformer.backward(adapter, tape, hidden_grad, sink)
        return torch.cat([logprobs, rest])

    def _exact_parts(self) -> tuple[PackedTransformer, Head] | None:
        """Return the parts that compute logprobs in the sampler's arithmetic.

        None where the model's own arithmetic is the sampler's, and where no kernels are compiled.
        """
        if self._exact is None and self._has_twin:
            kernels = load_kernels()
            if kernels is not None:
                blocks = MatrixBlocks(Products(kernels))
                twin = float32_twin(self.arch, self.weights, blocks)
                assert isinstance(self.weights.head, DenseMatrix), "bfloat16 is not packed"
                head = Head(twin.head, backward_matrix=self.weights.head)
                self._exact = PackedTransformer(self.arch, twin), head
        return self._exact

    @property
    def _has_twin(self) -> bool:
        return self.weights.on_cpu and self.weights.dtype != torch.float32 and self._compiled

    def batch_bytes(self, num_tokens: int, num_targets: int, rank: int, *, backward: bool) -> int:
        block = self.transformer.activation_bytes(num_tokens, rank)
        # One block at work and its gradients, the states of all rows, several values per target.
        total = 2 * block.full + num_tokens * 16 * (self.arch.hidden_size + num_targets)
        total += self.head.buffer_bytes(num_tokens)
        total += twin_bytes(self.weights) if self._has_twin else 0
        if backward:
            keep = self._num_blocks_to_keep(num_tokens, rank)
            total += keep * block.full + (self.arch.num_layers - keep) * block.least
        return total

    def _num_blocks_to_keep(self, num_tokens: int, rank: int) -> int:
        """Return how many blocks a forward pass keeps in full; the others are recomputed."""
        block, num_blocks = (
            self.transformer.activation_bytes(num_tokens, rank),
            self.arch.num_layers,
        )
        spare = self.activation_bytes - num_blocks * block.least
        return max(0, min(num_blocks, spare // (block.full - block.least)))


def load_base_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> BaseModel:
    """Load a model folder: natively where the engine knows its architecture, or with transformers.

    Args:
        dtype: number format of the arithmetic; None lets `choose_dtype` decide.
        compiled: train with the compiled kernels where they exist for the device and format.
    """
    reuse_freed_memory()
    dtype = dtype or choose_dtype(None, torch.device(device))
    arch = read_arch(folder)
    if arch is not None:
        blocks = _matrix_blocks(torch.device(device), dtype) if compiled else None
        weights = load_weights(folder, arch, device=device, dtype=dtype, blocks=blocks)
        return NativeModel(arch, weights, compiled=compiled)
    from tinker_cookbook.local.engine.model.hf_model import HfModel

    return HfModel(folder, device=device, dtype=dtype)


def describe_native_model(
    arch: ArchConfig,
    *,
    stored_dtype: torch.dtype,
    dtype: torch.dtype,
    compiled: bool,
    lora_room: int,
) -> NativeModel:
    """Return the native model that a CPU would run, with shapes but no numbers: it counts memory.

    Args:
        stored_dtype: number format of the files.
        compiled: whether the compiled kernels exist. Then the copy that sampling needs next to
            bfloat16 weights is built too (`ModelWeights.twin`).
        lora_room: the highest LoRA rank of the runs to plan for.
    """
    packer = ShapePacker() if compiled else None
    packed = packer if dtype == torch.float32 else None
    weights = describe_weights(
        arch, stored_dtype=stored_dtype, dtype=dtype, lora_room=lora_room, blocks=packed
    )
    if packer is not None and packed is None:
        float32_twin(arch, weights, packer)
    return NativeModel(arch, weights, compiled=compiled)


def _matrix_blocks(device: torch.device, dtype: torch.dtype) -> MatrixBlocks | None:
    """Return a packer where the compiled kernels train; None where torch does."""
    if device.type != "cpu" or dtype != torch.float32:
        return None
    kernels = load_kernels()
    return None if kernels is None else MatrixBlocks(Products(kernels))


def reuse_freed_memory() -> None:
    """Make glibc keep freed blocks instead of returning each of them to the system.

    Activations are allocated and freed at a high rate, and fresh pages cost more than some of the
    products that they hold. Does nothing with other C libraries.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)
