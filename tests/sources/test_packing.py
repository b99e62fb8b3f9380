"""Nothing is lost or doubled, at any size, order or kill."""

import errno
import functools
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from webdataset.writer import TarWriter

from contradiff.data.map_shards import map_shards, missing_items
from contradiff.data.shard_info import ImageInfo
from contradiff.data.shards import ShardIndex, ShardParams, image_of, read_split
from contradiff.sources import packing
from contradiff.sources.folder import read_file
from contradiff.sources.listing import ImageFile, Listing, Read
from contradiff.sources.packing import IngestParams, PlannedShard, ShardMaker

CLASS_IDS = ("a", "b", "c")
BAD = b"<html>404</html>"
name_of = attrgetter("name")
INGEST = {"max_shard_megabytes": None, "verify": "header", "resize": None, "max_quarantined": 0.0}


def png(number: int) -> bytes:
    """An image of a few pixels that no other number gives."""
    values = np.frombuffer(number.to_bytes(4, "big") * 6, dtype=np.uint8).reshape(2, 4, 3)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


class Memory:
    """Images that are in no folder, and how they are packed."""

    def __init__(self, contents: Sequence[tuple[str, int, bytes]], **options: Any) -> None:
        self.contents = {path: content for path, _, content in contents}
        self.files = tuple(ImageFile(path, label, len(data)) for path, label, data in contents)
        self.listing = Listing(CLASS_IDS, CLASS_IDS, {options.pop("split", "train"): self.files})
        given = {"samples_per_shard": 4, "compression": "none"} | INGEST | options
        self.seed = given.pop("seed", 0)
        self.shard = ShardParams(**{name: given.pop(name) for name in ShardParams.model_fields})
        self.ingest = IngestParams(**given)

    def __call__(self, file: ImageFile) -> bytes:
        return self.contents[file.path]

    @property
    def plan(self) -> list[PlannedShard]:
        return packing.plan_shards(
            self.listing, seed=self.seed, shard=self.shard, ingest=self.ingest
        )

    def maker(self, work: Path, read: Read | None = None) -> ShardMaker:
        work.mkdir(parents=True, exist_ok=True)
        return ShardMaker(read or self, {"train": len(self.files)}, self.shard, self.ingest, work)

    def pack(self, folder: Path, read: Read | None = None, **options: Any) -> ShardIndex[ImageInfo]:
        """What the stage does: in `folder / "work"`, published in `folder / "out"`."""
        work, out = folder / "work", folder / "out"
        maker = self.maker(work, read)
        out.mkdir(exist_ok=True)
        made = map_shards(self.plan, maker, work, name_of=name_of, **options)
        packing.publish(self.listing, made, maker, out, seed=self.seed)
        return ShardIndex.read(out, ImageInfo)


def memory(num_images: int = 10, *, bad: Sequence[int] = (), **options: Any) -> Memory:
    contents = [
        (f"train/{CLASS_IDS[i % 3]}/{i}.png", i % 3, BAD if i in bad else png(i))
        for i in range(num_images)
    ]
    return Memory(contents, **options)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quarantined(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / packing.QUARANTINE_NAME).read_text())["train"]


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=30)
images = st.dictionaries(
    st.tuples(st.sampled_from(CLASS_IDS), names.map(lambda name: name.replace(".", "_"))),
    st.one_of(st.binary(max_size=1500).map(lambda tail: png(0) + tail), st.just(BAD)),
    max_size=25,
)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), contents=images)
def test_nothing_is_lost_or_doubled(data: Any, contents: dict[Any, bytes]):
    """Any names, classes and sizes; any order of the work; some of it done before a kill."""
    samples_per_shard = data.draw(st.integers(1, 9))
    named = {(class_id, "x"): png(0) for class_id in CLASS_IDS}
    named |= {(class_id, f"x_{name}"): content for (class_id, name), content in contents.items()}
    source = Memory(
        [(f"train/{c}/{n}.png", CLASS_IDS.index(c), content) for (c, n), content in named.items()],
        samples_per_shard=samples_per_shard,
        seed=data.draw(st.integers(0, 2**32 - 1)),
        max_quarantined=0.99,
    )
    plan = source.plan
    planned = [file for shard in plan for file in shard.files]
    assert sorted(planned, key=str) == sorted(source.files, key=str)
    assert all(1 <= len(shard.files) <= samples_per_shard for shard in plan)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        earlier = data.draw(st.permutations(plan))[: data.draw(st.integers(0, len(plan)))]
        map_shards(earlier, source.maker(folder / "work"), folder / "work", name_of=name_of)
        index = source.pack(folder)
        assert all(shard.num_samples for shard in index.shards("train"))
        read = [image_of(record) for record in read_split(folder / "out", "train")]
        left_out = [(item["key"], item["path"]) for item in quarantined(folder / "out")]
    good = [file for file in planned if source(file) != BAD]
    assert [(sample.key, sample.image, sample.label) for sample in read] == [
        (file.key, source(file), file.label) for file in good
    ]
    assert left_out == [(file.key, file.path) for file in planned if source(file) == BAD]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path):
    options = {"compression": "gzip", "seed": 3, "verify": "full", "max_quarantined": 0.1}
    source = memory(40, bad=[17], samples_per_shard=7, **options)
    for file in source.files:
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).write_bytes(source(file))
    read = functools.partial(read_file, tmp_path)
    results: list[dict[str, bytes]] = []
    for number in (0, 2):
        source.pack(tmp_path / str(number), read, num_workers=number)
        results.append(content_of(tmp_path / str(number) / "out"))
    assert len(results[0]) == len(source.plan) + 2 > 7
    assert results[0] == results[1]


@pytest.mark.parametrize(("split", "number"), [("train", 0), ("val", 1)])
def test_order_is_numpys_seeded_permutation(split: str, number: int):
    """So that shards of earlier versions stay what they were."""
    source = memory(10, seed=5, split=split)
    order = np.random.default_rng([5, number]).permutation(10)
    planned = [file for shard in source.plan for file in shard.files]
    assert planned == [source.files[index] for index in order]
    assert [shard.name for shard in source.plan] == [f"{split}-0000{n}.tar" for n in range(3)]


def test_shards_are_cut_where_they_would_grow_too_large():
    """Planned from sizes alone; a larger image has a shard of its own."""
    sizes = [300_000, 2_000_000, 90_000] * 4
    source = Memory(
        [(f"train/a/{number}.png", 0, bytes(size)) for number, size in enumerate(sizes)],
        samples_per_shard=100,
        max_shard_megabytes=1,
    )
    limit, plan = 1_000_000, source.plan
    alone = [shard for shard in plan if shard.num_bytes > limit]
    assert [[file.num_bytes for file in shard.files] for shard in alone] == [[2_000_000]] * 4
    for shard, following in itertools.pairwise(plan):  # none could have held one more
        assert shard.num_bytes + packing.tar_bytes(following.files[0].num_bytes) > limit


def test_webdataset_reads_what_is_kept(tmp_path: Path):
    source = memory(10, bad=[4], max_quarantined=0.1)
    shards = source.pack(tmp_path).shards("train")
    for planned, shard in zip(source.plan, shards, strict=True):
        assert -4096 < shard.num_bytes - planned.num_bytes <= 10240  # what the plan expected
    urls = [str(tmp_path / "out" / shard.name) for shard in shards]
    read = {item["__key__"]: item for item in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(read) == sorted(file.key for file in source.files if "4" not in file.path)
    assert all(item["png"] == png(int(re.split("[/%]", key)[1])) for key, item in read.items())


def test_index_tells_what_there_is(tmp_path: Path):
    source, grey = memory(10, bad=[4, 5]), io.BytesIO()
    Image.new("L", (4, 4), 7).save(grey, "JPEG")
    broken = png(0).replace(b"IHDR", b"IHDX")
    changed = {"train/a/0.png": broken, "train/a/3.png": grey.getvalue()}
    source = Memory(
        [(f.path, f.label, changed.get(f.path, source(f))) for f in source.files],
        max_quarantined=0.3,
    )
    ignored = {"train": {".gif": 2, "hidden": 1}}
    source.listing = replace(source.listing, ignored=ignored)
    index = source.pack(tmp_path)
    assert index.info.model_dump() == {
        "kind": "images",
        "class_ids": CLASS_IDS,
        "class_names": list(CLASS_IDS),
        "seed": 0,
        "class_counts": {"train": [3, 2, 2]},
        "irregularities": {"train": {"greyscale": 1, "jpeg_named_png": 1}},
        "num_quarantined": {"train": 3},
        "ignored": ignored,
    }
    assert index.num_samples("train") == 7
    reason = "not a readable image (unknown format)"
    listed = sorted((item["key"], item["reason"]) for item in quarantined(tmp_path / "out"))
    assert listed == [(f"{name}%2Epng", reason) for name in ("a/0", "b/4", "c/5")]
    assert list(packing.describe(index.info)) == [
        "train images: 1 greyscale, 1 jpeg_named_png",
        "train: 3 unreadable images are left out; quarantine.json lists them",
        "train images; ignored files: 2 .gif, 1 hidden",
    ]


def test_too_many_unreadable_images_are_refused(tmp_path: Path):
    """Before the other shards are made, and what is whole is kept."""
    source = memory(16, bad=[2, 3, 7, 8, 9, 11], max_quarantined=0.1)
    read = Mock(side_effect=source)
    with pytest.raises(ValueError, match=r"^ingest\.max_quarantined: \d of 16 train") as caught:
        source.pack(tmp_path, read)
    assert read.call_count < 16
    with pytest.raises(ValueError, match=r"1 of 10 train images cannot be read"):
        memory(10, bad=[2]).pack(tmp_path / "none")
    listed = quarantined(tmp_path / "work")
    assert 1 < len(listed) <= 6
    assert f"{listed[0]['path']}: not a readable image (unknown format)" in str(caught.value)
    assert str(tmp_path / "work" / "quarantine.json") in str(caught.value)
    missing = missing_items(source.plan, tmp_path / "work", name_of=name_of)
    patient = memory(16, bad=[2, 3, 7, 8, 9, 11], max_quarantined=6 / 16)  # no more than that
    read = Mock(side_effect=source)
    patient.pack(tmp_path, read)
    assert len(quarantined(tmp_path / "out")) == 6
    assert read.call_count == sum(len(planned.files) for planned in missing) < 16
    with pytest.raises(ValueError, match=r"all train images of class b are unreadable"):
        memory(9, bad=[1, 4, 7], max_quarantined=0.5).pack(tmp_path / "without b")


def test_image_that_changes_meanwhile_is_no_damaged_one(tmp_path: Path):
    source = memory(3, max_quarantined=0.9)
    with pytest.raises(ValueError, match=r"^data\.root: train/./\d\.png has \d+ bytes, but had"):
        source.pack(tmp_path, lambda file: source(file) + b"x")
    read = functools.partial(read_file, tmp_path)
    with pytest.raises(ValueError, match=r"^data\.root: .*\d\.png cannot be read: No such"):
        source.pack(tmp_path, read)
    assert not list((tmp_path / "work").glob("*.tar"))


def test_whole_shards_alone_are_found_after_a_kill(tmp_path: Path):
    source = memory(10)
    expected = source.pack(tmp_path / "undisturbed")
    files = [file for planned in source.plan for file in planned.files]
    with pytest.raises(KeyboardInterrupt):
        source.pack(tmp_path, Mock(side_effect=[*map(source, files[:5]), KeyboardInterrupt]))
    work = tmp_path / "work"
    assert [path.name for path in work.glob("*.tar")] == ["train-00000.tar"]
    (work / "train-00001.tar").write_bytes(b"half")  # without its note
    read = Mock(side_effect=source)
    assert source.pack(tmp_path, read) == expected
    assert read.call_count == 6
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed/out")


def test_full_disk_leaves_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Room for one of three: the second leaves nothing, and with more room the work goes on."""
    source = memory(10)
    expected, room = source.pack(tmp_path / "undisturbed"), 7

    def write(self: TarWriter, record: Any) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            self.stream.write(b"part of a header")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(self, record)

    written = TarWriter.write
    monkeypatch.setattr(TarWriter, "write", write)
    shard = re.escape(str(tmp_path / "work/train-00001.tar"))
    message = rf"^{shard}: no space is left .*, then run the"
    with pytest.raises(ValueError, match=message):
        source.pack(tmp_path)
    left = {path.name for path in (tmp_path / "work").glob("*.tar*")}
    assert left == {"train-00000.tar", "train-00000.tar.json"}
    assert list((tmp_path / "out").iterdir()) == []
    room = 1000
    assert source.pack(tmp_path) == expected


@pytest.mark.parametrize("is_linked", [True, False])
def test_shards_appear_where_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_linked: bool
):
    if not is_linked:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "another disk")))
    memory(4).pack(tmp_path)
    work, out = (tmp_path / name / "train-00000.tar" for name in ("work", "out"))
    assert (work.read_bytes(), work.samefile(out)) == (out.read_bytes(), is_linked)


def test_impossible_parameters_are_refused():
    share = "max_quarantined"
    for name, value in ((share, 1.0), (share, -0.1), ("resize", 0), ("verify", "none")):
        with pytest.raises(ValidationError, match=name):
            IngestParams.model_validate(INGEST | {name: value})
