"""What every source of ImageNet gives: images by class, whatever they are stored in.

An image's `path` is `<split>/<class>/<file>` in all sources, so that its key, its label and its
place in the manifest are the same from a tree, from archives and from Kaggle's download.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val")
EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".webp"})
SYNSETS_NAME = "LOC_synset_mapping.txt"
"""Kaggle's list of class folders and their names; optional elsewhere."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One raw image.

    Attributes:
        path: `<split>/<class>/<file>`, whether or not there is such a file.
        label: class index: the place of the class among the sorted class ids.
        num_bytes: size of the encoded image.
        stored: the file that holds it, relative to the root; empty: `path`.
        offset: where in that file it begins; parquet: its row. 0 for a file of its own.
        is_estimate: whether `num_bytes` is the mean of its parquet row group.
    """

    path: str
    label: int
    num_bytes: int = 0
    stored: str = ""
    offset: int = 0
    is_estimate: bool = False

    @property
    def key(self) -> str:
        """Unique, and without the dots that WebDataset would take for an extension.

        The class folder is part of it where the file's name does not begin with it already.
        """
        parent, _, name = self.path.rpartition("/")
        dot = name.rfind(".")
        stem = (name[:dot] if dot > 0 else name).replace(".", "_")
        folder = parent.rpartition("/")[2].replace(".", "_")
        return stem if stem.startswith(folder) else f"{folder}_{stem}"


Read = Callable[[ImageFile], bytes]
"""Gives an image's bytes as they are stored. Picklable: files are opened where it is called.

It raises ValueError, which names the file, if that is gone or shorter than it was.
"""


@dataclass(frozen=True)
class Listing:
    """All images of a source.

    Attributes:
        class_ids: sorted; a label is an index into them.
        class_names: one a class; its id where the source knows no name.
        splits: `train` and `val`: images in order of class, then of name.
        facts: further text that stands for the data, such as sizes of its containers.
    """

    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[ImageFile, ...]]
    facts: str = ""


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden files are not."""
    dot = name.rfind(".")
    return dot > 0 and name[0] != "." and name[dot:].lower() in EXTENSIONS


def check_listing(listing: Listing, *, shown_root: str) -> None:
    """Refuse what no source may give.

    Raises:
        ValueError: a class has no image in a split, or two images of a split have one key.
    """
    for split, files in listing.splits.items():
        present = {file.label for file in files}
        empty = [name for label, name in enumerate(listing.class_ids) if label not in present]
        if empty:
            raise ValueError(
                f"data.root: {shown_root}: {len(empty)} of {len(listing.class_ids)} classes have "
                f"no {split} image: {', '.join(empty[:5])}"
            )
        _check_keys(files)


def _check_keys(files: Sequence[ImageFile]) -> None:
    seen: dict[str, ImageFile] = {}
    for file in files:
        if (other := seen.setdefault(file.key, file)) is not file:
            places = [place.path + _whence(place) for place in (other, file)]
            raise ValueError(
                f"data.root: {' and '.join(places)} would both be {file.key}: rename one"
            )


def _whence(file: ImageFile) -> str:
    return f" (in {file.stored})" if file.stored else ""


def name_of(words: str) -> str:
    """The first of a class's names: `tench` of `tench, Tinca tinca`."""
    return words.split(",", maxsplit=1)[0].strip()


def read_synsets(path: Path) -> dict[str, str]:
    """Class ids and names of `LOC_synset_mapping.txt`; empty if there is no such file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {line[0]: name_of(line[1]) for line in lines if len(line) == 2}


def unreadable(error: OSError, *, shown: str) -> ValueError:
    """The user's fault behind an error of the system."""
    return ValueError(f"data.root: {shown} cannot be read: {error.strerror or error}")
