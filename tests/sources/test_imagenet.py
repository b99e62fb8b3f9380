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
from pydantic import ValidationError

from contradiff.data.params import DataParams
from contradiff.sources.imagenet import RawImages, reopen_images, scan_images
from tests.sources.imagenet_layouts import WNIDS, WRITERS, Photo, make_photos

each_layout = pytest.mark.parametrize("layout", list(WRITERS))


def scan(root: Path, **options: Any) -> RawImages:
    return scan_images(root, **({"layout": "auto"} | options))


def rows(images: RawImages) -> set[tuple[str, str, int, bytes]]:
    return {
        (split, file.key, file.label, images.read(file))
        for split, files in images.listing.splits.items()
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
            images = scan(root)
            assert rows(images) == expected
            assert images.listing.class_ids == WNIDS
            assert images.listing.class_names == ("tench", "kit fox", "water bottle")
            manifest = images.manifest(project=Path(folder))
            assert (manifest["root"], manifest["layout"]) == (layout, layout)
            assert manifest["num_images"] == {"train": 3 * num_train, "val": 3 * num_val}
            digests[layout] = images.digest
    # a parquet's manifest has its shards' footers in it
    assert digests["imagefolder"] == digests["archives"] == digests["kaggle"]


@each_layout
def test_reader_works_in_other_processes(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
):
    """Pickled after it has been used, for a fresh interpreter; and inherited by a fork."""
    WRITERS[layout](tmp_path / "here", make_photos(seed=3, smallest=5000))
    images = scan(tmp_path / "here")
    files = images.listing.splits["train"]
    assert [file.path for file in files] == sorted(file.path for file in files)
    expected = [images.read(file) for file in files]
    sizes, found = [len(content) for content in expected], [file.num_bytes for file in files]
    if layout == "parquet":  # means over row groups, with their pages' headers
        assert sum(sizes) * 0.999 < sum(found) < sum(sizes) * 1.05
    else:
        assert found == sizes
    again = pickle.loads(pickle.dumps(images.read))
    assert [again(file) for file in files] == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(images.read, files) == expected
    with monkeypatch.context() as patch:
        if layout == "archives":  # opened once in a process
            patch.setattr(os, "open", None)
        assert images.read(files[0]) == expected[0]
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ValueError, match=r"data\.root: .*cannot be read"):
        again(files[-1])


@each_layout
@pytest.mark.parametrize(
    "change",
    [
        lambda photo: [photo._replace(content=photo.content + b"x")],
        lambda photo: [photo._replace(content=photo.content[:-1] + bytes([photo.content[-1] ^ 1]))],
        lambda photo: [photo._replace(name="n01440764_20001.JPEG")],
        lambda _: [],
    ],
    ids=["size", "content", "renamed", "gone"],
)
def test_digest_notices_a_change(
    tmp_path: Path, layout: str, change: Callable[[Photo], list[Photo]]
):
    project, manifest = tmp_path / "project", tmp_path / "images.json"
    with pytest.raises(ValueError, match=r"images.json: no such file; run `dvc repro prepare`"):
        reopen_images(manifest, project=tmp_path)
    digests: list[str] = []
    for number, others in enumerate((lambda photo: [photo], lambda photo: [photo], change)):
        first, *rest = make_photos(seed=4)
        WRITERS[layout](tmp_path / str(number), others(first) + rest)
        digests.append(scan(tmp_path / str(number)).digest)
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "0").rename(project)  # its place does not matter
    assert scan(project).manifest(project=manifest)["root"] == str(project)  # not below it
    content = scan(project).manifest(project=tmp_path)
    manifest.write_text(str(content).replace("'", '"'))
    assert reopen_images(manifest, project=tmp_path).digest == digests[0]
    project.rename(tmp_path / "before")
    (tmp_path / "2").rename(project)
    expected = rf"^data\.root: {project} has changed since {manifest} was written; run `dvc repro"
    with pytest.raises(ValueError, match=expected):
        reopen_images(manifest, project=tmp_path)


def test_auto_tells_what_it_looks_for_and_what_it_finds(tmp_path: Path):
    photos, told = make_photos(seed=0), list[str]()
    (tmp_path / "train").mkdir()  # without a class in it
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=rf"^data\.root: found no images in {root}") as caught:
            scan(root)
        assert (
            "put one layout there: imagefolder: train/*/; archives: ILSVRC2012_img_train.tar or "
            "ILSVRC2012_img_val.tar; kaggle: ILSVRC/Data/CLS-LOC/train/; parquet: data/train-*.par"
        ) in str(caught.value)
    WRITERS["archives"](tmp_path, photos)
    scan(tmp_path, on_message=told.append)
    expected = "data.source: auto is 'archives' (ILSVRC2012_img_train.tar or ILSVRC2012_img_"
    assert told[0].startswith(expected)
    WRITERS["imagefolder"](tmp_path, photos)
    expected = r"contains 2 layouts \(imagefolder: .*; archives: .*\); set data\.source to one"
    with pytest.raises(ValueError, match=expected):
        scan(tmp_path)
    with pytest.raises(ValueError, match=r"^raw\.verify: true .* read as imagefolder; set raw"):
        scan(tmp_path, layout="imagefolder", verify=True)


@pytest.mark.parametrize("layout", ["archives", "parquet"])
def test_class_without_an_image_is_named(tmp_path: Path, layout: str):
    photos = make_photos(seed=0)
    missing = [p for p in photos if not (p.split == "train" and p.wnid == "n02119789")]
    WRITERS[layout](tmp_path, missing)
    with pytest.raises(ValueError, match=r"^data\.root: .*no train image: (n02119789|0001)"):
        scan(tmp_path)


PARAMS = {"source": "toy", "root": "data/raw", "image_size": 32, "num_train": 100, "num_val": 10}


def test_contradicting_parameters_are_refused():
    assert DataParams.model_validate(PARAMS).layout == "imagefolder"
    folder = PARAMS | {"source": "kaggle", "num_train": None, "num_val": None}
    assert DataParams.model_validate(folder).layout == "kaggle"
    for changes, fault in (
        ({"num_train": None}, r"data\.num_train: set a number, because data\.source is 'toy'"),
        (
            {"source": "imagefolder"},
            r"data\.num_train: set it to null; data\.num_val: set it to null, because data\.source",
        ),
        ({"image_size": 30}, "multiple of 8"),
        ({"root": ""}, "at least 1 character"),
    ):
        with pytest.raises(ValidationError, match=fault):
            DataParams.model_validate(PARAMS | changes)
