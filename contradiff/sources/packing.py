"""Put raw images into shards.

First, `plan_shards` divides the list of images among the shards. Then `map_shards` calls a
`ShardMaker` for each planned shard. At last, `publish` puts the finished shards into their folder.

The shards depend only on the images, the seed and the parameters, and not on the number of
processes. An unreadable image is left out of its shard and listed in a file. This changes no
other shard.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from contradiff.config import Section
from contradiff.data.map_shards import Made, Tick
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import Record, Shard, ShardIndex, ShardParams, shard_name, write_shard
from contradiff.files import explain_damage, link_or_copy, replace_file
from contradiff.sources.image_check import Verify, check_image
from contradiff.sources.listing import SPLITS, ImageFile, Listing, Read, describe_ignored

QUARANTINE_NAME = "quarantine.json"
"""Name of the file that lists, for each split, the images that are left out."""
UNREADABLE = ".unreadable.json"
"""The unreadable images of a shard are listed in a file with this suffix."""


class IngestParams(Section):
    """Section `ingest`: how raw images are put into shards."""

    max_shard_megabytes: int | None = Field(
        ge=1, description="largest size of a shard before compression, in 10^6 bytes"
    )
    verify: Verify = Field(description="full: decode each image; header: check format and end")
    resize: int | None = Field(ge=8, description="images are scaled down to this shorter side")
    max_quarantined: float = Field(
        ge=0, lt=1, description="largest allowed share of unreadable images in a split"
    )


@dataclass(frozen=True)
class PlannedShard:
    """The images that a shard will contain, in order."""

    split: str
    name: str
    files: tuple[ImageFile, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tar before compression, if no image is resized."""
        return sum(tar_bytes(file.num_bytes) for file in self.files)


def tar_bytes(num_bytes: int) -> int:
    """Return the bytes of one sample in a tar: the image, its class file and two tar headers."""
    blocks = -(-num_bytes // tarfile.BLOCKSIZE)
    return (1 + blocks + 2) * tarfile.BLOCKSIZE


def plan_shards(
    listing: Listing, *, seed: int, shard: ShardParams, ingest: IngestParams
) -> list[PlannedShard]:
    """Shuffle the images of each split with the seed, and divide them among shards.

    A shard has at most `shard.samples_per_shard` images, and at most `ingest.max_shard_megabytes`
    megabytes. An image that has more megabytes gets its own shard.
    """
    megabytes = ingest.max_shard_megabytes
    plan: list[PlannedShard] = []
    for split, files in listing.splits.items():
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        groups: list[list[ImageFile]] = []
        room = 0
        for index in rng.permutation(len(files)).tolist():
            needed = tar_bytes(files[index].num_bytes)
            is_full = megabytes is not None and needed > room
            if not groups or is_full or len(groups[-1]) == shard.samples_per_shard:
                groups.append([])
                room = (megabytes or 0) * 1_000_000
            groups[-1].append(files[index])
            room -= needed
        plan += [
            PlannedShard(split, shard_name(split, number, shard.compression), tuple(group))
            for number, group in enumerate(groups)
        ]
    return plan


@dataclass(frozen=True)
class ShardMaker:
    """Writes shards to the folder `work`. `map_shards` calls an object of this class as `make`."""

    read: Read
    num_images: Mapping[str, int]
    shard: ShardParams
    ingest: IngestParams
    work: Path

    def __call__(self, planned: PlannedShard, tick: Tick) -> Made:
        """Write one shard, completely or not at all. If no image is readable, no file is written.

        Raises ValueError if an image's size has changed since the plan was made, or if the shards
        so far have too many unreadable images.
        """
        self.unreadable_images()
        irregularities, labels = Counter[str](), Counter[int]()
        unreadable: list[dict[str, str]] = []

        def records() -> Iterator[Record]:
            for file in planned.files:
                content = self.read(file)
                if len(content) != file.num_bytes and not file.is_estimate:
                    now = f"has {len(content)} bytes, but had {file.num_bytes} before"
                    remedy = "stop the program that changes it, then run the same command again"
                    raise ValueError(f"data.root: {file.path} {now}: {remedy}")
                verify, resize = self.ingest.verify, self.ingest.resize
                try:
                    image = check_image(content, path=file.path, verify=verify, resize=resize)
                except ValueError as error:
                    reason = str(error).removeprefix(f"{file.path}: ")
                    unreadable.append({"key": file.key, "path": file.path, "reason": reason})
                else:
                    irregularities.update(image.irregularities)
                    labels[file.label] += 1
                    yield {
                        "__key__": file.key.encode(),
                        image.extension: image.content,
                        "cls": str(file.label).encode(),
                    }
                tick(1)

        path = self.work / planned.name
        shard = write_shard(path, records(), compression=self.shard.compression)
        if shard.num_samples == 0:
            path.unlink()
        listed = path.with_name(f"{path.name}{UNREADABLE}")
        listed.unlink(missing_ok=True)
        if unreadable:
            _write_json(listed, unreadable)
        notes: dict[str, Any] = {"split": planned.split, "irregularities": dict(irregularities)}
        notes["class_counts"] = sorted(labels.items())
        return Made((shard,) if shard.num_samples else (), notes)

    def unreadable_images(self) -> dict[str, list[dict[str, str]]]:
        """Return the unreadable images found so far. Raises ValueError if they are too many."""
        found: dict[str, list[dict[str, str]]] = {}
        for split in self.num_images:
            paths = sorted(self.work.glob(f"{split}-*{UNREADABLE}"))
            found[split] = []
            for path in paths:
                with explain_damage(path, remedy="delete it, and run the same command again"):
                    found[split] += json.loads(path.read_text(encoding="utf-8"))
        for split, items in found.items():
            share, total = self.ingest.max_quarantined, self.num_images[split]
            if len(items) > share * total:
                _write_json(self.work / QUARANTINE_NAME, found)
                shown = "\n".join(f"  {i['path']}: {i['reason']}" for i in items[:3])
                raise ValueError(
                    f"ingest.max_quarantined: {len(items)} of {total} {split} images cannot be "
                    f"read, which is more than the allowed share of {share:g}. Examples:\n{shown}\n"
                    f"{self.work / QUARANTINE_NAME} lists the images found so far. Repair or "
                    "delete them, or raise ingest.max_quarantined (finished shards are kept)"
                )
        return found


def publish(
    listing: Listing, made: Sequence[Made], maker: ShardMaker, folder: Path, *, seed: int
) -> ImageInfo:
    """Link or copy finished shards to an empty folder. Write their index and quarantine.json.

    Raises ValueError if too many images are unreadable, or if the disk is full.
    """
    unreadable = maker.unreadable_images()
    splits: dict[str, tuple[Shard, ...]] = {}
    irregularities: dict[str, dict[str, int]] = {}
    class_counts: dict[str, list[int]] = {}
    for split in listing.splits:
        ours = [one for one in made if one.notes["split"] == split]
        splits[split] = tuple(shard for one in ours for shard in one.files)
        irregular, counts = Counter[str](), Counter[int]()
        for one in ours:
            irregular.update(one.notes["irregularities"])
            counts.update(dict(one.notes["class_counts"]))
        irregularities[split] = dict(sorted(irregular.items()))
        class_counts[split] = [counts[label] for label in range(len(listing.class_ids))]
        if 0 in class_counts[split]:
            class_id = listing.class_ids[class_counts[split].index(0)]
            raise ValueError(f"data.root: all {split} images of class {class_id} are unreadable")
    described: dict[str, object] = {
        "class_ids": listing.class_ids,
        "seed": seed,
        "class_names": listing.class_names,
        "class_counts": class_counts,
        "irregularities": irregularities,
        "num_quarantined": {split: len(items) for split, items in unreadable.items()},
    }
    if any(listing.ignored.values()):
        described["ignored"] = listing.ignored
    info = ImageInfo.model_validate(described)
    for shard in (shard for shards in splits.values() for shard in shards):
        link_or_copy(maker.work / shard.name, folder / shard.name)
    _write_json(folder / QUARANTINE_NAME, unreadable)
    ShardIndex(splits, info).write(folder)
    return info


def describe(info: ImageInfo) -> Iterator[str]:
    """Yield lines for the log: how many images of a split are irregular, unreadable or ignored."""
    content = info.model_dump()
    for split, counts in content["irregularities"].items():
        if counts:
            yield f"{split} images: " + ", ".join(f"{n} {name}" for name, n in counts.items())
        if number := content["num_quarantined"][split]:
            yield f"{split}: {number} unreadable images are left out; {QUARANTINE_NAME} lists them"
        if ignored := describe_ignored(content.get("ignored", {}).get(split, {})):
            yield f"{split} images{ignored}"


def _write_json(path: Path, content: object) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
