"""ILSVRC2012's own archives, read where they lie: nothing is unpacked.

`ILSVRC2012_img_train.tar` holds a tar a class, `<wnid>.tar`; `ILSVRC2012_img_val.tar` holds the
validation images, numbered, whose classes the development kit knows. A first scan reads the tars'
headers; its index is kept, and used as long as the archives do not change.
"""

import hashlib
import os
import re
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contradiff.sources.devkit import DEVKIT_ARCHIVE, read_devkit
from contradiff.sources.folder import in_order
from contradiff.sources.listing import ImageFile, Listing, is_image_name, unreadable
from contradiff.sources.tar_index import Member, identity_of, load_index, store_index, walk_tar

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
MD5S = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}
"""As torchvision.datasets.ImageNet has them."""
NUM_THREADS = 16
"""Classes indexed at a time: network file systems answer each request late, but many at once."""
_NUMBERED = re.compile(r"_(\d{8})\.\w+$")


class ArchiveReader:
    """Reads images out of tars; each process opens an archive when it first reads from it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}

    def __call__(self, file: ImageFile, /) -> bytes:
        """Read one image by its place; several threads and forked processes may do so at once."""
        path = self.root / file.stored
        try:
            if file.stored not in self._descriptors:
                self._descriptors[file.stored] = os.open(path, os.O_RDONLY)
            content = os.pread(self._descriptors[file.stored], file.num_bytes, file.offset)
        except OSError as error:
            raise unreadable(error, shown=str(path)) from error
        if len(content) != file.num_bytes:
            raise ValueError(f"data.root: {path} is truncated: {file.path} is not whole in it")
        return content

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind."""
        return {"root": self.root, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def scan_archives(
    root: Path,
    *,
    shown_root: str,
    cache: Path | None,
    on_message: Callable[[str], None] = lambda _: None,
) -> Listing:
    """List the images in the archives. Classes are the sorted wnids, as of an unpacked tree.

    Args:
        root: the folder of the archives and the development kit.
        shown_root: how the parameters name it.
        cache: a folder that keeps the index between runs; none: headers are read every time.
        on_message: told what takes long.

    Raises:
        ValueError: an archive or the kit is missing, truncated, damaged, or holds what it should
            not; or they do not belong together.
    """
    _check_presence(root, shown_root=shown_root)
    devkit = read_devkit(root, shown_root=shown_root)  # small, and as often missing as the rest
    groups = _index(root, TRAIN_ARCHIVE, shown_root, cache, on_message)
    if not groups:
        raise ValueError(
            f"data.root: {shown_root}/{TRAIN_ARCHIVE} holds no class archives (<wnid>.tar)"
        )
    class_ids = tuple(sorted(groups))
    train = [
        ImageFile(
            f"train/{class_id}/{_base(member)}",
            label,
            member.num_bytes,
            TRAIN_ARCHIVE,
            member.offset,
        )
        for label, class_id in enumerate(class_ids)
        for member in groups[class_id]
        if is_image_name(_base(member))
    ]
    members = _index(root, VAL_ARCHIVE, shown_root, cache, on_message).get("", [])
    members = [member for member in members if is_image_name(_base(member))]
    val = _labelled(members, devkit.wnids, class_ids, shown_root=shown_root)
    names = tuple(devkit.names.get(class_id, class_id) for class_id in class_ids)
    return Listing(class_ids, names, {"train": in_order(train), "val": in_order(val)})


def verify_archives(
    root: Path, *, shown_root: str, on_message: Callable[[str], None] = lambda _: None
) -> None:
    """Compare the archives' md5 with ILSVRC's; every byte is read, which takes minutes.

    A development kit that is unpacked has none.

    Raises:
        ValueError: one is missing or differs; names it.
    """
    _check_presence(root, shown_root=shown_root)
    for name, expected in MD5S.items():
        path = root / name
        if name == DEVKIT_ARCHIVE and not path.is_file():
            on_message(f"{name} is not there (unpacked?): its md5 is not checked")
            continue
        on_message(f"reading {path.stat().st_size / 1e9:.1f} GB of {name} for its md5")
        with path.open("rb") as file:
            # against damage, as ILSVRC publishes it, not against forgery
            found = hashlib.file_digest(
                file, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
        if found != expected:
            raise ValueError(
                f"data.root: {shown_root}/{name} has md5 {found}, ILSVRC's has {expected}: fetch "
                "it anew (or set raw.verify to false for a set of your own)"
            )


def _check_presence(root: Path, *, shown_root: str) -> None:
    for name in (TRAIN_ARCHIVE, VAL_ARCHIVE):
        if not (root / name).is_file():
            raise ValueError(
                f"data.root: no {shown_root}/{name}; expected ILSVRC's archives of 2012"
            )


def _index(
    root: Path,
    name: str,
    shown_root: str,
    cache: Path | None,
    on_message: Callable[[str], None],
) -> dict[str, list[Member]]:
    """Members of an archive: of train by class, of val in one group without a name."""
    path, shown = root / name, f"{shown_root}/{name}"
    kept = None if cache is None else cache / f"{name}.json"
    try:
        identity = identity_of(path)
        if (known := load_index(kept, identity)) is not None:
            return known
        on_message(f"reading the headers of {shown} (once, as long as it does not change)")
        with _opened(path) as descriptor:
            outer = list(walk_tar(descriptor, start=0, end=path.stat().st_size, shown=shown))
            if name == TRAIN_ARCHIVE:
                groups = _index_classes(descriptor, outer, shown=shown)
            else:
                groups = {"": outer}
    except OSError as error:
        raise unreadable(error, shown=shown) from error
    store_index(kept, identity, groups)
    return groups


def _index_classes(descriptor: int, outer: list[Member], *, shown: str) -> dict[str, list[Member]]:
    classes: dict[str, Member] = {}
    for member in outer:
        stem, dot, extension = _base(member).rpartition(".")
        if extension != "tar" or not dot or stem.startswith("."):
            continue
        if stem in classes:
            raise ValueError(f"data.root: {shown} holds {_base(member)} twice")
        classes[stem] = member

    def walk(member: Member) -> list[Member]:
        end = member.offset + member.num_bytes
        inner = f"{shown}: {member.name}"
        return list(walk_tar(descriptor, start=member.offset, end=end, shown=inner))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return dict(zip(classes, pool.map(walk, classes.values()), strict=True))


def _labelled(
    members: list[Member], wnids: tuple[str, ...], class_ids: tuple[str, ...], *, shown_root: str
) -> list[ImageFile]:
    """Give each validation image the class that the ground truth has at its number."""
    if len(members) != len(wnids):
        raise ValueError(
            f"data.root: the devkit's ground truth has {len(wnids)} lines for the {len(members)} "
            f"images of {shown_root}/{VAL_ARCHIVE}"
        )
    index = {class_id: label for label, class_id in enumerate(class_ids)}
    files: list[ImageFile] = []
    for member in members:
        match = _NUMBERED.search(_base(member))
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(wnids):
            raise ValueError(
                f"data.root: {shown_root}/{VAL_ARCHIVE}: {member.name} has no number from 1 to "
                f"{len(wnids)} by which the ground truth knows it"
            )
        wnid = wnids[number - 1]
        if wnid not in index:
            raise ValueError(
                f"data.root: {shown_root}: the devkit gives {member.name} the class {wnid}, which "
                f"{TRAIN_ARCHIVE} lacks"
            )
        path = f"val/{wnid}/{_base(member)}"
        files.append(ImageFile(path, index[wnid], member.num_bytes, VAL_ARCHIVE, member.offset))
    return files


def _base(member: Member) -> str:
    return member.name.rpartition("/")[2]


@contextmanager
def _opened(path: Path) -> Generator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
