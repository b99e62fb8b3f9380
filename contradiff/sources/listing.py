"""The list of all raw images, which has the same form for every source.

In every source, an image gets the path `<split>/<class>/<file>`. So it has the same key, label and
position in class folders, ILSVRC's archives, Kaggle's download and parquet files.
"""

import re
import stat
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val")
EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""The files that torchvision's ImageFolder takes for images."""
_OFFICIAL = re.compile(r"(n\d{8})/(?:\1_(?=\d+\.)|(?=ILSVRC2012_val_))(\w+)\.JPEG", re.ASCII)
NUM_THREADS = 16
"""Number of threads that list folders. Many threads help on a slow network file system."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One raw image. Its `path` is `<split>/<class>/<file>`, even if there is no such file.

    In class folders, `<file>` may have folders too, as in `train/cat/indoors/5.jpg`.

    `stored` is the file below the root that contains the image (if empty: `path`). `offset` is the
    image's first byte in it. For parquet, `offset` is a row, and `num_bytes` is an estimate.
    """

    path: str
    label: int
    num_bytes: int = 0
    stored: str = ""
    offset: int = 0
    is_estimate: bool = False

    @property
    def key(self) -> str:
        """The image's name in shards. Different paths in a split have different keys.

        Official names of ImageNet give short keys, such as `n01440764_10026`. Otherwise, the key is
        the path in the split, with %2E for dots: `cat/5%2Ejpg`. (WebDataset cuts names at dots, and
        skips names such as `__cat__/5`.)
        """
        place = self.path.partition("/")[2]
        if match := _OFFICIAL.fullmatch(place):
            return f"{match[1]}_{match[2]}"
        quoted = place.replace("%", "%25").replace(".", "%2E")
        return re.sub("^__", "%5F%5F", quoted)


Read = Callable[[ImageFile], bytes]
"""Returns an image's bytes, in any process. Raises ValueError if the file cannot be read."""


@dataclass(frozen=True)
class Listing:
    """All images of a source, sorted by class, then by name. A label is an index of `class_ids`.

    `class_ids` are sorted. A class without a name has its id as name. `containers` is a text that
    describes parquet files, so that the digest of the raw images depends on them. `ignored` counts
    the files in folders that are not read: split => kind, such as ".gif" or "hidden" => number.
    """

    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[ImageFile, ...]]
    containers: str = ""
    ignored: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, dict[str, int]])

    def check(self, root: Path) -> None:
        """Raise ValueError if a class has no image in a split, or an image cannot get a key."""
        for split, files in self.splits.items():
            present = {file.label for file in files}
            empty = [name for label, name in enumerate(self.class_ids) if label not in present]
            if empty:
                fault = f"{len(empty)} of {len(self.class_ids)} classes have no {split} image"
                raise ValueError(f"data.root: {root}: {fault}: {', '.join(empty[:5])}")
            seen: dict[str, ImageFile] = {}
            for file in files:
                if re.search("[\ud800-\udfff\0]", key := file.key):
                    raise ValueError(f"data.root: the name {file.path!r} is not UTF-8: rename it")
                if (other := seen.setdefault(key, file)) is not file:
                    both = " and ".join(f"{f.path} (in {f.stored or root})" for f in (other, file))
                    raise ValueError(f"data.root: {both} both get the key {key}: rename one image")


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Return the end of a log line: how many files of which kinds are ignored; "" for none."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(ignored.items()))
    return f"; ignored files: {kinds}" if kinds else ""


def is_image_name(name: str) -> bool:
    """Return whether a file with this name is an image. Hidden files do not count."""
    dot = name.rfind(".")
    return dot > 0 and name[0] != "." and name[dot:].lower() in EXTENSIONS


def in_order(files: Iterable[ImageFile]) -> tuple[ImageFile, ...]:
    """Sort images by class, then by name."""
    return tuple(sorted(files, key=lambda file: (file.label, file.path)))


def first_name(words: str) -> str:
    """Return the first name of a class, such as `tench` from `tench, Tinca tinca`."""
    return words.split(",", maxsplit=1)[0].strip()


def read_synsets(root: Path) -> dict[str, str]:
    """Return class id => name from Kaggle's list in `root`, or {} if there is no such file."""
    path = root / "LOC_synset_mapping.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return {line[0]: first_name(line[1]) for line in lines if len(line) == 2}


def is_folder(path: Path) -> bool:
    """Like `path.is_dir()`, but raise PermissionError if a folder above `path` is locked."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def collect(faults: list[str]) -> Generator[None]:
    """Add the text of a ValueError to `faults`, so that the user sees all faults at once."""
    try:
        yield
    except ValueError as error:
        faults.append(str(error))


@contextmanager
def explain_unreadable(path: Path, *, key: str = "data.root") -> Generator[None]:
    """Turn an OSError about `path` into a ValueError, which names the parameter `key`."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename or path, error.strerror or error
        raise ValueError(f"{key}: {place} cannot be read: {reason}") from error
