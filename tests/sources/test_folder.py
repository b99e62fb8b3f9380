"""Class folders and Kaggle's download: as torchvision lists them; whatever is wrong is named."""

import os
import re
import shutil
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from contradiff.data.shards import read_shard, write_shard
from contradiff.sources.folder import KAGGLE_IMAGES, scan_folder, scan_kaggle
from contradiff.sources.imagenet import scan_images
from contradiff.sources.listing import ImageFile
from tests.sources.imagenet_layouts import make_photos, write_folder, write_kaggle

TABLE, OUTSIDE = "LOC_val_solution.csv", "outside the class folders"


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    write_kaggle(tmp_path, make_photos(seed=0))
    return tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path, make_photos(seed=0))
    return tmp_path


@pytest.mark.parametrize("source", ["imagefolder", "kaggle", "transfer"])
@pytest.mark.parametrize(
    ("names", "ignored"),
    [
        ("a/sub/9.jpg a/sub/deep/8.PNG a/sub-x/7.jpg a/z.jpg b/sub/9.jpg", {}),
        ("a/2.bmp a/3.TIF a/4.ppm b/5.pgm b/6.tiff b/7.webp", {}),
        ("a/2.gif a/3.GIF b/4.jfif b/notes.txt", {".gif": 2, ".jfif": 1, ".txt": 1}),
        ("a/checksums a/sub/Makefile 5.jpg", {"without extension": 2, OUTSIDE: 1}),
        (".ipynb_checkpoints/5.jpg a/.ipynb_checkpoints/6.jpg a/._1.jpg .DS_Store", {"hidden": 4}),
    ],
)
def test_torchvision_lists_the_same(
    tmp_path: Path, source: str, names: str, ignored: dict[str, int]
):
    """Except for hidden files and folders, which become images and classes in torchvision."""
    test = "test" if source == "transfer" else "val"
    root = tmp_path / KAGGLE_IMAGES if source == "kaggle" else tmp_path
    for name in ("a/1.jpg", "b/1.jpg", *names.split()):
        for split in ("train", test) if source != "kaggle" else ("train",):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_text(name)
    if source == "kaggle":
        (root / "val").mkdir()
        (root / "val/1.jpg").touch()
        (tmp_path / TABLE).write_text("1,a 1 2 3 4\n")
    listing = {
        "imagefolder": lambda: scan_images(root).listing,
        "kaggle": lambda: scan_kaggle(tmp_path),
        "transfer": lambda: scan_folder(root, test="test", key="transfer_data.root"),
    }[source]()
    assert dict(listing.ignored["train"]) == ignored
    for split in ("train",) if source == "kaggle" else ("train", test):
        assert os.system(f"find {root / split} -name '.*' -exec rm -rf {{}} +") == 0
        peer, files = ImageFolder(str(root / split)), listing.splits[split]
        assert [(str(root / file.path), file.label) for file in files] == peer.samples
        assert list(listing.class_ids) == peer.classes
        assert [f.num_bytes for f in files] == [Path(p).stat().st_size for p, _ in peer.samples]


def test_ignored_files_are_named_in_the_log(root: Path):
    (root / "train/n02119789/1.gif").touch()
    (root / "val/.git").mkdir()
    [train, val] = scan_images(root).describe()
    assert train.endswith(f"12 train images of 3 classes in {root}; ignored files: 1 .gif")
    assert val.endswith(f"in {root}; ignored files: 1 hidden")


def test_classes_have_names(root: Path):
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
        ("ln -s . val/n02119789/sub", "{}/val/n02119789/sub links to its own parent; remove it"),
        ("rm val/n02119789/*; touch val/n02119789/1.gif", ".*pgm.*; ignored files: 1 .gif"),
        ("ln -s nowhere val/n02119789/x.JPEG", "{}/val/n02119789/x.JPEG cannot be read: No such"),
    ],
)
def test_whatever_is_wrong_is_named(root: Path, command: str, fault: str):
    assert os.system(f"cd {root} && {command}") == 0
    with pytest.raises(ValueError, match=rf"^data\.root: {fault.format(root)}"):
        scan_folder(root)


@pytest.mark.parametrize(
    ("command", "places"),
    [
        ("rm -r train val; touch 1.png", ["train", "val"]),
        (
            "rm train/n0[24]*/* val/n02119789/*",
            ["train/n02119789", "train/n04557648", "val/n02119789"],
        ),
    ],
)
def test_all_faults_are_named_at_once(root: Path, command: str, places: list[str]):
    assert os.system(f"cd {root} && {command}") == 0
    with pytest.raises(ValueError, match=r"^data\.root: ") as refusal:
        scan_folder(root)
    lines = str(refusal.value).splitlines()
    assert [re.search(rf"{root}/(\S+?);? ", line)[1] for line in lines] == places


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
        ("train/n02119789/n02119789_5.JPEG", "n02119789_5"),
        ("val/n02119789/ILSVRC2012_val_5.JPEG", "n02119789_ILSVRC2012_val_5"),
        ("train/n02119789/5.JPEG", "n02119789/5%2EJPEG"),
        ("train/n02119789/n02119789_5.jpg", "n02119789/n02119789_5%2Ejpg"),
        ("train/v1.0 cats/in.doors/a.b.jpg", "v1%2E0 cats/in%2Edoors/a%2Eb%2Ejpg"),
    ):
        assert ImageFile(path, 0).key == key


def test_digits_in_folders_of_digits_are_a_data_set(root: Path):
    """As MNIST, unpacked: `0` to `11` with `0.png` to `14.png`."""
    shutil.rmtree(root)
    for split, label, number in product(("train", "val"), range(12), range(15)):
        path = root / split / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert len(scan_images(root).listing.splits["train"]) == 180


NAMES = st.text(st.sampled_from("n01234567_.%/JPEGé ILSVRC2012val-"), min_size=1, max_size=12)
OFFICIAL = [f"n01234567/{name}" for name in ("n01234567_1", "1", "n01234567_1.JPEG", "1.JPEG")]
PATHS = st.sampled_from([*OFFICIAL, "__a__/1", "%5F%5Fa__/1"]) | NAMES


@given(paths=st.sets(PATHS, min_size=2, max_size=6))
def test_different_paths_have_different_keys_which_a_shard_keeps(paths: set[str]):
    keys = [ImageFile(f"train/{path}", 0).key for path in paths]
    assert len(set(keys)) == len(paths)
    paths = {path for path in paths if all(path.split("/"))}  # as names of files are
    keys = [ImageFile(f"train/{path}", 0).key for path in paths]
    with TemporaryDirectory() as folder:
        file = Path(folder, "train-00000.tar")
        records = [{"__key__": key.encode(), "png": b"x", "cls": b"0"} for key in keys]
        shard = write_shard(file, records, compression="none")
        assert [record["__key__"].decode() for record in read_shard(file, shard)] == keys


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
