"""Facts that index.json states about the shards of its folder, with a class for each kind.

An index may have more keys, for human readers: the sampling solver or the class names, for example.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class ShardInfo(BaseModel):
    """Base class of all kinds of shards."""

    model_config = ConfigDict(frozen=True, extra="allow")


class ImageInfo(ShardInfo):
    """Describes image shards. A sample with label c belongs to the class with id `class_ids[c]`."""

    kind: Literal["images"] = "images"
    class_ids: tuple[str, ...]


class LatentInfo(ShardInfo):
    """Describes shards of latents (means and log-variances); `LatentsParams` explains most keys."""

    kind: Literal["moments"] = "moments"
    dtype: Literal["float16", "bfloat16"]
    scaling_factor: float
    image_size: int
    views: int
    flips: bool
    crop_scale_min: float
    colour_jitter: float


class ConditionInfo(ShardInfo):
    """Describes shards of the validation images from which samples are generated."""

    kind: Literal["conditions"] = "conditions"


class SampleInfo(ShardInfo):
    """Describes shards of generated images."""

    kind: Literal["samples"] = "samples"
    condition: str
    guidance: float
