"""Images by class: what every source of raw images lists, whatever the images are stored in.

An image's `path` is `<split>/<class>/<file>` in all sources. So its key, its label and its place in
the order are the same from class folders, ILSVRC's archives, Kaggle's download and parquet.
"""

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val")
EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".webp"})
NUM_THREADS = 16
"""Folders listed at a time: a network file system answers each slowly, but many at once."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One raw image. Its `path` is `<split>/<class>/<file>`, even if there is no such file.

    It lies in the file `stored` (relative to the root; if empty, that is `path`), from the byte
    `offset` on. In parquet, that is its row, and `num_bytes` is the mean of its row group.
    """

    path: str
    label: int
    num_bytes: int = 0
    stored: str = ""
    offset: int = 0
    is_estimate: bool = False

    @property
    def key(self) -> str:
        """The image's name in shards: class folder and file name, without dots (for WebDataset)."""
        parent, _, name = self.path.rpartition("/")
        dot = name.rfind(".")
        stem = (name[:dot] if dot > 0 else name).replace(".", "_")
        folder = parent.rpartition("/")[2].replace(".", "_")
        return stem if stem.startswith(folder) else f"{folder}_{stem}"


Read = Callable[[ImageFile], bytes]
"""Returns an image's stored bytes, in any process; ValueError names a file gone or cut short."""


@dataclass(frozen=True)
class Listing:
    """All images of a source, ordered by class, then by name; labels index the sorted `class_ids`.

    A class without a name is named by its id. The digest covers the text `containers` too, which
    describes the files that hold the images.
    """

    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[ImageFile, ...]]
    containers: str = ""

    def check(self, root: Path) -> None:
        """Raise ValueError if a class has no image in a split, or an image has no usable key."""
        for split, files in self.splits.items():
            present = {file.label for file in files}
            empty = [name for label, name in enumerate(self.class_ids) if label not in present]
            if empty:
                fault = f"{len(empty)} of {len(self.class_ids)} classes have no {split} image"
                raise ValueError(f"data.root: {root}: {fault}: {', '.join(empty[:5])}")
            seen: dict[str, ImageFile] = {}
            for file in files:
                if re.search("[\ud800-\udfff\0]", key := file.key):
                    raise ValueError(f"data.root: {file.path!r} is not named in UTF-8: rename it")
                if (other := seen.setdefault(key, file)) is not file:
                    both = " and ".join(f"{f.path} (in {f.stored or root})" for f in (other, file))
                    raise ValueError(f"data.root: {both} would both be {key}: rename one")


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden files do not."""
    dot = name.rfind(".")
    return dot > 0 and name[0] != "." and name[dot:].lower() in EXTENSIONS


def in_order(files: Iterable[ImageFile]) -> tuple[ImageFile, ...]:
    """Sort by class, then by name."""
    return tuple(sorted(files, key=lambda file: (file.label, file.path)))


def first_name(words: str) -> str:
    """Return the first of a class's names: `tench` from `tench, Tinca tinca`."""
    return words.split(",", maxsplit=1)[0].strip()


def read_synsets(root: Path) -> dict[str, str]:
    """Read names by class id from Kaggle's list, which is optional elsewhere."""
    path = root / "LOC_synset_mapping.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return {line[0]: first_name(line[1]) for line in lines if len(line) == 2}


@contextmanager
def explain_unreadable(path: Path, *, key: str = "data.root") -> Generator[None]:
    """Raise ValueError where the system cannot read `path`, to which the parameter `key` led."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename or path, error.strerror or error
        raise ValueError(f"{key}: {place} cannot be read: {reason}") from error
