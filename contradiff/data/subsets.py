"""Subsets of samples: few-shot training sets and a development split."""

import hashlib
from collections.abc import Sequence

import numpy as np


def k_shot_split(labels: Sequence[int], *, shots: int, seed: int) -> list[int]:
    """Draw the same number of samples from every class that occurs.

    The draw of a class depends only on the seed and on that class. The 25-shot set of a seed
    contains its 5-shot set, and so on.

    Args:
        labels: Class of each sample, in [0, classes).
        shots: Samples a class.
        seed: Seed of the draw, not negative.

    Returns:
        Indices into `labels`, ascending.

    Raises:
        ValueError: a class has fewer samples than `shots`.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, indices in members.items():
        if len(indices) < shots:
            raise ValueError(
                f"transfer.shots: {shots}, but class {label} has only {len(indices)} images: "
                "lower it"
            )
        order = np.random.default_rng([seed, label]).permutation(len(indices))
        chosen += [indices[position] for position in order[:shots].tolist()]
    return sorted(chosen)


def is_dev(key: str, *, fraction: float = 0.1) -> bool:
    """Whether a training sample belongs to the held-out development split.

    The hash of the key decides, so that other samples, their order and the seed do not matter.
    The split of a larger fraction contains the split of a smaller one.

    Args:
        key: The sample's key in its shard.
        fraction: Expected share of the samples, in [0, 1].
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
