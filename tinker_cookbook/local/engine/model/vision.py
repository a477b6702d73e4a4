"""The vision side of a model that runs through transformers.

An image takes one image token per feature in the token sequence. `VisionInputs` counts them and
builds the arguments of the model's forward pass. The vision tower is frozen and has no adapter.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinker_cookbook.exceptions import WeightsError
from tinker_cookbook.local.engine.model.images import decode_image
from tinker_cookbook.local.engine.types import ImageInput
from tinker_cookbook.local.errors import UserError

__all__ = ["VISION_PATH_WORDS", "VisionInputs", "has_vision"]

VISION_PATH_WORDS = ("visual", "vision", "projector", "connector", "merger", "image_newline")
"""Modules whose path contains one of these words belong to the vision side."""
_CACHE_BYTES = 256 * 2**20


def has_vision(config: dict[str, Any]) -> bool:
    """Return whether a config.json describes a model that reads images and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return "vision_config" in config and (
        config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )


class VisionInputs:
    """Turns images into model inputs. Not thread-safe."""

    def __init__(self, model: Any, folder: Path) -> None:
        """
        Raises:
            WeightsError: if the folder has no image processor that transformers can load.
        """
        from transformers import AutoImageProcessor

        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (ValueError, OSError, ImportError) as error:
            raise WeightsError(f"{folder} has no usable image processor: {error}") from error
        self._model = model
        config = model.config
        token = getattr(config, "image_token_id", None)
        self.image_token_id = int(config.image_token_index if token is None else token)
        self._prepared: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._rope_index: Any = getattr(model.model, "get_rope_index", None)

    @property
    def has_grid_positions(self) -> bool:
        """Whether a position is three numbers that follow the image's grid (M-RoPE)."""
        return self._rope_index is not None

    def num_tokens(self, image: ImageInput, where: str) -> int:
        """Return the number of positions that an image takes.

        Raises:
            UserError: if it cannot be decoded, or `expected_tokens` differs.
        """
        prepared = self._prepare(image, where)
        count = self._count(prepared)
        if image.expected_tokens not in (None, count):
            raise UserError(
                f"{where}: expected_tokens={image.expected_tokens}, but this model makes {count} "
                "tokens of the image; set it to that, or scale the image as the model does"
            )
        return count

    def model_inputs(
        self, tokens: torch.Tensor, images: Sequence[ImageInput]
    ) -> tuple[dict[str, Any], int]:
        """Return the keyword arguments for a forward pass over a sequence from its start.

        Args:
            tokens: int64 [n].

        Returns:
            The arguments, and the difference between the position and the index of the token after
            the sequence.
        """
        device = tokens.device
        ids = tokens.clone()
        types = torch.zeros_like(ids)
        merged: dict[str, list[torch.Tensor]] = {}
        for image in images:
            prepared = self._prepare(image, "image")
            end = image.position + self._count(prepared)
            ids[image.position : end] = self.image_token_id
            types[image.position : end] = 1
            for name, value in prepared.items():
                merged.setdefault(name, []).append(value.to(device))
        axis = 1 if "pixel_values" in merged and merged["pixel_values"][0].ndim == 5 else 0
        inputs: dict[str, Any] = {"input_ids": ids[None]}
        inputs |= {name: torch.cat(parts, dim=axis) for name, parts in merged.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        delta = 0
        if self._rope_index is not None and images:
            grid = inputs.get("image_grid_thw")
            if "mm_token_type_ids" in inspect.signature(self._rope_index).parameters:
                inputs["mm_token_type_ids"] = types[None].int()  # older releases use the ids
            positions, deltas = self._rope_index(
                input_ids=ids[None],
                image_grid_thw=grid,
                attention_mask=torch.ones_like(ids)[None],
                **{name: inputs[name] for name in ("mm_token_type_ids",) if name in inputs},
            )
            inputs["position_ids"], delta = positions, int(deltas.reshape(-1)[0])
        elif self._rope_index is not None:
            inputs["position_ids"] = self.text_positions(0, len(ids), device)
        return inputs, delta

    def text_positions(self, first: int, count: int, device: torch.device) -> torch.Tensor:
        """Return text positions, int64 [3, 1, n]: their three numbers are equal."""
        positions = torch.arange(first, first + count, device=device)
        return positions.view(1, 1, -1).expand(3, 1, -1)

    def _prepare(self, image: ImageInput, where: str) -> dict[str, torch.Tensor]:
        key = image.format + hashlib.sha256(image.data).hexdigest()
        found = self._prepared.get(key)
        if found is None:
            picture = decode_image(image, where)
            options: dict[str, Any] = {"return_tensors": "pt"}
            if hasattr(self._processor, "do_image_splitting"):
                options["do_image_splitting"] = False  # tiles would need text in between
            try:
                values = self._processor(images=[picture], **options)
            except ValueError as error:  # for example an aspect ratio that the model refuses
                raise UserError(
                    f"{where}: the model's image processor refuses it: {error}"
                ) from error
            found = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
            self._prepared[key] = found
        self._prepared.move_to_end(key)
        while len(self._prepared) > 1 and self._cached_bytes() > _CACHE_BYTES:
            self._prepared.popitem(last=False)
        return found

    def _cached_bytes(self) -> int:
        tensors = [t for values in self._prepared.values() for t in values.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _count(self, prepared: dict[str, torch.Tensor]) -> int:
        grid = prepared.get("image_grid_thw")
        if grid is not None:
            merge = int(self._processor.merge_size)
            return int(grid.prod()) // merge**2
        inputs = {name: value.to(self._model.device) for name, value in prepared.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with torch.no_grad():
            features = self._model.model.get_image_features(**inputs)
        pooled = getattr(features, "pooler_output", features)
        parts = pooled if isinstance(pooled, list | tuple) else [pooled]
        return sum(int(part.reshape(-1, part.shape[-1]).shape[0]) for part in parts)
