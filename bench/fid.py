"""Our scores beside pytorch-fid, clean-fid and torch-fidelity: the same images, weights, one run.

    OMP_NUM_THREADS=1 python -m bench fid         8 images a set: minutes on one core
    OMP_NUM_THREADS=1 python -m bench fid 24

Weights are random (no network); the networks, resizers and formulas are those of real scores.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import peers
from contradiff.data.transforms import decode
from contradiff.evaluation.extractors import ExtractorCard, InceptionExtractor
from contradiff.evaluation.fid import gaussian_frechet_distance
from contradiff.evaluation.inception import load_inception
from contradiff.evaluation.kid import kernel_distance
from contradiff.evaluation.measuring import FeatureSet, measure
from contradiff.evaluation.prdc import manifold_scores
from contradiff.evaluation.resizers import Resizer

DIMENSION = 2048
SIDE = 64
SEED = 0
SPLITS = 2
RESIZERS: tuple[Resizer, ...] = ("clean", "legacy_tensorflow", "legacy_pytorch")


def main(arguments: Sequence[str]) -> None:
    """Print the three tables."""
    num_images = int(arguments[0]) if arguments else 8
    frechet_table()
    with tempfile.TemporaryDirectory() as folder:
        feature_tables(Path(folder), num_images)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and its CPU seconds, which other processes disturb less than the clock's."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


def compared(peer: Callable[[], Any], ours: Callable[[], Any]) -> tuple[Any, float]:
    """A peer's result, and its time over ours: the least of three rounds each, in turns."""
    rounds = [(timed(peer), timed(ours)) for _ in range(3)]
    times = [min(seconds for _, seconds in column) for column in zip(*rounds, strict=True)]
    return rounds[0][0][0], times[0] / times[1]


def row(name: str, *cells: str) -> None:
    """Print a line of a table."""
    print(f"{name:44}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def frechet_table() -> None:
    """The distance alone, of 2048-dimensional statistics of full rank."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    generator = torch.Generator().manual_seed(SEED)
    mean = torch.randn(2, DIMENSION, generator=generator, dtype=torch.float64) / 10
    mixing = torch.randn(2, DIMENSION, 2 * DIMENSION, generator=generator, dtype=torch.float64)
    covariance = mixing @ mixing.mT / (2 * DIMENSION)
    arrays = mean[0].numpy(), covariance[0].numpy(), mean[1].numpy(), covariance[1].numpy()
    stats = [{"mu": arrays[i], "sigma": arrays[i + 1]} for i in (0, 2)]
    ways: dict[str, Callable[[], float]] = {
        "contradiff": lambda: gaussian_frechet_distance(
            mean[0], covariance[0], mean[1], covariance[1]
        ),
        "torch-fidelity": lambda: fid_statistics_to_metric(*stats, verbose=False)[
            "frechet_inception_distance"
        ],
        "pytorch-fid": lambda: float(calculate_frechet_distance(*arrays)),
    }
    found = {name: timed(way) for name, way in ways.items()}
    ours, seconds = found["contradiff"]
    row(f"Fréchet distance, {DIMENSION} dimensions", "CPU time", "rel. difference")
    for name, (value, taken) in found.items():
        row(f"  {name}", f"{taken / seconds:.2f}x", f"{abs(value / ours - 1):.1e}")
    print()


def read_batches(folder: Path, size: int = 8) -> Iterator[torch.Tensor]:
    """PNG files as the stage `score` reads them."""
    files = sorted(folder.glob("*.png"))
    for start in range(0, len(files), size):
        chosen = files[start : start + size]
        yield torch.stack([decode(file.read_bytes(), name=file.name) for file in chosen])


def our_extractor(script: Path, resizers: Sequence[Resizer]) -> InceptionExtractor:
    """Ours, of the TorchScript file that clean-fid reads."""
    network = load_inception(script, device=torch.device("cpu"))
    card = ExtractorCard(
        kind="inception",
        name="random",
        resizers=list(resizers),
        num_features=network.num_features,
        num_classes=network.num_classes,
        image_size=None,
        width=None,
        val_accuracy=None,
        val_count=None,
        weights_sha256="0" * 64,
    )
    return InceptionExtractor(network, card, device=torch.device("cpu"))


def measured(folder: Path, extractor: InceptionExtractor, num_images: int) -> dict[str, FeatureSet]:
    """Our features of a folder, all kept."""
    return measure(
        read_batches(folder),
        extractor,
        reference=folder.name,
        start=0,
        num_images=num_images,
        kept=torch.arange(num_images),
        splits=SPLITS,
    )


def distance(a: FeatureSet, b: FeatureSet) -> float:
    """The Fréchet distance, of fewer images than dimensions too: here formulas are compared."""
    x, y = a.statistics, b.statistics
    return gaussian_frechet_distance(x.mean, x.covariance, y.mean, y.covariance)


def of_arrays(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Arguments of torch-fidelity's formula, which bears singular covariances."""
    stats = [{"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)} for x in (a, b)]
    return {"stat_1": stats[0], "stat_2": stats[1]}


def feature_tables(folder: Path, num_images: int) -> None:
    """Features and scores of ours against theirs, with times."""
    from cleanfid.fid import kernel_distance as clean_kid
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    state = peers.random_inception(SEED)
    torch.save(state, weights := folder / "inception.pth")
    script = peers.write_script(folder, state)
    sets = {
        name: peers.write_pngs(
            folder / name,
            peers.pictures(num_images, side=SIDE, seed=number, contrast=contrast),
        )
        for number, (name, contrast) in enumerate({"samples": 60.0, "reference": 35.0}.items())
    }
    samples, reference = sets.values()
    # once for all resizers, for the scores; then alone, for the time
    whole = our_extractor(script, RESIZERS)
    ours = {name: measured(path, whole, num_images) for name, path in sets.items()}

    def features_alone() -> list[torch.Tensor]:
        return [whole(images, resizer="clean")[0] for images in read_batches(samples)]

    theirs = {
        "pytorch-fid": ("legacy_pytorch", peers.pytorch_fid_features(state)),
        "clean-fid": ("clean", peers.clean_fid_features(script, mode="clean")),
        "clean-fid, legacy_tensorflow": (
            "legacy_tensorflow",
            peers.clean_fid_features(script, mode="legacy_tensorflow"),
        ),
    }
    scores: list[tuple[str, float, float]] = []
    row(f"2048 features of {num_images} images", "CPU time", "rel. difference")
    for name, (resizer, way) in theirs.items():
        first, ratio = compared(lambda way=way: way(samples), features_alone)
        second = way(reference)
        kept = ours["samples"][resizer].kept.numpy()
        error = float(np.abs(first - kept).max() / np.abs(kept).max())
        row(f"  {name}", f"{ratio:.2f}x", f"{error:.1e}")
        ours_fid = distance(ours["samples"][resizer], ours["reference"][resizer])
        found = fid_statistics_to_metric(**of_arrays(first, second), verbose=False)
        scores.append((f"FID, {name}", ours_fid, found["frechet_inception_distance"]))
        if resizer == "clean":
            # its subsets are whole sets here, since they are as large: no chance is left
            x, y = (ours[key]["clean"].kept for key in sets)
            value, _ = kernel_distance(x, y, num_subsets=1, subset_size=num_images, seed=SEED)
            scores.append((f"KID, {name}", value, clean_kid(second, first, num_subsets=1)))
    torch_fidelity = peers.torch_fidelity_features(weights)
    first, ratio = compared(lambda: torch_fidelity(samples), features_alone)
    second = torch_fidelity(reference)
    x, y = (ours[key]["legacy_tensorflow"] for key in sets)
    error = float((first["2048"] - x.kept).abs().max() / x.kept.abs().max())
    row("  torch-fidelity", f"{ratio:.2f}x", f"{error:.1e}")
    subsets = {"num_subsets": 100, "subset_size": num_images // 2, "seed": SEED}
    found = peers.torch_fidelity_scores(first["2048"], second["2048"], **subsets)
    found |= isc_features_to_metric(first["logits_unbiased"], splits=SPLITS, shuffle=False)
    kid, kid_std = kernel_distance(x.kept, y.kept, **subsets)
    manifold = manifold_scores(x.kept, y.kept)
    assert x.sums is not None, "measured with splits"
    mean, std = x.sums.score()
    pairs = {
        "frechet_inception_distance": ("FID", distance(x, y)),
        "kernel_inception_distance_mean": ("KID", kid),
        "kernel_inception_distance_std": ("KID's deviation", kid_std),
        "inception_score_mean": ("inception score", mean),
        "inception_score_std": ("inception score's deviation", std),
        "precision": ("precision", manifold.precision),
        "recall": ("recall", manifold.recall),
    }
    scores += [(f"{name}, torch-fidelity", v, found[key]) for key, (name, v) in pairs.items()]
    print()
    row("score, peer", "contradiff", "peer", "rel. difference")
    for name, mine, peer in scores:
        relative = abs(mine - peer) / max(abs(peer), 1e-12)
        row(f"  {name}", f"{mine:.6g}", f"{peer:.6g}", f"{relative:.1e}")
