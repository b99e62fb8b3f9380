"""One raw image as it is taken into a shard: its own bytes, what is odd about it, or why it is not.

Pillow alone is used here, so that many processes start quickly.
"""

import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from PIL import Image

from contradiff.data.decoding import decode_rgb, opened, orientation_of

Verify = Literal["full", "header"]

EXTENSION_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that shards may hold, by Pillow's names, and how they are called there."""
FORMAT_OF_SUFFIX = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
ODD_MODES = {
    "CMYK": ("cmyk",),
    "L": ("greyscale",),
    "1": ("greyscale",),
    "I": ("greyscale", "sixteen_bit"),
    "I;16": ("greyscale", "sixteen_bit"),
    "I;16B": ("greyscale", "sixteen_bit"),
    "LA": ("greyscale", "alpha"),
    "P": ("palette",),
    "PA": ("palette", "alpha"),
    "RGBA": ("alpha",),
}
JPEG_QUALITY = 95
"""Of resized images, without chroma subsampling."""


@dataclass(frozen=True)
class StoredImage:
    """What goes into a shard: encoded bytes, their true extension, oddities in a fixed order."""

    content: bytes
    extension: str
    oddities: tuple[str, ...]


def take_in(content: bytes, *, path: str, verify: Verify, resize: int | None) -> StoredImage:
    """Check an image, and keep its bytes unless it is to be made smaller.

    The extension follows the content: a PNG named x.JPEG is stored as a PNG. Oddities are `cmyk`,
    `greyscale`, `sixteen_bit`, `palette`, `alpha`, `exif_rotated`, `multi_picture` and
    `A_named_B`.

    Args:
        content: the file's bytes.
        path: the file's name, for its suffix and for messages.
        verify: full: every scan line is decoded (JPEG at an eighth of the size, which reads all
            the data and skips most of the arithmetic). header: the header, and that a JPEG or PNG
            is there to its end; damage in the middle shows when it is decoded.
        resize: the shorter side of larger images after resizing (Pillow's bicubic), in pixels; they
            are made upright RGB and encoded anew, JPEG as JPEG and all else as PNG. None, and
            images that are small already: bytes are kept.

    Raises:
        ValueError: the image cannot be read; names the file and says why.
    """
    with opened(content, name=path) as image:
        kind = image.format or "unknown"
        if kind not in EXTENSION_OF:
            raise ValueError(f"{kind} files are not taken, only {', '.join(FORMAT_OF_SUFFIX)}")
        size, mode = image.size, image.mode
        has_transparency = "transparency" in image.info
        if verify == "full":
            image.draft(None, (1, 1))  # pyright: ignore[reportArgumentType]  # keep the mode
            image.load()
        else:
            _check_end(content, kind)
        orientation = orientation_of(image)
    oddities = [*ODD_MODES.get(mode, ())]
    if has_transparency and "alpha" not in oddities:
        oddities.append("alpha")
    if orientation != 1:
        oddities.append("exif_rotated")
    if kind == "MPO":
        kind = "JPEG"
        oddities.append("multi_picture")
    claimed = FORMAT_OF_SUFFIX.get(PurePosixPath(path).suffix.lower(), kind)
    if claimed != kind:
        oddities.append(f"{kind.lower()}_named_{claimed.lower()}")
    if resize is None or min(size) <= resize:
        return StoredImage(content, EXTENSION_OF[kind], tuple(oddities))
    smaller, extension = _resized(decode_rgb(content, name=path), kind=kind, shorter_side=resize)
    return StoredImage(smaller, extension, tuple(oddities))


def _resized(image: Image.Image, *, kind: str, shorter_side: int) -> tuple[bytes, str]:
    scale = shorter_side / min(image.size)
    width, height = (max(shorter_side, round(side * scale)) for side in image.size)
    smaller = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if kind == "JPEG":
        smaller.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue(), "jpg"
    smaller.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _check_end(content: bytes, kind: str) -> None:
    """Refuse files that stop before their end mark.

    Raises:
        ValueError: it is missing.
    """
    if kind in {"JPEG", "MPO"}:
        # In the data after the header 0xFF is escaped, so that this can be nothing else.
        is_whole = content.rfind(b"\xff\xd9", _start_of_scan(content)) >= 0
    elif kind == "PNG":
        is_whole = b"IEND\xaeB`\x82" in content[-4096:]
    else:  # RIFF: the size that the header tells
        is_whole = len(content) >= 8 + int.from_bytes(content[4:8], "little")
    if not is_whole:
        raise ValueError("image file is truncated: no end mark")


def _start_of_scan(content: bytes) -> int:
    """Where a JPEG's data begin: its segments, thumbnails in them, are stepped over."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xDA:
        if content[place + 1] == 0xFF:  # a fill byte
            place += 1
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return place
