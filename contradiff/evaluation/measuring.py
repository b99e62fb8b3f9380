"""What an extractor sees in a set of images: all that the scores need, shard by shard.

images of a shard => threads decode and resize them => extractor => one Measurement a resizer
=> files; the files of all shards => one Measurement a resizer
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from contradiff.data.map_ahead import map_ahead
from contradiff.data.map_shards import Made, Tick, map_shards, missing_items
from contradiff.data.shards import Record, Shard, read_shard
from contradiff.evaluation.extractors import Extractor
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.evaluation.images import Image
from contradiff.files import replace_file, sha256_of
from contradiff.processes import Processes

_FORMAT = "contradiff-measurement-1"
_BATCHES_AHEAD = 2


@dataclass
class Measurement:
    """Features of images by one extractor and one resizer, as far as scores need them.

    `statistics` of all images are for FID, and `logits` for the inception score (none for the
    reference). `kept` has the features of a seeded choice of the images, in order.
    """

    statistics: FeatureStatistics
    kept: Float[Tensor, "m d"]
    logits: Float[Tensor, "n classes"]

    def merge(self, other: "Measurement") -> None:
        """Add the measurement of the images that follow."""
        self.statistics.merge(other.statistics)
        self.kept = torch.cat([self.kept, other.kept])
        self.logits = torch.cat([self.logits, other.logits])

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file."""
        from safetensors.torch import save_file

        statistics = self.statistics
        tensors = {"mean": statistics.mean, "scatter": statistics.scatter}
        tensors |= {"kept": self.kept, "logits": self.logits}
        facts = {"num_samples": statistics.num_samples, "source": asdict(statistics.source)}
        with replace_file(path) as temporary:
            # Metadata of one entry: safetensors writes several in any order, and equal measurements
            # would give unequal files.
            save_file(tensors, temporary, {_FORMAT: json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, or `save` did not write it.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_FORMAT])
                names = ("mean", "scatter", "kept", "logits")
                mean, scatter, kept, logits = (file.get_tensor(name) for name in names)
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path}: no measurement that this version of ContraDiff reads ({error!r})"
            ) from error
        statistics = FeatureStatistics(len(mean), source=FeatureSource(**facts["source"]))
        statistics.num_samples = facts["num_samples"]
        statistics.mean, statistics.scatter = mean, scatter
        return cls(statistics, kept, logits)


def choose_kept(num_images: int, *, num_kept: int, seed: int) -> Bool[Tensor, " num_images"]:
    """Draw `num_kept` of the images, or all of them if there are fewer."""
    is_kept = torch.zeros(num_images, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    is_kept[torch.randperm(num_images, generator=generator)[:num_kept]] = True
    return is_kept


def measure_shards(
    folder: Path,
    shards: Sequence[Shard],
    load: Callable[[Record], Image],
    extractor: Extractor,
    work_dir: Path,
    *,
    images: str,
    num_kept: int,
    with_logits: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
    processes: Processes | None = None,
    on_progress: Tick = lambda _: None,
) -> dict[str, Measurement]:
    """Measure shards of images with each resizer of the extractor.

    Several processes share the shards, and an interrupted run goes on where it was. Each shard is
    measured alone, and the shards are joined in their order: so the result is the same, to the last
    bit, for any number of processes.

    Args:
        folder: where the shards are.
        shards: in order.
        load: makes an image of a sample; threads call it.
        extractor: sees the images.
        work_dir: a folder that all processes share and that survives a kill.
        images: the images in words.
        num_kept: how many images' features are kept, if there are as many.
        with_logits: whether the logits are kept.
        batch_size: images that the extractor sees at once.
        num_workers: threads that load and resize images ahead; 0: none.
        seed: decides whose features are kept.
        processes: which process this is; by default there is one.
        on_progress: told how many more images all processes have done; only in process 0.

    Returns:
        Measurements by resizer; nothing in other processes than process 0.

    Raises:
        ValueError: features are not finite, a shard is damaged, or `load` refuses an image.
        ChildProcessError: another process failed.
    """
    processes = processes or Processes()
    card = extractor.card
    num_images = sum(shard.num_samples for shard in shards)
    is_kept = choose_kept(num_images, num_kept=num_kept, seed=seed)
    is_kept_of_shard = is_kept.split([shard.num_samples for shard in shards])

    def empty(resizer: str) -> Measurement:
        source = FeatureSource(images, resizer, card.name, card.weights_sha256)
        kept, logits = torch.empty(0, card.num_features), torch.empty(0, card.num_classes)
        return Measurement(FeatureStatistics(card.num_features, source=source), kept, logits)

    def prepare(record: Record) -> list[Tensor]:
        image = load(record)
        return [extractor.prepare(image, resizer=resizer) for resizer in card.resizers]

    def make(number: int, tick: Tick) -> Made:
        shard = shards[number]
        prepared = map_ahead(
            prepare,
            read_shard(folder / shard.name, shard),
            num_threads=num_workers,
            num_ahead=_BATCHES_AHEAD * batch_size,
        )
        found = {resizer: empty(resizer) for resizer in card.resizers}
        for chosen in is_kept_of_shard[number].split(batch_size):
            batch = zip(*islice(prepared, batch_size), strict=True)
            for resizer, resized in zip(card.resizers, batch, strict=True):
                measurement = found[resizer]
                features, logits = extractor(torch.stack(resized), resizer=resizer)
                measurement.statistics.update(features)
                measurement.kept = torch.cat([measurement.kept, features.cpu()[chosen]])
                if with_logits:
                    measurement.logits = torch.cat([measurement.logits, logits.cpu()])
            tick(len(chosen))
        list(prepared)  # `read_shard` checks the shard's digest at its end
        files: list[Shard] = []
        for resizer, measurement in found.items():
            measurement.save(path := path_of(number, resizer))
            size = path.stat().st_size
            files.append(Shard(path.name, shard.num_samples, size, sha256_of(path)))
        return Made(tuple(files))

    def path_of(number: int, resizer: str) -> Path:
        return work_dir / f"{number:05d}-{resizer}.safetensors"

    numbers, name_of = range(len(shards)), "{:05d}".format
    if processes.rank == 0:  # it holds the folder's lock
        missing = missing_items(numbers, work_dir, name_of=name_of)
        on_progress(num_images - sum(shards[number].num_samples for number in missing))
    map_shards(
        numbers, make, work_dir, name_of=name_of, processes=processes, on_progress=on_progress
    )
    if processes.rank:
        return {}
    wholes = {resizer: empty(resizer) for resizer in card.resizers}
    for resizer, whole in wholes.items():
        for number in numbers:
            whole.merge(Measurement.load(path_of(number, resizer)))
    return wholes
