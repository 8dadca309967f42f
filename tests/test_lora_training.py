"""Training LoRA: the adapted network against peft's, what is written against diffusers and peft, through whole runs."""

import functools
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import tiny_latent
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from mlx.utils import tree_flatten
from parity import TOLERANCE, channels_last, copy_weights, randomise, relative_error
from PIL import Image
from safetensors import safe_open
from tiny_latent import UNETS, reference_pipeline

import mlx_cm
from mlx_cm.config import config_from_dict
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.lora import (
    ADAPTED,
    LCM_LORA_TARGETS,
    LoraLayer,
    attach_lora,
    attached_layers,
    fuse,
    lora_targets,
)
from mlx_cm.models.layers import Conv2d
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.quantization import quantize_model

RANK, ALPHA = 3, 5.0
LEVELS = 0.6  # of 255: diffusers' pictures are compared before they become whole numbers
PROMPT = "a red (apple) on Straße 7!"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', on schedulers without steps_offset


@pytest.fixture(scope="module", autouse=True)
def small_models():
    """Layers this small are slower on several threads, and the collector need not look through the oracles."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# --- one network, adapted here and by peft


def pair(kind: str) -> tuple[UNet2DCondition, UNet2DConditionModel]:
    """Ours and diffusers', with the same random weights."""
    torch.manual_seed(2)
    theirs = randomise(UNet2DConditionModel(**UNETS[kind]), seed=2, scale=0.1)
    config = config_from_dict(UNet2DConditionConfig, dict(theirs.config), "config.json")
    return copy_weights(UNet2DCondition(config), theirs), theirs


def adapted_pair(kind: str, rank: int, alpha: float) -> tuple[UNet2DCondition, UNet2DConditionModel]:
    """Both with adapters of the same random values; the learnt part of neither is zero."""
    ours, theirs = pair(kind)
    attach_lora(ours, LCM_LORA_TARGETS, rank=rank, alpha=alpha, key=mx.random.key(0))
    theirs.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LCM_LORA_TARGETS)))
    generator = torch.Generator().manual_seed(4)
    modules = dict(ours.named_modules())
    for path, down, up in peft_parameters(theirs):
        for parameter in (down, up):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        modules[path].lora_down, modules[path].lora_up = channels_last(down), channels_last(up)
    return ours, theirs


def peft_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
    """(path of the module, A, B) of all adapters of a model."""
    parameters, suffix = dict(model.named_parameters()), ".lora_A.default.weight"
    downs = [name for name in parameters if name.endswith(suffix)]
    return [
        (name.removesuffix(suffix), parameters[name], parameters[name.replace("lora_A", "lora_B")]) for name in downs
    ]


def inputs(kind: str, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """(latents, timesteps, text states, further conditions)."""
    generator = torch.Generator().manual_seed(5)
    config = UNETS[kind]
    latents = torch.randn((2, 4, height, width), generator=generator)
    states = torch.randn((2, 5, config["cross_attention_dim"]), generator=generator)
    added = {}
    if "addition_embed_type" in config:
        added["text_embeds"] = torch.randn((2, 20), generator=generator)
        added["time_ids"] = torch.randint(0, 64, (2, 6), generator=generator)
    return latents, torch.tensor([999, 259]), states, added


def ours_called(model: nn.Module, given: tuple) -> mx.array:
    *arrays, added = given
    return model(*map(channels_last, arrays), **{name: channels_last(value) for name, value in added.items()})


def theirs_called(model: torch.nn.Module, given: tuple) -> torch.Tensor:
    *arrays, added = given
    return model(*arrays, added_cond_kwargs=added or None).sample


CASES = [("base", 8, 6), ("base", 9, 7), ("xl", 8, 6), ("xl", 5, 8)]


@pytest.mark.parametrize(("kind", "height", "width"), CASES)
def test_layers_outputs_and_gradients_are_those_of_peft(kind, height, width):
    ours, theirs = adapted_pair(kind, RANK, ALPHA)
    given = inputs(kind, height, width)
    expected = theirs_called(theirs, given)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    (expected * weight).sum().backward()

    def loss(parameters: dict) -> mx.array:
        ours.update(parameters)
        return (ours_called(ours, given) * channels_last(weight)).sum()

    gradients = dict(tree_flatten(mx.grad(loss)(ours.trainable_parameters())))
    assert relative_error(ours_called(ours, given), expected) < TOLERANCE
    of_peft = {}
    for path, down, up in peft_parameters(theirs):
        of_peft |= {f"{path}.lora_down": down.grad, f"{path}.lora_up": up.grad}
    assert gradients.keys() == of_peft.keys()  # and nothing else is trained
    whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in of_peft.values()))
    for name, gradient in of_peft.items():
        floor = 1e-6 * whole / float(torch.linalg.norm(gradient))  # what is nothing beside the rest may be rounded off
        assert relative_error(gradients[name], gradient) < max(TOLERANCE, floor), name


def test_every_kind_of_layer_is_among_them():
    ours, _ = pair("base")
    attach_lora(ours, LCM_LORA_TARGETS, rank=1, alpha=1.0, key=mx.random.key(0))
    modules = dict(ours.named_modules())
    found = {
        (type(modules[path]).__name__, layer.down.shape[1:-1], getattr(modules[path], "stride", None))
        for path, layer in attached_layers(ours).items()
    }
    assert found == {
        ("AdaptedLinear", (), None),
        ("AdaptedConv2d", (1, 1), 1),
        ("AdaptedConv2d", (3, 3), 1),
        ("AdaptedConv2d", (3, 3), 2),
    }
    assert any("upsamplers.0.conv" in path for path in attached_layers(ours))


@pytest.mark.parametrize("height", [64, 65])
@pytest.mark.parametrize("kind", ["plain", "strided", "doubled"])
def test_convolutions_on_maps_that_are_computed_by_other_means(kind, height):
    """Large maps of many channels take other ways on a CPU; both the map's and the adapter's gradient pass them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 16, height // 2 if kind == "doubled" else height, 64), generator=generator)
    weight, down = (torch.randn(shape, generator=generator) for shape in ((24, 16, 3, 3), (16, 16, 3, 3)))
    up = torch.randn((24, 16, 1, 1), generator=generator).requires_grad_()
    x.requires_grad_()
    down.requires_grad_()

    stride = 2 if kind == "strided" else 1
    wide = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest") if kind == "doubled" else x
    convolution = torch.nn.functional.conv2d
    narrow = convolution(wide, down, stride=stride, padding=1)
    expected = convolution(wide, weight, stride=stride, padding=1) + convolution(narrow, up) * (ALPHA / 16)
    expected.square().sum().backward()

    layer = nn.Sequential(Conv2d(16, 24, 3, stride=stride, padding=1))
    layer.layers[0].weight = channels_last(weight)
    attach_lora(layer, ["layers.0"], rank=16, alpha=ALPHA, key=mx.random.key(0))
    convolved = layer.layers[0]

    def loss(x: mx.array, down: mx.array, up: mx.array) -> mx.array:
        convolved.lora_down, convolved.lora_up = down, up
        return mx.square(convolved(x, upsample=kind == "doubled")).sum()

    value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*map(channels_last, (x, down, up)))
    assert value.item() == pytest.approx(expected.square().sum().item(), rel=TOLERANCE)
    for found, wanted in zip(gradients, (x, down, up), strict=True):
        assert relative_error(found, wanted.grad) < TOLERANCE


@pytest.mark.parametrize("kind", ["base", "xl"])
def test_nothing_changes_at_first(kind):
    ours, _ = pair(kind)
    given = inputs(kind, 8, 6)
    before = np.array(ours_called(ours, given))
    names = {name for name, _ in tree_flatten(ours.parameters())}
    attach_lora(ours, LCM_LORA_TARGETS, rank=RANK, alpha=ALPHA, key=mx.random.key(0))
    np.testing.assert_array_equal(np.array(ours_called(ours, given)), before)
    trained = {name for name, _ in tree_flatten(ours.trainable_parameters())}
    assert {name for name, _ in tree_flatten(ours.parameters())} - trained == names  # under their old names
    assert {name.rpartition(".")[2] for name in trained} == {"lora_down", "lora_up"}
    assert all(value.dtype == mx.float32 for _, value in tree_flatten(ours.trainable_parameters()))


def test_the_first_values_are_distributed_as_pefts():
    layer, key = nn.Sequential(Conv2d(64, 32, 3)), mx.random.key(3)
    attach_lora(layer, ["0"], rank=32, alpha=1.0, key=key)
    down = np.array(layer.layers[0].lora_down)
    reference = torch.nn.Sequential(torch.nn.Conv2d(64, 32, 3))
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=32, target_modules=["0"]))
    ((_, expected, _),) = peft_parameters(theirs)
    bound = (64 * 9) ** -0.5
    assert np.abs(down).max() <= bound
    assert expected.abs().max().item() <= bound
    assert down.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert down.std() == pytest.approx(expected.std().item(), rel=0.02)
    assert abs(down.mean()) < 0.02 * bound
    again = attach_lora(nn.Sequential(Conv2d(64, 32, 3)), ["0"], rank=32, alpha=1.0, key=key)
    np.testing.assert_array_equal(np.array(again.layers[0].lora_down), down)


def test_layers_do_not_share_their_draws():
    ours, _ = pair("base")
    attach_lora(ours, ["to_q", "to_out.0"], rank=2, alpha=1.0, key=mx.random.key(0))
    downs = [np.array(layer.down).tobytes() for layer in attached_layers(ours).values()]
    assert len(set(downs)) == len(downs) > 4


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (1, 0.25), (4, 8.0), (7, 3.0)])
def test_an_adapter_beside_the_weights_is_one_within_them(rank, alpha):
    """alpha / rank is the strength, in training as in what is written and fused."""
    ours, _ = adapted_pair("base", rank, alpha)
    layers = attached_layers(ours)
    assert {(layer.rank, layer.alpha) for layer in layers.values()} == {(rank, alpha)}
    plain, _ = pair("base")
    given = inputs("base", 8, 6)
    without = np.array(ours_called(plain, given))
    fuse(plain, layers)
    beside, within = (np.array(ours_called(model, given)) for model in (ours, plain))
    assert np.linalg.norm(beside - within) < TOLERANCE * np.linalg.norm(within)
    assert np.linalg.norm(without - within) > 100 * TOLERANCE * np.linalg.norm(within)


def test_half_precision_keeps_its_type():
    ours, _ = adapted_pair("base", RANK, ALPHA)
    given = inputs("base", 8, 6)
    expected = np.array(ours_called(ours, given))
    ours.set_dtype(mx.bfloat16)
    assert {value.dtype for _, value in tree_flatten(ours.parameters())} == {mx.bfloat16}
    block = ours.down_blocks[0].resnets[0]
    assert block.conv1(mx.zeros((1, 8, 6, 16), mx.bfloat16)).dtype == mx.bfloat16
    assert block.time_emb_proj(mx.zeros((1, 64), mx.bfloat16)).dtype == mx.bfloat16
    found = np.array(ours_called(ours, given).astype(mx.float32))
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("names", "rank", "alpha", "message"),
    [
        (["to_q", "to_x", "conv9"], 4, 4.0, r"to_x, conv9: no linear layer or convolution"),
        (["norm1"], 4, 4.0, r"norm1: no linear layer or convolution"),
        (["to_q"], 0, 4.0, r"rank 0"),
        (["to_q"], 4, math.inf, r"alpha inf"),
    ],
)
def test_what_cannot_be_attached_is_refused_before_anything_changes(names, rank, alpha, message):
    ours, _ = pair("base")
    with pytest.raises(UsageError, match=message):
        attach_lora(ours, names, rank=rank, alpha=alpha, key=mx.random.key(0))
    assert attached_layers(ours) == {}
    assert len(tree_flatten(ours.trainable_parameters())) == len(tree_flatten(ours.parameters()))


def test_a_quantised_layer_is_refused():
    config = UNet2DConditionConfig(**UNETS["base"] | {"block_out_channels": (32, 64)})
    model = quantize_model(UNet2DCondition(config), 8)
    with pytest.raises(ModelError, match=r"to_q: is a QuantizedLinear, to which no LoRA is trained"):
        attach_lora(model, ["to_q"], rank=2, alpha=2.0, key=mx.random.key(0))
    assert attached_layers(model) == {}


def test_a_layer_gets_one_adapter():
    ours, _ = pair("base")
    attach_lora(ours, ["to_q"], rank=2, alpha=2.0, key=mx.random.key(0))
    with pytest.raises(ModelError, match="is a AdaptedLinear, to which no LoRA is trained"):
        attach_lora(ours, ["to_q"], rank=2, alpha=2.0, key=mx.random.key(0))


def test_other_models_keep_their_layers():
    """The class of one layer changes, not the class of all."""
    ours, other = pair("base")[0], pair("base")[0]
    attach_lora(ours, LCM_LORA_TARGETS, rank=2, alpha=2.0, key=mx.random.key(0))
    assert len(attached_layers(ours)) == len(lora_targets(other, LCM_LORA_TARGETS))
    assert attached_layers(other) == {}
    assert not [module for _, module in other.named_modules() if isinstance(module, tuple(ADAPTED.values()))]


# --- whole runs


DDIM = functools.partial(DDIMScheduler, clip_sample=False)
FOLDERS = {
    "sd": (StableDiffusionPipeline, DDIM),
    "sd2": (StableDiffusionPipeline, DDIM),
    "xl": (StableDiffusionXLPipeline, DDIM),
    "lcm": (LatentConsistencyModelPipeline, LCMScheduler),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Callable[[str], Path]:
    """A folder of diffusers for each family, written once."""
    root, written = tmp_path_factory.mktemp("published"), {}

    def folder(family: str) -> Path:
        if family not in written:
            written[family] = root / family
            reference_pipeline(family, *FOLDERS[family]).save_pretrained(written[family])
        return written[family]

    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four pictures with captions."""
    folder = tmp_path_factory.mktemp("data")
    for number, caption in enumerate(("a red cat", "two cats", "", "a red apple")):
        tiny_latent.picture(seed=number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


QUICK = ("train.steps=2", "train.batch_size=2", "train.learning_rate=0.02", "train.sample_every=0")


def trained(run, method: str, model: Path, data: Path, *settings: str) -> Path:
    """What a short run of the program has made."""
    options = [word for setting in (*QUICK, *settings) for word in ("--set", setting)]
    done = run("train", method, "--data", data, "--model", model, "-o", "run", "-q", *options)
    assert done.code == 0, done.err
    return Path(done.lines[-1]).resolve()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def theirs_generated(pipeline: DiffusionPipeline, **settings) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, generator=generator(), num_inference_steps=2, output_type="np", **settings).images * 255


def ours_generated(pipeline, **settings) -> np.ndarray:
    made = pipeline.generate(PROMPT, seed=3, rng="torch", steps=2, **settings)
    return np.stack([np.asarray(image) for image in made]).astype(np.float64)


def unet_inputs(unet: UNet2DConditionModel) -> tuple[tuple, dict, dict]:
    """(what both sides get, further conditions of theirs, of ours)."""
    draws = torch.Generator().manual_seed(8)
    shapes = ((2, 4, 5, 4), (2, 6, unet.config.cross_attention_dim))
    x, states = (torch.randn(shape, generator=draws) for shape in shapes)
    arrays = (x, torch.tensor([500, 20]), states)
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.randn((2, 20), generator=draws), "time_ids": torch.ones((2, 6))}
        return arrays, {"added_cond_kwargs": added}, {name: channels_last(value) for name, value in added.items()}
    if unet.config.time_cond_proj_dim:
        cond = torch.randn((2, unet.config.time_cond_proj_dim), generator=draws)
        return arrays, {"timestep_cond": cond}, {"timestep_cond": channels_last(cond)}
    return arrays, {}, {}


@pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        ("lcm-lora", "sd", ("lora.rank=2", "lora.alpha=3")),
        ("lcm-lora", "sd2", ("lora.rank=1",)),
        ("lcm-lora", "xl", ("lora.rank=2", "train.recompute=true")),
        ("lcd", "sd", ("lora.rank=2",)),
        ("lcf", "lcm", ("lora.rank=3", "lora.alpha=1.5")),
        ("lcm-lora", "lcm", ("lora.rank=2",)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_trained_adapter_is_what_diffusers_and_peft_load(run, published, data, method, family, settings):
    folder = trained(run, method, published(family), data, *settings)
    base = published(family)
    plain, adapted = mlx_cm.load(base), mlx_cm.load(base, lora=[str(folder / "pytorch_lora_weights.safetensors")])
    assert adapted.settings.sampler == "lcm"  # the file says so

    theirs = DiffusionPipeline.from_pretrained(base)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    guidance = {} if family == "lcm" else {"guidance_scale": 1.0}
    size = {"height": 40, "width": 32}
    theirs.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    expected = theirs_generated(theirs, **guidance, **size)
    made = ours_generated(adapted, **size)
    assert np.abs(made - expected).max() < LEVELS
    without = ours_generated(plain, sampler="lcm", **size)
    assert np.abs(made - without).max() > 4 * LEVELS  # it has an effect

    unet = peft.PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base / "unet"), folder / "peft")
    arrays, theirs_added, ours_added = unet_inputs(unet.get_base_model())
    with torch.no_grad():
        expected = unet(*arrays, **theirs_added).sample
    found = adapted.backbone(*map(channels_last, arrays), **ours_added)
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(plain.backbone(*map(channels_last, arrays), **ours_added), expected) > 10 * TOLERANCE


def test_an_adapter_says_what_it_is_and_nothing_of_this_machine(run, published, data, tmp_path):
    folder = trained(run, "lcm-lora", published("sd"), data, "lora.rank=2", 'lora.targets=["to_q", "conv1"]')
    files = [folder / "pytorch_lora_weights.safetensors", folder / "peft" / "adapter_model.safetensors"]
    for file in files:
        with safe_open(file, "numpy") as opened:
            told = opened.metadata()
        assert told["mlx_cm.sampler"] == "lcm"
        assert (told["method"], told["steps"], told["seed"]) == ("lcm-lora", "2", "0")
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"to_q", "conv1"}
    text = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for place in (tmp_path, published("sd"), data, Path.home()):
        assert str(place).encode() not in text
    described = json.loads(run("inspect", files[0], "--json").out)
    assert described["sampler"] == "lcm"
    assert described["ranks"] == [2]


def test_an_adapter_is_known_by_the_layers_it_has(run, published, data):
    """Weights of the base are not in its files."""
    folder = trained(run, "lcm-lora", published("sd"), data, "lora.rank=2")
    with safe_open(folder / "pytorch_lora_weights.safetensors", "numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    modules = {name.partition(".")[0] for name in tensors}
    backbone = mlx_cm.load(published("sd")).backbone
    assert len(modules) == len(lora_targets(backbone, LCM_LORA_TARGETS))
    assert {name.partition(".")[2] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(np.isfinite(value).all() for value in tensors.values())
    assert any(np.abs(value).max() > 0 for name, value in tensors.items() if name.endswith("lora_up.weight"))


def test_a_teacher_with_an_adapter_names_no_sampler(run, published, data):
    """An adapter that is trained by diffusion fits every way to sample; a base model stays a base model."""
    folder = trained(run, "teacher", published("sd"), data, "lora.rank=2")
    with safe_open(folder / "pytorch_lora_weights.safetensors", "numpy") as opened:
        assert "mlx_cm.sampler" not in opened.metadata()
    assert mlx_cm.load(published("sd"), lora=[str(folder)]).settings.sampler is None


@pytest.mark.parametrize(("method", "rank"), [("teacher", 2), ("teacher", 0), ("lcm-lora", 2)])
def test_samples_show_a_base_model_in_training(run, published, data, method, rank):
    """By itself it waits for an adapter that distils it; what is trained is shown nevertheless."""
    shown = ("train.sample_every=1", "train.steps=1", "samples.count=1", "samples.steps=[2]")
    folder = trained(run, method, published("sd"), data, f"lora.rank={rank}", *shown)
    (sheet,) = (folder.parent / "samples").iterdir()
    with Image.open(sheet) as picture:
        assert np.asarray(picture).std() > 1


def test_a_distilled_model_is_what_diffusers_loads(run, published, data, tmp_path):
    folder = trained(run, "lcd", published("sd"), data)
    ours = mlx_cm.load(folder)
    assert (ours.settings.sampler, ours.settings.steps) == ("lcm", 4)
    assert ours.settings.guidance_scale == 9.0  # the middle of what it was trained with
    assert ours.backbone.config.time_cond_proj_dim == 256
    assert run("export", folder, tmp_path / "exported").code == 0
    theirs = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "exported")
    made = ours_generated(ours, guidance_scale=5.0)
    assert np.abs(made - theirs_generated(theirs, guidance_scale=5.0)).max() < LEVELS
    plain = mlx_cm.load(published("sd"))
    assert np.abs(made - ours_generated(plain, sampler="lcm")).max() > 4 * LEVELS


def test_rank_and_alpha_of_a_layer_are_told_apart():
    layer = LoraLayer("a", mx.zeros((3, 5)), mx.zeros((4, 3)), 1.5)
    assert (layer.rank, layer.alpha, layer.shape) == (3, 1.5, (4, 5))
