"""ILSVRC's archives, whole and broken, and their index."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import imagenet as torchvision_imagenet

from contradiff.sources import archive as archive_source
from contradiff.sources.archive import MD5S, read_member, scan_archives
from contradiff.sources.imagenet import RawImages, scan_images
from contradiff.sources.listing import Listing
from tests.sources.imagenet_layouts import (
    Photo,
    make_photos,
    tar_of,
    write_archives,
    write_devkit,
)

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


@pytest.fixture
def photos() -> list[Photo]:
    return make_photos(seed=0)


@pytest.fixture
def root(tmp_path: Path, photos: list[Photo]) -> Path:
    write_archives(tmp_path, photos)
    return tmp_path


def scan(root: Path, **options: Any) -> Listing:
    return scan_archives(root, **({"index_folder": None} | options))


def test_archives_hold_what_torchvision_unpacks(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torchvision_imagenet, "_verify_archive", lambda *_: None)
    listing = scan(root)
    for split in ("train", "val"):
        peer = torchvision_imagenet.ImageNet(root, split, loader=lambda path: path)
        expected = [
            (Path(path).relative_to(root).as_posix(), Path(path).read_bytes(), label)
            for path, label in peer.samples
        ]
        found = [(file.path, read_member(root, file), file.label) for file in listing.splits[split]]
        assert found == expected
        assert peer.wnids == list(listing.class_ids)


@pytest.mark.parametrize("packed", [True, False])
def test_the_devkit_may_be_unpacked(tmp_path: Path, photos: list[Photo], packed: bool):
    write_archives(tmp_path, photos, packed=packed)
    assert len(scan(tmp_path).splits["val"]) == 6


def test_only_images_count(root: Path, photos: list[Photo]):
    before = scan(root)
    files = [(photo.name, photo.content) for photo in photos if photo.split == "val"]
    extra = [("notes.txt", b"x"), (f"._{files[0][0]}", b"x")]
    (root / VAL).write_bytes(tar_of([*extra, *((f"./val/{name}", c) for name, c in files)]))
    after = scan(root)
    assert [file.path for file in after.splits["val"]] == [f.path for f in before.splits["val"]]


@pytest.mark.parametrize("name", [TRAIN, VAL])
def test_missing_archive_is_named(root: Path, name: str):
    (root / name).unlink()
    expected = rf"^data\.root: no {root}/{name}; expected ILSVRC"
    with pytest.raises(ValueError, match=expected):
        scan(root)
    with pytest.raises(ValueError, match=expected):
        verify(root, [])


@pytest.mark.parametrize("name", [TRAIN, VAL])
def test_truncated_archive_is_named(root: Path, name: str):
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"^data\.root: .*/{name}.* truncated"):
        scan(root)


def test_truncated_class_is_named(root: Path, photos: list[Photo]):
    """Whole outside, cut inside: an unpacking that was interrupted, and packed again."""
    inner = tar_of([(photo.name, bytes(1000)) for photo in photos[:4]])
    (root / TRAIN).write_bytes(tar_of([("n01440764.tar", inner[:1500])]))
    expected = rf"{TRAIN}: n01440764\.tar is no tar archive, or is truncated"
    with pytest.raises(ValueError, match=expected):
        scan(root)


def test_train_archive_without_classes_is_named(root: Path, photos: list[Photo]):
    (root / TRAIN).write_bytes(tar_of([(photo.name, photo.content) for photo in photos]))
    with pytest.raises(ValueError, match=rf"{TRAIN} holds no class archives \(<wnid>\.tar\)"):
        scan(root)


def test_class_that_is_there_twice_is_named(root: Path):
    (root / TRAIN).write_bytes(tar_of([("a/n01440764.tar", b""), ("b/n01440764.tar", b"")]))
    with pytest.raises(ValueError, match=rf"{TRAIN} holds n01440764\.tar twice"):
        scan(root)


def test_missing_devkit_is_named_before_the_archives_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    monkeypatch.setattr(archive_source, "walk_tar", None)
    with pytest.raises(ValueError, match=r"^data\.root: .* lacks ILSVRC2012_devkit_t12"):
        scan(root)


@pytest.mark.parametrize("num_lines", [5, 7])
def test_ground_truth_of_another_length_is_named(root: Path, num_lines: int):
    write_devkit(root, [450, 1, 898, 450, 1, 898, 1][:num_lines])
    expected = rf"ground truth has {num_lines} lines for the 6 images of .*/{VAL}"
    with pytest.raises(ValueError, match=expected):
        scan(root)


@pytest.mark.parametrize("name", ["ILSVRC2012_val_00000007.JPEG", "photo.JPEG"])
def test_validation_image_that_the_ground_truth_does_not_know_is_named(
    root: Path, photos: list[Photo], name: str
):
    files = [(photo.name, photo.content) for photo in photos if photo.split == "val"]
    (root / VAL).write_bytes(tar_of([(name, b"x"), *files[1:]]))
    with pytest.raises(ValueError, match=rf"{VAL}: {name} has no number from 1 to 6"):
        scan(root)


def test_class_that_training_lacks_is_named(root: Path, photos: list[Photo]):
    inner = tar_of([(photo.name, photo.content) for photo in photos[:4]])
    (root / TRAIN).write_bytes(tar_of([("n01440764.tar", inner)]))
    expected = rf"devkit gives ILSVRC2012_val_\d+\.JPEG the class n0\d+, which {TRAIN} lacks"
    with pytest.raises(ValueError, match=expected):
        scan(root)


def test_headers_are_read_once(root: Path):
    cache, told = root / "index_folder", []
    first = scan(root, index_folder=cache, on_message=told.append)
    assert [message.split(" (once")[0] for message in told] == [
        f"reading the headers of {root}/{name}" for name in (TRAIN, VAL)
    ]
    told.clear()
    assert scan(root, index_folder=cache, on_message=told.append) == first
    assert told == []
    assert scan(root, index_folder=None, on_message=told.append) == first
    assert len(told) == 2


def test_two_sets_do_not_share_an_index(root: Path, tmp_path: Path):
    other, told = tmp_path / "other", list[str]()
    write_archives(other, make_photos(seed=1))
    options = {"index_folder": tmp_path / "index_folder", "on_message": told.append}
    listings = [scan(folder, **options) for folder in (root, other, root, other)]
    assert listings[:2] == listings[2:]
    assert listings[0] != listings[1]
    assert len(told) == 4


def verify(root: Path, told: list[str]) -> RawImages:
    return scan_images(root, layout="archives", verify=True, on_message=told.append)


def test_checksums_are_torchvisions():
    expected = dict(torchvision_imagenet.ARCHIVE_META.values())
    assert expected == MD5S


@pytest.mark.parametrize("wrong", list(MD5S))
def test_wrong_checksum_is_named(root: Path, monkeypatch: pytest.MonkeyPatch, wrong: str):
    md5s = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in MD5S}
    monkeypatch.setattr(archive_source, "MD5S", md5s)
    told: list[str] = []
    verify(root, told)
    assert sum("for its md5" in message for message in told) == 3
    found, md5s[wrong] = md5s[wrong], "0" * 32
    expected = rf"/{wrong}: not the official {wrong}: its md5 is {found}, expected 000.* fetch it"
    with pytest.raises(ValueError, match=expected):
        verify(root, told)


def test_unpacked_devkit_has_no_checksum(root: Path, monkeypatch: pytest.MonkeyPatch):
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    write_devkit(root, [450, 1, 898, 450, 1, 898], packed=False)
    md5s = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in (TRAIN, VAL)}
    md5s["ILSVRC2012_devkit_t12.tar.gz"] = "0" * 32
    monkeypatch.setattr(archive_source, "MD5S", md5s)
    told: list[str] = []
    verify(root, told)
    assert "ILSVRC2012_devkit_t12.tar.gz is not there (unpacked?)" in told[-3] + told[-1] + told[2]


def test_archive_that_shrank_since_the_scan_is_named(root: Path):
    last = max(scan(root).splits["train"], key=lambda file: file.offset)
    with (root / TRAIN).open("r+b") as file:
        file.truncate(last.offset + 1)
    expected = rf"{TRAIN} is truncated: {last.path} is not whole in it"
    with pytest.raises(ValueError, match=expected):
        read_member(root, last)
