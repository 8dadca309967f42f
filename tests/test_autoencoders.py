"""The autoencoders against diffusers, every parameter random; their configs as published."""

import dataclasses
import math

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map
from parity import TOLERANCE, channels_last, copy_weights, parameter_count, randomise, relative_error

from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.errors import ModelError
from mlx_cm.models.autoencoder_kl import SD_VAE, SDXL_VAE, AutoencoderKL, AutoencoderKLConfig, sample_posterior
from mlx_cm.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig

PUBLISHED_SD = {  # vae/config.json of Stable Diffusion 1.5
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PUBLISHED = {
    "SD 1.5": (PUBLISHED_SD, SD_VAE),
    "SD 2.1": (PUBLISHED_SD | {"sample_size": 768}, dataclasses.replace(SD_VAE, sample_size=768)),
    "SDXL": (PUBLISHED_SD | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, SDXL_VAE),
}
PUBLISHED_TINY = {  # madebyollin/taesd and taesdxl
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.30.0",
    "act_fn": "relu",
    "block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}

SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 24, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
KL_CONFIGS = {
    "usual": SMALL,
    "wide latents, no 1x1 convolutions": SMALL
    | {"latent_channels": 7, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159},
    "no attention, other colours": SMALL | {"mid_block_add_attention": False, "in_channels": 1, "out_channels": 5},
    "one level": {"block_out_channels": (16,), "norm_num_groups": 8, "layers_per_block": 1},
}
TINY_CONFIGS = {
    "usual": {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (24,) * 4},
    "three levels, other blocks": {
        "encoder_block_out_channels": (8,) * 3,
        "decoder_block_out_channels": (16,) * 3,
        "num_encoder_blocks": (2, 0, 1),
        "num_decoder_blocks": (1, 2, 3),
        "latent_channels": 5,
        "in_channels": 1,
        "out_channels": 2,
    },
}


def pair(kind: str, values: dict):
    """(ours, diffusers') with the same random weights."""
    ours, config, theirs = {
        "kl": (AutoencoderKL, AutoencoderKLConfig, diffusers.AutoencoderKL),
        "tiny": (AutoencoderTiny, AutoencoderTinyConfig, diffusers.AutoencoderTiny),
    }[kind]
    torch.manual_seed(0)
    reference = randomise(theirs(**values))
    return copy_weights(ours(config(**values)), reference), reference


def images(seed: int, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.rand((batch, channels, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(seed: int, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn((batch, channels, height, width), generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(("height", "width"), [(20, 28), (23, 17)])
@pytest.mark.parametrize("name", KL_CONFIGS)
def test_kl_encodes_as_diffusers(name, height, width):
    model, reference = pair("kl", KL_CONFIGS[name])
    x = images(1, 2, model.config.in_channels, height, width)
    posterior = reference.encode(x).latent_dist
    mean, logvar = model.encode(channels_last(x))
    assert relative_error(mean, posterior.mean) < TOLERANCE
    assert relative_error(logvar, posterior.logvar) < TOLERANCE
    noise = latents(2, *posterior.mean.shape)
    drawn = sample_posterior(mean, logvar, channels_last(noise))
    assert relative_error(drawn, posterior.mean + posterior.std * noise) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(5, 7), (18, 16)])  # the second takes the CPU's form for large maps
@pytest.mark.parametrize("name", KL_CONFIGS)
def test_kl_decodes_as_diffusers(name, height, width):
    model, reference = pair("kl", KL_CONFIGS[name])
    z = latents(3, 2, model.config.latent_channels, height, width)
    assert relative_error(model.decode(channels_last(z)), reference.decode(z).sample) < TOLERANCE


def test_log_variance_is_clipped():
    model, reference = pair("kl", KL_CONFIGS["one level"])
    with torch.no_grad():
        reference.quant_conv.weight.mul_(1000)
    copy_weights(model, reference)
    x = images(1, 1, 3, 12, 12)
    posterior = reference.encode(x).latent_dist
    _, logvar = model.encode(channels_last(x))
    assert logvar.min().item() == -30 and logvar.max().item() == 20
    assert relative_error(logvar, posterior.logvar) < TOLERANCE


LATENT_STATISTICS = {
    "factor": ({}, lambda raw: raw * 0.18215),
    "XL": ({"scaling_factor": 0.13025}, lambda raw: raw * 0.13025),
    "shift": ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, lambda raw: (raw - 0.1159) * 0.3611),
    "per channel": (
        {"scaling_factor": 0.5, "latents_mean": (-1.6, 1.1, 1.3, -6.2), "latents_std": (8.4, 5.9, 5.2, 6.7)},
        lambda raw: (raw - mx.array([-1.6, 1.1, 1.3, -6.2])) * 0.5 / mx.array([8.4, 5.9, 5.2, 6.7]),
    ),
}


@pytest.mark.parametrize("name", LATENT_STATISTICS)
def test_scaled_latents(name):
    values, expected = LATENT_STATISTICS[name]
    model = AutoencoderKL(AutoencoderKLConfig(**KL_CONFIGS["one level"], **values))
    raw = mx.random.normal((2, 4, 5, 4))
    scaled = model.to_scaled(raw)
    assert mx.allclose(scaled, expected(raw), atol=1e-6)
    assert mx.allclose(model.to_raw(scaled), raw, atol=1e-5)
    assert mx.allclose(model.decode_scaled(scaled), model.decode(raw), atol=1e-4)
    x = mx.random.uniform(-1, 1, (2, 8, 8, 3))
    mean, logvar = model.encode(x)
    noise = mx.random.normal(mean.shape)
    assert mx.allclose(model.encode_scaled(x), expected(mean), atol=1e-6)
    assert mx.allclose(model.encode_scaled(x, noise), expected(sample_posterior(mean, logvar, noise)), atol=1e-6)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_tiny_as_diffusers(name):
    model, reference = pair("tiny", TINY_CONFIGS[name])
    for height, width in [(24, 40), (23, 17)]:
        x = images(1, 2, model.config.in_channels, height, width)
        assert relative_error(model.encode(channels_last(x)), reference.encode(x).latents) < TOLERANCE
    for height, width in [(3, 5), (18, 16)]:
        z = latents(2, 2, model.config.latent_channels, height, width)  # reaches into the smooth limit
        assert relative_error(model.decode(channels_last(z)), reference.decode(z).sample) < TOLERANCE
    scaled = model.scale_latents(channels_last(z))
    assert relative_error(scaled, reference.scale_latents(z)) < TOLERANCE
    assert (
        relative_error(model.unscale_latents(scaled), reference.unscale_latents(reference.scale_latents(z))) < TOLERANCE
    )


def test_tiny_scaled_latents():
    config = AutoencoderTinyConfig(**TINY_CONFIGS["usual"], scaling_factor=0.5, shift_factor=0.25)
    model = AutoencoderTiny(config)
    x, z = mx.random.uniform(-1, 1, (1, 16, 16, 3)), mx.random.normal((1, 2, 2, 4))
    assert mx.allclose(model.encode_scaled(x), (model.encode(x) - 0.25) * 0.5, atol=1e-6)
    assert mx.allclose(model.decode_scaled(z), model.decode(z / 0.5 + 0.25), atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    values, expected = PUBLISHED[name]
    config = config_from_dict(AutoencoderKLConfig, values, name)
    assert config == expected
    assert config_from_dict(AutoencoderKLConfig, config_to_dict(config), name) == config
    assert config.pixels_per_latent == 8
    assert parameter_count(AutoencoderKL(config)) == (83_653_863, 248)


def test_published_tiny_config():
    config = config_from_dict(AutoencoderTinyConfig, PUBLISHED_TINY, "taesd")
    assert dataclasses.replace(config, block_out_channels=None) == AutoencoderTinyConfig()
    assert config.pixels_per_latent == 8
    model, reference = AutoencoderTiny(config), diffusers.AutoencoderTiny()
    state = reference.state_dict()
    assert parameter_count(model) == (sum(value.numel() for value in state.values()), len(state)) == (2_445_063, 134)
    copy_weights(model, reference)


REFUSED = [
    (AutoencoderKLConfig, {"act_fn": "gelu"}, "act_fn: 'gelu'"),
    (
        AutoencoderKLConfig,
        {"down_block_types": ["AttnDownEncoderBlock2D"]},
        "down_block_types: 'AttnDownEncoderBlock2D'",
    ),
    (AutoencoderKLConfig, {"up_block_types": ["AttnUpDecoderBlock2D"]}, "up_block_types: 'AttnUpDecoderBlock2D'"),
    (AutoencoderKLConfig, {"block_out_channels": [64, 64]}, r"as many block_out_channels \(2\)"),
    (AutoencoderKLConfig, {"block_out_channels": []}, "as many block_out_channels"),
    (AutoencoderKLConfig, {"block_out_channels": [48]}, "norm_num_groups 32 does not divide the block width 48"),
    (AutoencoderKLConfig, {"latent_channels": 0}, "latent_channels: expected at least 1, got 0"),
    (AutoencoderKLConfig, {"scaling_factor": 0.0}, "scaling_factor"),
    (AutoencoderKLConfig, {"latents_mean": [1.0] * 4}, "expected both or neither"),
    (AutoencoderKLConfig, {"latents_mean": [1.0] * 3, "latents_std": [1.0] * 4}, "expected 4 values"),
    (AutoencoderKLConfig, {"latents_mean": [1.0] * 4, "latents_std": [0.0] * 4}, "latents_std: 0"),
    (AutoencoderKLConfig, {"latents_mean": [1.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "one of the two"),
    (AutoencoderKLConfig, {"layers_per_bloc": 2}, "does not know layers_per_bloc"),
    (AutoencoderTinyConfig, {"act_fn": "gelu"}, "act_fn: 'gelu'"),
    (AutoencoderTinyConfig, {"upsample_fn": "bilinear"}, "upsample_fn: 'bilinear'"),
    (AutoencoderTinyConfig, {"upsampling_scaling_factor": 4}, "upsampling_scaling_factor: 4"),
    (AutoencoderTinyConfig, {"num_encoder_blocks": [1, 3, 3]}, r"as many encoder_block_out_channels \(4\)"),
    (AutoencoderTinyConfig, {"decoder_block_out_channels": [64, 64, 32, 64]}, "expected one width"),
    (
        AutoencoderTinyConfig,
        {"num_encoder_blocks": [1, 3, 3], "encoder_block_out_channels": [64] * 3},
        r"as many num_encoder_blocks \(3\)",
    ),
    (AutoencoderTinyConfig, {"num_decoder_blocks": [3, 3, 3, -1]}, "num_decoder_blocks: expected at least 0"),
    (AutoencoderTinyConfig, {"block_out_channels": [32] * 4}, "block_out_channels: expected"),
    (AutoencoderTinyConfig, {"in_channels": 0}, "in_channels: expected at least 1"),
    (AutoencoderTinyConfig, {"latent_magnitude": 0}, "latent_magnitude: 0"),
]


@pytest.mark.parametrize(("config", "values", "message"), REFUSED)
def test_refused_config(config, values, message):
    with pytest.raises(ModelError, match=message):
        config_from_dict(config, values, "config.json")


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_half_precision_weights_give_float32_results(kind):
    model, _ = pair(kind, {"kl": KL_CONFIGS["one level"], "tiny": TINY_CONFIGS["usual"]}[kind])
    x, z = mx.random.uniform(-1, 1, (1, 16, 16, 3)), mx.random.normal((1, 4, 4, 4))
    full = model.encode_scaled(x), model.decode_scaled(z)
    model.update(tree_map(lambda leaf: leaf.astype(mx.float16), model.parameters()))
    for half, expected in zip((model.encode_scaled(x), model.decode_scaled(z)), full, strict=True):
        assert half.dtype == mx.float32
        assert np.linalg.norm(half - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_every_parameter_has_a_gradient(kind):
    """Training an encoder and decoder end to end reaches every tensor."""
    model, _ = pair(kind, {"kl": SMALL, "tiny": TINY_CONFIGS["usual"]}[kind])
    x = mx.random.uniform(-1, 1, (1, 16, 16, 3))

    def loss(parameters):
        model.update(parameters)
        return mx.square(model.decode_scaled(model.encode_scaled(x, noise=mx.ones((1, 1, 1, 4)))) - x).mean()

    for name, gradient in tree_flatten(mx.grad(loss)(model.parameters())):
        assert mx.isfinite(gradient).all(), name
        # A key bias moves all of a query's scores alike.
        assert name.endswith("to_k.bias") or mx.abs(gradient).max().item() > 0, name


def test_moments_of_scaled_latents():
    """A draw from them is the scaled draw, and a small deviation keeps its digits."""
    config = AutoencoderKLConfig(
        block_out_channels=(8,), norm_num_groups=4, latents_mean=(3.0, -2.0, 0.5, 0.1), latents_std=(0.5, 2.0, 1.0, 4.0)
    )
    model = AutoencoderKL(config)
    mean, noise = (mx.random.normal((2, 3, 5, 4), key=mx.random.key(seed)) for seed in range(2))
    logvar = mx.full(mean.shape, -20.0)
    scaled_mean, scaled_std = model.scaled_moments((mean, logvar))
    assert mx.allclose(scaled_mean + scaled_std * noise, model.scaled((mean, logvar), noise), atol=1e-6)
    expected = math.exp(-10) * config.scaling_factor / np.array(config.latents_std)
    np.testing.assert_allclose(np.array(scaled_std)[0, 0, 0], expected, rtol=1e-6)
