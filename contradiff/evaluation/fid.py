"""The Fréchet distance of two sets of features (Heusel et al., 2017).

features (b d), batch by batch -> FeatureStatistics: count, mean (d), scatter (d d), all float64
-> frechet_distance: one number
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_LEAST_RATIO = 1e-12
"""Of eigenvalues of A B: above it their roots are right to 1e-10 of the largest."""


@dataclass(frozen=True)
class FeatureSource:
    """What features were computed from and with. A Fréchet distance is meaningless without it.

    Attributes:
        reference: the images in words, such as "val" or "samples of build/samples".
        resizer: how they were brought to the extractor's size.
        extractor: the extractor's name.
        fingerprint: sha256 of the extractor's weights.
    """

    reference: str
    resizer: str
    extractor: str
    fingerprint: str


class FeatureStatistics:
    """Count, mean and covariance of features that stream by, in float64.

    Keeps the mean and the scatter matrix about it (Chan et al., 1983), so memory does not grow with
    the number of samples, and a mean far from zero costs no digits.

    Attributes:
        source: what the features were computed from and with.
        num_features: their dimension d.
        num_samples: how many there were so far.
        mean: (d) float64 on the CPU; zero when there are none.
        scatter: (d, d) sum of the outer products of the features less their mean.
    """

    def __init__(self, num_features: int, *, source: FeatureSource) -> None:
        self.source = source
        self.num_features = num_features
        self.num_samples = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Unbiased covariance of the features so far.

        Raises:
            ValueError: there are fewer than two samples.
        """
        if self.num_samples < 2:
            raise ValueError(
                f"covariance needs two samples, {self.source.reference} has {self.num_samples}"
            )
        return self.scatter / (self.num_samples - 1)

    def update(self, features: Float[Tensor, "batch features"]) -> None:
        """Take in a batch; an empty one changes nothing.

        The sums are formed on the features' device and added on the CPU.

        Raises:
            ValueError: the features have another dimension, or are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            shape = tuple(features.shape)
            raise ValueError(
                f"expected features of shape (batch, {self.num_features}), got {shape}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"features of {self.source.reference} hold NaN or infinities")
        if len(features) == 0:
            return
        batch = features.detach().double()
        mean = batch.mean(0)
        centred = batch - mean
        self._add(len(batch), mean.cpu(), (centred.T @ centred).cpu())

    def merge(self, other: "FeatureStatistics") -> None:
        """Take in the samples of `other`, as if they had been streamed through `update`.

        Raises:
            ValueError: `other` has another dimension or another source.
        """
        if (other.num_features, other.source) != (self.num_features, self.source):
            raise ValueError(
                f"cannot merge statistics of different features: {self.num_features} of "
                f"{self.source} and {other.num_features} of {other.source}"
            )
        if other.num_samples:
            self._add(other.num_samples, other.mean, other.scatter)

    def _add(
        self, count: int, mean: Float64[Tensor, " d"], scatter: Float64[Tensor, "d d"]
    ) -> None:
        total = self.num_samples + count
        delta = mean - self.mean
        self.scatter = (
            self.scatter + scatter + torch.outer(delta, delta) * (self.num_samples * count / total)
        )
        self.mean = self.mean + delta * (count / total)
        self.num_samples = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Fréchet distance of two sets of features, each taken for a Gaussian; symmetric.

    It is biased upwards when samples are few, the more the higher the features' dimension: compare
    distances of equal counts only.

    Raises:
        ValueError: the features were made by different extractors or resizers, or a set has fewer
            samples than its features have dimensions, so that its covariance must be singular.
    """
    for name in ("extractor", "resizer", "fingerprint"):
        of_a, of_b = getattr(a.source, name), getattr(b.source, name)
        if of_a != of_b:
            raise ValueError(
                f"no Fréchet distance between features of different kinds: {a.source.reference} "
                f"has {name} {of_a}, {b.source.reference} has {of_b}"
            )
    assert a.num_features == b.num_features, "one extractor, two dimensions"
    for statistics in (a, b):
        check_count(
            statistics.num_samples,
            num_features=statistics.num_features,
            reference=statistics.source.reference,
        )
    return gaussian_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def check_count(num_samples: int, *, num_features: int, reference: str) -> None:
    """Refuse sets whose covariance must be singular; stages ask before they compute features.

    Raises:
        ValueError: there are fewer samples than features have dimensions.
    """
    if num_samples < num_features:
        raise ValueError(
            f"no Fréchet distance from {num_samples} samples ({reference}) of {num_features} "
            "feature dimensions: there must be at least as many samples as dimensions "
            "(generate.num_samples for generated images; data.num_val, data.num_train or "
            "reference.split for the reference)"
        )


def gaussian_frechet_distance(
    mean_a: Float64[Tensor, " d"],
    covariance_a: Float64[Tensor, "d d"],
    mean_b: Float64[Tensor, " d"],
    covariance_b: Float64[Tensor, "d d"],
) -> float:
    """|m_a - m_b|² + tr(A + B - 2 (A B)^½), the squared 2-Wasserstein distance of two Gaussians.

    No square root of a matrix is formed, and no imaginary part arises. With A = L Lᵀ (Cholesky) the
    matrix A B has the eigenvalues of Lᵀ B L, which is symmetric: a small part of the time of
    `scipy.linalg.sqrtm`. Rounding of 1e-16 in an eigenvalue is 1e-8 in its root, so where some are
    that small, or A is singular, the roots are found as the singular values of Fᵀ G instead, with
    A = F Fᵀ and B = G Gᵀ by their eigenvectors. A distance below zero by rounding is zero.
    """
    trace_of_root = _well_conditioned_trace(covariance_a, covariance_b)
    if trace_of_root is None:
        product = _factor(covariance_a).T @ _factor(covariance_b)
        trace_of_root = torch.linalg.svdvals(product).sum()
    difference = mean_a - mean_b
    traces = covariance_a.trace() + covariance_b.trace()
    return max(0.0, float(difference @ difference + traces - 2 * trace_of_root))


def _well_conditioned_trace(
    a: Float64[Tensor, "d d"], b: Float64[Tensor, "d d"]
) -> Float64[Tensor, ""] | None:
    """Trace of (A B)^½, or none where rounding would tell in it."""
    lower, failed = torch.linalg.cholesky_ex(a)
    if int(failed):
        return None
    squared = torch.linalg.eigvalsh(lower.T @ b @ lower)
    if bool(squared.min() <= _LEAST_RATIO * squared.max()):
        return None
    return squared.sqrt().sum()


def _factor(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d rank"]:
    """V Λ^½, without the eigenvalues that are zero but for rounding: their roots would add up."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.max()
    kept = eigenvalues > rounding.clamp(min=0)
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()
