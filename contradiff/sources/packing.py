"""Raw images -> shards: planned before any work, each shard an independent job, found after a kill.

    files of a split =plan_shards=> PlannedShard, ... =write_planned=> DoneShard, ... =publish=> out

What the shards hold together is counted by `contradiff.sources.tally`.

The plan is a function of names, sizes and seed; a shard's bytes are a function of its plan, the
images' bytes and the recipe. So they are the same whichever process writes them, and when. An image
that cannot be read is left out of the shard that it was planned for: no other shard changes.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from contradiff.config import Section
from contradiff.data.shards import Compression, Record, Shard, shard_name, write_shard
from contradiff.files import check_free_space, explain_full_disk, replace_file
from contradiff.sources.intake import Verify, take_in
from contradiff.sources.listing import SPLITS, ImageFile, Read


class IngestParams(Section):
    """Section `ingest`: how raw images are taken into shards."""

    max_shard_megabytes: int | None = Field(
        ge=1, description="of 10^6 bytes, a shard's files before compression; a larger image: alone"
    )
    verify: Verify = Field(description="full: decode each image once | header: format and end mark")
    resize: int | None = Field(ge=8, description="shorter side of larger images, in pixels")
    max_quarantined: float = Field(
        ge=0, lt=1, description="share of a split's images that may be unreadable"
    )


@dataclass(frozen=True)
class Recipe:
    """What besides the plan decides a shard's bytes."""

    compression: Compression
    verify: Verify
    resize: int | None


@dataclass(frozen=True)
class PlannedShard:
    """Which images a shard is to hold, in order, and their sizes in bytes."""

    split: str
    name: str
    files: tuple[ImageFile, ...]
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the tar before compression, if nothing is resized."""
        return sum(map(tar_bytes, self.sizes))

    def digest(self, recipe: Recipe) -> str:
        """Name the work: a shard written for another plan or recipe is never taken for this one."""
        content = [asdict(recipe), [asdict(file) for file in self.files], self.sizes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Quarantined:
    """An image that is left out, and why."""

    key: str
    path: str
    reason: str


@dataclass(frozen=True)
class DoneShard:
    """What became of a planned shard: None where no image of it could be read."""

    split: str
    shard: Shard | None
    oddities: Mapping[str, int]
    quarantined: tuple[Quarantined, ...]


def tar_bytes(num_bytes: int) -> int:
    """What an image of `num_bytes` takes in a shard, with its class and both headers."""
    blocks = -(-num_bytes // tarfile.BLOCKSIZE)
    return (1 + blocks + 2) * tarfile.BLOCKSIZE


def plan_shards(
    files: Sequence[ImageFile],
    sizes: Sequence[int],
    *,
    split: str,
    seed: int,
    samples_per_shard: int,
    max_bytes: int | None,
    compression: Compression,
) -> list[PlannedShard]:
    """Put images into a seeded random order and cut it, so that any shard is a fair sample.

    Args:
        files: of the split.
        sizes: of the files, in bytes.
        split: name of the split.
        seed: of the order.
        samples_per_shard: a shard has no more.
        max_bytes: a shard's tar is no larger, unless it holds one image alone; None: no limit.
        compression: for the shards' names.

    Raises:
        ValueError: two images have one key, or a name is not UTF-8; names the paths.
    """
    _check_keys(files)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    groups: list[list[int]] = []
    room = 0
    for index in rng.permutation(len(files)).tolist():
        needed = tar_bytes(sizes[index])
        is_full = max_bytes is not None and needed > room
        if not groups or is_full or len(groups[-1]) == samples_per_shard:
            groups.append([])
            room = max_bytes or 0
        groups[-1].append(index)
        room -= needed
    return [
        PlannedShard(
            split,
            shard_name(split, number, compression),
            tuple(files[index] for index in group),
            tuple(sizes[index] for index in group),
        )
        for number, group in enumerate(groups)
    ]


def write_planned(
    planned: PlannedShard,
    folder: Path,
    *,
    read: Read,
    recipe: Recipe,
    tick: Callable[[], None] = lambda: None,
) -> DoneShard:
    """Write a planned shard, whole or not at all, and a note beside it that says so.

    Args:
        planned: the shard.
        folder: where it is written.
        read: gives an image's bytes.
        recipe: how it is written.
        tick: called after each image; what it raises ends the work.

    Raises:
        ValueError: the disk is full, or an image's size has changed since the plan was made.
    """
    oddities: Counter[str] = Counter()
    quarantined: list[Quarantined] = []

    def records() -> Iterator[Record]:
        for file, size in zip(planned.files, planned.sizes, strict=True):
            content = read(file)
            if len(content) != size and not file.is_estimate:
                raise ValueError(
                    f"data.root: {file.path} has {len(content)} bytes, but had {size} when the "
                    "work began: let nobody write there, then run the same command again"
                )
            try:
                image = take_in(content, path=file.path, verify=recipe.verify, resize=recipe.resize)
            except ValueError as error:
                reason = str(error).removeprefix(f"{file.path}: ")
                quarantined.append(Quarantined(file.key, file.path, reason))
            else:
                oddities.update(image.oddities)
                yield {
                    "__key__": file.key.encode(),
                    image.extension: image.content,
                    "cls": str(file.label).encode(),
                }
            tick()

    path = folder / planned.name
    with explain_full_disk(folder):
        shard = write_shard(path, records(), compression=recipe.compression)
        if shard.num_samples == 0:
            path.unlink()
            shard = None
        done = DoneShard(planned.split, shard, dict(sorted(oddities.items())), tuple(quarantined))
        with replace_file(_note_of(path)) as temporary:
            content = {"digest": planned.digest(recipe), **asdict(done)}
            temporary.write_text(json.dumps(content))
    return done


def find_done(planned: PlannedShard, folder: Path, *, recipe: Recipe) -> DoneShard | None:
    """What an earlier run, killed since, made of a planned shard; None if it is to be written."""
    path = folder / planned.name
    if not _note_of(path).is_file():
        return None
    content: dict[str, Any] = json.loads(_note_of(path).read_text())
    if content.pop("digest") != planned.digest(recipe):
        return None
    shard = None if content["shard"] is None else Shard(**content["shard"])
    if shard is not None and not (path.is_file() and path.stat().st_size == shard.num_bytes):
        return None
    quarantined = tuple(Quarantined(**item) for item in content["quarantined"])
    return DoneShard(planned.split, shard, content["oddities"], quarantined)


def publish(shards: Sequence[Shard], *, work: Path, folder: Path) -> None:
    """Make finished shards appear in `folder` too, without a copy where that is possible."""
    for shard in shards:
        source, target = work / shard.name, folder / shard.name
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            with explain_full_disk(folder):
                shutil.copyfile(source, target)


def check_space(
    plan: Sequence[PlannedShard], missing: Sequence[PlannedShard], *, work: Path, target: Path
) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        plan: all shards.
        missing: those that are still to be written.
        work: where they are written.
        target: where they are published; shards are copied if it is another file system.

    Raises:
        ValueError: names the folder and how much is to be freed.
    """
    check_free_space(work, sum(planned.num_bytes for planned in missing))
    if work.stat().st_dev != target.stat().st_dev:
        check_free_space(target, sum(planned.num_bytes for planned in plan))


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _check_keys(files: Sequence[ImageFile]) -> None:
    seen: dict[str, ImageFile] = {}
    for file in files:
        key = file.key
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"data.root: {file.path!r} is not named in UTF-8: rename it"
            ) from error
        if not key or "." in key or "\0" in key:
            raise ValueError(
                f"data.root: {file.path!r} gives {key!r}, which can be no key: rename it"
            )
        if (other := seen.setdefault(key, file)) is not file:
            raise ValueError(
                f"data.root: {other.path} and {file.path} would both be {key}: rename one"
            )
