"""And tally: nothing lost or doubled, at any size, order or kill."""

import errno
import functools
import io
import itertools
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from webdataset.writer import TarWriter

from contradiff import files as disk
from contradiff.data.shard_info import ShardInfo
from contradiff.data.shards import Compression, ShardIndex, image_of, read_split
from contradiff.sources.folder import FileReader
from contradiff.sources.listing import ImageFile
from contradiff.sources.packing import (
    IngestParams,
    PlannedShard,
    Read,
    Recipe,
    check_space,
    find_done,
    plan_shards,
    publish,
    tar_bytes,
    write_planned,
)
from contradiff.sources.pool import run_jobs
from contradiff.sources.tally import QUARANTINE_NAME, Tally

PLAIN = Recipe(compression="none", verify="header", resize=None)
CLASS_IDS = ("a", "b", "c")
BAD = b"<html>404</html>"


def png(number: int) -> bytes:
    """An image of a few pixels that no other number gives."""
    values = np.frombuffer(number.to_bytes(4, "big") * 6, dtype=np.uint8).reshape(2, 4, 3)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


class Memory:
    """Images that are in no folder."""

    def __init__(self, contents: Sequence[tuple[str, int, bytes]]) -> None:
        self.files = tuple(ImageFile(path, label) for path, label, _ in contents)
        self.contents = {path: content for path, _, content in contents}

    def __call__(self, file: ImageFile) -> bytes:
        return self.contents[file.path]

    def plan(self, **options: Any) -> list[PlannedShard]:
        sizes = [len(self.contents[file.path]) for file in self.files]
        given = {"split": "train", "seed": 0, "samples_per_shard": 4, "max_bytes": None}
        return plan_shards(self.files, sizes, **(given | {"compression": "none"} | options))


def memory(num_images: int = 10, *, bad: Sequence[int] = ()) -> Memory:
    return Memory(
        [
            (f"train/{CLASS_IDS[i % 3]}/{i}.png", i % 3, BAD if i in bad else png(i))
            for i in range(num_images)
        ]
    )


def write_all(
    plan: Sequence[PlannedShard],
    folder: Path,
    read: Read,
    *,
    recipe: Recipe = PLAIN,
    max_quarantined: float = 0.0,
    num_workers: int = 0,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Tally:
    """What the stage does: find, write, publish in `folder / "out"`."""
    work, out = folder / "work", folder / "out"
    for path in (work, out):
        path.mkdir(parents=True, exist_ok=True)
    tally, missing = Tally(plan, max_quarantined=max_quarantined), []
    for planned in plan:
        if done := find_done(planned, work, recipe=recipe):
            tally.add(planned, done, folder=work)
        else:
            missing.append(planned)
    task = functools.partial(write_planned, folder=work, read=read, recipe=recipe)
    for planned, done in run_jobs(task, missing, num_workers=num_workers, on_progress=on_progress):
        tally.add(planned, done, folder=work)
    shards = tally.shards("train")
    publish(shards, work=work, folder=out)
    ShardIndex({"train": shards}, ShardInfo(**tally.facts(class_ids=CLASS_IDS))).write(out)
    tally.write_quarantine(out)
    return tally


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=30)
images = st.dictionaries(
    st.tuples(st.sampled_from(CLASS_IDS), names.map(lambda name: name.replace(".", "_"))),
    st.one_of(st.binary(max_size=1500).map(lambda tail: png(0) + tail), st.just(BAD)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), contents=images, samples_per_shard=st.integers(1, 9))
def test_nothing_is_lost_or_doubled(data: Any, contents: dict[Any, bytes], samples_per_shard: int):
    """Any names, classes and sizes; any order of the work; some of it done before a kill."""
    source = Memory(
        [
            (f"train/{class_id}/x_{name}.png", CLASS_IDS.index(class_id), content)
            for (class_id, name), content in contents.items()
        ]
    )
    max_bytes = data.draw(st.one_of(st.none(), st.integers(1, 20_000)))
    seed = data.draw(st.integers(0, 2**32))
    options = {"samples_per_shard": samples_per_shard, "max_bytes": max_bytes, "seed": seed}
    plan = source.plan(**options)
    assert plan == source.plan(**options)
    planned = [file for part in plan for file in part.files]
    assert sorted(planned, key=str) == sorted(source.files, key=str)
    for part in plan:
        assert 1 <= len(part.files) <= samples_per_shard
        assert max_bytes is None or part.num_bytes <= max_bytes or len(part.files) == 1

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        order = data.draw(st.permutations(plan))
        for part in order[: data.draw(st.integers(0, len(plan)))]:  # an earlier run
            write_planned(part, folder / "work", read=source, recipe=PLAIN)
        tally = Tally(plan, max_quarantined=0.99)
        for part in data.draw(st.permutations(plan)):
            done = find_done(part, folder / "work", recipe=PLAIN)
            done = done or write_planned(part, folder / "work", read=source, recipe=PLAIN)
            if all(content == BAD for content in contents.values()):
                break
            tally.done[part.split, part.name] = done
        shards = tally.shards("train")
        ShardIndex({"train": shards}, ShardInfo()).write(folder / "work")
        read = [image_of(record) for record in read_split(folder / "work", "train")]
    if not tally.done:
        return
    good = [file for file in planned if source(file) != BAD]
    assert [sample.key for sample in read] == [file.key for file in good]
    assert [sample.image for sample in read] == [source(file) for file in good]
    assert [sample.label for sample in read] == [file.label for file in good]
    left_out = [(item.key, item.path) for item in tally.quarantined("train")]
    assert left_out == [(file.key, file.path) for file in planned if source(file) == BAD]
    counts = Counter[int]()
    for shard in shards:
        counts.update(dict(enumerate(shard.class_counts)))
    assert +counts == Counter(file.label for file in good)


@pytest.mark.parametrize(("compression", "num_workers"), [("none", 3), ("gzip", 2)])
def test_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, compression: Compression, num_workers: int
):
    tree = tmp_path / "tree"
    for number in range(40):
        path = tree / f"train/{CLASS_IDS[number % 3]}/{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BAD if number == 17 else png(number))
    files = [ImageFile(f"train/{CLASS_IDS[n % 3]}/{n}.JPEG", n % 3) for n in range(40)]
    sizes = [(tree / file.path).stat().st_size for file in files]
    plan = plan_shards(
        files,
        sizes,
        split="train",
        seed=3,
        samples_per_shard=7,
        max_bytes=10_000,
        compression=compression,
    )
    recipe = Recipe(compression=compression, verify="full", resize=None)
    results: list[dict[str, bytes]] = []
    for number in (0, num_workers):
        told: list[int] = []
        folder = tmp_path / str(number)
        tally = write_all(
            plan,
            folder,
            FileReader(tree),
            recipe=recipe,
            max_quarantined=0.1,
            num_workers=number,
            on_progress=told.append,
        )
        assert sum(told) == 40
        assert tally.oddities("train") == {"png_named_jpeg": 39}
        results.append(content_of(folder / "out"))
    assert len(results[0]) == len(plan) + 2 > 7
    assert results[0] == results[1]


def test_order_is_numpys_seeded_permutation():
    """So that shards of earlier versions stay what they were."""
    source = memory(10)
    plan = source.plan(seed=5, split="val")
    order = np.random.default_rng([5, 1]).permutation(10)
    assert [file for part in plan for file in part.files] == [source.files[i] for i in order]
    assert [part.name for part in plan] == [f"val-0000{number}.tar" for number in range(3)]
    assert source.plan(seed=6, split="val") != plan
    assert source.plan(seed=5)[0].files != plan[0].files


def test_shards_are_cut_where_they_would_grow_too_large():
    source = Memory([(f"train/a/{i}.png", 0, bytes(n)) for i, n in enumerate([600, 5000, 100] * 4)])
    limit = 2 * tar_bytes(600)
    plan = source.plan(samples_per_shard=100, max_bytes=limit)
    assert max(part.num_bytes for part in plan if len(part.files) > 1) <= limit
    alone = [part for part in plan if part.num_bytes > limit]
    assert [part.sizes for part in alone] == [(5000,)] * 4
    for part, following in itertools.pairwise(plan):  # none could have held one more
        assert part.num_bytes + tar_bytes(following.sizes[0]) > limit


def test_planned_size_is_the_tars(tmp_path: Path):
    plan = memory(40).plan(samples_per_shard=40)
    done = write_planned(plan[0], tmp_path, read=memory(40), recipe=PLAIN)
    assert done.shard is not None
    assert 0 < done.shard.num_bytes - plan[0].num_bytes <= 10240


def test_webdataset_reads_what_is_kept(tmp_path: Path):
    source = memory(10, bad=[4])
    tally = write_all(source.plan(), tmp_path, source, max_quarantined=0.1)
    urls = [str(tmp_path / "out" / shard.name) for shard in tally.shards("train")]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(item["__key__"] for item in read) == sorted(
        file.key for file in source.files if "4" not in file.path
    )
    assert all(item["png"] == png(int(item["__key__"].split("_")[1])) for item in read)


def test_index_tells_what_there_is(tmp_path: Path):
    source = memory(10, bad=[4, 5])
    source.contents["train/a/0.png"] = png(0).replace(b"IHDR", b"IHDX")
    grey = io.BytesIO()
    Image.new("L", (4, 4), 7).save(grey, "JPEG")
    source.contents["train/a/3.png"] = grey.getvalue()
    tally = write_all(source.plan(), tmp_path, source, max_quarantined=0.3)
    index = ShardIndex.read(tmp_path / "out", ShardInfo)
    assert index.info.model_dump() == {
        "class_counts": {"train": [3, 2, 2]},
        "oddities": {"train": {"greyscale": 1, "jpeg_named_png": 1}},
        "num_quarantined": {"train": 3},
    }
    assert index.num_samples("train") == 7
    listed = json.loads((tmp_path / "out" / QUARANTINE_NAME).read_text())["train"]
    assert [item["path"] for item in listed] == [q.path for q in tally.quarantined("train")]
    reason = "not a readable image (unknown format)"
    assert sorted((item["key"], item["reason"]) for item in listed) == [
        ("a_0", reason),
        ("b_4", reason),
        ("c_5", reason),
    ]


def test_shard_without_any_readable_image_is_none(tmp_path: Path):
    source = memory(10)
    plan = source.plan()
    for file in plan[1].files:
        source.contents[file.path] = BAD
    plan = source.plan()
    for _ in range(2):  # again from the notes
        tally = write_all(plan, tmp_path, source, max_quarantined=0.9)
        names = [shard.name for shard in tally.shards("train")]
        assert names == ["train-00000.tar", "train-00002.tar"]
        (tmp_path / "out" / names[0]).unlink()
        (tmp_path / "out" / names[1]).unlink()


def test_too_many_unreadable_images_are_refused(tmp_path: Path):
    source = memory(10, bad=[2, 3, 7])
    plan = source.plan()
    with pytest.raises(ValueError, match=r"^ingest\.max_quarantined: 3 of 10 train") as caught:
        write_all(plan, tmp_path, source, max_quarantined=0.2)
    assert "train/c/2.png: not a readable image (unknown format)" in str(caught.value)
    listed = json.loads((tmp_path / "work" / QUARANTINE_NAME).read_text())["train"]
    assert len(listed) == 3
    assert str(tmp_path / "work" / QUARANTINE_NAME) in str(caught.value)

    kept = [part for part in plan if find_done(part, tmp_path / "work", recipe=PLAIN)]
    assert kept
    for file in kept[0].files:
        del source.contents[file.path]  # it will not be read again
    raised = write_all(plan, tmp_path, source, max_quarantined=0.3)
    assert len(raised.quarantined("train")) == 3


def test_share_of_zero_allows_none_and_an_exact_share_is_allowed(tmp_path: Path):
    source = memory(10, bad=[2])
    with pytest.raises(ValueError, match=r"1 of 10 train images cannot be read"):
        write_all(source.plan(), tmp_path, source)
    write_all(source.plan(), tmp_path, source, max_quarantined=0.1)


def test_class_without_readable_images_is_named(tmp_path: Path):
    source = memory(9, bad=[1, 4, 7])
    with pytest.raises(ValueError, match=r"all train images of class b are unreadable"):
        write_all(source.plan(), tmp_path, source, max_quarantined=0.5)


@pytest.mark.parametrize(
    ("first", "second"), [("train/a/x.png", "train/a/x.jpg"), ("train/a/a_x.png", "train/a/x.png")]
)
def test_two_images_of_one_key_are_named(first: str, second: str):
    source = Memory([(first, 0, png(0)), (second, 0, png(1))])
    with pytest.raises(ValueError, match="would both be a_x: rename one") as caught:
        source.plan()
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_name_that_is_not_utf8_is_refused():
    source = Memory([(os.fsdecode(b"train/a/\xff.png"), 0, png(0))])
    with pytest.raises(ValueError, match=r"^data\.root: .* is not named in UTF-8: rename it"):
        source.plan()


def test_image_that_changes_meanwhile_is_named(tmp_path: Path):
    source = memory(3)
    plan = source.plan()
    source.contents["train/b/1.png"] += b"more"
    with pytest.raises(ValueError, match=r"^data\.root: train/b/1\.png has \d+ bytes, but had"):
        write_planned(plan[0], tmp_path, read=source, recipe=PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_missing_image_is_no_damaged_one(tmp_path: Path):
    plan = memory(3).plan()
    with pytest.raises(ValueError, match=r"\.png cannot be read: No such file"):
        write_planned(plan[0], tmp_path, read=FileReader(tmp_path), recipe=PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_whole_shards_alone_are_found_after_a_kill(tmp_path: Path):
    source = memory(10)
    plan = source.plan()
    expected = write_all(plan, tmp_path / "undisturbed", source)
    num_read = 0

    def dying(file: ImageFile) -> bytes:
        nonlocal num_read
        num_read += 1
        if num_read == 6:
            raise KeyboardInterrupt
        return source(file)

    with pytest.raises(KeyboardInterrupt):
        write_all(plan, tmp_path, dying)
    work = tmp_path / "work"
    assert sorted(path.name for path in work.iterdir()) == [
        "train-00000.tar",
        "train-00000.tar.json",
    ]
    (work / "train-00001.tar").write_bytes(b"half")  # without its note
    num_read = 100
    resumed = write_all(plan, tmp_path, dying)
    assert num_read == 106
    assert resumed.shards("train") == expected.shards("train")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed/out")


@pytest.mark.parametrize("change", ["recipe", "plan", "moved", "cut"])
def test_shard_of_other_work_is_not_taken(tmp_path: Path, change: str):
    source = memory(4)
    part = source.plan()[0]
    done = write_planned(part, tmp_path, read=source, recipe=PLAIN)
    assert find_done(part, tmp_path, recipe=PLAIN) == done
    recipe = PLAIN
    if change == "recipe":
        recipe = Recipe(compression="none", verify="header", resize=8)
    elif change == "plan":
        part = source.plan(seed=1)[0]
    elif change == "moved":
        (tmp_path / part.name).unlink()
    else:
        os.truncate(tmp_path / part.name, 700)
    assert find_done(part, tmp_path, recipe=recipe) is None


def test_full_disk_leaves_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Room for two of three: the third leaves nothing, and with more room the work goes on."""
    source = memory(10)
    plan = source.plan()
    expected = write_all(plan, tmp_path / "undisturbed", source)
    room = 7

    def write(self: TarWriter, record: Any) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            self.stream.write(b"part of a header")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(self, record)

    written = TarWriter.write
    monkeypatch.setattr(TarWriter, "write", write)
    message = rf"^{re.escape(str(tmp_path / 'work'))}: no space is left .* free some, then run the"
    with pytest.raises(ValueError, match=message):
        write_all(plan, tmp_path, source)
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {"train-00000.tar", "train-00000.tar.json"}
    assert list((tmp_path / "out").iterdir()) == []
    room = 1000
    assert write_all(plan, tmp_path, source).shards("train") == expected.shards("train")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_disk_that_is_really_full_is_told(tmp_path: Path):
    part = memory(4).plan()[0]
    (tmp_path / f".{part.name}.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="no space is left on the disk"):
        write_planned(part, tmp_path, read=memory(4), recipe=PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = memory(40).plan()

    def usage(_path: Path) -> Any:
        return type("Usage", (), {"free": disk.SPARE_BYTES + 100_000})

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    check_space(plan, plan[:3], work=tmp_path, target=tmp_path)
    check_space(plan, [], work=tmp_path, target=tmp_path)
    with pytest.raises(ValueError, match=r"kB are to be written and 50\.1 MB are free, of") as e:
        check_space(plan * 10, plan * 10, work=tmp_path, target=tmp_path)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("is_linked", [True, False])
def test_shards_appear_where_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_linked: bool
):
    if not is_linked:
        monkeypatch.setattr(os, "link", functools.partial(refuse, errno.EXDEV))
    source = memory(4)
    write_all(source.plan(), tmp_path, source)
    work, out = (tmp_path / name / "train-00000.tar" for name in ("work", "out"))
    assert work.read_bytes() == out.read_bytes()
    assert work.samefile(out) == is_linked


def refuse(number: int, *_arguments: object) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"max_quarantined": 1.0}, "less than 1"),
        ({"max_quarantined": -0.1}, "greater than or equal to 0"),
        ({"verify": "none"}, "'full' or 'header'"),
        ({"resize": 0}, "greater than or equal to 8"),
        ({"max_shard_megabytes": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_parameters_are_refused(changes: dict[str, Any], fault: str):
    valid = {"max_shard_megabytes": None, "verify": "full", "resize": None, "max_quarantined": 0.0}
    IngestParams.model_validate(valid)
    with pytest.raises(ValidationError, match=fault):
        IngestParams.model_validate(valid | changes)
