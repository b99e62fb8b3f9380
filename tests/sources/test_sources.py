"""The same images from every layout: same keys, labels, bytes, whichever way they are read."""

import multiprocessing
import os
import pickle  # noqa: TID251  # our own objects
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contradiff.data.params import DataParams
from contradiff.sources.imagenet import Manifest
from tests.sources.imagenet_layouts import WNIDS, WRITERS, make_photos

each_layout = pytest.mark.parametrize("layout", list(WRITERS))


def scan(root: Path, layout: Any = "auto", **options: Any) -> Manifest:
    return Manifest.scan(root, shown_root="data/raw", layout=layout, **options)


def rows(manifest: Manifest, root: Path) -> set[tuple[str, str, int, bytes]]:
    read = manifest.reader(root)
    return {
        (split, file.key, file.label, read(file))
        for split, files in manifest.splits.items()
        for file in files
    }


@settings(max_examples=5)
@given(seed=st.integers(0, 1000), num_train=st.integers(1, 5), num_val=st.integers(1, 3))
def test_all_layouts_give_the_same_images(seed: int, num_train: int, num_val: int):
    photos = make_photos(seed=seed, num_train=num_train, num_val=num_val)
    expected = {
        (
            photo.split,
            # a training image's name begins with its class
            ("" if photo.split == "train" else f"{photo.wnid}_") + photo.name.split(".")[0],
            sorted(WNIDS).index(photo.wnid),
            photo.content,
        )
        for photo in photos
    }
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout, write in WRITERS.items():
            root = Path(folder) / layout
            write(root, photos)
            manifest = scan(root)
            assert manifest.layout == layout
            assert rows(manifest, root) == expected
            assert manifest.class_ids == WNIDS
            assert manifest.class_names == ("tench", "kit fox", "water bottle")
            assert {s: len(files) for s, files in manifest.splits.items()} == {
                "train": 3 * num_train,
                "val": 3 * num_val,
            }
            digests[layout] = manifest.digest
    # a parquet's manifest has its shards' footers in it
    assert digests["imagefolder"] == digests["archives"] == digests["kaggle"]


@each_layout
def test_sizes_are_those_of_the_images(tmp_path: Path, layout: str):
    photos = make_photos(seed=1, smallest=5000)
    WRITERS[layout](tmp_path, photos)
    manifest = scan(tmp_path)
    read = manifest.reader(tmp_path)
    for files in manifest.splits.values():
        given = [file.num_bytes for file in files]
        true = [len(read(file)) for file in files]
        if layout == "parquet":  # means over row groups, with their pages' headers
            assert sum(true) * 0.999 < sum(given) < sum(true) * 1.05
        else:
            assert given == true


@each_layout
def test_images_are_listed_by_class_and_name(tmp_path: Path, layout: str):
    WRITERS[layout](tmp_path, make_photos(seed=2))
    for split, files in scan(tmp_path).splits.items():
        paths = [file.path for file in files]
        assert paths == sorted(paths)
        assert all(path.startswith(f"{split}/") for path in paths)


@each_layout
def test_reader_works_in_other_processes(tmp_path: Path, layout: str):
    """Pickled after it has been used, for a fresh interpreter; and inherited by a fork."""
    WRITERS[layout](tmp_path, make_photos(seed=3))
    manifest = scan(tmp_path)
    read = manifest.reader(tmp_path)
    files = manifest.splits["train"]
    expected = [read(file) for file in files]
    again = pickle.loads(pickle.dumps(read))
    assert [again(file) for file in files] == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read, files) == expected
    assert read(files[0]) == expected[0]


@each_layout
def test_an_image_that_is_gone_is_named(tmp_path: Path, layout: str):
    WRITERS[layout](tmp_path, make_photos(seed=3))
    manifest = scan(tmp_path)
    with pytest.raises(ValueError, match=r"data\.root: .*cannot be read"):
        manifest.reader(tmp_path / "elsewhere")(manifest.splits["val"][0])


def one_changed(**changes: Any) -> Callable[[Path, Any], None]:
    """Write the images with one of them replaced, added or missing."""

    def write(root: Path, writer: Any) -> None:
        photos = make_photos(seed=4)
        match changes:
            case {"content": content}:
                photo = photos[1]
                content = content(photo.content)
                photos[1] = type(photo)(photo.split, photo.wnid, photo.name, content)
            case {"name": name}:
                photo = photos[1]
                photos[1] = type(photo)(photo.split, photo.wnid, name, photo.content)
            case {"gone": index}:
                del photos[index]
            case _:
                pass
        writer(root, photos)

    return write


@each_layout
@pytest.mark.parametrize(
    "change",
    [
        one_changed(content=lambda content: content + b"x"),
        one_changed(content=lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        one_changed(name="n01440764_20001.JPEG"),
        one_changed(gone=1),
    ],
    ids=["size", "content", "renamed", "gone"],
)
def test_digest_notices_a_change(tmp_path: Path, layout: str, change: Callable[[Path, Any], None]):
    digests: list[str] = []
    for number, write in enumerate((one_changed(), one_changed(), change)):
        root = tmp_path / str(number)
        write(root, WRITERS[layout])
        digests.append(scan(root).digest)
    assert digests[0] == digests[1] != digests[2]


def test_what_auto_finds_is_told(tmp_path: Path):
    WRITERS["kaggle"](tmp_path, make_photos(seed=0))
    told: list[str] = []
    scan(tmp_path, on_message=told.append)
    assert told == [
        "data.source auto: found kaggle (ILSVRC/Data/CLS-LOC/train/) in data/raw",
    ]


def test_auto_lists_what_it_looked_for(tmp_path: Path):
    (tmp_path / "train").mkdir()  # without a class in it
    (tmp_path / "photo.jpg").touch()
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"^data\.root: found no images in data/raw") as caught:
            scan(root)
        for text in (
            "imagefolder: train/<class>/",
            "archives: ILSVRC2012_img_train.tar",
            "kaggle: ILSVRC/Data/CLS-LOC/train/",
            "parquet: data/train-*.parquet",
        ):
            assert text in str(caught.value)


def test_auto_leaves_the_choice_between_two_layouts(tmp_path: Path):
    photos = make_photos(seed=0)
    WRITERS["archives"](tmp_path, photos)
    WRITERS["imagefolder"](tmp_path, photos)
    expected = r"holds 2 layouts \(imagefolder: .*; archives: .*\); set data\.source to one"
    with pytest.raises(ValueError, match=expected):
        scan(tmp_path)
    assert rows(scan(tmp_path, "archives"), tmp_path) == rows(
        scan(tmp_path, "imagefolder"), tmp_path
    )


@each_layout
def test_class_without_an_image_is_named(tmp_path: Path, layout: str):
    photos = make_photos(seed=0)
    missing = [p for p in photos if not (p.split == "train" and p.wnid == "n02119789")]
    WRITERS[layout](tmp_path, missing)
    if layout in ("imagefolder", "kaggle"):  # in the others it is there already
        folder = "" if layout == "imagefolder" else "ILSVRC/Data/CLS-LOC/"
        (tmp_path / folder / "train/n02119789").mkdir()
    expected = r"n02119789 holds no images|classes have no train image: (n02119789|0001)"
    with pytest.raises(ValueError, match=rf"^data\.root: .*({expected})"):
        scan(tmp_path)


@each_layout
def test_two_images_of_one_key_are_named(tmp_path: Path, layout: str):
    photos = make_photos(seed=0)
    photo = photos[0]
    photos.append(type(photo)("train", photo.wnid, photo.name.replace("JPEG", "png"), b"x"))
    options = {"path_of": lambda photo: photo.name} if layout == "parquet" else {}
    WRITERS[layout](tmp_path, photos, **options)
    with pytest.raises(ValueError, match=r"^data\.root: .*JPEG.*png.* would both be n01440764_"):
        scan(tmp_path)


def test_only_archives_have_checksums(tmp_path: Path):
    WRITERS["imagefolder"](tmp_path, make_photos(seed=0))
    with pytest.raises(ValueError, match=r"^raw\.verify: true .* read as imagefolder; set it to"):
        scan(tmp_path, verify=True)


@pytest.mark.parametrize("source", ["imagefolder", "archives", "kaggle", "parquet", "auto"])
def test_parameters_choose_the_layout(source: Any):
    params = DataParams(source=source, root="data/raw", image_size=32, num_train=None, num_val=None)
    assert params.layout == source


def test_toy_images_are_a_tree():
    params = DataParams(source="toy", root="data/raw", image_size=32, num_train=12, num_val=12)
    assert params.layout == "imagefolder"


def test_archives_are_opened_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    WRITERS["archives"](tmp_path, make_photos(seed=0))
    manifest = scan(tmp_path)
    read = manifest.reader(tmp_path)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest)
    )
    for _ in range(2):
        for files in manifest.splits.values():
            for file in files:
                read(file)
    assert sorted(Path(path).name for path in opened) == [
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
    ]
