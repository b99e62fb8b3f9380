import pickle  # noqa: TID251  (the format under test)
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from contradiff.sources.cifar import read_cifar
from contradiff.sources.cifar_files import find_cifar
from contradiff.toy.digits import write_digits_archive


def _load(path: Path, encoding: str = "bytes") -> dict[Any, Any]:
    with path.open("rb") as file:
        return pickle.load(file, encoding=encoding)


def _peer() -> tuple[np.ndarray, np.ndarray]:
    images, targets = load_digits(return_X_y=True)
    return np.asarray(images).reshape(-1, 8, 8), np.asarray(targets)


def _indices(split: dict[Any, Any]) -> list[int]:
    """The images' indices in load_digits, which their file names end with."""
    return [int(name.decode().removesuffix(".png").split("_s_")[1]) for name in split[b"filenames"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "archive"
    write_digits_archive(root, num_train_per_class=60, seed=0)
    return root


def test_layout_is_cifar100s(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == ["meta", "test", "train"]
    meta = _load(root / "meta")
    assert set(meta) == {b"fine_label_names", b"coarse_label_names"}
    for name, number in (("train", 600), ("test", 1197)):
        assert (root / name).read_bytes()[:2] == b"\x80\x02"
        split = _load(root / name)
        keys = {b"data", b"fine_labels", b"coarse_labels", b"filenames", b"batch_label"}
        assert set(split) == keys
        assert split[b"data"].shape == (number, 3 * 32 * 32)
        assert split[b"data"].dtype == np.uint8
        for key in (b"fine_labels", b"coarse_labels", b"filenames"):
            assert isinstance(split[key], list)
            assert len(split[key]) == number
        assert {type(label) for label in split[b"fine_labels"]} == {int}
        assert all(len(meta[b"coarse_label_names"]) > c >= 0 for c in split[b"coarse_labels"])


def test_strings_are_python_2s_so_that_torchvision_reads_them_as_text(root: Path) -> None:
    """torchvision.datasets.CIFAR100 unpickles with encoding="latin1" and asks for text keys."""
    split = _load(root / "train", encoding="latin1")
    assert split["data"].dtype == np.uint8
    np.testing.assert_array_equal(split["data"], _load(root / "train")[b"data"])
    assert _load(root / "meta", encoding="latin1")["fine_label_names"][3] == "three"


def test_the_projects_reader_agrees_with_pickle(root: Path) -> None:
    files = find_cifar(root, "cifar100", shown_root="digits")
    split = read_cifar(files, "cifar100", split="test")
    expected = _load(root / "test")
    np.testing.assert_array_equal(split.images.reshape(len(split.images), -1), expected[b"data"])
    assert split.labels.tolist() == expected[b"fine_labels"]
    assert split.class_names[:3] == ["zero", "one", "two"]


def test_training_pool_is_balanced_and_shares_nothing_with_the_test_set(root: Path) -> None:
    train, test = _load(root / "train"), _load(root / "test")
    assert np.bincount(train[b"fine_labels"]).tolist() == [60] * 10
    assert sorted(_indices(train) + _indices(test)) == list(range(1797))
    rows = {row.tobytes() for row in train[b"data"]}
    assert not rows & {row.tobytes() for row in test[b"data"]}


def test_labels_are_scikit_learns(root: Path) -> None:
    _, targets = _peer()
    for name in ("train", "test"):
        split = _load(root / name)
        assert split[b"fine_labels"] == targets[_indices(split)].tolist()
        assert split[b"coarse_labels"] == (targets[_indices(split)] % 2).tolist()


def _bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Keys's cubic convolution with a = -1/2, its weights renormalised at the border."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    t = np.abs(centres[:, None] - np.arange(old))
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def test_pixels_are_bicubic_enlargements_of_scikit_learns(root: Path) -> None:
    split = _load(root / "test")
    matrix = _bicubic_matrix(8, 32)
    scans = _peer()[0][_indices(split)] / 16 * 255
    expected = np.clip(matrix @ scans @ matrix.T, 0, 255)
    images = split[b"data"].reshape(-1, 3, 32, 32).astype(float)
    for channel in range(3):
        np.testing.assert_allclose(images[:, channel], expected, atol=0.51)


def test_same_seed_same_bytes_other_seed_other_pool(root: Path, tmp_path: Path) -> None:
    write_digits_archive(tmp_path / "again", num_train_per_class=60, seed=0)
    write_digits_archive(tmp_path / "other", num_train_per_class=60, seed=1)
    for name in ("train", "test", "meta"):
        assert (tmp_path / "again" / name).read_bytes() == (root / name).read_bytes()
    assert set(_indices(_load(tmp_path / "other" / "train"))) != set(
        _indices(_load(root / "train"))
    )


def test_an_earlier_archive_is_replaced_but_other_data_are_not(tmp_path: Path) -> None:
    write_digits_archive(tmp_path / "own", num_train_per_class=5, seed=0)
    write_digits_archive(tmp_path / "own", num_train_per_class=6, seed=0)
    assert len(_load(tmp_path / "own" / "train")[b"filenames"]) == 60
    real = tmp_path / "cifar-100-python"
    real.mkdir()
    (real / "meta").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"transfer_data\.source"):
        write_digits_archive(real, num_train_per_class=5, seed=0)
    assert (real / "meta").read_bytes() == b"precious"


@pytest.mark.parametrize("number", [0, 174])
def test_a_class_without_training_or_test_images_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(ValueError, match="1 to 173"):
        write_digits_archive(tmp_path / "digits", num_train_per_class=number, seed=0)
