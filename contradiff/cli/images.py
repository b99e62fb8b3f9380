"""Lists of image files in, results of a model for all that can be read, files of features out."""

import csv
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from contradiff.cli.progress import progress_bar, say
from contradiff.files import replace_dir, replace_file
from contradiff.sources.folder import images_in

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from contradiff.pretrained.model import ContraDiff

Result = TypeVar("Result")
NUM_SHOWN = 5
"""So many faults of images are printed, then their number alone."""


@dataclass(frozen=True)
class Results(Generic[Result]):
    """The results of the files that could be read, and how many could not."""

    files: list[Path]
    values: list[Result]
    num_skipped: int


def list_images(paths: Sequence[Path], *, name: str) -> list[Path]:
    """Return the files among `paths`, and the images in and below the folders among them.

    Raises ValueError, with the argument's `name`, if a folder has no images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [path / file for file, _ in images_in(path, key=name)[0]]
        else:
            found.append(path)
    return found


def for_each_image(
    model: "ContraDiff",
    files: Sequence[Path],
    call: Callable[..., Sequence[Result]],
    *,
    text: str,
    batch_size: int | None,
) -> Results[Result]:
    """Call a method of the model with batches of images, and skip those that cannot be read.

    An image's place in `files` seeds its noise, so a damaged file changes no other's result. Raises
    ValueError if no image can be read.
    """
    size = batch_size or model.config.features.batch_size
    done, values, faults = list[int](), list[Result](), list[str]()
    with progress_bar(text, total=len(files)) as advance:
        for places, images in _batches(model, files, size, faults, advance):
            values += call(images, indices=places, batch_size=size)
            done += places
            advance(len(places))
    for fault in faults[:NUM_SHOWN]:
        say(f"skipped: {fault}")
    if len(faults) > 1:
        say(f"skipped: {len(faults)} of {len(files)} files in all")
    if not done:
        raise ValueError("no image could be read")
    return Results([files[place] for place in done], values, len(faults))


def compute_features(
    model: "ContraDiff", files: Sequence[Path], *, batch_size: int | None
) -> tuple[Results["Tensor"], "Tensor"]:
    """Return `for_each_image`'s results for features, and all features as a tensor."""
    from torch import stack

    def call(*images: Any, **options: Any) -> "list[Tensor]":
        return list(model.features(*images, **options))

    found = for_each_image(model, files, call, text="Features", batch_size=batch_size)
    return found, stack(found.values)


def _batches(
    model: "ContraDiff",
    files: Sequence[Path],
    size: int,
    faults: list[str],
    advance: Callable[[int], None],
) -> Iterator[tuple[list[int], "list[Tensor]"]]:
    """Yield the places of readable images in `files`, and their pixels; add to `faults`."""
    places, images = list[int](), list[Any]()
    for place, file in enumerate(files):
        try:
            images.append(model.prepare(file, name=str(file)))
            places.append(place)
        except ValueError as error:
            faults.append(str(error))
            advance(1)
        if len(images) == size:
            yield places, images
            places, images = [], []
    if images:
        yield places, images


def label_of(name: str) -> str | None:
    """Return the class folder in an image's path below the given folder, or None."""
    return name.partition("/")[0] if "/" in name else None


@contextmanager
def features_file(path: Path) -> Generator[Callable[[Sequence[str], "Tensor"], None]]:
    """Yield a function that writes names and features to `path`; the files appear at the end.

    A .parquet has the columns name, label (if there are class folders) and feature. A .npy has the
    features alone, and the .csv beside it has names and labels in the same order.

    Raises ValueError, before the block, if `path` cannot be written, or pyarrow is missing.
    """
    if path.suffix == ".parquet" and not find_spec("pyarrow"):
        raise ValueError(f"{path}: this form needs `pip install pyarrow`; or choose a name in .npy")
    paths = [path] if path.suffix == ".parquet" else [path, path.with_suffix(".csv")]
    with ExitStack() as stack:
        parts = [stack.enter_context(replace_file(each)) for each in paths]
        for part in parts:
            part.touch()  # says now, not after the work, that it cannot be written

        def write(names: Sequence[str], features: "Tensor") -> None:
            if path.suffix == ".npy":
                _write_npy(parts[0], parts[1], names, features)
            else:
                _write_parquet(parts[0], names, features)

        yield write


def _write_parquet(path: Path, names: Sequence[str], features: "Tensor") -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"name": list(names)}
    labels = [label_of(name) for name in names]
    if any(labels):
        columns["label"] = labels
    values = pa.array(features.numpy().ravel())
    columns["feature"] = pa.FixedSizeListArray.from_arrays(values, features.shape[1])
    parquet.write_table(pa.table(columns), path)


def _write_npy(path: Path, names_path: Path, names: Sequence[str], features: "Tensor") -> None:
    import numpy as np

    with path.open("wb") as file:
        np.save(file, features.numpy())
    with names_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label"])
        writer.writerows([name, label_of(name) or ""] for name in names)


@contextmanager
def samples_files(
    folder: Path, grid: Path | None
) -> Generator[Callable[[Sequence["Image.Image"]], None]]:
    """Yield a function that writes images to `folder`, and all of them as one PNG to `grid`.

    Both appear at the end. Raises ValueError, before the block, if they cannot be written.
    """
    with ExitStack() as stack:
        new = stack.enter_context(replace_dir(folder))
        if grid is None:
            new_grid = None
        elif grid.absolute().parent == folder.absolute():
            new_grid = new / grid.name
        else:
            new_grid = stack.enter_context(replace_file(grid))
            new_grid.touch()

        def write(images: Sequence["Image.Image"]) -> None:
            for image in images:
                image.save(new / f"{image.info['name']}.png")
            if new_grid is not None:
                _write_grid(new_grid, images)

        yield write


def _write_grid(path: Path, images: Sequence["Image.Image"]) -> None:
    import numpy as np
    import torch

    from contradiff.data.png import image_grid

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    columns = math.ceil(len(images) ** 0.5)
    path.write_bytes(image_grid(pixels.permute(0, 3, 1, 2), columns=columns))
