"""Images with their features, among which a model finds those that are nearest to a new image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, cosine_similarity

from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex, image_of, read_shard
from contradiff.data.transforms import decode
from contradiff.features.cache import FeatureCache, ModelFolders
from contradiff.pretrained.images import ImageLike

SPLIT = "val"


@dataclass(frozen=True)
class Gallery:
    """The features of some images, and a caption for each. `read` loads the images at places.

    `name` says which images they are, such as "validation images".
    """

    name: str
    captions: list[str]
    features: Float[Tensor, "num_images width"]
    read: Callable[[Sequence[int]], Sequence[ImageLike]]

    def nearest(self, feature: Float[Tensor, "1 width"], *, k: int) -> list[tuple[int, float]]:
        """Return the places of the k nearest images with the cosine of the angle, nearest first."""
        cosines = cosine_similarity(feature, self.features.float())
        best = cosines.topk(min(k, len(self.captions)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def examples(self, number: int) -> list[int]:
        """Return the places of the first images with different captions, at most `number`."""
        first = {caption: place for place, caption in reversed(list(enumerate(self.captions)))}
        return sorted(first.values())[:number]


def validation_gallery(root: Path, class_names: Sequence[str]) -> Gallery:
    """Return the validation images of the pipeline in the folder `root`, captioned by class.

    Raises ValueError if its features are missing or of another model. Reading an image raises
    ValueError if its shard is missing or damaged.
    """
    build = root / "build"
    models = ModelFolders(build / "pretrain", build / "base", root)
    cache = FeatureCache.open(build / "features", models)
    features = cache.column(SPLIT, cache.index.columns[0].name)
    labels: list[int] = cache.labels(SPLIT).tolist()
    captions = [class_names[label] for label in labels]
    return Gallery("validation images", captions, features, partial(_read_stored, build / "shards"))


def _read_stored(shards: Path, places: Sequence[int]) -> list[Tensor]:
    found, first = dict[int, Tensor](), 0
    for shard in ShardIndex.read(shards, ImageInfo).shards(SPLIT):
        own = {place for place in places if first <= place < first + shard.num_samples}
        records = read_shard(shards / shard.name, shard) if own else ()
        for place, record in enumerate(records, start=first):
            if place in own:
                sample = image_of(record)
                found[place] = decode(sample.image, name=sample.key)
        first += shard.num_samples
    return [found[place] for place in places]
