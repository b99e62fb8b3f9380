"""PNG: how generated images are stored without loss, and shown side by side."""

import io
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from contradiff.data.transforms import decode
from contradiff.files import replace_file


def encode_png(image: UInt8[Tensor, "3 height width"]) -> bytes:
    """Encode one image."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def image_grid(images: Sequence[bytes], *, columns: int, min_side: int = 64) -> bytes:
    """Lay images of one size out in rows, as one PNG.

    Args:
        images: encoded images.
        columns: images a row.
        min_side: smaller images are magnified to this many pixels, or a little more, without
            smoothing.
    """
    decoded = torch.stack([decode(image, name="grid") for image in images])
    factor = -(-min_side // decoded.shape[-1])
    decoded = decoded.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    missing = -len(decoded) % columns
    side = decoded.shape[-1]
    blank = decoded.new_full((missing, 3, side, side), 255)
    rows = torch.cat([decoded, blank]).unflatten(0, (-1, columns))
    return encode_png(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2).contiguous())


class LiveGrid:
    """A grid of the newest images, renewed on disk now and then while more of them are made."""

    def __init__(self, path: Path, *, columns: int, max_images: int, seconds: float) -> None:
        """Nothing is written yet.

        Args:
            path: of the PNG, which is replaced whole.
            columns: images a row.
            max_images: newest images that are shown.
            seconds: between two renewals, at least; the first images are shown at once.
        """
        self.path, self.columns, self.seconds = path, columns, seconds
        self.images: deque[bytes] = deque(maxlen=max_images)
        self.renewed_at: float | None = None

    def add(self, images: Sequence[bytes]) -> None:
        """Take encoded images up, and renew the grid if it is time."""
        self.images.extend(images)
        now = time.monotonic()
        if self.renewed_at is None or now - self.renewed_at >= self.seconds:
            self.renewed_at = now
            with replace_file(self.path) as temporary:
                temporary.write_bytes(image_grid(self.images, columns=self.columns))
