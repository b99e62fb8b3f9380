"""contradiff.data.raw: rendered once, anew when the recipe changes, never over something else."""

from pathlib import Path
from typing import Any

import pytest

from contradiff.atomic import sha256_of
from contradiff.data import digits, raw, toy
from contradiff.data.cifar import TransferDataParams, read_cifar100
from contradiff.data.imagenet import DataParams, Manifest
from contradiff.data.raw import ensure_images, ensure_transfer_archive, transfer_manifest

NUM_CLASSES = len(toy.CLASSES)
TOY: dict[str, Any] = {
    "source": "toy",
    "root": "data/raw/toy",
    "image_size": 16,
    "num_train": NUM_CLASSES,
    "num_val": NUM_CLASSES,
}
DIGITS = TransferDataParams(source="digits", root="data/raw/digits")
CIFAR = TransferDataParams(source="cifar100", root="data/raw/cifar")


def toy_params(**changes: object) -> DataParams:
    return DataParams.model_validate(TOY | changes)


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was rendered, in order."""
    seen: list[str] = []
    for module, name in ((toy, "render_tree"), (digits, "write_digits_archive")):
        real = getattr(module, name)

        def render(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> None:
            seen.append(_name)
            _real(*args, **kwargs)

        monkeypatch.setattr(module, name, render)
    return seen


def test_images_are_rendered_once(tmp_path: Path, renderings: list[str]):
    told: list[int] = []
    for _ in range(2):
        tree = ensure_images(tmp_path / "toy", toy_params(), seed=0, on_progress=told.append)
    assert renderings == ["render_tree"]
    assert told == [1] * (2 * NUM_CLASSES)
    files = Manifest.scan(tree, shown_root="toy").splits
    assert {split: len(names) for split, names in files.items()} == {
        "train": NUM_CLASSES,
        "val": NUM_CLASSES,
    }


@pytest.mark.parametrize(
    ("changes", "seed"),
    [({}, 1), ({"num_train": NUM_CLASSES + 1}, 0), ({"image_size": 24}, 0)],
)
def test_images_are_rendered_anew_when_the_recipe_changes(
    tmp_path: Path, renderings: list[str], changes: dict[str, Any], seed: int
):
    first = ensure_images(tmp_path, toy_params(), seed=0)
    before = Manifest.scan(first, shown_root="toy").digest
    second = ensure_images(tmp_path, toy_params(**changes), seed=seed)
    assert len(renderings) == 2
    assert Manifest.scan(second, shown_root="toy").digest != before
    # the first is left for an experiment that runs at the same time
    assert Manifest.scan(first, shown_root="toy").digest == before


def test_images_are_rendered_anew_when_the_renderer_changes(
    tmp_path: Path, renderings: list[str], monkeypatch: pytest.MonkeyPatch
):
    ensure_images(tmp_path, toy_params(), seed=0)
    monkeypatch.setattr(raw, "_code_digest", lambda _: "other")
    ensure_images(tmp_path, toy_params(), seed=0)
    assert len(renderings) == 2


def test_real_images_are_never_replaced(tmp_path: Path):
    photo = tmp_path / "train" / "cat" / "1.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_text("precious")
    ensure_images(tmp_path, toy_params(), seed=0)
    assert photo.read_text() == "precious"


def test_imagefolder_is_left_alone(tmp_path: Path, renderings: list[str]):
    params = toy_params(source="imagefolder", num_train=None, num_val=None)
    ensure_images(tmp_path / "absent", params, seed=0)
    assert renderings == []
    assert not (tmp_path / "absent").exists()


def test_digits_are_written_once(tmp_path: Path, renderings: list[str]):
    for seed in (0, 0, 1):
        folder = ensure_transfer_archive(tmp_path, DIGITS, seed=seed)
    assert renderings == ["write_digits_archive"] * 2
    pool = read_cifar100(folder, split="train")
    assert len(pool.labels) == 10 * raw.DIGITS_PER_CLASS


def test_missing_files_of_cifar100_are_named(tmp_path: Path, renderings: list[str]):
    (tmp_path / "meta").touch()
    expected = r"transfer_data\.root: data/raw/cifar lacks train, test; unpack"
    with pytest.raises(ValueError, match=expected):
        ensure_transfer_archive(tmp_path, CIFAR, seed=0)
    for name in ("train", "test"):
        (tmp_path / name).touch()
    ensure_transfer_archive(tmp_path, CIFAR, seed=0)
    assert renderings == []


def test_manifest_stands_for_the_archives_bytes(tmp_path: Path):
    for name in ("train", "test", "meta"):
        (tmp_path / name).write_text(name)
    manifest = transfer_manifest(tmp_path, shown_root="data/raw/cifar")
    assert manifest["root"] == "data/raw/cifar"
    assert manifest["files"]["meta"] == {
        "num_bytes": 4,
        "sha256": sha256_of(tmp_path / "meta"),
    }
    (tmp_path / "test").write_text("tesT")
    assert transfer_manifest(tmp_path, shown_root="data/raw/cifar") != manifest
