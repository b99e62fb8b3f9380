"""Kaggle's download, and folders that cannot be read."""

import os
from pathlib import Path
from typing import Any

import pytest

from contradiff.sources.folder import scan_folder, scan_kaggle
from contradiff.sources.listing import Listing
from tests.sources.imagenet_layouts import make_photos, write_folder, write_kaggle

TABLE = "LOC_val_solution.csv"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_kaggle(tmp_path, make_photos(seed=0))
    return tmp_path


def scan(root: Path) -> Listing:
    return scan_kaggle(root, shown_root="data/raw")


def test_validation_labels_come_from_the_table(root: Path):
    (root / "LOC_synset_mapping.txt").unlink()  # names alone are in it
    listing = scan(root)
    photos = [photo for photo in make_photos(seed=0) if photo.split == "val"]
    expected = {photo.name: photo.wnid for photo in photos}
    found = {Path(f.path).name: listing.class_ids[f.label] for f in listing.splits["val"]}
    assert found == expected
    assert listing.class_names == listing.class_ids


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ILSVRC2012_val_00000099,n01440764 1 2 3 4", r"names 1 images that .*/val lacks: .*99"),
        ("ILSVRC2012_val_00000099,n09999999 1 2 3 4", r"line 8 names the class n09999999, which"),
        ("ILSVRC2012_val_00000001,n01440764 1 2 3 4", r"line 8 names .*_00000001 a second time"),
        ("ILSVRC2012_val_00000001", r"line 8 is not `image,class box \.\.\.`: 'ILSVRC2012_val_0"),
        ("ILSVRC2012_val_00000001,", r"line 8 is not `image,class box"),
        ("", r"line 8 is not `image,class box"),
    ],
)
def test_wrong_line_is_named(root: Path, line: str, fault: str):
    with (root / TABLE).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=rf"^data\.root: data/raw/{TABLE}:? {fault}"):
        scan(root)


def test_image_without_a_line_is_named(root: Path):
    (root / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000099.JPEG").touch()
    expected = rf"data/raw/{TABLE} has no line for .*CLS-LOC/val/ILSVRC2012_val_00000099\.JPEG"
    with pytest.raises(ValueError, match=expected):
        scan(root)


def test_missing_table_is_named(root: Path):
    (root / TABLE).unlink()
    with pytest.raises(ValueError, match=rf"^data\.root: no data/raw/{TABLE}, which holds"):
        scan(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_folder_is_named(root: Path, split: str):
    (root / "ILSVRC/Data/CLS-LOC" / split).rename(root / "x")
    expected = rf"^data\.root: (no folder )?data/raw/ILSVRC/Data/CLS-LOC/{split}(; exp| holds no)"
    with pytest.raises(ValueError, match=expected):
        scan(root)


@pytest.mark.parametrize("folder", ["train", "train/n02119789", "val/n02119789"])
def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str):
    """By a stand-in for the system's refusal: these tests may run as root, who may read all."""
    write_folder(tmp_path, make_photos(seed=0))
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == tmp_path / folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    expected = rf"^data\.root: data/raw/{folder} cannot be read: Permission denied"
    with pytest.raises(ValueError, match=expected):
        scan_folder(tmp_path, shown_root="data/raw")


def test_link_to_nowhere_is_named(tmp_path: Path):
    write_folder(tmp_path, make_photos(seed=0))
    (tmp_path / "val/n02119789/lost.JPEG").symlink_to(tmp_path / "nowhere")
    expected = r"^data\.root: data/raw/val/n02119789/lost\.JPEG cannot be read: No such file"
    with pytest.raises(ValueError, match=expected):
        scan_folder(tmp_path, shown_root="data/raw")


def test_hidden_files_are_no_images(tmp_path: Path):
    """MacOS leaves `._name.JPEG` beside each file that it packs."""
    write_folder(tmp_path, make_photos(seed=0))
    before = scan_folder(tmp_path, shown_root="data/raw")
    (tmp_path / "val/n02119789/._ILSVRC2012_val_00000001.JPEG").touch()
    assert scan_folder(tmp_path, shown_root="data/raw") == before
