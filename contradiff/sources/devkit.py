"""ILSVRC2012's development kit: which class each validation image has.

`data/meta.mat` gives each wnid its ILSVRC2012_ID, which is *not* its place among the sorted wnids.
`data/ILSVRC2012_validation_ground_truth.txt` has one such id on a line, image by image.
"""

import io
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from contradiff.sources.listing import first_name

DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_FOLDERS = ("ILSVRC2012_devkit_t12/data", "data")
META_NAME = "meta.mat"
GROUND_TRUTH_NAME = "ILSVRC2012_validation_ground_truth.txt"


class Devkit(NamedTuple):
    """The validation images' wnids, in the order of the images' numbers; class names by wnid."""

    wnids: tuple[str, ...]
    names: dict[str, str]


def read_devkit(root: Path) -> Devkit:
    """Read the kit, packed or unpacked, from the folder of the archives.

    Raises:
        ValueError: it is missing or damaged, or its two files do not fit together.
    """
    contents = _read_files(root)
    id_to_wnid, names = _parse_meta(contents[META_NAME], root=root)
    lines = contents[GROUND_TRUTH_NAME].decode("ascii", "replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip() not in id_to_wnid:
            raise ValueError(
                f"data.root: {root}: {GROUND_TRUTH_NAME}: line {number} is no ILSVRC2012_ID of a "
                f"class of {META_NAME}: {line!r}"
            )
    return Devkit(tuple(id_to_wnid[line.strip()] for line in lines), names)


def _read_files(root: Path) -> dict[str, bytes]:
    wanted, path = (META_NAME, GROUND_TRUTH_NAME), root / DEVKIT_ARCHIVE
    for folder in DEVKIT_FOLDERS:
        if all((root / folder / name).is_file() for name in wanted):
            return {name: (root / folder / name).read_bytes() for name in wanted}
    if not path.is_file():
        raise ValueError(
            f"data.root: {root} lacks {DEVKIT_ARCHIVE} (or unpacked, {' or '.join(DEVKIT_FOLDERS)} "
            f"with {' and '.join(wanted)}), which holds the labels of ILSVRC's validation images"
        )
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                is_wanted = name in wanted and folder.endswith("data") and member.isreg()
                if is_wanted and (file := archive.extractfile(member)):
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"data.root: {path} is damaged or truncated: {error}") from error
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"data.root: {path} lacks data/{' and data/'.join(missing)}")
    return found


def _parse_meta(content: bytes, *, root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Wnids by id, and names by wnid, of ILSVRC's classes: the synsets without children."""
    from scipy.io import loadmat

    shown = f"data.root: {root}: {META_NAME}"
    try:
        # A MATLAB file holds only data: scipy runs no code from it.
        synsets: Any = loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])
        rows = synsets["synsets"].reshape(-1)
        leaves = [row for row in rows if int(row["num_children"]) == 0]
        id_to_wnid = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in leaves}
        names = {str(row["WNID"]): first_name(str(row["words"])) for row in leaves}
    except Exception as error:  # scipy does not say what it raises for a damaged file
        raise ValueError(f"{shown} has no readable table `synsets`: {error}") from error
    if not leaves or not len(leaves) == len(id_to_wnid) == len(names):
        raise ValueError(f"{shown}: `synsets` has no classes, or two with one id or wnid")
    return id_to_wnid, names
