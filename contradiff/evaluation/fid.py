"""The Fréchet distance of two sets of features, called FID (Heusel et al., 2017).

features (b d), batch by batch => FeatureStatistics: count, mean (d), scatter (d d), all float64
=> fid: one number
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_LEAST_RATIO = 1e-12
"""Eigenvalues of A B above this part of the largest have roots that are right to 1e-10 of it."""


@dataclass(frozen=True)
class FeatureSource:
    """The images in words, and what computed the features. An FID means nothing without it.

    `fingerprint` is the sha256 of the extractor's weights.
    """

    images: str
    resizer: str
    extractor: str
    fingerprint: str


class FeatureStatistics:
    """Count, mean and covariance of features, summed batch by batch in float64.

    It keeps the mean and the scatter matrix Σ (x - mean)(x - mean)ᵀ (Chan et al., 1983). Memory
    does not grow with the number of images, and a mean far from zero costs no digits.

        statistics = FeatureStatistics(2048, source=source)
        for features in batches:
            statistics.update(features)
    """

    def __init__(self, num_features: int, *, source: FeatureSource) -> None:
        self.source = source
        self.num_features = num_features
        self.num_samples = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance of the features so far."""
        assert self.num_samples > 1, "one sample has no covariance"
        return self.scatter / (self.num_samples - 1)

    def update(self, features: Float[Tensor, "batch features"]) -> None:
        """Add a batch, which may be empty; its own sums are formed on its device.

        Raises:
            ValueError: the features are not finite.
        """
        assert features.shape[1] == self.num_features, "features of another dimension"
        if not bool(features.isfinite().all()):
            raise ValueError(f"the features of {self.source.images} hold NaN or infinities")
        if len(features) == 0:
            return
        batch = features.detach().double()
        mean = batch.mean(0)
        centred = batch - mean
        self._add(len(batch), mean.cpu(), (centred.T @ centred).cpu())

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the features of `other`, as if `update` had seen them."""
        assert other.source == self.source, "statistics of other features"
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


def fid(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The Fréchet distance of two sets of features, each seen as a Gaussian; symmetric.

    Few samples make it too large, so compare distances between equal counts only.

    Raises:
        ValueError: different extractors or resizers computed the features, or a set is too small
            (`check_count`).
    """
    for name in ("extractor", "resizer", "fingerprint"):
        one, other = getattr(a.source, name), getattr(b.source, name)
        if one != other:
            raise ValueError(
                f"no FID between features of different kinds: {a.source.images} has {name} {one}, "
                f"{b.source.images} has {other}"
            )
    for statistics in (a, b):
        check_count(
            statistics.num_samples,
            num_features=statistics.num_features,
            images=statistics.source.images,
        )
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def check_count(num_samples: int, *, num_features: int, images: str) -> None:
    """Refuse sets that are so small that their covariance is singular.

    Raises:
        ValueError: there are fewer samples than the features have dimensions.
    """
    if num_samples < num_features:
        raise ValueError(
            f"no FID of {num_samples} samples ({images}) with {num_features} feature dimensions: "
            "it needs at least as many samples as dimensions (set generate.num_samples for "
            "generated images; data.num_val, data.num_train or reference.split for the reference)"
        )


def frechet_distance(
    mean_a: Float64[Tensor, " d"],
    covariance_a: Float64[Tensor, "d d"],
    mean_b: Float64[Tensor, " d"],
    covariance_b: Float64[Tensor, "d d"],
) -> float:
    """|m_a - m_b|² + tr(A + B - 2 (A B)^½), the squared 2-Wasserstein distance of two Gaussians.

    With A = L Lᵀ (Cholesky), A B has the eigenvalues of Lᵀ B L, which is symmetric. This takes a
    tenth of the time of `scipy.linalg.sqrtm`. But a rounding error of 1e-16 in an eigenvalue is
    1e-8 in its root. Where eigenvalues are that small, or A is singular, the roots are the singular
    values of Fᵀ G, with A = F Fᵀ and B = G Gᵀ by their eigenvectors. The distance is never below 0.
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
    """The trace of (A B)^½, or None where rounding would show in it."""
    lower, failed = torch.linalg.cholesky_ex(a)
    if int(failed):
        return None
    squared = torch.linalg.eigvalsh(lower.T @ b @ lower)
    if bool(squared.min() <= _LEAST_RATIO * squared.max()):
        return None
    return squared.sqrt().sum()


def _factor(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d rank"]:
    """V Λ^½ without the eigenvalues that only rounding keeps from zero: their roots add up."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.max()
    kept = eigenvalues > rounding.clamp(min=0)
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()
