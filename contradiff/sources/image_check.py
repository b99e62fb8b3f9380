"""One raw image before it goes into a shard: is it readable, and is anything irregular about it?

Only Pillow is used here, so that many processes start quickly.
"""

import io
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from PIL import Image

from contradiff.data.decoding import decode_rgb, opened, orientation_of

Verify = Literal["full", "header"]

EXTENSION_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that shards may hold, by Pillow's names, and their extensions there."""
FORMAT_OF_SUFFIX = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
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
"""Of resized images, by extension: without chroma subsampling."""


class CheckedImage(NamedTuple):
    """An image for a shard: encoded bytes, true extension, irregularities in a fixed order."""

    content: bytes
    extension: str
    irregularities: tuple[str, ...]


def check_image(content: bytes, *, path: str, verify: Verify, resize: int | None) -> CheckedImage:
    """Check an image; keep its bytes unless it has to be made smaller.

    The extension follows the content: a PNG named x.JPEG is stored as a PNG.

    With `verify="full"`, every scan line is decoded (a JPEG at one eighth of its size, which still
    reads all the data but is cheap). With `verify="header"`, the header is read and the end marker
    looked for. Images larger than `resize` are scaled (bicubic) until the shorter side has `resize`
    pixels, turned upright, converted to RGB and encoded again: JPEG as JPEG, all else as PNG.
    Raises a ValueError that names the file if the image is unreadable.
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
        elif not _has_end(content, kind):
            raise ValueError("image file is truncated: no end mark")
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
    extension = EXTENSION_OF[kind]
    if resize is not None and min(size) > resize:
        extension = "jpg" if kind == "JPEG" else "png"
        image = decode_rgb(content, name=path)
        scale = resize / min(image.size)
        width, height = (max(resize, round(side * scale)) for side in image.size)
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, **ENCODING[extension])
        content = buffer.getvalue()
    return CheckedImage(content, extension, tuple(irregularities))


def _has_end(content: bytes, kind: str) -> bool:
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in content[-4096:]
    if kind == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")  # RIFF: its header says
    # A JPEG's data begin behind its segments and the thumbnails in them.
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xDA:
        is_fill_byte = content[place + 1] == 0xFF
        size = int.from_bytes(content[place + 2 : place + 4], "big")
        place += 1 if is_fill_byte else 2 + size
    # The data escape 0xFF, so these bytes can be nothing but the end mark.
    return content.rfind(b"\xff\xd9", place) >= 0
