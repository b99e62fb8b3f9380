"""Encode images, and grids of images, as PNG."""

import io
import math
import time
from collections import deque
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from contradiff.files import replace_file
from contradiff.types import ByteImages


def encode_png(image: UInt8[Tensor, "3 height width"]) -> bytes:
    """Encode one image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def image_grid(images: ByteImages, *, columns: int, min_side: int = 64) -> bytes:
    """Return one PNG with square images in rows. The rest of the last row is white.

    Images smaller than `min_side` pixels are enlarged by an integer factor, without smoothing.
    """
    factor = -(-min_side // images.shape[-1])
    enlarged = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    rows = _rows(enlarged, columns)
    return encode_png(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))


def paired_grid(above: ByteImages, below: ByteImages, *, columns: int) -> bytes:
    """Return a PNG (`image_grid`) in which rows of `above` and rows of `below` alternate."""
    pairs = torch.stack([_rows(above, columns), _rows(below, columns)], dim=1)
    return image_grid(pairs.flatten(0, 2), columns=columns)


def _rows(images: ByteImages, columns: int) -> UInt8[Tensor, "rows columns 3 height width"]:
    blank = images.new_full((-len(images) % columns, *images.shape[1:]), 255)
    return torch.cat([images, blank]).unflatten(0, (-1, columns))


class LiveGrid:
    """A PNG of the newest images. `add` writes the file at most once in `seconds` seconds."""

    def __init__(
        self, path: Path, *, columns: int = 16, max_images: int = 96, seconds: float = 10.0
    ) -> None:
        self.path, self.columns, self.seconds = path, columns, seconds
        self.images: deque[Tensor] = deque(maxlen=max_images)
        self.written_at = -math.inf

    def add(self, images: ByteImages) -> ByteImages:
        """Add images, write the PNG if enough time has passed, and return the images."""
        self.images.extend(images)
        now = time.monotonic()
        if now - self.written_at >= self.seconds:
            self.written_at = now
            with replace_file(self.path) as path:
                path.write_bytes(image_grid(torch.stack(list(self.images)), columns=self.columns))
        return images
