"""Forward and backward pass of the native architectures over packed sequences.

The decoder block, in the notation that all implementations share (`+ B A` is the adapter):

    q, k, v  = split(norm(x) Wqkv' + bias)          qwen3: q, k = norm(q), norm(k) per head
    attended = attention(rope(q) / sqrt(D), rope(k), v)
    mid      = x + attended Wo'
    gate, up = split(norm(mid) Wgate_up')
    out      = mid + (silu(gate) * up) Wdown'

This module is the reference: the tests compare it with transformers and PEFT, and compare the other
implementations with it. Those are `sampling/torch_decoder` (one token per sequence, any device) and
`native/decode_kernels.c` (the same, compiled). Weight shapes are in `weights.module_shapes` alone.

The tokens of all sequences of a pack are concatenated without padding; attention and rotary
positions work segment by segment. The backward pass is written out by hand: only hidden states and
LoRA matrices need gradients, so nothing else is kept or computed.

Where products are in bfloat16, the residual stream and its gradient are still float32: rounded
after each block, they would lose the small outputs that blocks add to them. Keys and values are
rounded to bfloat16 there, since the sampler stores them so; their gradients pass through.

Legend: T packed tokens, H hidden size, K key heads, G query heads per key head, D head size.
`x` is the input of a projection, `z` the buffer that `Matrix.forward` takes for it, and
`low` = scale x A' its image under the stacked A matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.dropout import AdapterDropout
from tinker_cookbook.local.engine.model.fold import AdapterFold
from tinker_cookbook.local.engine.model.gradients import GradientSink
from tinker_cookbook.local.engine.model.heads import AttentionHeads
from tinker_cookbook.local.engine.model.lora import Adapter, layer_group
from tinker_cookbook.local.engine.model.ops import (
    RopeTable,
    apply_rope,
    inverse_rms,
    rms_norm,
    rms_norm_backward,
    rms_norm_into,
    swiglu_backward,
    swiglu_into,
)
from tinker_cookbook.local.engine.model.prefix_sharing import PrefixSharing
from tinker_cookbook.local.engine.model.tape import BlockBytes, ForwardPass, Kept, Tape
from tinker_cookbook.local.engine.model.weights import ModelWeights
from tinker_cookbook.local.engine.native.low_rank import low_rank_gradients
from tinker_cookbook.local.engine.native.train_ops import train_kernels

__all__ = [
    "BlockBytes",
    "ForwardPass",
    "PackedTransformer",
    "RopeTable",
    "Tape",
    "apply_rope",
    "rms_norm",
]


class PackedTransformer:
    """The decoder blocks and the final norm of one base model, with one adapter loaded."""

    def __init__(
        self, arch: ArchConfig, weights: ModelWeights, *, flash: bool | None = None
    ) -> None:
        """`flash` is that of `AttentionHeads`."""
        self.arch = arch
        self.weights = weights
        self.fold = AdapterFold(weights)
        self._heads = AttentionHeads(arch, weights, flash=flash)
        self._paired = weights.paired

    def activation_bytes(self, num_tokens: int, rank: int) -> BlockBytes:
        """Return the memory that one block keeps for the backward pass over `num_tokens` tokens."""
        arch = self.arch
        qkv = arch.q_size + 2 * arch.kv_size
        # q, k, v; attended; gate_up; `low` of seven modules; qkv before its norm
        width = qkv + arch.q_size + 2 * arch.intermediate_size + 7 * rank
        width += qkv if arch.qk_norm else 0
        # hidden_mid, two inverse norms and `attended_lse` are float32 whatever the format
        wide = arch.hidden_size + 2 + arch.num_heads
        least = num_tokens * 4 * arch.hidden_size
        kept = num_tokens * (self.weights.dtype.itemsize * width + 4 * wide)
        return BlockBytes(full=kept + least, least=least)

    def forward(
        self,
        adapter: Adapter,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        *,
        keep_blocks: int | None = None,
        dropout: AdapterDropout | None = None,
        sharing: PrefixSharing | None = None,
    ) -> tuple[torch.Tensor, Tape]:
        """Return the hidden states after the final norm and the tape for `backward`.

        Args:
            tokens: int64 [T], the segments concatenated; those that segments share are there once.
            lengths: tokens of each segment, shared ones included.
            keep_blocks: how many of the last blocks keep what they computed; earlier blocks
                recompute it. None keeps nothing, and the tape cannot be run backward.
            dropout: drops inputs of the adapter, in both passes.
            sharing: where segments find the tokens that they share; None if they share none.

        Returns:
            [T, H] in the dtype of the weights, and the tape.
        """
        self.fold.load(adapter)
        tape = Tape(self._heads.segments(lengths, sharing), [], [], dropout)
        hidden = self.weights.embed_tokens(tokens).float()
        first_kept = len(self.weights.layers) - (keep_blocks or 0)
        for index in range(len(self.weights.layers)):
            following, kept = self._block(index, hidden, tape)
            if keep_blocks is not None:
                tape.inputs.append(hidden)
                tape.kept.append(kept if index >= first_kept else None)
            hidden = following
            del kept
        if keep_blocks is not None:
            tape.inputs.append(hidden)
        return self._final_norm(hidden), tape

    def backward(
        self, adapter: Adapter, tape: Tape, grad: torch.Tensor, sink: GradientSink
    ) -> None:
        """Add the LoRA gradients to `sink`, given the gradient [T, H] of `forward`'s result.

        It consumes the tape: each block's record is freed once the block is done. It stops at the
        lowest trained block, below which no gradient is needed.
        """
        self.fold.load(adapter)
        last = tape.inputs.pop()
        inverse = self._inverse_rms(last)
        grad = rms_norm_backward(grad, last, self.weights.final_norm, inverse)
        lowest = self._lowest_trained_block()
        for index in reversed(range(lowest, len(self.weights.layers))):
            hidden, kept = tape.inputs.pop(), tape.kept.pop()
            if kept is None:
                _, kept = self._block(index, hidden, tape)
            grad = self._block_backward(index, hidden, kept, grad, tape, sink)

    def _inverse_rms(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return 1 / rms of each row, float32 [T, 1]; with paired matrices the decoder's bits."""
        kernels = train_kernels() if self._paired else None
        if kernels is None:
            return inverse_rms(hidden, self.arch.rms_norm_eps)
        return kernels.inverse_rms(hidden, self.arch.rms_norm_eps)

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.weights.final_norm
        if not self._paired:
            return rms_norm(hidden, weight, self.arch.rms_norm_eps)
        normed = torch.empty_like(hidden)
        rms_norm_into(normed, hidden, weight, self._inverse_rms(hidden))
        return normed

    def _lowest_trained_block(self) -> int:
        """Return the index of the first trained block, or the number of blocks if none is."""
        trained = [
            index
            for index in range(len(self.weights.layers))
            for name in ("qkv", "gate_up")
            if self.fold.pair(layer_group(index, name)) is not None
        ]
        return min(trained, default=len(self.weights.layers))

    def _block(self, index: int, hidden: torch.Tensor, tape: Tape) -> tuple[torch.Tensor, Kept]:
        """Compute one block: float32 [T, H] in and out.

        Each step writes its result straight into the input buffer `x` of the next projection. `x`
        is a view of `z`, which may have extra columns for the low-rank values.
        """
        layer = self.weights.layers[index]
        inverse_in = self._inverse_rms(hidden)
        z, x = self._input(len(hidden), index, "qkv")
        rms_norm_into(x, hidden, layer.input_norm, inverse_in)
        qkv, qkv_low = self._project(z, index, "qkv", tape)
        (q, k, v), attended, lse = self._heads.forward(qkv, layer, tape.segments)
        if self._paired:
            z = attended
        else:
            z, x = self._input(len(hidden), index, "o")
            self._heads.merge(attended, x)
        o_out, o_low = self._project(z, index, "o", tape, add_to=hidden)
        hidden_mid = o_out

        inverse_mid = self._inverse_rms(hidden_mid)
        z, x = self._input(len(hidden), index, "gate_up")
        rms_norm_into(x, hidden_mid, layer.post_norm, inverse_mid)
        gate_up, gate_up_low = self._project(z, index, "gate_up", tape)

        z, x = self._input(len(hidden), index, "down")
        swiglu_into(x, gate_up)
        hidden_out, down_low = self._project(z, index, "down", tape, add_to=hidden_mid)
        kept = Kept(
            inverse_in=inverse_in,
            qkv_low=qkv_low,
            qkv=qkv if layer.q_norm is not None else None,
            q=q,
            k=k,
            v=v,
            attended=attended,
            attended_lse=lse,
            o_low=o_low,
            hidden_mid=hidden_mid,
            inverse_mid=inverse_mid,
            gate_up_low=gate_up_low,
            gate_up=gate_up,
            down_low=down_low,
        )
        return hidden_out, kept

    def _block_backward(
        self,
        index: int,
        hidden: torch.Tensor,
        kept: Kept,
        grad: torch.Tensor,
        tape: Tape,
        sink: GradientSink,
    ) -> torch.Tensor:
        """Return the gradient of the block's input, float32 [T, H]; add LoRA gradients to `sink`.

        `grad` is the gradient of the block's output. Each residual connection passes it on
        unchanged, which is the `add=grad` of the norms' backward passes. For each projection
        y = x W' + low B', in reverse order:

            x_grad   = y_grad W + low_grad A      low_grad = scale y_grad B
            A's grad = low_grad' x                B's grad = y_grad' low
        """
        layer, dtype = self.weights.layers[index], self.weights.dtype
        # MLP. The backward pass of SwiGLU also recomputes its value, the input x of `down`.
        activation = grad.new_empty(grad.shape[0], self.arch.intermediate_size, dtype=dtype)
        out_grad = grad.to(dtype)
        x_grad, low_grad = self._unproject(out_grad, index, "down", tape)
        gate_up_grad = swiglu_backward(x_grad, kept.gate_up, activation)
        self._add_gradients(
            sink, index, "down", activation, kept.down_low, low_grad, out_grad, tape
        )
        x_grad, low_grad = self._unproject(gate_up_grad, index, "gate_up", tape)
        x = torch.empty_like(hidden, dtype=dtype)
        rms_norm_into(x, kept.hidden_mid, layer.post_norm, kept.inverse_mid)
        self._add_gradients(
            sink, index, "gate_up", x, kept.gate_up_low, low_grad, gate_up_grad, tape
        )
        grad = rms_norm_backward(
            x_grad, kept.hidden_mid, layer.post_norm, kept.inverse_mid, add=grad
        )
        # Attention. `x` serves again as the input of `qkv`.
        out_grad = grad.to(dtype)
        x_grad, low_grad = self._unproject(out_grad, index, "o", tape)
        merged = kept.attended
        if not self._paired:
            merged = out_grad.new_empty(grad.shape[0], self.arch.q_size)
            self._heads.merge(kept.attended, merged)
        self._add_gradients(sink, index, "o", merged, kept.o_low, low_grad, out_grad, tape)
        qkv_grad = self._heads.backward(x_grad, kept, layer, tape.segments)
        x_grad, low_grad = self._unproject(qkv_grad, index, "qkv", tape)
        rms_norm_into(x, hidden, layer.input_norm, kept.inverse_in)
        self._add_gradients(sink, index, "qkv", x, kept.qkv_low, low_grad, qkv_grad, tape)
        return rms_norm_backward(x_grad, hidden, layer.input_norm, kept.inverse_in, add=grad)

    def _input(self, rows: int, index: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an empty `z` for a projection and its view `x`, which the caller fills."""
        matrix = self.weights.layers[index].matrices[name]
        return matrix.new_input(rows, self.fold.pair(layer_group(index, name)))

    def _project(
        self,
        z: torch.Tensor,
        index: int,
        name: str,
        tape: Tape,
        *,
        add_to: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the product (plus `add_to` or the bias) and `low`."""
        group = layer_group(index, name)
        layer, lora, low = self.weights.layers[index], self.fold.pair(group), None
        matrix, bias = layer.matrices[name], layer.qkv_bias if name == "qkv" else None
        if lora is not None and tape.dropout is not None:
            x = z[:, : matrix.in_features]
            x = x * tape.dropout.factors(x, group)
            low = (x @ lora.a.t().float()).mul_(lora.scale)
        return matrix.forward(z, lora, bias=bias, add_to=add_to, low=low)

    def _unproject(
        self, grad: torch.Tensor, index: int, name: str, tape: Tape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of `x` and of `x A'`, given that of a projection's result."""
        group = layer_group(index, name)
        lora = self.fold.pair(group)
        x_grad, low_grad = self.weights.layers[index].matrices[name].backward(grad, lora)
        if lora is not None and tape.dropout is not None:
            # `x_grad` has low_grad A, which should be multiplied by the factors
            through_a = low_grad.float() @ lora.a.float()
            x_grad += through_a.mul_(tape.dropout.factors(x_grad, group).sub_(1))
        return x_grad, low_grad

    def _add_gradients(
        self,
        sink: GradientSink,
        index: int,
        name: str,
        x: torch.Tensor,
        low: torch.Tensor,
        low_grad: torch.Tensor,
        out_grad: torch.Tensor,
        tape: Tape,
    ) -> None:
        group = layer_group(index, name)
        if group in sink.layout.groups:
            if tape.dropout is not None:
                x = (x * tape.dropout.factors(x, group)).to(x.dtype)
            sink.add(
                group,
                x=x,
                low=low,
                low_grad=low_grad,
                out_grad=out_grad,
                kernels=low_rank_gradients() if self._paired else None,
            )
