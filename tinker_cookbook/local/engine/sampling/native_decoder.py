"""The batch decoder on the compiled kernels: a whole forward pass is one call.

It computes the same function as `torch_decoder.TorchDecoder` on a CPU, and a token gets the same
bits whatever else is in its batch. It reads the packed matrices that training uses. With matrices
of bfloat16 pairs it also rounds their input rows, keys and values to bfloat16, as training does;
then both compute the same bits. Hidden states are float32.

Axes: N tokens of the batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, replace

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
from tinker_cookbook.local.engine.sampling.native_adapters import adapter_packer, lora_table
from tinker_cookbook.local.engine.sampling.native_structs import (
    STRUCTS,
    BatchArguments,
    Group,
    Layer,
    Linear,
    Long,
    Model,
    Pointer,
)

__all__ = ["NativeDecoder", "native_decoder"]

_LANES = 16
"""Upper bound of the kernels' vector width in floats."""

_EXPANDED_FLOATS = 2**16
"""A quarter of a MiB: part of a second-level cache."""


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
        self.cache_shape = replace(cache_shape(arch, weights), reads_unwritten=False)
        kernels.struct_size.restype = Long
        for number, struct in enumerate(STRUCTS):
            size = kernels.struct_size(Long(number))
            assert size == ctypes.sizeof(struct), f"{struct.__name__} differs from the C struct"
        kernels.span_tokens.restype = kernels.span_heads.restype = Long
        self._span, self._span_heads = int(kernels.span_tokens()), int(kernels.span_heads())
        panel = Products(kernels).panel
        self.packer = adapter_packer(kernels, paired=weights.paired)
        self._forward_blocks = (
            kernels.forward_blocks_pairs if weights.paired else kernels.forward_blocks
        )
        self._forward_head = kernels.forward_head_pairs if weights.paired else kernels.forward_head
        self._forward_to_logits = (
            kernels.forward_to_logits_pairs if weights.paired else kernels.forward_to_logits
        )
        self._rope = RopeTable(arch.rope, arch.head_dim, "cpu")
        self._expanded_size = _expanded_size(weights, panel)
        self._scratch: dict[str, Tensor] = {}
        self._decoding: _Decoding | None = None
        self._model: Model | None = None
        self._layers: ctypes.Array[Layer] | None = None
        self._kept: list[Tensor | PackedMatrix] = []
        """Keeps alive what the structs of the model point to."""

    @torch.inference_mode()
    def forward(self, batch: Batch[Row]) -> Tensor:
        """Return the hidden states [N, H] before the final norm, and write keys and values."""
        positions = batch.positions()
        call = self._call_on(batch, positions, int(positions.max()))
        x = self._embed(batch.tokens())
        call.struct.x = x.data_ptr()
        self._forward_blocks(ctypes.byref(self._current_model()), ctypes.byref(call.struct))
        return x

    @torch.inference_mode()
    def next_logits(self, batch: Batch[Row]) -> Tensor:
        """Return float32 logits [N, V] of a batch without chunks; valid until the next pass.

        While the same sequences decode, steps differ only in tokens and positions, so the rest of
        the call is kept: preparing it takes a tenth of a step.
        """
        decoding = self._current_decoding(batch)
        decoding.positions[:] = batch.decode_positions
        x = self._embed(np.array(batch.decode_tokens, np.int64))
        decoding.call.struct.x = x.data_ptr()
        decoding.call.struct.max_position = max(batch.decode_positions)
        self._forward_to_logits(
            ctypes.byref(self._current_model()),
            ctypes.byref(decoding.call.struct),
            Pointer(decoding.logits.data_ptr()),
        )
        return decoding.logits

    def _current_decoding(self, batch: Batch[Row]) -> _Decoding:
        """Return the call for a batch without chunks: the one of the step before if it fits."""
        adapters = [None if adapter is None else adapter.key for adapter in batch.decode_adapters]
        places = _decode_places(batch.decode_rows)
        key = (torch.get_num_threads(), adapters, places, list(batch.decode_same))
        last = self._decoding
        if last is not None and last.key == key and last.scratch == self._scratch_addresses():
            return last
        positions = batch.positions()
        longest = max(int(positions.max()), *(capacity - 1 for _, _, capacity in places))
        call = self._call_on(batch, positions, longest)
        logits = torch.empty(len(positions), self.arch.vocab_size)
        scratch = self._scratch_addresses()
        self._decoding = _Decoding(key, scratch, call, positions, logits)
        return self._decoding

    def _embed(self, tokens: np.ndarray) -> Tensor:
        return self.weights.embed_tokens(torch.from_numpy(tokens)).float()

    def _call_on(self, batch: Batch[Row], positions: np.ndarray, longest: int) -> _Call:
        """Return a call on all blocks for a batch, without its embeddings.

        Args:
            longest: a position that no token of this or a later pass exceeds.
        """
        call = self._call(len(positions), _group_spans(batch.adapters()), longest)
        places = self._places(batch)
        cos, sin = self._rope.up_to(longest + 1)
        same_as, same_length = _same_beginnings(batch, len(positions))
        addresses = places[0][: len(positions)]
        spans = _attention_spans(self._span, positions, addresses, same_as, same_length)
        struct = call.struct
        struct.positions = positions.ctypes.data
        struct.kv, struct.kv_stride, struct.capacity = (part.ctypes.data for part in places)
        struct.same_as, struct.same_length = same_as.ctypes.data, same_length.ctypes.data
        struct.num_spans, struct.spans = len(spans) - 1, spans.ctypes.data
        struct.cos, struct.sin = cos.data_ptr(), sin.data_ptr()
        call.kept_alive.extend([positions, *places, same_as, same_length, spans, cos, sin])
        return call

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 logits [N, V] for hidden states [N, H] of `forward`."""
        hidden = hidden.contiguous()
        call = self._call(len(hidden), _group_spans(adapters), 0)
        call.struct.x = hidden.data_ptr()
        out = torch.empty(len(hidden), self.arch.vocab_size)
        self._forward_head(
            ctypes.byref(self._current_model()),
            ctypes.byref(call.struct),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out

    def _call(self, num_tokens: int, spans: list[_Span], max_position: int) -> _Call:
        """Return the struct of a call on N tokens, with scratch buffers, without x and positions.

        The kernels compute every token where it is in x; `order` lists the tokens by adapter, so
        that the tokens of an adapter go through its matrices together.
        """
        arch = self.arch
        num_threads = torch.get_num_threads()
        rank = max((span.adapter.adapter.rank for span in spans if span.adapter), default=1)
        groups = (Group * len(spans))()
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
        struct = BatchArguments(
            num_tokens=num_tokens,
            num_groups=len(spans),
            num_threads=num_threads,
            max_position=max_position,
            order=order.ctypes.data,
            group_of=group_of.ctypes.data,
            groups=groups,
            normed=self._buffer("normed", num_tokens * arch.hidden_size),
            wide=self._buffer("wide", num_tokens * widest),
            act=self._buffer("act", num_tokens * inner),
            low=self._buffer("low", num_tokens * 3 * rank),
            low_rounded=self._buffer("low_rounded", num_tokens * (3 * rank + 2)),
            expanded=self._buffer("expanded", num_threads * self._expanded_size),
            expanded_size=self._expanded_size,
            scores=self._buffer("scores", scores),
        )
        return _Call(struct, [groups, order, group_of])

    def _buffer(self, name: str, size: int) -> int:
        """Return the address of a scratch buffer of `size` floats or more; later calls reuse it."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._scratch[name] = torch.empty(size)
        return buffer.data_ptr()

    def _scratch_addresses(self) -> list[int]:
        return [buffer.data_ptr() for buffer in self._scratch.values()]

    def _places(self, batch: Batch[Row]) -> list[np.ndarray]:
        """Return where keys and values are, as three int64 arrays.

        The arrays are the address of a sequence's cache in layer 0, the count of numbers from one
        layer to the next, and the capacity in tokens. They have one entry per token and then one
        per prefix of `_prefix_rows`.
        """
        places = _decode_places(batch.decode_rows)
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

    def _current_model(self) -> Model:
        """Return the structs of the packed weights, which the first call creates."""
        if self._model is None:
            structs = [self._layer_struct(layer) for layer in self.weights.layers]
            self._layers = (Layer * len(structs))(*structs)
            self._model = self._model_struct(self.weights)
        return self._model

    def _model_struct(self, weights: ModelWeights) -> Model:
        arch = self.arch
        return Model(
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

    def _layer_struct(self, layer: LayerWeights) -> Layer:
        shapes = module_shapes(self.arch)
        linears = {
            name: self._linear(
                layer.matrices[name],
                [shapes[module][0] for module in modules],
                layer.qkv_bias if name == "qkv" else None,
            )
            for name, modules in FUSED.items()
        }
        return Layer(
            **linears,
            input_norm=self._vector(layer.input_norm),
            post_norm=self._vector(layer.post_norm),
            q_norm=self._vector(layer.q_norm),
            k_norm=self._vector(layer.k_norm),
        )

    def _linear(self, matrix: Matrix, outs: list[int], bias: Tensor | None) -> Linear:
        """Return the struct of a stacked matrix."""
        assert isinstance(matrix, PackedMatrix), "the decoder reads packed matrices"
        self._kept.append(matrix)
        return Linear(
            weight=matrix.panels.data_ptr(),
            bias=self._vector(bias),
            half=matrix.half,
            bits=matrix.bits,
            in_features=matrix.in_features,
            out_features=matrix.out_features,
            num_modules=len(outs),
            module_out=(Long * 3)(*outs),
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
    struct: BatchArguments
    kept_alive: list[ctypes.Array[Group] | np.ndarray | Tensor]
    """What the struct points to: ctypes stores addresses and holds no references."""


_Key = tuple[int, list[int | None], list[tuple[int, int, int]], list[tuple[int, int]]]
"""Threads; keys of the adapters; places of keys and values; equal beginnings."""


@dataclass(frozen=True)
class _Decoding:
    """The call of steps in which the same sequences decode, each with one token.

    It keeps neither adapters nor the cache in memory, only their addresses.
    """

    key: _Key
    """What the call was made for."""
    scratch: list[int]
    """Addresses of the scratch buffers that it uses; larger passes replace them."""
    call: _Call
    positions: np.ndarray
    """int64 [N], which the call reads."""
    logits: Tensor


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


def _decode_places(rows: list[Row]) -> list[tuple[int, int, int]]:
    """Return `_place` of rows of which many belong to the same pool."""
    places: list[tuple[int, int, int]] = []
    pool, start, row_bytes, layer = None, 0, 0, 0
    for row in rows:
        if row.pool is not pool:
            pool, kv = row.pool, row.pool.kv
            start, row_bytes, layer = kv.data_ptr(), kv.stride(1) * kv.itemsize, kv.stride(0)
        places.append((start + row.index * row_bytes, layer, row.pool.capacity))
    return places


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
