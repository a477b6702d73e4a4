"""Forward and backward pass of the native architectures over packed sequences.

Tokens of all sequences of a pack stand one after the other, without padding; attention and rotary
positions go by segment. The backward pass is written out: only hidden states and LoRA matrices need
gradients, so nothing else is kept or computed.

Where products are in bfloat16, the hidden states that blocks add to, and their gradients, still are
float32: rounded after each block, they would lose what the small outputs of blocks add to them.

Legend: T packed tokens, H hidden size, K key heads, G query heads per key head, D head size.
`x` is the input of a projection, `z` what `Matrix.forward` takes for it, and `low` its image under
the stacked A matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.attention import attention_backward, attention_forward
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
from tinker_cookbook.local.engine.native.train_ops import HeadLayout, train_kernels

__all__ = [
    "PackedTransformer",
    "RopeTable",
    "Tape",
    "apply_rope",
    "block_activation_bytes",
    "rms_norm",
]


@dataclass
class _Kept:
    """What one block computed on the way forward and needs on the way back."""

    inverse_in: torch.Tensor
    qkv_low: torch.Tensor
    qkv: torch.Tensor | None
    """Before the norm of queries and keys; only where the architecture has one."""
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attended: torch.Tensor
    attended_beside: torch.Tensor | None
    """What the backward pass of attention needs beside it."""
    o_low: torch.Tensor
    hidden_mid: torch.Tensor
    inverse_mid: torch.Tensor
    gate_up_low: torch.Tensor
    gate_up: torch.Tensor
    down_low: torch.Tensor

    def rounded(self, dtype: torch.dtype) -> _Kept:
        """For a backward pass that multiplies in `dtype`. Hidden states and norms stay float32."""
        keep = {"inverse_in", "hidden_mid", "inverse_mid", "attended_beside"}
        values = {
            field.name: value.to(dtype)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None and field.name not in keep
        }
        # what the compiled attention left is of no use to the products of another format
        return replace(self, **values, attended_beside=None)


@dataclass
class Tape:
    """A forward pass that can be run backward once."""

    lengths: list[int]
    cos: torch.Tensor
    sin: torch.Tensor
    layout: HeadLayout | None
    """For the compiled kernels; None where torch splits the heads."""
    inputs: list[torch.Tensor]
    """Input [T, H] of every block, and the input of the final norm."""
    kept: list[_Kept | None]
    """None where the block is to be computed again."""
    again: Callable[[int, torch.Tensor], _Kept] | None = None
    """Computes a block again, if the transformer of the backward pass should not."""


def block_activation_bytes(
    arch: ArchConfig, num_tokens: int, rank: int, itemsize: int
) -> tuple[int, int]:
    """Bytes one block keeps for the backward pass: in full, and if it is computed again."""
    width = 2 * (arch.q_size + arch.kv_size) + 2 * arch.intermediate_size
    width += 7 * rank + (arch.q_size + 2 * arch.kv_size if arch.qk_norm else 0)
    least = num_tokens * 4 * arch.hidden_size
    return num_tokens * itemsize * width + 2 * least, least


class PackedTransformer:
    """The decoder blocks and final norm of one base model, with the adapter loaded into them."""

    def __init__(self, arch: ArchConfig, weights: ModelWeights) -> None:
        self.arch = arch
        self.weights = weights
        self.fold = AdapterFold(weights)
        self._rope = RopeTable(arch.rope, arch.head_dim, weights.device)
        self._group_size = arch.num_heads // arch.num_kv_heads

    def activation_bytes(self, num_tokens: int, rank: int) -> tuple[int, int]:
        """Bytes one block keeps for the backward pass: in full, and if it is computed again."""
        return block_activation_bytes(self.arch, num_tokens, rank, self.weights.dtype.itemsize)

    def forward(
        self,
        adapter: Adapter,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        *,
        keep_blocks: int | None = None,
        backward_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, Tape]:
        """Hidden states after the final norm, [T, H], in the dtype of the weights; and the tape for
        `backward`.

        Args:
            tokens: int64 [T], the segments one after the other.
            keep_blocks: how many of the last blocks keep what they computed; earlier ones compute
                it again. None keeps nothing at all: the tape is unusable then.
            backward_dtype: of the transformer that runs the tape backward; None: this one does.
        """
        self.fold.load(adapter)
        positions = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
        half = self.arch.head_dim // 2
        tables = self._rope.up_to(max(lengths))
        cos, sin = (t[positions, None, None, :half] for t in tables)
        tape = Tape(list(lengths), cos, sin, self._head_layout(positions, *tables), [], [])
        hidden = self.weights.embed_tokens(tokens).float()
        first_kept = len(self.weights.layers) - (keep_blocks or 0)
        for index in range(len(self.weights.layers)):
            following, kept = self._block(index, hidden, tape)
            if keep_blocks is not None:
                if backward_dtype is not None and index >= first_kept:
                    kept = kept.rounded(backward_dtype)
                tape.inputs.append(hidden)
                tape.kept.append(kept if index >= first_kept else None)
            hidden = following
            del kept
        if keep_blocks is not None:
            tape.inputs.append(hidden)
        if backward_dtype is not None:
            again = functools.partial(self._block_again, tape=replace(tape), dtype=backward_dtype)
            tape = replace(tape, layout=None, again=again)
        return rms_norm(hidden, self.weights.final_norm, self.arch.rms_norm_eps), tape

    def backward(
        self, adapter: Adapter, tape: Tape, grad: torch.Tensor, sink: GradientSink
    ) -> None:
        """Add the LoRA gradients to `sink`, from the gradient [T, H] of `forward`'s result.

        Frees the tape block by block.
        """
        self.fold.load(adapter)
        last = tape.inputs.pop()
        inverse = inverse_rms(last, self.arch.rms_norm_eps)
        grad = rms_norm_backward(grad, last, self.weights.final_norm, inverse)
        lowest = self._lowest_trained_block()
        for index in reversed(range(lowest, len(self.weights.layers))):
            hidden, kept = tape.inputs.pop(), tape.kept.pop()
            if kept is None and tape.again is not None:
                kept = tape.again(index, hidden)
            elif kept is None:
                _, kept = self._block(index, hidden, tape)
            grad = self._block_backward(index, hidden, kept, grad, tape, sink)

    def _head_layout(
        self, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> HeadLayout | None:
        arch, dtype = self.arch, self.weights.dtype
        plain = dtype == torch.float32 and self.weights.device.type == "cpu" and not arch.qk_norm
        if not plain or train_kernels() is None:
            return None
        return HeadLayout(arch.num_kv_heads, self._group_size, arch.head_dim, positions, cos, sin)

    def _lowest_trained_block(self) -> int:
        trained = [
            index
            for index in range(len(self.weights.layers))
            for name in ("qkv", "gate_up")
            if self.fold.pair(layer_group(index, name)) is not None
        ]
        return min(trained, default=len(self.weights.layers))

    def _block(self, index: int, hidden: torch.Tensor, tape: Tape) -> tuple[torch.Tensor, _Kept]:
        layer, eps = self.weights.layers[index], self.arch.rms_norm_eps
        inverse_in = inverse_rms(hidden, eps)
        z, x = self._input(len(hidden), index, "qkv")
        rms_norm_into(x, hidden, layer.input_norm, inverse_in)
        qkv, qkv_low = self._project(z, index, "qkv")
        q, k, v = self._split_heads(qkv, layer, tape)
        attended, beside = attention_forward(q, k, v, tape.lengths)

        z, x = self._input(len(hidden), index, "o")
        self._merge_heads(attended, x)
        o_out, o_low = self._project(z, index, "o", add_to=hidden)
        hidden_mid = o_out

        inverse_mid = inverse_rms(hidden_mid, eps)
        z, x = self._input(len(hidden), index, "gate_up")
        rms_norm_into(x, hidden_mid, layer.post_norm, inverse_mid)
        gate_up, gate_up_low = self._project(z, index, "gate_up")

        z, x = self._input(len(hidden), index, "down")
        swiglu_into(x, gate_up)
        hidden_out, down_low = self._project(z, index, "down", add_to=hidden_mid)
        kept = _Kept(
            inverse_in=inverse_in,
            qkv_low=qkv_low,
            qkv=qkv if layer.q_norm is not None else None,
            q=q,
            k=k,
            v=v,
            attended=attended,
            attended_beside=beside,
            o_low=o_low,
            hidden_mid=hidden_mid,
            inverse_mid=inverse_mid,
            gate_up_low=gate_up_low,
            gate_up=gate_up,
            down_low=down_low,
        )
        return hidden_out, kept

    def _block_again(
        self, index: int, hidden: torch.Tensor, *, tape: Tape, dtype: torch.dtype
    ) -> _Kept:
        return self._block(index, hidden, tape)[1].rounded(dtype)

    def _block_backward(
        self,
        index: int,
        hidden: torch.Tensor,
        kept: _Kept,
        grad: torch.Tensor,
        tape: Tape,
        sink: GradientSink,
    ) -> torch.Tensor:
        layer, dtype = self.weights.layers[index], self.weights.dtype
        # MLP: the gradient of its activation needs no x, and yields x for the LoRA gradient.
        activation = grad.new_empty(grad.shape[0], self.arch.intermediate_size, dtype=dtype)
        out_grad = grad.to(dtype)
        x_grad, low_grad = self._unproject(out_grad, index, "down")
        gate_up_grad = swiglu_backward(x_grad, kept.gate_up, activation)
        self._add_gradients(sink, index, "down", activation, kept.down_low, low_grad, out_grad)
        x_grad, low_grad = self._unproject(gate_up_grad, index, "gate_up")
        x = torch.empty_like(hidden, dtype=dtype)
        rms_norm_into(x, kept.hidden_mid, layer.post_norm, kept.inverse_mid)
        self._add_gradients(sink, index, "gate_up", x, kept.gate_up_low, low_grad, gate_up_grad)
        grad = rms_norm_backward(
            x_grad, kept.hidden_mid, layer.post_norm, kept.inverse_mid, add=grad
        )
        # Attention.
        out_grad = grad.to(dtype)
        x_grad, low_grad = self._unproject(out_grad, index, "o")
        merged = out_grad.new_empty(grad.shape[0], self.arch.q_size)
        self._merge_heads(kept.attended, merged)
        self._add_gradients(sink, index, "o", merged, kept.o_low, low_grad, out_grad)
        qkv_grad = self._attention_backward(x_grad, kept, layer, tape)
        x_grad, low_grad = self._unproject(qkv_grad, index, "qkv")
        rms_norm_into(x, hidden, layer.input_norm, kept.inverse_in)
        self._add_gradients(sink, index, "qkv", x, kept.qkv_low, low_grad, qkv_grad)
        return rms_norm_backward(x_grad, hidden, layer.input_norm, kept.inverse_in, add=grad)

    def _input(self, rows: int, index: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """An empty `z` for a projection and the view of it that is `x`."""
        matrix = self.weights.layers[index].matrices[name]
        return matrix.new_input(rows, self.fold.pair(layer_group(index, name)))

    def _project(
        self, z: torch.Tensor, index: int, name: str, *, add_to: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product (plus `add_to` or the bias) and `low`."""
        layer, lora = self.weights.layers[index], self.fold.pair(layer_group(index, name))
        bias = layer.qkv_bias if name == "qkv" else None
        return layer.matrices[name].forward(z, lora, bias=bias, add_to=add_to)

    def _unproject(
        self, grad: torch.Tensor, index: int, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `x` and of `A x` from the gradient of a projection's result."""
        lora = self.fold.pair(layer_group(index, name))
        return self.weights.layers[index].matrices[name].backward(grad, lora)

    def _add_gradients(
        self,
        sink: GradientSink,
        index: int,
        name: str,
        x: torch.Tensor,
        low: torch.Tensor,
        low_grad: torch.Tensor,
        out_grad: torch.Tensor,
    ) -> None:
        group = layer_group(index, name)
        if group in sink.layout.groups:
            sink.add(group, x=x, low=low, low_grad=low_grad, out_grad=out_grad)

    def _split_heads(
        self, qkv: torch.Tensor, layer: LayerWeights, tape: Tape
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normed, rotated and scaled queries [K, T G, D], keys and values [K, T, D]."""
        arch, num_tokens = self.arch, qkv.shape[0]
        kernels = train_kernels()
        if tape.layout is not None and kernels is not None:
            return kernels.split_heads(tape.layout, qkv)
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

    def _head_views(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, K, G, D] of the queries and [T, K, 1, D] of keys and values."""
        arch = self.arch
        q, k, v = qkv.split([arch.q_size, arch.kv_size, arch.kv_size], dim=-1)
        q_heads = (arch.num_kv_heads, self._group_size, arch.head_dim)
        kv_heads = (arch.num_kv_heads, 1, arch.head_dim)
        return q.unflatten(-1, q_heads), k.unflatten(-1, kv_heads), v.unflatten(-1, kv_heads)

    def _merge_heads(self, attended: torch.Tensor, out: torch.Tensor) -> None:
        """Write [K, T G, D] into [T, H] (heads side by side)."""
        arch = self.arch
        heads = out.unflatten(-1, (arch.num_kv_heads, self._group_size, arch.head_dim))
        heads.copy_(attended.unflatten(1, (-1, self._group_size)).transpose(0, 1))

    def _attention_backward(
        self, merged_grad: torch.Tensor, kept: _Kept, layer: LayerWeights, tape: Tape
    ) -> torch.Tensor:
        """Gradient of the stacked projection's result, [T, (K G + 2 K) D]."""
        arch, group = self.arch, self._group_size
        grad = torch.empty_like(kept.attended)
        heads = merged_grad.unflatten(-1, (arch.num_kv_heads, group, arch.head_dim))
        grad.unflatten(1, (-1, group)).copy_(heads.transpose(0, 1))
        q_grad, k_grad, v_grad = attention_backward(
            grad,
            kept.q,
            kept.k,
            kept.v,
            kept.attended,
            kept.attended_beside,
            tape.lengths,
        )
        kernels = train_kernels()
        if tape.layout is not None and kernels is not None:
            return kernels.join_heads(tape.layout, q_grad, k_grad, v_grad)
        result = grad.new_empty(merged_grad.shape[0], arch.q_size + 2 * arch.kv_size)
        q_out, k_out, v_out = self._head_views(result)
        scale = arch.head_dim**-0.5
        q_heads = q_grad.unflatten(1, (-1, group)).transpose(0, 1)
        rope_into(q_out, q_heads, tape.cos * scale, tape.sin * -scale)
        rope_into(k_out, k_grad.unsqueeze(2).transpose(0, 1), tape.cos, -tape.sin)
        v_out.copy_(v_grad.unsqueeze(2).transpose(0, 1))
        if kept.qkv is not None and layer.q_norm is not None and layer.k_norm is not None:
            q, k, _ = self._head_views(kept.qkv)
            for part, part_grad, weight in ((q, q_out, layer.q_norm), (k, k_out, layer.k_norm)):
                inverse = inverse_rms(part, arch.rms_norm_eps)
                part_grad.copy_(rms_norm_backward(part_grad, part, weight, inverse))
        return result
