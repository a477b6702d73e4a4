"""Base weights in the layout that the engine computes with, read from safetensors.

Projections that read the same input are stacked (query, key, value; gate, up), so that one product
serves them all. On a CPU with compiled kernels, matrices are packed once and serve both training
and sampling (`packed_matrix`); otherwise they are plain tensors (`matrices`).

`describe_weights` builds the same records from shapes alone: memory is planned with the code that
allocates it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.matrices import DenseMatrix, Matrix, spare_columns
from tinker_cookbook.local.engine.model.packed_matrix import (
    MatrixPacker,
    PackedMatrix,
    holds_bfloat16,
)
from tinker_cookbook.local.engine.model.quantised import round_to_bits
from tinker_cookbook.local.engine.model.tensor_files import ShapesOnly, TensorFiles, TensorSource

__all__ = [
    "BLOCKS",
    "FUSED",
    "LORA_ROOM",
    "LayerWeights",
    "ModelWeights",
    "describe_weights",
    "load_weights",
    "module_shapes",
]

LORA_ROOM = 32
"""LoRA rank for which a loaded dense matrix has spare columns from the start."""

FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Stacked matrix -> the modules in it, top to bottom."""

BLOCKS = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}
"""Stacked matrix -> the submodule of the decoder block that its modules belong to."""


def module_shapes(arch: ArchConfig) -> dict[str, tuple[int, int]]:
    """PEFT module name -> (out, in) of each projection in one decoder block."""
    hidden, inner = arch.hidden_size, arch.intermediate_size
    return {
        "q_proj": (arch.q_size, hidden),
        "k_proj": (arch.kv_size, hidden),
        "v_proj": (arch.kv_size, hidden),
        "o_proj": (hidden, arch.q_size),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


@dataclass
class LayerWeights:
    """The weights of one decoder block."""

    matrices: dict[str, Matrix]
    """One stacked matrix per key of `FUSED`."""
    qkv_bias: torch.Tensor | None
    """[q_size + 2 kv_size]; None where the architecture has no bias."""
    input_norm: torch.Tensor
    """[H], applied before attention."""
    post_norm: torch.Tensor
    """[H], applied before the MLP."""
    q_norm: torch.Tensor | None
    """[D], per query head; None where the architecture has no such norm. `k_norm` likewise."""
    k_norm: torch.Tensor | None

    def vectors(self) -> list[torch.Tensor]:
        """The norms and the bias."""
        found = (self.qkv_bias, self.input_norm, self.post_norm, self.q_norm, self.k_norm)
        return [vector for vector in found if vector is not None]


@dataclass
class ModelWeights:
    """A frozen base model, shared by all runs and samplers."""

    embed: torch.Tensor | None
    """[V, H]; None where the embedding is tied to a packed `head`."""
    head: Matrix
    """[V, H]; shares the tensor `embed` where the embeddings are tied and not packed."""
    final_norm: torch.Tensor
    """[H]."""
    layers: list[LayerWeights]

    @property
    def device(self) -> torch.device:
        return self.final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format between products; matrices may be stored in another one."""
        return self.final_norm.dtype

    @property
    def paired(self) -> bool:
        """Whether the compiled kernels multiply pairs of bfloat16 numbers."""
        return isinstance(self.head, PackedMatrix) and self.head.paired

    @property
    def product_dtype(self) -> torch.dtype:
        """The number format to which the operands of products are rounded."""
        return torch.bfloat16 if self.paired else self.dtype

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU computes with them. Weights without numbers describe a model on a CPU."""
        return self.device.type in ("cpu", "meta")

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [T, H] in the dtype of the arithmetic for int64 tokens [T]."""
        if self.embed is None:
            return self.head.rows(tokens)
        return torch.nn.functional.embedding(tokens, self.embed).to(self.dtype)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding."""
        head = self.head
        return self.embed is None or (isinstance(head, DenseMatrix) and head.storage is self.embed)

    @property
    def block_parameters(self) -> int:
        """Number of parameters of all decoder blocks."""
        matrices = (matrix for layer in self.layers for matrix in layer.matrices.values())
        vectors = (vector for layer in self.layers for vector in layer.vectors())
        total = sum(matrix.out_features * matrix.in_features for matrix in matrices)
        return total + sum(vector.numel() for vector in vectors)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model; tied embeddings count once."""
        embeddings = 1 if self.ties_embeddings else 2
        head = self.head.out_features * self.head.in_features
        return self.block_parameters + embeddings * head + self.final_norm.numel()

    def matrix_bytes(self) -> int:
        """Return the memory of all matrices in bytes, including spare columns and padding."""
        total = sum(m.num_bytes for layer in self.layers for m in layer.matrices.values())
        total += self.head.num_bytes
        if self.embed is None or self.ties_embeddings:
            return total
        return total + self.embed.nbytes

    def num_bytes(self) -> int:
        """Return the memory of all tensors in bytes."""
        vectors = sum(vector.nbytes for layer in self.layers for vector in layer.vectors())
        return self.matrix_bytes() + vectors + self.final_norm.nbytes


def load_weights(
    folder: Path,
    arch: ArchConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    lora_room: int = LORA_ROOM,
    blocks: MatrixPacker | None = None,
    bits: int = 0,
) -> ModelWeights:
    """Read a model folder into the engine's layout.

    Args:
        lora_room: rank for which spare columns are allocated now; a larger rank widens them later.
        dtype: number format of the vectors, and of the matrices without `blocks`.
        blocks: packs the matrices for the compiled kernels; None keeps them as tensors.
        bits: without `blocks`, round the weights to those of a matrix in 8 or 4 bits; 0 does not.

    Raises:
        WeightsError: if a tensor is missing or its shape differs from what config.json implies.
    """
    source = TensorFiles(folder)
    reader = _Reader(source, torch.device(device), dtype, lora_room, blocks, bits)
    return reader.model(arch)


def describe_weights(
    arch: ArchConfig,
    *,
    stored_dtype: torch.dtype,
    dtype: torch.dtype,
    lora_room: int = LORA_ROOM,
    blocks: MatrixPacker | None = None,
) -> ModelWeights:
    """Return what `load_weights` would return for a CPU, with shapes and formats but no numbers.

    Args:
        stored_dtype: number format of the files.
        dtype, lora_room, blocks: as for `load_weights`.
    """
    source = ShapesOnly(stored_dtype)
    return _Reader(source, torch.device("meta"), dtype, lora_room, blocks).model(arch)


@dataclass
class _Reader:
    """Reads tensors onto the engine's device, in its number format and layout."""

    checkpoint: TensorSource
    device: torch.device
    dtype: torch.dtype
    lora_room: int
    blocks: MatrixPacker | None
    bits: int = 0

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.dtype, copy=True)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.place(self.checkpoint.read(name, shape))

    def model(self, arch: ArchConfig) -> ModelWeights:
        """Read the whole model."""
        shape = (arch.vocab_size, arch.hidden_size)
        tied = arch.tied_embeddings
        embed = self.checkpoint.read("model.embed_tokens.weight", shape)
        if self.blocks is not None:
            unembed = embed if tied else self.checkpoint.read("lm_head.weight", shape)
            head = self.blocks.pack(unembed, [shape[0]], head=True)
            embed = None if tied else _shortest(embed)
        else:
            unembed = embed if tied else self.checkpoint.read("lm_head.weight", shape)
            if self.bits:
                unembed = round_to_bits(unembed, 8)
            head = DenseMatrix(self.place(unembed))
            embed = head.storage if tied else self.place(embed)
        return ModelWeights(
            embed=embed,
            head=head,
            final_norm=self.tensor("model.norm.weight", (arch.hidden_size,)),
            layers=[self.layer(arch, index) for index in range(arch.num_layers)],
        )

    def layer(self, arch: ArchConfig, index: int) -> LayerWeights:
        """Read one decoder block."""
        prefix = f"model.layers.{index}"
        shapes = module_shapes(arch)
        bias = None
        if arch.qkv_bias:
            names = [(module, (shapes[module][0],)) for module in FUSED["qkv"]]
            bias = torch.cat([self.tensor(f"{prefix}.self_attn.{m}.bias", s) for m, s in names])

        def norm(name: str, size: int) -> torch.Tensor:
            return self.tensor(f"{prefix}.{name}.weight", (size,))

        return LayerWeights(
            matrices={name: self._matrix(prefix, name, shapes) for name in FUSED},
            qkv_bias=bias,
            input_norm=norm("input_layernorm", arch.hidden_size),
            post_norm=norm("post_attention_layernorm", arch.hidden_size),
            q_norm=norm("self_attn.q_norm", arch.head_dim) if arch.qk_norm else None,
            k_norm=norm("self_attn.k_norm", arch.head_dim) if arch.qk_norm else None,
        )

    def _matrix(self, prefix: str, name: str, shapes: dict[str, tuple[int, int]]) -> Matrix:
        """Read the modules of a stacked matrix and stack them."""
        modules = FUSED[name]
        parts = [
            self.checkpoint.read(f"{prefix}.{BLOCKS[name]}.{module}.weight", shapes[module])
            for module in modules
        ]
        outs, width = [len(part) for part in parts], shapes[modules[0]][1]
        if self.blocks is not None:
            return self.blocks.pack(torch.cat(parts), outs)
        room = spare_columns(self.lora_room, len(modules))
        storage = torch.zeros(sum(outs), width + room, dtype=self.dtype, device=self.device)
        matrix = torch.cat(parts)
        if self.bits:
            matrix = round_to_bits(matrix, self.bits)
        storage[:, :width] = matrix.to(storage.device)
        return DenseMatrix(storage, width)


def _shortest(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in bfloat16 where that loses nothing, otherwise in float32."""
    return tensor.to(torch.bfloat16 if holds_bfloat16(tensor) else torch.float32, copy=True)
