"""Read the official archives of ILSVRC2012 (ImageNet) without unpacking them.

`ILSVRC2012_img_train.tar` contains one tar for each class: `<wnid>.tar`. A wnid is a WordNet id,
such as n01440764. `ILSVRC2012_img_val.tar` contains numbered validation images. The development kit
has their classes: line i of `ILSVRC2012_validation_ground_truth.txt` is the ILSVRC2012_ID of the
class of image i, and `meta.mat` maps this ID to a wnid. In this project, a class's label is *not*
its ILSVRC2012_ID, but the position of its wnid in the sorted wnids.
"""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from contradiff.sources import listing
from contradiff.sources.listing import ImageFile, Listing
from contradiff.sources.tars import Member, Members, check_digest, kept_index, walk_tar

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
MAX_DEVKIT_BYTES = 1 << 26  # the official files have less than 2 MB
DEVKIT_FOLDERS = ("ILSVRC2012_devkit_t12/data", "data")
META, GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
MD5S = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}
"""The md5 checksums that torchvision.datasets.ImageNet uses."""


def read_member(root: Path, file: ImageFile) -> bytes:
    """Read one image, in any thread or process. Raises ValueError if the image is unreadable."""
    path = root / file.stored
    with listing.explain_unreadable(path):
        archive = _opened(path, path.stat().st_mtime_ns)
        content = os.pread(archive, file.num_bytes, file.offset)
    if len(content) != file.num_bytes:
        raise ValueError(f"data.root: {path} is truncated: {file.path} is incomplete")
    return content


@cache
def _opened(path: Path, _time: int) -> int:
    return os.open(path, os.O_RDONLY)


def scan_archives(
    root: Path, *, index_folder: Path | None, verify: bool, on_message: Callable[[str], None]
) -> Listing:
    """List the images in the archives. The classes are the sorted wnids.

    `index_folder` keeps the list for later runs. If `index_folder` is None, each run reads all tar
    headers. `verify` compares the md5 of each archive, which takes minutes. Raises ValueError if an
    archive or the development kit is missing or damaged, or contradicts the other files.
    """
    for name in (TRAIN_ARCHIVE, VAL_ARCHIVE):
        if not (root / name).is_file():
            raise ValueError(f"data.root: {root / name} is missing; put the archive there")
    for name, expected in MD5S.items() if verify else ():
        path = root / name
        if name == DEVKIT_ARCHIVE and not path.is_file():
            on_message(f"{name} is missing (perhaps unpacked), so its md5 is not checked")
            continue
        on_message(f"reading {path.stat().st_size / 1e9:.1f} GB of {name} to check its md5")
        remedy = "fetch it again, or set raw.verify to false to use other data"
        check_digest(path, "md5", expected, remedy=remedy)
    wnids, class_names = read_devkit(root)  # first: the kit is often missing

    def walk(path: Path) -> Members:
        on_message(f"reading the headers of {path} (later runs do so only if the file changes)")
        is_train = path.name == TRAIN_ARCHIVE
        return _walk_classes(path) if is_train else {"val": _images(walk_tar(path))}

    def index(name: str) -> Members:
        with listing.explain_unreadable(root / name):
            return kept_index(root / name, index_folder, walk)

    groups, members = index(TRAIN_ARCHIVE), index(VAL_ARCHIVE)["val"]
    class_ids = tuple(sorted(groups))
    train = [
        ImageFile(f"train/{class_id}/{name}", label, num_bytes, TRAIN_ARCHIVE, offset)
        for label, class_id in enumerate(class_ids)
        for name, offset, num_bytes in groups[class_id]
    ]
    val = _labelled(members, wnids, class_ids, path=root / VAL_ARCHIVE)
    names = tuple(class_names.get(class_id, class_id) for class_id in class_ids)
    splits = {"train": listing.in_order(train), "val": listing.in_order(val)}
    return Listing(class_ids, names, splits)


def _walk_classes(path: Path) -> Members:
    classes: dict[str, tarfile.TarInfo] = {}
    for member in walk_tar(path):
        wnid, _, extension = Path(member.name).name.rpartition(".")
        if extension != "tar" or not wnid or wnid.startswith("."):
            continue
        if wnid in classes:
            raise ValueError(f"data.root: {path} contains {wnid}.tar twice")
        classes[wnid] = member
    if not classes:
        raise ValueError(f"data.root: {path} contains no class archives (<wnid>.tar)")

    def walk(member: tarfile.TarInfo) -> list[Member]:
        return _images(walk_tar(path, inner=member), start=member.offset_data)

    with ThreadPoolExecutor(listing.NUM_THREADS) as pool:
        return dict(zip(classes, pool.map(walk, classes.values()), strict=True))


def _images(members: Iterable[tarfile.TarInfo], *, start: int = 0) -> list[Member]:
    return [
        Member(name, start + member.offset_data, member.size)
        for member in members
        if listing.is_image_name(name := member.name.rpartition("/")[2])
    ]


def _labelled(
    members: list[Member], wnids: list[str], class_ids: tuple[str, ...], *, path: Path
) -> list[ImageFile]:
    """Give validation images their labels. `wnids[i - 1]` is the wnid of image number i."""
    total = len(wnids)
    if len(members) != total:
        fault = f"{len(members)} images, but the devkit's ground truth has {total} lines"
        raise ValueError(f"data.root: {path} has {fault}")
    label_of = {class_id: label for label, class_id in enumerate(class_ids)}
    files: list[ImageFile] = []
    for name, offset, num_bytes in members:
        match = re.search(r"_(\d{8})\.\w+$", name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= total:
            fault = f"the name {name} does not end in a number from 1 to {total}"
            raise ValueError(f"data.root: {path}: {fault}")
        wnid = wnids[number - 1]
        if wnid not in label_of:
            fault = f"the devkit gives {name} the class {wnid}, which is not in {TRAIN_ARCHIVE}"
            raise ValueError(f"data.root: {path}: {fault}")
        path_of = f"val/{wnid}/{name}"
        files.append(ImageFile(path_of, label_of[wnid], num_bytes, VAL_ARCHIVE, offset))
    return files


def read_devkit(root: Path) -> tuple[list[str], dict[str, str]]:
    """Return the validation images' wnids, and a map wnid => name. Raises ValueError on failure."""
    from scipy.io import loadmat

    contents = _devkit_files(root)
    shown = f"data.root: {root}: {META}"
    try:
        # This is safe: a MATLAB file contains only data, and scipy runs no code from it.
        file = io.BytesIO(contents[META])
        synsets: Any = loadmat(file, squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = [row for row in synsets.reshape(-1) if int(row["num_children"]) == 0]
        wnid_of = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in leaves}
        names = {str(row["WNID"]): listing.first_name(str(row["words"])) for row in leaves}
    except Exception as error:  # scipy does not document which errors a damaged file causes
        raise ValueError(f"{shown} has no readable table `synsets`: {error}") from error
    if not leaves or not len(leaves) == len(wnid_of) == len(names):
        raise ValueError(f"{shown}: `synsets` has no classes, or two classes with the same id")
    ids = [line.strip() for line in contents[GROUND_TRUTH].decode("ascii", "replace").splitlines()]
    for number, line in enumerate(ids, start=1):
        if line not in wnid_of:
            fault = f"line {number} is {line!r}, which is no ILSVRC2012_ID in {META}"
            raise ValueError(f"data.root: {root}: {GROUND_TRUTH}: {fault}")
    return [wnid_of[line] for line in ids], names


def _devkit_files(root: Path) -> dict[str, bytes]:
    wanted, path = (META, GROUND_TRUTH), root / DEVKIT_ARCHIVE
    for folder in DEVKIT_FOLDERS:
        if all((root / folder / name).is_file() for name in wanted):
            return {name: (root / folder / name).read_bytes() for name in wanted}
    if not path.is_file():
        lacks = f"lacks {DEVKIT_ARCHIVE}, which contains the labels of the validation images"
        raise ValueError(f"data.root: {root} {lacks}; put it there, packed or unpacked")
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                is_wanted = name in wanted and folder.endswith("data") and member.isreg()
                is_wanted = is_wanted and member.size <= MAX_DEVKIT_BYTES
                if is_wanted and (file := archive.extractfile(member)):
                    found[name] = file.read()
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"data.root: {path} is damaged or truncated: {error}") from error
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"data.root: {path} lacks data/{' and data/'.join(missing)}")
    return found
