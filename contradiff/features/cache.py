"""Features on disk: one file for each image shard, its rows in the shard's order, and an index.

`<split>-00000.safetensors` holds a tensor (rows, width) for each column, `labels`, and the keys in
its header; `<split>-00000.maps.safetensors`, where maps are stored, the tensor `maps`. All are
memory-mapped when read, so that only what is used is ever in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from contradiff.data.shards import Shard
from contradiff.files import replace_file, sha256_of

INDEX_NAME = "index.json"
VERSION = 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MAPS = "maps"
HEAD_NAME = "attention.safetensors"
"""Beside maps: the weights that an attentive probe's head starts from."""


@dataclass(frozen=True)
class Column:
    """One feature an image: whose maps, at which noise levels, pooled how.

    `triple` and `block` are None for a backbone that has neither.
    """

    name: str
    triple: tuple[int, ...] | None
    block: str | None
    pool: str


@dataclass(frozen=True)
class CacheIndex:
    """What a folder of features holds, and what it was made from.

    Attributes:
        model: contradiff, base, diffeed, or timm's name.
        checkpoint: fingerprint of the weights: `checkpoint_fingerprint` of a trained model,
            `base_digest` of a base's baseline, `TimmFeatures.fingerprint`.
        dtype: fp16 or bf16.
        num_classes: of the data.
        columns: the first is the main one.
        head: shape of the attention head whose weights lie beside maps; None without maps.
        shards: of each split, one for each image shard.
        maps: likewise, of the maps; empty if none are stored.
        facts: how they were made: the parameters, and whatever else decides them.
    """

    model: str
    checkpoint: str
    dtype: str
    num_classes: int
    columns: tuple[Column, ...]
    head: Mapping[str, int] | None
    shards: Mapping[str, tuple[Shard, ...]]
    maps: Mapping[str, tuple[Shard, ...]]
    facts: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write `index.json`, last of all."""
        with replace_file(folder / INDEX_NAME) as path:
            path.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CacheIndex":
        """Read a folder's index and check that its files are there and whole.

        Raises:
            ValueError: the index or a file is missing, or a size is wrong; names the file.
        """
        path = folder / INDEX_NAME
        if not path.is_file():
            raise ValueError(
                f"{path}: no features; run `dvc repro features`, or `dvc pull {folder}`"
            )
        content: dict[str, Any] = json.loads(path.read_text())
        if content.pop("version", None) != VERSION:
            raise ValueError(f"{path}: not of version {VERSION}; run `dvc repro features`")
        content["columns"] = tuple(
            Column(
                column["name"],
                None if column["triple"] is None else tuple(column["triple"]),
                column["block"],
                column["pool"],
            )
            for column in content["columns"]
        )
        for kind in ("shards", "maps"):
            content[kind] = {
                split: tuple(Shard(**shard) for shard in shards)
                for split, shards in content[kind].items()
            }
        index = cls(**content)
        for shards in (*index.shards.values(), *index.maps.values()):
            for shard in shards:
                file = folder / shard.name
                if not file.is_file() or file.stat().st_size != shard.num_bytes:
                    raise ValueError(
                        f"{file}: missing or truncated ({INDEX_NAME} says {shard.num_bytes} "
                        f"bytes); run `dvc repro features`, or `dvc pull {folder}`"
                    )
        return index


def checkpoint_fingerprint(folder: Path) -> str:
    """Which trained model a folder such as build/pretrain holds: SHA-256 over all its files.

    Raises:
        ValueError: it holds none.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise ValueError(
            f"{folder}: no checkpoint; run `dvc repro pretrain`, or `dvc pull {folder}`"
        )
    text = "".join(f"{file.relative_to(folder)} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def to_stored(
    features: Float[Tensor, "batch ..."], *, dtype: str, keys: Sequence[str], name: str
) -> Float[Tensor, "batch ..."]:
    """Round features to the stored type, on the CPU.

    Raises:
        ValueError: one is NaN or infinite, or becomes so; names the image.
    """
    stored = features.to("cpu", DTYPES[dtype])
    finite = stored.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        if bool(features[row].isfinite().all()):
            reason = "are too large for fp16 (65504); set features.dtype: bf16"
        else:
            reason = (
                "are not finite: the model diverged (see metrics/pretrain.csv), or bf16 did "
                "(features.precision)"
            )
        raise ValueError(f"features {name!r} of image {keys[row]} {reason}")
    return stored


def write_rows(path: Path, tensors: Mapping[str, Tensor], *, keys: Sequence[str]) -> Shard:
    """Write one file, whole or not at all; its bytes depend on the content alone."""
    num_rows = len(next(iter(tensors.values())))
    with replace_file(path) as temporary:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"keys": json.dumps(list(keys))})
        return Shard(path.name, num_rows, temporary.stat().st_size, sha256_of(temporary))


def finished_rows(path: Path) -> list[Shard] | None:
    """The files of one image shard, if a note beside them says that they are whole."""
    note = _note(path)
    if not note.is_file():
        return None
    shards = [Shard(**shard) for shard in json.loads(note.read_text())]
    return shards if all((path.parent / shard.name).is_file() for shard in shards) else None


def resume_rows(path: Path, make: Callable[[], list[Shard]]) -> list[Shard]:
    """The files of one image shard, made by `make` unless an interrupted run has made them."""
    shards = finished_rows(path)
    if shards is None:
        shards = make()
        with replace_file(_note(path)) as temporary:
            temporary.write_text(json.dumps([asdict(shard) for shard in shards]))
    return shards


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


class Rows:
    """Rows of several memory-mapped tensors as one: read when asked for, never as a whole.

    Has as much of a tensor's interface as training and evaluation need.
    """

    device = torch.device("cpu")

    def __init__(self, parts: Sequence[Tensor], chosen: Int64[Tensor, " n"] | None = None) -> None:
        """Join `parts` along their rows; `chosen` are those kept, in order, by default all."""
        self.parts = tuple(parts)
        sizes = torch.tensor([0, *(len(part) for part in parts)])
        self.starts = sizes.cumsum(0)
        self.chosen = torch.arange(int(self.starts[-1])) if chosen is None else chosen
        self.shape = (len(self.chosen), *self.parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self.chosen)

    def only(self, rows: Int64[Tensor, " m"]) -> "Rows":
        """Some of the rows, none of them read."""
        return Rows(self.parts, self.chosen[rows])

    def index_select(self, dim: int, index: Int64[Tensor, " m"]) -> Tensor:
        """The rows of `index`, in its order, read into memory."""
        assert dim == 0
        rows = self.chosen[index.cpu()]
        numbers = torch.searchsorted(self.starts, rows, right=True) - 1
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.parts[0].dtype)
        for number in numbers.unique().tolist():
            here = (numbers == number).nonzero().squeeze(1)
            found[here] = self.parts[number].index_select(0, rows[here] - self.starts[number])
        return found

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, so many at once."""
        for rows in torch.arange(len(self)).split(size):
            yield self.index_select(0, rows)


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features, open for reading."""

    folder: Path
    index: CacheIndex

    @classmethod
    def open(
        cls, folder: Path, *, fingerprint_of: Callable[[CacheIndex], str | None]
    ) -> "FeatureCache":
        """Open a cache; all but the maps are checked to the last bit.

        Args:
            folder: of features.
            fingerprint_of: gives the fingerprint that the index's model has now; None: its weights
                are not here to compare.

        Raises:
            ValueError: it is missing or damaged, or made from other weights; names the file.
        """
        index = CacheIndex.read(folder)
        if fingerprint_of(index) not in (None, index.checkpoint):
            raise ValueError(
                f"{folder / INDEX_NAME}: features of another checkpoint or base than is here now; "
                "run `dvc repro features`"
            )
        for shard in (shard for shards in index.shards.values() for shard in shards):
            if sha256_of(folder / shard.name) != shard.sha256:
                raise ValueError(
                    f"{folder / shard.name}: damaged (its sha256); run `dvc repro features`"
                )
        return cls(folder, index)

    def column(self, split: str, name: str) -> Float[Tensor, "n width"]:
        """A column's features of a whole split, in memory, in the stored type."""
        return torch.cat([self._tensor(shard, name) for shard in self.index.shards[split]])

    def labels(self, split: str) -> Int64[Tensor, " n"]:
        """The classes, in the same order."""
        return torch.cat([self._tensor(shard, "labels") for shard in self.index.shards[split]])

    def keys(self, split: str) -> list[str]:
        """The images' keys, in the same order."""
        found: list[str] = []
        for shard in self.index.shards[split]:
            with self._file(shard) as file:
                found += json.loads(file.metadata()["keys"])
        return found

    def maps(self, split: str) -> Rows:
        """The maps (n, 3, channels, h, w) of the main triple, memory-mapped.

        Raises:
            ValueError: the cache has none.
        """
        if not self.index.maps:
            raise ValueError(
                f"{self.folder / INDEX_NAME}: no maps, which probe.head: attentive trains on; run "
                "`dvc repro features` with this setting"
            )
        return Rows([self._tensor(shard, MAPS) for shard in self.index.maps[split]])

    def _tensor(self, shard: Shard, name: str) -> Tensor:
        with self._file(shard) as file:
            tensor: Tensor = file.get_tensor(name)
        if len(tensor) != shard.num_samples:
            raise ValueError(
                f"{self.folder / shard.name}: {len(tensor)} rows, not {shard.num_samples}"
            )
        return tensor

    def _file(self, shard: Shard) -> Any:
        path = self.folder / shard.name
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error}); run `dvc repro features`") from error
