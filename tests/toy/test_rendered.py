"""Rendered once, anew when the recipe changes, never over something else."""

from pathlib import Path
from typing import Any

import pytest

from contradiff.data.params import DataParams
from contradiff.sources.imagenet import scan_images
from contradiff.sources.transfer_set import TransferSet
from contradiff.toy import rendered, tree
from contradiff.toy.classes import CLASSES
from contradiff.toy.rendered import DIGITS_PER_CLASS, ensure_digits, ensure_images

NUM_CLASSES = len(CLASSES)
TOY: dict[str, Any] = {
    "source": "toy",
    "root": "data/raw/toy",
    "image_size": 16,
    "num_train": NUM_CLASSES,
    "num_val": NUM_CLASSES,
}


def render(root: Path, *, seed: int = 0, told: Any = None, **changes: int) -> Path:
    params = DataParams.model_validate(TOY | changes)
    return ensure_images(root, params, seed=seed, on_progress=(told or []).append)


def test_images_are_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = [0]
    folder = render(tmp_path, told=told)
    assert told[1:] == [1] * (2 * NUM_CLASSES)
    splits = scan_images(folder).listing.splits
    assert [len(files) for files in splits.values()] == [NUM_CLASSES, NUM_CLASSES]
    monkeypatch.setattr(tree, "render_tree", None)
    assert render(tmp_path) == folder


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"num_train": NUM_CLASSES + 1}, {"image_size": 24}]
)
def test_images_are_rendered_anew_when_the_recipe_changes(tmp_path: Path, changes: dict[str, int]):
    first = render(tmp_path)
    before = scan_images(first).digest
    assert scan_images(render(tmp_path, **changes)).digest != before
    # the first is left for an experiment that runs at the same time
    assert scan_images(first).digest == before


def test_an_unfinished_rendering_is_no_rendering(tmp_path: Path):
    folder = render(tmp_path)
    (folder / rendered.RECIPE_NAME).unlink()
    told = [0]
    assert render(tmp_path, told=told) == folder
    assert len(told) == 1 + 2 * NUM_CLASSES


@pytest.mark.parametrize("pattern", ["*.py", "digits.py"])
def test_every_file_of_a_renderer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
):
    sources = sorted(Path(rendered.__file__).parent.glob(pattern))
    monkeypatch.setattr(rendered, "__file__", str(tmp_path / "rendered.py"))
    for source in sources:
        (tmp_path / source.name).write_bytes(source.read_bytes())
    before = rendered.code_digest(pattern)
    for source in sources:
        copy = tmp_path / source.name
        copy.write_bytes(source.read_bytes() + b"#")
        assert rendered.code_digest(pattern) != before
        copy.write_bytes(source.read_bytes())
    assert rendered.code_digest(pattern) == before
    first = render(tmp_path)
    (tmp_path / "digits.py").write_text("changed")
    assert render(tmp_path) != first


def test_real_images_are_never_replaced(tmp_path: Path):
    photo = tmp_path / "train" / "cat" / "1.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_text("precious")
    render(tmp_path)
    assert photo.read_text() == "precious"


def test_digits_are_written_once(tmp_path: Path):
    folders = [ensure_digits(tmp_path, seed=seed) for seed in (0, 1)]
    written = (folders[0] / "train").stat().st_mtime_ns
    assert ensure_digits(tmp_path, seed=0) == folders[0] != folders[1]
    assert (folders[0] / "train").stat().st_mtime_ns == written
    pool = TransferSet(folders[0], "digits").split("train", image_size=32)
    assert len(pool.labels) == 10 * DIGITS_PER_CLASS
