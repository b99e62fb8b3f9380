"""A set of images seen through an extractor: all that its scores need, shard by shard.

Each shard is worked on alone and written down; merging them in order gives the same numbers however
many processes shared the work, and an interrupted run goes on where it was.

image batches of one shard -> FeatureSet a resizer -> file; files of all shards -> FeatureSet
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from contradiff.evaluation.extractors import Extractor
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.evaluation.inception_score import InceptionSums
from contradiff.files import replace_file

_FORMAT = "contradiff-feature-set-1"
Batches = Iterable[UInt8[Tensor, "_ 3 _ _"]]
"""Images, RGB from 0 to 255; the batches' sizes may differ."""
Shards = Sequence[tuple[int, Callable[[], Batches]]]
"""Of each shard: how many images it holds, and their batches, read when asked for."""


@dataclass
class FeatureSet:
    """Features of images, as far as scores need them.

    Attributes:
        statistics: of all features, for the Fréchet distance.
        kept: (m d) float32, features of a seeded choice of the images, in order.
        sums: for the inception score; the reference has none.
    """

    statistics: FeatureStatistics
    kept: Float[Tensor, "m d"]
    sums: InceptionSums | None

    def merge(self, other: "FeatureSet") -> None:
        """Take in the images that follow.

        Raises:
            ValueError: `other` is of other features.
        """
        self.statistics.merge(other.statistics)
        self.kept = torch.cat([self.kept, other.kept])
        if self.sums is not None and other.sums is not None:
            self.sums.merge(other.sums)

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file; what it was made from stands in its metadata."""
        from safetensors.torch import save_file

        tensors = {
            "mean": self.statistics.mean,
            "scatter": self.statistics.scatter,
            "kept": self.kept.contiguous(),
        }
        facts: dict[str, object] = {
            "num_samples": self.statistics.num_samples,
            "source": asdict(self.statistics.source),
        }
        if self.sums is not None:
            tensors |= {
                "marginals": self.sums.marginals,
                "entropies": self.sums.entropies,
                "counts": self.sums.counts,
            }
            facts["num_images"] = self.sums.num_images
        with replace_file(path) as temporary:
            # One entry only: safetensors writes several in any order, and equal features would then
            # make unequal files.
            save_file(tensors, temporary, {_FORMAT: json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> "FeatureSet":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, or is no such file.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ValueError(f"{path}: no such file of features")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if _FORMAT not in metadata:
                    raise ValueError(
                        f"{path}: not written by FeatureSet.save, or by another version"
                    )
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
        facts: dict[str, Any] = json.loads(metadata[_FORMAT])
        source = FeatureSource(**facts["source"])
        statistics = FeatureStatistics(len(tensors["mean"]), source=source)
        statistics.num_samples = facts["num_samples"]
        statistics.mean, statistics.scatter = tensors["mean"], tensors["scatter"]
        sums = None
        if "marginals" in tensors:
            splits, num_classes = tensors["marginals"].shape
            sums = InceptionSums(
                num_images=facts["num_images"], splits=splits, num_classes=num_classes
            )
            sums.marginals, sums.entropies = tensors["marginals"], tensors["entropies"]
            sums.counts = tensors["counts"]
        return cls(statistics, tensors["kept"], sums)


def choose_kept(num_images: int, *, num_kept: int, seed: int) -> Int64[Tensor, " kept"]:
    """Which images' features are kept: `num_kept` numbers below `num_images`, in order; or all."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_images, generator=generator)[: min(num_kept, num_images)]
    return chosen.sort().values


def measure(
    image_batches: Batches,
    extractor: Extractor,
    *,
    reference: str,
    start: int,
    num_images: int,
    kept: Int64[Tensor, " kept"],
    splits: int | None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> dict[str, FeatureSet]:
    """Stream a part of a set of images through an extractor, once for each of its resizers.

    Args:
        image_batches: uint8 batches; only one is held at a time.
        extractor: as from `load_extractor`.
        reference: what the set is, in words; it names the features.
        start: number of the part's first image in the set.
        num_images: of the whole set.
        kept: numbers of the images whose features are kept, in order.
        splits: of the inception score; none: no inception score.
        on_progress: called after each batch with the number of its images.

    Returns:
        Features by resizer.

    Raises:
        ValueError: features are not finite.
    """
    card = extractor.card
    results: dict[str, FeatureSet] = {}
    for resizer in card.resizers:
        source = FeatureSource(
            reference=reference,
            resizer=resizer,
            extractor=card.name,
            fingerprint=card.weights_sha256,
        )
        sums = None
        if splits is not None:
            sums = InceptionSums(num_images=num_images, splits=splits, num_classes=card.num_classes)
        statistics = FeatureStatistics(card.num_features, source=source)
        results[resizer] = FeatureSet(statistics, torch.empty(0, card.num_features), sums)
    for images in image_batches:
        first, last = torch.searchsorted(kept, torch.tensor([start, start + len(images)]))
        chosen = kept[first:last] - start
        for resizer in card.resizers:
            features, logits = extractor(images, resizer=resizer)
            part = results[resizer]
            part.statistics.update(features)
            part.kept = torch.cat([part.kept, features[chosen.to(features.device)].cpu().float()])
            if part.sums is not None:
                part.sums.update(logits.double().softmax(1), start=start)
        start += len(images)
        on_progress(len(images))
    return results


def measure_shards(
    shards: Shards,
    extractor: Extractor,
    work: Path,
    *,
    reference: str,
    num_kept: int,
    splits: int | None,
    seed: int,
    process_index: int,
    num_processes: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Measure this process's shards, one in `num_processes`, each into files of its own.

    Args:
        shards: all shards of the set, in order.
        extractor: as from `load_extractor`.
        work: a folder that all processes share; shards that are there already are not done again.
        reference: what the set is, in words.
        num_kept: at most so many images' features are kept.
        splits: of the inception score; none: no inception score.
        seed: of the choice of kept images.
        process_index: of this process, from 0.
        num_processes: how many share the work.
        on_progress: called with each number of images that are done, or found done.

    Raises:
        ValueError: there are no images, or features are not finite.
    """
    num_images = sum(count for count, _ in shards)
    if num_images == 0:
        raise ValueError(f"no images to score in {reference}")
    kept = choose_kept(num_images, num_kept=num_kept, seed=seed)
    start = 0
    for number, (count, batches) in enumerate(shards):
        if number % num_processes == process_index:
            paths = {name: _part(work, number, name) for name in extractor.card.resizers}
            if all(path.is_file() for path in paths.values()):
                on_progress(count)
            else:
                parts = measure(
                    batches(),
                    extractor,
                    reference=reference,
                    start=start,
                    num_images=num_images,
                    kept=kept,
                    splits=splits,
                    on_progress=on_progress,
                )
                for name, part in parts.items():
                    part.save(paths[name])
        start += count


def merge_shards(work: Path, *, num_shards: int, resizers: Sequence[str]) -> dict[str, FeatureSet]:
    """Join what `measure_shards` wrote, in the shards' order; one shard is held at a time."""
    results: dict[str, FeatureSet] = {}
    for resizer in resizers:
        whole = FeatureSet.load(_part(work, 0, resizer))
        for number in range(1, num_shards):
            whole.merge(FeatureSet.load(_part(work, number, resizer)))
        results[resizer] = whole
    return results


def _part(work: Path, number: int, resizer: str) -> Path:
    return work / f"{number:05d}-{resizer}.safetensors"
