"""Images of a request: a client's bytes become pixels, checked before any large allocation.

It needs Pillow (extra `vision`), which is imported when the first image arrives.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from tinker_cookbook.local.engine.types import ImageInput
from tinker_cookbook.local.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_IMAGE_BYTES", "MAX_IMAGE_PIXELS", "decode_image"]

MAX_IMAGE_BYTES = 32 * 2**20
"""Maximum size of an encoded image."""
MAX_IMAGE_PIXELS = 2**25
"""Maximum size of a decoded image (100 MB as RGB); a small file can claim any number."""
FORMATS = ("png", "jpeg")


def decode_image(image: ImageInput, where: str) -> Image:
    """Return an encoded image as an RGB picture.

    Raises:
        UserError: if it is not in the format that it names, damaged, or beyond the limits. The
            number of pixels is read from the header, before they are decompressed.
    """
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise UserError(
            f"{where}: images need Pillow on the service; install tinker-cookbook[vision] there"
        ) from error
    if image.format not in FORMATS:
        raise UserError(f"{where}: format={image.format[:40]!r}; use one of {', '.join(FORMATS)}")
    if not 0 < len(image.data) <= MAX_IMAGE_BYTES:
        raise UserError(
            f"{where}: the image has {len(image.data)} bytes; 1 to {MAX_IMAGE_BYTES} are accepted"
        )
    try:
        with pillow.open(io.BytesIO(image.data), formats=(image.format.upper(),)) as opened:
            _check_size(opened.size, where)
            return opened.convert("RGB")
    except UserError:
        raise
    # Pillow's decoders fail in many ways for a damaged file.
    except Exception as error:
        raise UserError(
            f"{where}: the image cannot be read as {image.format}: {error}"[:300]
        ) from error


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise UserError(
            f"{where}: the image has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are "
            "accepted. Scale it down"
        )
