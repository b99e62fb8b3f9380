"""The stored form of latents: the VAE's moments of an image's crops, in 16 bits.

images, 3 x s x s in [-1, 1] => moments (mean, log-variance), 2c x s/f x s/f, and their crops
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from contradiff.config import Section
from contradiff.data.shards import Record, array_from_bytes, array_to_bytes
from contradiff.data.transforms import Crop


class LatentsParams(Section):
    """Section `latents`: which crops of an image to encode before training."""

    views: int = Field(ge=1, description="K: the centre crop; training images: K-1 random crops")
    flips: bool = Field(description="also encode each training view from mirrored pixels")
    crop_scale_min: float = Field(gt=0, le=1, description="least area of a random crop; 1: all")
    colour_jitter: float = Field(ge=0, le=1, description="SimCLR's strength; random crops only")
    dtype: Literal["float16", "bfloat16"] = Field(description="stored; the VAE runs in float32")
    min_psnr: float = Field(description="least mean PSNR of decoded latents, in dB")
    batch_size: int = Field(ge=1, description="crops encoded at once")

    def views_of(self, split: str) -> tuple[int, bool]:
        """Return the number of crops of an image in a split, and whether they are also mirrored.

        The val split is only evaluated: it has the centre crop alone.
        """
        return (1, False) if split == "val" else (self.views, self.flips)


@dataclass(frozen=True)
class StoredLatents:
    """One image's views: moments and the crops they show. View 0 is the centre crop.

    If there are flips, the mirror images of all views follow them, in the same order. Moments are
    float16, or bfloat16's values as float32, since NumPy has no bfloat16.
    """

    key: str
    moments: Float[np.ndarray, "views moments h w"]
    crops: tuple[Crop, ...]

    def to_record(self) -> Record:
        """Return `moments.npy` (float16; or uint16, bfloat16's bits) and `crops.npy` (int32)."""
        moments = self.moments
        if moments.dtype == np.float32:
            moments = (moments.view(np.uint32) >> 16).astype(np.uint16)  # the upper half
        return {
            "__key__": self.key.encode(),
            "moments.npy": array_to_bytes(moments),
            "crops.npy": array_to_bytes(np.stack([crop.to_array() for crop in self.crops])),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, bytes]) -> "StoredLatents":
        """Inverse of `to_record`."""
        moments = array_from_bytes(record["moments.npy"])
        if moments.dtype == np.uint16:
            moments = (moments.astype(np.uint32) << 16).view(np.float32)
        crops = tuple(Crop.from_array(crop) for crop in array_from_bytes(record["crops.npy"]))
        return cls(record["__key__"].decode(), moments, crops)
