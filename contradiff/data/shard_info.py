"""What an index says of all the shards in its folder: one class for each kind of shards.

Writers may add keys for people to read, such as the solver of samples or the names of classes.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ShardInfo(BaseModel):
    """Any kind of shards."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ImageInfo(ShardInfo):
    """Describes image shards. A sample with label c is of the class with id `class_ids[c]`."""

    kind: Literal["images"] = "images"
    class_ids: tuple[str, ...]


class LatentInfo(ShardInfo):
    """Latents, stored as the VAE's moments; `LatentsParams` explains the keys."""

    kind: Literal["moments"] = "moments"
    dtype: Literal["float16", "bfloat16"]
    scaling_factor: float
    image_size: int
    views: int
    flips: bool
    crop_scale_min: float
    colour_jitter: float


class ConditionInfo(ShardInfo):
    """Validation images that samples are conditioned on."""

    kind: Literal["conditions"] = "conditions"


class SampleInfo(ShardInfo):
    """Generated images."""

    kind: Literal["samples"] = "samples"
    condition: str
    guidance: float
