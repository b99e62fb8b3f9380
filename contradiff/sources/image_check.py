"""Check a raw image before it is put into a shard: can it be read, and is it unusual?

This module does not import torch, so that worker processes start quickly.
"""

import io
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from PIL import Image

from contradiff.data.decoding import decode_rgb, opened, orientation_of

Verify = Literal["full", "header"]

EXTENSION_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's names of the formats that shards may contain => file extension in the shard."""
CONVERTED = {"BMP", "PPM", "TIFF"}
"""Formats that are stored as PNG, which keeps every pixel."""
FORMAT_OF_SUFFIX = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".pgm": "PPM",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
IRREGULAR_MODES = {
    "CMYK": ("cmyk",),
    "LA": ("greyscale", "alpha"),
    "P": ("palette",),
    "PA": ("palette", "alpha"),
    "RGBA": ("alpha",),
    **dict.fromkeys(("L", "1"), ("greyscale",)),
    **dict.fromkeys(("I", "I;16", "I;16B"), ("greyscale", "sixteen_bit")),
}
ENCODING: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "png": {"format": "PNG"},
}
"""File extension => Pillow's options to save a resized image (no chroma subsampling)."""


class CheckedImage(NamedTuple):
    """An image for a shard. `irregularities` are unusual properties, such as "greyscale"."""

    content: bytes
    extension: str
    irregularities: tuple[str, ...]


def check_image(content: bytes, *, path: str, verify: Verify, resize: int | None) -> CheckedImage:
    """Check an image. If its shorter side has more than `resize` pixels, scale it down to them.

    `verify="full"` decodes the image (a JPEG at one eighth of its size, which is fast but reads all
    data). `verify="header"` checks only the header and the end mark. An image that is scaled down
    is also turned upright and converted to RGB. A scaled JPEG is saved as JPEG, other formats as
    PNG. BMP, PPM and TIFF are always turned into PNG. Other images that are not scaled keep their
    bytes. The extension follows the content: a PNG named
    x.JPEG gets the extension png. Raises ValueError if the image is unreadable.
    """
    with opened(content, name=path) as image:
        kind = image.format or "unknown"
        if kind not in EXTENSION_OF and kind not in CONVERTED:
            raise ValueError(f"the format is {kind}; allowed are {', '.join(FORMAT_OF_SUFFIX)}")
        size, mode = image.size, image.mode
        has_transparency = "transparency" in image.info
        if verify == "full" or kind in CONVERTED:
            image.draft(None, (1, 1))  # pyright: ignore[reportArgumentType]  # keep the mode
            image.load()
        elif not _has_end(content, kind):
            raise ValueError("image file is truncated: it has no end mark")
        orientation = orientation_of(image)
    irregularities = [*IRREGULAR_MODES.get(mode, ())]
    if has_transparency and "alpha" not in irregularities:
        irregularities.append("alpha")
    if orientation != 1:
        irregularities.append("exif_rotated")
    if kind == "MPO":
        kind = "JPEG"
        irregularities.append("multi_picture")
    claimed = FORMAT_OF_SUFFIX.get(PurePosixPath(path).suffix.lower(), kind)
    if claimed != kind:
        irregularities.append(f"{kind.lower()}_named_{claimed.lower()}")
    if kind in CONVERTED:
        irregularities.append(f"{kind.lower()}_stored_as_png")
    extension = EXTENSION_OF.get(kind, "png")
    is_large = resize is not None and min(size) > resize
    if is_large or kind in CONVERTED:
        extension = "jpg" if kind == "JPEG" else "png"
        image = decode_rgb(content, name=path)
        if is_large:
            assert resize is not None
            scale = resize / min(image.size)
            width, height = (max(resize, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, **ENCODING[extension])
        content = buffer.getvalue()
    return CheckedImage(content, extension, tuple(irregularities))


def _has_end(content: bytes, kind: str) -> bool:
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in content[-4096:]
    if kind == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")  # RIFF header: size
    # A JPEG's image data begin after its header segments, which may contain thumbnails.
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xDA:
        is_fill_byte = content[place + 1] == 0xFF
        size = int.from_bytes(content[place + 2 : place + 4], "big")
        place += 1 if is_fill_byte else 2 + size
    # Image data never contain the bytes FF D9, so these bytes must be the end mark.
    return content.rfind(b"\xff\xd9", place) >= 0
