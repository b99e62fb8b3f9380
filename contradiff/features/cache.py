"""Features on disk: a table with a row for each image and a column for each feature.

Each image shard has one file, `<split>-00000.safetensors`: a tensor (rows, width) for each column,
`labels`, and the images' keys in its header, in the shard's order. Where maps are stored,
`<split>-00000.maps.safetensors` holds the tensor `maps`. `index.json` lists the files. Readers map
the files into memory, so that only what they use is ever read.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import ConcatDataset

from contradiff.data.shards import Shard
from contradiff.features.params import FeatureSpec
from contradiff.files import replace_file, sha256_of
from contradiff.method.attention import TriTimestepAttention
from contradiff.method.checkpoint import base_digest

INDEX_NAME, HEAD_NAME = "index.json", "attention.safetensors"
MAPS = "maps"
"""Name of the maps among what a model computes, and in their files."""


class CacheIndex(BaseModel):
    """What a folder of features holds, and how they were made.

    `checkpoint` is the weights' fingerprint. `columns` has the main feature first. `head` has the
    arguments of the attention whose weights lie beside maps; without maps it is None and `maps` is
    empty. Each split has as many `shards` as the images. `made_with` is the seed and the section
    `features`, and a local file's "timm_weights_sha256".
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    version: Literal[1] = 1
    model: str
    checkpoint: str
    dtype: str
    num_classes: int
    columns: tuple[FeatureSpec, ...]
    head: dict[str, int] | None
    shards: dict[str, tuple[Shard, ...]]
    maps: dict[str, tuple[Shard, ...]]
    made_with: dict[str, Any] = Field(validation_alias="facts", serialization_alias="facts")

    def write(self, folder: Path) -> None:
        """Write `index.json`."""
        with replace_file(folder / INDEX_NAME) as path:
            path.write_text(json.dumps(self.model_dump(by_alias=True), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CacheIndex":
        """Read a folder's index; ValueError if it or a file is missing or has a wrong size."""
        path, remedy = folder / INDEX_NAME, f"run `dvc repro features`, or `dvc pull {folder}`"
        if not path.is_file():
            raise ValueError(f"{path}: no features; {remedy}")
        try:
            index = cls.model_validate_json(path.read_text())
        except ValidationError:
            raise ValueError(f"{path}: no index of version 1; run `dvc repro features`") from None
        for shard in chain(*index.shards.values(), *index.maps.values()):
            file = folder / shard.name
            if not file.is_file() or file.stat().st_size != shard.num_bytes:
                wanted = f"{INDEX_NAME} says {shard.num_bytes} bytes"
                raise ValueError(f"{file}: missing or truncated ({wanted}); {remedy}")
        return index


@dataclass(frozen=True)
class ModelFolders:
    """Folders of the trained model and its base; features.timm_weights is relative to `root`."""

    checkpoint: Path
    base: Path
    root: Path

    def fingerprint(self, model: str) -> str:
        """Hash contradiff's weights (ValueError without a checkpoint), or those of its base."""
        if model != "contradiff":
            return base_digest(self.base)
        files = sorted(file for file in self.checkpoint.rglob("*") if file.is_file())
        if not files:
            remedy = f"run `dvc repro pretrain`, or `dvc pull {self.checkpoint}`"
            raise ValueError(f"{self.checkpoint}: no checkpoint; {remedy}")
        lines = (f"{file.relative_to(self.checkpoint)} {sha256_of(file)}\n" for file in files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features, open for reading; `index.columns` has the main feature first."""

    folder: Path
    index: CacheIndex

    @classmethod
    def open(cls, folder: Path, models: ModelFolders) -> "FeatureCache":
        """Open a cache; all but the maps are checked to the last bit.

        ValueError if it is missing or damaged, or if the weights have changed since. timm's may be
        missing: the cache may have come by `dvc pull`.
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
            fault = "features of another checkpoint or base than is here now"
            raise ValueError(f"{folder / INDEX_NAME}: {fault}; run `dvc repro features`")
        for shard in chain(*index.shards.values()):
            if sha256_of(folder / shard.name) != shard.sha256:
                path = folder / shard.name
                raise ValueError(f"{path}: damaged (its sha256); run `dvc repro features`")
        return cls(folder, index)

    def column(self, split: str, name: str) -> Float[Tensor, "n width"]:
        """Load one feature of a whole split, in the stored type."""
        return torch.cat([self._tensor(shard, name) for shard in self.index.shards[split]])

    def labels(self, split: str) -> Int64[Tensor, " n"]:
        """Load the classes, in the same order."""
        return torch.cat([self._tensor(shard, "labels") for shard in self.index.shards[split]])

    def keys(self, split: str) -> list[str]:
        """Read the images' keys, in the same order."""
        headers = [self._file(shard).metadata() for shard in self.index.shards[split]]
        return [key for header in headers for key in json.loads(header["keys"])]

    def maps(self, split: str) -> ConcatDataset[Tensor]:
        """Memory-map the main triple's maps, each (3, channels, h, w); ValueError if none exist."""
        if not self.index.maps:
            fault = "no maps, which probe.head: attentive trains on"
            remedy = "run `dvc repro features` with this setting"
            raise ValueError(f"{self.folder / INDEX_NAME}: {fault}; {remedy}")
        return ConcatDataset([self._tensor(shard, MAPS) for shard in self.index.maps[split]])  # pyright: ignore[reportArgumentType]

    def attention(self) -> TriTimestepAttention:
        """Load the head that lies beside the maps: trained, or, for a baseline, fresh."""
        assert self.index.head is not None, "it lies beside maps"
        head = TriTimestepAttention(**self.index.head)
        head.load_state_dict(load_file(self.folder / HEAD_NAME))
        return head

    def _tensor(self, shard: Shard, name: str) -> Tensor:
        return self._file(shard).get_tensor(name)

    def _file(self, shard: Shard) -> Any:
        path = self.folder / shard.name
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error}); run `dvc repro features`") from error
