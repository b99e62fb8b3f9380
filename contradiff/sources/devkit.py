"""ILSVRC2012's development kit: which class each validation image has.

`data/meta.mat` gives each wnid its ILSVRC2012_ID, which is *not* its place among the sorted wnids;
`data/ILSVRC2012_validation_ground_truth.txt` gives one such id a line, image by image.
"""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contradiff.sources.listing import name_of

DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_FOLDERS = ("ILSVRC2012_devkit_t12/data", "data")
META_NAME = "meta.mat"
GROUND_TRUTH_NAME = "ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Devkit:
    """What the kit says of classes.

    Attributes:
        wnids: of each validation image, in the order of their numbers.
        names: of the classes, by wnid.
    """

    wnids: tuple[str, ...]
    names: Mapping[str, str]


def read_devkit(root: Path, *, shown_root: str) -> Devkit:
    """Read the kit, packed or unpacked, from the folder of the archives.

    Raises:
        ValueError: it is missing, damaged, or its two files do not belong together.
    """
    contents = _read_files(root, shown_root=shown_root)
    id_to_wnid, names = _parse_meta(contents[META_NAME], shown=f"{shown_root}: {META_NAME}")
    wnids: list[str] = []
    shown = f"data.root: {shown_root}: {GROUND_TRUTH_NAME}"
    text = contents[GROUND_TRUTH_NAME].decode("ascii", "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip().isdecimal() or int(line) not in id_to_wnid:
            raise ValueError(
                f"{shown}: line {number} is no ILSVRC2012_ID of a class of {META_NAME}: {line!r}"
            )
        wnids.append(id_to_wnid[int(line)])
    return Devkit(tuple(wnids), names)


def _read_files(root: Path, *, shown_root: str) -> dict[str, bytes]:
    wanted = (META_NAME, GROUND_TRUTH_NAME)
    for folder in DEVKIT_FOLDERS:
        if all((root / folder / name).is_file() for name in wanted):
            return {name: (root / folder / name).read_bytes() for name in wanted}
    path = root / DEVKIT_ARCHIVE
    if not path.is_file():
        places = " or ".join(f"{folder}/{{{','.join(wanted)}}}" for folder in DEVKIT_FOLDERS)
        raise ValueError(
            f"data.root: {shown_root} lacks {DEVKIT_ARCHIVE} (or {places}), which holds the labels "
            "of ILSVRC's validation images"
        )
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if name in wanted and folder.endswith("data") and member.isreg():
                    file = archive.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"data.root: {shown_root}/{DEVKIT_ARCHIVE} is damaged or truncated: {error}"
        ) from error
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"data.root: {shown_root}/{DEVKIT_ARCHIVE} lacks data/{' and data/'.join(missing)}"
        )
    return found


def _parse_meta(content: bytes, *, shown: str) -> tuple[dict[int, str], dict[str, str]]:
    """Ids and names of the lowest synsets, those without children: ILSVRC's classes."""
    from scipy.io import loadmat

    try:
        # A MATLAB file holds data alone; scipy runs nothing of it.
        synsets: Any = loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])
        rows = synsets["synsets"].reshape(-1)
        leaves = [row for row in rows if int(row["num_children"]) == 0]
        id_to_wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        names = {str(row["WNID"]): name_of(str(row["words"])) for row in leaves}
    except Exception as error:  # scipy names no type for what a damaged file raises
        raise ValueError(f"data.root: {shown} has no readable table `synsets`: {error}") from error
    if len(id_to_wnid) != len(leaves) or len(names) != len(leaves) or not leaves:
        raise ValueError(
            f"data.root: {shown}: `synsets` has no classes, or one id or wnid for two of them"
        )
    return id_to_wnid, names
