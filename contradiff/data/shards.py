"""Shards: the form in which images, latents and samples are stored and read.

A folder holds an index, and files `<split>-00000.tar` (or .tar.gz) for any WebDataset reader.
"""

import gzip
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Shaped
from pydantic import Field

from contradiff.config import Section
from contradiff.data.remote import Location, join, open_file, read_bytes, size_of
from contradiff.data.shard_info import ShardInfo
from contradiff.files import replace_file, sha256_of

INDEX_NAME = "index.json"
Compression = Literal["none", "gzip"]
Record = Mapping[str, bytes]
"""One sample: file extension => content, besides "__key__"."""
InfoT = TypeVar("InfoT", bound=ShardInfo)


class ShardParams(Section):
    """Section `shard`: how samples are packed."""

    samples_per_shard: int = Field(ge=1)
    compression: Compression = Field(description="gzip halves small files; readers need not know")


@dataclass(frozen=True)
class Shard:
    """One tar file. `class_counts[c]` samples have class c; empty if samples have no class."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    class_counts: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_counts", tuple(self.class_counts))  # JSON has lists


@dataclass(frozen=True)
class Sample:
    """An image as it is stored: key (unique), encoded bytes, class index."""

    key: str
    image: bytes
    label: int


@dataclass(frozen=True)
class ShardIndex(Generic[InfoT]):
    """The content of `index.json`: the shards of each split, and what is true of all shards."""

    splits: Mapping[str, tuple[Shard, ...]]
    info: InfoT

    @classmethod
    def read(cls, folder: Location, kind: type[InfoT]) -> "ShardIndex[InfoT]":
        """Read a folder's index and check that its shards are there and whole.

        A ValueError says what is missing, of another kind or of a wrong size; an OSError says that
        a server could not be reached.
        """
        path = join(folder, INDEX_NAME)
        try:
            content = json.loads(read_bytes(path))
            named = content["splits"].items()
            splits = {split: tuple(Shard(**shard) for shard in shards) for split, shards in named}
            info = kind.model_validate(content["facts"])
        except FileNotFoundError as error:
            raise _fault(path, "missing") from error
        except (ValueError, KeyError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise _fault(path, f"damaged (not an index of such shards: {reason})") from error
        shards = list(chain(*splits.values()))
        places = [join(folder, shard.name) for shard in shards]
        # A server answers many questions in the time of one.
        with ThreadPoolExecutor(16 if isinstance(folder, str) else 1) as pool:
            list(pool.map(_check_size, places, shards))
        return ShardIndex(splits, info)

    def write(self, folder: Path) -> None:
        """Write `index.json`, when every shard is whole."""
        splits = {split: list(map(asdict, shards)) for split, shards in self.splits.items()}
        content = {"splits": splits, "facts": self.info.model_dump(mode="json")}
        with replace_file(folder / INDEX_NAME) as path:
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def num_samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return sum(shard.num_samples for shard in self.shards(split))

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Return the shards of a split, in order; a ValueError if there is no such split."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r} among {sorted(self.splits)}")
        return self.splits[split]


def shard_name(split: str, number: int, compression: Compression) -> str:
    """`train-00003.tar` or `train-00003.tar.gz`."""
    return f"{split}-{number:05d}.tar" + (".gz" if compression == "gzip" else "")


def write_shard(
    path: Path,
    records: Iterable[Record],
    *,
    compression: Compression,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Shard:
    """Write one shard, whole or not at all; its bytes depend only on the records.

    `on_progress` is called with 1 after each sample. Classes are counted if records have a "cls".
    """
    from webdataset.writer import TarWriter

    num_samples, labels = 0, Counter[int]()
    with replace_file(path) as temporary:
        with (
            temporary.open("wb") as file,
            # No name and no time in gzip's header, so that equal records give equal bytes.
            gzip.GzipFile("", "wb", 6, file, mtime=0)
            if compression == "gzip"
            else nullcontext(file) as stream,
            TarWriter(stream, encoder=False, mtime=0) as writer,  # pyright: ignore[reportArgumentType]
        ):
            for record in records:
                writer.write({**record, "__key__": record["__key__"].decode()})
                if "cls" in record:
                    labels[int(record["cls"])] += 1
                num_samples += 1
                on_progress(1)
        class_counts = tuple(labels[label] for label in range(max(labels, default=-1) + 1))
        num_bytes = temporary.stat().st_size
        return Shard(path.name, num_samples, num_bytes, sha256_of(temporary), class_counts)


def write_split(
    folder: Path,
    split: str,
    records: Iterable[Record],
    *,
    samples_per_shard: int,
    compression: Compression,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[Shard, ...]:
    """Write a split's shards in order; `on_progress` gets the number of samples of each shard."""
    records, shards = iter(records), list[Shard]()
    while chunk := list(islice(records, samples_per_shard)):
        path = folder / shard_name(split, len(shards), compression)
        shards.append(write_shard(path, chunk, compression=compression))
        on_progress(len(chunk))
    return tuple(shards)


def read_shard(path: Location, shard: Shard) -> Iterator[dict[str, bytes]]:
    """Yield a shard's samples in order, as extension => content and "__key__" => key.

    A ValueError says that the shard is damaged; every byte is hashed, so that damage that tar does
    not notice is found after the last sample. An OSError says that a server could not be reached.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    _check_size(path, shard)
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
            stream.read()  # tar's padding at the end
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(path, str) and isinstance(error, OSError):  # not the content's fault
            raise OSError(str(error.args[0]).split(" @ ", maxsplit=1)[0]) from error
        # webdataset appends to the arguments, which would make a tuple of the message
        reason = error.args[0] if error.args else "unreadable"
        raise _fault(path, f"damaged ({reason})") from error
    if stream.hasher.hexdigest() != shard.sha256:
        raise _fault(path, f"damaged (its sha256 is not that of {INDEX_NAME})")
    if num_samples != shard.num_samples:
        raise _fault(path, f"{num_samples} samples where {INDEX_NAME} says {shard.num_samples}")


def read_split(folder: Location, split: str) -> Iterator[dict[str, bytes]]:
    """Yield every sample of a split, in order. Raises as `ShardIndex.read` and `read_shard`."""
    for shard in ShardIndex.read(folder, ShardInfo).shards(split):
        yield from read_shard(join(folder, shard.name), shard)


def read_images(folder: Location, split: str) -> Iterator[Sample]:
    """Yield every image of a split, in order."""
    return map(image_of, read_split(folder, split))


def image_record(sample: Sample, *, extension: str) -> Record:
    """Return an image as a WebDataset sample: `key.jpg` and `key.cls`."""
    return {"__key__": sample.key.encode(), extension: sample.image, "cls": b"%d" % sample.label}


def image_of(record: Record) -> Sample:
    """Inverse of `image_record`."""
    extension = next(name for name in record if name in {"jpg", "jpeg", "png", "webp"})
    return Sample(record["__key__"].decode(), record[extension], int(record["cls"]))


def array_to_bytes(array: Shaped[np.ndarray, "..."]) -> bytes:
    """Return an array as the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def array_from_bytes(content: bytes) -> Shaped[np.ndarray, "..."]:
    """Read an array from the content of an .npy file, without pickle."""
    return np.load(io.BytesIO(content), allow_pickle=False)


class _HashedStream:
    """A file that is hashed as it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.hasher = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        self.hasher.update(content)
        return content


def _fault(path: Location, what: str) -> ValueError:
    """Say what is wrong with a file, and what to do."""
    if isinstance(path, str):
        return ValueError(f"{path}: {what}; copy the whole folder of shards there again")
    return ValueError(f"{path}: {what}; run `dvc repro`, or fetch it by `dvc pull {path.parent}`")


def _check_size(path: Location, shard: Shard) -> None:
    try:
        num_bytes = size_of(path)
    except FileNotFoundError as error:
        raise _fault(path, f"missing, though {INDEX_NAME} lists it") from error
    if num_bytes not in (shard.num_bytes, None):
        what = f"{num_bytes} bytes where {INDEX_NAME} says {shard.num_bytes}"
        raise _fault(path, f"truncated or overwritten: {what}")
