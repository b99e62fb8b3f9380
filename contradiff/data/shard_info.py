"""What index.json says about all shards of its folder. Each kind of shards has a class.

A writer may add keys that only people read, such as the sampling solver or the class names.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ShardInfo(BaseModel):
    """Describes shards of any kind; the base class of all other kinds."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ImageInfo(ShardInfo):
    """Describes image shards. A sample with label c belongs to the class with id `class_ids[c]`."""

    kind: Literal["images"] = "images"
    class_ids: tuple[str, ...]


class LatentInfo(ShardInfo):
    """Describes shards of latents (means and log-variances); `LatentsParams` explains the keys."""

    kind: Literal["moments"] = "moments"
    dtype: Literal["float16", "bfloat16"]
    scaling_factor: float
    image_size: int
    views: int
    flips: bool
    crop_scale_min: float
    colour_jitter: float


class ConditionInfo(ShardInfo):
    """Describes shards of validation images on which generated samples are conditioned."""

    kind: Literal["conditions"] = "conditions"


class SampleInfo(ShardInfo):
    """Describes shards of generated images."""

    kind: Literal["samples"] = "samples"
    condition: str
    guidance: float
