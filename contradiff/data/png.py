"""PNG: how generated images are stored without loss, and shown side by side."""

import io
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
    """Encode one image."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def image_grid(images: ByteImages, *, columns: int, min_side: int = 64) -> bytes:
    """Lay square images out in rows, as one PNG; white fills the last row up.

    Args:
        images: in reading order.
        columns: images a row.
        min_side: smaller images are magnified to this many pixels, or a little more, without
            smoothing.
    """
    factor = -(-min_side // images.shape[-1])
    enlarged = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    rows = _rows(enlarged, columns)
    return encode_png(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2))


def paired_grid(above: ByteImages, below: ByteImages, *, columns: int) -> bytes:
    """Lay images out in rows, each row above the row of its counterparts; see `image_grid`."""
    pairs = torch.stack([_rows(above, columns), _rows(below, columns)], dim=1)
    return image_grid(pairs.flatten(0, 2), columns=columns)


def _rows(images: ByteImages, columns: int) -> UInt8[Tensor, "rows columns 3 height width"]:
    blank = images.new_full((-len(images) % columns, *images.shape[1:]), 255)
    return torch.cat([images, blank]).unflatten(0, (-1, columns))


class LiveGrid:
    """A grid of the newest images, renewed on disk now and then while more of them are made."""

    def __init__(
        self, path: Path, *, columns: int = 16, max_images: int = 96, seconds: float = 10.0
    ) -> None:
        """Nothing is written yet.

        Args:
            path: of the PNG, which is replaced whole.
            columns: images a row.
            max_images: how many of the newest images are shown.
            seconds: the least time between two renewals; the first images are shown at once.
        """
        self.path, self.columns, self.seconds = path, columns, seconds
        self.images: deque[Tensor] = deque(maxlen=max_images)
        self.renewed_at: float | None = None

    def add(self, images: ByteImages) -> None:
        """Take up images, and renew the grid if it is time."""
        self.images.extend(images)
        now = time.monotonic()
        if self.renewed_at is None or now - self.renewed_at >= self.seconds:
            self.renewed_at = now
            with replace_file(self.path) as temporary:
                shown = torch.stack(list(self.images))
                temporary.write_bytes(image_grid(shown, columns=self.columns))
