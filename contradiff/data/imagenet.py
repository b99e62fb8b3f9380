"""An ImageNet-style tree, train/<class>/* and val/<class>/*, and what stands for it in DVC."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from contradiff.atomic import replace_file
from contradiff.config import Section

SPLITS = ("train", "val")
EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".webp"})
SYNSETS_NAME = "LOC_synset_mapping.txt"
"""Kaggle's list of class folders and their names; optional."""
NUM_SAMPLED_HASHES = 200


class DataParams(Section):
    """Section `data`: the raw images."""

    source: Literal["toy", "imagefolder"] = Field(description="toy: rendered where root says")
    root: str = Field(min_length=1, description="the raw tree, relative to the project's root")
    image_size: int = Field(
        ge=8, multiple_of=8, description="side of the model's images, in pixels"
    )
    num_train: int | None = Field(ge=1, description="toy: training images to render")
    num_val: int | None = Field(ge=1, description="toy: validation images to render")

    @model_validator(mode="after")
    def _counts_belong_to_toy(self) -> "DataParams":
        for name in ("num_train", "num_val"):
            given = getattr(self, name) is not None
            if self.source == "toy" and not given:
                msg = f"data.{name} is needed when data.source is toy"
                raise ValueError(msg)
            if self.source == "imagefolder" and given:
                msg = f"data.{name} has no meaning when data.source is imagefolder; set it to null"
                raise ValueError(msg)
        return self


@dataclass(frozen=True)
class ImageFile:
    """One raw image: its path below the tree's root and its class index."""

    path: str
    label: int

    @property
    def key(self) -> str:
        """Unique, and without the dots that WebDataset would take for an extension.

        The class folder is part of it where the file's name does not begin with it already.
        """
        path = Path(self.path)
        stem, folder = path.stem.replace(".", "_"), path.parent.name.replace(".", "_")
        return stem if stem.startswith(folder) else f"{folder}_{stem}"


@dataclass(frozen=True)
class Manifest:
    """What stands for a raw tree in DVC: every path and size, and sampled contents' hashes."""

    root: str
    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[ImageFile, ...]]
    digest: str

    @classmethod
    def scan(cls, root: Path, *, shown_root: str) -> "Manifest":
        """List a tree. Classes are the sorted folder names of train/, as in torchvision.

        Args:
            root: the tree.
            shown_root: how the parameters name it; kept in the manifest.

        Raises:
            ValueError: no such folder, no images, an empty class, val classes that train lacks, or
                two images with one key.
        """
        class_ids = tuple(sorted(_folders(root / "train", shown=f"{shown_root}/train")))
        labels = {name: label for label, name in enumerate(class_ids)}
        splits: dict[str, tuple[ImageFile, ...]] = {}
        hasher = hashlib.sha256()
        for split in SPLITS:
            unknown = set(_folders(root / split, shown=f"{shown_root}/{split}")) - set(labels)
            if unknown:
                msg = (
                    f"data.root: {shown_root}/{split} has classes that train/ lacks: "
                    f"{sorted(unknown)[:5]}"
                )
                raise ValueError(msg)
            files: list[ImageFile] = []
            for class_id in class_ids:
                paths = _images(root / split / class_id, shown=f"{shown_root}/{split}/{class_id}")
                for path in paths:
                    relative = path.relative_to(root).as_posix()
                    files.append(ImageFile(relative, labels[class_id]))
                    hasher.update(f"{relative}\t{path.stat().st_size}\n".encode())
            _check_keys(files)
            splits[split] = tuple(files)
            for file in files[:: max(1, len(files) // NUM_SAMPLED_HASHES)]:
                hasher.update((root / file.path).read_bytes())
        names = _class_names(root / SYNSETS_NAME, class_ids)
        return cls(shown_root, class_ids, names, splits, hasher.hexdigest())

    def write(self, path: Path) -> None:
        """Write as JSON: facts, then one line a split's counts. Paths are not repeated in it."""
        content = {
            "root": self.root,
            "digest": self.digest,
            "num_images": {split: len(files) for split, files in self.splits.items()},
            "classes": dict(zip(self.class_ids, self.class_names, strict=True)),
        }
        with replace_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """The JSON of `Manifest.write`.

    Raises:
        ValueError: the file is missing.
    """
    if not path.is_file():
        msg = f"{path}: missing; run `dvc repro prepare`"
        raise ValueError(msg)
    return json.loads(path.read_text())


def _folders(root: Path, *, shown: str) -> list[str]:
    if not root.is_dir():
        msg = (
            f"data.root: no folder {shown}; expected an ImageNet-style tree of train/<class>/* and "
            "val/<class>/*"
        )
        raise ValueError(msg)
    names = [path.name for path in root.iterdir() if path.is_dir()]
    if not names:
        msg = f"data.root: {shown} has no class folders with images in them"
        raise ValueError(msg)
    return names


def _images(folder: Path, *, shown: str) -> list[Path]:
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        msg = f"data.root: {shown} holds no images ({', '.join(sorted(EXTENSIONS))})"
        raise ValueError(msg)
    return paths


def _check_keys(files: list[ImageFile]) -> None:
    seen: dict[str, ImageFile] = {}
    for file in files:
        if (other := seen.setdefault(file.key, file)) is not file:
            msg = f"data.root: {other.path} and {file.path} would both be {file.key}: rename one"
            raise ValueError(msg)


def _class_names(path: Path, class_ids: tuple[str, ...]) -> tuple[str, ...]:
    if not path.is_file():
        return class_ids
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    names = {line[0]: line[1].split(",")[0] for line in lines if len(line) == 2}
    return tuple(names.get(class_id, class_id) for class_id in class_ids)
