"""Folders as torchvision lists them and the pipeline crops them; CIFAR; what stands for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contradiff.files import sha256_of
from contradiff.sources.cifar import FORMS
from contradiff.sources.transfer_set import Source, TransferSet, TransferSplit
from tests.sources.test_cifar import pack, unpack

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
    root = tmp_path / "images"
    for seed, (name, (width, height)) in enumerate(FILES.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # smooth, so that a JPEG is nearly what was drawn
        small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    for name in ("notes.txt", "._a.jpg", ".png"):
        (root / "train/dog" / name).write_text("no image")
    return root


def read(root: Path, split: Any) -> TransferSplit:
    return TransferSet(root, "imagefolder").split(split, image_size=16)


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_lists_and_shows_the_same(root: Path, split: str):
    from torchvision.datasets import ImageFolder as Peer
    from torchvision.transforms import v2

    for name in ("._a.jpg", ".png"):  # what ours takes for hidden files
        (root / "train/dog" / name).unlink()
    (root / "val").mkdir()  # test/ comes before it
    # test/ has no dog: torchvision would then number the other classes anew
    (root / "test/dog").mkdir(exist_ok=True)
    crop = v2.Lambda(lambda x: v2.functional.center_crop(x, [min(x.shape[1:])] * 2))
    resize = v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    transform = v2.Compose([v2.PILToTensor(), crop, resize])
    peer = Peer(str(root / split), transform=transform, allow_empty=True)
    ours = read(root, split)
    assert list(ours.class_names) == peer.classes == ["bee", "cat", "dog"]
    assert ours.labels.tolist() == peer.targets
    assert [str(root / key) for key in ours.keys] == [path for path, _ in peer.samples]
    rows = list(range(len(peer)))[::-1]
    for shown, row in zip(ours.read(rows), rows, strict=True):
        assert np.abs(shown.astype(int) - peer[row][0].numpy().astype(int)).max() <= 1


def test_faults_of_folders_are_named(root: Path):
    def complaint() -> str:
        with pytest.raises(ValueError, match=rf"^transfer_data\.root: {root}|: no") as caught:
            TransferSet(root, "imagefolder").manifest(project=root)
        return str(caught.value)

    (root / "test/owl").mkdir()
    assert f"{root}/test has classes that train/ lacks: ['owl']" in complaint()
    (root / "train/owl").mkdir()
    assert f"{root}/train/owl contains no images (.bmp" in complaint()
    (root / "train/owl/o.png").write_bytes((root / "train/cat/1.PNG").read_bytes())
    for name in ("cat/2.png", "bee/3.png"):
        (root / "test" / name).unlink()
    assert f"{root}/test contains no images" in complaint()
    (root / "test").rename(root / "rest")
    assert f"no folder {root}/test; it must contain a folder of images for" in complaint()
    (root / "rest").rename(root / "val")
    assert f"{root}/val contains no images" in complaint()


@pytest.mark.parametrize(
    ("method", "locked", "is_folder"),
    [
        ("stat", "test", True),
        ("stat", "train/dog", True),
        ("read_bytes", "train/dog/b.png", False),
        ("read_bytes", "test/cat/2.png", False),
    ],
)
def test_what_cannot_be_read_is_named_and_not_taken_for_empty(
    root: Path, monkeypatch: pytest.MonkeyPatch, method: str, locked: str, *, is_folder: bool
):
    """By a stand-in for the system's refusal: these tests may run as root, who may read all."""
    images, original = TransferSet(root, "imagefolder"), getattr(Path, method)
    split = images.split("test" if locked.startswith("test") else "train", image_size=16)

    def refuse(path: Path, **given: Any) -> Any:
        if path == root / locked:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, **given)

    monkeypatch.setattr(Path, method, refuse)
    calls: list[Callable[[], object]] = [lambda: images.manifest(project=root)]
    calls.append(lambda: list(images.check(verify=False)))
    if not is_folder:
        calls.append(lambda: split.read(range(len(split.labels))))
    for call in calls:
        with pytest.raises(ValueError, match=rf"^transfer_data\.root: {root / locked} cannot be r"):
            call()


def test_an_image_that_cannot_be_decoded_is_named_with_its_parameter(root: Path):
    (root / "train/cat/1.PNG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"^transfer_data\.root: {root}/train/cat/1.PNG: not a r"):
        read(root, "train").read([1])


def reopened(images: TransferSet, project: Path) -> TransferSet:
    (project / "transfer.json").write_text(json.dumps(images.manifest(project=project)))
    return TransferSet.reopen(project / "transfer.json", project=project)


def test_manifest_of_folders_covers_every_name_and_byte(root: Path, tmp_path: Path):
    images = TransferSet(root, "imagefolder")
    assert reopened(images, tmp_path) == images
    content = json.loads((tmp_path / "transfer.json").read_text())
    assert content["num_images"] == {"train": 4, "test": 2}
    assert (content["root"], content["classes"]) == ("images", ["bee", "cat", "dog"])
    path = root / "test/cat/2.png"
    for change in (
        lambda: path.write_bytes(path.read_bytes()[:-1] + b"?"),  # the same size
        lambda: path.rename(root / "test/cat/0.png"),
    ):
        reopened(images, tmp_path)
        change()
        with pytest.raises(ValueError, match=rf"^transfer_data\.root: {root} has changed since"):
            TransferSet.reopen(tmp_path / "transfer.json", project=tmp_path)


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "digits"])
def test_manifest_of_cifar_covers_every_file(tmp_path: Path, source: Source):
    name = "cifar10" if source == "cifar10" else "cifar100"
    form = FORMS[name][0]
    archive = pack(tmp_path, name, form)
    for images in (TransferSet(archive, source), TransferSet(unpack(tmp_path, name, form), source)):
        assert reopened(images, tmp_path) == images
        files = images.manifest(project=tmp_path)["files"]
        paths = [archive] if images.root == archive else [images.root / n for n in form.files]
        assert {n: f["sha256"] for n, f in files.items()} == {p.name: sha256_of(p) for p in paths}
        assert images.split("train", image_size=16).read([0]).shape == (1, 3, 32, 32)
        paths[-1].write_bytes(paths[-1].read_bytes() + b"?")
        with pytest.raises(ValueError, match="has changed since"):
            TransferSet.reopen(tmp_path / "transfer.json", project=tmp_path)


def test_check_reads_all_and_counts(root: Path, tmp_path: Path):
    images = TransferSet(root, "imagefolder")
    expected = [f"{count} images of 3 classes in {root}" for count in ("4 train", "2 test")]
    expected[0] += "; ignored files: 1 .txt, 2 hidden"
    assert list(images.check(verify=True)) == expected
    (root / "train/cat/1.PNG").write_text("no image")
    (root / "test/bee/3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/cat/1\.PNG: not a readable image"):
        read(root, "train").read([1])
    fault = (
        rf"^transfer_data.root: 2 images in {root} .*train/cat/1.PNG: .*3.png: .* \(empty file\)"
    )
    with pytest.raises(ValueError, match=fault):
        list(images.check(verify=True))
    archive = TransferSet(pack(tmp_path, "cifar10", FORMS["cifar10"][0]), "cifar10")
    with pytest.raises(ValueError, match="not the official cifar-10-python"):
        list(archive.check(verify=True))
    assert len(list(archive.check(verify=False))) == 2
