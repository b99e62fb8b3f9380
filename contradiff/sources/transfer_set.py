"""The labelled data set on which the stage `transfer` trains and tests probes of features."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from contradiff.config import Section
from contradiff.files import explain_damage, file_manifest, read_json
from contradiff.sources.cifar import SIDE, CifarFiles, Split, TransferSplit, find_cifar, read_cifar
from contradiff.sources.folder import scan_folder
from contradiff.sources.image_check import check_image
from contradiff.sources.imagenet import PREPARE, relative_to_project
from contradiff.sources.listing import Listing, describe_ignored, explain_unreadable, is_folder

Source = Literal["digits", "cifar100", "cifar10", "imagefolder"]
KEY = "transfer_data.root"


class TransferDataParams(Section):
    """Section `transfer_data`: the data set of the stage `transfer`."""

    source: Source = Field(description="digits are written to root; other data must be there")
    root: str = Field(min_length=1, description="folder of the data, or CIFAR's archive")
    verify: bool = Field(description="check that CIFAR's archives have the official checksums")


@dataclass(frozen=True)
class TransferSet:
    """A labelled data set: class folders or CIFAR. The digits are stored in CIFAR-100's format.

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
        """Open the set that a manifest file describes. Raises ValueError if the set has changed."""
        content = read_json(manifest, remedy=PREPARE)
        with explain_damage(manifest, remedy=PREPARE):
            images = cls(project / content["root"], content["source"])
        if images.manifest(project=project) != content:
            fault = f"{images.root} has changed since {manifest} was written"
            raise ValueError(f"{KEY}: {fault}; run `dvc repro -f prepare`")
        return images

    def manifest(self, *, project: Path) -> dict[str, Any]:
        """Return the content of the manifest, a file for DVC: hashes of all files of the set."""
        place = relative_to_project(self.root, project=project)
        content: dict[str, Any] = {"root": place, "source": self.source}
        if self.source != "imagefolder":
            paths = self._find_cifar().paths
            return content | {"files": file_manifest(paths[0].parent, [p.name for p in paths])}
        listing = self._list_folders()
        hasher = hashlib.sha256()
        for file in (file for files in listing.splits.values() for file in files):
            image = self._read(file.path)
            hasher.update(f"{file.path}\t{len(image)}\n".encode())
            hasher.update(image)
        counts = {split: len(files) for split, files in listing.splits.items()}
        described = {"classes": list(listing.class_ids), "num_images": counts}
        return content | described | {"sha256": hasher.hexdigest()}

    def check(self, *, verify: bool) -> Iterator[str]:
        """Check the data, and yield a log line for each split. `verify` also compares checksums.

        Raises ValueError if data are missing or damaged, or if an archive is not the official one.
        Of images in folders, only the header and the end mark are read.
        """
        if verify and self.source in {"cifar10", "cifar100"}:
            self._find_cifar().verify()
        if self.source == "imagefolder":
            self._check_headers()
        for name in ("train", "test"):
            split = self.split(name, image_size=SIDE)
            number, ignored = len(split.class_names), describe_ignored(self.ignored.get(name, {}))
            yield f"{len(split.labels)} {name} images of {number} classes in {self.root}{ignored}"

    def _check_headers(self) -> None:
        faults: list[str] = []
        for file in (file for files in self._list_folders().splits.values() for file in files):
            content = self._read(file.path)
            try:
                check_image(content, path=file.path, verify="header", resize=None)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            shown = "; ".join(faults[:5])
            raise ValueError(
                f"{KEY}: {len(faults)} images in {self.root} cannot be read; repair or delete "
                f"them: {shown}"
            )

    @property
    def ignored(self) -> Mapping[str, Mapping[str, int]]:
        """Return what `Listing.ignored` has of the splits "train" and "test"; {} for CIFAR."""
        return self._list_folders().ignored if self.source == "imagefolder" else {}

    def split(self, split: Split, *, image_size: int) -> TransferSplit:
        """Open one split. With class folders, "test" is `test/`, or `val/` if there is no `test/`.

        Images in folders are cropped to the centre square and resized to `image_size` (bicubic).
        CIFAR images keep their 32 pixels. Raises ValueError if data are missing or damaged.
        """
        if self.source != "imagefolder":
            return read_cifar(self._find_cifar(), split=split)
        listing = self._list_folders()
        files = listing.splits[split]

        def read(rows: Sequence[int]) -> UInt8[np.ndarray, "n 3 side side"]:
            from contradiff.data.transforms import apply_crop, centre_crop, decode

            squares: list[UInt8[np.ndarray, "3 side side"]] = []
            for path in (files[row].path for row in rows):
                image = decode(self._read(path), name=f"{KEY}: {self.root / path}")
                crop = centre_crop(*image.shape[1:])
                squares.append(apply_crop(image, crop, size=image_size).numpy())
            return np.stack(squares)

        labels = np.array([file.label for file in files], dtype=np.int64)
        return TransferSplit(labels, tuple(file.path for file in files), listing.class_ids, read)

    def _read(self, path: str) -> bytes:
        with explain_unreadable(self.root / path, key=KEY):
            return (self.root / path).read_bytes()

    def _find_cifar(self) -> CifarFiles:
        return find_cifar(self.root, "cifar10" if self.source == "cifar10" else "cifar100")

    def _list_folders(self) -> Listing:
        """List the class folders in `train/` and `test/`. If there is no `test/`, use `val/`."""
        with explain_unreadable(self.root, key=KEY):
            has_test = is_folder(self.root / "test") or not is_folder(self.root / "val")
        test = "test" if has_test else "val"
        listing = scan_folder(self.root, test=test, may_be_empty=True, key=KEY)
        if not listing.splits[test]:
            raise ValueError(f"{KEY}: {self.root / test} contains no images")
        train, files = listing.splits.values()
        ignored = {"train": listing.ignored["train"], "test": listing.ignored[test]}
        return replace(listing, splits={"train": train, "test": files}, ignored=ignored)
