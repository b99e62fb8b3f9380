"""The Fréchet distance of two sets of features, called FID (Heusel et al., 2017).

features (b d) => FeatureStatistics of each batch => their sum => fid, one number
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from contradiff.imports import slow_import


@dataclass(frozen=True)
class FeatureSource:
    """Where features come from: images (in words), resizer, network, sha256 of its weights."""

    images: str
    resizer: str
    extractor: str
    fingerprint: str


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter matrix Σ (x - mean)(x - mean)ᵀ of features, in float64.

    The sum `a + b` has the statistics of both batches together (Chan et al., 1983).
    """

    source: FeatureSource
    num_samples: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]

    @classmethod
    def of(
        cls, features: Float[Tensor, "batch d"], *, source: FeatureSource
    ) -> "FeatureStatistics":
        """Compute the statistics of a batch; raise ValueError if a feature is not finite."""
        if not bool(features.isfinite().all()):
            raise ValueError(f"the features of {source.images} contain NaN or infinities")
        batch = features.detach().double()
        mean = batch.mean(0)
        centred = batch - mean
        return cls(source, len(batch), mean.cpu(), (centred.T @ centred).cpu())

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        assert other.source == self.source, "the statistics are of different features"
        total = self.num_samples + other.num_samples
        delta = other.mean - self.mean
        weight = self.num_samples * other.num_samples / total
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * weight
        mean = self.mean + delta * (other.num_samples / total)
        return FeatureStatistics(self.source, total, mean, scatter)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance of the features."""
        assert self.num_samples > 1, "one sample has no covariance"
        return self.scatter / (self.num_samples - 1)


def fid(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the Fréchet distance of two sets of features, each seen as a Gaussian.

    Fewer samples give a larger distance, so compare distances only for equal numbers of samples.
    `contradiff.rules` and the stage `reference` refuse fewer samples than dimensions.
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
    """Return |m_a - m_b|² + tr(A + B - 2 (A B)^½), the squared 2-Wasserstein distance of Gaussians.

    The trace of (A B)^½ is the sum of the roots of the eigenvalues of A B, which LAPACK computes
    much faster than a root of A B. Roots of tiny eigenvalues are inaccurate. For tiny eigenvalues
    or a singular A, the roots are therefore computed as the singular values of Fᵀ G, where
    A = F Fᵀ and B = G Gᵀ. Negative distances (rounding errors) become 0. Raises ValueError for
    covariances that are not finite.
    """
    with slow_import():
        from scipy.linalg import LinAlgError, eigh

    a, b = covariance_a.cpu().numpy(), covariance_b.cpu().numpy()
    try:
        squared = torch.from_numpy(eigh(b, a, type=2, eigvals_only=True, driver="gv"))
    except LinAlgError:  # A is singular, as far as float64 can tell
        squared = torch.zeros(1)
    # In this case, each root has an error below 1e-10 of the largest root.
    if bool(squared.min() > 1e-12 * squared.max()):
        trace_of_root = squared.sqrt().sum()
    else:
        product = _factor(covariance_a).T @ _factor(covariance_b)
        trace_of_root = torch.linalg.svdvals(product).sum()
    difference = mean_a - mean_b
    traces = covariance_a.trace() + covariance_b.trace()
    return max(0.0, float(difference @ difference + traces - 2 * trace_of_root))


def _factor(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d rank"]:
    """Return F, where F Fᵀ is the covariance without the eigenvalues that are rounding errors."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.max()
    kept = eigenvalues > rounding.clamp(min=0)
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()
