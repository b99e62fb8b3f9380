"""Rendered once, anew when the recipe changes, never over something else."""

from pathlib import Path
from typing import Any

import pytest

from contradiff.data.params import DataParams
from contradiff.files import sha256_of
from contradiff.sources import raw
from contradiff.sources.imagenet import Manifest
from contradiff.sources.raw import ensure_images, ensure_transfer_archive, transfer_manifest
from contradiff.sources.transfer_set import TransferDataParams, read_transfer_split
from contradiff.toy import digits
from contradiff.toy import tree as toy_tree
from contradiff.toy.classes import CLASSES

NUM_CLASSES = len(CLASSES)
TOY: dict[str, Any] = {
    "source": "toy",
    "root": "data/raw/toy",
    "image_size": 16,
    "num_train": NUM_CLASSES,
    "num_val": NUM_CLASSES,
}
DIGITS = TransferDataParams(source="digits", root="data/raw/digits", verify=True)
CIFAR = TransferDataParams(source="cifar100", root="data/raw/cifar", verify=True)


def toy_params(**changes: object) -> DataParams:
    return DataParams.model_validate(TOY | changes)


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was rendered, in order."""
    seen: list[str] = []
    for module, name in ((toy_tree, "render_tree"), (digits, "write_digits_archive")):
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


@pytest.mark.parametrize("pattern", ["*.py", "digits.py"])
def test_every_file_of_a_renderer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
):
    monkeypatch.setattr(raw, "__file__", str(tmp_path / "sources/raw.py"))
    sources = sorted(Path(digits.__file__).parent.glob(pattern))
    assert len(sources) == (1 if pattern == "digits.py" else 9)
    for source in sources:
        copy = tmp_path / "toy" / source.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
    before = raw._code_digest(pattern)
    assert raw._code_digest(pattern) == before
    for copy in sorted((tmp_path / "toy").glob(pattern)):
        kept = copy.read_bytes()
        copy.write_bytes(kept + b"#")
        assert raw._code_digest(pattern) != before
        copy.write_bytes(kept)


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
    pool = read_transfer_split(
        folder, source="digits", split="train", image_size=32, shown_root="digits"
    )
    assert len(pool.labels) == 10 * raw.DIGITS_PER_CLASS


def test_missing_files_of_cifar100_are_named(tmp_path: Path, renderings: list[str]):
    (tmp_path / "meta").touch()
    expected = r"transfer_data\.root: data/raw/cifar lacks train, test; put cifar-100-python"
    with pytest.raises(ValueError, match=expected):
        ensure_transfer_archive(tmp_path, CIFAR, seed=0)
    for name in ("train", "test"):
        (tmp_path / name).touch()
    ensure_transfer_archive(tmp_path, CIFAR, seed=0)
    assert renderings == []


def archive_of(root: Path, name: str) -> Path:
    path = root / name
    root.mkdir(exist_ok=True)
    path.write_bytes(b"not the official one")
    return path


@pytest.mark.parametrize(
    ("source", "name", "sha256"),
    [
        ("cifar100", "cifar-100-python.tar.gz", "85cd44d0"),
        ("cifar100", "cifar-100-binary.tar.gz", "58a81ae1"),
        ("cifar10", "cifar-10-python.tar.gz", "6d958be0"),
        ("cifar10", "cifar-10-binary.tar.gz", "c4a38c50"),
    ],
)
def test_archives_must_be_the_official_ones(tmp_path: Path, source: Any, name: str, sha256: str):
    path = archive_of(tmp_path / "cifar", name)
    params = TransferDataParams(source=source, root="data/raw/cifar", verify=True)
    found = sha256_of(path)
    expected = (
        rf"{name}: not the official {name}: its sha256 is {found}, expected {sha256}\w+; fetch"
    )
    for root in (path, path.parent):
        with pytest.raises(ValueError, match=expected) as caught:
            ensure_transfer_archive(root, params, seed=0)
        assert "transfer_data.verify to false" in str(caught.value)
        trusting = params.model_copy(update={"verify": False})
        assert ensure_transfer_archive(root, trusting, seed=0) == root


def test_manifest_of_an_archive(tmp_path: Path):
    path = archive_of(tmp_path, "cifar-10-binary.tar.gz")
    manifest = transfer_manifest(tmp_path, source="cifar10", shown_root="cifar")
    assert manifest == transfer_manifest(path, source="cifar10", shown_root="cifar")
    assert list(manifest["files"]) == [path.name]
    path.write_bytes(b"not the official onE")
    assert transfer_manifest(path, source="cifar10", shown_root="cifar") != manifest


def test_manifest_of_a_folder_of_images(tmp_path: Path):
    for name in ("train/a/1.png", "train/a/2.png", "train/b/3.png", "test/a/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def manifest() -> dict[str, Any]:
        return transfer_manifest(tmp_path, source="imagefolder", shown_root="images")

    before = manifest()
    assert before["num_images"] == {"train": 3, "test": 1}
    assert before["classes"] == ["a", "b"]
    assert manifest() == before
    (tmp_path / "train/a/2.png").write_text("train/a/3.png")  # one byte, the same size
    changed = manifest()
    assert changed != before
    (tmp_path / "train/a/2.png").rename(tmp_path / "train/a/0.png")
    assert manifest() not in (before, changed)


def test_manifest_stands_for_the_archives_bytes(tmp_path: Path):
    for name in ("train", "test", "meta"):
        (tmp_path / name).write_text(name)
    manifest = transfer_manifest(tmp_path, source="cifar100", shown_root="data/raw/cifar")
    assert manifest["root"] == "data/raw/cifar"
    assert manifest["files"]["meta"] == {
        "num_bytes": 4,
        "sha256": sha256_of(tmp_path / "meta"),
    }
    (tmp_path / "test").write_text("tesT")
    assert transfer_manifest(tmp_path, source="cifar100", shown_root="data/raw/cifar") != manifest
