"""Where the tensors of a model come from: a folder of safetensors files, or shapes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from tinker_cookbook.exceptions import WeightsError

__all__ = ["ShapesOnly", "TensorFiles", "TensorSource"]


class TensorSource(Protocol):
    """Provides the tensors of a model by their names in its files."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor, which must have this shape."""
        ...


class TensorFiles:
    """The tensors in a folder of safetensors files."""

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


class ShapesOnly:
    """Tensors on the device `meta`, which have a shape and a format but hold no numbers."""

    def __init__(self, stored_dtype: torch.dtype) -> None:
        self._dtype = stored_dtype

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device="meta")
