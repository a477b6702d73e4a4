"""A second copy of a bfloat16 model, packed for products in float32.

The compiled kernels sample in float32 whatever the format. Logprobs that are compared with the
sampler's are computed in the same arithmetic: rounded to bfloat16 after every product, logprobs of
the same weights would differ by 0.03 nats per token, spread evenly over all layers and products.

Sampling and training share the twin. Its matrices take as much memory as the model's own.
"""

from __future__ import annotations

import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.matrices import DenseMatrix, Matrix
from tinker_cookbook.local.engine.model.packed_matrix import MatrixPacker, holds_bfloat16
from tinker_cookbook.local.engine.model.weights import (
    FUSED,
    LayerWeights,
    ModelWeights,
    module_shapes,
)

__all__ = ["float32_twin", "twin_bytes"]


def float32_twin(arch: ArchConfig, weights: ModelWeights, blocks: MatrixPacker) -> ModelWeights:
    """Return the weights packed for the compiled kernels, built on the first call.

    Matrices that are packed already are shared, not copied.
    """
    if weights.twin is None:
        shapes = module_shapes(arch)

        def packed(matrix: Matrix, outs: list[int]) -> Matrix:
            return blocks.pack(matrix.weight, outs) if isinstance(matrix, DenseMatrix) else matrix

        layers = [
            LayerWeights(
                matrices={
                    name: packed(layer.matrices[name], [shapes[module][0] for module in modules])
                    for name, modules in FUSED.items()
                },
                qkv_bias=_wide(layer.qkv_bias),
                input_norm=layer.input_norm.float(),
                post_norm=layer.post_norm.float(),
                q_norm=_wide(layer.q_norm),
                k_norm=_wide(layer.k_norm),
            )
            for layer in weights.layers
        ]
        weights.twin = ModelWeights(
            embed=weights.embed,
            head=packed(weights.head, [arch.vocab_size]),
            final_norm=weights.final_norm.float(),
            layers=layers,
        )
    return weights.twin


def twin_bytes(weights: ModelWeights) -> int:
    """Return the memory in bytes that `float32_twin` will allocate; 0 once it is built."""
    if weights.twin is not None:
        return 0
    matrices = [matrix for layer in weights.layers for matrix in layer.matrices.values()]
    return sum(_packed_bytes(matrix) for matrix in [*matrices, weights.head])


def _packed_bytes(matrix: Matrix) -> int:
    if not isinstance(matrix, DenseMatrix):
        return 0
    return matrix.weight.numel() * (2 if holds_bfloat16(matrix.weight) else 4)


def _wide(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.float()
