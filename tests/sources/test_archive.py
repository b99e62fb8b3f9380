"""ILSVRC's archives and development kit: as torchvision unpacks them, and whatever may be wrong."""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import imagenet as torchvision_imagenet

from contradiff.sources import archive
from contradiff.sources.archive import MD5S, read_devkit, read_member, scan_archives
from contradiff.sources.listing import Listing
from tests.sources import imagenet_layouts as layouts
from tests.sources.imagenet_layouts import WNIDS, make_photos, tar_of, write_devkit

TRAIN, VAL, KIT = MD5S
TRUTH = [450, 1, 898, 450, 1, 898]


@pytest.fixture
def val() -> list[tuple[str, bytes]]:
    return [(photo.name, photo.content) for photo in make_photos(seed=0) if photo.split == "val"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layouts.write_archives(tmp_path, make_photos(seed=0))
    return tmp_path


def scan(root: Path, **options: Any) -> Listing:
    defaults = {"index_folder": None, "verify": False, "on_message": lambda _: None}
    return scan_archives(root, **(defaults | options))


def complaint(root: Path) -> str:
    with pytest.raises(ValueError, match=rf"^data\.root: (no )?{root}") as caught:
        scan(root)
    return str(caught.value)


def test_archives_hold_what_torchvision_unpacks(root: Path, monkeypatch: pytest.MonkeyPatch):
    assert dict(torchvision_imagenet.ARCHIVE_META.values()) == MD5S
    monkeypatch.setattr(torchvision_imagenet, "_verify_archive", lambda *_: None)
    listing, kit = scan(root), read_devkit(root)
    for split in ("train", "val"):
        peer = torchvision_imagenet.ImageNet(root, split, loader=lambda path: path)
        expected = [(path, Path(path).read_bytes(), label) for path, label in peer.samples]
        files = listing.splits[split]
        assert [(f"{root}/{f.path}", read_member(root, f), f.label) for f in files] == expected
        assert peer.wnids == list(listing.class_ids)
    names, wnids = torchvision_imagenet.load_meta_file(root)
    # synsets with children are no classes
    assert kit == (wnids, {wnid: names[wnid][0] for wnid in WNIDS})


def test_the_devkit_may_be_unpacked(root: Path):
    packed = read_devkit(root)
    (root / KIT).unlink()
    write_devkit(root, [layouts.ILSVRC_IDS[wnid] for wnid in packed[0]], packed=False)
    assert read_devkit(root) == packed
    (root / "ILSVRC2012_devkit_t12/data").rename(root / "data")
    assert read_devkit(root) == packed


def test_only_images_count(root: Path, val: list[tuple[str, bytes]]):
    before = scan(root).splits["val"]
    extra = [("notes.txt", b"x"), (f"._{val[0][0]}", b"x")]
    (root / VAL).write_bytes(tar_of([*extra, *((f"./val/{name}", c) for name, c in val)]))
    assert [file.path for file in scan(root).splits["val"]] == [file.path for file in before]


@pytest.mark.parametrize("name", [TRAIN, VAL])
def test_missing_and_truncated_archives_are_named(root: Path, name: str):
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])
    assert f"{root}/{name}" in (fault := complaint(root))
    assert "truncated" in fault
    (root / name).unlink()
    assert complaint(root).startswith(f"data.root: {root}/{name} is missing; put")


def test_wrong_training_archives_are_named(root: Path):
    files = [(f"n01440764_{number}.JPEG", bytes(1000)) for number in range(4)]
    cut = tar_of(files)[:1500]  # an unpacking that was interrupted, and packed again
    for members, fault in (
        ([("n01440764.tar", cut)], "n01440764.tar is not a tar archive, or is truncated"),
        (files, "contains no class archives (<wnid>.tar)"),
        ([("a/n01440764.tar", b""), ("b/n01440764.tar", b"")], "contains n01440764.tar twice"),
        ([("n01440764.tar", tar_of(files))], f"the class n02119789, which is not in {TRAIN}"),
    ):
        (root / TRAIN).write_bytes(tar_of(members))
        assert fault in complaint(root)


def test_images_unknown_to_the_ground_truth_are_named(root: Path, val: list[tuple[str, bytes]]):
    for name in ("ILSVRC2012_val_00000007.JPEG", "photo.JPEG"):
        (root / VAL).write_bytes(tar_of([(name, b"x"), *val[1:]]))
        assert f"{VAL}: the name {name} does not end in a number from 1 to 6" in complaint(root)
    (root / VAL).write_bytes(tar_of(val[1:]))
    assert f"{VAL} has 5 images, but the devkit's ground truth has 6 lines" in complaint(root)


def test_missing_devkit_is_named_before_the_archives_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(archive, "walk_tar", None)
    content = (root / KIT).read_bytes()
    (root / KIT).write_bytes(content[: len(content) // 2])
    assert f"{KIT} is damaged or truncated" in complaint(root)
    (root / KIT).write_bytes(gzip.compress(tar_of([("kit/data/meta.mat", b"x")])))
    assert f"{KIT} lacks data/ILSVRC2012_validation_ground_truth.txt" in complaint(root)
    (root / KIT).unlink()
    assert f"{root} lacks {KIT}, which contains the labels" in complaint(root)


@pytest.mark.parametrize("wrong", ["1001", "2", "n01440764", "", "-1"])
def test_unknown_class_in_the_ground_truth_is_named(root: Path, wrong: str):
    """1001 is a synset with children, no class."""
    write_devkit(root, [450, wrong, 1])
    fault = f"ground_truth.txt: line 2 is '{wrong}', which is no ILSVRC2012_ID in meta.mat"
    assert fault in complaint(root)


def test_unreadable_table_is_named(root: Path):
    write_devkit(root, TRUTH, packed=False)
    meta = root / "ILSVRC2012_devkit_t12/data/meta.mat"
    content = meta.read_bytes()
    for broken in (b"", b"no matlab", content[:300], content.replace(b"synsets", b"synsetz")):
        meta.write_bytes(broken)
        assert "meta.mat has no readable table `synsets`" in complaint(root)


def test_headers_are_read_once_for_each_set(root: Path, tmp_path: Path):
    other, told = tmp_path / "other", list[str]()
    layouts.write_archives(other, make_photos(seed=1))
    options = {"index_folder": tmp_path / "index", "on_message": told.append}
    listings = [scan(folder, **options) for folder in (root, other, root, other)]
    assert listings[:2] == listings[2:]
    assert listings[0] != listings[1]
    assert [message.split(" (later")[0] for message in told] == [
        f"reading the headers of {place}/{name}" for place in (root, other) for name in (TRAIN, VAL)
    ]


@pytest.mark.parametrize("wrong", [TRAIN, VAL, KIT])
def test_wrong_checksum_is_named(root: Path, monkeypatch: pytest.MonkeyPatch, wrong: str):
    md5s = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in MD5S}
    monkeypatch.setattr(archive, "MD5S", md5s)
    told: list[str] = []
    options = {"verify": True, "on_message": told.append}
    scan(root, **options)
    assert sum("to check its md5" in message for message in told) == 3
    found, md5s[wrong] = md5s[wrong], "0" * 32
    expected = rf"this is not the official {wrong}: its md5 is {found}, expected 000.* fetch it"
    with pytest.raises(ValueError, match=expected):
        scan(root, **options)
    if wrong == KIT:  # an unpacked one has no checksum
        (root / KIT).unlink()
        write_devkit(root, TRUTH, packed=False)
        scan(root, **options)
        assert f"{KIT} is missing (perhaps unpacked), so its md5 is not checked" in told


def test_archive_that_shrank_since_the_scan_is_named(root: Path):
    last = max(scan(root).splits["train"], key=lambda file: file.offset)
    with (root / TRAIN).open("r+b") as file:
        file.truncate(last.offset + 1)
    with pytest.raises(ValueError, match=rf"{TRAIN} is truncated: {last.path} is incomplete"):
        read_member(root, last)
