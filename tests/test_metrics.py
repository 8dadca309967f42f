"""Distances between pictures against their formulas in torch, values and gradients."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import channels_last, relative_error

from mlx_cm.errors import UsageError
from mlx_cm.metrics import METRICS, l1, l2, lpips_distance, mean_pseudo_huber, pseudo_huber

SHAPES = [(3, 3, 7, 5), (2, 1, 33, 47), (1, 4, 16, 16)]  # as torch has them


def pictures(shape: tuple[int, ...], spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    a = torch.rand(shape, generator=generator) * 2 - 1
    b = a + spread * torch.randn(shape, generator=generator)
    return a.requires_grad_(True), b.requires_grad_(True)


def whole_picture(c: float):
    return lambda a, b: ((a - b).pow(2).sum(dim=(1, 2, 3)) + c**2).sqrt() - c


def default_c(shape: tuple[int, ...]) -> float:
    return 0.00054 * float(np.prod(shape[1:])) ** 0.5


CASES = {
    "l1": (l1, lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))),
    "l2": (l2, lambda a, b: F.mse_loss(a, b, reduction="none").mean(dim=(1, 2, 3))),
    "pseudo_huber": (pseudo_huber(), lambda a, b: whole_picture(default_c(a.shape))(a, b)),
    "pseudo_huber of c": (pseudo_huber(0.7), whole_picture(0.7)),
    "pseudo_huber of 0": (pseudo_huber(0), lambda a, b: (a - b).flatten(1).norm(dim=1)),
    "mean_pseudo_huber": (
        mean_pseudo_huber(),
        lambda a, b: (torch.sqrt((a - b) ** 2 + 0.001**2) - 0.001).mean(dim=(1, 2, 3)),
    ),
    "mean_pseudo_huber of c": (
        mean_pseudo_huber(0.25),
        lambda a, b: (torch.sqrt((a - b) ** 2 + 0.25**2) - 0.25).mean(dim=(1, 2, 3)),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_torch(name, shape):
    ours, theirs = CASES[name]
    a, b = pictures(shape)
    weights = torch.arange(1.0, shape[0] + 1)  # a weight per picture, so that rows cannot be exchanged
    value = theirs(a, b)
    (value * weights).sum().backward()

    def weighted(x, y):
        return (ours(x, y) * mx.array(weights.numpy())).sum()

    one, other = channels_last(a), channels_last(b)
    result = ours(one, other)
    assert (result.shape, result.dtype) == ((shape[0],), mx.float32)
    assert relative_error(result, value) < 1e-6
    for gradient, reference in zip(mx.grad(weighted, (0, 1))(one, other), (a.grad, b.grad), strict=True):
        assert relative_error(gradient, reference) < 1e-5


def test_the_papers_c_for_cifar():
    """[iCT] table 1: c = 0.00054 sqrt(d), which is 0.03 for pictures of 32 x 32 x 3."""
    assert default_c((1, 3, 32, 32)) == pytest.approx(0.03, abs=1e-4)
    a, b = mx.zeros((1, 32, 32, 3)), mx.zeros((1, 32, 32, 3))
    b[0, 3, 4, 1] = 1.0
    assert pseudo_huber()(a, b).item() == pytest.approx((1 + 0.02993**2) ** 0.5 - 0.02993, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_equal_pictures_have_distance_and_gradient_zero(name):
    ours, _ = CASES[name]
    a = mx.random.normal((2, 5, 4, 3), key=mx.random.key(0))
    value, gradient = mx.value_and_grad(lambda x: ours(x, a).sum())(a)
    assert value.item() == 0
    assert mx.array_equal(gradient, mx.zeros_like(a))


def test_one_equal_pair_leaves_the_others_their_gradient():
    a = mx.random.normal((2, 5, 4, 3), key=mx.random.key(1))
    b = mx.concatenate([a[:1], a[1:] + 0.5])
    gradient = mx.grad(lambda x: pseudo_huber(0)(x, b).sum())(a)
    assert mx.array_equal(gradient[0], mx.zeros_like(a[0]))
    assert mx.allclose(gradient[1], mx.full(a[1].shape, -(60**-0.5)), rtol=1e-5)


@pytest.mark.parametrize("make", [pseudo_huber, mean_pseudo_huber])
def test_small_differences_keep_their_digits(make):
    """Below c the distance is half the squares over c: 5e-10 of c here, which sqrt(. + c^2) - c rounds away."""
    c, step = 0.03, 2.0**-20
    a = mx.zeros((1, 1, 1, 1))
    assert make(c)(a, a + step).item() == pytest.approx(step**2 / (2 * c), rel=1e-4)


@pytest.mark.parametrize("name", ["l1", "l2", "pseudo_huber", "mean_pseudo_huber"])
def test_large_pictures_are_summed_exactly_enough(name):
    ours, theirs = CASES[name]
    a, b = pictures((1, 3, 300, 500), spread=1.0)
    with torch.no_grad():
        expected = theirs(a.double(), b.double()).item()
    assert ours(channels_last(a), channels_last(b)).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_pictures_are_measured_in_float32(name, dtype):
    """Squares of a whole picture are beyond float16's 65504."""
    ours, _ = CASES[name]
    a, b = (200 * mx.random.normal((2, 9, 9, 3), key=mx.random.key(seed)).astype(dtype) for seed in (0, 1))
    result = ours(a, b)
    assert result.dtype == mx.float32
    assert mx.array_equal(result, ours(a.astype(mx.float32), b.astype(mx.float32)))


def test_lpips_distance_hands_float32_pictures_to_the_network():
    seen = []

    def network(a, b):
        seen.append((a.dtype, b.dtype))
        return (a - 2 * b).sum(axis=(1, 2, 3))

    a, b = mx.ones((2, 3, 3, 3), dtype=mx.float16), mx.ones((2, 3, 3, 3), dtype=mx.bfloat16)
    assert lpips_distance(network)(a, b).tolist() == [-27.0, -27.0]
    assert seen == [(mx.float32, mx.float32)]


def test_a_config_names_them():
    a, b = (mx.random.normal((2, 4, 4, 3), key=mx.random.key(seed)) for seed in (0, 1))
    settings = {"pseudo_huber": {"c": 0.03}, "mean_pseudo_huber": {"c": 0.01}, "lpips": {"network": l1}}
    expected = {
        "l1": l1,
        "l2": l2,
        "pseudo_huber": pseudo_huber(0.03),
        "mean_pseudo_huber": mean_pseudo_huber(0.01),
        "lpips": l1,
    }
    assert set(METRICS) == set(expected)
    for name, make in METRICS.items():
        assert mx.array_equal(make(**settings.get(name, {}))(a, b), expected[name](a, b)), name


@pytest.mark.parametrize("distance", [l1, l2, pseudo_huber(), mean_pseudo_huber(), lpips_distance(l1)])
def test_pictures_of_two_shapes_are_refused(distance):
    """Broadcasting would compare every picture of one with the only one of the other."""
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4, 4, 3\) and \(1, 4, 4, 3\)"):
        distance(mx.zeros((2, 4, 4, 3)), mx.zeros((1, 4, 4, 3)))


@pytest.mark.parametrize(
    ("make", "c"), [(pseudo_huber, -0.1), (pseudo_huber, float("nan")), (mean_pseudo_huber, 0), (mean_pseudo_huber, -1)]
)
def test_impossible_settings_are_refused(make, c):
    with pytest.raises(UsageError, match=str(c)):
        make(c)
