"""Base weights in the layout the engine computes with, straight from safetensors.

Projections that read the same input are stacked (query, key, value; gate, up), so that one product
serves them. On a CPU with compiled kernels and float32 arithmetic matrices are packed once, for
training and sampling (`packed_matrix`); elsewhere they are tensors (`matrices`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tinker_cookbook.exceptions import WeightsError
from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.matrices import DenseMatrix, Matrix, spare_columns
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, holds_bfloat16

__all__ = [
    "BLOCKS",
    "FUSED",
    "LORA_ROOM",
    "LayerWeights",
    "ModelWeights",
    "load_weights",
    "module_shapes",
]

LORA_ROOM = 32
"""Rank for which a loaded model has room from the start."""

FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Stacked matrix -> the modules in it, top to bottom."""

BLOCKS = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}
"""Stacked matrix -> the submodule of the block its modules live in."""


@dataclass
class LayerWeights:
    """One decoder block."""

    matrices: dict[str, Matrix]
    """Per key of `FUSED`."""
    qkv_bias: torch.Tensor | None
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass
class ModelWeights:
    """A frozen base model; shared by every run and sampler."""

    embed: torch.Tensor | None
    """[V, H]; None where the model ties it to a packed `head`."""
    head: Matrix
    """[V, H]; holds the tensor `embed` where the model ties them."""
    final_norm: torch.Tensor
    layers: list[LayerWeights]
    twin: ModelWeights | None = None
    """The same for products in float32; see `native.twin`."""

    @property
    def device(self) -> torch.device:
        return self.final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic; packed matrices may hold their numbers in another."""
        return self.final_norm.dtype

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, H] in the dtype of the arithmetic, for int64 [T]."""
        if self.embed is None:
            return self.head.rows(tokens)
        return torch.nn.functional.embedding(tokens, self.embed).to(self.dtype)

    def num_bytes(self) -> int:
        """Memory of the matrices, spare columns included."""
        matrices = [matrix for layer in self.layers for matrix in layer.matrices.values()]
        total = sum(matrix.num_bytes for matrix in [*matrices, self.head])
        if self.embed is None or self.ties_embeddings:
            return total
        return total + self.embed.numel() * self.embed.element_size()

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding."""
        head = self.head
        return self.embed is None or (isinstance(head, DenseMatrix) and head.storage is self.embed)


class _Checkpoint:
    """Tensors of a folder of safetensors files by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(names.values()))
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise WeightsError(
                f"{folder} has no *.safetensors file; convert its weights to safetensors first"
            )
        self._open = {}
        for file in files:
            handle = safe_open(folder / file, framework="pt")
            self._open.update(dict.fromkeys(handle.keys(), handle))

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._open:
            raise WeightsError(f"{self._folder}: tensor {name} is missing from the weights")
        tensor = self._open[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"{self._folder}: tensor {name} has shape {tuple(tensor.shape)}; "
                f"config.json implies {shape}"
            )
        return tensor


def load_weights(
    folder: Path,
    arch: ArchConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    lora_room: int = LORA_ROOM,
    blocks: MatrixBlocks | None = None,
) -> ModelWeights:
    """Read a model folder into the engine's layout.

    Args:
        lora_room: rank for which spare columns are allocated at once; a larger rank widens them.
        blocks: packs the matrices for the compiled kernels; float32 on a CPU only.

    Raises:
        WeightsError: if a tensor is missing or has another shape than config.json implies.
    """
    reader = _Reader(_Checkpoint(folder), torch.device(device), dtype, lora_room, blocks)
    shape = (arch.vocab_size, arch.hidden_size)
    tied = arch.tied_embeddings
    embed = reader.checkpoint.read("model.embed_tokens.weight", shape)
    if blocks is not None:
        unembed = embed if tied else reader.checkpoint.read("lm_head.weight", shape)
        head, embed = blocks.pack(unembed, [shape[0]]), None if tied else _shortest(embed)
    else:
        embed = reader.place(embed)
        head = DenseMatrix(embed if tied else reader.tensor("lm_head.weight", shape))
    return ModelWeights(
        embed=embed,
        head=head,
        final_norm=reader.tensor("model.norm.weight", (arch.hidden_size,)),
        layers=[reader.layer(arch, index) for index in range(arch.num_layers)],
    )


def _shortest(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in bfloat16 where that loses nothing, else in float32."""
    return tensor.to(torch.bfloat16 if holds_bfloat16(tensor) else torch.float32, copy=True)


def module_shapes(arch: ArchConfig) -> dict[str, tuple[int, int]]:
    """PEFT module name -> (out, in) of the projections of one block."""
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
class _Reader:
    """Reads tensors into the place and format of the engine."""

    checkpoint: _Checkpoint
    device: torch.device
    dtype: torch.dtype
    lora_room: int
    blocks: MatrixBlocks | None

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.dtype, copy=True)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.place(self.checkpoint.read(name, shape))

    def layer(self, arch: ArchConfig, index: int) -> LayerWeights:
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
        storage[:, :width] = torch.cat(parts).to(storage.device)
        return DenseMatrix(storage, width)
