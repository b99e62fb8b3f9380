"""torchvision and our reader of CIFAR-100 read the digits with scikit-learn's labels and pixels."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR100

from contradiff.sources.cifar import find_cifar, read_cifar
from contradiff.toy.digits import write_digits


def _indices(root: Path, split: str) -> list[int]:
    """Return the images' indices in `load_digits`, which are in their file names."""
    keys = read_cifar(find_cifar(root, "cifar100"), split=split).keys
    return [int(name.removesuffix(".png").split("_s_")[1]) for name in keys]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "cifar-100-python"
    write_digits(root, num_train_per_class=60, seed=0)
    return root


def _bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Return Keys's cubic interpolation (a = -1/2), with weights normalised at the border."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    t = np.abs(centres[:, None] - np.arange(old))
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_and_scikit_learn_agree(
    root: Path, monkeypatch: pytest.MonkeyPatch, split: str
):
    assert sorted(path.name for path in root.iterdir()) == ["meta", "test", "train"]
    assert (root / split).read_bytes()[:2] == b"\x80\x02"  # the official files' pickle protocol
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda _: True)
    md5 = hashlib.md5((root / "meta").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5})
    peer = CIFAR100(str(root.parent), train=split == "train")
    ours = read_cifar(find_cifar(root, "cifar100"), split=split)
    images = ours.read(range(len(ours.labels)))
    np.testing.assert_array_equal(images.transpose(0, 2, 3, 1), peer.data)
    assert list(ours.class_names) == peer.classes
    assert peer.classes[:3] == ["zero", "one", "two"]
    scans, targets = load_digits(return_X_y=True)
    chosen = _indices(root, split)
    assert ours.labels.tolist() == peer.targets == targets[chosen].tolist()
    matrix = _bicubic_matrix(8, 32)
    large = matrix @ (scans[chosen].reshape(-1, 8, 8) / 16 * 255) @ matrix.T
    for channel in range(3):
        np.testing.assert_allclose(images[:, channel], np.clip(large, 0, 255), atol=0.51)
    if split == "train":
        assert np.bincount(ours.labels).tolist() == [60] * 10
        assert sorted(chosen + _indices(root, "test")) == list(range(1797))


def test_same_seed_same_bytes_other_seed_other_pool(root: Path, tmp_path: Path):
    for name, seed in (("again", 0), ("other", 1)):
        write_digits(tmp_path / name, num_train_per_class=60, seed=seed)
    for name in ("train", "test", "meta"):
        assert (tmp_path / "again" / name).read_bytes() == (root / name).read_bytes()
    assert set(_indices(tmp_path / "other", "train")) != set(_indices(root, "train"))


def test_an_earlier_archive_is_replaced_but_other_data_are_not(tmp_path: Path):
    for number in (5, 6):
        write_digits(tmp_path / "own", num_train_per_class=number, seed=0)
    assert len(_indices(tmp_path / "own", "train")) == 60
    (tmp_path / "meta").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"transfer_data\.source"):
        write_digits(tmp_path, num_train_per_class=5, seed=0)
    assert (tmp_path / "meta").read_bytes() == b"precious"
