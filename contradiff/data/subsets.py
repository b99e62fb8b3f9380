"""Subsets of samples: few-shot training sets and a development split."""

import hashlib
from collections.abc import Sequence

import numpy as np


def k_shot_split(labels: Sequence[int], *, shots: int, seed: int) -> list[int]:
    """Draw `shots` samples of every class in `labels`, and return their indices in ascending order.

    The samples drawn from a class do not depend on the other classes. With one seed, a larger set
    contains every smaller set. Raises ValueError, which names the class, if a class is too small.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, indices in members.items():
        if len(indices) < shots:
            has = f"class {label} has only {len(indices)} images"
            raise ValueError(f"transfer.shots: {shots}, but {has}; lower transfer.shots")
        order = np.random.default_rng([seed, label]).permutation(len(indices))
        chosen += [indices[position] for position in order[:shots].tolist()]
    return sorted(chosen)


def is_dev(key: str, *, fraction: float = 0.1) -> bool:
    """Return whether a training sample belongs to the development split, which is held out.

    The hash of the sample's key in the shard decides this, without any seed. `fraction` is the
    expected share of the split, in [0, 1]. A larger fraction only adds samples to the split.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
