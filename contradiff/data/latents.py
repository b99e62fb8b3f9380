"""The stored form of latents: the output of the VAE's encoder for the crops of an image.

For a crop of s x s pixels, the VAE returns means and log-variances. Both have the shape
c x s/f x s/f, with c latent channels and the VAE's downsampling factor f. An array called `moments`
has both, one after the other, in 16 bits. The position of the crop in the image is stored too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from contradiff.data.shards import REMEDY, Record, array_from_bytes, array_to_bytes
from contradiff.data.transforms import Crop
from contradiff.files import explain_damage


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
