"""By its properties."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contradiff.data.subsets import is_dev, k_shot_split, share_of_each_class

LABELS = [index % 7 for index in range(700)]


@given(shots=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_k_shot_split_is_balanced_sorted_and_unique(shots: int, seed: int):
    split = k_shot_split(LABELS, shots=shots, seed=seed)
    assert split == sorted(set(split))
    assert Counter(LABELS[index] for index in split) == dict.fromkeys(range(7), shots)


def test_k_shot_split_depends_on_the_seed_alone():
    first = k_shot_split(LABELS, shots=25, seed=3)
    assert first == k_shot_split(LABELS, shots=25, seed=3)
    assert first != k_shot_split(LABELS, shots=25, seed=4)
    assert set(k_shot_split(LABELS, shots=5, seed=3)) < set(first)


def test_classes_are_drawn_independently():
    alone = k_shot_split([0] * 50, shots=5, seed=1)
    beside_another = k_shot_split([0, 1] * 50, shots=5, seed=1)
    assert alone == [index // 2 for index in beside_another if index % 2 == 0]
    assert alone != [index // 2 for index in beside_another if index % 2 == 1]


@given(share=st.floats(0, 1, exclude_min=True), seed=st.integers(0, 2**31))
def test_a_share_has_as_much_of_each_class_and_nests(share: float, seed: int):
    labels = [0] * 80 + [1] * 3 + [2] * 41
    drawn = share_of_each_class(labels, share=share, seed=seed)
    assert drawn == sorted(set(drawn))
    counts = Counter(labels[index] for index in drawn)
    assert counts == {k: max(1, round(share * n)) for k, n in ((0, 80), (1, 3), (2, 41))}
    assert set(share_of_each_class(labels, share=share / 2, seed=seed)) <= set(drawn)


def test_too_few_images_name_the_class_and_the_key():
    with pytest.raises(ValueError, match=r"transfer\.shots: 3 is too large: class 1 has only 2"):
        k_shot_split([0, 1, 0, 1, 0], shots=3, seed=0)


def test_dev_split_has_about_its_fraction_and_nests():
    keys = [f"n01440764_{index}" for index in range(10_000)]
    dev = {key for key in keys if is_dev(key)}
    assert abs(len(dev) - 1000) < 150  # five deviations
    assert dev < {key for key in keys if is_dev(key, fraction=0.3)}
    assert not any(is_dev(key, fraction=0.0) for key in keys)
    assert all(is_dev(key, fraction=1.0) for key in keys)


def test_dev_split_never_changes():
    """Frozen: another choice of samples would leak those on which parameters were chosen."""
    frozen = [3, 7, 13, 16, 22, 25, 28, 33, 39, 57, 58]
    assert [index for index in range(60) if is_dev(f"key-{index}")] == frozen
