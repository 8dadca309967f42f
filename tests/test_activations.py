"""The functions that a CPU computes in basic arithmetic, against the exact ones in double precision."""

import math

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import erf, expit

from mlx_cm import backend

X = np.linspace(-30, 30, 60_001).astype(np.float32)
WIDE = X.astype(np.float64)
PHI = (1 + erf(WIDE / math.sqrt(2))) / 2


def gated(steepness: float) -> tuple[np.ndarray, np.ndarray]:
    s = expit(steepness * WIDE)
    return WIDE * s, s + steepness * WIDE * s * (1 - s)


EXACT = {  # function => (value, derivative)
    "silu": gated(1),
    "quick_gelu": gated(1.702),
    "gelu": (WIDE * PHI, PHI + WIDE * np.exp(-WIDE * WIDE / 2) / math.sqrt(2 * math.pi)),
}


@pytest.mark.parametrize("name", EXACT)
def test_value_and_derivative(name):
    function, x = getattr(backend, name), mx.array(X)
    value, derivative = EXACT[name]
    np.testing.assert_allclose(np.array(function(x)), value, rtol=4e-7, atol=1e-6)
    np.testing.assert_allclose(np.array(mx.grad(lambda x: function(x).sum())(x)), derivative, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_rounded_once(name, dtype):
    x = mx.array(X).astype(dtype)
    function = getattr(backend, name)
    assert function(x).dtype == dtype
    assert mx.array_equal(function(x), function(x.astype(mx.float32)).astype(dtype))


@pytest.mark.parametrize("name", EXACT)
def test_far_out(name):
    largest = float(np.finfo(np.float32).max)
    x = mx.array([-1e30, -1e4, -89.0, 0.0, 89.0, 1e4, largest])
    y = np.array(getattr(backend, name)(x))
    assert np.isfinite(y).all()
    assert (np.abs(y[:4]) < 1e-5).all()
    np.testing.assert_array_equal(y[4:], np.array(x)[4:])


def test_attention_does_not_overflow_and_agrees_with_mlx():
    q, k, v = (mx.random.normal((2, 3, n, 8), key=mx.random.key(n)) for n in (7, 5, 6))
    k, v = k[..., :5, :], v[..., :5, :]
    for size in (1.0, 200.0):
        ours = backend.attention(q * size, k * size, v, scale=0.3)
        theirs = mx.fast.scaled_dot_product_attention(q * size, k * size, v, scale=0.3)
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-5)
    weight = mx.random.normal(ours.shape, key=mx.random.key(1))
    exact = mx.grad(lambda q, k, v: (weight * (mx.softmax(0.3 * q @ k.swapaxes(2, 3), axis=-1) @ v)).sum(), (0, 1, 2))
    found = mx.grad(lambda q, k, v: (weight * backend.attention(q, k, v, scale=0.3)).sum(), (0, 1, 2))
    for ours, theirs in zip(found(q, k, v), exact(q, k, v), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-5, atol=1e-5)
