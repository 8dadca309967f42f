"""How far apart two sets of features are: the Fréchet distance of normal distributions that are fitted to them.

What the features are of decides what the number means; distances in different feature spaces do not compare. All of it
is float64.
"""

from dataclasses import dataclass

import numpy as np

from mlx_cm.errors import UsageError


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution."""

    mean: np.ndarray  # float64, shape (D,)
    covariance: np.ndarray  # float64, shape (D, D), symmetric

    @property
    def total_variance(self) -> float:
        """The mean square distance from the mean, which is the Fréchet distance to it."""
        return float(np.trace(self.covariance))


def gaussian_fit(features: np.ndarray) -> Gaussian:
    """The normal distribution with the mean and the unbiased covariance of some features.

    Args:
        features: (N, D), N at least 2. With few features for their dimension a distance to others comes out too great.

    Raises:
        UsageError: too few of them, another shape, or one that is not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise UsageError(f"features of shape {features.shape}", "expected (N, D) with at least two rows")
    if not np.isfinite(features).all():
        raise UsageError("features", "some are not finite")
    mean = features.mean(axis=0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the square of a distance.

    Dowson, Landau: The Fréchet Distance between Multivariate Normal Distributions, Journal of Multivariate Analysis 12,
    1982; Heusel et al., arXiv 1706.08500, equation 6. (S_a S_b)^(1/2) has the trace of (R_a S_b R_a)^(1/2), R_a the
    root of S_a, which is the sum of the singular values of R_a R_b. In this form no root is taken of what rounding has
    left of a zero.

    Raises:
        UsageError: the two have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError("features", f"of different dimensions: {len(a.mean)} and {len(b.mean)}")
    common = np.linalg.norm(_root(a.covariance) @ _root(b.covariance), "nuc")
    apart = float(np.sum((a.mean - b.mean) ** 2))
    return max(apart + a.total_variance + b.total_variance - 2 * float(common), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root of a matrix without negative eigenvalues, but for rounding."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
