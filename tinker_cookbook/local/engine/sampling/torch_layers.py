"""The decoder blocks of one model on torch, for tokens that decode.

All N tokens of a batch go through the projections together, since these treat every token alike.
How the projections apply adapters and how attention finds its keys is up to the caller.

Axes: N tokens, H hidden, V vocabulary, Q query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.matrices import DenseMatrix, Matrix
from tinker_cookbook.local.engine.model.ops import apply_rope, rms_norm
from tinker_cookbook.local.engine.model.weights import ModelWeights

__all__ = ["Attend", "Projector", "TorchLayers"]

Attend = Callable[[Tensor, Tensor, int], Tensor]
"""Maps queries [N, Q, D], new keys and values [N, 2, K, D] and the number of the layer to the
attended values [N, Q D]; it also stores the keys and values."""


class Projector(Protocol):
    """Multiplies a batch by weights so that every row uses its own adapter."""

    def project(self, x: Tensor, weight: Tensor, index: int, name: str) -> Tensor:
        """Return x [N, in] times a stacked projection [out, in] of block `index`, with adapters."""
        ...

    def project_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the logits [N, V] of x [N, H]."""
        ...


class TorchLayers:
    """The blocks, the final norm and the output embedding; all matrices are dense tensors."""

    def __init__(self, arch: ArchConfig, weights: ModelWeights) -> None:
        self.arch = arch
        self.weights = weights

    def hidden(
        self, tokens: Tensor, rope: list[Tensor], projector: Projector, attend: Attend
    ) -> Tensor:
        """Return the hidden states [N, H] before the final norm, float32.

        Args:
            tokens: int64 [N].
            rope: cosines and sines, [N, 1, D] each.
        """
        x = self.weights.embed_tokens(tokens).float()
        for index in range(len(self.weights.layers)):
            x = self._attention_block(x, index, rope, projector, attend)
            x = self._mlp_block(x, index, projector)
        return x

    def logits(self, hidden: Tensor, projector: Projector) -> Tensor:
        """Return logits [N, V], in the format of the weights, for states [N, H] of `hidden`."""
        normed = self._norm(hidden, self.weights.final_norm)
        return projector.project_head(normed, _weight(self.weights.head))

    def addresses(self) -> tuple[int, ...]:
        """Return where the matrices are: training a higher rank may move them."""
        layers = self.weights.layers
        matrices = [matrix for layer in layers for matrix in layer.matrices.values()]
        return tuple(m.storage.data_ptr() for m in matrices if isinstance(m, DenseMatrix))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.arch.rms_norm_eps)

    def _attention_block(
        self, x: Tensor, index: int, rope: list[Tensor], projector: Projector, attend: Attend
    ) -> Tensor:
        """Return x + attention(norm(x)), [N, H]."""
        arch, layer = self.arch, self.weights.layers[index]
        normed = self._norm(x, layer.input_norm)
        # one stacked product: the columns of all Q query heads, of K key heads, of K value heads
        qkv = projector.project(normed, _weight(layer.matrices["qkv"]), index, "qkv")
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        q_and_k = qkv[:, : arch.q_size + arch.kv_size].unflatten(1, (-1, arch.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q_and_k = torch.cat(
                [
                    self._norm(q_and_k[:, : arch.num_heads], layer.q_norm),
                    self._norm(q_and_k[:, arch.num_heads :], layer.k_norm),
                ],
                dim=1,
            )
        q_and_k = apply_rope(q_and_k.float(), *rope).to(qkv.dtype)
        q = q_and_k[:, : arch.num_heads]  # [N, Q, D]
        v = qkv[:, arch.q_size + arch.kv_size :].unflatten(1, (-1, arch.head_dim))
        kv = torch.stack([q_and_k[:, arch.num_heads :], v], dim=1)  # [N, 2, K, D]
        attended = attend(q, kv, index)
        return x + projector.project(attended, _weight(layer.matrices["o"]), index, "o")

    def _mlp_block(self, x: Tensor, index: int, projector: Projector) -> Tensor:
        """Return x + mlp(norm(x)), [N, H]."""
        layer = self.weights.layers[index]
        normed = self._norm(x, layer.post_norm)
        gate_up, down = (_weight(layer.matrices[name]) for name in ("gate_up", "down"))
        gate, up = projector.project(normed, gate_up, index, "gate_up").chunk(2, dim=-1)
        return x + projector.project(functional.silu(gate) * up, down, index, "down")


def _weight(matrix: Matrix) -> Tensor:
    assert isinstance(matrix, DenseMatrix), "packed matrices are for the compiled kernels"
    return matrix.weight
