"""What a run trains: which model, method and settings go together, new networks, the data, and what is written."""

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_latent
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from mlx.utils import tree_flatten, tree_map
from native_folders import component_folder, latent_folder, pixel_folder
from PIL import Image
from tiny_latent import LATENTS, PIXELS, native_autoencoder

import mlx_cm
from mlx_cm.cache import cache_root
from mlx_cm.errors import MlxCmError, ModelError, UsageError
from mlx_cm.model_folder import MODEL_INDEX, load_model, read_model_index, read_schedule
from mlx_cm.models.autoencoder_kl import AutoencoderKLConfig
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.pipelines.latent import LatentSettings
from mlx_cm.quantization import quantize_model
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import sha256_file
from mlx_cm.training.assembly import make_batches, make_objective
from mlx_cm.training.data import PictureData, open_data
from mlx_cm.training.loop import Trainer
from mlx_cm.training.methods import METHODS
from mlx_cm.training.models import Trainee, build_trainee, clone, new_network, write_model
from mlx_cm.training.settings import Settings, read_settings

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', on schedulers without steps_offset

CAPTIONS = ("a red cat", "two cats", "", "a red apple")


@pytest.fixture(scope="module", autouse=True)
def without_the_oracles():
    """The libraries behind the oracles are much to look through for the collector that releases memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tcd(family: str) -> dict:
    return {"settings": LatentSettings(**tiny_latent.FAMILIES[family].settings | {"sampler": "tcd"})}


def wide_unet(**changes) -> UNet2DCondition:
    """One whose layers are wide enough to be quantised."""
    mx.random.seed(0)
    return UNet2DCondition(UNet2DConditionConfig(**tiny_latent.BASE | {"block_out_channels": (32, 64)} | changes))


MODELS: dict[str, Callable[[Path], Path]] = {
    "edm": lambda folder: pixel_folder(folder, "conditional", parameterization="edm"),
    "consistency": lambda folder: pixel_folder(folder, "conditional"),
    "sd": lambda folder: latent_folder(folder, "sd"),
    "sd2": lambda folder: latent_folder(folder, "sd2", schedule=DiscreteSchedule(prediction_type="v_prediction")),
    "xl": lambda folder: latent_folder(folder, "xl"),
    "xl with empty prompts": lambda folder: latent_folder(folder, "xl with empty prompts"),
    "lcm": lambda folder: latent_folder(folder, "lcm"),
    "tcd": lambda folder: latent_folder(folder, "sd", **tcd("sd")),
    "inpainting": lambda folder: latent_folder(folder, "inpainting"),
    "quantised": lambda folder: latent_folder(folder, "sd", backbone=quantize_model(wide_unet(), 8)),
    "tiny vae in sd": lambda folder: latent_folder(folder, "sd", vae="tiny"),
    "no size": lambda folder: latent_folder(folder, "sd", backbone=wide_unet(sample_size=None)),
    "vae": lambda folder: component_folder(folder, native_autoencoder("kl")),
    "tiny vae": lambda folder: component_folder(folder, native_autoencoder("tiny")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a model by its name, written once."""
    root, written = tmp_path_factory.mktemp("models"), {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = MODELS[name](root / name.replace(" ", "-"))
        return written[name]

    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> PictureData:
    """Four pictures with captions, of different sizes."""
    folder = tmp_path_factory.mktemp("captioned")
    for number, caption in enumerate(CAPTIONS):
        tiny_latent.picture(PIXELS + 8 * number, PIXELS, seed=number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return open_data(folder)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> PictureData:
    """Four pictures of two classes."""
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(4):
        (folder / f"class{number % 2}").mkdir(exist_ok=True)
        tiny_latent.picture(16, 16, seed=number).save(folder / f"class{number % 2}" / f"{number}.png")
    return open_data(folder)


PIXEL_UNET = {
    "sample_size": 16,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
LATENT_UNET = {name: value for name, value in tiny_latent.BASE.items() if "channels" not in name} | {
    "block_out_channels": [16, 24],
    "cross_attention_dim": 16,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VAE = {
    "sample_size": 16,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}


def new_latent(model: Callable[[str], Path], **changes) -> dict:
    """A `[model]` section; a part that is None is left out."""
    parts = {
        "unet": LATENT_UNET,
        "text_encoder": TEXT,
        "tokenizer": str(tiny_latent.vocabulary_folder()),
        "vae": str(model("vae")),
    } | changes
    return {name: value for name, value in parts.items() if value is not None}


def settings_of(method: str, described: dict | None = None, **overrides) -> Settings:
    """Settings of a short run; names of overrides have "__" for the dot."""
    chosen = {"train.batch_size": 2, "train.steps": 2} | {
        name.replace("__", "."): value for name, value in overrides.items()
    }
    if described:
        chosen["model"] = described
    sections: dict[str, dict] = {}
    for name, value in chosen.items():
        section, _, key = name.partition(".")
        sections[section] = value if not key else sections.get(section, {}) | {key: value}
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return read_settings(method, overrides=flat)


def built(settings: Settings, ref: Path | None = None, num_classes: int | None = None) -> Trainee:
    return build_trainee(settings, ref, num_classes=num_classes)


def values(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(module.parameters())}


# --- what goes together

PIXEL_METHODS, LATENT_METHODS = ("cd", "ct", "ict", "ctm"), ("lcd", "lcm-lora", "lcf")
WAYS = {
    "edm": {"teacher", *PIXEL_METHODS},
    "consistency": {"ct", "ict"},
    "sd": {"teacher", "lcd", "lcm-lora", "autoencoder"},
    "sd2": {"teacher", "lcd", "lcm-lora", "autoencoder"},
    "xl": {"teacher", "lcd", "lcm-lora", "autoencoder"},
    "lcm": {"lcf", "lcm-lora", "autoencoder"},
    "tcd": {"autoencoder"},
    "inpainting": {"autoencoder"},
    "quantised": {"autoencoder"},
    "vae": {"autoencoder"},
    "tiny vae": set(),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_begins_with_certain_models_and_says_so_of_the_others(model, method, name):
    settings = settings_of(method, **({"lora__rank": 2} if method == "lcm-lora" else {}))
    if method in WAYS[name]:
        trainee = built(settings, model(name))
        assert trainee.space == METHODS[method].space or METHODS[method].space is None
        assert all(tree_flatten(module.trainable_parameters()) for module in trainee.modules.values())
    else:
        with pytest.raises(MlxCmError) as refused:
            built(settings, model(name))
        assert len(refused.value.why) > 15


REFUSED_MODELS = {
    "no teacher": ("cd", None, {}, "model: cd needs a diffusion teacher"),
    "nothing to distil": ("lcd", None, {}, "model: lcd needs a latent diffusion model"),
    "nothing to adapt": ("lcm-lora", None, {}, "lcm-lora needs a latent diffusion model"),
    "nothing to fine-tune": ("lcf", None, {}, "lcf needs a latent consistency model"),
    "nothing to train": ("ct", None, {}, r"none given, and \[model.unet\] describes no new one"),
    "no new autoencoder": ("autoencoder", None, {}, r"none given, and \[model.vae\] describes no new one"),
    "latents for pixels": ("ict", "sd", {}, "is of latent space, and ict is for pixel space"),
    "pixels for latents": ("lcd", "edm", {}, "is of pixel space, and lcd is for latent space"),
    "no diffusion teacher": ("cd", "consistency", {}, "is a consistency model; cd begins with a diffusion teacher"),
    "no trajectory's teacher": ("ctm", "consistency", {}, "ctm begins with a diffusion teacher"),
    "taught already": ("teacher", "consistency", {}, "is a consistency model; teacher begins with a diffusion teacher"),
    "distilled already": ("lcd", "lcm", {}, "is a consistency model already"),
    "no consistency model": ("lcf", "sd", {}, "is no latent consistency model"),
    "TCD": ("lcm-lora", "tcd", {}, "is distilled for TCD, which is not trained here"),
    "inpainting": ("lcd", "inpainting", {}, "sees masks, which the data has not"),
    "quantised": ("lcd", "quantised", {}, "is quantised; training needs all digits"),
    "quantised for an adapter": ("lcm-lora", "quantised", {}, "is quantised; training needs all digits"),
    "no posterior": ("autoencoder", "tiny vae", {}, "is an AutoencoderTiny, which has no posterior"),
    "no posterior in a model": ("autoencoder", "tiny vae in sd", {}, "which has no posterior"),
    "no autoencoder": ("autoencoder", "edm", {}, "is a UNet2D, expected one of AutoencoderKL, AutoencoderTiny"),
    "an adapter of pixels": ("ict", "edm", {"lora__rank": 2}, "adapters are for latent models"),
    "an adapter of a teacher": ("teacher", "edm", {"lora__rank": 2}, "adapters are for latent models"),
    "an adapter of an autoencoder": ("autoencoder", "vae", {"lora__rank": 2}, "adapters are for latent models"),
    "an adapter without rank": ("lcm-lora", "sd", {"lora__rank": 0}, "lora.rank 0: lcm-lora trains an adapter"),
    "layers that are not there": ("lcm-lora", "sd", {"lora__targets": ["to_q", "to_z"]}, "LoRA targets to_z"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_that_does_not_suit_is_refused(model, case):
    method, name, overrides, message = REFUSED_MODELS[case]
    with pytest.raises(MlxCmError, match=message):
        built(settings_of(method, **overrides), None if name is None else model(name))


def test_a_trajectory_model_begins_nothing(model, tmp_path):
    written = write_model(tmp_path / "ctm", built(settings_of("ctm"), model("edm")), {})
    for method in ("ct", "ctm", "teacher"):
        with pytest.raises(UsageError, match=f"is a trajectory model; {method} begins with a"):
            built(settings_of(method), written)


REFUSED_DESCRIPTIONS = {
    "no text": ({"text_encoder": None}, r"\[model\]: text_encoder is missing; for latent space it has unet, text_enc"),
    "no U-Net": ({"unet": None}, r"\[model.unet\] describes no new one"),
    "a word for a table": ({"unet": "large"}, r"\[model\] unet: expected a table of settings, got 'large'"),
    "a table for a word": ({"vae": {"a": 1}}, r"\[model\] vae: expected a reference"),
    "an unknown field": ({"unet": LATENT_UNET | {"depth": 3}}, r"\[model.unet\]: UNet2DConditionConfig does not know"),
    "an impossible size": ({"unet": LATENT_UNET | {"norm_num_groups": 7}}, r"\[model.unet\]: norm_num_groups"),
    "other text": ({"unet": LATENT_UNET | {"cross_attention_dim": 24}}, "cross_attention_dim: expected 16, got 24"),
    "masks": ({"unet": LATENT_UNET | {"in_channels": 9}}, "in_channels: expected 4, got 9"),
    "guidance": ({"unet": LATENT_UNET | {"time_cond_proj_dim": 8}}, "time_cond_proj_dim: expected None, got 8"),
    "few tokens": ({"text_encoder": TEXT | {"vocab_size": 3}}, r"vocab_size: expected \d+, got 3"),
    "short prompts": ({"text_encoder": TEXT | {"max_position_embeddings": 9}}, "max_position_embeddings: expected 77"),
    "an impossible schedule": ({"schedule": {"beta_schedule": "steep"}}, r"\[model.schedule\]"),
    "no tokenizer there": ({"tokenizer": "/nowhere"}, "/nowhere"),
    "no autoencoder there": ({"vae": "/nowhere"}, "/nowhere"),
}


@pytest.mark.parametrize("case", REFUSED_DESCRIPTIONS)
def test_a_description_that_does_not_fit_is_refused(model, case):
    changes, message = REFUSED_DESCRIPTIONS[case]
    with pytest.raises(MlxCmError, match=message):
        built(settings_of("teacher", new_latent(model, **changes)))


def test_other_descriptions_that_do_not_fit_are_refused(model):
    for method, described, ref, overrides, message in (
        ("ct", new_latent(model), None, {}, "is of latent space, and ct is for pixel space"),
        ("autoencoder", {"vae": VAE, "unet": PIXEL_UNET}, None, {}, "unet is unknown; for autoencoder space it has"),
        ("ct", {"unet": PIXEL_UNET}, model("edm"), {}, r"\[model\]: describes a new network, and .* was given as well"),
        ("autoencoder", {"vae": VAE}, model("vae"), {}, r"describes a new network"),
        ("ict", {"unet": PIXEL_UNET}, None, {"lora__rank": 2}, "lora.rank"),
        ("teacher", new_latent(model), None, {"lora__rank": 2}, "an adapter is trained for a model that exists"),
        ("ct", {"unet": PIXEL_UNET | {"trajectory": True}}, None, {}, "level to jump to"),
    ):
        with pytest.raises(MlxCmError, match=message):
            built(settings_of(method, described, **overrides), ref)


# --- networks

CONFIGS = {
    "UNet2D": UNet2DConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in PIXEL_UNET.items()}),
    "UNet2DCondition": UNet2DConditionConfig(**tiny_latent.BASE),
    "AutoencoderKL": AutoencoderKLConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in VAE.items()}),
    "CLIPTextModel": CLIPTextConfig(vocab_size=500, eos_token_id=499, **TEXT),
}


def made_new(config, seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    return new_network(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_network_depends_on_its_seed_alone(kind):
    first, again, other = (values(made_new(CONFIGS[kind], seed)) for seed in (1, 1, 2))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].std() > 0 and name != "quant_conv.bias"]
    assert len(drawn) > 5
    assert not any(np.array_equal(first[name], other[name]) for name in drawn)


def test_the_blocks_of_a_new_pixel_network_begin_as_identities():
    unet = made_new(CONFIGS["UNet2D"])
    x, embedding = mx.random.normal((2, 5, 4, 8)), mx.random.normal((2, 32))
    for block in (unet.down_blocks[1].resnets[0], unet.mid_block.resnets[0]):
        np.testing.assert_array_equal(np.array(block(x, embedding)), np.array(x))
    np.testing.assert_array_equal(np.array(unet.mid_block.attentions[0](x)), np.array(x))
    noise = mx.random.normal((2, 16, 16, 3))
    assert not np.array(unet(noise, mx.array([5.0, 900.0]))).any()


def test_a_new_latent_network_begins_with_zeros_that_depend_on_the_prompt_soon():
    """Its blocks are no identities: what of them the prompt moves is as large as what they make of the picture."""
    config = dataclasses.replace(
        CONFIGS["UNet2DCondition"], addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    unet = made_new(config)
    noise, states, sizes = mx.random.normal((2, 4, 4, 4)), mx.random.normal((2, 7, 32)), mx.full((2, 6), 8.0)
    contexts = [unet.prepare(states, text_embeds=3 * mx.random.normal((2, 32)), time_ids=sizes) for _ in range(2)]
    assert not np.array(unet(noise, mx.array([5.0, 900.0]), contexts[0])).any()
    one, other = (unet.embed(mx.array([5.0, 900.0]), context) for context in contexts)
    assert mx.square(one - other).mean().item() > 0.2 * mx.square(one).mean().item()
    x, resnet = mx.random.normal((2, 5, 4, 24)), unet.mid_block.resnets[0]
    change = resnet(x, one) - resnet(x, other)
    assert mx.square(change).mean().item() > 0.01 * mx.square(resnet(x, one) - x).mean().item()


def test_a_new_text_encoder_begins_with_small_embeddings():
    found = values(made_new(CONFIGS["CLIPTextModel"]))
    tables = [value for name, value in found.items() if name.endswith("embedding.weight")]
    assert len(tables) == 2
    for table in tables:
        assert table.std() == pytest.approx(0.02, rel=0.1)
    zero = {name.rpartition(".layers.")[2][2:] for name, value in found.items() if not value.any() and "weight" in name}
    assert not zero


@pytest.mark.parametrize("quantised", [True, False], ids=["quant_conv", "without"])
def test_a_new_autoencoder_begins_with_a_narrow_posterior(quantised):
    vae = made_new(dataclasses.replace(CONFIGS["AutoencoderKL"], use_quant_conv=quantised))
    mean, logvar = vae.encode(mx.random.normal((4, 16, 16, 3)))
    assert mx.abs(logvar.mean() + 6).item() < 1
    assert mean.var().item() > 4 * mx.exp(logvar).mean().item()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_weight_of_a_new_network_comes_to_learn(kind):
    """Zeros do not stand in each other's way for good: after a few steps all have a gradient."""
    network = made_new(CONFIGS[kind])
    x = mx.random.normal((1, 16, 16, {"UNet2D": 3, "UNet2DCondition": 4}.get(kind, 3)), key=mx.random.key(0))

    def out() -> mx.array:
        if kind == "UNet2D":
            return network(x, mx.array([0.3]))
        if kind == "UNet2DCondition":
            return network(x, mx.array([3.0]), mx.sin(mx.arange(5 * 32).reshape(1, 5, 32)))
        if kind == "AutoencoderKL":
            mean, logvar = network.encode(x)
            return network.decode(mean + mx.exp(logvar / 2))
        return network(mx.arange(77)[None] * 6).last_hidden_state

    wanted = mx.random.normal(out().shape, key=mx.random.key(1))
    moved: set[str] = set()
    for _ in range(5):
        _, gradients = nn.value_and_grad(network, lambda: mx.square(out() - wanted).mean())()
        moved |= {name for name, gradient in tree_flatten(gradients) if mx.abs(gradient).max().item() > 0}
        network.update(tree_map(lambda x, g: x - 0.3 * g, network.trainable_parameters(), gradients))
        mx.eval(network.parameters())
    # The keys' bias cancels in a softmax, up to rounding.
    idle = {name for name in dict(tree_flatten(network.parameters())) if name not in moved}
    assert {name for name in idle if not name.endswith(("to_k.bias", "k_proj.bias"))} == set()


def test_a_clone_shares_its_arrays_until_one_is_changed():
    original = made_new(CONFIGS["UNet2DCondition"])
    mx.eval(original.parameters())
    before = mx.get_active_memory()
    copy = clone(original, original.config)
    mx.eval(copy.parameters())
    assert mx.get_active_memory() == before
    ours, theirs = (dict(tree_flatten(one.parameters())) for one in (original, copy))
    assert all(ours[name] is theirs[name] for name in ours)
    copy.conv_in.weight = copy.conv_in.weight + 1
    assert float(mx.abs(original.conv_in.weight - copy.conv_in.weight).min()) > 0.9


def test_what_a_clone_has_more_changes_nothing_at_first():
    original = tiny_latent.unet("base")[0]
    copy = clone(original, UNet2DConditionConfig(**tiny_latent.BASE, time_cond_proj_dim=256))
    x, states = mx.random.normal((2, 5, 4, 4)), mx.random.normal((2, 7, 32))
    told = {"timestep_cond": mx.random.normal((2, 256))}
    t = mx.array([700.0, 3.0])
    np.testing.assert_array_equal(np.array(copy(x, t, states, **told)), np.array(original(x, t, states)))


def test_a_trajectory_network_begins_as_its_teacher(model):
    trainee = built(settings_of("ctm"), model("edm"))
    student, teacher = trainee.modules["unet"], trainee.teacher
    assert (student.config.trajectory, teacher.config.trajectory) == (True, False)
    x, labels = mx.random.normal((2, 16, 16, 3)), mx.array([1, 7])
    t, s = mx.array([0.3, 5.0]), mx.array([0.1, 2.0])
    found = student(x, t, labels, s)
    np.testing.assert_array_equal(np.array(found), np.array(teacher(x, t, labels)))


def test_what_is_new_in_a_run_depends_on_its_seed(model):
    made = [
        values(built(settings_of("teacher", new_latent(model), train__seed=seed)).modules["text_encoder"])
        for seed in (1, 1, 2)
    ]
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert np.array_equal(made[0][name], made[1][name])
    assert not np.array_equal(made[0][name], made[2][name])
    downs = [
        np.array(built(settings_of("lcm-lora", lora__rank=2, train__seed=seed), model("sd")).modules["unet"]
                 .mid_block.resnets[0].conv1.lora_down)
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert np.array_equal(downs[0], downs[1])
    assert not np.array_equal(downs[0], downs[2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_frozen_weights_are_as_they_are_computed_with_and_trained_ones_float32(model, dtype):
    types = {
        name: {str(value.dtype).rpartition(".")[2] for _, value in tree_flatten(part)}
        for name, part in _parts(built(settings_of("lcd", train__dtype=dtype), model("sd"))).items()
    }
    assert types["student"] == {"float32"}
    assert types["teacher"] == {dtype, "float32"}  # the embeddings and the head stay float32
    adapted = built(settings_of("lcm-lora", train__dtype=dtype, lora__rank=2), model("sd"))
    trained = dict(tree_flatten(adapted.modules["unet"].trainable_parameters()))
    assert {value.dtype for value in trained.values()} == {mx.float32}
    frozen, taught = (dict(tree_flatten(one.parameters())) for one in (adapted.modules["unet"], adapted.teacher))
    assert all(frozen[name] is taught[name] for name in taught)  # in memory once
    assert str(taught["conv_in.weight"].dtype).endswith(dtype)


def _parts(trainee: Trainee) -> dict[str, dict]:
    return {"student": trainee.modules["unet"].parameters(), "teacher": trainee.teacher.parameters()}


# --- how the result is sampled


@pytest.mark.parametrize(
    ("method", "name", "overrides", "expected"),
    [
        ("lcd", "sd", {}, ("lcm", 9.0, 4)),
        ("lcd", "sd", {"objective__w_min": 1.0, "objective__w_max": 2.0}, ("lcm", 2.5, 4)),
        ("lcd", "sd", {"lora__rank": 2}, ("lcm", 1.0, 4)),
        ("lcm-lora", "xl", {"lora__rank": 2}, ("lcm", 1.0, 4)),
        ("lcf", "lcm", {}, ("lcm", 8.5, 4)),
        ("teacher", "sd", {}, ("ddim", 7.5, 50)),
    ],
)
def test_how_the_result_is_sampled(model, method, name, overrides, expected):
    settings = built(settings_of(method, **overrides), model(name)).pipeline.settings
    assert (settings.sampler, settings.guidance_scale, settings.steps) == expected


@pytest.mark.parametrize("method", ["teacher", "cd", "ict", "ctm"])
def test_a_pixel_model_is_what_the_method_makes(model, method):
    trainee = built(settings_of(method), model("edm"))
    made = {"teacher": "edm", "ctm": "trajectory"}.get(method, "consistency")
    assert trainee.pipeline.settings.parameterization == made
    assert (trainee.teacher is not None) == (method in ("cd", "ctm"))
    scales = {"teacher": 40, "cd": 40, "ctm": 18, "ict": 1281}[method]
    assert trainee.pipeline.schedule.num_scales == scales


# --- the data


def batches_of(settings: Settings, trainee: Trainee, data: PictureData):
    return make_batches(settings, trainee, data)


REFUSED_DATA = {
    "pixels of another size": ("ct", "edm", {"data__size": 32}, "this network makes pictures of 16 by 16 pixels"),
    "pixels in buckets": ("ct", "edm", {"data__buckets": True}, "is for latent models"),
    "half a latent": ("lcd", "sd", {"data__size": 36}, "have to be multiples of 8"),
    "half a latent in buckets": ("lcd", "sd", {"data__buckets": True, "data__bucket_step": 12}, "multiples of 8"),
    "no size": ("lcd", "no size", {}, "is missing, and the model does not say its own"),
    "distance of pictures": ("lcd", "sd", {"objective__distance": "lpips"}, "this model makes latents"),
    "levels of pixels": ("teacher", "sd", {"objective__mean": 0.0}, "is for pixel-space models"),
    "prompts of pixels": ("teacher", "edm", {"objective__empty_prompts": 0.2}, "this one has no prompts"),
    "a skip beyond the noise": ("lcf", "lcm", {"objective__skip": 1001}, "the model has 1000 timesteps"),
    "timesteps of pixels": ("teacher", "edm", {"objective__shift": 3.0}, "no timesteps"),
    "no LPIPS": ("ict", "edm", {"objective__distance": "lpips"}, "needs the network's weights"),
}


@pytest.mark.parametrize("case", REFUSED_DATA)
def test_data_and_objective_that_do_not_suit_are_refused(model, captioned, labelled, case):
    method, name, overrides, message = REFUSED_DATA[case]
    settings = settings_of(method, **overrides)
    trainee = built(settings, model(name))
    data = labelled if trainee.space == "pixel" else captioned
    with pytest.raises(UsageError, match=message):
        make_objective(settings, trainee, make_batches(settings, trainee, data))


def test_lpips_has_to_be_lpips(model, labelled):
    settings = settings_of("ict", objective__distance="lpips", objective__lpips=str(model("vae")))
    trainee = built(settings, model("edm"))
    with pytest.raises(ModelError, match="is a AutoencoderKL, expected LPIPS"):
        make_objective(settings, trainee, make_batches(settings, trainee, labelled))


def test_labels_go_where_they_are_known(model, captioned, labelled):
    conditional = settings_of("ct")
    rows = make_batches(conditional, built(conditional, model("edm")), labelled).load(0, 0, 2)
    assert set(rows) == {"x0", "class_labels"}
    with pytest.raises(UsageError, match="the model knows 10 classes, the data has no labels"):
        make_batches(conditional, built(conditional, model("edm")), captioned)
    few = settings_of("ct", {"unet": PIXEL_UNET | {"num_class_embeds": 1}})
    with pytest.raises(UsageError, match="the model knows 1 classes, the data has 2"):
        make_batches(few, built(few, num_classes=2), labelled)
    new = settings_of("ct", {"unet": PIXEL_UNET})
    assert built(new, num_classes=2).modules["unet"].config.num_class_embeds == 2
    plain = built(new)
    assert plain.modules["unet"].config.num_class_embeds is None
    assert set(make_batches(new, plain, labelled).load(0, 0, 2)) == {"x0"}


COMPILED = [("cd", "edm"), ("ict", "edm"), ("ctm", "edm"), ("lcd", "sd"), ("lcm-lora", "lcm")]


@pytest.mark.parametrize(("method", "name"), COMPILED)
def test_a_compiled_step_of_what_begins_with_a_model_is_the_same_step(model, captioned, labelled, method, name):
    """A student begins with its teacher's arrays, and a compiled step may not meet what it is given by another way."""

    def trainer(compiled: bool) -> Trainer:
        settings = settings_of(method, train__compile=compiled, train__parallel=1, train__learning_rate=1e-3)
        trainee = built(settings, model(name), num_classes=2)
        batches = make_batches(settings, trainee, labelled if name == "edm" else captioned)
        return Trainer(trainee.modules, make_objective(settings, trainee, batches), batches, settings.train)

    eager, compiled = trainer(False), trainer(True)
    for _ in range(2):
        assert compiled.advance().loss == pytest.approx(eager.advance().loss, rel=1e-4)
    for (key, one), (other_key, other) in zip(tree_flatten(compiled.student), tree_flatten(eager.student), strict=True):
        assert key == other_key
        assert mx.abs(one - other).max().item() < 1e-4, key


@pytest.mark.parametrize("name", ["sd", "tiny vae in sd"])
def test_latents_are_those_of_the_models_autoencoder(model, captioned, name):
    settings = settings_of("lcd")
    trainee = built(settings, model(name))
    batches = make_batches(settings, trainee, captioned)
    rows = batches.load(0, 0, 2)
    shown = [captioned.read(index) for index in batches.order.batch(0)[:2]]
    pixels = mx.array(np.stack([np.asarray(cropped(picture)) for picture in shown]).astype(np.float32) / 127.5 - 1)
    noise = mx.random.normal((2, LATENTS, LATENTS, 4), key=mx.random.key(0))
    found = rows["mean"] + rows["std"] * noise
    expected = trainee.pipeline.autoencoder.encode_scaled(pixels, noise)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-5)
    assert bool(mx.any(rows["std"] != 0)) == (name == "sd")


def cropped(picture: Image.Image) -> Image.Image:
    left = (picture.width - PIXELS) // 2
    return picture.crop((left, 0, left + PIXELS, PIXELS))


@pytest.mark.parametrize("name", ["xl", "xl with empty prompts"])
def test_xl_is_told_sizes_pooled_text_and_what_no_prompt_is(model, captioned, name):
    settings = settings_of("lcd")
    trainee = built(settings, model(name))
    batches = make_batches(settings, trainee, captioned)
    objective = make_objective(settings, trainee, batches)
    rows = batches.load(0, 0, 2)
    indices = batches.order.batch(0)[:2]
    widths = [captioned.sizes[index][1] for index in indices]
    expected = [[PIXELS, width, 0, (width - PIXELS) // 2, PIXELS, PIXELS] for width in widths]
    assert rows["time_ids"].tolist() == expected
    features = trainee.pipeline.encode_prompt([CAPTIONS[index] for index in indices])
    np.testing.assert_allclose(np.array(rows["states"]), np.array(features.states), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(rows["pooled"]), np.array(features.pooled), rtol=1e-4, atol=1e-5)
    empty = objective.model.empty
    assert set(empty) == {"states", "pooled"}
    if name == "xl":
        assert not any(mx.any(value != 0).item() for value in empty.values())
    else:
        features = trainee.pipeline.encode_prompt([""])
        np.testing.assert_allclose(np.array(empty["pooled"]), np.array(features.pooled), rtol=1e-4, atol=1e-5)
    report = Trainer(trainee.modules, objective, batches, settings.train).advance()
    assert report.is_finite


def test_velocities_stay_velocities(model, captioned, tmp_path):
    settings = settings_of("lcd")
    trainee = built(settings, model("sd2"))
    objective = make_objective(settings, trainee, make_batches(settings, trainee, captioned))
    assert objective.model.schedule.prediction_type == "v_prediction"
    folder = write_model(tmp_path / "model", trainee, {})
    assert read_schedule(folder / "scheduler") == read_schedule(model("sd2") / "scheduler")


def stores(settings: Settings, ref: Path, data: PictureData) -> dict[str, str]:
    """The folders of features that a run of its own cache makes: "latents" and "prompts" => name."""
    root = cache_root() / "features"
    shutil.rmtree(root, ignore_errors=True)
    make_batches(settings, built(settings, ref), data)
    names = [path.name for path in root.iterdir() if path.name != "prepared"]
    return {name.partition("-")[0]: name for name in names}


def test_features_are_known_by_what_makes_them(model, captioned, tmp_path):
    settings = settings_of("lcd")
    first = stores(settings, model("sd"), captioned)
    assert set(first) == {"latents", "prompts"}

    def changed(part: str) -> dict[str, str]:
        folder = tmp_path / part
        shutil.copytree(model("sd"), folder)
        module = load_model(folder / part, "float32")
        _, array = tree_flatten(module.parameters())[0]
        module.update(tree_map(lambda x: x + (x is array) * 1e-3, module.parameters()))
        shutil.rmtree(folder / part)
        component_folder(folder / part, module)
        return stores(settings, folder, captioned)

    assert changed("unet") == first
    of_text, of_pictures = changed("text_encoder"), changed("vae")
    assert of_text["latents"] == first["latents"] == stores(settings, model("sd"), captioned)["latents"]
    assert of_pictures["prompts"] == first["prompts"]
    assert len({of_text["prompts"], first["prompts"]}) == len({of_pictures["latents"], first["latents"]}) == 2

    copy = tmp_path / "beside"
    shutil.copytree(model("sd"), copy)
    (copy / "vae" / "notes.txt").write_text("mine")
    assert stores(settings, copy, captioned) == first
    map_of_tokens = copy / "tokenizer" / "special_tokens_map.json"
    map_of_tokens.write_text(json.dumps({"pad_token": "!"}))
    assert stores(settings, copy, captioned)["prompts"] != first["prompts"]
    half = stores(settings_of("lcd", train__dtype="bfloat16"), model("sd"), captioned)
    assert not set(half.values()) & set(first.values())


# --- a text encoder that is trained with the network


POOLED = {
    "unet": LATENT_UNET | {"addition_embed_type": "text_time"},  # as SDXL's, with one text encoder
    "text_encoder": TEXT | {"projection_dim": 12},
}


@pytest.mark.parametrize("parts", [{}, POOLED], ids=["states", "states and pooled text"])
def test_a_text_encoder_is_trained_with_its_network(model, captioned, tmp_path, parts):
    settings = settings_of("teacher", new_latent(model, **parts), train__steps=4, train__learning_rate=0.02)
    trainee = built(settings)
    assert set(trainee.modules) == {"unet", "text_encoder"}
    batches = make_batches(settings, trainee, captioned)
    rows = batches.load(0, 0, 2)
    captions = [CAPTIONS[index] for index in batches.order.batch(0)[:2]]
    assert np.array_equal(np.array(rows["ids"]), np.array(trainee.pipeline.tokenizers[0].encode(captions)))
    assert not list((cache_root() / "features").glob("prompts-*"))  # nothing is encoded before it is trained

    before = {part: values(module) for part, module in trainee.modules.items()}
    trainer = Trainer(trainee.modules, make_objective(settings, trainee, batches), batches, settings.train)
    while trainer.step < 4:
        assert trainer.advance().is_finite
    for part, module in trainee.modules.items():
        trained = trainer.student[part]
        assert trained.keys() == before[part].keys()
        changed = [name for name in trained if not np.array_equal(np.array(trained[name]), before[part][name])]
        # SDXL's states are those before the last layer, so its last half trains the pooled text alone.
        assert len(changed) > 0.8 * len(trained), part
        module.load_weights(list(trained.items()))

    folder = write_model(tmp_path / "model", trainee, {"method": "teacher"})
    loaded = mlx_cm.load(folder, "float32")
    assert loaded.settings.sampler == "ddim"
    (picture,) = loaded.generate("a red cat", seed=1, steps=2)
    (expected,) = trainee.pipeline.generate("a red cat", seed=1, steps=2)
    assert picture.tobytes() == expected.tobytes()
    for suffix in ("text_encoder", "unet"):
        found = values(load_model(folder / suffix, "float32"))
        assert all(np.array_equal(found[name], np.array(value)) for name, value in trainer.student[suffix].items())


# --- what is written


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_model_is_written_as_its_modules_are(model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model("xl"), source)
    for junk in ("notes/a.txt", "vae/.cache/b", "text_encoder/c.py", "tokenizer/d.bin"):
        (source / junk).parent.mkdir(parents=True, exist_ok=True)
        (source / junk).write_text("mine")
    trainee = built(settings_of("lcd"), source)
    unet = trainee.modules["unet"]
    unet.update(tree_map(lambda x: x + 0.01, unet.parameters()))
    told = {"method": "lcd", "steps": 7}
    folder = write_model(tmp_path / "model", trainee, told)

    written, given = files_of(folder), files_of(source)
    expected = {"unet/config.json", "unet/model.safetensors", "scheduler/scheduler_config.json", MODEL_INDEX}
    copied = {name for name in given if name.partition("/")[0] not in ("unet", "scheduler", "notes", MODEL_INDEX)}
    copied = {name for name in copied if given[name] != b"mine"}
    assert {name.partition("/")[0] for name in copied} == {
        "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    }  # fmt: skip
    assert set(written) == expected | copied
    assert all(written[name] == given[name] for name in copied)

    index = read_model_index(folder)
    assert set(index.weights) == {name for name in written if name.endswith(".safetensors")}
    assert all(sha256_file(folder / name) == digest for name, digest in index.weights.items())
    assert index.components == read_model_index(source).components
    provenance = index.provenance["training"]
    assert (provenance["method"], provenance["steps"]) == ("lcd", 7)
    assert (provenance["base"], provenance["base_weights"]) == (
        "someone/xl", read_model_index(source).weights,
    )  # fmt: skip

    loaded = mlx_cm.load(folder, "float32")
    found, wanted = values(loaded.backbone), values(unet)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert loaded.settings == trainee.pipeline.settings
    (picture,), (other,) = (one.generate("a cat", seed=2, steps=1) for one in (loaded, trainee.pipeline))
    assert picture.tobytes() == other.tobytes()
    assert write_model(folder, trainee, told) == folder  # in the place of the old one
    assert files_of(folder) == written


@pytest.mark.parametrize("kind", ["pixel", "latent", "autoencoder"])
def test_nothing_of_this_machine_is_in_a_model(model, captioned, tmp_path, kind):
    trainee = {
        "pixel": lambda: built(settings_of("ict"), model("edm")),
        "latent": lambda: built(settings_of("teacher", new_latent(model))),
        "autoencoder": lambda: built(settings_of("autoencoder"), model("vae")),
    }[kind]()
    written = files_of(write_model(tmp_path / "model", trainee, {"method": kind}))
    for place in (tmp_path, model("vae").parent, tiny_latent.vocabulary_folder(), Path.home(), Path.cwd()):
        assert not [name for name, content in written.items() if str(place).encode() in content]


def test_the_parts_of_a_converted_model_are_those_that_it_was_converted_with(captioned, tmp_path):
    """What diffusers' folder calls its parts is what the trained model has, converted once."""
    scheduler = lambda **values: DDIMScheduler(clip_sample=False, **values)  # noqa: E731
    theirs = tiny_latent.reference_pipeline("xl", StableDiffusionXLPipeline, scheduler)
    theirs.save_pretrained(tmp_path / "published")
    settings = settings_of("lcm-lora", lora__rank=2)
    trainee = built(settings, tmp_path / "published")
    assert set(trainee.copied) == {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert all(tmp_path / "published" not in path.parents for path in trainee.copied.values())
    distilled = built(settings_of("lcd"), tmp_path / "published")
    folder = write_model(tmp_path / "model", distilled, {})
    assert mlx_cm.load(folder).is_xl
    assert mlx_cm.load(folder).settings.force_zeros_for_empty_prompt


def test_an_autoencoder_is_written_by_itself(model, tmp_path):
    for name in ("vae", "sd"):  # by itself, or of a model
        trainee = built(settings_of("autoencoder"), model(name))
        folder = write_model(tmp_path / name, trainee, {})
        assert set(files_of(folder)) == {MODEL_INDEX, "vae/config.json", "vae/model.safetensors"}
        wanted, found = values(native_autoencoder("kl")), values(mlx_cm.load_component(folder, "float32"))
        assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
        again = built(settings_of("teacher", new_latent(model, vae=str(folder))))  # what another run takes
        assert type(again.pipeline.autoencoder).__name__ == "AutoencoderKL"


def test_encoders_are_released_where_nothing_is_to_be_seen(model, captioned):
    settings = settings_of("lcm-lora", lora__rank=2)
    trainee = built(settings, model("sd"))
    pipeline = trainee.pipeline
    batches = make_batches(settings, trainee, captioned)
    objective = make_objective(settings, trainee, batches)
    mx.eval(pipeline.autoencoder.parameters(), pipeline.text_encoders[0].parameters())
    held = [value for part in (pipeline.autoencoder, *pipeline.text_encoders) for value in values(part).values()]
    before = mx.get_active_memory()
    trainee.release_encoders()
    assert mx.get_active_memory() <= before - sum(value.nbytes for value in held)
    assert Trainer(trainee.modules, objective, batches, settings.train).advance().is_finite
    with pytest.raises(UsageError, match="released"):
        pipeline.encode_prompt(["a cat"])
    with pytest.raises(UsageError, match="released"):
        pipeline.decode(mx.zeros((1, LATENTS, LATENTS, 4)))
    pixel = built(settings_of("ict"), model("edm"))
    pixel.release_encoders()  # has none
    assert isinstance(pixel.pipeline.backbone, UNet2D)
