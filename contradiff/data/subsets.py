"""Subsets of samples: few-shot training sets and a development split."""

import hashlib
from collections.abc import Sequence

import numpy as np


def k_shot_split(labels: Sequence[int], *, shots: int, seed: int) -> list[int]:
    """Draw `shots` samples of every class in `labels`, and return their indices in ascending order.

    The samples drawn from a class do not depend on the other classes. With the same seed, a set of
    more shots contains every set of fewer shots. Raises ValueError if a class is too small.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, indices in members.items():
        if len(indices) < shots:
            has = f"class {label} has only {len(indices)} images"
            raise ValueError(f"transfer.shots: {shots} is too large: {has}; lower transfer.shots")
        order = np.random.default_rng([seed, label]).permutation(len(indices))
        chosen += [indices[position] for position in order[:shots].tolist()]
    return sorted(chosen)


def is_dev(key: str, *, fraction: float = 0.1) -> bool:
    """Return whether a training sample belongs to the development split, which is held out.

    Only the hash of the sample's key decides this; there is no seed. About `fraction` of all
    samples are in the split. A larger fraction only adds samples to the split.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
