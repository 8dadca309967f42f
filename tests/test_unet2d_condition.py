"""The text-conditioned U-Net against diffusers: whole nets of every published layout, and each kind of block alone."""

import inspect
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from latent_configs import LCM_DREAMSHAPER, LCM_SDXL, LCM_SSD_1B, PUBLISHED, SD15, SD15_INPAINT, SD21, SDXL, shrink
from mlx.utils import tree_flatten, tree_map_with_path
from parity import TOLERANCE, channels_last, copy_weights, parameter_count, randomise, relative_error

from mlx_cm import backend
from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.errors import ModelError
from mlx_cm.models import unet2d_condition
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig

TEXT_WIDTH, TOKENS = 24, 7


def build(config: dict) -> UNet2DCondition:
    return UNet2DCondition(config_from_dict(UNet2DConditionConfig, config, "config.json"))


def pair(config: dict) -> tuple[UNet2DCondition, UNet2DConditionModel]:
    """Our net and the reference, same random weights."""
    torch.manual_seed(0)
    reference = randomise(UNet2DConditionModel(**config))
    return copy_weights(build(config), reference), reference


def conditions(config: dict, batch: int = 2) -> dict[str, torch.Tensor]:
    """Random values for everything a net of this config is conditioned on besides time and text."""
    generator = torch.Generator().manual_seed(2)
    given = {}
    if "time_cond_proj_dim" in config:
        given["timestep_cond"] = torch.randn((batch, config["time_cond_proj_dim"]), generator=generator)
    if "addition_embed_type" in config:
        given["text_embeds"] = torch.randn((batch, 20), generator=generator)
        given["time_ids"] = torch.randint(0, 1024, (batch, 6), generator=generator)
    return given


def inputs(config: dict, height: int, width: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch, config.get("in_channels", 4), height, width), generator=generator)
    return x, torch.randn((batch, TOKENS, TEXT_WIDTH), generator=generator)


def ours_and_theirs(config: dict, height: int, width: int, timesteps) -> tuple[mx.array, torch.Tensor]:
    model, reference = pair(config)
    (x, states), given = inputs(config, height, width), conditions(config)
    ours = model(
        channels_last(x),
        mx.array(timesteps),
        channels_last(states),
        **{name: channels_last(value) for name, value in given.items()},
    )
    guidance = given.pop("timestep_cond", None)
    theirs = reference(
        x, torch.tensor(timesteps), states, timestep_cond=guidance, added_cond_kwargs=given, return_dict=False
    )
    return ours, theirs[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_names(name):
    config, parameters, tensors = PUBLISHED[name]
    with torch.device("meta"):
        reference = UNet2DConditionModel(**config)
    model = build(json.loads(reference.to_json_string()))  # as save_pretrained writes it, every field present
    assert parameter_count(model) == (parameters, tensors)
    published = {
        key: tuple(value.shape[i] for i in (0, 2, 3, 1)) if value.ndim == 4 else tuple(value.shape)
        for key, value in reference.state_dict().items()
    }
    assert {key: value.shape for key, value in tree_flatten(model.parameters())} == published


NETS = {
    "SD1.5": (SD15, 16, 8),
    "SD1.5 odd": (SD15, 13, 19),
    "SD1.5 inpainting": (SD15_INPAINT, 8, 8),
    "LCM Dreamshaper": (LCM_DREAMSHAPER, 9, 12),
    "SD2.1": (SD21, 11, 8),
    "SDXL": (SDXL, 8, 6),
    "LCM-SDXL odd": (LCM_SDXL, 7, 9),
    "LCM-SSD-1B odd": (LCM_SSD_1B, 9, 7),
}


@pytest.mark.parametrize("name", NETS)
def test_families(name):
    config, height, width = NETS[name]
    ours, theirs = ours_and_theirs(shrink(config), height, width, [999, 259])
    assert relative_error(ours, theirs) < TOLERANCE


SMALL = {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 4],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_WIDTH,
}
VARIANTS = {
    "small": {},
    "no middle": {"mid_block_type": None},
    "plain middle": {"mid_block_type": "UNetMidBlock2D"},
    "uneven layers": {"layers_per_block": [1, 3]},
    "one number of heads": {"attention_head_dim": 8},
    "attention on the way up only": {"down_block_types": ["DownBlock2D", "DownBlock2D"]},
    "only cross-attention": {"only_cross_attention": True},
    "only cross-attention below": {"only_cross_attention": [False, True]},
    "text width per level": {"cross_attention_dim": [TEXT_WIDTH, TEXT_WIDTH]},
    "deep transformers": {"transformer_layers_per_block": [1, 3]},
    "another depth on the way up": {
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [2, 3]],
        "reverse_transformer_layers_per_block": [[3, 1, 2], 2],
    },
    "kernels": {"conv_in_kernel": 5, "conv_out_kernel": 1},
    "inputs from 0 to 1": {"center_input_sample": True},
    "sines first": {"flip_sin_to_cos": False, "freq_shift": 1},
    "embedding width": {"time_embedding_dim": 40},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "eps": {"norm_eps": 0.1},
    "channels": {"in_channels": 9, "out_channels": 3},
    "linear projection": {"use_linear_projection": True},
    "three levels": {
        "block_out_channels": [16, 32, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 4, 2],
        "layers_per_block": [2, 1, 1],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    ours, theirs = ours_and_theirs(SMALL | VARIANTS[variant], 7, 10, [20, 801])
    assert relative_error(ours, theirs) < TOLERANCE


def test_one_timestep_for_all():
    model, reference = pair(SMALL)
    x, states = inputs(SMALL, 6, 6)
    theirs = reference(x, 499, states).sample
    for timestep in (499, 499.0, mx.array(499), mx.array([499])):
        assert relative_error(model(channels_last(x), timestep, channels_last(states)), theirs) < TOLERANCE


BLOCKS = SMALL | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 2,
}


@pytest.fixture(scope="module", params=["1x1 convolutions", "linear layers"])
def blocks(request):
    """A net with every kind of block, the reference, and what both get: map size, embedding, text."""
    model, reference = pair(BLOCKS | {"use_linear_projection": request.param == "linear layers"})
    generator = torch.Generator().manual_seed(4)
    embedding = torch.randn((2, 64), generator=generator)
    return model, reference, embedding, inputs(BLOCKS, 5, 6)[1]


def random_map(channels: int, seed: int) -> torch.Tensor:
    return torch.randn((2, channels, 5, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("level", [0, 1])
def test_down_blocks(blocks, level):
    model, reference, embedding, states = blocks
    given = {"encoder_hidden_states": states} if level == 1 else {}
    x = random_map(16, 0)
    out, skips = reference.down_blocks[level](x, embedding, **given)
    ours, our_skips = model.down_blocks[level](
        channels_last(x), embedded(embedding), model.prepare(channels_last(states)).down[level]
    )
    for mine, their in zip([ours, *our_skips], [out, *skips], strict=True):
        assert relative_error(mine, their) < TOLERANCE


def test_middle_block(blocks):
    model, reference, embedding, states = blocks
    x = random_map(32, 0)
    ours = model.mid_block(channels_last(x), embedded(embedding), model.prepare(channels_last(states)).mid)
    theirs = reference.mid_block(x, embedding, encoder_hidden_states=states)
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("level", "widths", "upsampled"), [(0, (32, 16), (9, 11)), (0, (32, 16), (10, 12)), (1, (16, 16), None)]
)
def test_up_blocks(blocks, level, widths, upsampled):
    model, reference, embedding, states = blocks
    x, skips = random_map(32, 0), [random_map(width, i) for i, width in enumerate(reversed(widths))]
    given = {"encoder_hidden_states": states} if level == 0 else {}
    theirs = reference.up_blocks[level](x, tuple(skips), embedding, upsample_size=upsampled, **given)
    stack = [mx.zeros((2, *(upsampled or (5, 6)), 1)), *map(channels_last, skips)]  # below: a state of the next level
    prepared = model.prepare(channels_last(states)).up[level]
    ours = model.up_blocks[level](channels_last(x), stack, embedded(embedding), prepared)
    assert len(stack) == 1
    assert relative_error(ours, theirs) < TOLERANCE


def test_transformer_and_its_layers(blocks):
    model, reference, _, states = blocks
    ours, theirs = model.down_blocks[1].attentions[0], reference.down_blocks[1].attentions[0]
    prepared, x = ours.prepare(channels_last(states)), random_map(32, 0)
    assert relative_error(ours(channels_last(x), prepared), theirs(x, states).sample) < TOLERANCE
    tokens = torch.randn((2, 30, 32), generator=torch.Generator().manual_seed(5))
    for i in range(2):
        mine = ours.transformer_blocks[i](channels_last(tokens), prepared[i])
        their = theirs.transformer_blocks[i](tokens, encoder_hidden_states=states)
        assert relative_error(mine, their) < TOLERANCE


def embedded(embedding: torch.Tensor) -> mx.array:
    """The form our blocks take: already through SiLU, once for all blocks."""
    return channels_last(torch.nn.functional.silu(embedding))


FULLY_CONDITIONED = SMALL | {
    "time_cond_proj_dim": 12,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}


@pytest.fixture(scope="module")
def conditioned():
    """A net with every condition there is, and its inputs."""
    model, _ = pair(FULLY_CONDITIONED)
    x, states = map(channels_last, inputs(FULLY_CONDITIONED, 6, 6))
    settings = {name: channels_last(value) for name, value in conditions(FULLY_CONDITIONED).items()}
    return model, x, states, settings


@pytest.mark.parametrize("changed", ["x", "timestep", "states", "timestep_cond", "text_embeds", "time_ids"])
def test_every_condition_matters(conditioned, changed):
    """Parity alone would not notice a condition that both sides' random weights make negligible."""
    model, x, states, settings = conditioned
    arguments = {"x": x, "timestep": mx.array([20, 400]), "states": states, **settings}

    def call(x, timestep, states, **settings):
        return model(x, timestep, states, **settings)

    before = call(**arguments)
    after = call(**arguments | {changed: arguments[changed] + 1})
    assert mx.linalg.norm(after - before) > 1e-2 * mx.linalg.norm(before)


def test_prepared_prompt_gives_the_same_bits(conditioned):
    model, x, states, settings = conditioned
    context = model.prepare(states, **settings)
    for timestep in (999, 259):
        assert mx.array_equal(model(x, timestep, context), model(x, timestep, states, **settings))


def test_a_step_computes_nothing_of_the_prompt(conditioned):
    """Once a prompt is prepared, the weights that prepared it are no longer read."""
    _, x, states, settings = conditioned
    model, _ = pair(FULLY_CONDITIONED)
    context = model.prepare(states, **settings)
    before = model(x, 499, context)
    once = (".attn2.to_k.", ".attn2.to_v.", "time_embedding.cond_proj.", "add_embedding.")

    def forget(path: str, value: mx.array) -> mx.array:
        return mx.full(value.shape, mx.nan) if any(part in f".{path}." for part in once) else value

    forgotten = tree_map_with_path(forget, model.parameters())
    count = sum(bool(mx.isnan(value).all()) for _, value in tree_flatten(forgotten))
    transformers = sum(len(level.depths) for level in (*model.config.down_levels, *model.config.up_levels)) + 1
    assert count == 2 * transformers + 1 + 4
    model.update(forgotten)
    assert mx.array_equal(model(x, 499, context), before)
    assert mx.isnan(model(x, 499, states, **settings)).all()


def test_one_prompt_serves_a_batch(conditioned):
    model, x, states, settings = conditioned
    one = model.prepare(states[:1], **{name: value[:1] for name, value in settings.items()})
    together = model(x, 499, one)
    for i in range(2):
        assert mx.allclose(together[i : i + 1], model(x[i : i + 1], 499, one), atol=1e-5)


def test_conditions_are_needed_or_refused(conditioned):
    model, x, states, settings = conditioned
    for name in settings:
        with pytest.raises(ValueError, match=f"{name} is needed"):
            model.prepare(states, **{key: value for key, value in settings.items() if key != name})
        with pytest.raises(ValueError, match=f"no use for {name}"):
            build(SMALL).prepare(states, **{name: settings[name]})
    with pytest.raises(ValueError, match="holds timestep_cond"):
        model(x, 499, model.prepare(states, **settings), timestep_cond=settings["timestep_cond"])
    with pytest.raises(
        ValueError, match="text_embeds of width 20 and 5 time_ids make 60 values, this model expects 68"
    ):
        model.prepare(states, **settings | {"time_ids": settings["time_ids"][:, :5]})


def in_half_precision(model: UNet2DCondition, dtype: mx.Dtype) -> UNet2DCondition:
    kept = model.float32_parts
    return model.update(
        tree_map_with_path(
            lambda path, value: value if path.startswith(kept) else value.astype(dtype), model.parameters()
        )
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 5e-3), (mx.bfloat16, 4e-2)])
def test_half_precision(monkeypatch, dtype, tolerance):
    """The embeddings and the head stay float32, nothing between does."""
    model, _ = pair(FULLY_CONDITIONED)
    x, states = map(channels_last, inputs(FULLY_CONDITIONED, 6, 6))
    settings = {name: channels_last(value) for name, value in conditions(FULLY_CONDITIONED).items()}
    exact = model(x, 499, states, **settings)
    in_half_precision(model, dtype)
    torso = (
        "ResnetBlock2D",
        "Transformer2D",
        "BasicTransformerBlock",
        "Attention",
        "GEGLU",
        "Upsample2D",
        "Downsample2D",
        "DownBlock2D",
        "MidBlock2D",
        "UpBlock2D",
    )
    seen = {}

    def watch(kind: str):
        original = getattr(unet2d_condition, kind).__call__

        def watched(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            arrays = [value for _, value in tree_flatten([out, args])]
            seen.setdefault(kind, set()).update(value.dtype for value in arrays if isinstance(value, mx.array))
            return out

        monkeypatch.setattr(getattr(unet2d_condition, kind), "__call__", watched)

    for kind in torso:
        watch(kind)
    context = model.prepare(states, **settings)
    half = model(x, 499, context)
    assert seen == {kind: {dtype} for kind in torso}
    assert model.embed(mx.array([499]), context).dtype == mx.float32
    assert half.dtype == mx.float32
    assert mx.linalg.norm(half - exact) < tolerance * mx.linalg.norm(exact)


@pytest.mark.parametrize(
    ("size", "fused"), [(8, 64), (40, 64), (64, 64), (72, 80), (80, 80), (90, 96), (128, 128), (160, 160)]
)
def test_fused_head_sizes(size, fused):
    assert backend.fused_head_size(size) == fused


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_padded_heads_change_nothing(dtype, mask):
    q, k, v = (mx.random.normal((2, 3, 12, 40), key=mx.random.key(i)).astype(dtype) for i in range(3))
    padded = backend.padded_attention(q, k, v, 40**-0.5, mask, 64)
    plain = backend.attention(q, k, v, 40**-0.5, mask)
    assert padded.shape == plain.shape
    assert padded.dtype == dtype
    assert mx.allclose(padded, plain, atol=1e-6 if dtype == mx.float32 else 1e-3)


def test_heads_are_padded_on_metal_only(monkeypatch):
    """A net whose heads Metal cannot fuse computes the same there, in padded heads."""
    model, _ = pair(SMALL)
    x, states = map(channels_last, inputs(SMALL, 6, 6))
    computed = []
    attention = mx.fast.scaled_dot_product_attention

    def spy(q, k, v, **settings):
        computed.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return attention(q, k, v, **settings)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(backend, "IN_ARITHMETIC", 0)
    plain = model(x, 499, states)
    assert set(computed) == {(8, 8, 8)}
    computed.clear()
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    padded = model(x, 499, states)
    assert set(computed) == {(64, 64, 64)}
    assert mx.linalg.norm(padded - plain) < 1e-5 * mx.linalg.norm(plain)


def test_config_has_every_published_field_with_its_default():
    """An older file with few fields means what it meant to diffusers."""
    published = inspect.signature(UNet2DConditionModel.__init__).parameters
    published = {name: parameter.default for name, parameter in published.items() if name != "self"}
    assert config_to_dict(UNet2DConditionConfig()) == published


def test_config_survives_writing():
    config = config_from_dict(UNet2DConditionConfig, LCM_SSD_1B, "config.json")
    written = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(UNet2DConditionConfig, written, "config.json") == config


def test_number_of_heads_under_its_proper_name():
    named = {key: value for key, value in SMALL.items() if key != "attention_head_dim"}
    model = build(named | {"num_attention_heads": [2, 4], "attention_head_dim": 8})
    assert [block.attentions[0].transformer_blocks[0].attn1.heads for block in model.down_blocks] == [2, 4]


REFUSED = {
    "down_block_types": (["SimpleCrossAttnDownBlock2D", "DownBlock2D"], "SimpleCrossAttnDownBlock2D"),
    "up_block_types": (["UpBlock2D"], "expected 2 values"),
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn", "not supported"),
    "norm_num_groups": (3, "norm_num_groups 3 does not divide the block width 16"),
    "block_out_channels": ([16], "expected 2 values"),
    "attention_head_dim": ([2, 5], "5 heads do not divide"),
    "only_cross_attention": ([True], "expected 2 values"),
    "layers_per_block": ([1, 1, 1], "expected 2 values"),
    "transformer_layers_per_block": ([1, [2]], "reverse_transformer_layers_per_block is needed"),
    "reverse_transformer_layers_per_block": ([[1, 1, 1], 1], "expected 2 values, one per residual block"),
    "class_embed_type": ("projection", "not supported"),
    "num_class_embeds": (1000, "not supported"),
    "addition_embed_type": ("image", "not supported"),
    "encoder_hid_dim_type": ("ip_image_proj", "not supported"),
    "dual_cross_attention": (True, "not supported"),
    "attention_type": ("gated", "not supported"),
    "time_embedding_type": ("fourier", "not supported"),
    "act_fn": ("gelu", "not supported"),
    "downsample_padding": (0, "not supported"),
    "resnet_time_scale_shift": ("spatial", "not supported"),
    "norm_eps": (None, "expected float"),
    "conv_in_kernel": (2, "expected an odd number"),
    "in_channels": (0, "expected at least 1"),
    "a_setting_to_come": (1, "does not know a_setting_to_come"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_config_refuses(field):
    value, message = REFUSED[field]
    with pytest.raises(ModelError, match=message) as error:
        config_from_dict(UNet2DConditionConfig, SMALL | {field: value}, "unet/config.json")
    assert error.value.what == "unet/config.json"
    if field in UNet2DConditionConfig.__dataclass_fields__:
        assert field in error.value.why


def test_text_time_needs_its_widths():
    with pytest.raises(ValueError, match="addition_time_embed_dim is missing"):
        UNet2DConditionConfig(addition_embed_type="text_time")


def test_gradients_reach_every_parameter():
    """The net trains: nothing on the way of a gradient is a dead end."""
    model, x, states = build(FULLY_CONDITIONED), *map(channels_last, inputs(FULLY_CONDITIONED, 6, 6))
    settings = {name: channels_last(value) for name, value in conditions(FULLY_CONDITIONED).items()}

    def loss(parameters):
        model.update(parameters)
        return mx.square(model(x, 499, states, **settings)).mean()

    for name, gradient in tree_flatten(mx.grad(loss)(model.parameters())):
        assert np.abs(np.array(gradient)).max() > 0, name
