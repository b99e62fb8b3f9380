"""The Fréchet distance of two sets of features, called FID (Heusel et al., 2017).

features (b d) => FeatureStatistics, which batches add up to => fid: one number
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class FeatureSource:
    """The images in words, and what computed the features; `fingerprint` is the weights' sha256."""

    images: str
    resizer: str
    extractor: str
    fingerprint: str


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter matrix Σ (x - mean)(x - mean)ᵀ of features, in float64.

    Those of batches add up (Chan et al., 1983), and a mean far from zero costs no digits.
    """

    source: FeatureSource
    num_samples: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]

    @classmethod
    def of(
        cls, features: Float[Tensor, "batch d"], *, source: FeatureSource
    ) -> "FeatureStatistics":
        """Compute them on the features' device; a ValueError if features are not finite."""
        if not bool(features.isfinite().all()):
            raise ValueError(f"the features of {source.images} hold NaN or infinities")
        batch = features.detach().double()
        mean = batch.mean(0)
        centred = batch - mean
        return cls(source, len(batch), mean.cpu(), (centred.T @ centred).cpu())

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        assert other.source == self.source, "statistics of other features"
        total = self.num_samples + other.num_samples
        delta = other.mean - self.mean
        weight = self.num_samples * other.num_samples / total
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * weight
        mean = self.mean + delta * (other.num_samples / total)
        return FeatureStatistics(self.source, total, mean, scatter)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance."""
        assert self.num_samples > 1, "one sample has no covariance"
        return self.scatter / (self.num_samples - 1)


def fid(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The Fréchet distance of two sets of features, each seen as a Gaussian; symmetric.

    Few samples make it too large, so compare distances between equal counts only. With fewer
    samples than dimensions a covariance is singular: the rules and the stage reference refuse it.
    """
    assert replace(a.source, images="") == replace(b.source, images=""), "see read_reference"
    assert min(a.num_samples, b.num_samples) >= len(a.mean), "too few samples"
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


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
    trace_of_root = None
    lower, failed = torch.linalg.cholesky_ex(covariance_a)
    if not int(failed):
        squared = torch.linalg.eigvalsh(lower.T @ covariance_b @ lower)
        # Eigenvalues above this part of the largest have roots that are right to 1e-10 of it.
        if bool(squared.min() > 1e-12 * squared.max()):
            trace_of_root = squared.sqrt().sum()
    if trace_of_root is None:
        product = _factor(covariance_a).T @ _factor(covariance_b)
        trace_of_root = torch.linalg.svdvals(product).sum()
    difference = mean_a - mean_b
    traces = covariance_a.trace() + covariance_b.trace()
    return max(0.0, float(difference @ difference + traces - 2 * trace_of_root))


def _factor(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d rank"]:
    """V Λ^½ without the eigenvalues that only rounding keeps from zero: their roots add up."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.max()
    kept = eigenvalues > rounding.clamp(min=0)
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()
