"""Gradient checkpointing: the same numbers in less memory, and nothing stays behind."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_latent
from mlx.utils import tree_flatten, tree_map

from mlx_cm import backend
from mlx_cm.lora import LCM_LORA_TARGETS, attach_lora
from mlx_cm.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_cm.models.layers import ResnetBlock2D
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.training.recomputation import BLOCKS, recompute_blocks

PIXELS = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "num_class_embeds": 5,
    "dropout": 0.3,
}
VAE = AutoencoderKLConfig(**tiny_latent.VAE_LAYOUT)
XL = tiny_latent.UNETS["xl"]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def drawn(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """The model with every parameter random, the same each time."""
    leaves = tree_flatten(model.parameters())
    model.load_weights(
        [(name, normal(*value.shape, seed=k) * scale + (value == 1)) for k, (name, value) in enumerate(leaves)]
    )
    return model


def of_pixels(**changes: Any) -> tuple[nn.Module, Callable[[nn.Module], mx.array]]:
    x, t, labels = normal(2, 16, 12, 3), mx.array([0.2, -1.0]), mx.array([0, 4])
    key = mx.random.key(7)
    told = {"s": mx.array([-1.0, -2.0])} if changes.get("trajectory") else {}
    return drawn(UNet2D(UNet2DConfig(**PIXELS | changes))), lambda net: net(x, t, labels, dropout_key=key, **told)


def of_latents(kind: str = "lcm", *, lora: bool = False) -> tuple[nn.Module, Callable[[nn.Module], mx.array]]:
    config = UNet2DConditionConfig(**tiny_latent.UNETS[kind])
    x, t, states = normal(2, 9, 8, 4), mx.array([3.0, 800.0]), normal(2, 7, config.cross_attention_dim)
    told = {"timestep_cond": normal(2, 16)} if kind == "lcm" else {}
    if kind == "xl":
        told = {"text_embeds": normal(2, 20), "time_ids": mx.ones((2, 6))}
    model = drawn(UNet2DCondition(config))
    if lora:
        attach_lora(model, LCM_LORA_TARGETS, rank=2, alpha=3.0, key=mx.random.key(1))
        trained = tree_flatten(model.trainable_parameters())
        model.load_weights([(name, normal(*x.shape, seed=k)) for k, (name, x) in enumerate(trained)], strict=False)
    return model, lambda net: net(x, t, states, **told)


def of_autoencoder() -> tuple[nn.Module, Callable[[nn.Module], mx.array]]:
    x, noise = normal(2, 16, 24, 3), normal(2, 2, 3, 4)

    def call(net: nn.Module) -> mx.array:
        mean, logvar = net.encode(x)
        return net.decode(mean + mx.exp(0.5 * logvar) * noise)

    return drawn(AutoencoderKL(VAE)), call


CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], mx.array]]]] = {
    "pixels, with dropout": of_pixels,
    "pixels, two levels": functools.partial(of_pixels, trajectory=True, resnet_time_scale_shift="scale_shift"),
    "latents, with guidance": of_latents,
    "latents, XL": functools.partial(of_latents, "xl"),
    "an adapter": functools.partial(of_latents, "base", lora=True),
    "an adapter of XL": functools.partial(of_latents, "xl", lora=True),
    "an autoencoder": of_autoencoder,
}


def with_gradient(model: nn.Module, call: Callable[[nn.Module], mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
    def loss() -> mx.array:
        y = call(model)
        return mx.square(y - normal(*y.shape, seed=3)).mean()

    value, gradient = nn.value_and_grad(model, loss)()
    mx.eval(value, gradient)
    return value, dict(tree_flatten(gradient))


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """But for rounding, which is all that is left of a gradient that is nothing beside the others."""
    whole = sum(float(mx.square(value).sum()) for value in expected.values()) ** 0.5
    for name, wanted in expected.items():
        difference, size = (float(mx.linalg.norm(x)) for x in (found[name] - wanted, wanted))
        assert difference <= 1e-4 * size + 1e-6 * whole, name


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_same(case):
    model, call = CASES[case]()
    expected, (value, gradient) = np.array(call(model)), with_gradient(model, call)
    names = [name for name, _ in tree_flatten(model.parameters())]
    before = [np.array(x) for _, x in tree_flatten(model.parameters())]
    kinds = {type(module) for module in model.modules()}
    recompute_blocks(model)
    assert not {type(module) for module in model.modules()} & kinds & set(BLOCKS)
    np.testing.assert_array_equal(np.array(call(model)), expected)
    again, found = with_gradient(model, call)
    assert again.item() == pytest.approx(value.item(), rel=1e-6)
    assert found.keys() == gradient.keys()  # what was frozen has none
    assert_same(found, gradient)
    after = tree_flatten(model.parameters())
    assert [name for name, _ in after] == names
    assert all(np.array_equal(np.array(x), y) for (_, x), y in zip(after, before, strict=True))


def test_gradients_reach_what_is_outside_the_blocks_through_them():
    model, _ = of_latents("base", lora=True)
    x = normal(1, 8, 8, 4)

    def loss(x: mx.array) -> mx.array:
        return mx.square(model(x, mx.array([5.0]), normal(1, 7, 32))).sum()

    expected = np.array(mx.grad(loss)(x))
    recompute_blocks(model)
    found = np.array(mx.grad(loss)(x))
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected) > 0


def test_other_models_keep_their_blocks():
    (model, _), (other, _) = of_autoencoder(), of_autoencoder()
    recompute_blocks(model)
    assert any(type(module) is ResnetBlock2D for module in other.modules())
    assert all(isinstance(module, ResnetBlock2D) for module in model.encoder.mid_block.resnets)
    classes = [type(module) for module in model.modules()]
    recompute_blocks(model)  # once is enough
    assert [type(module) for module in model.modules()] == classes


def test_weights_given_from_outside_are_those_computed_with():
    """One module serves student and target: each call has its own weights, in the gradient's second pass too."""
    model, call = of_latents("base")
    student = tree_map(lambda x: x + 0.01, model.trainable_parameters())
    target = model.trainable_parameters()

    def loss(student: dict) -> mx.array:
        model.update(student)
        found = call(model)
        model.update(target)
        return mx.square(found - mx.stop_gradient(call(model))).mean()

    expected = dict(tree_flatten(mx.grad(loss)(student)))
    recompute_blocks(model)
    found = dict(tree_flatten(mx.grad(loss)(student)))
    assert_same(found, expected)


# --- memory

WIDE = {
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def wide_case() -> tuple[nn.Module, Callable[[nn.Module], mx.array]]:
    x, t, states = normal(1, 24, 24, 4), mx.array([3.0]), normal(1, 7, 32)
    mx.eval(x, t, states)
    model = drawn(UNet2DCondition(UNet2DConditionConfig(**WIDE)), scale=0.05)
    mx.eval(model.parameters())
    return model, lambda net: net(x, t, states)


def peak_of(model: nn.Module, call: Callable[[nn.Module], mx.array]) -> int:
    """Bytes beside what is there before."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with_gradient(model, call)
    return mx.get_peak_memory() - before


def test_a_gradient_takes_less_memory(monkeypatch):
    monkeypatch.setattr(backend, "IN_ARITHMETIC", 0)  # as on maps of full size
    model, call = wide_case()
    kept = peak_of(model, call)
    recompute_blocks(model)
    assert peak_of(model, call) < 0.5 * kept


def test_nothing_stays_behind():
    model, call = wide_case()
    recompute_blocks(model)
    held = []
    for _ in range(4):
        with_gradient(model, call)
        gc.collect()
        held.append(mx.get_active_memory())
    assert len(set(held)) == 1, held
