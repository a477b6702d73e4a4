"""Image processors, loaded when first used, and small helpers for images (opened with Pillow)."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tinker_cookbook import model_info
from tinker_cookbook.exceptions import ConfigurationError, DataFormatError, DataValidationError

if TYPE_CHECKING:
    from PIL import Image
    from transformers.image_processing_utils import BaseImageProcessor

__all__ = [
    "DeferredImageProcessor",
    "KimiImageSizes",
    "deferred_image_processor",
    "get_image_processor",
    "get_image_processor_if_vision_model",
    "image_to_data_uri",
    "resize_image",
]

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


@dataclass(frozen=True)
class KimiImageSizes:
    """Computes how many patches Kimi K2.5 and K2.6 make of an image from its size.

    An image is shrunk, never enlarged, to at most `max_patches` patches and `max_patches_per_side`
    patches per side, then padded to whole positions of `merge_size` x `merge_size` patches.
    Source: `Kimi_K25ImageProcessor` of transformers 5.23, which the tests compare with.
    """

    patch_size: int = 14
    merge_size: int = 2
    max_patches: int = 16384
    max_patches_per_side: int = 512

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, object] | None = None
    ) -> int:
        """Return the number of patches of an image of this size in pixels, after resizing."""
        del images_kwargs
        whole = max(1, height // self.patch_size) * max(1, width // self.patch_size)
        longest = self.max_patches_per_side * self.patch_size
        scale = min(1.0, math.sqrt(self.max_patches / whole), longest / height, longest / width)
        step = self.patch_size * self.merge_size
        positions = 1
        for side in (height, width):
            shrunk = min(max(1, int(side * scale)), longest)
            positions *= math.ceil(shrunk / step)
        return positions * self.merge_size**2


if TYPE_CHECKING:
    ImageProcessor: TypeAlias = BaseImageProcessor | KimiImageSizes | None


@cache
def get_image_processor(model_name: str) -> ImageProcessor:
    """Return the image processor of a model folder or hub id.

    For Kimi K2.5 and K2.6, whose own processor needs torchvision, return `KimiImageSizes`.

    Raises:
        ConfigurationError: if it cannot be loaded (a text model, no network, or no Pillow).
    """
    sizes = _kimi_image_sizes(model_name)
    if sizes is not None:
        return sizes
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(model_name)
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(
            f"model_name={model_name!r} has no image processor that can be loaded ({reason}); use "
            "a vision model's folder or hub id. Reading images needs Pillow: pip install pillow."
        ) from error


def get_image_processor_if_vision_model(model_name: str) -> ImageProcessor:
    """Return the image processor of a vision model, None for other models."""
    return get_image_processor(model_name) if _is_vision_model(model_name) else None


def deferred_image_processor(model_name: str) -> DeferredImageProcessor | None:
    """Return an image processor that is loaded for the first image; None for other than vision
    models.

    Texts for a vision model then need neither Pillow nor the model's files.
    """
    return DeferredImageProcessor(model_name) if _is_vision_model(model_name) else None


def _is_vision_model(model_name: str) -> bool:
    if Path(model_name).is_dir():
        return (Path(model_name) / "preprocessor_config.json").is_file()
    try:
        return model_info.get_model_attributes(model_name).is_vl
    except (KeyError, ValueError):  # a model that is not in the table
        return False


class DeferredImageProcessor:
    """The part of a model's image processor that renderers need, loaded at the first use."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name

    @property
    def _processor(self) -> Any:
        return get_image_processor(self.model_name)

    @property
    def merge_size(self) -> int:
        """Number of patches per side that become one position."""
        return self._processor.merge_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self._processor.patch_size

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, object] | None = None
    ) -> int:
        """Return the number of patches of an image of this size in pixels, after resizing."""
        return self._processor.get_number_of_image_patches(height, width, images_kwargs or {})


def _kimi_image_sizes(model_name: str) -> KimiImageSizes | None:
    """Return the sizes of a Kimi model by its hub id or its folder's settings; None for other
    models."""
    file = Path(model_name) / "preprocessor_config.json"
    if not Path(model_name).is_dir():
        is_kimi = _is_vision_model(model_name) and model_name.startswith("moonshotai/Kimi-")
        return KimiImageSizes() if is_kimi else None
    try:
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    given = settings.get("media_proc_cfg")  # Moonshot's form; the other one is that of transformers
    if isinstance(given, dict):
        return KimiImageSizes(
            given.get("patch_size", 14),
            given.get("merge_kernel_size", 2),
            given.get("in_patch_limit", 16384),
            given.get("patch_limit_on_one_side", 512),
        )
    if settings.get("image_processor_type") != "Kimi_K25ImageProcessor":
        return None
    return KimiImageSizes(
        settings.get("patch_size", 14),
        settings.get("merge_size", 2),
        settings.get("max_patches", 16384),
        (settings.get("size") or {}).get("max_height", 512),
    )


def image_to_data_uri(image: Any) -> str:
    """Return a `data:` URI of a local image.

    Args:
        image: a path, encoded bytes, a Pillow image, or a `data:` URI, which is returned unchanged.

    Raises:
        DataValidationError: a URL (nothing is fetched here) or another type of value.
        DataFormatError: bytes in no known image format, or a file that cannot be read.
    """
    if isinstance(image, str) and image.startswith("data:"):
        return image
    if isinstance(image, str) and "://" in image:
        raise DataValidationError(
            f"image={image!r} is a URL; only local images are read. Download it first."
        )
    if isinstance(image, str | Path):
        try:
            image = Path(image).expanduser().read_bytes()
        except OSError as error:
            raise DataFormatError(
                f"{image}: the image cannot be read: {error.strerror}."
            ) from error
    if isinstance(image, bytes | bytearray):
        data = bytes(image)
        mime = _mime_type(data)
    elif hasattr(image, "save") and hasattr(image, "mode"):
        data, mime = _png_bytes(image), "image/png"
    else:
        raise DataValidationError(
            f"image is of type {type(image).__name__}; use a path, bytes, a Pillow image or a "
            "data URI."
        )
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _mime_type(data: bytes) -> str:
    for magic, mime in _MAGIC.items():
        if data.startswith(magic):
            return mime
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise DataFormatError(
        f"image of {len(data)} bytes has an unknown format; use PNG, JPEG, GIF, BMP or WebP."
    )


def _png_bytes(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def resize_image(image: Image.Image, max_size: int) -> Image.Image:
    """Shrink an image so that its longer side has at most `max_size` pixels.

    The aspect ratio is kept, sides are at least 1 pixel, and an image that fits is returned
    unchanged.
    """
    if max_size < 1:
        raise ConfigurationError(f"max_size={max_size} is too small; use 1 or more.")
    longer = max(image.size)
    if longer <= max_size:
        return image
    from PIL import Image as PillowImage

    width, height = (max(1, round(side * max_size / longer)) for side in image.size)
    return image.resize((width, height), PillowImage.Resampling.LANCZOS)
