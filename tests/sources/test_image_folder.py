"""Any ImageFolder as a transfer set: torchvision lists the same, the pipeline crops the same."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contradiff.sources.image_folder import ImageFolder
from contradiff.sources.transfer_set import TransferSplit, read_transfer_split

FILES = {
    "train/dog/b.png": (40, 30),
    "train/dog/a.jpg": (20, 50),
    "train/cat/1.PNG": (16, 16),
    "train/bee/x.webp": (33, 32),
    "test/cat/2.png": (30, 40),
    "test/bee/3.png": (24, 24),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, (name, (width, height)) in enumerate(FILES.items()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # smooth, so that a JPEG is nearly what was drawn
        small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    return tmp_path


def read(root: Path, split: str) -> TransferSplit:
    return read_transfer_split(
        root, source="imagefolder", split=split, image_size=16, shown_root="images"
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_lists_and_shows_the_same(root: Path, split: str):
    from torchvision.datasets import ImageFolder as Peer
    from torchvision.transforms import v2

    # test/ has no dog: torchvision would then number the other classes anew
    (root / "test/dog").mkdir(exist_ok=True)
    size = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Lambda(lambda x: v2.functional.center_crop(x, [min(x.shape[1:])] * 2)),
            v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        ]
    )
    peer = Peer(str(root / split), transform=size, allow_empty=True)
    ours = read(root, split)
    assert list(ours.class_names) == peer.classes == ["bee", "cat", "dog"]
    assert ours.labels.tolist() == peer.targets
    assert [str(root / key) for key in ours.keys] == [path for path, _ in peer.samples]
    rows = list(range(len(peer)))[::-1]
    for shown, row in zip(ours.read(rows), rows, strict=True):
        expected = peer[row][0].numpy().astype(int)
        assert np.abs(shown.astype(int) - expected).max() <= 1


def test_test_comes_before_val(root: Path):
    (root / "test").rename(root / "val")
    assert len(read(root, "test").keys) == 2
    (root / "test/cat").mkdir(parents=True)
    (root / "val/cat/2.png").rename(root / "test/cat/2.png")
    assert read(root, "test").keys == ("test/cat/2.png",)


def complaint(root: Path) -> str:
    with pytest.raises(ValueError, match=r"^transfer_data\.root: images") as caught:
        ImageFolder.scan(root, shown_root="images")
    return str(caught.value)


def test_faults_are_named(root: Path):
    (root / "test/owl").mkdir()
    assert "images/test has classes that train/ lacks: ['owl']" in complaint(root)
    (root / "train/owl").mkdir()
    assert "images/train/owl holds no images (.jpeg" in complaint(root)
    (root / "train/owl/o.png").write_bytes((root / "train/cat/1.PNG").read_bytes())
    for name in ("cat/2.png", "bee/3.png"):
        (root / "test" / name).unlink()
    assert "images/test holds no images" in complaint(root)
    (root / "test").rename(root / "rest")
    assert "must hold train/<class>/* and test/<class>/*" in complaint(root)
    assert "must hold train/<class>/*" in complaint(root / "absent")


def test_empty_train_is_named(tmp_path: Path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    assert "images/train holds no images" in complaint(tmp_path)


def test_unreadable_image_is_named(root: Path):
    (root / "train/cat/1.PNG").write_text("no image")
    split = read(root, "train")
    with pytest.raises(ValueError, match=r"train/cat/1\.PNG: not a readable image"):
        split.read([1])


def test_hidden_files_are_no_images(root: Path):
    """MacOS leaves `._name.jpg` beside each file that it packs."""
    before = read(root, "train").keys
    for name in ("._a.jpg", ".png"):
        (root / "train/dog" / name).touch()
    assert read(root, "train").keys == before
