"""Convolutions: every form the back end has, against torch and against MLX's own."""

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from parity import TOLERANCE, channels_last, relative_error

from mlx_cm import backend
from mlx_cm.models.layers import Conv2d, Upsample2D, upsample_nearest


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(batch: int, height: int, width: int, channels: int, out: int, kernel: int, bias: bool):
    """x, weight and bias (or None) for torch."""
    return (
        drawn(0, batch, channels, height, width),
        drawn(1, out, channels, kernel, kernel),
        drawn(2, out) if bias else None,
    )


def ours(*arrays: torch.Tensor | None) -> list[mx.array | None]:
    return [None if array is None else channels_last(array) for array in arrays]


SHAPES = {  # batch, height, width, channels, out
    "large": (1, 64, 66, 16, 8),
    "large in a batch": (3, 43, 37, 20, 5),
    "flat": (2, 16, 129, 17, 3),
    "small": (2, 9, 7, 5, 6),
    "few channels": (1, 70, 64, 3, 4),
    "the kernel's own size": (1, 3, 3, 32, 2),
}
KERNELS = {
    "3x3": (3, 1, 1),
    "3x3 halving": (3, 2, 1),
    "3x3 halving unpadded": (3, 2, 0),
    "1x1": (1, 1, 0),
    "5x5": (5, 1, 2),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_as_torch(shape, kernel, bias):
    size, stride, padding = KERNELS[kernel]
    x, weight, start = arguments(*SHAPES[shape], size, bias)
    y = backend.conv2d(*ours(x, weight, start), stride=stride, padding=padding)
    assert relative_error(y, F.conv2d(x, weight, start, stride=stride, padding=padding)) < TOLERANCE


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_of_a_doubled_map_as_torch(shape, bias):
    x, weight, start = arguments(*SHAPES[shape], 3, bias)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), weight, start, padding=1)
    assert relative_error(backend.upsample_conv2d(*ours(x, weight, start)), expected) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_forms_agree_in_value_and_gradient(shape):
    """Shifted products against MLX's convolution, whatever form the shape would get; and the form of a halving one."""
    given = list(ours(*arguments(*SHAPES[shape], 3, False))[:2])

    def kernel(x, weight):
        return mx.conv2d(x, weight, padding=1)

    def doubled(x, weight):
        return kernel(upsample_nearest(x), weight)

    def halving(padding):
        return lambda x, weight: backend._conv3x3_halving(x, weight, padding)

    def strided(padding):
        return lambda x, weight: mx.conv2d(x, weight, stride=2, padding=padding)

    for form, reference in (
        (backend._conv3x3_shifted, kernel),
        (backend._upsample_conv3x3_phases, doubled),
        *((halving(padding), strided(padding)) for padding in (0, 1) if min(given[0].shape[1:3]) + 2 * padding >= 3),
    ):
        y, expected = form(*given), reference(*given)
        assert mx.linalg.norm((y - expected).flatten()) < 1e-5 * mx.linalg.norm(expected.flatten())
        cotangent = mx.random.normal(y.shape, key=mx.random.key(3))
        gradients = (mx.vjp(function, given, [cotangent])[1] for function in (form, reference))
        for a, b in zip(*gradients, strict=True):
            assert mx.linalg.norm((a - b).flatten()) < 1e-5 * mx.linalg.norm(b.flatten())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", ["large", "small"])
def test_half_precision_stays_half(shape, dtype):
    half = [array.astype(dtype) for array in ours(*arguments(*SHAPES[shape], 3, True))]
    for function in (lambda *given: backend.conv2d(*given, padding=1), backend.upsample_conv2d):
        y, exact = function(*half), function(*[array.astype(mx.float32) for array in half])
        assert y.dtype == dtype
        assert mx.linalg.norm((y - exact).flatten()) < 0.02 * mx.linalg.norm(exact.flatten())


def test_layer_keeps_the_names_of_a_convolution():
    layer = Conv2d(5, 7, 3, stride=2, padding=1)
    assert {name: value.shape for name, value in layer.parameters().items()} == {"weight": (7, 3, 3, 5), "bias": (7,)}
    assert layer(mx.zeros((1, 8, 8, 5))).shape == (1, 4, 4, 7)
    assert list(Conv2d(5, 7, 1, bias=False).parameters()) == ["weight"]


@pytest.mark.parametrize("size", [None, (66, 64), (65, 64), (66, 63)])
def test_doubling_to_an_odd_size(size):
    """Of a size that was odd before it was halved the last row or column is not repeated, and zeros follow it."""
    layer = Upsample2D(16)
    x = drawn(0, 1, 16, 33, 32)
    expected = F.interpolate(x, scale_factor=2) if size is None else F.interpolate(x, size=size)
    weight = torch.tensor(layer.conv.weight.tolist()).permute(0, 3, 1, 2)
    assert relative_error(layer(channels_last(x), size=size), F.conv2d(expected, weight, padding=1)) < TOLERANCE
