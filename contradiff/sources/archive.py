"""ILSVRC2012's own archives, read where they lie: nothing is unpacked.

`ILSVRC2012_img_train.tar` holds a tar for each class, `<wnid>.tar`. `ILSVRC2012_img_val.tar` holds
the validation images by number; the development kit knows their classes.
"""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tarfile import TarInfo

from contradiff.sources.devkit import DEVKIT_ARCHIVE, read_devkit
from contradiff.sources.folder import NUM_THREADS
from contradiff.sources.listing import (
    ImageFile,
    Listing,
    explain_unreadable,
    in_order,
    is_image_name,
)
from contradiff.sources.tars import Member, Members, check_digest, kept_index, walk_tar

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
MD5S = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}
"""As in torchvision.datasets.ImageNet."""


def read_member(root: Path, file: ImageFile) -> bytes:
    """Read one image at its offset; several threads and forked processes may do so at once.

    Raises:
        ValueError: the archive cannot be read, or is shorter than it was.
    """
    path = root / file.stored
    with explain_unreadable(path):
        archive = _opened(path, path.stat().st_mtime_ns)
        content = os.pread(archive, file.num_bytes, file.offset)
    if len(content) != file.num_bytes:
        raise ValueError(f"data.root: {path} is truncated: {file.path} is not whole in it")
    return content


@cache
def _opened(path: Path, _time: int) -> int:
    return os.open(path, os.O_RDONLY)


def scan_archives(
    root: Path, *, index_folder: Path | None, on_message: Callable[[str], None] = lambda _: None
) -> Listing:
    """List the images in the archives. Classes are the sorted wnids, as in class folders.

    Args:
        root: the folder of the archives and the development kit.
        index_folder: keeps the archives' indices between runs; None reads headers each time.
        on_message: told what takes long.

    Raises:
        ValueError: an archive or the kit is missing, truncated or damaged, or has a content that it
            should not have; or they do not fit together.
    """
    _check_presence(root)
    devkit = read_devkit(root)  # before the long work: it is as often missing as the rest

    def index(path: Path, read_headers: Callable[[Path], Members]) -> Members:
        def make() -> Members:
            on_message(f"reading the headers of {path} (once, as long as it does not change)")
            return read_headers(path)

        with explain_unreadable(path):
            return kept_index(path, index_folder, make)

    groups = index(root / TRAIN_ARCHIVE, _walk_classes)
    class_ids = tuple(sorted(groups))
    train = [
        ImageFile(f"train/{class_id}/{name}", label, num_bytes, TRAIN_ARCHIVE, offset)
        for label, class_id in enumerate(class_ids)
        for name, offset, num_bytes in groups[class_id]
    ]
    val = index(root / VAL_ARCHIVE, lambda path: {"val": _images(walk_tar(path))})["val"]
    labelled = _labelled(val, devkit.wnids, class_ids, path=root / VAL_ARCHIVE)
    names = tuple(devkit.names.get(class_id, class_id) for class_id in class_ids)
    return Listing(class_ids, names, {"train": in_order(train), "val": in_order(labelled)})


def verify_archives(root: Path, *, on_message: Callable[[str], None] = lambda _: None) -> None:
    """Compare the archives' md5 with ILSVRC's. This reads every byte, which takes minutes.

    An unpacked development kit has no md5 and is passed over.

    Raises:
        ValueError: an archive is missing or differs.
    """
    _check_presence(root)
    for name, expected in MD5S.items():
        path = root / name
        if name == DEVKIT_ARCHIVE and not path.is_file():
            on_message(f"{name} is not there (unpacked?): its md5 is not checked")
            continue
        on_message(f"reading {path.stat().st_size / 1e9:.1f} GB of {name} for its md5")
        remedy = "fetch it again, or set raw.verify to false for a set of your own"
        check_digest(path, algorithm="md5", expected=expected, remedy=remedy)


def _check_presence(root: Path) -> None:
    for name in (TRAIN_ARCHIVE, VAL_ARCHIVE):
        if not (root / name).is_file():
            raise ValueError(f"data.root: no {root / name}; expected ILSVRC's archives of 2012")


def _walk_classes(path: Path) -> Members:
    classes: dict[str, TarInfo] = {}
    for member in walk_tar(path):
        wnid, _, extension = _base(member.name).rpartition(".")
        if extension != "tar" or not wnid or wnid.startswith("."):
            continue
        if wnid in classes:
            raise ValueError(f"data.root: {path} holds {wnid}.tar twice")
        classes[wnid] = member
    if not classes:
        raise ValueError(f"data.root: {path} holds no class archives (<wnid>.tar)")

    def walk(member: TarInfo) -> list[Member]:
        return _images(walk_tar(path, inner=member), start=member.offset_data)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return dict(zip(classes, pool.map(walk, classes.values()), strict=True))


def _images(members: Iterable[TarInfo], *, start: int = 0) -> list[Member]:
    return [
        Member(name, start + member.offset_data, member.size)
        for member in members
        if is_image_name(name := _base(member.name))
    ]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _labelled(
    members: list[Member], wnids: tuple[str, ...], class_ids: tuple[str, ...], *, path: Path
) -> list[ImageFile]:
    """Give each validation image the class on the ground truth's line of the image's number."""
    if len(members) != len(wnids):
        raise ValueError(
            f"data.root: {path} has {len(members)} images, but the devkit's ground truth has "
            f"{len(wnids)} lines"
        )
    index = dict(zip(class_ids, range(len(class_ids)), strict=True))
    files: list[ImageFile] = []
    for name, offset, num_bytes in members:
        match = re.search(r"_(\d{8})\.\w+$", name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(wnids):
            raise ValueError(
                f"data.root: {path}: {name} has no number from 1 to {len(wnids)}, by which the "
                "ground truth would know it"
            )
        wnid = wnids[number - 1]
        if wnid not in index:
            raise ValueError(
                f"data.root: {path}: the devkit gives {name} the class {wnid}, which "
                f"{TRAIN_ARCHIVE} lacks"
            )
        path_of = f"val/{wnid}/{name}"
        files.append(ImageFile(path_of, index[wnid], num_bytes, VAL_ARCHIVE, offset))
    return files
