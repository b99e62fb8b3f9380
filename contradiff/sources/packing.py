"""Raw images => shards: planned before any work, made by `map_shards`, then published.

    listing =plan_shards=> PlannedShard, ... =ShardMaker=> Made, ... =PackingReport=> folder

The plan is a function of names, sizes and seed. A shard's bytes are a function of its plan, of the
images' bytes and of the parameters. So they are the same whichever process writes them, and when.
An unreadable image is left out of its shard and listed; no other shard changes.
"""

import json
import os
import shutil
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
from contradiff.files import check_free_space, explain_full_disk, replace_file
from contradiff.sources.image_check import Verify, check_image
from contradiff.sources.listing import SPLITS, ImageFile, Listing, Read

QUARANTINE_NAME = "quarantine.json"
"""Lists the images of each split that are left out."""
UNREADABLE = ".unreadable.json"
"""Ends the name of the list of a shard's unreadable images, beside it."""
NUM_SHOWN = 3
"""Quarantined images that a message shows."""


class IngestParams(Section):
    """Section `ingest`: how raw images are put into shards."""

    max_shard_megabytes: int | None = Field(
        ge=1, description="10^6 bytes of files in a shard before compression; larger images alone"
    )
    verify: Verify = Field(description="full: decode each image once | header: format and end mark")
    resize: int | None = Field(ge=8, description="shorter side of larger images, in pixels")
    max_quarantined: float = Field(
        ge=0, lt=1, description="share of a split's images that may be unreadable"
    )


@dataclass(frozen=True)
class PlannedShard:
    """The images that a shard will hold, in order."""

    split: str
    name: str
    files: tuple[ImageFile, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tar before compression, if nothing is resized."""
        return sum(tar_bytes(file.num_bytes) for file in self.files)


def tar_bytes(num_bytes: int) -> int:
    """What an image of `num_bytes` takes in a shard, with its class and both headers."""
    blocks = -(-num_bytes // tarfile.BLOCKSIZE)
    return (1 + blocks + 2) * tarfile.BLOCKSIZE


def plan_shards(
    listing: Listing, *, seed: int, shard: ShardParams, ingest: IngestParams
) -> list[PlannedShard]:
    """Put each split into a seeded random order and cut it, so that any shard is a fair sample.

    A shard holds at most `shard.samples_per_shard` images and `ingest.max_shard_megabytes`, unless
    one image alone is larger.
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


def check_space(
    plan: Sequence[PlannedShard], missing: Sequence[PlannedShard], *, work: Path, target: Path
) -> None:
    """Refuse to begin what the disk cannot hold.

    `work` takes the missing shards. `target` takes a copy of all if it is another file system.

    Raises:
        ValueError: names the folder and how much to free.
    """
    check_free_space(work, sum(planned.num_bytes for planned in missing))
    if work.stat().st_dev != target.stat().st_dev:
        check_free_space(target, sum(planned.num_bytes for planned in plan))


@dataclass(frozen=True)
class ShardMaker:
    """Makes planned shards in the folder `work`; for `map_shards`.

    Attributes:
        read: returns an image's bytes.
        num_images: in each split of the whole plan.
        shard: section `shard`.
        ingest: section `ingest`.
        work: where shards are written.
    """

    read: Read
    num_images: Mapping[str, int]
    shard: ShardParams
    ingest: IngestParams
    work: Path

    def __call__(self, planned: PlannedShard, tick: Tick) -> Made:
        """Write one shard, whole or not at all; no file if none of its images is readable.

        Raises:
            ValueError: an image's size has changed since the plan was made, or earlier shards had
                too many unreadable images.
        """
        self.unreadable_images()
        irregularities: Counter[str] = Counter()
        unreadable: list[dict[str, str]] = []

        def records() -> Iterator[Record]:
            for file in planned.files:
                content = self.read(file)
                if len(content) != file.num_bytes and not file.is_estimate:
                    raise ValueError(
                        f"data.root: {file.path} has {len(content)} bytes, but had "
                        f"{file.num_bytes} when the work began: stop whatever writes there, then "
                        "run the same command again"
                    )
                verify, resize = self.ingest.verify, self.ingest.resize
                try:
                    image = check_image(content, path=file.path, verify=verify, resize=resize)
                except ValueError as error:
                    reason = str(error).removeprefix(f"{file.path}: ")
                    unreadable.append({"key": file.key, "path": file.path, "reason": reason})
                else:
                    irregularities.update(image.irregularities)
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
        notes = {"split": planned.split, "irregularities": dict(irregularities)}
        return Made((shard,) if shard.num_samples else (), notes)

    def unreadable_images(self) -> dict[str, list[dict[str, str]]]:
        """Return the unreadable images that were found so far, for each split, in its order.

        Raises:
            ValueError: they are more than the share that may be left out; lists them in `work`.
        """
        found = {
            split: [
                item
                for path in sorted(self.work.glob(f"{split}-*{UNREADABLE}"))
                for item in json.loads(path.read_text())
            ]
            for split in self.num_images
        }
        for split, items in found.items():
            share, total = self.ingest.max_quarantined, self.num_images[split]
            if len(items) > share * total:
                _write_json(self.work / QUARANTINE_NAME, found)
                shown = "\n".join(f"  {i['path']}: {i['reason']}" for i in items[:NUM_SHOWN])
                raise ValueError(
                    f"ingest.max_quarantined: {len(items)} of {total} {split} images cannot be "
                    f"read, more than the share {share:g} that may be left out:\n{shown}\n"
                    f"{self.work / QUARANTINE_NAME} lists those found so far; mend or remove them, "
                    "or raise ingest.max_quarantined (finished shards are kept)"
                )
        return found


class PackingReport:
    """What became of a plan; puts it into a folder.

    Attributes:
        shards: the shards of each split, in the plan's order.
        unreadable: `key`, `path` and `reason` of the images of each split that are left out.
        irregularities: how many images of each split are cmyk, greyscale, ...
        class_counts: how many images of class 0, 1, ... each split has.
    """

    def __init__(self, listing: Listing, made: Sequence[Made], maker: ShardMaker) -> None:
        """Sum up what `map_shards` returned for all shards of a listing.

        Raises:
            ValueError: too many images are unreadable, or all of a class.
        """
        self.listing, self.work = listing, maker.work
        self.unreadable = maker.unreadable_images()
        self.shards: dict[str, tuple[Shard, ...]] = {}
        self.irregularities: dict[str, dict[str, int]] = {}
        self.class_counts: dict[str, list[int]] = {}
        for split in listing.splits:
            ours = [one for one in made if one.notes["split"] == split]
            self.shards[split] = tuple(shard for one in ours for shard in one.files)
            irregular, counts = Counter[str](), Counter[int]()
            for one in ours:
                irregular.update(one.notes["irregularities"])
            for shard in self.shards[split]:
                counts.update(dict(enumerate(shard.class_counts)))
            self.irregularities[split] = dict(sorted(irregular.items()))
            self.class_counts[split] = [counts[label] for label in range(len(listing.class_ids))]
            for class_id, count in zip(listing.class_ids, self.class_counts[split], strict=True):
                if count == 0:
                    raise ValueError(
                        f"data.root: all {split} images of class {class_id} are unreadable"
                    )

    def publish(self, folder: Path, *, seed: int) -> None:
        """Link or copy the shards into an empty folder; list unreadable images; write the index.

        Raises:
            ValueError: the disk is full.
        """
        with explain_full_disk(folder):
            for shard in (shard for shards in self.shards.values() for shard in shards):
                try:
                    os.link(self.work / shard.name, folder / shard.name)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(self.work / shard.name, folder / shard.name)
            _write_json(folder / QUARANTINE_NAME, self.unreadable)
            described: dict[str, Any] = {
                "seed": seed,
                "class_names": self.listing.class_names,
                "class_counts": self.class_counts,
                "irregularities": self.irregularities,
                "num_quarantined": {split: len(items) for split, items in self.unreadable.items()},
            }
            info = ImageInfo(class_ids=self.listing.class_ids, **described)
            ShardIndex(self.shards, info).write(folder)

    def describe(self) -> Iterator[str]:
        """Yield a line on what is irregular and one on what is left out, for each split."""
        for split, counts in self.irregularities.items():
            if counts:
                yield f"{split}: " + ", ".join(f"{n} {name}" for name, n in counts.items())
            if number := len(self.unreadable[split]):
                yield f"{split}: {number} unreadable images are left out, see {QUARANTINE_NAME}"


def _write_json(path: Path, content: object) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
