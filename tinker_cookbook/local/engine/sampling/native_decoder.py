"""The batch decoder on the compiled kernels: a whole forward pass is one call.

It computes the same function as `torch_decoder.TorchDecoder` on a CPU, and a token gets the same
bits whatever else is in its batch. It reads the packed matrices that training uses. With matrices
of bfloat16 pairs it also rounds their input rows, keys and values to bfloat16, as training does;
then both compute the same bits. Hidden states are float32.

The classes derived from `ctypes.Structure` mirror the C structs field by field; the sizes are
compared when a decoder is created.

Axes: N tokens of the batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.matrices import Matrix
from tinker_cookbook.local.engine.model.ops import RopeTable
from tinker_cookbook.local.engine.model.packed_matrix import PackedMatrix
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
from tinker_cookbook.local.engine.sampling.cache_rows import Row, cache_shape
from tinker_cookbook.local.engine.sampling.native_adapters import (
    LoraStruct,
    adapter_packer,
    lora_table,
)

__all__ = ["NativeDecoder", "native_decoder"]

_LANES = 16
"""Upper bound of the kernels' vector width in floats."""

_EXPANDED_FLOATS = 2**16
"""A quarter of a MiB: part of a second-level cache."""

_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", _Pointer),
        ("bias", _Pointer),
        ("half", _Long),
        ("bits", _Long),
        ("in_features", _Long),
        ("out_features", _Long),
        ("num_modules", _Long),
        ("module_out", _Long * 3),
    )


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
        ("projections", ctypes.POINTER(LoraStruct)),
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
        ("low_rounded", _Pointer),
        ("expanded", _Pointer),
        ("expanded_size", _Long),
        ("scores", _Pointer),
    )


_STRUCTS = (_Linear, LoraStruct, _Layer, _Model, _Group, _Batch)


def native_decoder(arch: ArchConfig, weights: ModelWeights) -> NativeDecoder | None:
    """Return a decoder on compiled kernels, or None where the matrices are not packed for them."""
    kernels = load_kernels() if isinstance(weights.head, PackedMatrix) else None
    return None if kernels is None else NativeDecoder(arch, weights, kernels)


class NativeDecoder:
    """Runs batches through one base model. Used by one thread."""

    exact = True
    overhead_tokens = 8
    """Measured: a pass reads all weights once, which takes as long as computing 8 tokens."""

    def __init__(self, arch: ArchConfig, weights: ModelWeights, kernels: ctypes.CDLL) -> None:
        self.arch = arch
        self.weights = weights
        self.cache_shape = cache_shape(arch, weights)
        kernels.struct_size.restype = _Long
        for number, struct in enumerate(_STRUCTS):
            size = kernels.struct_size(_Long(number))
            assert size == ctypes.sizeof(struct), f"{struct.__name__} differs from the C struct"
        kernels.span_tokens.restype = kernels.span_heads.restype = _Long
        self._span, self._span_heads = int(kernels.span_tokens()), int(kernels.span_heads())
        panel = Products(kernels).panel
        self.packer = adapter_packer(kernels, paired=weights.paired)
        self._forward_blocks = (
            kernels.forward_blocks_pairs if weights.paired else kernels.forward_blocks
        )
        self._forward_head = kernels.forward_head_pairs if weights.paired else kernels.forward_head
        self._rope = RopeTable(arch.rope, arch.head_dim, "cpu")
        self._expanded_size = _expanded_size(weights, panel)
        self._scratch: dict[str, Tensor] = {}
        self._model: _Model | None = None
        self._layers: ctypes.Array[_Layer] | None = None
        self._kept: list[Tensor | PackedMatrix] = []
        """Keeps alive what the structs of the model point to."""

    @torch.inference_mode()
    def forward(self, batch: Batch[Row]) -> Tensor:
        """Return the hidden states [N, H] before the final norm, and write keys and values."""
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
        addresses = places[0][: len(positions)]
        spans = _attention_spans(self._span, positions, addresses, same_as, same_length)
        call.struct.num_spans, call.struct.spans = len(spans) - 1, spans.ctypes.data
        call.struct.cos, call.struct.sin = cos.data_ptr(), sin.data_ptr()
        self._forward_blocks(ctypes.byref(self._current_model()), ctypes.byref(call.struct))
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 logits [N, V] for hidden states [N, H] of `forward`."""
        hidden = hidden.contiguous()
        call = self._call(hidden, _group_spans(adapters), 0)
        out = torch.empty(len(hidden), self.arch.vocab_size)
        self._forward_head(
            ctypes.byref(self._current_model()),
            ctypes.byref(call.struct),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out

    def _call(self, x: Tensor, spans: list[_Span], max_position: int) -> _Call:
        """Return the struct of a call on N tokens, with scratch buffers and without positions.

        The kernels compute every token where it is in x; `order` lists the tokens by adapter, so
        that the tokens of an adapter go through its matrices together.
        """
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
                group.projections = lora_table(span.adapter, arch, self.packer)
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
            low_rounded=self._buffer("low_rounded", num_tokens * (3 * rank + 2)),
            expanded=self._buffer("expanded", num_threads * self._expanded_size),
            expanded_size=self._expanded_size,
            scores=self._buffer("scores", scores),
        )
        return _Call(struct, (groups, order, group_of))

    def _buffer(self, name: str, size: int) -> int:
        """Return the address of a scratch buffer of `size` floats or more; later calls reuse it."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._scratch[name] = torch.empty(size)
        return buffer.data_ptr()

    def _places(self, batch: Batch[Row]) -> list[np.ndarray]:
        """Return where keys and values are, as three int64 arrays.

        The arrays are the address of a sequence's cache in layer 0, the count of numbers from one
        layer to the next, and the capacity in tokens. They have one entry per token and then one
        per prefix of `_prefix_rows`.
        """
        places: list[tuple[int, int, int]] = []
        for row in batch.decode_rows:
            places.append(_place(row))
        # prompts without a row get temporary memory for one layer
        alone = [chunk for chunk in batch.chunks if chunk.row is None]
        size = self.cache_shape.dtype.itemsize
        token_bytes = 2 * self.arch.kv_size * size
        spare = self._buffer("alone", sum(len(c.tokens) for c in alone) * token_bytes // 4)
        for chunk in batch.chunks:
            num = len(chunk.tokens)
            if chunk.row is None:
                # No later pass reads these keys, so every layer overwrites those of the one before.
                # The kernels add the position of a key, and the first one is at `start`.
                places += [(spare - chunk.start * self.arch.head_dim * size, 0, num)] * num
                spare += num * token_bytes
            else:
                places += [_place(chunk.row)] * num
        places += [_place(row) for row in _prefix_rows(batch)]
        return list(np.array(places, np.int64).T.copy())

    def _current_model(self) -> _Model:
        """Return the structs of the packed weights, which the first call creates."""
        if self._model is None:
            structs = [self._layer_struct(layer) for layer in self.weights.layers]
            self._layers = (_Layer * len(structs))(*structs)
            self._model = self._model_struct(self.weights)
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
        """Return the struct of a stacked matrix."""
        assert isinstance(matrix, PackedMatrix), "the decoder reads packed matrices"
        self._kept.append(matrix)
        return _Linear(
            weight=matrix.panels.data_ptr(),
            bias=self._vector(bias),
            half=matrix.half,
            bits=matrix.bits,
            in_features=matrix.in_features,
            out_features=matrix.out_features,
            num_modules=len(outs),
            module_out=(_Long * 3)(*outs),
        )

    def _vector(self, values: Tensor | None) -> int | None:
        """Return the address of a norm or bias in float32; None becomes a NULL pointer."""
        if values is None:
            return None
        vector = values.float().contiguous()
        self._kept.append(vector)
        return vector.data_ptr()


@dataclass(frozen=True)
class _Call:
    struct: _Batch
    kept_alive: tuple[ctypes.Array[_Group], np.ndarray, np.ndarray]
    """What the struct points to: ctypes stores addresses and holds no references."""


@dataclass(frozen=True)
class _Span:
    """All rows of a batch that use one adapter."""

    adapter: StackedLora | None
    rows: np.ndarray
    """int64, ascending."""


def _expanded_size(weights: ModelWeights, panel: int) -> int:
    """Return the floats per thread in which panels of a quantised matrix are expanded."""
    matrices = [*weights.layers[0].matrices.values(), weights.head]
    if not any(isinstance(matrix, PackedMatrix) and matrix.bits for matrix in matrices):
        return 0
    return max(_EXPANDED_FLOATS, panel * max(matrix.in_features for matrix in matrices))


def _place(row: Row) -> tuple[int, int, int]:
    """Return the address of a row's cache, the numbers between layers, and the capacity."""
    kv = row.pool.kv  # [L, R, H, 2, C, D]
    offset = row.index * kv.stride(1) * kv.itemsize
    return kv.data_ptr() + offset, kv.stride(0), row.pool.capacity


def _prefix_rows(batch: Batch[Row]) -> list[Row]:
    """Return each prefix of the chunks once."""
    rows = [chunk.prefix for chunk in batch.chunks if chunk.prefix is not None]
    return list({id(row): row for row in rows}.values())


def _same_beginnings(batch: Batch[Row], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each token an entry of `_places` with the same prefix, and the prefix's length.

    The entry is that of another token, or of a prefix. Lengths are rounded down to a multiple of 4,
    since the kernels read keys four at a time; 0 means that no such entry is known.
    """
    same_as, same_length = np.zeros((2, num_tokens), np.int64)
    if batch.decode_same:
        pairs = np.array(batch.decode_same, np.int64)
        same_as[: len(pairs)], same_length[: len(pairs)] = pairs[:, 0], pairs[:, 1] // 4 * 4
    prefixes = {id(row): num_tokens + number for number, row in enumerate(_prefix_rows(batch))}
    first = len(batch.decode_tokens)
    for chunk in batch.chunks:
        end = first + len(chunk.tokens)
        if chunk.prefix is not None:
            same_as[first:end], same_length[first:end] = prefixes[id(chunk.prefix)], chunk.start
        first = end
    return same_as, same_length


def _attention_spans(
    longest: int,
    positions: np.ndarray,
    addresses: np.ndarray,
    same_as: np.ndarray,
    same_length: np.ndarray,
) -> np.ndarray:
    """Cut the batch into spans of at most `longest` tokens that read mostly the same keys.

    The kernels load keys once per span. The tokens of a span are neighbors in one sequence, or they
    decode in sequences with the same prefix.

    Returns:
        The first token of each span, then the number of tokens, int64.
    """
    neighbours = (np.diff(addresses) == 0) & (np.diff(positions) == 1)
    siblings = (np.diff(same_as) == 0) & (same_length[1:] > 0) & (same_length[:-1] > 0)
    starts = np.flatnonzero(np.concatenate([[True], ~(neighbours | siblings)]))
    counts = np.diff(starts, append=len(positions))
    pieces = [np.arange(start, start + n, longest) for start, n in zip(starts, counts, strict=True)]
    return np.concatenate([*pieces, [len(positions)]])


def _group_spans(adapters: list[tuple[StackedLora | None, int]]) -> list[_Span]:
    """Return the rows of each adapter, given (adapter, number of consecutive rows)."""
    rows: dict[StackedLora | None, list[np.ndarray]] = {}
    first = 0
    for adapter, run in itertools.groupby(adapters, key=lambda item: item[0]):
        end = first + sum(count for _, count in run)
        rows.setdefault(adapter, []).append(np.arange(first, end, dtype=np.int64))
        first = end
    return [_Span(adapter, np.concatenate(parts)) for adapter, parts in rows.items()]
