"""Decode images of all common formats to RGB, and turn them upright as their EXIF data say."""

import io
import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

_FAULTS = (
    *(OSError, ValueError, EOFError, LookupError, TypeError, OverflowError),
    *(SyntaxError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""Errors that Pillow raises for damaged files. It raises SyntaxError for a broken PNG."""

_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = {code: Image.Transpose[name] for code, name in enumerate(_TURNS.split(), start=2)}
"""EXIF orientation => the operation that turns the image upright. Orientation 1 is upright."""


@contextmanager
def opened(encoded: bytes, *, name: str) -> Generator[Image.Image]:
    """Open an encoded image. If Pillow fails in the block, raise a ValueError that names `name`."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            yield image
    except _FAULTS as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = ("unknown format" if encoded else "empty file") if is_unknown else str(error)
        raise ValueError(f"{name}: not a readable image ({reason})") from error


def decode_rgb(encoded: bytes, *, name: str) -> Image.Image:
    """Decode an image of any colour mode to RGB, and turn it upright as its EXIF data say.

    An alpha channel is dropped, as in torchvision's loader. That loader ignores the EXIF data; this
    function does not. Raises ValueError if the image cannot be decoded.
    """
    with opened(encoded, name=name) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an open image as `decode_rgb` does. Raises Pillow's errors if it is damaged."""
    rgb, turn = _to_rgb(image), _UPRIGHT.get(orientation_of(image))
    return rgb if turn is None else rgb.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Without a valid entry it is 1 (upright)."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _FAULTS:  # the EXIF data are damaged, but the image may be intact
        return 1
    return value if value in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no known range")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip the values at 255
        grey = (np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # avoids a Pillow warning
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
