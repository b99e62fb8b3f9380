"""The toy images: fixed bytes, ImageNet's file names, and colours that do not tell the class."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contradiff.toy.classes import CLASSES
from contradiff.toy.render import render_image
from contradiff.toy.tree import render_tree


def contents_of(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def render(root: Path, *, num_train: int = 50, num_val: int = 26, seed: int = 3) -> Path:
    render_tree(root, num_train=num_train, num_val=num_val, image_size=32, seed=seed)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("toy") / "tree")


def test_the_pictures_never_change() -> None:
    digest = hashlib.sha256()
    for class_index in range(len(CLASSES)):
        for index in range(20):  # many images, because every object has optional shapes
            rng = np.random.default_rng([3, class_index, index])
            digest.update(render_image(class_index, rng, image_size=32).tobytes())
    assert digest.hexdigest().startswith("8f6029074982f0ca")


def test_layout_and_format_are_imagenets_without_chroma_subsampling(root: Path) -> None:
    lines = (root / "LOC_synset_mapping.txt").read_text().splitlines()
    wnids = [line.split(" ", 1)[0] for line in lines]
    assert wnids == sorted({toy_class.wnid for toy_class in CLASSES})
    for split, number in (("train", 50), ("val", 26)):
        counts = {path.name: len(list(path.iterdir())) for path in (root / split).iterdir()}
        assert (sorted(counts), sum(counts.values())) == (wnids, number)
        assert max(counts.values()) - min(counts.values()) <= 1
    paths = list(root.rglob("train/*/*.JPEG"))
    assert all(path.name.startswith(f"{path.parent.name}_") for path in paths)
    numbers = sorted(int(path.stem.rsplit("_", 1)[1]) for path in (root / "val").rglob("*.JPEG"))
    assert numbers == list(range(1, 27))
    for path in root.rglob("*.JPEG"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
            # (id, horizontal sampling, vertical sampling, table) of Y, Cb and Cr.
            assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # pyright: ignore[reportAttributeAccessIssue]


def test_no_two_images_are_equal_over_splits_and_seeds(root: Path, tmp_path: Path) -> None:
    other = render(tmp_path / "other", seed=4)
    contents = [*contents_of(root).values(), *contents_of(other).values()]
    assert len(contents) == 2 * (50 + 26 + 1)
    assert len(set(contents)) == len(contents) - 1  # only the mapping files are equal
    # A larger split contains the images of a smaller split.
    small = render(tmp_path / "small", num_train=20, num_val=13)
    assert contents_of(small).items() <= contents_of(root).items()


@pytest.mark.parametrize("class_index", range(len(CLASSES)))
def test_twice_the_side_averaged_down_is_the_same_picture(class_index: int) -> None:
    small, large = (
        render_image(class_index, np.random.default_rng(0), image_size=size).astype(float)
        for size in (32, 64)
    )
    assert np.abs(large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)) - small).mean() < 3
    assert small.std() > 5


def test_mean_colour_does_not_tell_the_class() -> None:
    labels = np.repeat(np.arange(len(CLASSES)), 20)
    rngs = [np.random.default_rng([label, i]) for i, label in enumerate(labels)]
    pairs = zip(labels.tolist(), rngs, strict=True)
    colours = np.stack([render_image(*pair, image_size=16) for pair in pairs]).mean(axis=(1, 2))
    distances = np.linalg.norm(colours[:, None] - colours, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).mean() < 0.35  # the nearest image


def test_an_interrupted_rendering_leaves_the_earlier_tree(tmp_path: Path) -> None:
    toy = render(tmp_path / "toy", num_train=12, num_val=12)
    before = contents_of(toy)
    seen: list[int] = []

    def interrupt(number: int) -> None:
        seen.append(number)
        if len(seen) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_tree(toy, num_train=24, num_val=12, image_size=32, seed=9, on_progress=interrupt)
    assert seen == [1] * 30  # every image is reported
    assert (contents_of(toy), list(tmp_path.iterdir())) == (before, [toy])


def test_other_data_are_never_replaced(tmp_path: Path) -> None:
    photo = tmp_path / "imagenet" / "train" / "n01440764" / "n01440764_18.JPEG"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"data\.source"):
        render(tmp_path / "imagenet")
    assert photo.read_bytes() == b"precious"


@pytest.mark.parametrize("split", ["num_train", "num_val"])
def test_too_few_images_for_the_classes_are_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{split}.*12 or more"):
        render(tmp_path / "toy", **{split: 11})
