"""Subsets of samples: few-shot training sets and a development split."""

import hashlib
from collections.abc import Sequence

import numpy as np


def k_shot_split(labels: Sequence[int], *, shots: int, seed: int) -> list[int]:
    """Draw `shots` samples of every class in `labels`, and return their indices in ascending order.

    The samples drawn from a class do not depend on the other classes. With the same seed, a set of
    more shots contains every set of fewer shots. Raises ValueError if a class is too small.
    """
    chosen: list[int] = []
    for label, indices in _shuffled_classes(labels, seed=seed).items():
        if len(indices) < shots:
            has = f"class {label} has only {len(indices)} images"
            raise ValueError(f"transfer.shots: {shots} is too large: {has}; lower transfer.shots")
        chosen += indices[:shots]
    return sorted(chosen)


def share_of_each_class(labels: Sequence[int], *, share: float, seed: int) -> list[int]:
    """Draw a share in (0, 1] of every class, at least one sample, and return ascending indices.

    With one seed, a larger share contains every smaller share.
    """
    classes = _shuffled_classes(labels, seed=seed).values()
    chosen = (indices[: max(1, round(share * len(indices)))] for indices in classes)
    return sorted(index for indices in chosen for index in indices)


def _shuffled_classes(labels: Sequence[int], *, seed: int) -> dict[int, list[int]]:
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    return {
        label: np.random.default_rng([seed, label]).permutation(indices).tolist()
        for label, indices in members.items()
    }


def is_dev(key: str, *, fraction: float = 0.1) -> bool:
    """Return whether a training sample belongs to the development split, which is held out.

    Only the hash of the sample's key decides this; there is no seed. About `fraction` of all
    samples are in the split. A larger fraction only adds samples to the split.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
