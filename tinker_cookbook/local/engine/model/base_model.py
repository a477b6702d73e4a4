"""The interface of a base model to the trainer, and its native implementation.

`NativeModel` runs the families that `architecture` describes on the engine's own kernels;
`hf_model.HfModel` runs every other causal model through transformers: slower, the same results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from tinker_cookbook.local.engine.model.architecture import (
    ArchConfig,
    read_arch,
    read_config_json,
)
from tinker_cookbook.local.engine.model.compact import CompactBlocks, CompactShapes
from tinker_cookbook.local.engine.model.devices import choose_dtype
from tinker_cookbook.local.engine.model.dropout import AdapterDropout
from tinker_cookbook.local.engine.model.gradients import GradientSink, SpareGradients
from tinker_cookbook.local.engine.model.head import Head
from tinker_cookbook.local.engine.model.lora import Adapter, LoraTarget, lora_targets
from tinker_cookbook.local.engine.model.number_formats import FULL, format_bits
from tinker_cookbook.local.engine.model.pack import Pack
from tinker_cookbook.local.engine.model.pack_loss import PackLoss
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, ShapePacker
from tinker_cookbook.local.engine.model.quantised import QuantisedBlocks, QuantisedShapes
from tinker_cookbook.local.engine.model.transformer import ForwardPass, PackedTransformer
from tinker_cookbook.local.engine.model.weights import ModelWeights, describe_weights, load_weights
from tinker_cookbook.local.engine.native.attention import MAX_GROUP, MAX_HEAD_DIM
from tinker_cookbook.local.engine.native.build import load_kernels
from tinker_cookbook.local.engine.native.compact import (
    COMPACT_BITS,
    CompactKernels,
    expands_fast,
)
from tinker_cookbook.local.engine.native.products import Products
from tinker_cookbook.local.engine.types import ImageInput, LoraSpec
from tinker_cookbook.local.errors import UserError

__all__ = [
    "PACK_TOKENS_CPU",
    "BaseModel",
    "NativeModel",
    "bits_per_number",
    "check_base_format",
    "describe_native_model",
    "load_base_model",
    "reuse_freed_memory",
]

logger = logging.getLogger(__name__)

_ACTIVATION_BYTES = 2 * 2**30
"""Memory that a forward pass may keep for the backward pass; blocks beyond it are recomputed. A GPU
with more free memory keeps more."""
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
    def product_dtype(self) -> torch.dtype:
        """The number format to which the operands of products are rounded."""
        ...

    @property
    def pack_tokens(self) -> int:
        """Number of tokens that should go through the model together."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether the sequences of a pack may share tokens (`Pack.sharing`)."""
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

    def batch_bytes(
        self,
        num_tokens: int,
        num_targets: int,
        rank: int,
        *,
        backward: bool,
        num_copied_keys: int = 0,
    ) -> int:
        """Return the estimated extra memory for a pack, in bytes.

        Args:
            num_targets: number of targets per token.
            num_copied_keys: as `PackPlan` counts them.
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
    shares_prefixes = True

    def __init__(
        self,
        arch: ArchConfig,
        weights: ModelWeights,
        *,
        pack_tokens: int | None = None,
        activation_bytes: int | None = None,
    ) -> None:
        """
        Args:
            pack_tokens: number of tokens computed together; None chooses by device.
            activation_bytes: memory that the forward pass may keep for the backward pass. Blocks
                beyond it are recomputed, with bit-identical results. None chooses by device.
        """
        self.arch = arch
        self.weights = weights
        self.transformer = PackedTransformer(arch, weights)
        self.head = Head(weights.head, on_cpu=weights.on_cpu)
        self.spare_gradients = SpareGradients()
        default = PACK_TOKENS_CPU if weights.on_cpu else _PACK_TOKENS_ACCELERATOR
        self.pack_tokens = pack_tokens or default
        self.activation_bytes = activation_bytes or _default_activation_bytes(weights.device)

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
    def product_dtype(self) -> torch.dtype:
        return self.weights.product_dtype

    @property
    def ties_embeddings(self) -> bool:
        return self.weights.ties_embeddings

    def lora_targets(self, spec: LoraSpec) -> tuple[LoraTarget, ...]:
        return lora_targets(self.arch, spec)

    @torch.no_grad()
    def logprobs(self, adapter: Adapter, pack: Pack) -> torch.Tensor:
        hidden, _ = self.transformer.forward(
            adapter, pack.tokens, pack.lengths, sharing=pack.sharing
        )
        return self._head_logprobs(adapter, pack, hidden)

    def kept_bytes(self, num_tokens: int, rank: int) -> int | None:
        if self._num_blocks_to_keep(num_tokens, rank) < self.arch.num_layers:
            return None
        block = self.transformer.activation_bytes(num_tokens, rank)
        return self.arch.num_layers * block.full + 4 * num_tokens * self.arch.hidden_size

    @torch.no_grad()
    def logprobs_and_pass(self, adapter: Adapter, pack: Pack) -> tuple[torch.Tensor, ForwardPass]:
        hidden, tape = self.transformer.forward(
            adapter,
            pack.tokens,
            pack.lengths,
            keep_blocks=self.arch.num_layers,
            sharing=pack.sharing,
        )
        return self._head_logprobs(adapter, pack, hidden), (hidden, tape)

    def _head_logprobs(self, adapter: Adapter, pack: Pack, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logprobs [M, K] of all rows, given the states [T, H]."""
        computed = slice(0, pack.num_computed_rows)
        states = hidden[pack.rows[computed]]
        return pack.with_repeats(self.head.logprobs(adapter, states, pack.targets[computed]))

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
        head, rate = self.head, adapter.spec.dropout
        hidden, tape = kept or self.transformer.forward(
            adapter,
            pack.tokens,
            pack.lengths,
            keep_blocks=self._num_blocks_to_keep(len(pack.tokens), adapter.rank),
            dropout=AdapterDropout(rate, pack.seed) if rate else None,
            sharing=pack.sharing,
        )
        if loss.by_sequence:
            loss.see_all(self._head_logprobs(adapter, pack, hidden))
        # Rows with a gradient come first: only they go through the head's backward pass.
        split, computed = pack.num_gradient_rows, pack.num_computed_rows
        selected = hidden[pack.rows[:computed]]
        logprobs, selected_grad = head.logprobs_and_gradient(
            adapter, selected[:split], pack.targets[:split], loss.gradient, sink
        )
        rest = head.logprobs(adapter, selected[split:], pack.targets[split:computed])
        # In float32, since rows of several sequences may have the same token.
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32)
        hidden_grad.index_add_(0, pack.rows[:split], selected_grad.float())
        hidden_grad = hidden_grad.to(hidden.dtype)
        del hidden, selected, selected_grad
        if split:
            self.transformer.backward(adapter, tape, hidden_grad, sink)
        return pack.with_repeats(torch.cat([logprobs, rest]))

    def batch_bytes(
        self,
        num_tokens: int,
        num_targets: int,
        rank: int,
        *,
        backward: bool,
        num_copied_keys: int = 0,
    ) -> int:
        block = self.transformer.activation_bytes(num_tokens, rank)
        # One block at work and its gradients, the states of all rows, several values per target.
        # Each sequence has rows for the tokens that it shares.
        num_rows = max(num_tokens, num_copied_keys)
        total = 2 * block.full + num_rows * 16 * (self.arch.hidden_size + num_targets)
        total += self.head.buffer_bytes(num_tokens)
        # Keys and values of one block; in the backward pass their gradients, too
        kv_bytes = 2 * self.arch.kv_size * self.weights.dtype.itemsize
        total += (2 if backward else 1) * num_copied_keys * kv_bytes
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


def _default_activation_bytes(device: torch.device) -> int:
    """Return what a forward pass may keep: on a GPU, where memory is its own, a quarter of it."""
    if device.type != "cuda":
        return _ACTIVATION_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return max(free // 4, _ACTIVATION_BYTES)


def load_base_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    base_format: str = FULL,
    compiled: bool = True,
) -> BaseModel:
    """Load a model folder: natively where the engine knows its architecture, or with transformers.

    Args:
        dtype: number format of products; None lets `choose_dtype` decide.
        base_format: `int8` or `int4` quantises the matrices; `full` keeps their numbers.
        compiled: use the compiled kernels where they exist.

    Raises:
        UserError: if the model runs through transformers and `base_format` asks to quantise it.
    """
    reuse_freed_memory()
    _call_math_functions_once()
    bits = format_bits(base_format)
    dtype = dtype or choose_dtype(None, torch.device(device))
    arch = read_arch(folder)
    if arch is not None:
        blocks = _matrix_blocks(arch, torch.device(device), dtype, bits) if compiled else None
        dtype = dtype if blocks is None else torch.float32
        if bits and blocks is None:
            logger.warning(
                "base_format=%s: without the compiled kernels the weights are rounded to this "
                "format but stored in %s, so it saves no memory",
                *(base_format, str(dtype).removeprefix("torch.")),
            )
        weights = load_weights(folder, arch, device=device, dtype=dtype, blocks=blocks, bits=bits)
        return NativeModel(arch, weights)
    check_base_format(folder, base_format)
    from tinker_cookbook.local.engine.model.hf_model import HfModel

    return HfModel(folder, device=device, dtype=dtype)


def check_base_format(folder: Path, base_format: str) -> None:
    """Refuse to quantise a model that runs through transformers.

    Raises:
        UserError: naming the format and the architecture.
    """
    if format_bits(base_format) and read_arch(folder) is None:
        kind = read_config_json(folder).get("model_type")
        raise UserError(
            f"base_format={base_format!r} is not available for the architecture {kind!r}, which "
            f"runs through transformers; use base_format={FULL!r}, or a model that the engine runs "
            "itself, such as one of Llama, Qwen2 or Qwen3"
        )


def bits_per_number(
    folder: Path, device: torch.device, dtype: torch.dtype, base_format: str = FULL
) -> int:
    """Return the size of a number in the matrices that `load_base_model` makes, in bits."""
    bits, arch = format_bits(base_format), read_arch(folder)
    if bits:
        return bits
    blocks = None if arch is None else _matrix_blocks(arch, device, dtype, bits)
    return COMPACT_BITS if isinstance(blocks, CompactBlocks) else 8 * dtype.itemsize


def describe_native_model(
    arch: ArchConfig,
    *,
    stored_dtype: torch.dtype,
    dtype: torch.dtype,
    compiled: bool,
    lora_room: int,
    base_format: str = FULL,
) -> NativeModel:
    """Return the native model that a CPU would run, with shapes but no numbers: it counts memory.

    Args:
        stored_dtype: number format of the files.
        dtype: number format of products.
        compiled: whether the compiled kernels exist.
        lora_room: the highest LoRA rank of the runs to plan for.
        base_format: as for `load_base_model`.
    """
    blocks, bits = None, format_bits(base_format)
    if compiled and _kernels_fit(arch, dtype):
        paired, dtype = dtype == torch.bfloat16, torch.float32
        if bits:
            blocks = QuantisedShapes(bits, paired=paired)
        else:
            compact = paired and expands_fast()
            blocks = CompactShapes() if compact else ShapePacker(paired=paired)
    weights = describe_weights(
        arch, stored_dtype=stored_dtype, dtype=dtype, lora_room=lora_room, blocks=blocks
    )
    return NativeModel(arch, weights)


def _matrix_blocks(
    arch: ArchConfig, device: torch.device, dtype: torch.dtype, bits: int
) -> MatrixBlocks | None:
    """Return a packer where the compiled kernels compute; None where torch does."""
    if device.type != "cpu" or not _kernels_fit(arch, dtype):
        return None
    kernels = load_kernels()
    if kernels is None:
        return None
    products, paired = Products(kernels), dtype == torch.bfloat16
    if bits:
        return QuantisedBlocks(products, bits, paired=paired)
    if paired and expands_fast():
        return CompactBlocks(products, CompactKernels(kernels))
    return MatrixBlocks(products, paired=paired)


def _kernels_fit(arch: ArchConfig, dtype: torch.dtype) -> bool:
    """Return whether the compiled kernels take a model in a number format.

    In bfloat16 they must compute attention, too, so that the trainer has the sampler's bits.
    """
    group = arch.num_heads // arch.num_kv_heads
    fits = arch.head_dim <= MAX_HEAD_DIM and group <= MAX_GROUP
    return dtype == torch.float32 or (dtype == torch.bfloat16 and fits)


def _call_math_functions_once() -> None:
    """Call torch's elementwise functions from one thread before several threads do.

    MKL computes them where torch is built with it. Where two threads made the first call of a
    process at once, one of them got other last bits of a cosine in about one process in 40.
    """
    one = torch.ones(1)
    for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.tanh, torch.sin):
        function(one)


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
