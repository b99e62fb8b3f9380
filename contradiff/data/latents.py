"""The stored form of latents: the output of the VAE's encoder for the crops of an image.

For a crop of s x s pixels, the VAE returns means and log-variances. Both have the shape
c x s/f x s/f, with c latent channels and the VAE's downsampling factor f. An array called `moments`
has both, one after the other, in 16 bits. The position of the crop in the image is stored too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from contradiff.config import Section
from contradiff.data.shards import REMEDY, Record, array_from_bytes, array_to_bytes
from contradiff.data.transforms import Crop
from contradiff.files import explain_damage


class LatentsParams(Section):
    """Section `latents`: which crops of an image to encode before training."""

    views: int = Field(ge=1, description="crops of an image: 1 centre crop, the others random")
    flips: bool = Field(description="also encode the mirror image of each training crop")
    crop_scale_min: float = Field(gt=0, le=1, description="smallest random crop (share of area)")
    colour_jitter: float = Field(ge=0, le=1, description="colour changes in random crops; 0: none")
    dtype: Literal["float16", "bfloat16"] = Field(description="type of the stored latents")
    min_psnr: float = Field(description="smallest allowed mean PSNR of decoded latents, in dB")
    batch_size: int = Field(ge=1, description="number of crops that the VAE encodes in one pass")

    def views_of(self, split: str) -> tuple[int, bool]:
        """Return the number of crops of an image, and whether their mirror images are added.

        In the split `val`, which serves only for evaluation, an image has only its centre crop.
        """
        return (1, False) if split == "val" else (self.views, self.flips)


@dataclass(frozen=True)
class StoredLatents:
    """The latents of one image: `moments[i]` has the means and log-variances of crop i.

    Crop 0 is the centre crop. If latents.flips is true, the mirror images follow after all crops,
    in the same order. NumPy has no bfloat16, so bfloat16 values are held in a float32 array.
    """

    key: str
    moments: Float[np.ndarray, "views moments h w"]
    crops: tuple[Crop, ...]

    def to_record(self) -> Record:
        """Return the files that a shard stores. They keep bfloat16 values as 16-bit integers."""
        moments = self.moments
        if moments.dtype == np.float32:
            moments = (moments.view(np.uint32) >> 16).astype(
                np.uint16
            )  # bfloat16 is float32's upper half
        return {
            "__key__": self.key.encode(),
            "moments.npy": array_to_bytes(moments),
            "crops.npy": array_to_bytes(np.stack([crop.to_array() for crop in self.crops])),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, bytes]) -> "StoredLatents":
        """Rebuild the object from what `to_record` returned."""
        key = record["__key__"].decode()
        with explain_damage(key, remedy=REMEDY):
            moments = array_from_bytes(record["moments.npy"])
            if moments.dtype == np.uint16:
                moments = (moments.astype(np.uint32) << 16).view(np.float32)
            crops = tuple(Crop.from_array(crop) for crop in array_from_bytes(record["crops.npy"]))
        return cls(key, moments, crops)
