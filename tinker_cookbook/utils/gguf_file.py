"""Read a GGUF file: its metadata and its tensors, dequantised to float32.

Only the tensor types of the default model are supported: F32, F16, Q4_1 and Q8_0.

Source: the GGUF specification, version 3 (github.com/ggml-org/ggml, docs/gguf.md), and the block
layouts of ggml-common.h.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinker_cookbook.exceptions import WeightsError

__all__ = ["GgufFile", "GgufTensor", "Metadata"]

Metadata = dict[str, Any]
"""Values of the file by key: numbers, texts, truth values and lists of them."""

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Position and shape of a tensor in the file."""

    name: str
    shape: tuple[int, ...]
    """Row-major: the last axis is contiguous."""
    kind: int
    offset: int
    """Bytes from the start of the file."""


class GgufFile:
    """An open GGUF file; close it or use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise WeightsError(f"{path} is not a readable GGUF file: {error}") from error

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bytes.close()
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32.

        Raises:
            WeightsError: if its type is not supported.
        """
        tensor = self.tensors[name]
        if tensor.kind not in _DECODERS:
            raise WeightsError(f"tensor {name} has GGUF type {tensor.kind}, which is not supported")
        decode, block_values, block_bytes = _DECODERS[tensor.kind]
        num_blocks = int(np.prod(tensor.shape)) // block_values
        # Slicing copies, so that no view of the memory map outlives it.
        raw = self._bytes[tensor.offset : tensor.offset + num_blocks * block_bytes]
        blocks = np.frombuffer(raw, np.uint8).reshape(num_blocks, block_bytes)
        return decode(blocks).reshape(tensor.shape)

    def _read_header(self) -> tuple[Metadata, dict[str, GgufTensor]]:
        magic, version, num_tensors, num_fields = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise KeyError(f"magic {magic!r}, version {version}")
        metadata: Metadata = {}
        for _ in range(num_fields):
            key = self._string()
            metadata[key] = self._value(self._unpack("I")[0])
        found = []
        for _ in range(num_tensors):
            name = self._string()
            (num_axes,) = self._unpack("I")
            axes = self._unpack(f"{num_axes}Q")
            kind, offset = self._unpack("IQ")
            found.append((name, tuple(reversed(axes)), kind, offset))
        alignment = metadata.get("general.alignment", 32)
        start = (self._position + alignment - 1) // alignment * alignment
        tensors = {
            name: GgufTensor(name, shape, kind, start + offset)
            for name, shape, kind, offset in found
        }
        return metadata, tensors

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._bytes, self._position)
        self._position += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._position
        self._position += length
        return self._bytes[start : self._position].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        item_kind, length = self._unpack("IQ")
        if item_kind in _SCALARS:
            return list(self._unpack(f"{length}{_SCALARS[item_kind]}"))
        return [self._value(item_kind) for _ in range(length)]


def _half(block_bytes: np.ndarray) -> np.ndarray:
    """Return two bytes of each block as one float32 column."""
    return np.ascontiguousarray(block_bytes).view(np.float16).astype(np.float32)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    """Decode blocks of 32 values: scale and minimum (half), then 16 bytes, low nibbles first."""
    scale, minimum, packed = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:]
    levels = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return levels * scale + minimum


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    """Decode blocks of 32 values: scale (half), then 32 signed bytes."""
    levels = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    return levels * _half(blocks[:, :2])


def _decode_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float32)


_Decoder = Callable[[np.ndarray], np.ndarray]
_DECODERS: dict[int, tuple[_Decoder, int, int]] = {
    0: (_decode_f32, 1, 4),
    1: (_half, 1, 2),
    3: (_decode_q4_1, 32, 20),
    8: (_decode_q8_0, 32, 34),
}
"""Decoder, values per block and bytes per block of each GGUF type."""
