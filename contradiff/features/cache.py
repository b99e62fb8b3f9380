"""Features on disk: a table with a row for each image and a column for each feature.

Each image shard gives one file, `<split>-00000.safetensors`, with the images in the same order. The
file has a tensor (rows, width) for each column, the tensor `labels`, and the images' keys in the
header. If the UNet's maps are stored, `<split>-00000.maps.safetensors` has the tensor `maps`.
`index.json` lists the files. Readers load only the tensors that they use.
"""

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import ConcatDataset

from contradiff.data.shards import Shard
from contradiff.features.params import FeatureSpec
from contradiff.files import explain_damage, load_tensors, replace_file, sha256_of
from contradiff.method.attention import TriTimestepAttention
from contradiff.method.checkpoint import base_digest
from contradiff.method.params import Architecture

INDEX_NAME, HEAD_NAME = "index.json", "attention.safetensors"
MAPS = "maps"
"""Name of the tensor of maps, in a model's output and in files."""


class CacheIndex(BaseModel):
    """The content of `index.json`: which features a folder has, and how they were computed.

    `checkpoint` is a hash of the model's weights. The first of `columns` is the main feature.
    `shards` lists the files of each split. If the UNet's maps are stored, `maps` lists their files,
    and `head` has the constructor arguments of the stored attention head, and `head_sha256` the
    SHA-256 of its weights. Otherwise both are None.
    `made_with` has the seed, the section `features` and the hash of the file features.timm_weights.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    version: Literal[1] = 1
    model: str
    checkpoint: str
    dtype: str
    num_classes: int
    columns: tuple[FeatureSpec, ...]
    head: dict[str, Any] | None
    head_sha256: str | None = None
    shards: dict[str, tuple[Shard, ...]]
    maps: dict[str, tuple[Shard, ...]]
    made_with: dict[str, Any] = Field(validation_alias="facts", serialization_alias="facts")

    def write(self, folder: Path) -> None:
        """Write `index.json`."""
        with replace_file(folder / INDEX_NAME) as path:
            path.write_text(json.dumps(self.model_dump(by_alias=True), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CacheIndex":
        """Read `index.json`. Raises ValueError if a file is missing, damaged or truncated."""
        path, remedy = folder / INDEX_NAME, f"run `dvc repro features`, or `dvc pull {folder}`"
        if not path.is_file():
            raise ValueError(f"{path}: there are no features; {remedy}")
        with explain_damage(path, remedy=remedy):
            index = cls.model_validate_json(path.read_bytes())
            if not index.columns or not index.shards:
                raise ValueError("it lists no features")
        for shard in chain(*index.shards.values(), *index.maps.values()):
            file = folder / shard.name
            if not file.is_file() or file.stat().st_size != shard.num_bytes:
                wanted = f"{INDEX_NAME} says {shard.num_bytes} bytes"
                raise ValueError(f"{file}: missing or truncated ({wanted}); {remedy}")
        return index


@dataclass(frozen=True)
class ModelFolders:
    """Folders of the checkpoint, the base and the project (`root`).

    If `architecture` is given, a checkpoint with another architecture is refused.
    """

    checkpoint: Path
    base: Path
    root: Path
    architecture: Architecture | None = None

    def fingerprint(self, model: str) -> str:
        """Hash contradiff's checkpoint (ValueError if missing). For other models, hash the base."""
        if model != "contradiff":
            return base_digest(self.base)
        files = sorted(file for file in self.checkpoint.rglob("*") if file.is_file())
        if not files:
            remedy = f"run `dvc repro pretrain`, or `dvc pull {self.checkpoint}`"
            raise ValueError(f"{self.checkpoint}: there is no checkpoint; {remedy}")
        lines = (f"{file.relative_to(self.checkpoint)} {sha256_of(file)}\n" for file in files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features that is open for reading. `index.columns[0]` is the main feature."""

    folder: Path
    index: CacheIndex

    @classmethod
    def open(cls, folder: Path, models: ModelFolders) -> "FeatureCache":
        """Open a cache, and check the hash of every file except the maps, which `maps` checks.

        Raises ValueError if the cache is missing or damaged, or if the model's weights have changed
        since the features were computed. The file features.timm_weights may be missing.
        """
        index = CacheIndex.read(folder)
        if index.model == "timm":
            shown = index.made_with.get("timm_weights")
            digest = index.made_with.get("timm_weights_sha256")
            path = models.root / str(shown)
            if digest is not None and path.is_file() and sha256_of(path) != digest:
                fault = f"{shown} has changed since {folder} was made"
                raise ValueError(f"features.timm_weights: {fault}; run `dvc repro -f features`")
        elif index.checkpoint != models.fingerprint(index.model):
            fault = "the checkpoint or the base has changed since the features were computed"
            raise ValueError(f"{folder / INDEX_NAME}: {fault}; run `dvc repro features`")
        cache = cls(folder, index)
        for shard in chain(*index.shards.values()):
            cache._check_digest(shard)
        return cache

    def column(self, split: str, name: str) -> Float[Tensor, "n width"]:
        """Load one feature of all images of a split, in the stored type."""
        return torch.cat([self._tensor(shard, name) for shard in self._of(split)])

    def width(self, name: str) -> int:
        """Return the number of values of one feature, without loading the feature."""
        with self._reading(self._of("train")[0]) as file:
            return file.get_slice(name).get_shape()[1]

    def labels(self, split: str) -> Int64[Tensor, " n"]:
        """Load the class labels of a split, in the order of `column`."""
        return torch.cat([self._tensor(shard, "labels") for shard in self._of(split)])

    def keys(self, split: str) -> list[str]:
        """Read the images' keys of a split, in the order of `column`."""
        keys: list[str] = []
        for shard in self._of(split):
            with self._reading(shard) as file:
                keys += json.loads(file.metadata()["keys"])
        return keys

    def maps(self, split: str) -> ConcatDataset[Tensor]:
        """Memory-map a split's UNet maps (3, c, h, w). Raises ValueError if none are stored."""
        if not self.index.maps:
            fault = "no maps are stored; for probe.head: attentive, run `dvc repro features`"
            raise ValueError(f"{self.folder / INDEX_NAME}: {fault}")
        for shard in self.index.maps[split]:
            self._check_digest(shard)
        return ConcatDataset([self._tensor(shard, MAPS) for shard in self.index.maps[split]])  # pyright: ignore[reportArgumentType]

    def attention(self) -> TriTimestepAttention:
        """Load the attention head stored with the maps. The head of a baseline is untrained."""
        assert self.index.head is not None, "the head is stored only together with maps"
        path, remedy = self.folder / HEAD_NAME, "run `dvc repro features`"
        weights = load_tensors(path, sha256=self.index.head_sha256 or "nothing", remedy=remedy)
        with explain_damage(path, remedy=remedy):
            head = TriTimestepAttention(**self.index.head)
            head.load_state_dict(weights)
        return head

    def _of(self, split: str) -> tuple[Shard, ...]:
        if not self.index.shards.get(split):
            found = f"it lists no files of the split {split!r}, only {sorted(self.index.shards)}"
            raise ValueError(f"{self.folder / INDEX_NAME}: {found}; run `dvc repro features`")
        return self.index.shards[split]

    def _check_digest(self, shard: Shard) -> None:
        path = self.folder / shard.name
        if sha256_of(path) != shard.sha256:
            raise ValueError(f"{path}: damaged (wrong sha256); run `dvc repro features`")

    def _tensor(self, shard: Shard, name: str) -> Tensor:
        with self._reading(shard) as file:
            return file.get_tensor(name)

    @contextmanager
    def _reading(self, shard: Shard) -> Generator[Any]:
        """Open a file of the cache. Errors in the block become ValueErrors that name the file."""
        path = self.folder / shard.name
        with explain_damage(path, remedy="run `dvc repro features`"):
            yield safe_open(path, framework="pt")
