"""Measure a set of images: compute, shard by shard, the features and logits that the scores need.

images => threads decode and resize them => extractor => a Measurement of each shard => their sum
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from itertools import islice
from operator import add
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from contradiff.data.map_ahead import map_ahead
from contradiff.data.map_shards import Made, Tick, map_shards, missing_items
from contradiff.data.shards import Record, Shard, image_of, read_shard, read_split
from contradiff.data.transforms import apply_crop, centre_crop, decode
from contradiff.evaluation.extractors import Extractor, Image
from contradiff.evaluation.fid import FeatureSource, FeatureStatistics
from contradiff.files import explain_damage, replace_file, sha256_of
from contradiff.processes import Processes
from contradiff.types import ByteImages

_FORMAT = "contradiff-measurement-1"
_TENSORS = "mean", "scatter", "kept", "logits"


def real_image(record: Record, *, image_size: int) -> Image:
    """Decode a real image, then apply Resize(image_size) and CenterCrop(image_size)."""
    sample = image_of(record)
    image = decode(sample.image, name=sample.key)
    return apply_crop(image, centre_crop(*image.shape[1:]), size=image_size)


def generated_image(record: Record, *, image_size: int) -> Image:
    """Decode a generated image; raise ValueError if its sides are not `image_size` pixels."""
    name = record["__key__"].decode()
    image = decode(record["png"], name=name)
    if image.shape[1:] != (image_size, image_size):
        height, width = image.shape[1:]
        raise ValueError(
            f"generated image {name} has {height}x{width} pixels, not {image_size}x{image_size} "
            "(data.image_size); run `dvc repro -f generate`"
        )
    return image


def real_images(
    folder: Path, split: str, *, image_size: int, num_workers: int
) -> tuple[ByteImages, Int64[Tensor, " num_images"]]:
    """Read all real images of a split and their labels into memory, in order."""
    load = partial(real_image, image_size=image_size)
    records = list(read_split(folder, split))
    images = list(map_ahead(load, records, num_threads=num_workers, num_ahead=len(records)))
    return torch.stack(images), torch.tensor([int(record["cls"]) for record in records])


@dataclass(frozen=True)
class Measurement:
    """What the scores need to know about images: features and logits by one extractor and resizer.

    `statistics` of all features are for FID. `kept`, the features of some randomly chosen images,
    is for KID and precision. `logits` are for the inception score, and empty for real images.
    """

    statistics: FeatureStatistics
    kept: Float[Tensor, "m d"]
    logits: Float[Tensor, "n classes"]

    def __add__(self, other: "Measurement") -> "Measurement":
        return Measurement(
            self.statistics + other.statistics,
            torch.cat([self.kept, other.kept]),
            torch.cat([self.logits, other.logits]),
        )

    def save(self, path: Path) -> None:
        """Write the measurement to a safetensors file."""
        from safetensors.torch import save_file

        own = self.statistics
        tensors = [own.mean, own.scatter, self.kept, self.logits]
        facts = {"num_samples": own.num_samples, "source": asdict(own.source)}
        with replace_file(path) as temporary:
            # The metadata have one entry, because safetensors would write several in random order.
            # Equal measurements would then give different files.
            named: dict[str, Tensor] = dict(zip(_TENSORS, tensors, strict=True))
            save_file(named, temporary, {_FORMAT: json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, *, sha256: str, remedy: str) -> "Measurement":
        """Read what `save` wrote; raise ValueError if the file is missing, damaged or another."""
        from safetensors import safe_open

        with explain_damage(path, remedy=remedy):
            if sha256_of(path) != sha256:
                raise ValueError("not the measurement that was written: its sha256 is another")
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_FORMAT])
                mean, scatter, kept, logits = map(file.get_tensor, _TENSORS)
            source = FeatureSource(**facts["source"])
            return cls(FeatureStatistics(source, facts["num_samples"], mean, scatter), kept, logits)


def choose_kept(num_images: int, *, num_kept: int, seed: int) -> Bool[Tensor, " num_images"]:
    """Choose at most `num_kept` random images, whose features are kept."""
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
    processes: Processes,
    on_progress: Tick,
) -> dict[str, Measurement]:
    """Measure the images in shards with each resizer of the extractor.

    The processes share the shards. Finished shards are in `work_dir`, so that an interrupted run
    can continue. Any number of processes gives the same bits. Process 0 returns a measurement for
    each resizer; other processes return {}. `images` describes the images in words. Raises
    ValueError if a feature is not finite, if a shard is damaged, or if `load` refuses an image.
    Raises ChildProcessError if another process failed.
    """
    card = extractor.card
    num_images = sum(shard.num_samples for shard in shards)
    is_kept = choose_kept(num_images, num_kept=num_kept, seed=seed)
    is_kept_of_shard = is_kept.split([shard.num_samples for shard in shards])

    def prepare(record: Record) -> list[Tensor]:
        image = load(record)
        return [extractor.prepare(image, resizer=resizer) for resizer in card.resizers]

    def make(number: int, tick: Tick) -> Made:
        shard = shards[number]
        records = read_shard(folder / shard.name, shard)
        ahead = 2 * batch_size
        prepared = map_ahead(prepare, records, num_threads=num_workers, num_ahead=ahead)
        found: dict[str, Measurement] = {}
        for chosen in is_kept_of_shard[number].split(batch_size):
            batch = zip(*islice(prepared, batch_size), strict=True)
            for resizer, resized in zip(card.resizers, batch, strict=True):
                features, logits = extractor(torch.stack(resized), resizer=resizer)
                source = FeatureSource(images, resizer, card.name, card.weights_sha256)
                statistics = FeatureStatistics.of(features, source=source)
                logits = logits.cpu() if with_logits else torch.empty(0, card.num_classes)
                new = Measurement(statistics, features.cpu()[chosen], logits)
                found[resizer] = found[resizer] + new if resizer in found else new
            tick(len(chosen))
        list(prepared)  # at the end of its records, `read_shard` checks the shard's digest
        files: list[Shard] = []
        for resizer, measurement in found.items():
            measurement.save(path := path_of(number, resizer))
            size = path.stat().st_size
            files.append(Shard(path.name, shard.num_samples, size, sha256_of(path)))
        return Made(tuple(files))

    def path_of(number: int, resizer: str) -> Path:
        return work_dir / f"{number:05d}-{resizer}.safetensors"

    numbers, name_of = range(len(shards)), "{:05d}".format
    if processes.rank == 0:  # this process holds the lock of `work_dir`
        missing = missing_items(processes.share(numbers), work_dir, name_of=name_of)
        on_progress(num_images - sum(shards[number].num_samples for number in missing))
    made = map_shards(
        numbers, make, work_dir, name_of=name_of, processes=processes, on_progress=on_progress
    )
    if processes.rank:
        return {}

    def load_part(file: Shard) -> Measurement:
        path, remedy = work_dir / file.name, "delete this file, and run the same command again"
        return Measurement.load(path, sha256=file.sha256, remedy=remedy)

    return {
        resizer: reduce(add, (load_part(each.files[position]) for each in made))
        for position, resizer in enumerate(card.resizers)
    }
