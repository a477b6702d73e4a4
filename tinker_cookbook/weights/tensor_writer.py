"""Write a safetensors file tensor by tensor, so that only one tensor is in memory at a time.

The file begins with the length of its header (8 bytes), then the header (JSON: type, shape and
position of every tensor), then the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["TensorShape", "write_tensor_file"]

_ALIGNMENT = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
ITEM_BYTES |= {"U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorShape:
    """Type and shape of a tensor."""

    kind: str
    """Name of the number format in safetensors files, such as BF16."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return ITEM_BYTES[self.kind] * math.prod(self.shape)


def write_tensor_file(
    path: Path, shapes: Mapping[str, TensorShape], tensors: Iterable[torch.Tensor]
) -> int:
    """Write a file and return the number of bytes of its tensors.

    Args:
        path: The file to create.
        shapes: Every tensor by name, in the order of `tensors`.
        tensors: The tensors, made one by one.
    """
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + shape.num_bytes
        header[name] = {
            "dtype": shape.kind,
            "shape": list(shape.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, shape in zip(tensors, shapes.values(), strict=True):
            numbers = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            assert numbers.nbytes == shape.num_bytes, "a tensor differs from its announced shape"
            file.write(numbers.data)
    return position
