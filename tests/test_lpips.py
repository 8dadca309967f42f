"""LPIPS against torch: values, gradients, resizing, and where the published code has no gradient."""

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lpips_reference import VGG16, WIDTHS, LPIPSReference, openai_lpips, piq_lpips
from parity import TOLERANCE, channels_last, parameter_count, relative_error

from mlx_cm.metrics import METRICS
from mlx_cm.models.lpips import LPIPS, SHIFT, LPIPSConfig, downsample_max, normalise, resize_bilinear

SIZES = [(33, 47), (16, 16), (40, 31)]


def model_of(reference: LPIPSReference, **config) -> LPIPS:
    """The same weights here."""
    widths = tuple(head.shape[1] for head in reference.heads)
    model = LPIPS(LPIPSConfig(block_out_channels=widths, **config))
    model.load_weights(list(reference.native_weights().items()), strict=True)
    return model


@pytest.fixture(scope="module")
def reference() -> LPIPSReference:
    return LPIPSReference()


def pictures(batch: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth pictures with some noise, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn((2 * batch, 3, 4, 5), generator=generator)
    smooth = F.interpolate(small, size=(height, width), mode="bicubic")
    noisy = (smooth + 0.3 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)
    a, b = noisy.split(batch)
    return a.requires_grad_(True), b.requires_grad_(True)


def assert_same(ours, theirs, a: torch.Tensor, b: torch.Tensor) -> None:
    """Values and both gradients, each picture with a weight of its own.

    A rounding can decide which of two nearly equal features is the larger, or whether one passes a ReLU, and moves
    that picture's gradient by up to some percent; so most pictures have to agree, and the others roughly.
    """
    weights = torch.arange(1.0, len(a) + 1)
    value = theirs(a, b)
    (value * weights).sum().backward()
    result = ours(channels_last(a), channels_last(b))
    assert (result.shape, result.dtype) == ((len(a),), mx.float32)
    assert relative_error(result, value) < TOLERANCE

    def weighted(x, y):
        return (ours(x, y) * mx.array(weights.numpy())).sum()

    gradients = mx.grad(weighted, (0, 1))(channels_last(a), channels_last(b))
    for gradient, expected in zip(gradients, (a.grad, b.grad), strict=True):
        errors = [relative_error(gradient[i : i + 1], expected[i : i + 1]) for i in range(len(a))]
        assert np.median(errors) < TOLERANCE
        assert max(errors) < 0.1


# --- parity


@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradients_are_those_of_the_lpips_package(reference, size):
    assert_same(model_of(reference), reference, *pictures(3, *size))


@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradients_with_means_are_those_of_piq(reference, size):
    """Its pictures are in [0, 1], normalised by ImageNet's colours."""
    model = model_of(reference, pooling="avg")

    def theirs(a, b):
        return piq_lpips(reference.features, reference.heads, (a + 1) / 2, (b + 1) / 2)

    assert_same(model, theirs, *pictures(3, *size))


RESIZED = [(19, 33, 64), (33, 24, 64), (40, 24, 40), (8, 17, 256), (33, 33, 64)]  # side, to, below


@pytest.mark.parametrize(("side", "size", "below"), RESIZED)
def test_small_pictures_are_resized_as_openai_does(reference, side, size, below):
    """Enlarged, reduced, left alone from the limit on, and too small for the network without."""
    model = model_of(reference, pooling="avg", resize=size, resize_below=below)
    assert_same(
        model,
        lambda a, b: openai_lpips(reference.features, reference.heads, a, b, size, below),
        *pictures(3, side, side),
    )


def test_the_settings_of_openai(reference):
    model = model_of(reference, pooling="avg", resize=224)
    a, b = pictures(1, 32, 32)
    expected = openai_lpips(reference.features, reference.heads, a, b)
    assert relative_error(model(channels_last(a), channels_last(b)), expected) < TOLERANCE


def test_the_shorter_side_decides_about_resizing(reference):
    model, plain = model_of(reference, resize=20, resize_below=32), model_of(reference)
    wide, large = ((mx.random.uniform(-1, 1, (1, h, w, 3)), mx.zeros((1, h, w, 3))) for h, w in ((24, 48), (32, 48)))
    resized = [resize_bilinear(x, 20, 20) for x in wide]
    assert mx.array_equal(model(*wide), plain(*resized))
    assert mx.array_equal(model(*large), plain(*large))


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_the_published_width(pooling):
    """VGG16 as it is; maps large enough for the back end's other convolution."""
    reference = LPIPSReference(VGG16, seed=3)
    model = model_of(reference, pooling=pooling)
    theirs = {
        "max": reference,
        "avg": lambda a, b: piq_lpips(reference.features, reference.heads, (a + 1) / 2, (b + 1) / 2),
    }
    assert parameter_count(model) == (14_714_688 + 1472, 26 + 5)
    assert_same(model, theirs[pooling], *pictures(3, 65, 47))


def test_stages_are_those_of_the_network(reference):
    a, _ = pictures(2, 37, 50)
    with torch.no_grad():
        expected = reference.net(reference.scaling_layer(a))
    stages = list(model_of(reference).stages(channels_last(a)))
    assert [stage.shape[1:] for stage in stages] == [
        (37, 50, WIDTHS[0]), (18, 25, WIDTHS[1]), (9, 12, WIDTHS[2]), (4, 6, WIDTHS[3]), (2, 3, WIDTHS[4])
    ]  # fmt: skip
    for ours, theirs in zip(stages, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((7, 9), (16, 21)),
        ((16, 21), (7, 9)),
        ((5, 6), (5, 6)),
        ((1, 3), (4, 2)),
        ((64, 64), (224, 224)),
        ((9, 4), (1, 1)),
    ],
)
def test_resizing_is_torchs(source, target):
    x = torch.randn((2, 3, *source), generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    pull = torch.randn((2, 3, *target), generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(x, size=target, mode="bilinear", align_corners=False)
    expected.backward(pull)
    result, gradients = mx.vjp(lambda y: resize_bilinear(y, *target), [channels_last(x)], [channels_last(pull)])
    assert relative_error(result[0], expected) < 2e-6
    assert relative_error(gradients[0], x.grad) < 2e-6


# --- what a distance has to hold


def test_it_is_a_distance(reference):
    model = model_of(reference)
    a, b = (channels_last(x) for x in pictures(4, 20, 23))
    forth, back = model(a, b), model(b, a)
    assert mx.array_equal(forth, back)
    assert (forth > 0).all()
    assert mx.array_equal(model(a, a), mx.zeros(4))
    alone = mx.concatenate([model(a[i : i + 1], b[i : i + 1]) for i in range(4)])
    assert mx.allclose(forth, alone, rtol=1e-5)


def test_equal_pictures_have_gradient_zero(reference):
    a, _ = pictures(2, 20, 23)
    a = channels_last(a)
    gradient = mx.grad(lambda x: model_of(reference)(x, a).sum())(a)
    assert mx.array_equal(gradient, mx.zeros_like(a))


def test_the_gradient_is_finite_where_features_are_zero():
    """PyTorch's ReLU drops the NaN that the root of zero sends back; a product with the ReLU's mask keeps it."""
    reference = LPIPSReference(seed=5)
    with torch.no_grad():
        for layer in reference.features:
            if isinstance(layer, torch.nn.Conv2d):
                layer.bias.fill_(-0.2)  # nothing passes of even parts
    a, b = pictures(3, 64, 64)
    with torch.no_grad():
        a[..., :40] = b[..., 24:] = torch.tensor(SHIFT).view(3, 1, 1)
        stages = reference.net(reference.scaling_layer(a))
    assert all((stage == 0).all(dim=1).any() and (stage > 0).any() for stage in stages)
    assert_same(model_of(reference), reference, a, b)


def test_normalised_features_have_length_one_or_none():
    features = mx.array([[[[3.0, 4.0], [0.0, 0.0], [1e-8, 0.0], [3e4, 4e4]]]])
    expected = [[0.6, 0.8], [0.0, 0.0], [1e-8 / (1e-8 + 1e-10), 0.0], [0.6, 0.8]]
    np.testing.assert_allclose(np.array(normalise(features))[0, 0], expected, rtol=1e-6)


def test_equal_maxima_share_the_gradient():
    x = mx.array([[1.0, 1.0, 0.0], [0.0, 1.0, 5.0], [9.0, 9.0, 9.0]]).reshape(1, 3, 3, 1)
    assert downsample_max(x).tolist() == [[[[1.0]]]]
    gradient = mx.grad(lambda y: downsample_max(y).sum())(x)[0, :, :, 0]
    expected = mx.array([[1 / 3, 1 / 3, 0], [0, 1 / 3, 0], [0, 0, 0]])
    assert mx.allclose(gradient, expected)


def test_grey_pictures_are_pictures_of_three_equal_channels(reference):
    for model in (model_of(reference), model_of(reference, resize=32)):
        a, b = (x.mean(dim=1, keepdim=True) for x in pictures(2, 24, 31))
        grey = model(channels_last(a), channels_last(b))
        colour = model(channels_last(a.repeat(1, 3, 1, 1)), channels_last(b.repeat(1, 3, 1, 1)))
        assert mx.allclose(grey, colour, rtol=1e-5)


def test_half_precision_pictures_are_compared_in_float32(reference):
    model = model_of(reference)
    a, b = (channels_last(x).astype(mx.float16) for x in pictures(2, 24, 31))
    result = model(a, b)
    assert result.dtype == mx.float32
    assert mx.array_equal(result, model(a.astype(mx.float32), b.astype(mx.float32)))


def test_it_is_a_metric_of_training(reference):
    model = model_of(reference)
    a, b = (channels_last(x) for x in pictures(2, 24, 31))
    assert mx.array_equal(METRICS["lpips"](network=model)(a, b), model(a, b))


# --- refusals


def test_pictures_that_the_network_cannot_see_are_refused(reference):
    model = model_of(reference)
    with pytest.raises(ValueError, match="at least 16 pixels a side, got 15x40"):
        model(mx.zeros((1, 15, 40, 3)), mx.zeros((1, 15, 40, 3)))
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        model(mx.zeros((1, 32, 32, 4)), mx.zeros((1, 32, 32, 4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_out_channels": (64, 128)}, "block_out_channels: expected 5 values, one per stage, got 2"),
        ({"block_out_channels": (64, 128, 256, 0, 512)}, "block_out_channels: expected at least 1, got 0"),
        ({"pooling": "median"}, "pooling: 'median' is not supported, expected one of"),
        ({"resize": 15}, "resize: expected at least 16 pixels, got 15"),
    ],
)
def test_impossible_configs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LPIPSConfig(**settings)
