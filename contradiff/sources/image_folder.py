"""Any labelled set as folders: train/<class>/* and test/<class>/* (or val/<class>/*)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from contradiff.sources.cifar_files import Split
from contradiff.sources.listing import EXTENSIONS, ImageFile, is_image_name

TEST_FOLDERS = ("test", "val")
"""Where a set has both, `test` is read and `val` left to whoever tunes on it."""


@dataclass(frozen=True)
class ImageFolder:
    """The files of a tree, in order, and a digest of all their names and bytes.

    Classes are the sorted folder names of train/, as in torchvision; the images of a class are
    sorted by name.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: Mapping[Split, tuple[ImageFile, ...]]

    @classmethod
    def scan(cls, root: Path, *, shown_root: str) -> "ImageFolder":
        """List a tree.

        Args:
            root: the tree.
            shown_root: how the parameters name it.

        Raises:
            ValueError: a folder is missing, a class has no training image, or the test set has
                classes that the training set lacks or no image at all.
        """
        train = root / "train"
        test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        if not train.is_dir() or test is None:
            raise ValueError(
                f"transfer_data.root: {shown_root} must hold train/<class>/* and test/<class>/* "
                "(or val/<class>/*)"
            )
        class_names = tuple(sorted(path.name for path in train.iterdir() if path.is_dir()))
        unknown = {path.name for path in test.iterdir() if path.is_dir()} - set(class_names)
        if unknown:
            raise ValueError(
                f"transfer_data.root: {shown_root}/{test.name} has classes that train/ lacks: "
                f"{sorted(unknown)[:5]}"
            )
        splits: dict[Split, tuple[ImageFile, ...]] = {
            "train": _files(root, train, class_names),
            "test": _files(root, test, class_names),
        }
        filled = {file.label for file in splits["train"]}
        empty = [name for label, name in enumerate(class_names) if label not in filled]
        kinds = ", ".join(sorted(EXTENSIONS))
        if empty or not class_names:
            what = f"train/{empty[0]}" if empty else "train"
            raise ValueError(f"transfer_data.root: {shown_root}/{what} holds no images ({kinds})")
        if not splits["test"]:
            raise ValueError(
                f"transfer_data.root: {shown_root}/{test.name} holds no images ({kinds})"
            )
        return cls(root, class_names, splits)

    def digest(self) -> str:
        """SHA-256 over every path and every byte."""
        hasher = hashlib.sha256()
        for files in self.splits.values():
            for file in files:
                content = (self.root / file.path).read_bytes()
                hasher.update(f"{file.path}\t{len(content)}\n".encode())
                hasher.update(content)
        return hasher.hexdigest()


def read_square(
    root: Path, files: Sequence[ImageFile], *, size: int
) -> UInt8[np.ndarray, "n 3 size size"]:
    """Decode images and bring them to one size, as the pipeline does: centre crop, then bicubic.

    Args:
        root: what the files' paths are relative to.
        files: the images; one at least.
        size: their new side, in pixels.

    Raises:
        ValueError: a file is no image that can be read; names it.
    """
    from contradiff.data.transforms import apply_crop, centre_crop, decode

    squares: list[UInt8[np.ndarray, "3 size size"]] = []
    for file in files:
        path = root / file.path
        image = decode(path.read_bytes(), name=str(path))
        squares.append(apply_crop(image, centre_crop(*image.shape[1:]), size=size).numpy())
    return np.stack(squares)


def _files(root: Path, folder: Path, class_names: Sequence[str]) -> tuple[ImageFile, ...]:
    return tuple(
        ImageFile(path.relative_to(root).as_posix(), label)
        for label, name in enumerate(class_names)
        for path in sorted((folder / name).glob("*"))
        if is_image_name(path.name)
    )
