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
from dataclasses import dataclass

import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.attention import (
    attention_backward,
    attention_forward,
    paired_attention_backward,
    paired_attention_forward,
)
from tinker_cookbook.local.engine.model.dropout import AdapterDropout
from tinker_cookbook.local.engine.model.fold import AdapterFold
from tinker_cookbook.local.engine.model.gradients import GradientSink
from tinker_cookbook.local.engine.model.lora import Adapter, layer_group
from tinker_cookbook.local.engine.model.ops import (
    RopeTable,
    apply_rope,
    inverse_rms,
    rms_norm,
    rms_norm_backward,
    rms_norm_into,
    rope_into,
    swiglu_backward,
    swiglu_into,
)
from tinker_cookbook.local.engine.model.weights import LayerWeights, ModelWeights
from tinker_cookbook.local.engine.native.low_rank import low_rank_gradients
from tinker_cookbook.local.engine.native.train_ops import HeadLayout, HeadNorms, train_kernels

__all__ = [
    "BlockBytes",
    "ForwardPass",
    "PackedTransformer",
    "RopeTable",
    "Tape",
    "apply_rope",
    "rms_norm",
]


@dataclass
class _Kept:
    """What one block computed in the forward pass and needs in the backward pass.

    The normed inputs and silu(gate) * up are missing: recomputing them is cheaper than keeping
    them. `PackedTransformer.activation_bytes` counts these fields.
    """

    inverse_in: torch.Tensor
    """float32 [T, 1], 1 / rms of the block's input; `inverse_mid` likewise of `hidden_mid`."""
    qkv_low: torch.Tensor
    """[T, 3 rank]; the other `low` fields have one rank per module too. [T, 0] if not trained."""
    qkv: torch.Tensor | None
    """[T, (K G + 2 K) D] before the norm of queries and keys; None for architectures without it."""
    q: torch.Tensor
    """[K, T G, D], rotated and divided by sqrt(D); row t G + g belongs to token t."""
    k: torch.Tensor
    """[K, T, D], rotated; `v` likewise, not rotated. With paired matrices, bfloat16 numbers."""
    v: torch.Tensor
    attended: torch.Tensor
    """[K, T G, D]; with paired matrices [T, K G D]."""
    attended_lse: torch.Tensor | None
    """[K, T G], logsumexp of the scores; None where torch recomputes the probabilities."""
    o_low: torch.Tensor
    hidden_mid: torch.Tensor
    """float32 [T, H], the residual stream between attention and MLP."""
    inverse_mid: torch.Tensor
    gate_up_low: torch.Tensor
    gate_up: torch.Tensor
    """[T, 2 I], before silu."""
    down_low: torch.Tensor


@dataclass
class Tape:
    """The record of a forward pass; it can be run backward once."""

    lengths: list[int]
    cos: torch.Tensor
    """float32 [T, 1, 1, D / 2] for each token's position in its sequence; `sin` likewise."""
    sin: torch.Tensor
    layout: HeadLayout | None
    """Head layout for the compiled kernels; None where torch splits the heads."""
    inputs: list[torch.Tensor]
    """Input [T, H] of every block, then the input of the final norm."""
    kept: list[_Kept | None]
    """One entry per block; None where the block is recomputed in the backward pass."""
    dropout: AdapterDropout | None = None


ForwardPass = tuple[torch.Tensor, Tape]
"""Hidden states [T, H] after the final norm, and the record from which the pass is run backward."""


@dataclass(frozen=True)
class BlockBytes:
    """Memory that one block keeps for the backward pass, in bytes."""

    full: int
    """With everything in `_Kept` and the block's input."""
    least: int
    """With the input alone, from which the block is recomputed."""


class PackedTransformer:
    """The decoder blocks and the final norm of one base model, with one adapter loaded."""

    def __init__(self, arch: ArchConfig, weights: ModelWeights) -> None:
        self.arch = arch
        self.weights = weights
        self.fold = AdapterFold(weights)
        self._rope = RopeTable(arch.rope, arch.head_dim, weights.device)
        self._group_size = arch.num_heads // arch.num_kv_heads
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
    ) -> tuple[torch.Tensor, Tape]:
        """Return the hidden states after the final norm and the tape for `backward`.

        Args:
            tokens: int64 [T], the segments concatenated.
            keep_blocks: how many of the last blocks keep what they computed; earlier blocks
                recompute it. None keeps nothing, and the tape cannot be run backward.
            dropout: drops inputs of the adapter, in both passes.

        Returns:
            [T, H] in the dtype of the weights, and the tape.
        """
        self.fold.load(adapter)
        positions = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
        half = self.arch.head_dim // 2
        tables = self._rope.up_to(max(lengths))
        cos, sin = (t[positions, None, None, :half] for t in tables)
        tape = Tape(list(lengths), cos, sin, self._head_layout(positions, *tables), [], [], dropout)
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

    def _head_layout(
        self, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> HeadLayout | None:
        arch, dtype = self.arch, self.weights.dtype
        plain = dtype == torch.float32 and self.weights.device.type == "cpu"
        if not (plain and (self._paired or not arch.qk_norm)) or train_kernels() is None:
            return None
        sizes = arch.num_kv_heads, self._group_size, arch.head_dim
        return HeadLayout(*sizes, positions, cos, sin, rounded=self._paired)

    def _lowest_trained_block(self) -> int:
        """Return the index of the first trained block, or the number of blocks if none is."""
        trained = [
            index
            for index in range(len(self.weights.layers))
            for name in ("qkv", "gate_up")
            if self.fold.pair(layer_group(index, name)) is not None
        ]
        return min(trained, default=len(self.weights.layers))

    def _block(self, index: int, hidden: torch.Tensor, tape: Tape) -> tuple[torch.Tensor, _Kept]:
        """Compute one block: float32 [T, H] in and out.

        Each step writes its result straight into the input buffer `x` of the next projection. `x`
        is a view of `z`, which may have extra columns for the low-rank values.
        """
        layer = self.weights.layers[index]
        inverse_in = self._inverse_rms(hidden)
        z, x = self._input(len(hidden), index, "qkv")
        rms_norm_into(x, hidden, layer.input_norm, inverse_in)
        qkv, qkv_low = self._project(z, index, "qkv", tape)
        q, k, v = self._split_heads(qkv, layer, tape)
        if self._paired:
            attended, lse = paired_attention_forward(q, k, v, tape.lengths)
            z = attended
        else:
            attended, lse = attention_forward(q, k, v, tape.lengths)
            z, x = self._input(len(hidden), index, "o")
            self._merge_heads(attended, x)
        o_out, o_low = self._project(z, index, "o", tape, add_to=hidden)
        hidden_mid = o_out

        inverse_mid = self._inverse_rms(hidden_mid)
        z, x = self._input(len(hidden), index, "gate_up")
        rms_norm_into(x, hidden_mid, layer.post_norm, inverse_mid)
        gate_up, gate_up_low = self._project(z, index, "gate_up", tape)

        z, x = self._input(len(hidden), index, "down")
        swiglu_into(x, gate_up)
        hidden_out, down_low = self._project(z, index, "down", tape, add_to=hidden_mid)
        kept = _Kept(
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
        kept: _Kept,
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
            self._merge_heads(kept.attended, merged)
        self._add_gradients(sink, index, "o", merged, kept.o_low, low_grad, out_grad, tape)
        qkv_grad = self._attention_backward(x_grad, kept, layer, tape)
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

    def _split_heads(
        self, qkv: torch.Tensor, layer: LayerWeights, tape: Tape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return normed, rotated and scaled queries [K, T G, D], keys and values [K, T, D]."""
        arch, num_tokens = self.arch, qkv.shape[0]
        kernels = train_kernels()
        if tape.layout is not None and kernels is not None:
            return kernels.split_heads(tape.layout, qkv, self._head_norms(layer))
        q, k, v = self._head_views(qkv)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, arch.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, arch.rms_norm_eps)
        q_out = qkv.new_empty(arch.num_kv_heads, num_tokens, self._group_size, arch.head_dim)
        k_out = qkv.new_empty(arch.num_kv_heads, num_tokens, 1, arch.head_dim)
        scale = arch.head_dim**-0.5
        rope_into(q_out.transpose(0, 1), q, tape.cos * scale, tape.sin * scale)
        rope_into(k_out.transpose(0, 1), k, tape.cos, tape.sin)
        return q_out.flatten(1, 2), k_out[:, :, 0], v[:, :, 0].transpose(0, 1).contiguous()

    def _head_norms(self, layer: LayerWeights) -> HeadNorms | None:
        if layer.q_norm is None or layer.k_norm is None:
            return None
        return HeadNorms(layer.q_norm, layer.k_norm, self.arch.rms_norm_eps)

    def _head_views(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return views of the queries [T, K, G, D], the keys and the values [T, K, 1, D]."""
        arch = self.arch
        q, k, v = qkv.split([arch.q_size, arch.kv_size, arch.kv_size], dim=-1)
        q_heads = (arch.num_kv_heads, self._group_size, arch.head_dim)
        kv_heads = (arch.num_kv_heads, 1, arch.head_dim)
        return q.unflatten(-1, q_heads), k.unflatten(-1, kv_heads), v.unflatten(-1, kv_heads)

    def _merge_heads(self, attended: torch.Tensor, out: torch.Tensor) -> None:
        """Write [K, T G, D] into [T, K G D], with the heads of a token side by side."""
        arch = self.arch
        heads = out.unflatten(-1, (arch.num_kv_heads, self._group_size, arch.head_dim))
        heads.copy_(attended.unflatten(1, (-1, self._group_size)).transpose(0, 1))

    def _attention_backward(
        self, merged_grad: torch.Tensor, kept: _Kept, layer: LayerWeights, tape: Tape
    ) -> torch.Tensor:
        """Return the gradient [T, (K G + 2 K) D] of the stacked projection's result.

        It undoes `_split_heads` in reverse order: attention, rotation, norm. The gradient of a
        rotation is the rotation back, hence the negated sines.
        """
        arch, group = self.arch, self._group_size
        q_grad, k_grad, v_grad = self._attended_backward(merged_grad, kept, tape.lengths)
        kernels = train_kernels()
        if tape.layout is not None and kernels is not None:
            result = kernels.join_heads(tape.layout, q_grad, k_grad, v_grad)
            self._norm_heads_backward(result, kept, layer)
            return result
        result = q_grad.new_empty(merged_grad.shape[0], arch.q_size + 2 * arch.kv_size)
        q_out, k_out, v_out = self._head_views(result)
        scale = arch.head_dim**-0.5
        q_heads = q_grad.unflatten(1, (-1, group)).transpose(0, 1)
        rope_into(q_out, q_heads, tape.cos * scale, tape.sin * -scale)
        rope_into(k_out, k_grad.unsqueeze(2).transpose(0, 1), tape.cos, -tape.sin)
        v_out.copy_(v_grad.unsqueeze(2).transpose(0, 1))
        self._norm_heads_backward(result, kept, layer)
        return result

    def _attended_backward(
        self, merged_grad: torch.Tensor, kept: _Kept, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of q, k and v, given that of the attended values [T, K G D]."""
        q, k, v, attended, lse = kept.q, kept.k, kept.v, kept.attended, kept.attended_lse
        if self._paired and lse is not None:
            return paired_attention_backward(merged_grad, q, k, v, attended, lse, lengths)
        grad, group = torch.empty_like(attended), self._group_size
        heads = merged_grad.unflatten(-1, (self.arch.num_kv_heads, group, self.arch.head_dim))
        grad.unflatten(1, (-1, group)).copy_(heads.transpose(0, 1))
        return attention_backward(grad, q, k, v, attended, lse, lengths)

    def _norm_heads_backward(self, grad: torch.Tensor, kept: _Kept, layer: LayerWeights) -> None:
        """Turn the gradient of normed queries and keys into that of `kept.qkv`, in place."""
        if kept.qkv is None or layer.q_norm is None or layer.k_norm is None:
            return
        q, k, _ = self._head_views(kept.qkv)
        q_grad, k_grad, _ = self._head_views(grad)
        for part, part_grad, weight in ((q, q_grad, layer.q_norm), (k, k_grad, layer.k_norm)):
            inverse = inverse_rms(part, self.arch.rms_norm_eps)
            part_grad.copy_(rms_norm_backward(part_grad, part, weight, inverse))
