"""Pairs of an image and its latents, read from image shards and latent shards.

Image shard i and latent shard i contain the same samples in the same order. So both give
pairs.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice

from contradiff.data.order import ShardRange
from contradiff.data.remote import Location, join
from contradiff.data.shard_info import ImageInfo, LatentInfo
from contradiff.data.shards import ShardIndex, read_shard

Pair = tuple[dict[str, bytes], dict[str, bytes]]
"""The two records of one sample: the image file with its label, and the latents."""


@dataclass(frozen=True)
class PairedShards:
    """Image shards and latent shards, in two folders, with the same samples in the same order."""

    images: Location
    latents: Location
    split: str
    image_index: ShardIndex[ImageInfo]
    latent_index: ShardIndex[LatentInfo]

    @classmethod
    def open(cls, images: Location, latents: Location, *, split: str) -> "PairedShards":
        """Read both indices. A location is a local folder or a URL (s3://, gs://, http://, ...).

        Raises ValueError if shards are missing or damaged, or if the two folders do not match.
        """
        image_index = ShardIndex.read(images, ImageInfo)
        latent_index = ShardIndex.read(latents, LatentInfo)
        pairs = cls(images, latents, split, image_index, latent_index)
        if pairs.sizes != tuple(shard.num_samples for shard in latent_index.shards(split)):
            what = f"made from other shards than {images}"
            raise ValueError(f"{latents}: {what}; run `dvc repro latents`")
        return pairs

    @property
    def num_shards(self) -> int:
        """Number of shards of the split."""
        return len(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples of each shard."""
        return tuple(shard.num_samples for shard in self.image_index.shards(self.split))

    @property
    def num_samples(self) -> int:
        """Number of samples of the split."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """A hash of the split's content, which does not change if the folders are moved."""
        content = [
            [[asdict(shard) for shard in index.shards(self.split)], index.info.model_dump()]
            for index in (self.image_index, self.latent_index)
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def read_range(self, wanted: ShardRange, *, with_images: bool) -> Iterator[Pair]:
        """Yield some pairs of a shard. The pairs before them are read, but not yielded."""
        # `read_shard` checks a shard after its last sample. Do not stop before that check.
        stop = None if wanted.last == self.sizes[wanted.shard] else wanted.last
        yield from islice(self.read(wanted.shard, with_images=with_images), wanted.first, stop)

    def read(self, number: int, *, with_images: bool = True) -> Iterator[Pair]:
        """Yield the pairs of one shard. Without `with_images`, the image records are empty."""
        image_shard = self.image_index.shards(self.split)[number]
        latent_shard = self.latent_index.shards(self.split)[number]
        latent_records = read_shard(join(self.latents, latent_shard.name), latent_shard)
        if not with_images:
            yield from (({}, latent) for latent in latent_records)
            return
        image_records = read_shard(join(self.images, image_shard.name), image_shard)
        for image, latent in zip(image_records, latent_records, strict=True):
            if image["__key__"] != latent["__key__"]:
                keys = ", but the image has the key ".join(
                    record["__key__"].decode() for record in (latent, image)
                )
                path = join(self.latents, latent_shard.name)
                raise ValueError(f"{path}: the latent has the key {keys}; run `dvc repro latents`")
            yield image, latent
