"""A tree is listed, and whatever is wrong with it is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from contradiff.data.params import DataParams
from contradiff.sources.imagenet import Manifest
from contradiff.sources.listing import ImageFile
from contradiff.sources.raw import read_manifest

PARAMS = {
    "source": "toy",
    "root": "data/raw/toy",
    "image_size": 32,
    "num_train": 100,
    "num_val": 10,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, three training images and one for validation each."""
    for class_id in ("n02", "n01"):
        for split, names in {
            "train": [f"{class_id}_{number}.JPEG" for number in (10, 9, 1)],
            "val": [f"ILSVRC2012_val_{class_id}.png"],
        }.items():
            folder = tmp_path / split / class_id
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).write_text(f"pixels of {name}")
    return tmp_path


def scan(root: Path) -> Manifest:
    return Manifest.scan(root, shown_root="data/raw")


def test_tree_is_listed(root: Path):
    manifest = scan(root)
    assert manifest.class_ids == manifest.class_names == ("n01", "n02")
    assert manifest.splits["val"] == (
        ImageFile("val/n01/ILSVRC2012_val_n01.png", 0, num_bytes=32),
        ImageFile("val/n02/ILSVRC2012_val_n02.png", 1, num_bytes=32),
    )
    assert [file.label for file in manifest.splits["train"]] == [0, 0, 0, 1, 1, 1]
    assert [Path(file.path).name for file in manifest.splits["train"][:3]] == [
        "n01_1.JPEG",
        "n01_10.JPEG",
        "n01_9.JPEG",
    ]


def test_classes_have_their_names_if_the_list_is_there(root: Path):
    (root / "LOC_synset_mapping.txt").write_text("n02 tench, Tinca tinca\nn03 other\n\n")
    assert scan(root).class_names == ("n01", "tench")


def test_other_files_are_no_images(root: Path):
    digest = scan(root).digest
    (root / "train/n01/notes.txt").write_text("x")
    (root / "train/checksums").write_text("x")
    assert scan(root).digest == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "train/n01/n01_9.JPEG").write_text("PIXELS of n01_9.JPEG"),
        lambda root: (root / "val/n02/ILSVRC2012_val_n02.png").write_text("other"),
        lambda root: (root / "train/n01/n01_9.JPEG").unlink(),
        lambda root: (root / "train/n01/n01_9.JPEG").rename(root / "train/n01/n01_8.JPEG"),
        lambda root: (root / "train/n01/n01_9.JPEG").rename(root / "train/n02/n01_9.JPEG"),
        lambda root: (root / "train/n01/n01_11.jpg").write_text("new"),
    ],
    ids=["content", "size", "gone", "renamed", "other class", "new"],
)
def test_digest_notices_a_change(root: Path, change: Callable[[Path], object]):
    digest = scan(root).digest
    change(root)
    assert scan(root).digest != digest


def test_digest_does_not_depend_on_where_the_tree_is(root: Path, tmp_path_factory: Any):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "tree"
    digest = scan(root).digest
    root.rename(elsewhere)
    assert scan(elsewhere).digest == digest


def test_written_manifest_counts_and_names(root: Path, tmp_path: Path):
    (root / "LOC_synset_mapping.txt").write_text("n02 tench, Tinca tinca\n")
    manifest = scan(root)
    path = tmp_path / "build" / "images.json"
    manifest.write(path)
    assert read_manifest(path) == {
        "root": "data/raw",
        "layout": "imagefolder",
        "digest": manifest.digest,
        "num_images": {"train": 6, "val": 2},
        "classes": {"n01": "n01", "n02": "tench"},
    }
    assert json.loads(path.read_text()) == read_manifest(path)


def test_missing_manifest_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"images.json: missing; run `dvc repro prepare`"):
        read_manifest(tmp_path / "images.json")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_folder_is_named(root: Path, split: str):
    (root / split).rename(root / "other")
    with pytest.raises(ValueError, match=rf"data\.root: no folder data/raw/{split}; expected"):
        scan(root)


def test_folder_without_classes_is_named(tmp_path: Path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"data\.root: data/raw/train has no class folders"):
        scan(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_is_named(root: Path, split: str):
    for path in (root / split / "n02").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"data\.root: data/raw/{split}/n02 holds no images"):
        scan(root)


def test_class_without_validation_images_is_named(root: Path):
    (root / "val/n02").rename(root / "n02")
    with pytest.raises(ValueError, match=r"data\.root: data/raw/val/n02 holds no images"):
        scan(root)


def test_class_unknown_in_training_is_named(root: Path):
    (root / "val/n03").mkdir()
    with pytest.raises(ValueError, match=r"data/raw/val has classes that train/ lacks: \['n03'\]"):
        scan(root)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("train/n01/n01_5.JPEG", "n01_5"),
        ("train/cat/5.jpg", "cat_5"),
        ("val/n01/ILSVRC2012_val_5.JPEG", "n01_ILSVRC2012_val_5"),
        ("train/cat/a.b.jpg", "cat_a_b"),
        ("train/v1.0 cats/5.jpg", "v1_0 cats_5"),
        ("train/v1.0/v1.0_5.jpg", "v1_0_5"),
    ],
)
def test_key_names_class_and_file(path: str, key: str):
    assert ImageFile(path, 0).key == key


names = st.text("ab._ é1", min_size=1, max_size=6).filter(lambda name: name.strip(".") != "")


@given(folder=names, stem=names)
def test_keys_have_no_dots(folder: str, stem: str):
    """WebDataset takes all behind the first dot for the extension."""
    assert "." not in ImageFile(f"train/{folder}/{stem}.jpg", 0).key


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("n01/n01_9.JPEG", "n01/n01_9.png"),
        ("n01/a.b.jpg", "n01/a_b.jpg"),
        ("n/n01_9.jpg", "n01/n01_9.JPEG"),
    ],
)
def test_two_images_of_one_key_are_named(root: Path, first: str, second: str):
    for name in (first, second):
        for split in ("train", "val"):
            path = root / split / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
    with pytest.raises(ValueError, match=r"^data\.root: .* would both be .*: rename one") as caught:
        scan(root)
    assert first in str(caught.value)
    assert second in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_train": None}, r"data\.num_train is needed when data\.source is toy"),
        ({"source": "imagefolder"}, r"data\.num_train has no meaning .* set it to null"),
        ({"image_size": 30}, "multiple of 8"),
        ({"root": ""}, "at least 1 character"),
    ],
)
def test_contradicting_parameters_are_refused(changes: dict[str, Any], fault: str):
    with pytest.raises(ValidationError, match=fault):
        DataParams.model_validate(PARAMS | changes)


def test_parameters_of_both_sources_are_valid():
    DataParams.model_validate(PARAMS)
    folder = PARAMS | {"source": "imagefolder", "num_train": None, "num_val": None}
    DataParams.model_validate(folder)
