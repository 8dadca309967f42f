"""The pixel U-Net against diffusers' `UNet2DModel`: each layer, each block and the whole, in many small layouts."""

import dataclasses
import itertools
import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models import attention_processor, downsampling, embeddings, resnet, upsampling
from mlx.utils import tree_flatten
from parity import TOLERANCE, channels_last, copy_weights, parameter_count, randomise, relative_error
from tiny_models import CONDITIONAL, UNCONDITIONAL, make_unet, native_unet
from trajectory_reference import make_trajectory_unet, native_trajectory_unet

from mlx_cm import backend
from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.errors import ModelError
from mlx_cm.models import layers
from mlx_cm.models.layers import (
    Condition,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    SelfAttention2D,
    TimestepEmbedding,
    Upsample2D,
    dropout,
    sinusoidal_embedding,
)
from mlx_cm.models.unet2d import IMAGENET_64, LSUN_256, UNet2D, UNet2DConfig

PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
THREE = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
ODD_WIDTHS = {"block_out_channels": (15, 25), "norm_num_groups": 5, "attn_norm_num_groups": 5, "attention_head_dim": 5}

LAYOUTS = {
    "conditional": CONDITIONAL,
    "unconditional": UNCONDITIONAL,
    "three levels": CONDITIONAL | THREE,
    "three levels unconditional": UNCONDITIONAL | THREE | {"layers_per_block": 3},
    "convolutions resample": UNCONDITIONAL | PLAIN | {"downsample_type": "conv", "upsample_type": "conv"},
    "convolutions and scale_shift": CONDITIONAL | PLAIN | {"downsample_type": "conv", "upsample_type": "conv"},
    # The plain blocks resample by convolution whatever the types say.
    "plain blocks of a resnet config": CONDITIONAL | PLAIN,
    "downsample_padding 0": UNCONDITIONAL | PLAIN | {"downsample_type": "conv", "downsample_padding": 0},
    "mid attention without norm": CONDITIONAL | {"attn_norm_num_groups": None},
    "mid attention with its own groups": UNCONDITIONAL | {"attn_norm_num_groups": 2},
    "no mid attention": CONDITIONAL | {"add_attention": False},
    "one head": CONDITIONAL | {"attention_head_dim": None},
    "time_embedding_dim": UNCONDITIONAL | {"time_embedding_dim": 22},
    "time_embedding_dim and scale_shift": CONDITIONAL | {"time_embedding_dim": 22},
    "centred input": UNCONDITIONAL | {"center_input_sample": True},
    "freq_shift 1": UNCONDITIONAL | {"freq_shift": 1},
    "sines first": UNCONDITIONAL | {"flip_sin_to_cos": False},
    "grey to two channels": UNCONDITIONAL | {"in_channels": 1, "out_channels": 2},
    "five channels": CONDITIONAL | {"in_channels": 5, "out_channels": 5},
    "eps": CONDITIONAL | {"norm_eps": 1e-2},
    "odd widths": CONDITIONAL | ODD_WIDTHS,
    "one level": UNCONDITIONAL
    | {"block_out_channels": (16,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)},
    "dropout of the training": CONDITIONAL | {"dropout": 0.3},  # of which a call without a key knows nothing
}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_for(config: dict, count: int) -> list[int] | None:
    classes = config["num_class_embeds"]
    return None if classes is None else [(7 * k + 3) % classes for k in range(count)]


# --- the whole U-Net and its blocks


@pytest.mark.parametrize("name", LAYOUTS)
def test_unet_as_diffusers(name):
    config = LAYOUTS[name]
    reference = make_unet(config)
    model = native_unet(reference)
    x = drawn(1, 3, config.get("in_channels", 3), 12, 16)  # height and width differ, so that swapped axes show
    t = torch.tensor([1095.5067, -1553.65, 80.9])
    labels = labels_for(config, 3)
    ours = model(channels_last(x), mx.array(t.numpy()), *([] if labels is None else [mx.array(labels)]))
    theirs = reference(x, t, None if labels is None else torch.tensor(labels)).sample
    assert ours.dtype == mx.float32
    assert relative_error(ours, theirs) < TOLERANCE


TRAJECTORIES = {
    "conditional": CONDITIONAL,
    "unconditional": UNCONDITIONAL,
    "three levels": CONDITIONAL | THREE,
    "convolutions resample": LAYOUTS["convolutions resample"],
    "odd widths": LAYOUTS["odd widths"],
    "sines first": LAYOUTS["sines first"] | {"freq_shift": 1, "time_embedding_dim": 22},
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_second_level_as_ctm(name):
    config = TRAJECTORIES[name]
    reference = make_trajectory_unet(config, seed=2)
    model = native_trajectory_unet(reference)
    x = drawn(1, 3, 3, 12, 16)
    t, s = torch.tensor([1095.5067, 80.9, -3.0]), torch.tensor([80.9, -1553.65, -3.0])
    labels = labels_for(config, 3)
    given = {} if labels is None else {"class_labels": mx.array(labels)}
    ours = model(channels_last(x), mx.array(t.numpy()), s=mx.array(s.numpy()), **given)
    theirs = reference.forward_to(x, t, s, None if labels is None else torch.tensor(labels))
    assert relative_error(ours, theirs) < TOLERANCE
    other = model(channels_last(x), mx.array(t.numpy()), s=mx.array(t.numpy()), **given)
    assert mx.linalg.norm(other - ours) > 1e-3 * mx.linalg.norm(ours)


def test_one_level_to_jump_to_for_all_images():
    model = native_trajectory_unet(make_trajectory_unet(UNCONDITIONAL))
    x, t = channels_last(drawn(1, 2, 3, 8, 8)), mx.array([5.0, 7.0])
    assert mx.array_equal(model(x, t, s=mx.array(3.0)), model(x, t, s=mx.array([3.0, 3.0])))


@pytest.mark.parametrize(("trajectory", "s"), [(True, None), (False, 1.0)])
def test_a_second_level_where_it_belongs(trajectory, s):
    model = UNet2D(config_from_dict(UNet2DConfig, UNCONDITIONAL | {"trajectory": trajectory}, "test"))
    with pytest.raises(ValueError, match="s: "):
        model(mx.zeros((1, 8, 8, 3)), mx.array([1.0]), s=None if s is None else mx.array([s]))


@pytest.mark.parametrize("name", ["conditional", "three levels unconditional", "convolutions resample", "odd widths"])
def test_each_block_as_diffusers(name):
    """Blocks alone, at odd sizes: a mistake that a later normalisation would hide shows here."""
    config = LAYOUTS[name]
    reference = make_unet(config, seed=5)
    model = native_unet(reference)
    widths = config["block_out_channels"]
    raw = drawn(2, 2, 4 * widths[0])
    condition = Condition(mx.array(torch.nn.functional.silu(raw).numpy()))  # diffusers' blocks apply SiLU themselves

    x = drawn(3, 2, widths[0], 8, 12)
    states = [x]
    for ours, theirs in zip(model.down_blocks, reference.down_blocks, strict=True):
        y, y_states = ours(channels_last(x), condition)
        expected, expected_states = theirs(x, raw)
        assert relative_error(y, expected) < TOLERANCE
        assert len(y_states) == len(expected_states)
        for state, expected_state in zip(y_states, expected_states, strict=True):
            assert relative_error(state, expected_state) < TOLERANCE
        x, states = expected, [*states, *expected_states]

    odd = drawn(4, 2, widths[-1], 7, 5)
    assert relative_error(model.mid_block(channels_last(odd), condition), reference.mid_block(odd, raw)) < TOLERANCE

    for ours, theirs in zip(model.up_blocks, reference.up_blocks, strict=True):
        taken = states[-len(theirs.resnets) :]
        left = [channels_last(state) for state in states]
        y = ours(channels_last(x), left, condition)
        assert len(left) == len(states) - len(taken)
        x, states = theirs(x, tuple(taken), raw), states[: -len(taken)]
        assert relative_error(y, x) < TOLERANCE
    assert states == []


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(("width", "out"), [(6, 6), (6, 9)])
def test_resnet_block_as_diffusers(width, out, scale_shift, resample):
    reference = randomise(
        resnet.ResnetBlock2D(
            in_channels=width,
            out_channels=out,
            temb_channels=7,
            groups=3,
            eps=1e-5,
            time_embedding_norm="scale_shift" if scale_shift else "default",
            up=resample == "up",
            down=resample == "down",
        )
    )
    model = copy_weights(ResnetBlock2D(width, out, 7, groups=3, scale_shift=scale_shift, resample=resample), reference)
    x, raw = drawn(1, 2, width, 7, 5), drawn(2, 2, 7)
    ours = model(channels_last(x), mx.array(torch.nn.functional.silu(raw).numpy()))
    assert relative_error(ours, reference(x, raw)) < TOLERANCE


def test_resnet_block_without_embedding_as_diffusers():
    reference = randomise(resnet.ResnetBlock2D(in_channels=6, out_channels=9, temb_channels=None, groups=3, eps=1e-6))
    model = copy_weights(ResnetBlock2D(6, 9, None, groups=3, eps=1e-6), reference)
    x = drawn(1, 2, 6, 7, 5)
    assert relative_error(model(channels_last(x)), reference(x, None)) < TOLERANCE


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("head_channels", [4, 12])
def test_self_attention_as_diffusers(head_channels, groups):
    reference = randomise(
        attention_processor.Attention(
            12,
            heads=12 // head_channels,
            dim_head=head_channels,
            norm_num_groups=groups,
            eps=1e-5,
            bias=True,
            residual_connection=True,
            _from_deprecated_attn_block=True,
        ),
        scale=0.4,
    )
    model = copy_weights(SelfAttention2D(12, head_channels, groups=groups), reference)
    x = drawn(1, 2, 12, 7, 5)
    assert relative_error(model(channels_last(x)), reference(x)) < TOLERANCE


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (8, 6)])
def test_downsampling_as_diffusers(height, width, padding):
    reference = randomise(downsampling.Downsample2D(6, use_conv=True, padding=padding, name="op"))
    model = copy_weights(Downsample2D(6, padding=padding), reference)
    x = drawn(1, 2, 6, height, width)
    assert relative_error(model(channels_last(x)), reference(x)) < TOLERANCE


def test_upsampling_as_diffusers():
    reference = randomise(upsampling.Upsample2D(6, use_conv=True))
    model = copy_weights(Upsample2D(6), reference)
    x = drawn(1, 2, 6, 7, 5)
    assert relative_error(model(channels_last(x)), reference(x)) < TOLERANCE


@pytest.mark.parametrize("width", [8, 15])
@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("flip_sin_to_cos", [False, True])
def test_sinusoids_as_diffusers(flip_sin_to_cos, freq_shift, width):
    t = torch.tensor([1095.5067, 0.0, -1553.65, 0.3])
    theirs = embeddings.Timesteps(width, flip_sin_to_cos, freq_shift)(t)
    options = {"flip_sin_to_cos": flip_sin_to_cos, "freq_shift": freq_shift}
    ours = sinusoidal_embedding(mx.array(t.numpy()), width, **options)
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), atol=3e-4)  # of angles of 1500 radians
    half = sinusoidal_embedding(mx.array([1095.5], dtype=mx.float16), width, **options)
    assert half.dtype == mx.float32


def test_timestep_embedding_as_diffusers():
    reference = randomise(embeddings.TimestepEmbedding(8, 13))
    model = copy_weights(TimestepEmbedding(8, 13), reference)
    x = drawn(1, 3, 8)
    assert relative_error(model(mx.array(x.numpy())), reference(x)) < TOLERANCE


# --- dropout


class Replayed(torch.nn.Module):
    """Stands for torch's dropout, and takes the masks of another run one after the other."""

    def __init__(self, masks: list[mx.array]):
        super().__init__()
        self.masks = masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor(np.array(self.masks.pop(0)).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["conditional", "three levels", "convolutions resample", "no mid attention"])
def test_dropout_as_diffusers(name, monkeypatch):
    """Where values are dropped: our masks in the residual blocks of diffusers make the same picture."""
    reference = make_unet(LAYOUTS[name] | {"dropout": 0.2}, seed=6)
    model, masks = native_unet(reference), []

    def watched(x: mx.array, rate: float, keys: mx.array) -> mx.array:
        masks.append(dropout(mx.ones_like(x), rate, keys))
        return dropout(x, rate, keys)

    monkeypatch.setattr(layers, "dropout", watched)
    x, t, labels = drawn(1, 2, 3, 12, 16), torch.tensor([1095.5067, 80.9]), labels_for(LAYOUTS[name], 2)
    given = {} if labels is None else {"class_labels": mx.array(labels)}
    key = mx.random.key(4)
    ours = model(channels_last(x), mx.array(t.numpy()), dropout_key=key, **given)
    blocks = [block for block in reference.modules() if isinstance(block, resnet.ResnetBlock2D)]
    assert len(masks) == len(blocks)
    drawn_masks = {np.array(mask).tobytes() for mask in masks}
    drawn_masks |= {np.array(image).tobytes() for mask in masks for image in mask}
    assert len(drawn_masks) == 3 * len(blocks)  # no block, and no image, has the mask of another
    for block in blocks:
        block.dropout = Replayed(masks)
    theirs = reference(x, t, None if labels is None else torch.tensor(labels)).sample
    assert masks == []
    assert relative_error(ours, theirs) < TOLERANCE
    assert mx.linalg.norm(model(channels_last(x), mx.array(t.numpy()), **given) - ours) > 0.01 * mx.linalg.norm(ours)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean(rate, dtype):
    x = mx.full((3, 40, 50, 8), 2.0, dtype=dtype)
    dropped = dropout(x, rate, mx.random.split(mx.random.key(1), 3))
    assert dropped.dtype == dtype
    values = np.array(dropped.astype(mx.float32))
    assert set(np.unique(values)) == {0.0, float((x[0, 0, 0, 0] / (1 - rate)).astype(mx.float32))}
    count = values[0].size
    for image in values:
        assert (image == 0).mean() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / count))


def test_without_a_key_nothing_is_dropped():
    config = UNCONDITIONAL | {"dropout": 0.3}
    model, plain = native_unet(make_unet(config)), native_unet(make_unet(UNCONDITIONAL))
    x, t = channels_last(drawn(1, 2, 3, 8, 8)), mx.array([5.0, 7.0])
    assert mx.array_equal(model(x, t), plain(x, t))
    assert mx.array_equal(plain(x, t, dropout_key=mx.random.key(0)), plain(x, t))  # nor where the rate is 0
    assert not mx.allclose(model(x, t, dropout_key=mx.random.key(0)), plain(x, t))


def test_equal_keys_drop_equally():
    model = native_unet(make_unet(UNCONDITIONAL | {"dropout": 0.3}))
    x, t = channels_last(drawn(1, 2, 3, 8, 8)), mx.array([5.0, 7.0])
    first, again, other = (model(x, t, dropout_key=mx.random.key(seed)) for seed in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.allclose(first, other)


def test_a_key_per_image_makes_a_picture_whatever_its_batch():
    model = native_unet(make_unet(UNCONDITIONAL | {"dropout": 0.3}))
    x, t = channels_last(drawn(1, 4, 3, 8, 8)), mx.array([5.0, 7.0, -3.0, 800.0])
    keys = mx.random.split(mx.random.key(3), 4)
    together = model(x, t, dropout_key=keys)
    assert mx.array_equal(together, model(x, t, dropout_key=mx.random.key(3)))  # one key is split for the batch
    parts = [model(x[rows], t[rows], dropout_key=keys[rows]) for rows in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose(np.array(mx.concatenate(parts)), np.array(together), rtol=1e-4, atol=1e-5)


def test_gradients_pass_what_is_kept():
    model = native_unet(make_unet(UNCONDITIONAL | {"dropout": 0.3}))
    x, t, key = channels_last(drawn(1, 2, 3, 8, 8)), mx.array([5.0, 7.0]), mx.random.key(3)

    def loss(x: mx.array, key: mx.array) -> mx.array:
        return (model(x, t, dropout_key=key) ** 2).mean()

    direction = mx.random.normal(x.shape, key=mx.random.key(8))
    gradient = mx.grad(loss)(x, key)
    step = 1e-2
    change = (loss(x + step * direction, key) - loss(x - step * direction, key)).item() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(change, rel=2e-2)
    compiled = mx.compile(mx.grad(loss))(x, key)
    np.testing.assert_allclose(np.array(compiled), np.array(gradient), rtol=1e-3, atol=1e-6)


# --- sizes, conditions, number formats


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(IMAGENET_64, 295_899_267, 629), (LSUN_256, 526_304_771, 630)],
    ids=["ImageNet-64", "LSUN-256"],
)
def test_published_sizes(config, parameters, tensors):
    model = UNet2D(config)  # nothing is evaluated, so nothing is allocated
    assert parameter_count(model) == (parameters, tensors)
    with torch.device("meta"):
        reference = UNet2DModel(**{k: v for k, v in config_to_dict(config).items() if k != "trajectory"})
    theirs = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    ours = {
        name: (value.shape[0], value.shape[3], *value.shape[1:3]) if value.ndim == 4 else tuple(value.shape)
        for name, value in tree_flatten(model.parameters())
    }
    assert ours == theirs


def test_size_of_ctms_model():
    """Counted with sony/ctm's own code; in each of 22 attentions q, k and v are one there."""
    assert parameter_count(UNet2D(dataclasses.replace(IMAGENET_64, trajectory=True))) == (324_100_611, 617 + 4 * 22)


def test_one_time_for_all_images():
    model = native_unet(make_unet(UNCONDITIONAL))
    x = channels_last(drawn(1, 2, 3, 8, 8))
    assert mx.array_equal(model(x, mx.array([5.0])), model(x, mx.array([5.0, 5.0])))
    assert mx.array_equal(model(x, mx.array(5.0)), model(x, mx.array([5.0, 5.0])))


@pytest.mark.parametrize(("config", "labels"), [(CONDITIONAL, None), (UNCONDITIONAL, [1])])
def test_labels_where_they_belong(config, labels):
    model = native_unet(make_unet(config))
    with pytest.raises(ValueError, match="class_labels"):
        model(mx.zeros((1, 8, 8, 3)), mx.array([1.0]), None if labels is None else mx.array(labels))


def test_labels_matter():
    model = native_unet(make_unet(CONDITIONAL))
    x = mx.zeros((1, 8, 8, 3))
    assert not mx.allclose(model(x, mx.array([1.0]), mx.array([1])), model(x, mx.array([1.0]), mx.array([2])))


def test_time_matters():
    model = native_unet(make_unet(UNCONDITIONAL))
    x = mx.zeros((1, 8, 8, 3))
    assert not mx.allclose(model(x, mx.array([1.0])), model(x, mx.array([200.0])))


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 4e-3), (mx.bfloat16, 3e-2)])
@pytest.mark.parametrize("config", [CONDITIONAL, UNCONDITIONAL])
def test_half_precision(config, dtype, tolerance):
    model = native_unet(make_unet(config))
    x, t = channels_last(drawn(1, 2, 3, 16, 16)), mx.array([1095.5067, -1553.65])
    labels = labels_for(config, 2)
    arguments = [x, t] if labels is None else [x, t, mx.array(labels)]
    full = model(*arguments)
    kept = model.float32_parts
    model.load_weights(
        [
            (name, value if name.startswith(kept) else value.astype(dtype))
            for name, value in tree_flatten(model.parameters())
        ]
    )
    half = model(*arguments)
    assert half.dtype == mx.float32
    error = mx.linalg.norm(half - full) / mx.linalg.norm(full)
    assert 1e-6 < error < tolerance  # not zero: half precision was used


def test_what_openais_half_precision_leaves_alone_stays_float32():
    """Of `UNetModel`, `convert_to_fp16` casts the blocks; what is outside them it does not touch."""
    model = UNet2D(config_from_dict(UNet2DConfig, CONDITIONAL | {"trajectory": True}, "test"))
    outside = {name for name in model if isinstance(model[name], nn.Module)} - {"mid_block", "conv_in"}
    assert set(UNet2D.float32_parts) == outside


# --- refused configs

CONFIG_FAULTS = [
    ({"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}, "CrossAttnDownBlock2D"),
    ({"up_block_types": ("UpBlock2D",)}, "as many block_out_channels"),
    ({"block_out_channels": ()}, "as many block_out_channels"),
    ({"block_out_channels": (16, 16, 24)}, "as many block_out_channels"),
    ({"downsample_type": "pool"}, "downsample_type"),
    ({"upsample_type": "bilinear"}, "upsample_type"),
    ({"downsample_padding": 2}, "downsample_padding"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    ({"mid_block_type": None}, "mid_block_type"),
    ({"act_fn": "gelu"}, "act_fn"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor"),
    ({"layers_per_block": 0}, "layers_per_block"),
    ({"in_channels": 0}, "in_channels"),
    ({"out_channels": -1}, "out_channels"),
    ({"norm_num_groups": 5}, "norm_num_groups 5 does not divide"),
    ({"norm_num_groups": 0}, "norm_num_groups"),
    ({"attention_head_dim": 7}, "attention_head_dim 7 does not divide"),
    ({"attention_head_dim": 0}, "attention_head_dim"),
    ({"attn_norm_num_groups": 5}, "attn_norm_num_groups 5 does not divide"),
    ({"attn_norm_num_groups": 0}, "attn_norm_num_groups"),
    ({"sample_size": 15}, "sample_size 15 cannot be halved"),
    ({"sample_size": 0}, "sample_size"),
    ({"sample_size": [16, 16]}, "sample_size"),
    ({"sample_size": None}, "sample_size"),
    ({"sample_size": "16"}, "sample_size"),
    ({"sample_size": True}, "sample_size"),
    ({"block_out_channels": 16}, "block_out_channels"),
    ({"block_out_channels": (16, "24")}, "block_out_channels"),
    ({"block_out_channels": (16, -24)}, "block"),
    ({"block_out_channels": (0, 24)}, "block"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"dropout": float("nan")}, "dropout"),
    ({"norm_eps": "small"}, "norm_eps"),
    ({"norm_eps": -1.0}, "norm_eps"),
    ({"norm_eps": float("nan")}, "norm_eps"),
    ({"num_class_embeds": 0}, "num_class_embeds"),
    ({"time_embedding_dim": 0}, "time_embedding_dim"),
    ({"time_embedding_dim": -4}, "time_embedding_dim"),
    ({"freq_shift": 8}, "freq_shift"),
    ({"trajectory": 1}, "trajectory"),
    ({"cross_attention_dim": 768}, "cross_attention_dim"),
    ({"add_attention": 1}, "add_attention"),
]


@pytest.mark.parametrize(("change", "says"), CONFIG_FAULTS, ids=[str(change) for change, _ in CONFIG_FAULTS])
def test_config_refused(change, says):
    with pytest.raises(ModelError, match=says) as caught:
        config_from_dict(UNet2DConfig, CONDITIONAL | change, "unet/config.json")
    assert caught.value.what == "unet/config.json"


@pytest.mark.parametrize("name", LAYOUTS)
def test_config_survives_json(name):
    built = config_from_dict(UNet2DConfig, LAYOUTS[name], "test")
    written = json.loads(json.dumps(config_to_dict(built)))
    assert config_from_dict(UNet2DConfig, {"_class_name": "UNet2D", **written}, "test") == built


# --- group norm


def group_norm_float64(x: np.ndarray, groups: int, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    rows = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = rows - rows.mean(axis=(1, 3), keepdims=True)
    return (centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + eps)).reshape(x.shape)


FORMS = {"kernel": backend._group_norm_kernel, "sums": backend._group_norm_sums}
MAPS = {
    "small": ((2, 7, 5, 12), 3),
    "one group": ((2, 7, 5, 12), 1),
    "a group per channel": ((2, 7, 5, 12), 12),
    "one position": ((3, 1, 1, 8), 2),
    "tokens": ((2, 31, 12), 4),
    "vector": ((2, 12), 4),
    "wide": ((1, 32, 32, 64), 8),
}


def map_of(name: str, mean: float, spread: float) -> tuple[np.ndarray, int]:
    shape, groups = MAPS[name]
    values = np.random.default_rng(0).standard_normal(shape)
    per_channel = 1 + np.arange(shape[-1]) / shape[-1]
    return (mean + spread * values * per_channel).astype(np.float32), groups


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (300.0, 1.0), (-300.0, 5.0), (0.0, 1e-3), (0.1, 1e4)])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_group_norm_as_float64(form, name, mean, spread):
    x, groups = map_of(name, mean, spread)
    expected = group_norm_float64(x, groups, 1e-5)
    ours = np.array(FORMS[form](mx.array(x), groups, 1e-5))
    # float32 knows the mean of numbers near 300 to 1e-5 or so, which the division by the deviation magnifies.
    tolerance = 1e-5 * max(1.0, abs(mean) / spread / 10)
    if form == "kernel" and not backend.on_gpu() and name == "wide":
        tolerance *= 10  # MLX's CPU build sums serially, which is why the other form exists
    assert np.abs(ours - expected).max() < tolerance


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (300.0, 40.0), (0.0, 3000.0)])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_group_norm_of_half_precision_has_float32_statistics(form, name, mean, spread):
    x, groups = map_of(name, mean, spread)
    x = x.astype(np.float16)
    expected = group_norm_float64(x, groups, 1e-5)
    ours = np.array(FORMS[form](mx.array(x), groups, 1e-5)).astype(np.float64)
    assert np.abs(ours - expected).max() < 2e-3 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_group_norm_layer_keeps_the_type(dtype):
    layer = GroupNorm(3, 12, 1e-5)
    layer.set_dtype(dtype)
    assert layer(mx.ones((1, 4, 4, 12), dtype=dtype)).dtype == dtype


def test_group_norm_layer_as_torch():
    reference = randomise(torch.nn.GroupNorm(3, 12, eps=1e-3), scale=0.5)
    model = copy_weights(GroupNorm(3, 12, 1e-3), reference)
    x = drawn(1, 2, 12, 7, 5)
    assert relative_error(model(channels_last(x)), reference(x)) < 1e-6


def test_group_norm_refuses_uneven_groups():
    with pytest.raises(ValueError, match="12 channels cannot be split into 5 groups"):
        GroupNorm(5, 12, 1e-5)


def test_attention_refuses_uneven_heads():
    with pytest.raises(ValueError, match="12 channels cannot be split into heads of 5"):
        SelfAttention2D(12, 5, groups=None)


def test_every_setting_of_the_config_is_tried():
    """A field that no layout above varies would be a setting nobody compared."""
    fixed = {"sample_size", "num_train_timesteps", "time_embedding_type", "mid_block_type", "act_fn"}
    fixed |= {"class_embed_type", "mid_block_scale_factor"}
    fields = set(UNet2DConfig.__dataclass_fields__) - fixed
    layouts = [*LAYOUTS.values(), CONDITIONAL | {"trajectory": True}]  # `test_a_second_level_as_ctm`
    built = [config_from_dict(UNet2DConfig, layout, "test") for layout in layouts]
    unvaried = {
        name for name in fields if all(getattr(a, name) == getattr(b, name) for a, b in itertools.pairwise(built))
    }
    assert unvaried == set()
