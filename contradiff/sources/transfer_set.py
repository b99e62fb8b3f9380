"""The set that features are transferred to, whatever its source: images by row, labels, names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int64, UInt8
from pydantic import Field

from contradiff.config import Section
from contradiff.sources.cifar import read_cifar
from contradiff.sources.cifar_files import CifarName, Split, find_cifar
from contradiff.sources.image_folder import ImageFolder, read_square

Source = Literal["digits", "cifar100", "cifar10", "imagefolder"]

ReadRows: TypeAlias = Callable[[Sequence[int]], UInt8[np.ndarray, "n 3 side side"]]
"""From rows of the split to their images, RGB from 0 to 255, all of one size."""


class TransferDataParams(Section):
    """Section `transfer_data`: the set that features are transferred to."""

    source: Source = Field(description="digits: written where root says | the others are there")
    root: str = Field(
        min_length=1, description="a folder, or for CIFAR the archive itself or its folder"
    )
    verify: bool = Field(description="CIFAR's archives must have the official checksums")


@dataclass(frozen=True)
class TransferSplit:
    """One split. Images are read when they are asked for: a folder's need not fit the memory."""

    labels: Int64[np.ndarray, " n"]
    keys: tuple[str, ...]
    class_names: tuple[str, ...]
    read: ReadRows


def cifar_name(source: Source) -> CifarName:
    """Which CIFAR's layout a source has: the digits are written in CIFAR-100's."""
    return "cifar10" if source == "cifar10" else "cifar100"


def read_transfer_split(
    root: Path, *, source: Source, split: Split, image_size: int, shown_root: str
) -> TransferSplit:
    """Open one split.

    Args:
        root: as `raw.ensure_transfer_archive` returned it.
        source: `transfer_data.source`.
        split: which half; of an ImageFolder, test is its `test`, or else its `val`.
        image_size: side to which an ImageFolder's images are brought. CIFAR's stay at 32 pixels:
            they are resized where they are used.
        shown_root: `transfer_data.root`.

    Raises:
        ValueError: the data is missing or damaged.
    """
    if source == "imagefolder":
        folder = ImageFolder.scan(root, shown_root=shown_root)
        files = folder.splits[split]
        return TransferSplit(
            labels=np.array([file.label for file in files], dtype=np.int64),
            keys=tuple(file.path for file in files),
            class_names=folder.class_names,
            read=lambda rows: read_square(root, [files[row] for row in rows], size=image_size),
        )
    name = cifar_name(source)
    content = read_cifar(find_cifar(root, name, shown_root=shown_root), name, split=split)
    return TransferSplit(
        labels=content.labels,
        keys=tuple(content.keys),
        class_names=tuple(content.class_names),
        read=lambda rows: content.images[list(rows)],
    )
