"""Nothing is lost, doubled, reordered or silently damaged."""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from contradiff.data.shard_info import ShardInfo
from contradiff.data.shards import (
    INDEX_NAME,
    Compression,
    Record,
    Sample,
    ShardIndex,
    array_from_bytes,
    array_to_bytes,
    image_of,
    image_record,
    read_images,
    read_shard,
    read_split,
    write_shard,
    write_split,
)

each_compression = pytest.mark.parametrize("compression", ["none", "gzip"])
RNG = np.random.default_rng(0)


def record(number: int, *, num_bytes: int = 700) -> Record:
    image = RNG.integers(256, size=num_bytes, dtype=np.uint8).tobytes()
    return image_record(Sample(f"n0{number % 3}_{number}", image, number % 3), extension="jpg")


RECORDS = [record(number) for number in range(10)]


def write_folder(folder: Path, compression: Compression = "none") -> ShardIndex[ShardInfo]:
    shards = write_split(folder, "train", RECORDS, samples_per_shard=4, compression=compression)
    index = ShardIndex({"train": shards}, ShardInfo(seed=1))
    index.write(folder)
    return index


@each_compression
def test_round_trip(tmp_path: Path, compression: Compression):
    index = write_folder(tmp_path, compression)
    assert ShardIndex.read(tmp_path, ShardInfo) == index
    assert [shard.num_samples for shard in index.shards("train")] == [4, 4, 2]
    assert index.num_samples("train") == 10
    assert list(read_split(tmp_path, "train")) == RECORDS
    assert list(read_images(tmp_path, "train")) == [image_of(item) for item in RECORDS]


@each_compression
@settings(max_examples=30)
@given(
    contents=st.dictionaries(
        st.text("abcXYZ019_-éß/ ", min_size=1, max_size=40).filter(lambda key: key[-1] != "/"),
        st.tuples(st.binary(max_size=2000), st.integers(0, 999)),
        max_size=12,
    ),
    samples_per_shard=st.integers(1, 13),
)
def test_nothing_is_lost_or_doubled(
    contents: dict[str, tuple[bytes, int]], samples_per_shard: int, compression: Compression
):
    samples = [Sample(key, image, label) for key, (image, label) in contents.items()]
    told: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        records = (image_record(sample, extension="png") for sample in samples)
        size = {"samples_per_shard": samples_per_shard, "compression": compression}
        shards = write_split(Path(name), "val", records, **size, on_progress=told.append)
        ShardIndex({"val": shards}, ShardInfo()).write(Path(name))
        assert list(read_images(Path(name), "val")) == samples
    assert sum(told) == len(samples)
    assert len(shards) == -(-len(samples) // samples_per_shard)
    assert all(shard.num_samples == samples_per_shard for shard in shards[:-1])


@each_compression
def test_equal_records_give_equal_bytes(
    tmp_path: Path, compression: Compression, monkeypatch: pytest.MonkeyPatch
):
    first = write_shard(tmp_path / "a" / "x.tar", RECORDS, compression=compression)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert first == write_shard(tmp_path / "b" / "x.tar", RECORDS, compression=compression)
    third = write_shard(tmp_path / "c" / "x.tar", RECORDS[::-1], compression=compression)
    assert third.sha256 != first.sha256


@each_compression
def test_webdataset_reads_them(tmp_path: Path, compression: Compression):
    index = write_folder(tmp_path, compression)
    urls = [str(tmp_path / shard.name) for shard in index.shards("train")]
    read = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    assert [(item["__key__"].encode(), item["jpg"], item["cls"]) for item in read] == [
        (item["__key__"], item["jpg"], item["cls"]) for item in RECORDS
    ]


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{INDEX_NAME}: missing; run `dvc repro`"):
        ShardIndex.read(tmp_path, ShardInfo)
    index = write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'val', only \['train'\]"):
        index.shards("val")
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.tar: missing, though .*dvc pull"):
        ShardIndex.read(tmp_path, ShardInfo)
    for content in ("", "[]", '{"splits": {"train": [{"name": "a.tar"}]}, "facts": {}}'):
        (tmp_path / INDEX_NAME).write_text(content)
        with pytest.raises(ValueError, match=r"index\.json: damaged \(.*dvc pull"):
            ShardIndex.read(tmp_path, ShardInfo)


@each_compression
@pytest.mark.parametrize("kept", [0, 1, 600, -1])
def test_truncated_shard_is_named(tmp_path: Path, compression: Compression, kept: int):
    shard = write_folder(tmp_path, compression).shards("train")[1]
    path = tmp_path / shard.name
    path.write_bytes(path.read_bytes()[:kept])
    for read in (
        partial(ShardIndex.read, tmp_path, ShardInfo),
        partial(next, read_shard(path, shard)),
    ):
        with pytest.raises(ValueError, match=rf"{shard.name}: truncated or overwritten"):
            read()


@each_compression
def test_any_wrong_byte_is_noticed(tmp_path: Path, compression: Compression):
    """Also where tar would take it for an image's, or read the archive as shorter than it is."""
    shard = write_folder(tmp_path, compression).shards("train")[1]
    path = tmp_path / shard.name
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 231), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name}: damaged .*dvc pull") as caught:
            list(read_shard(path, shard))
        assert "\n" not in str(caught.value)


def test_index_with_another_count_is_noticed(tmp_path: Path):
    shard = write_folder(tmp_path).shards("train")[0]
    wrong = replace(shard, num_samples=5)
    with pytest.raises(ValueError, match=r"train-00000.tar: has 4 samples, but index.json says 5"):
        list(read_shard(tmp_path / shard.name, wrong))


def test_failed_writer_leaves_no_shard(tmp_path: Path):
    def records() -> Iterator[Record]:
        yield RECORDS[0]
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        write_shard(tmp_path / "x.tar", records(), compression="gzip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8"])
def test_arrays_round_trip(dtype: str):
    array = RNG.normal(size=(3, 2, 4)).astype(dtype)
    for stored in (array, np.asfortranarray(array), array[0, 0, :1], array[:0]):
        content = array_to_bytes(stored)
        read, expected = array_from_bytes(content), np.load(io.BytesIO(content))
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        assert read.flags.writeable
        np.testing.assert_array_equal(read, stored)


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_an_array_that_is_cut_off_is_refused(cut: int):
    content = array_to_bytes(RNG.normal(size=(3, 2)))
    with pytest.raises(ValueError, match=r"magic|header|buffer"):
        array_from_bytes(content[:cut])


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="OBJECT array"):
        array_from_bytes(buffer.getvalue())
