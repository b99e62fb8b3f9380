"""The Fréchet distance of 2048 dimensions beside pytorch-fid's and torch-fidelity's."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench._turns import Row, Work, compare
from contradiff.evaluation.fid import frechet_distance

TOLERANCE = 1e-6


def rows(_folder: Path, *, rounds: int, dimension: int = 2048) -> Iterator[Row]:
    """Yield the rows. A peer takes up to 20 s, so there is no round to warm up."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    first, second = draw(dimension)
    arrays = [tensor.numpy() for tensor in (*first, *second)]
    dicts = [{"mu": arrays[i], "sigma": arrays[i + 1]} for i in (0, 2)]
    ours = partial(frechet_distance, *first, *second)
    peers: dict[str, tuple[float, Work]] = {
        "pytorch-fid": (9.0, partial(calculate_frechet_distance, *arrays)),
        "torch-fidelity": (
            3.0,
            lambda: fid_statistics_to_metric(*dicts, verbose=False).popitem()[1],
        ),
    }
    for name, (goal, theirs) in peers.items():
        yield compare(
            f"Fréchet distance, {dimension} dimensions",
            name,
            (ours, theirs),
            rounds=rounds,
            goal=goal,
            error=lambda theirs=theirs: abs(float(theirs()) / ours() - 1),
            tolerance=TOLERANCE,
            note="equal: the distance",
            warm_up=False,
        )


def draw(dimension: int) -> list[tuple[Tensor, Tensor]]:
    """Draw the means and covariances of two Gaussians."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, dimension, generator=generator, dtype=torch.float64) / 10
    mixing = torch.randn(2, dimension, 2 * dimension, generator=generator, dtype=torch.float64)
    return list(zip(means, mixing @ mixing.mT / (2 * dimension), strict=True))
