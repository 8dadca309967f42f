"""The Fréchet distance against scipy's matrix roots and closed forms."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cm.errors import UsageError
from mlx_cm.frechet import Gaussian, frechet_distance, gaussian_fit


def gaussian(seed: int, dimension: int, rank: int | None = None) -> Gaussian:
    """A random normal distribution; of a lower rank, on a random subspace."""
    random = np.random.default_rng(seed)
    factor = random.standard_normal((dimension, rank or 2 * dimension))
    return Gaussian(random.standard_normal(dimension), factor @ factor.T / dimension)


def reference(a: Gaussian, b: Gaussian) -> float:
    """The formula as it is written, by scipy's root of a general matrix."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    assert np.abs(np.imag(root)).max() < 1e-6
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * np.real(root)))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 24))
def test_it_is_the_formula(seed_a, seed_b, dimension):
    a, b = gaussian(seed_a, dimension), gaussian(seed_b, dimension)
    expected = reference(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_diagonal_covariances_have_a_closed_form():
    random = np.random.default_rng(0)
    means, variances = random.standard_normal((2, 7)), random.uniform(0, 3, (2, 7))
    a, b = (Gaussian(mean, np.diag(variance)) for mean, variance in zip(means, variances, strict=True))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_a_common_rotation_and_shift_change_nothing_and_a_scale_its_square():
    a, b = gaussian(1, 9), gaussian(2, 9)
    random = np.random.default_rng(3)
    rotation, shift = np.linalg.qr(random.standard_normal((9, 9)))[0], random.standard_normal(9)

    def moved(one: Gaussian) -> Gaussian:
        return Gaussian(3 * rotation @ one.mean + shift, 9 * rotation @ one.covariance @ rotation.T)

    assert frechet_distance(moved(a), moved(b)) == pytest.approx(9 * frechet_distance(a, b), rel=1e-10)


def test_a_set_has_no_distance_to_itself_even_where_it_fills_a_subspace_only():
    for rank in (None, 3):
        flat = gaussian(4, 40, rank)
        assert 0 <= frechet_distance(flat, flat) < 1e-12 * flat.total_variance


def test_subspaces_of_low_rank_are_compared_as_exactly():
    """scipy's root of a singular product keeps half the digits: the singular values of the factors are the oracle."""
    random = np.random.default_rng(5)
    factors = random.standard_normal((2, 30, 4))
    a, b = (Gaussian(np.zeros(30), factor @ factor.T) for factor in factors)
    common = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    expected = a.total_variance + b.total_variance - 2 * common
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_the_distance_to_the_mean_is_the_total_variance():
    a = gaussian(6, 5)
    assert frechet_distance(a, Gaussian(a.mean, np.zeros((5, 5)))) == pytest.approx(a.total_variance, rel=1e-12)


def test_a_fit_is_the_mean_and_numpys_covariance():
    features = np.random.default_rng(7).standard_normal((50, 6)).astype(np.float32)
    fit = gaussian_fit(features)
    assert (fit.mean.dtype, fit.covariance.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(fit.mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fit.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10)


def test_draws_of_one_distribution_come_near_each_other_with_their_number():
    random, factor = np.random.default_rng(8), gaussian(9, 4).covariance
    distances = [
        frechet_distance(*(gaussian_fit(random.standard_normal((count, 4)) @ factor) for _ in range(2)))
        for count in (50, 5000)
    ]
    assert distances[1] < distances[0] / 10


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((1, 3)), "at least two rows"),
        (np.zeros(3), "expected \\(N, D\\)"),
        (np.zeros((2, 2, 2)), "expected \\(N, D\\)"),
        (np.zeros((3, 0)), "expected \\(N, D\\)"),
        (np.full((3, 2), np.nan), "not finite"),
        (np.full((3, 2), np.inf), "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(features, message):
    with pytest.raises(UsageError, match=message):
        gaussian_fit(features)


def test_features_of_different_spaces_are_refused():
    with pytest.raises(UsageError, match="different dimensions: 3 and 4"):
        frechet_distance(gaussian(1, 3), gaussian(1, 4))
