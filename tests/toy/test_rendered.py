"""Images are rendered once per recipe, and other files are never replaced."""

from pathlib import Path
from typing import Any

import pytest

from contradiff.data.params import DataParams
from contradiff.sources.imagenet import scan_images
from contradiff.sources.transfer_set import TransferSet
from contradiff.toy import rendered
from contradiff.toy.classes import CLASSES
from contradiff.toy.rendered import DIGITS_PER_CLASS, ensure_digits, ensure_images

NUM_CLASSES = len(CLASSES)
SIZES = {"image_size": 16, "num_train": NUM_CLASSES, "num_val": NUM_CLASSES}
TOY: dict[str, Any] = {"source": "toy", "root": "data/raw/toy", **SIZES}


def render(root: Path, *, seed: int = 0, told: Any = None, **changes: int) -> Path:
    params = DataParams.model_validate(TOY | changes)
    return ensure_images(root, params, seed=seed, on_progress=[].append if told is None else told)


def test_images_are_rendered_once(tmp_path: Path):
    """An unfinished folder is rendered again, and other files are not replaced."""
    told: list[int] = []
    photo = tmp_path / "train/cat/1.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_text("precious")
    folder = render(tmp_path, told=told.append)
    assert told == [1] * (2 * NUM_CLASSES)
    splits = scan_images(folder).listing.splits
    assert [len(files) for files in splits.values()] == [NUM_CLASSES, NUM_CLASSES]
    assert render(tmp_path, told=told.append) == folder
    assert len(told) == 2 * NUM_CLASSES
    (folder / rendered.RECIPE_NAME).unlink()
    assert render(tmp_path, told=told.append) == folder
    assert (len(told), photo.read_text()) == (4 * NUM_CLASSES, "precious")


def test_images_are_rendered_anew_when_the_recipe_changes(tmp_path: Path):
    first = render(tmp_path)
    before = scan_images(first).digest
    for changes in ({"seed": 1}, {"num_train": NUM_CLASSES + 1}, {"image_size": 24}):
        assert scan_images(render(tmp_path, **changes)).digest != before
    # The first folder stays for experiments that run at the same time.
    assert scan_images(first).digest == before


def test_every_file_of_a_renderer_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    room = Path(rendered.__file__).parent
    monkeypatch.setattr(rendered, "__file__", str(tmp_path / "rendered.py"))
    contents = {path.name: path.read_bytes() for path in room.glob("*.py")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    images, digits = render(tmp_path / "root"), ensure_digits(tmp_path / "root", seed=0)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content + b"#")
        assert render(tmp_path / "root") != images
        assert (ensure_digits(tmp_path / "root", seed=0) != digits) == (name == "digits.py")
        (tmp_path / name).write_bytes(content)
    assert render(tmp_path / "root") == images


def test_digits_are_written_once(tmp_path: Path):
    folders = [ensure_digits(tmp_path, seed=seed) for seed in (0, 1)]
    written = (folders[0] / "train").stat().st_mtime_ns
    assert ensure_digits(tmp_path, seed=0) == folders[0] != folders[1]
    assert (folders[0] / "train").stat().st_mtime_ns == written
    pool = TransferSet(folders[0], "digits").split("train", image_size=32)
    assert len(pool.labels) == 10 * DIGITS_PER_CLASS
