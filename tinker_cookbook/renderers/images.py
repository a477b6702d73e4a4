"""Images in messages: pieces of content, and chunks with the number of positions they take.

The number comes from the model's own image processor (`get_number_of_image_patches`), from the
image's width and height alone: pixels are only decoded by the service.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from tinker_cookbook.exceptions import (
    ConfigurationError,
    DataFormatError,
    DataValidationError,
    RendererError,
)
from tinker_cookbook.renderers.format import Format
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.types import ImagePart, ImageProcessorProtocol, Message

if TYPE_CHECKING:
    from PIL import Image
    from tinker import types

__all__ = [
    "ImageProcessorProtocol",
    "ImageWriter",
    "has_images",
    "image_to_chunk",
    "strip_pieces",
    "text_and_images",
]

# Formats that are sent unchanged; everything else is sent as PNG, which is lossless.
_SENT_AS_IS = {"PNG": "png", "JPEG": "jpeg"}
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


def image_to_chunk(
    image: str | Image.Image | bytes, image_processor: ImageProcessorProtocol
) -> types.ImageChunk:
    """Return an image as the service accepts it.

    PNG and JPEG files are sent unchanged. Other formats, images in memory, and photos with an
    orientation tag become PNG, so that every reader sees the same width and height.

    Args:
        image: a path, `data:` URI, encoded bytes, or a Pillow image. URLs are not fetched.
        image_processor: the model's image processor; `image_processing_utils.get_image_processor`
            loads it.

    Returns:
        The chunk; `expected_tokens` is the number of positions it takes.

    Raises:
        RendererError: if the image cannot be read, or is too long and thin for the model.
    """
    from tinker import types

    data, width, height, kind = _read_image(image)
    try:
        patches = image_processor.get_number_of_image_patches(height, width, {})
    except ValueError as error:
        raise RendererError(
            f"image of {width} x {height} pixels is refused by the image processor ({error}); "
            "crop or resize it."
        ) from error
    tokens = int(patches) // image_processor.merge_size**2
    return types.ImageChunk(data=data, format=kind, expected_tokens=tokens)  # pyright: ignore[reportArgumentType]


def _read_image(image: str | Image.Image | bytes) -> tuple[bytes, int, int, str]:
    """Return the bytes to send, width and height in pixels, and their format."""
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return _as_png(image)
    data = _image_bytes(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(BytesIO(data))
            kind = _SENT_AS_IS.get(opened.format or "")
            if kind and opened.getexif().get(_ORIENTATION, 1) == 1:
                return data, *opened.size, kind
            return _as_png(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise RendererError(
            f"image of {len(data)} bytes cannot be read ({error}); give a valid PNG, JPEG, GIF, "
            "BMP or WebP file."
        ) from error


def _image_bytes(image: str | Image.Image | bytes) -> bytes:
    from tinker_cookbook.image_processing_utils import image_to_data_uri

    try:
        uri = image_to_data_uri(image)
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except (DataFormatError, DataValidationError, ConfigurationError) as error:
        raise RendererError(str(error)) from error
    except binascii.Error as error:
        raise RendererError(
            f"image={str(image)[:40]!r}... is not base64 ({error}); write "
            "data:image/png;base64,DATA."
        ) from error


def _as_png(image: Image.Image) -> tuple[bytes, int, int, str]:
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue(), *image.size, "png"


# ---- pieces of content ----


def has_images(message: Message) -> bool:
    """Whether a message has an image part."""
    content = message.get("content")
    return isinstance(content, list) and any(part.get("type") == "image" for part in content)


def text_and_images(message: Message, index: int) -> list[str | ImagePart]:
    """Return the content of a message with images; consecutive texts are joined."""
    pieces: list[str | ImagePart] = []
    content: Any = message["content"]
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "image"):
            raise RendererError(
                f"messages[{index}]: content part {kind!r} cannot be combined with images; use "
                "text and image parts."
            )
        if part["type"] == "image":
            pieces.append(part)  # pyright: ignore[reportArgumentType]
        elif part["type"] == "text" and pieces and isinstance(pieces[-1], str):
            pieces[-1] += part["text"]
        elif part["type"] == "text":
            pieces.append(part["text"])
    return pieces


def strip_pieces(pieces: list[str | ImagePart]) -> list[str | ImagePart]:
    """Return the pieces without white space at the very start and end."""
    result = list(pieces)
    if isinstance(result[0], str):
        result[0] = result[0].lstrip()
    if isinstance(result[-1], str):
        result[-1] = result[-1].rstrip()
    return result


class ImageWriter:
    """Writes images between a model's vision markers."""

    def __init__(
        self,
        image_processor: ImageProcessorProtocol,
        *,
        before: Sequence[int],
        after: Sequence[int],
        gap: str = "",
    ) -> None:
        """Keep the markers.

        Args:
            image_processor: the model's image processor.
            before: tokens before each image.
            after: tokens after each image.
            gap: text after those.
        """
        self._before = tuple(before)
        self._after = tuple(after)
        self._gap = gap
        self._image_processor = image_processor

    @classmethod
    def of_qwen(cls, renderer: Format, image_processor: ImageProcessorProtocol) -> ImageWriter:
        """Return the writer with Qwen's markers."""
        before, after = (renderer.control_token(f"<|vision_{end}|>") for end in ("start", "end"))
        return cls(image_processor, before=[before], after=[after])

    def lay_out(
        self, layout: Layout, pieces: list[str | ImagePart], index: int, kind: SegmentKind
    ) -> None:
        """Append texts and images in order."""
        for piece in pieces:
            if isinstance(piece, str):
                layout.text(piece, kind, index)
                continue
            image = piece.get("image") if isinstance(piece, Mapping) else None
            layout.ids(self._before, kind, index)
            layout.media(image_to_chunk(image, self._image_processor), index)  # pyright: ignore[reportArgumentType]
            layout.ids(self._after, kind, index)
            layout.text(self._gap, kind, index)
