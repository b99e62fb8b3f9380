"""Read and write shards: tar files of many images or latents.

A folder of shards contains `index.json` and tar files such as `train-00000.tar`. WebDataset can
read the tar files.
"""

import gzip
import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Shaped
from numpy.lib.format import read_array_header_1_0, read_magic
from pydantic import BaseModel, ConfigDict, Field

from contradiff.config import Section
from contradiff.data.remote import Location, join, open_file, read_bytes, size_of
from contradiff.data.shard_info import ShardInfo
from contradiff.files import explain_damage, replace_file, sha256_of

INDEX_NAME = "index.json"
_WRONG_DIGEST = f"damaged (its sha256 is not the one in {INDEX_NAME})"
REMEDY = "run `dvc repro`, or fetch the shards with `dvc pull`"
Compression = Literal["none", "gzip"]
Record = Mapping[str, bytes]
"""One sample of a shard: file extension => content. "__key__" => the sample's unique name."""
InfoT = TypeVar("InfoT", bound=ShardInfo)


class ShardParams(Section):
    """Section `shard`: how samples are packed into shards."""

    samples_per_shard: int = Field(ge=1)
    compression: Compression = Field(description="gzip: half the size, if images are small")


Natural = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Shard:
    """One tar file. The annotations with limits are checked when an index is read."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # so that it cannot leave its folder
    num_samples: Natural
    num_bytes: Natural
    sha256: str


@dataclass(frozen=True)
class Sample:
    """An image as a shard stores it: unique key, encoded bytes (such as a JPEG), class index."""

    key: str
    image: bytes
    label: int


class _IndexFile(BaseModel):
    """The form of index.json."""

    model_config = ConfigDict(extra="forbid", strict=True)

    splits: dict[str, tuple[Shard, ...]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class ShardIndex(Generic[InfoT]):
    """The content of index.json: each split's shards in order, and facts about all shards.

    `path` is the place of the file that was read.
    """

    splits: Mapping[str, tuple[Shard, ...]]
    info: InfoT
    path: Location = field(default=INDEX_NAME, compare=False)

    @classmethod
    def read(cls, folder: Location, kind: type[InfoT]) -> "ShardIndex[InfoT]":
        """Read a folder's index, and check that each listed shard exists and has the right size.

        Raises ValueError if the index or a shard is missing or not as expected, and OSError if a
        server cannot be reached.
        """
        path = join(folder, INDEX_NAME)
        try:
            content = read_bytes(path)
        except FileNotFoundError as error:
            raise _fault(path, "missing") from error
        with explain_damage(path, remedy=_remedy(path)):
            file = _IndexFile.model_validate_json(content)
            info = kind.model_validate(file.facts)
        shards = list(chain(*file.splits.values()))
        places = [join(folder, shard.name) for shard in shards]
        # Ask a server for many sizes at once, because each answer takes long.
        with ThreadPoolExecutor(16 if isinstance(folder, str) else 1) as pool:
            list(pool.map(_check_size, places, shards))
        return ShardIndex(file.splits, info, path)

    def write(self, folder: Path) -> None:
        """Write `index.json`. Call this only when every shard is complete."""
        splits = {split: list(map(asdict, shards)) for split, shards in self.splits.items()}
        content = {"splits": splits, "facts": self.info.model_dump(mode="json")}
        with replace_file(folder / INDEX_NAME) as path:
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def num_samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return sum(shard.num_samples for shard in self.shards(split))

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Return the shards of a split, in order. Raises ValueError if the split does not exist."""
        if split not in self.splits:
            raise _fault(self.path, f"there is no split {split!r}, only {sorted(self.splits)}")
        return self.splits[split]


def shard_name(split: str, number: int, compression: Compression) -> str:
    """Return a shard's file name, such as `train-00003.tar` or `train-00003.tar.gz`."""
    return f"{split}-{number:05d}.tar" + (".gz" if compression == "gzip" else "")


def write_shard(
    path: Path,
    records: Iterable[Record],
    *,
    compression: Compression,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Shard:
    """Write one shard, completely or not at all. Equal records give equal bytes.

    `on_progress` is called with 1 after each sample.
    """
    from webdataset.writer import TarWriter

    num_samples = 0
    with replace_file(path) as temporary:
        with (
            temporary.open("wb") as file,
            # gzip's header gets no name and no time, so that equal records give equal bytes.
            gzip.GzipFile("", "wb", 6, file, mtime=0)
            if compression == "gzip"
            else nullcontext(file) as stream,
            TarWriter(stream, encoder=False, mtime=0) as writer,  # pyright: ignore[reportArgumentType]
        ):
            for record in records:
                writer.write({**record, "__key__": record["__key__"].decode()})
                num_samples += 1
                on_progress(1)
        num_bytes = temporary.stat().st_size
        return Shard(path.name, num_samples, num_bytes, sha256_of(temporary))


def write_split(
    folder: Path,
    split: str,
    records: Iterable[Record],
    *,
    samples_per_shard: int,
    compression: Compression,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[Shard, ...]:
    """Write a split's shards. `on_progress` is called with each shard's number of samples."""
    records, shards = iter(records), list[Shard]()
    while chunk := list(islice(records, samples_per_shard)):
        path = folder / shard_name(split, len(shards), compression)
        shards.append(write_shard(path, chunk, compression=compression))
        on_progress(len(chunk))
    return tuple(shards)


def read_shard(path: Location, shard: Shard) -> Iterator[dict[str, bytes]]:
    """Yield a shard's samples in order, in the form that `Record` explains.

    Raises ValueError if the shard is damaged. Before its first sample, the sha256 of a local shard
    is compared, once in each process. Some damage of a shard on a server, or after this check, is
    noticed only after the last sample. Raises OSError if a server cannot be reached.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    _check_size(path, shard)
    if isinstance(path, Path):
        _check_digest(path, shard.sha256, path.stat().st_mtime_ns)
    num_samples = 0
    try:
        with open_file(path, num_bytes=shard.num_bytes) as file:
            stream = _HashedStream(file)
            files = tar_file_expander([{"url": str(path), "stream": stream}])
            for sample in group_by_keys(files):
                num_samples += 1
                yield {
                    name: value.encode() if isinstance(value, str) else value
                    for name, value in sample.items()
                    if name == "__key__" or not name.startswith("__")
                }
            stream.read()  # also hash the padding at the end of the tar
    except Exception as error:  # tarfile, gzip and webdataset raise errors of several kinds
        # webdataset adds arguments to the error, so that its text would be a tuple
        reason = getattr(error, "strerror", None) or (error.args or [type(error).__name__])[0]
        is_content = isinstance(error, tarfile.TarError | EOFError | zlib.error | ValueError)
        if isinstance(path, str) and not is_content:  # the server failed
            raise OSError(str(error.args[0]).split(" @ ", maxsplit=1)[0]) from error
        raise _fault(path, f"damaged ({reason})") from error
    if stream.hasher.hexdigest() != shard.sha256:
        raise _fault(path, _WRONG_DIGEST)
    if num_samples != shard.num_samples:
        raise _fault(path, f"has {num_samples} samples, but {INDEX_NAME} says {shard.num_samples}")


def read_split(folder: Location, split: str) -> Iterator[dict[str, bytes]]:
    """Yield a split's samples in order. Raises the errors of `ShardIndex.read` and `read_shard`."""
    for shard in ShardIndex.read(folder, ShardInfo).shards(split):
        yield from read_shard(join(folder, shard.name), shard)


def read_images(folder: Location, split: str) -> Iterator[Sample]:
    """Yield every image of a split, in order."""
    return map(image_of, read_split(folder, split))


def image_record(sample: Sample, *, extension: str) -> Record:
    """Return an image as a WebDataset sample with two files, such as `key.jpg` and `key.cls`."""
    return {"__key__": sample.key.encode(), extension: sample.image, "cls": b"%d" % sample.label}


def image_of(record: Record) -> Sample:
    """Return the image in a record that `image_record` made."""
    key = record["__key__"].decode()
    with explain_damage(key, remedy=REMEDY):
        [extension] = record.keys() & {"jpg", "jpeg", "png", "webp"}
        return Sample(key, record[extension], int(record["cls"]))


def array_to_bytes(array: Shaped[np.ndarray, "..."]) -> bytes:
    """Return an array as the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def array_from_bytes(content: bytes) -> Shaped[np.ndarray, "..."]:
    """Read an array from the content of an .npy file that `array_to_bytes` has written.

    `np.load` takes most of its time to parse the header, which all arrays of a shard share. Raises
    ValueError for damaged content, arrays of objects, and other versions of the format.
    """
    end = 10 + int.from_bytes(content[8:10], "little")
    shape, is_fortran, dtype = _parse_header(content[:end])
    values = np.frombuffer(content, dtype, count=math.prod(shape), offset=end)
    return values.reshape(shape, order="F" if is_fortran else "C").copy()


@lru_cache(maxsize=16)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    stream = io.BytesIO(header)
    if (version := read_magic(stream)) != (1, 0):
        raise ValueError(f"an .npy file of version {version}; np.save writes version (1, 0)")
    shape, is_fortran, dtype = read_array_header_1_0(stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"an .npy file of shape {shape}")
    return shape, is_fortran, dtype


class _HashedStream:
    """A file whose bytes are hashed while they are read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.hasher = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        self.hasher.update(content)
        return content


def _remedy(path: Location) -> str:
    if isinstance(path, str):
        return "copy the whole folder of shards to the server again"
    return f"run `dvc repro`, or fetch it with `dvc pull {path.parent}`"


def _fault(path: Location, what: str) -> ValueError:
    """Return an error that says what is wrong with a file and what to do."""
    return ValueError(f"{path}: {what}; {_remedy(path)}")


@cache
def _check_digest(path: Path, sha256: str, _time: int) -> None:
    """Compare a shard's digest. The cache makes this happen once for each state of the file."""
    with explain_damage(path, remedy=_remedy(path)):
        if sha256_of(path) != sha256:
            raise _fault(path, _WRONG_DIGEST)


def _check_size(path: Location, shard: Shard) -> None:
    try:
        num_bytes = size_of(path)
    except FileNotFoundError as error:
        raise _fault(path, f"missing, though {INDEX_NAME} lists it") from error
    if num_bytes not in (shard.num_bytes, None):
        what = f"it has {num_bytes} bytes, but {INDEX_NAME} says {shard.num_bytes}"
        raise _fault(path, f"truncated or overwritten: {what}")
