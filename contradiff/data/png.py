"""PNG: how generated images are stored without loss, and shown side by side."""

import io
from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from contradiff.data.transforms import decode


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
