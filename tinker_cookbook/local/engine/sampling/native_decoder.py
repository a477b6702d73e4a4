"""The batch decoder on the compiled kernels: a whole forward pass is one call.

Computes the same as `decode.Decoder` on a CPU, and bit for bit the same for a token whatever else
is in its batch. It reads the packed matrices that training uses; where training computes in
bfloat16, a packed copy made by the first batch. Hidden states, keys and values are float32.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.memory import available_bytes
from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.lora import HEAD_PATH, Adapter, layer_group
from tinker_cookbook.local.engine.model.matrices import Matrix
from tinker_cookbook.local.engine.model.ops import RopeTable
from tinker_cookbook.local.engine.model.packed_matrix import (
    MatrixBlocks,
    PackedMatrix,
    pack_panels,
)
from tinker_cookbook.local.engine.model.twin import float32_twin, twin_bytes
from tinker_cookbook.local.engine.model.weights import (
    FUSED,
    LayerWeights,
    ModelWeights,
    module_shapes,
)
from tinker_cookbook.local.engine.native.build import load_kernels
from tinker_cookbook.local.engine.native.products import Products
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch
from tinker_cookbook.local.engine.sampling.kv_cache import Row, cache_shape

__all__ = ["NativeDecoder", "native_decoder"]

logger = logging.getLogger(__name__)

_SPARE_BYTES = 512 * 2**20
_LANES = 16
"""At least the kernels' vector width."""

_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", _Pointer),
        ("bias", _Pointer),
        ("half", _Long),
        ("in_features", _Long),
        ("out_features", _Long),
        ("num_modules", _Long),
        ("module_out", _Long * 3),
    )


class _Lora(ctypes.Structure):
    _fields_ = (("a", _Pointer), ("b", _Pointer * 3))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _Linear),
        ("o", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("input_norm", _Pointer),
        ("post_norm", _Pointer),
        ("q_norm", _Pointer),
        ("k_norm", _Pointer),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("num_layers", _Long),
        ("hidden", _Long),
        ("heads", _Long),
        ("kv_heads", _Long),
        ("head_dim", _Long),
        ("inner", _Long),
        ("eps", ctypes.c_float),
        ("layers", ctypes.POINTER(_Layer)),
        ("final_norm", _Pointer),
        ("head", _Linear),
    )


class _Group(ctypes.Structure):
    _fields_ = (
        ("first", _Long),
        ("count", _Long),
        ("rank", _Long),
        ("scale", ctypes.c_float),
        ("projections", ctypes.POINTER(_Lora)),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("num_tokens", _Long),
        ("num_groups", _Long),
        ("num_threads", _Long),
        ("max_position", _Long),
        ("order", _Pointer),
        ("group_of", _Pointer),
        ("groups", ctypes.POINTER(_Group)),
        ("positions", _Pointer),
        ("num_spans", _Long),
        ("spans", _Pointer),
        ("kv", _Pointer),
        ("kv_stride", _Pointer),
        ("capacity", _Pointer),
        ("same_as", _Pointer),
        ("same_length", _Pointer),
        ("cos", _Pointer),
        ("sin", _Pointer),
        ("x", _Pointer),
        ("normed", _Pointer),
        ("wide", _Pointer),
        ("act", _Pointer),
        ("low", _Pointer),
        ("scores", _Pointer),
    )


_STRUCTS = (_Linear, _Lora, _Layer, _Model, _Group, _Batch)


def native_decoder(arch: ArchConfig, weights: ModelWeights) -> NativeDecoder | None:
    """A decoder on compiled kernels, or None where there are none for this machine or format."""
    if weights.device.type != "cpu" or weights.dtype not in (torch.float32, torch.bfloat16):
        return None
    kernels = load_kernels()
    if kernels is None:
        return None
    needed, free = twin_bytes(weights), available_bytes()
    if needed and free is not None and needed + _SPARE_BYTES > free:
        logger.warning(
            "sampling uses torch: %.1f GiB for packed weights are not free", needed / 2**30
        )
        return None
    return NativeDecoder(arch, weights, kernels)


class NativeDecoder:
    """Runs batches through one base model; used by one thread."""

    exact = True
    overhead_tokens = 8
    """Measured: all weights are read once, in the time that 8 tokens take."""

    def __init__(self, arch: ArchConfig, weights: ModelWeights, kernels: ctypes.CDLL) -> None:
        self.arch = arch
        self.weights = weights
        self.cache_shape = cache_shape(arch, weights, torch.float32)
        self._kernels = kernels
        kernels.struct_size.restype = _Long
        for number, struct in enumerate(_STRUCTS):
            size = kernels.struct_size(_Long(number))
            assert size == ctypes.sizeof(struct), f"{struct.__name__} differs from the C struct"
        kernels.span_tokens.restype = kernels.span_heads.restype = _Long
        self._span, self._span_heads = int(kernels.span_tokens()), int(kernels.span_heads())
        self._products = Products(kernels)
        self._panel = self._products.panel
        self._rope = RopeTable(arch.rope, arch.head_dim, "cpu")
        self._scratch: dict[str, Tensor] = {}
        self._model: _Model | None = None
        self._layers: Any = None
        self._kept: list[Any] = []
        """What the structs of the model point to."""
        self._blocks = MatrixBlocks(self._products)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Return the hidden states [N, H] before the final norm; caches are filled on the way."""
        x = self.weights.embed_tokens(torch.from_numpy(batch.tokens())).float()
        positions = batch.positions()
        call = self._call(x, _group_spans(batch.adapters()), int(positions.max()))
        places = self._places(batch)
        cos, sin = self._rope.up_to(call.struct.max_position + 1)
        call.struct.positions = positions.ctypes.data
        call.struct.kv, call.struct.kv_stride, call.struct.capacity = (
            part.ctypes.data for part in places
        )
        same_as, same_length = _same_beginnings(batch, len(positions))
        call.struct.same_as, call.struct.same_length = same_as.ctypes.data, same_length.ctypes.data
        spans = _attention_spans(self._span, positions, places[0], same_as, same_length)
        call.struct.num_spans, call.struct.spans = len(spans) - 1, spans.ctypes.data
        call.struct.cos, call.struct.sin = cos.data_ptr(), sin.data_ptr()
        self._kernels.forward_blocks(ctypes.byref(self._current_model()), ctypes.byref(call.struct))
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 [N, V] for hidden states [N, H] of `forward`."""
        hidden = hidden.contiguous()
        call = self._call(hidden, _group_spans(adapters), 0)
        out = torch.empty(len(hidden), self.arch.vocab_size)
        self._kernels.forward_head(
            ctypes.byref(self._current_model()),
            ctypes.byref(call.struct),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out

    def _call(self, x: Tensor, spans: list[_Span], max_position: int) -> _Call:
        arch, num_tokens = self.arch, len(x)
        num_threads = torch.get_num_threads()
        rank = max((span.adapter.adapter.rank for span in spans if span.adapter), default=1)
        groups = (_Group * len(spans))()
        first = 0
        for group, span in zip(groups, spans, strict=True):
            group.first, group.count = first, len(span.rows)
            first += len(span.rows)
            if span.adapter is not None:
                group.rank = span.adapter.adapter.rank
                group.scale = span.adapter.adapter.scale
                group.projections = _lora_table(span.adapter, arch, self._panel)
        order = np.concatenate([span.rows for span in spans])
        group_of = np.repeat(np.arange(len(spans)), [len(span.rows) for span in spans])
        widest = max(arch.q_size + 2 * arch.kv_size, 2 * arch.intermediate_size)
        inner = max(arch.q_size, arch.intermediate_size)
        scores = num_threads * self._span * self._span_heads * (max_position + 1 + _LANES)
        struct = _Batch(
            num_tokens=num_tokens,
            num_groups=len(spans),
            num_threads=num_threads,
            max_position=max_position,
            order=order.ctypes.data,
            group_of=group_of.ctypes.data,
            groups=groups,
            x=x.data_ptr(),
            normed=self._buffer("normed", num_tokens * arch.hidden_size),
            wide=self._buffer("wide", num_tokens * widest),
            act=self._buffer("act", num_tokens * inner),
            low=self._buffer("low", num_tokens * 3 * rank),
            scores=self._buffer("scores", scores),
        )
        return _Call(struct, (groups, order, group_of))

    def _buffer(self, name: str, size: int) -> int:
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._scratch[name] = torch.empty(size)
        return buffer.data_ptr()

    def _places(self, batch: Batch) -> list[np.ndarray]:
        """Per token: the address of its sequence's cache, the step between layers, the capacity."""
        places: list[tuple[int, int, int]] = []
        for row in batch.decode_rows:
            places.append(_place(row))
        alone = [chunk for chunk in batch.chunks if chunk.row is None]
        token_size = 2 * self.arch.kv_size
        spare = self._buffer("alone", sum(len(chunk.tokens) for chunk in alone) * token_size)
        for chunk in batch.chunks:
            num = len(chunk.tokens)
            if chunk.row is None:
                # Nothing reads these keys after the layer that wrote them: all layers share them.
                places += [(spare, 0, num)] * num
                spare += num * token_size * 4
            else:
                places += [_place(chunk.row)] * num
        return list(np.array(places, np.int64).T.copy())

    def _current_model(self) -> _Model:
        """The structs of the packed weights, made by the first use."""
        if self._model is None:
            weights = float32_twin(self.arch, self.weights, self._blocks)
            structs = [self._layer_struct(layer) for layer in weights.layers]
            self._layers = (_Layer * len(structs))(*structs)
            self._model = self._model_struct(weights)
        return self._model

    def _model_struct(self, weights: ModelWeights) -> _Model:
        arch = self.arch
        return _Model(
            num_layers=arch.num_layers,
            hidden=arch.hidden_size,
            heads=arch.num_heads,
            kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            inner=arch.intermediate_size,
            eps=arch.rms_norm_eps,
            layers=self._layers,
            final_norm=self._vector(weights.final_norm),
            head=self._linear(weights.head, [arch.vocab_size], None),
        )

    def _layer_struct(self, layer: LayerWeights) -> _Layer:
        shapes = module_shapes(self.arch)
        linears = {
            name: self._linear(
                layer.matrices[name],
                [shapes[module][0] for module in modules],
                layer.qkv_bias if name == "qkv" else None,
            )
            for name, modules in FUSED.items()
        }
        return _Layer(
            **linears,
            input_norm=self._vector(layer.input_norm),
            post_norm=self._vector(layer.post_norm),
            q_norm=self._vector(layer.q_norm),
            k_norm=self._vector(layer.k_norm),
        )

    def _linear(self, matrix: Matrix, outs: list[int], bias: Tensor | None) -> _Linear:
        """A stacked matrix as the kernels see it."""
        assert isinstance(matrix, PackedMatrix), "a twin's matrices are packed"
        self._kept.append(matrix)
        return _Linear(
            weight=matrix.panels.data_ptr(),
            bias=self._vector(bias),
            half=matrix.half,
            in_features=matrix.in_features,
            out_features=matrix.out_features,
            num_modules=len(outs),
            module_out=(_Long * 3)(*outs),
        )

    def _vector(self, values: Tensor | None) -> int | None:
        """Address of a norm or bias in float32, NULL for None."""
        if values is None:
            return None
        self._kept.append(values.float().contiguous())
        return self._kept[-1].data_ptr()


@dataclass(frozen=True)
class _Call:
    struct: _Batch
    kept_alive: tuple[Any, ...]


@dataclass(frozen=True)
class _Span:
    adapter: StackedLora | None
    rows: np.ndarray


def _place(row: Row) -> tuple[int, int, int]:
    """Where a row's cache is, the step between layers in it, its capacity."""
    kv = row.pool.kv
    return kv.data_ptr() + row.index * kv.stride(1) * 4, kv.stride(0), row.pool.capacity


def _same_beginnings(batch: Batch, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Per token, a token whose sequence begins the same, and for how long, in fours."""
    same_as, same_length = np.zeros((2, num_tokens), np.int64)
    if batch.decode_same:
        pairs = np.array(batch.decode_same, np.int64)
        same_as[: len(pairs)], same_length[: len(pairs)] = pairs[:, 0], pairs[:, 1] // 4 * 4
    return same_as, same_length


def _attention_spans(
    longest: int,
    positions: np.ndarray,
    addresses: np.ndarray,
    same_as: np.ndarray,
    same_length: np.ndarray,
) -> np.ndarray:
    """First tokens of spans that read the same keys, and at last the number of tokens.

    They are neighbours of one prompt, or decode from the same beginning.
    """
    neighbours = (np.diff(addresses) == 0) & (np.diff(positions) == 1)
    siblings = (np.diff(same_as) == 0) & (same_length[1:] > 0) & (same_length[:-1] > 0)
    starts = np.flatnonzero(np.concatenate([[True], ~(neighbours | siblings)]))
    counts = np.diff(starts, append=len(positions))
    pieces = [np.arange(start, start + n, longest) for start, n in zip(starts, counts, strict=True)]
    return np.concatenate([*pieces, [len(positions)]])


def _group_spans(adapters: list[tuple[StackedLora | None, int]]) -> list[_Span]:
    """The rows of each adapter, from (adapter, number of consecutive rows)."""
    rows: dict[StackedLora | None, list[np.ndarray]] = {}
    first = 0
    for adapter, count in adapters:
        rows.setdefault(adapter, []).append(np.arange(first, first + count, dtype=np.int64))
        first += count
    return [_Span(adapter, np.concatenate(parts)) for adapter, parts in rows.items()]


def _lora_table(stacked: StackedLora, arch: ArchConfig, panel: int) -> Any:
    """Addresses of an adapter's packed matrices, per block and projection, then the head."""
    if stacked.native_table is None:
        groups = [layer_group(index, name) for index in range(arch.num_layers) for name in FUSED]
        kept: list[Tensor] = []
        entries = [
            _lora_struct(stacked.adapter, group, panel, kept) for group in [*groups, HEAD_PATH]
        ]
        stacked.native_table = (_Lora * len(entries))(*entries), kept
    return stacked.native_table[0]


def _lora_struct(adapter: Adapter, group: str, panel: int, kept: list[Tensor]) -> _Lora:
    targets = adapter.group(group)
    if not targets:
        return _Lora()
    a = adapter.stacked_a(group)
    packed = [pack_panels(a, [len(a)], panel)]
    packed += [pack_panels(adapter.b(t.path), [t.out_features], panel) for t in targets]
    kept += packed
    addresses = [tensor.data_ptr() for tensor in packed]
    return _Lora(addresses[0], (_Pointer * 3)(*addresses[1:]))
