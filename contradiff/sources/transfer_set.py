"""The set that features are transferred to: images by row, labels, names, whatever its source."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from contradiff.config import Section
from contradiff.data.subsets import k_shot_split
from contradiff.files import file_manifest
from contradiff.sources.cifar import SIDE, CifarFiles, Split, TransferSplit, find_cifar, read_cifar
from contradiff.sources.folder import class_folders, images_by_class
from contradiff.sources.imagenet import read_manifest, relative_to_project
from contradiff.sources.listing import ImageFile

Source = Literal["digits", "cifar100", "cifar10", "imagefolder"]
KEY = "transfer_data.root"


class TransferDataParams(Section):
    """Section `transfer_data`: the set that features are transferred to."""

    source: Source = Field(description="digits: written to root | the others must be there")
    root: str = Field(
        min_length=1, description="a folder; for CIFAR, the archive itself or its folder"
    )
    verify: bool = Field(description="CIFAR's archives must have the official checksums")


@dataclass(frozen=True)
class TransferSet:
    """A labelled set where it lies.

    Attributes:
        root: a folder, or CIFAR's archive.
        source: how it is stored; the digits are stored as CIFAR-100.

    Example:
        ```python
        images = TransferSet(Path("data/raw/cifar-100-python.tar.gz"), "cifar100")
        train = images.split("train", image_size=32)
        pixels, labels = train.read([0, 1]), train.labels[:2]
        ```
    """

    root: Path
    source: Source

    @classmethod
    def reopen(cls, manifest: Path, *, project: Path) -> "TransferSet":
        """Return the set that a manifest stands for; `project` is the project's root.

        Raises:
            ValueError: the manifest is missing, or the set has changed since.
        """
        content = read_manifest(manifest)
        images = cls(project / content["root"], content["source"])
        if images.manifest(project=project) != content:
            raise ValueError(
                f"{KEY}: {images.root} has changed since {manifest}; run `dvc repro -f prepare`"
            )
        return images

    def manifest(self, *, project: Path) -> dict[str, Any]:
        """What stands for the set in DVC, as JSON: hashes of all that is read.

        Raises:
            ValueError: files are missing.
        """
        place = relative_to_project(self.root, project=project)
        content: dict[str, Any] = {"root": place, "source": self.source}
        if self.source != "imagefolder":
            paths = self._find_cifar().paths
            return content | {"files": file_manifest(paths[0].parent, [p.name for p in paths])}
        class_names, splits = self._list_folders()
        hasher = hashlib.sha256()
        for file in (file for files in splits.values() for file in files):
            image = (self.root / file.path).read_bytes()
            hasher.update(f"{file.path}\t{len(image)}\n".encode())
            hasher.update(image)
        counts = {split: len(files) for split, files in splits.items()}
        described = {"classes": list(class_names), "num_images": counts}
        return content | described | {"sha256": hasher.hexdigest()}

    def check(self, shots: Sequence[int | Literal["full"]], *, verify: bool) -> Iterator[str]:
        """Read the set once; yield a line for each split.

        Args:
            shots: images per class of the few-shot sets that will be drawn from train.
            verify: compare CIFAR's archives with their official checksums first.

        Raises:
            ValueError: data are missing or damaged, an archive is not the official one, or a class
                has fewer images than `shots`.
        """
        if verify and self.source in {"cifar10", "cifar100"}:
            self._find_cifar().verify()
        splits = {name: self.split(name, image_size=SIDE) for name in ("train", "test")}
        labels = splits["train"].labels.tolist()
        for number in sorted(number for number in shots if number != "full"):
            k_shot_split(labels, shots=number, seed=0)
        for name, split in splits.items():
            number = len(split.class_names)
            yield f"{len(split.labels)} {name} images of {number} classes in {self.root}"

    def split(self, split: Split, *, image_size: int) -> TransferSplit:
        """Open one split.

        Args:
            split: which half. In folders, test is `test/`, or `val/` where there is no `test/`.
            image_size: side to which images from folders are brought. CIFAR's stay at 32 pixels:
                they are resized where they are used.

        Raises:
            ValueError: the data is missing or damaged.
        """
        if self.source != "imagefolder":
            return read_cifar(self._find_cifar(), split=split)
        class_names, splits = self._list_folders()
        files = splits[split]
        return TransferSplit(
            labels=np.array([file.label for file in files], dtype=np.int64),
            keys=tuple(file.path for file in files),
            class_names=class_names,
            read=lambda rows: self._read_square([files[row] for row in rows], size=image_size),
        )

    def _find_cifar(self) -> CifarFiles:
        return find_cifar(self.root, "cifar10" if self.source == "cifar10" else "cifar100")

    def _list_folders(self) -> tuple[tuple[str, ...], dict[Split, tuple[ImageFile, ...]]]:
        """Classes are the sorted folder names in train/, as in torchvision; test may lack some."""
        root = self.root
        test = "test" if (root / "test").is_dir() else "val"
        if not (root / "train").is_dir() or not (root / test).is_dir():
            raise ValueError(
                f"{KEY}: {root} must hold train/<class>/* and test/<class>/* (or val/<class>/*)"
            )
        class_names = class_folders(root / "train", key=KEY)
        train = images_by_class(root, "train", class_names, key=KEY)
        files = images_by_class(root, test, class_names, may_be_empty=True, key=KEY)
        if not files:
            raise ValueError(f"{KEY}: {root / test} holds no images")
        return class_names, {"train": train, "test": files}

    def _read_square(
        self, files: Sequence[ImageFile], *, size: int
    ) -> UInt8[np.ndarray, "n 3 size size"]:
        """Decode images as the pipeline does: centre crop, then bicubic to `size`."""
        from contradiff.data.transforms import apply_crop, centre_crop, decode

        squares: list[UInt8[np.ndarray, "3 size size"]] = []
        for path in (self.root / file.path for file in files):
            image = decode(path.read_bytes(), name=str(path))
            squares.append(apply_crop(image, centre_crop(*image.shape[1:]), size=size).numpy())
        return np.stack(squares)
