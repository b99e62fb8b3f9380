"""Class folders and Kaggle's download: as torchvision lists them; whatever is wrong is named."""

import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from torchvision.datasets import ImageFolder

from contradiff.sources.folder import scan_folder, scan_kaggle
from contradiff.sources.imagenet import scan_images
from contradiff.sources.listing import ImageFile
from tests.sources.imagenet_layouts import make_photos, write_folder, write_kaggle

TABLE = "LOC_val_solution.csv"


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    write_kaggle(tmp_path, make_photos(seed=0))
    return tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path, make_photos(seed=0))
    return tmp_path


def test_torchvision_lists_the_same(root: Path):
    for name in ("notes.txt", "checksums"):
        (root / "train/n02119789" / name).write_text("x")
    listing = scan_folder(root)
    for split, files in listing.splits.items():
        peer = ImageFolder(str(root / split))
        assert [(str(root / file.path), file.label) for file in files] == peer.samples
        assert list(listing.class_ids) == peer.classes
        assert [f.num_bytes for f in files] == [Path(p).stat().st_size for p, _ in peer.samples]


def test_hidden_files_are_no_images_and_classes_have_names(root: Path):
    """MacOS leaves `._name.JPEG` beside each file that it packs."""
    before = scan_folder(root)
    for name in ("._ILSVRC2012_val_00000001.JPEG", ".png"):
        (root / "val/n02119789" / name).touch()
    assert scan_folder(root) == before
    (root / "LOC_synset_mapping.txt").write_text("n02119789 tench, Tinca tinca\nn03 other\n\n")
    assert scan_folder(root).class_names == ("n01440764", "tench", "n04557648")


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("mv val other", "no folder {}/val; it must"),
        ("rm -r train/*", "{}/train has no class folders"),
        ("rm train/n02119789/*", "{}/train/n02119789 contains no images"),
        ("mv val/n02119789 other", "{}/val/n02119789 contains no images"),
        ("mkdir val/n03", r"{}/val has classes that train/ lacks: \['n03'\]"),
        ("ln -s nowhere val/n02119789/x.JPEG", "{}/val/n02119789/x.JPEG cannot be read: No such"),
    ],
)
def test_whatever_is_wrong_is_named(root: Path, command: str, fault: str):
    assert os.system(f"cd {root} && {command}") == 0
    with pytest.raises(ValueError, match=rf"^data\.root: {fault.format(root)}"):
        scan_folder(root)


def test_unreadable_folder_is_named(root: Path, monkeypatch: pytest.MonkeyPatch):
    """By a stand-in for the system's refusal: these tests may run as root, who may read all."""
    refusal = PermissionError(13, "Permission denied", f"{root}/train")
    monkeypatch.setattr(os, "scandir", Mock(side_effect=refusal))
    with pytest.raises(
        ValueError, match=r"^data\.root: .*/train cannot be read: Permission denied"
    ):
        scan_folder(root)


def test_key_names_class_and_file():
    for path, key in (
        ("train/n01/n01_5.JPEG", "n01_5"),
        ("val/n01/ILSVRC2012_val_5.JPEG", "n01_ILSVRC2012_val_5"),
        ("train/cat/a.b.jpg", "cat_a_b"),
        ("train/v1.0 cats/5.jpg", "v1_0 cats_5"),
        ("train/v1.0/v1.0_5.jpg", "v1_0_5"),
    ):
        assert ImageFile(path, 0).key == key


@pytest.mark.parametrize(
    ("first", "second"), [("n01/a.b.jpg", "n01/a_b.jpg"), ("n/n01_9.jpg", "n01/n01_9.JPEG")]
)
def test_two_images_of_one_key_are_named(root: Path, first: str, second: str):
    for path in (root / split / name for name in (first, second) for split in ("train", "val")):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    expected = rf"^data\.root: train/{first} .* and train/{second} .* both get .*: rename one image"
    with pytest.raises(ValueError, match=expected):
        scan_images(root)


def test_name_that_is_not_utf8_is_refused(root: Path):
    (root / "train/n02119789" / os.fsdecode(b"\xff.png")).touch()
    with pytest.raises(ValueError, match=r"^data\.root: the name .* is not UTF-8: rename it"):
        scan_images(root)


def test_kaggles_validation_labels_come_from_the_table(kaggle: Path):
    (kaggle / "LOC_synset_mapping.txt").unlink()  # it has only names
    listing = scan_kaggle(kaggle)
    expected = {photo.name: photo.wnid for photo in make_photos(seed=0) if photo.split == "val"}
    found = {Path(f.path).name: listing.class_ids[f.label] for f in listing.splits["val"]}
    assert found == expected
    assert listing.class_names == listing.class_ids


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ILSVRC2012_val_00000099,n01440764 1 2 3 4", r"names 1 images .* not in .*/val: .*99"),
        ("ILSVRC2012_val_00000099,n09999999 1 2 3 4", r"line 8 names the class n09999999, which"),
        ("ILSVRC2012_val_00000001,n01440764 1 2 3 4", r"line 8 names .*_00000001 a second time"),
        ("ILSVRC2012_val_00000001", r"line 8 does not have the form .* \.\.\.`: 'ILSVRC2012_val_0"),
        ("", r"line 8 does not have the form `image,class box"),
    ],
)
def test_wrong_line_is_named(kaggle: Path, line: str, fault: str):
    with (kaggle / TABLE).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=rf"^data\.root: {kaggle}/{TABLE}:? {fault}"):
        scan_kaggle(kaggle)


def test_missing_parts_of_kaggles_download_are_named(kaggle: Path):
    images = kaggle / "ILSVRC/Data/CLS-LOC"
    (images / "val/ILSVRC2012_val_00000099.JPEG").touch()
    with pytest.raises(ValueError, match=rf"/{TABLE} has no line for {images}/val/.*99\.JPEG"):
        scan_kaggle(kaggle)
    for path, fault in (
        (images / "val", f"{images}/val contains no images"),
        (kaggle / TABLE, f"{kaggle}/{TABLE} is missing; it contains"),
        (images / "train", f"no folder {images}/train; it must"),
    ):
        path.rename(kaggle / f"no-{path.name}")
        with pytest.raises(ValueError, match=rf"^data\.root: {fault}"):
            scan_kaggle(kaggle)
