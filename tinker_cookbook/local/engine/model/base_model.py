"""What the trainer needs of a base model, and the native implementation of it.

`NativeModel` covers the architectures of `config`; `hf_model.HfModel` covers the rest through
transformers, slower, with the same results.
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
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks
from tinker_cookbook.local.engine.model.transformer import PackedTransformer
from tinker_cookbook.local.engine.model.twin import float32_twin, twin_bytes
from tinker_cookbook.local.engine.model.weights import ModelWeights, load_weights
from tinker_cookbook.local.engine.native.build import load_kernels
from tinker_cookbook.local.engine.native.products import Products
from tinker_cookbook.local.engine.types import ImageInput, LoraSpec

__all__ = [
    "PACK_TOKENS_CPU",
    "BaseModel",
    "NativeModel",
    "blocks_to_keep",
    "load_base_model",
    "native_pass_bytes",
    "reuse_freed_memory",
]

_ACTIVATION_BYTES = 2 * 2**30
PACK_TOKENS_CPU = 1024
_PACK_TOKENS_ACCELERATOR = 8192


class BaseModel(Protocol):
    """A frozen model that adapters are trained on. Used by one thread."""

    spare_gradients: SpareGradients

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """Longest sequence."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def pack_tokens(self) -> int:
        """Tokens that should go through the model together."""
        ...

    @property
    def count_image_tokens(self) -> Callable[[ImageInput, str], int] | None:
        """Positions of an image, or a UserError that begins with the given place; None where the
        model reads text only."""
        ...

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding."""
        ...

    def lora_targets(self, spec: LoraSpec) -> tuple[LoraTarget, ...]:
        """The modules that a run of this shape trains."""
        ...

    def batch_bytes(self, num_tokens: int, num_targets: int, rank: int, *, backward: bool) -> int:
        """About the memory that a pack of so many tokens, with targets each, takes."""
        ...

    def logprobs(self, adapter: Adapter, pack: Pack) -> torch.Tensor:
        """float32 [M, K]: logprobs of the pack's targets."""
        ...

    def logprobs_and_gradient(
        self, adapter: Adapter, pack: Pack, loss: PackLoss, sink: GradientSink
    ) -> torch.Tensor:
        """As `logprobs`; also runs the loss and adds the LoRA gradients to `sink`."""
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
            compiled: use the compiled kernels where there are any.
            pack_tokens: tokens computed together; None: by device.
            activation_bytes: about what the forward pass may keep for the backward pass. Blocks
                beyond it are computed again; results are the same bits.
        """
        self.arch = arch
        self.weights = weights
        self.transformer = PackedTransformer(arch, weights)
        self.head = Head(weights.head)
        self._compiled = compiled
        self._exact: tuple[PackedTransformer, Head] | None = None
        self.spare_gradients = SpareGradients()
        on_cpu = weights.device.type == "cpu"
        default = PACK_TOKENS_CPU if on_cpu else _PACK_TOKENS_ACCELERATOR
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

    @torch.no_grad()
    def logprobs_and_gradient(
        self, adapter: Adapter, pack: Pack, loss: PackLoss, sink: GradientSink
    ) -> torch.Tensor:
        exact = self._exact_parts() if loss.compares else None
        transformer, head = exact or (self.transformer, self.head)
        hidden, tape = transformer.forward(
            adapter,
            pack.tokens,
            pack.lengths,
            keep_blocks=self._num_blocks_to_keep(len(pack.tokens), adapter.rank),
            backward_dtype=self.weights.dtype if exact else None,
        )
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
        """What computes logprobs in the sampler's arithmetic; None where the model itself does, or
        nothing can."""
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
        on_cpu = self.weights.device.type == "cpu"
        return on_cpu and self.weights.dtype != torch.float32 and self._compiled

    def batch_bytes(self, num_tokens: int, num_targets: int, rank: int, *, backward: bool) -> int:
        block = self.transformer.activation_bytes(num_tokens, rank)
        keep = self._num_blocks_to_keep(num_tokens, rank)
        sizes = native_pass_bytes(self.arch, num_tokens, num_targets, block, keep=keep)
        twin = twin_bytes(self.weights) if self._has_twin else 0
        return sizes[backward] + self.head.buffer_bytes(num_tokens) + twin

    def _num_blocks_to_keep(self, num_tokens: int, rank: int) -> int:
        block = self.transformer.activation_bytes(num_tokens, rank)
        return blocks_to_keep(self.arch.num_layers, block, self.activation_bytes)


def blocks_to_keep(
    num_blocks: int, block: tuple[int, int], activation_bytes: int = _ACTIVATION_BYTES
) -> int:
    """How many blocks a forward pass keeps in full, of sizes as `block_activation_bytes` gives."""
    full, least = block
    spare = activation_bytes - num_blocks * least
    return max(0, min(num_blocks, spare // (full - least)))


def native_pass_bytes(
    arch: ArchConfig, num_tokens: int, num_targets: int, block: tuple[int, int], *, keep: int
) -> tuple[int, int]:
    """About what a forward pass takes, and one with a backward pass; without the head's buffers."""
    full, least = block
    # one block at work, the states of all rows, and the values of all targets several times
    forward = 2 * full + num_tokens * (16 * arch.hidden_size + 16 * num_targets)
    return forward, forward + keep * full + (arch.num_layers - keep) * least


def load_base_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> BaseModel:
    """Load a model folder: natively where its architecture is known, else through transformers.

    Args:
        dtype: of the arithmetic; None: see `choose_dtype`.
        compiled: train with the compiled kernels where there are any for the device and format.
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


def _matrix_blocks(device: torch.device, dtype: torch.dtype) -> MatrixBlocks | None:
    """Packs matrices where the compiled kernels train; None where torch does."""
    if device.type != "cpu" or dtype != torch.float32:
        return None
    kernels = load_kernels()
    return None if kernels is None else MatrixBlocks(Products(kernels))


def reuse_freed_memory() -> None:
    """Make glibc keep freed blocks instead of returning each to the kernel.

    Activations are allocated and freed at a high rate; fresh pages cost more than some of the
    products they hold. Does nothing on other C libraries.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)
