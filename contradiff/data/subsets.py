"""Subsets of samples: few-shot training sets and a development split."""

import hashlib
from collections.abc import Sequence

import numpy as np


def k_shot_split(labels: Sequence[int], *, shots: int, seed: int) -> list[int]:
    """Draw `shots` samples of every class that occurs; return their indices, ascending.

    The draw of a class depends only on the seed and on that class. The 25-shot set of a seed
    contains its 5-shot set, and so on. A ValueError names a class with fewer samples.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, indices in members.items():
        if len(indices) < shots:
            has = f"class {label} has only {len(indices)} images"
            raise ValueError(f"transfer.shots: {shots}, but {has}: lower it")
        order = np.random.default_rng([seed, label]).permutation(len(indices))
        chosen += [indices[position] for position in order[:shots].tolist()]
    return sorted(chosen)


def is_dev(key: str, *, fraction: float = 0.1) -> bool:
    """Whether a training sample belongs to the held-out development split.

    The hash of its key in the shard decides; other samples and the seed do not matter. `fraction`
    is the expected share in [0, 1]; a larger fraction's split contains a smaller one's.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
