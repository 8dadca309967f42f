"""Converting Stable Diffusion's family: every layout it is published in, every tensor compared with the original."""

import dataclasses
import importlib
import json
import shutil
import sys
import types
from pathlib import Path

import diffusers
import ldm_names
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import (
    AutoencoderKL,
    LatentConsistencyModelPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from latent_configs import LCM_DREAMSHAPER, LCM_SDXL, PUBLISHED, SD15, SD15_INPAINT, SD21, SDXL, SSD_1B
from latent_models import (
    make_text_encoder,
    make_tiny_vae,
    make_unet,
    make_vae,
    text_state,
    tokenizer,
    vocabulary_folder,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlx_cm import load
from mlx_cm.config import config_from_dict
from mlx_cm.convert import MissingParts, Options, base_model_of_card, convert, plan_conversion
from mlx_cm.convert.latent_file import plan_ldm_file
from mlx_cm.convert.readers import Checkpoint
from mlx_cm.convert.schedulers import DISCRETE_SCHEDULERS, discrete_schedule
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import load_model, read_model_index, read_schedule
from mlx_cm.models.autoencoder_kl import SDXL_VAE
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import TensorSource, sha256_file
from mlx_cm.tokenizer import CLIPTokenizer

State = dict[str, torch.Tensor]

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "LCM": lambda: diffusers.LCMScheduler(original_inference_steps=40),
    "TCD": diffusers.TCDScheduler,
    "PNDM": lambda: diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**SD_BETAS, prediction_type="v_prediction"),
}


def pipeline(kind: str, scheduler: str, **parts):
    """One of diffusers' pipelines around shared parts."""
    common = {
        "unet": make_unet(kind),
        "vae": make_vae(),
        "text_encoder": make_text_encoder("open_clip" if kind == "sd2" else "clip"),
        "tokenizer": tokenizer(),
        "scheduler": SCHEDULERS[scheduler](),
    } | parts
    if "sdxl" in kind:
        second = {"text_encoder_2": make_text_encoder("pooled"), "tokenizer_2": tokenizer("!")}
        return StableDiffusionXLPipeline(**common, **second)
    classes = {"lcm": LatentConsistencyModelPipeline, "sd1 inpainting": StableDiffusionInpaintPipeline}
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return classes.get(kind, StableDiffusionPipeline)(**common, **nothing)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline folders as diffusers saves them, by kind and scheduler; to be read only."""
    saved = {}

    def folder(kind: str, scheduler: str = "LCM") -> Path:
        if (kind, scheduler) not in saved:
            saved[kind, scheduler] = tmp_path_factory.mktemp("pipeline") / "model"
            pipeline(kind, scheduler).save_pretrained(saved[kind, scheduler])
        return saved[kind, scheduler]

    return folder


@pytest.fixture
def own(folders, tmp_path):
    """A copy of a pipeline folder to change."""

    def copy(kind: str, scheduler: str = "LCM") -> Path:
        return Path(shutil.copytree(folders(kind, scheduler), tmp_path / "source"))

    return copy


def states(kind: str) -> dict[str, State]:
    """The state of every component of a pipeline, under published names."""
    encoders = {"text_encoder": make_text_encoder("open_clip" if kind == "sd2" else "clip")}
    if "sdxl" in kind:
        encoders["text_encoder_2"] = make_text_encoder("pooled")
    return {
        "unet": make_unet(kind).state_dict(),
        "vae": make_vae().state_dict(),
        **{name: text_state(encoder) for name, encoder in encoders.items()},
    }


def assert_component(folder: Path, state: State) -> None:
    """Every parameter is there, equal bit for bit, kernels channels-last; nothing else is."""
    written = safetensors.numpy.load_file(folder / "model.safetensors")
    assert written.keys() == state.keys()
    for name, value in state.items():
        expected = value.numpy().transpose(0, 2, 3, 1) if value.ndim == 4 else value.numpy()
        np.testing.assert_array_equal(written[name], expected, err_msg=name)
    load_model(folder, "float32")


def assert_model(folder: Path, kind: str, padding: tuple[str, ...] = ("<|endoftext|>", "!")) -> None:
    """A whole model: every component, tokenizers with the ids of transformers, one index that names what is there."""
    expected = states(kind)
    for name, state in expected.items():
        assert_component(folder / name, state)
    index = read_model_index(folder)
    assert index.pipeline == "LatentConsistencyPipeline"
    assert index.components.keys() == {*expected, "scheduler"}
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in expected if "text" in name]
    assert {path.name for path in folder.iterdir()} == {*expected, *tokenizers, "scheduler", "model_index.json"}
    for name, pad_token in zip(tokenizers, padding, strict=False):
        ours = CLIPTokenizer.from_folder(folder / name)
        theirs = tokenizer(pad_token)(["a bear!"], padding="max_length")
        assert ours.encode(["a bear!"]).tolist() == theirs.input_ids


def edit(path: Path, **changes) -> None:
    """Changes fields of a JSON file; None as a value is written, ... removes the field."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


# --- pipeline folders


@pytest.mark.parametrize(
    ("kind", "scheduler", "settings"),
    [
        ("lcm", "LCM", ("lcm", 8.5, False)),
        ("lcm", "PNDM", ("lcm", 8.5, False)),
        ("lcm", "TCD", ("tcd", 8.5, False)),
        ("sd1", "PNDM", (None, 1.0, False)),
        ("sd1", "TCD", ("tcd", 1.0, False)),
        ("sd1 inpainting", "LCM", ("lcm", 1.0, False)),
        ("sd2", "Euler", (None, 1.0, False)),
        ("sdxl", "Euler", (None, 1.0, True)),
        ("lcm sdxl", "LCM", ("lcm", 8.0, True)),
    ],
)
def test_a_pipeline_folder(folders, tmp_path, kind, scheduler, settings):
    source = folders(kind, scheduler)
    report = convert(source, tmp_path / "out", Options(verify=True))
    assert_model(tmp_path / "out", kind)
    assert report.verified
    assert report.notes == ()
    assert report.tensors == sum(map(len, states(kind).values()))
    index = read_model_index(tmp_path / "out")
    assert (
        tuple(index.sampler[key] for key in ("sampler", "guidance_scale", "force_zeros_for_empty_prompt")) == settings
    )
    schedule = read_schedule(tmp_path / "out" / "scheduler")
    theirs = SCHEDULERS[scheduler]()
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    assert schedule.prediction_type == theirs.config.prediction_type
    assert schedule.original_inference_steps == (40 if scheduler == "LCM" else 50)
    files = {file["name"]: file["sha256"] for file in index.provenance["files"]}
    assert "tokenizer/tokenizer_config.json" in files
    assert files["unet/diffusion_pytorch_model.safetensors"] == sha256_file(
        source / "unet" / "diffusion_pytorch_model.safetensors"
    )


@pytest.mark.parametrize(
    "published",
    [
        "LatentConsistencyModelImg2ImgPipeline",
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    ],
)
def test_pipelines_of_the_same_parts(own, published):
    source = own("lcm")
    edit(source / "model_index.json", _class_name=published)
    plan = plan_conversion(source, Options())
    assert (plan.pipeline, plan.family, plan.sampler["sampler"]) == ("LatentConsistencyPipeline", published, "lcm")


@pytest.mark.parametrize("published", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_xl_pipelines_of_the_same_parts(own, published):
    source = own("lcm sdxl")
    edit(source / "model_index.json", _class_name=published, force_zeros_for_empty_prompt=False, add_watermarker=None)
    assert plan_conversion(source, Options()).sampler["force_zeros_for_empty_prompt"] is False


def test_what_is_left_out_is_said(own):
    source = own("lcm")
    entry = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    edit(source / "model_index.json", **entry, vae_encoder=["diffusers", "OnnxRuntimeModel"])
    [note] = plan_conversion(source, Options()).notes
    assert note.startswith("safety_checker, vae_encoder: left out")


def test_a_tiny_autoencoder_in_a_pipeline(own, tmp_path):
    source = own("lcm")
    shutil.rmtree(source / "vae")
    make_tiny_vae().save_pretrained(source / "vae")
    edit(source / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    convert(source, tmp_path / "out")
    assert_component(tmp_path / "out" / "vae", make_tiny_vae().state_dict())
    assert read_model_index(tmp_path / "out").components["vae"] == "AutoencoderTiny"


@pytest.mark.parametrize(
    ("saving", "variant"),
    [
        ({"safe_serialization": False}, None),
        ({"max_shard_size": "200KB"}, None),
        ({"variant": "fp16"}, "fp16"),
        ({"variant": "fp16", "max_shard_size": "200KB"}, "fp16"),
        ({"variant": "fp16"}, None),
    ],
    ids=["pickles", "shards", "variant", "shards of a variant", "variant only"],
)
def test_files_that_weights_come_in(tmp_path, saving, variant):
    source = tmp_path / "source"
    pipeline("lcm", "LCM").save_pretrained(source, **saving)
    assert not (source / "unet" / "diffusion_pytorch_model.safetensors").exists()
    convert(source, tmp_path / "out", Options(variant=variant))
    assert_model(tmp_path / "out", "lcm")


def test_a_variant_that_one_component_lacks(own, tmp_path):
    source = own("lcm")
    unet = source / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: value.half() for name, value in make_unet("lcm").state_dict().items()}
    save_file(half, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    convert(source, tmp_path / "out", Options(variant="fp16"))
    assert_component(tmp_path / "out" / "unet", half)
    assert_component(tmp_path / "out" / "vae", make_vae().state_dict())


def test_half_precision_on_request(folders, tmp_path):
    convert(folders("lcm"), tmp_path / "out", Options(dtype="float16"))
    for name, state in states("lcm").items():
        assert_component(tmp_path / "out" / name, {key: value.half() for key, value in state.items()})


def test_older_names(own, tmp_path):
    """The autoencoder's attention under its first names, as convolutions too; the text encoder's stored constant."""
    source = own("lcm")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = dict(make_vae().state_dict())
    for side in ("encoder", "decoder"):
        for new, name in old.items():
            place = f"{side}.mid_block.attentions.0"
            weight, bias = (state.pop(f"{place}.{new}.{parameter}") for parameter in ("weight", "bias"))
            state |= {f"{place}.{name}.weight": weight[:, :, None, None].clone(), f"{place}.{name}.bias": bias}
    save_file(state, source / "vae" / "diffusion_pytorch_model.safetensors")
    text = text_state(make_text_encoder()) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(text, source / "text_encoder" / "model.safetensors")
    convert(source, tmp_path / "out")
    assert_model(tmp_path / "out", "lcm")


def test_the_index_decides_what_a_text_encoder_is(own, tmp_path):
    """Configs of text encoders that were cut out of a CLIP still name the CLIP."""
    source = own("sdxl", "Euler")
    for name in ("text_encoder", "text_encoder_2"):
        edit(source / name / "config.json", architectures=["CLIPModel"])
    convert(source, tmp_path / "out")
    assert_model(tmp_path / "out", "sdxl")


def test_settings_of_the_users_own(folders):
    overrides = {"sampler": "lcm", "steps": 6, "prediction_type": "v_prediction"}
    plan = plan_conversion(folders("sd1", "PNDM"), Options(overrides=overrides))
    assert (plan.sampler["sampler"], plan.sampler["steps"]) == ("lcm", 6)
    assert plan.schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: edit(s / "model_index.json", _class_name="FluxPipeline"), ModelError, "'FluxPipeline' is not supp"),
        (lambda s: edit(s / "model_index.json", unet=["diffusers", "UNet3DConditionModel"]), ModelError, "UNet3D"),
        (
            lambda s: edit(s / "model_index.json", unet=["diffusers", "AutoencoderKL"]),
            ModelError,
            "does not know|which is no",
        ),
        (lambda s: edit(s / "model_index.json", unet=[None, None]), ModelError, "has no unet"),
        (lambda s: edit(s / "model_index.json", vae=...), MissingParts, "has no vae"),
        (lambda s: edit(s / "model_index.json", vae="here"), ModelError, "vae: expected .library, class., got 'here'"),
        (lambda s: shutil.rmtree(s / "text_encoder"), ModelError, "text_encoder/config.json: file is missing"),
        (lambda s: shutil.rmtree(s / "tokenizer"), ModelError, "tokenizer: folder is missing"),
        (lambda s: shutil.rmtree(s / "scheduler"), ModelError, "scheduler_config.json: file is missing"),
        (lambda s: (s / "vae" / "diffusion_pytorch_model.safetensors").unlink(), ModelError, "has no weight files"),
        (lambda s: edit(s / "unet" / "config.json", addition_embed_type="image"), ModelError, "addition_embed_type"),
        (lambda s: edit(s / "unet" / "config.json", in_channels=8), ModelError, "expected .4, 3, 3, 8|shape"),
        (lambda s: edit(s / "text_encoder" / "config.json", hidden_act="relu"), ModelError, "hidden_act"),
        (lambda s: edit(s / "tokenizer" / "tokenizer_config.json", tokenizer_class="T5Tokenizer"), ModelError, "T5"),
    ],
)
def test_a_broken_pipeline_folder(own, tmp_path, change, error, message):
    source = own("lcm")
    change(source)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "edm"}, "pixel-space"),
        ({"base": Path("base")}, "complete without it"),
        ({"tokenizer": Path("words")}, "complete without it"),
        ({"overrides": {"in_channels": 9}}, "cannot be set"),
    ],
)
def test_options_that_a_pipeline_folder_has_no_use_for(folders, options, message):
    with pytest.raises(UsageError, match=message):
        plan_conversion(folders("lcm"), Options(**options))


def test_parts_that_do_not_fit_each_other(own):
    source = own("lcm")
    changed = UNet2DConditionModel(**dict(make_unet("lcm").config) | {"cross_attention_dim": 48})
    shutil.rmtree(source / "unet")
    changed.save_pretrained(source / "unet")
    with pytest.raises(ModelError, match="width of the text: expected 64, got 48"):
        plan_conversion(source, Options())


# --- schedulers


@pytest.mark.parametrize("published", DISCRETE_SCHEDULERS)
def test_every_scheduler_with_its_own_defaults(published, monkeypatch):
    if published == "DPMSolverSDEScheduler":  # imports a library that its schedule does not need
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        scheduler = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    else:
        scheduler = getattr(diffusers, published)
    theirs = scheduler(trained_betas=None)
    bare, sampler = discrete_schedule({"_class_name": published}, "scheduler_config.json")
    np.testing.assert_allclose(bare.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    written = {**theirs.config, "_class_name": published} | (
        {"clip_sample": False} if "clip_sample" in theirs.config else {}
    )
    assert discrete_schedule(written, "scheduler_config.json") == (bare, sampler)
    assert sampler == {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}.get(published)


def test_a_schedule_without_signal_at_its_end():
    theirs = diffusers.DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True, clip_sample=False)
    schedule, _ = discrete_schedule({**theirs.config, "_class_name": "DDIMScheduler"}, "scheduler_config.json")
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler' is not supported"),
        ({"clip_sample": True}, "clip_sample: True"),
        ({"thresholding": True}, "thresholding: True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps"),
        ({"prediction_type": "flow"}, "prediction_type"),
    ],
)
def test_schedulers_that_are_refused(values, message):
    with pytest.raises(ModelError, match=message):
        discrete_schedule({"_class_name": "LCMScheduler"} | values, "scheduler_config.json")


# --- U-Nets alone


@pytest.fixture
def lone_unet(tmp_path):
    """A folder with config and weights of a U-Net in its root."""

    def save(kind: str, card: str | None = None) -> Path:
        make_unet(kind).save_pretrained(tmp_path / "unet only")
        if card is not None:
            (tmp_path / "unet only" / "README.md").write_text(card)
        return tmp_path / "unet only"

    return save


@pytest.mark.parametrize("native", [False, True], ids=["foreign base", "native base"])
def test_a_unet_completed_by_a_base(folders, lone_unet, tmp_path, native):
    base = folders("sdxl", "Euler")
    if native:
        convert(base, tmp_path / "base")
        base = tmp_path / "base"
    convert(lone_unet("lcm sdxl"), tmp_path / "out", Options(base=base, base_source="owner/base"))
    assert_model(tmp_path / "out", "lcm sdxl")
    index = read_model_index(tmp_path / "out")
    assert index.sampler["sampler"] == "lcm"
    assert index.sampler["guidance_scale"] == 8.0
    assert index.sampler["force_zeros_for_empty_prompt"] is True
    assert read_schedule(tmp_path / "out" / "scheduler").prediction_type == "v_prediction"
    assert [file["name"] for file in index.provenance["files"]] == ["diffusion_pytorch_model.safetensors"]
    taken = index.provenance["base"]
    assert taken["source"] == "owner/base"
    weights = "model.safetensors" if native else "diffusion_pytorch_model.safetensors"
    vae = next(file for file in taken["files"] if file["name"] == f"vae/{weights}")
    assert vae["sha256"] == sha256_file(base / "vae" / weights)
    assert str(tmp_path) not in json.dumps(index.provenance)


def test_a_base_gives_its_parts_without_its_unet(own, lone_unet, tmp_path):
    """So that a caller need not fetch it."""
    base = own("sd1", "PNDM")
    shutil.rmtree(base / "unet")
    convert(lone_unet("lcm"), tmp_path / "out", Options(base=base))
    assert_model(tmp_path / "out", "lcm")


def test_a_base_completes_a_pipeline_folder(own, folders, tmp_path):
    source = own("lcm")
    shutil.rmtree(source / "vae")
    edit(source / "model_index.json", vae=[None, None])
    with pytest.raises(MissingParts) as raised:
        plan_conversion(source, Options())
    assert raised.value.parts == ("vae",)
    convert(source, tmp_path / "out", Options(base=folders("sd1", "PNDM")))
    assert_model(tmp_path / "out", "lcm")


@pytest.mark.parametrize(
    ("kind", "card", "base"),
    [
        ("lcm", None, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("lcm sdxl", None, "stabilityai/stable-diffusion-xl-base-1.0"),
        ("lcm sdxl", "---\nbase_model: segmind/SSD-1B\n---\n", "segmind/SSD-1B"),
        ("lcm", "---\nlicense: mit\n---\n", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_a_unet_alone_asks_for_its_base(lone_unet, kind, card, base):
    with pytest.raises(MissingParts, match="is a U-Net alone") as raised:
        plan_conversion(lone_unet(kind, card), Options())
    assert raised.value.base == base
    assert raised.value.hint == f"pass --base {base}"
    second = {"text_encoder_2", "tokenizer_2"} if "sdxl" in kind else set()
    assert set(raised.value.parts) == {"vae", "text_encoder", "tokenizer", "scheduler"} | second


def test_a_base_that_is_none(folders, lone_unet, tmp_path):
    source = lone_unet("lcm sdxl")
    with pytest.raises(ModelError, match="has no text_encoder_2"):
        plan_conversion(source, Options(base=folders("sd1", "PNDM")))
    with pytest.raises(ModelError, match="no such folder"):
        plan_conversion(source, Options(base=tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"model_index\.json: file is missing"):
        plan_conversion(source, Options(base=folders("lcm") / "unet"))
    with pytest.raises(UsageError, match="holds the base"):
        convert(source, folders("sdxl", "Euler"), Options(base=folders("sdxl", "Euler"), overwrite=True))


def test_a_base_of_another_size(folders, tmp_path):
    changed = UNet2DConditionModel(**dict(make_unet("lcm").config) | {"cross_attention_dim": 48})
    changed.save_pretrained(tmp_path / "unet")
    with pytest.raises(ModelError, match="width of the text: expected 64, got 48"):
        plan_conversion(tmp_path / "unet", Options(base=folders("sd1", "PNDM")))


@pytest.mark.parametrize(
    ("text", "base"),
    [
        (
            "---\nbase_model: stabilityai/stable-diffusion-xl-base-1.0\n---\n# LCM",
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        ("---\r\ntags: [a]\r\nbase_model: 'owner/name'  # here\r\n---\r\n", "owner/name"),
        ('---\nbase_model:\n\n- "owner/name.v2"\n- other/one\n---\n', "owner/name.v2"),
        ("---\nbase_model:\n  - owner/name\n---\n", "owner/name"),
        ("\ufeff---\nbase_model: [owner/name, other/one]\n---\n", "owner/name"),
        ("---\nbase_model: https://example.com/x\n---\n", None),
        ("---\nbase_model:\nlicense: mit\n---\n", None),
        ("---\nbase_model_relation: finetune\n---\n", None),
        ("---\nbase_model: owner/name\n", None),
        ("base_model: owner/name\n", None),
        ("", None),
    ],
)
def test_the_base_in_a_model_card(text, base):
    assert base_model_of_card(text) == base


# --- parts by themselves


def test_an_autoencoder_by_itself(tmp_path):
    make_tiny_vae().save_pretrained(tmp_path / "tiny")
    convert(tmp_path / "tiny", tmp_path / "out", Options(verify=True))
    assert_component(tmp_path / "out" / "vae", make_tiny_vae().state_dict())
    index = read_model_index(tmp_path / "out")
    assert (index.pipeline, index.components) == ("AutoencoderTiny", {"vae": "AutoencoderTiny"})


@pytest.mark.parametrize(("part", "kind"), [("unet", "UNet2DCondition"), ("text_encoder", "CLIPTextModel")])
def test_a_component_by_itself(folders, tmp_path, part, kind):
    convert(folders("lcm") / part, tmp_path / "out", Options(component=True))
    assert_component(tmp_path / "out" / part, states("lcm")[part])
    assert read_model_index(tmp_path / "out").components == {part: kind}


# --- single files


def ldm_state(kind: str) -> State:
    """A single file's tensors, made with names that do not come from the converter's tables."""
    state = ldm_names.prefixed("model.diffusion_model.", ldm_names.unet(make_unet(kind).state_dict(), 1))
    state |= ldm_names.prefixed("first_stage_model.", ldm_names.autoencoder(make_vae().state_dict(), 2))
    clip = text_state(make_text_encoder())
    if kind == "sd2":
        open_clip = ldm_names.open_clip(text_state(make_text_encoder("open_clip")))
        unused = {n.replace(".22.", ".23."): v + 1 for n, v in open_clip.items() if ".22." in n}
        beside = {"text_projection": torch.ones(64, 64), "logit_scale": torch.tensor(4.6)}
        return state | ldm_names.prefixed("cond_stage_model.model.", open_clip | unused | beside)
    if "sdxl" in kind:
        pooled = ldm_names.open_clip(text_state(make_text_encoder("pooled"))) | {"logit_scale": torch.tensor(4.6)}
        first = clip | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        state |= ldm_names.prefixed("conditioner.embedders.0.transformer.", first)
        return state | ldm_names.prefixed("conditioner.embedders.1.model.", pooled)
    return state | ldm_names.prefixed("cond_stage_model.transformer.", clip)


KINDS = ("sd1", "lcm", "sd1 inpainting", "sd2", "sdxl", "lcm sdxl")


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_single_files_are_those_that_diffusers_reads(kind):
    """The oracle for `ldm_names`; diffusers has no way back for the projection of the guidance."""
    file = ldm_state(kind)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(file), dict(make_unet(kind).config))
    expected = dict(make_unet(kind).state_dict())
    expected.pop("time_embedding.cond_proj.weight", None)
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(file), dict(make_vae().config))
    found = [(unet, expected), (vae, make_vae().state_dict())]
    if kind == "sd2" or "sdxl" in kind:
        prefix = "cond_stage_model.model." if kind == "sd2" else "conditioner.embedders.1.model."
        encoder = make_text_encoder("open_clip" if kind == "sd2" else "pooled")
        text = single_file_utils.convert_open_clip_checkpoint(encoder, file, prefix)
        text = {name.replace("text_model.text_model.", "text_model."): value for name, value in text.items()}
        found.append((text, text_state(encoder)))
    for theirs, original in found:
        assert theirs.keys() == original.keys()
        assert all(torch.equal(theirs[name], value) for name, value in original.items())


@pytest.fixture
def single_file(tmp_path):
    def save(state: State, name: str = "model.safetensors") -> Path:
        save_file(state, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file(single_file, tmp_path, kind):
    report = convert(
        single_file(ldm_state(kind)), tmp_path / "out", Options(tokenizer=vocabulary_folder(), verify=True)
    )
    assert_model(tmp_path / "out", kind, ("!",) if kind == "sd2" else ("<|endoftext|>", "!"))
    unet = load_model(tmp_path / "out" / "unet").config
    theirs = make_unet(kind).config
    same = ("in_channels", "block_out_channels", "down_block_types", "up_block_types", "mid_block_type")
    same += ("cross_attention_dim", "use_linear_projection", "time_cond_proj_dim", "addition_embed_type")
    same += ("projection_class_embeddings_input_dim", "addition_time_embed_dim", "norm_num_groups", "norm_eps")
    for name in (*same, "transformer_layers_per_block", "attention_head_dim"):
        assert getattr(unet, name) == theirs[name], name
    index = read_model_index(tmp_path / "out")
    xl, distilled = "sdxl" in kind, "lcm" in kind
    assert index.sampler["sampler"] == ("lcm" if distilled else None)
    assert index.sampler["guidance_scale"] == ({False: 8.5, True: 8.0}[xl] if distilled else 1.0)
    assert unet.sample_size == (128 if xl else 96 if distilled else 64)
    vae = load_model(tmp_path / "out" / "vae").config
    assert vae.scaling_factor == (SDXL_VAE.scaling_factor if xl else 0.18215)
    assert read_schedule(tmp_path / "out" / "scheduler") == DiscreteSchedule()
    assert report.notes == ()
    assert [file["name"] for file in index.provenance["files"]] == ["model.safetensors"]
    encoders = {"text_encoder": "gelu" if kind == "sd2" else "quick_gelu"} | ({"text_encoder_2": "gelu"} if xl else {})
    for name, activation in encoders.items():
        assert load_model(tmp_path / "out" / name).config.hidden_act == activation


def test_a_pickle(tmp_path):
    torch.save({"state_dict": ldm_state("lcm"), "global_step": 7}, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "out", Options(tokenizer=vocabulary_folder()))
    assert_model(tmp_path / "out", "lcm")


@pytest.mark.parametrize("given", ["base", "tokenizer", "tokenizer.json"])
def test_where_the_words_come_from(single_file, folders, tmp_path, given):
    source, base = single_file(ldm_state("sdxl")), folders("sdxl", "Euler")
    options = {
        "base": Options(base=base),
        "tokenizer": Options(tokenizer=base),
        "tokenizer.json": Options(tokenizer=base / "tokenizer"),
    }
    convert(source, tmp_path / "out", options[given])
    assert_model(tmp_path / "out", "sdxl")
    names = {file["name"].rpartition("/")[2] for file in read_model_index(tmp_path / "out").provenance["base"]["files"]}
    assert names <= {"tokenizer.json", "tokenizer_config.json"}


def test_a_single_file_asks_for_words(single_file):
    with pytest.raises(MissingParts, match="does not hold tokenizer") as raised:
        plan_conversion(single_file(ldm_state("lcm")), Options())
    assert raised.value.parts == ("tokenizer",)
    assert "openai/clip-vit-large-patch14" in raised.value.hint


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_unet_of_a_single_file_alone(single_file, folders, tmp_path, prefix):
    source = single_file(ldm_names.prefixed(prefix, ldm_names.unet(make_unet("lcm").state_dict(), 1)))
    with pytest.raises(MissingParts) as raised:
        plan_conversion(source, Options())
    assert set(raised.value.parts) == {"vae", "text_encoder", "tokenizer"}
    convert(source, tmp_path / "out", Options(base=folders("sd1", "PNDM")))
    assert_model(tmp_path / "out", "lcm")


def test_a_single_file_without_its_autoencoder(single_file, folders, tmp_path):
    state = {name: value for name, value in ldm_state("lcm").items() if not name.startswith("first_stage_model.")}
    convert(single_file(state), tmp_path / "out", Options(base=folders("sd1", "PNDM"), tokenizer=vocabulary_folder()))
    assert_model(tmp_path / "out", "lcm")


def test_words_for_a_text_encoder_that_is_not_in_the_file(single_file, folders, tmp_path):
    state = {name: value for name, value in ldm_state("sdxl").items() if not name.startswith("conditioner.")}
    convert(single_file(state), tmp_path / "out", Options(base=folders("sdxl", "Euler"), tokenizer=vocabulary_folder()))
    assert_model(tmp_path / "out", "sdxl")


def test_what_training_leaves_in_a_file(single_file, tmp_path):
    state = ldm_state("sd1")
    state |= {f"model_ema.diffusion_model{n}": torch.ones(2) for n in range(3)}
    state |= {"model_ema.decay": torch.tensor(0.9), "first_stage_model.loss.logvar": torch.zeros(1)}
    state |= {name: torch.ones(1000) for name in ("betas", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "logvar")}
    state |= {
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "alphas_cumprod": diffusers.LCMScheduler().alphas_cumprod,
    }
    report = convert(single_file(state), tmp_path / "out", Options(tokenizer=vocabulary_folder()))
    assert_model(tmp_path / "out", "sd1")
    [note] = report.notes
    assert "model_ema" in note


def test_a_text_encoder_without_the_module_around_it(single_file, tmp_path):
    state = {name.replace("transformer.text_model.", "transformer."): v for name, v in ldm_state("sd1").items()}
    assert "cond_stage_model.transformer.final_layer_norm.bias" in state
    convert(single_file(state), tmp_path / "out", Options(tokenizer=vocabulary_folder()))
    assert_model(tmp_path / "out", "sd1")


def test_the_encoder_of_stable_diffusion_2_without_its_unused_layer(single_file, tmp_path):
    state = {name: value for name, value in ldm_state("sd2").items() if ".resblocks.23." not in name}
    convert(single_file(state), tmp_path / "out", Options(tokenizer=vocabulary_folder()))
    assert_model(tmp_path / "out", "sd2", ("!",))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_schedule_that_a_file_holds(single_file, zero_snr, half):
    theirs = diffusers.DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=zero_snr).alphas_cumprod
    state = ldm_state("sd1") | {"alphas_cumprod": theirs.half() if half else theirs}
    plan = plan_conversion(single_file(state), Options(tokenizer=vocabulary_folder()))
    assert plan.schedule == DiscreteSchedule(rescale_betas_zero_snr=zero_snr)
    assert plan.notes == ()


def test_a_schedule_of_another_kind_is_said(single_file):
    state = ldm_state("sd1") | {"alphas_cumprod": diffusers.DDPMScheduler().alphas_cumprod}
    source = single_file(state)
    [note] = plan_conversion(source, Options(tokenizer=vocabulary_folder())).notes
    assert "another noise schedule" in note
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    plan = plan_conversion(source, Options(tokenizer=vocabulary_folder(), overrides=betas))
    assert plan.schedule == DiscreteSchedule(**betas)
    assert plan.notes == ()


def test_marks_of_velocity(single_file):
    state = ldm_state("sdxl") | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    plan = plan_conversion(single_file(state), Options(tokenizer=vocabulary_folder()))
    assert plan.schedule == DiscreteSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def test_overrides_go_where_they_belong(single_file):
    overrides = {"prediction_type": "v_prediction", "sampler": "tcd", "attention_head_dim": 4, "scaling_factor": 0.5}
    options = Options(tokenizer=vocabulary_folder(), overrides=overrides)
    plan = plan_conversion(single_file(ldm_state("sd1")), options)
    assert plan.schedule.prediction_type == "v_prediction"
    assert plan.sampler["sampler"] == "tcd"
    assert plan.components["unet"].config.attention_head_dim == 4
    assert plan.components["vae"].config.scaling_factor == 0.5


@pytest.mark.parametrize(("given", "scale"), [({}, 0.18215), ({"scaling_factor": 0.13025}, 0.13025)])
def test_an_autoencoder_file(single_file, tmp_path, given, scale):
    state = ldm_names.autoencoder(make_vae().state_dict(), 2) | {"loss.logvar": torch.zeros(1)}
    report = convert(single_file(state), tmp_path / "out", Options(overrides=given))
    assert_component(tmp_path / "out" / "vae", make_vae().state_dict())
    assert load_model(tmp_path / "out" / "vae").config.scaling_factor == scale
    assert ["scale of the latents" in note for note in report.notes] == ([] if given else [True])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"depth_model.x.weight": torch.ones(2)}, ModelError, r"no known part: depth_model\.x\.weight"),
        (
            {"model.diffusion_model.label_emb.weight": torch.ones(2, 2)},
            ModelError,
            r"1 not known .*model\.diffusion_model\.label_emb",
        ),
        ({"first_stage_model.extra": torch.ones(2)}, ModelError, r"vae: .*1 not known.*first_stage_model\.extra"),
        ({"cond_stage_model.transformer.text_model.x": torch.ones(2)}, ModelError, r"text_encoder: .*text_model\.x"),
        ({"model.diffusion_model.time_embed.0.bias": None}, ModelError, r"1 missing: time_embedding\.linear_1\.bias"),
        ({"model.diffusion_model.time_embed.0.weight": None}, ModelError, r"time_embed\.0\.weight is missing"),
        ({"first_stage_model.encoder.conv_in.weight": None}, ModelError, r"encoder\.conv_in\.weight is missing"),
        (
            {"first_stage_model.decoder.conv_out.bias": torch.ones(4)},
            ModelError,
            r"conv_out\.bias: expected \(3,\), got",
        ),
        ({"conditioner.embedders.0.transformer.x": torch.ones(2)}, ModelError, "holds two of one part"),
        ({"conditioner.embedders.0.model.ln_final.bias": torch.ones(2)}, ModelError, "no known part: conditioner"),
    ],
)
def test_a_single_file_that_is_not_explained(single_file, change, error, message):
    state = {name: value for name, value in (ldm_state("lcm") | change).items() if value is not None}
    with pytest.raises(error, match=message):
        plan_conversion(single_file(state), Options(tokenizer=vocabulary_folder()))


def test_a_second_text_encoder_that_nobody_needs(single_file):
    pooled = ldm_names.open_clip(text_state(make_text_encoder("pooled")))
    state = ldm_state("lcm") | ldm_names.prefixed("conditioner.embedders.1.model.", pooled)
    with pytest.raises(ModelError, match="holds a text_encoder_2"):
        plan_conversion(single_file(state), Options(tokenizer=vocabulary_folder()))


def test_diffusers_names_in_a_file_alone(single_file):
    with pytest.raises(ModelError, match=r"no config\.json") as raised:
        plan_conversion(single_file(dict(make_unet("lcm").state_dict())), Options())
    assert raised.value.hint == "convert the folder that holds both"


def test_a_base_that_a_single_file_does_not_need(single_file, folders):
    options = Options(tokenizer=vocabulary_folder(), base=folders("sd1", "PNDM"))
    with pytest.raises(UsageError, match="complete without it"):
        plan_conversion(single_file(ldm_state("lcm")), options)


def test_a_folder_without_words(single_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"vocab\.json: file is missing"):
        plan_conversion(single_file(ldm_state("lcm")), Options(tokenizer=tmp_path / "empty"))


@pytest.mark.parametrize(("kind", "steps"), [("lcm", 3), ("lcm sdxl", 1)])
def test_the_picture_of_a_single_file_is_that_of_diffusers(single_file, tmp_path, kind, steps):
    source = single_file(ldm_state(kind))
    convert(source, tmp_path / "out", Options(tokenizer=vocabulary_folder(), overrides={"scaling_factor": 0.18215}))
    settings = {"width": 32, "height": 16, "guidance_scale": 4.0}
    [ours] = load(tmp_path / "out").generate("a bear", seed=5, steps=steps, rng="torch", **settings)
    theirs = pipeline(kind, "LCM")
    theirs.scheduler = diffusers.LCMScheduler()
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    [expected] = theirs("a bear", num_inference_steps=steps, generator=generator, **settings).images
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1
    assert np.asarray(expected).std() > 10


# --- published sizes, by names and shapes alone

CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
OPEN_CLIP_H = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)
OPEN_CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def published_file(unet: dict) -> dict[str, TensorSource]:
    """Headers of a published single file: modules without data, names by `ldm_names`."""
    with torch.device("meta"):
        text = {768: [CLIP_L], 1024: [OPEN_CLIP_H], 2048: [CLIP_L, OPEN_CLIP_G]}[unet["cross_attention_dim"]]
        encoders = [(CLIPTextModelWithProjection if one is OPEN_CLIP_G else CLIPTextModel)(one) for one in text]
        state = ldm_names.prefixed(
            "model.diffusion_model.", ldm_names.unet(UNet2DConditionModel(**unet).state_dict(), 2)
        )
        vae = AutoencoderKL(**SD_VAE).state_dict()
    state |= ldm_names.prefixed("first_stage_model.", ldm_names.autoencoder(vae, 4))
    names = [text_state(encoder) for encoder in encoders]
    if len(names) == 2:
        state |= ldm_names.prefixed("conditioner.embedders.0.transformer.", names[0])
        state |= ldm_names.prefixed("conditioner.embedders.1.model.", ldm_names.open_clip(names[1]))
    elif text == [OPEN_CLIP_H]:
        open_clip = ldm_names.open_clip(names[0])
        state |= ldm_names.prefixed("cond_stage_model.model.", open_clip)
        last = {name.replace(".22.", ".23."): value for name, value in open_clip.items() if ".22." in name}
        state |= ldm_names.prefixed("cond_stage_model.model.", last)
    else:
        state |= ldm_names.prefixed("cond_stage_model.transformer.", names[0])

    def read():
        raise AssertionError("a tensor was read")

    return {name: TensorSource(name, "F32", tuple(value.shape), read) for name, value in state.items()}


@pytest.mark.parametrize(
    ("title", "unet", "text"),
    [
        ("SD1.5", SD15, [196]),
        ("LCM Dreamshaper", LCM_DREAMSHAPER, [196]),
        ("SD1.5 inpainting", SD15_INPAINT, [196]),
        ("SD2.1", SD21, [372]),
        ("SDXL", SDXL, [196, 517]),
        ("LCM-SDXL", LCM_SDXL, [196, 517]),
        ("SSD-1B", SSD_1B, [196, 517]),
    ],
)
def test_published_single_files(title, unet, text):
    checkpoint = Checkpoint((), published_file(unet))
    plan = plan_ldm_file(Path("model.safetensors"), checkpoint, Options(tokenizer=vocabulary_folder()))
    _, parameters, count = PUBLISHED[title]
    parts = {name: component.tensors for name, component in plan.components.items()}
    assert sum(int(np.prod(tensor.shape)) for tensor in parts["unet"].values()) == parameters
    assert len(parts["unet"]) == count
    assert len(parts["vae"]) == 248
    assert sum(int(np.prod(tensor.shape)) for tensor in parts["vae"].values()) == 83_653_863
    assert [len(parts[name]) for name in ("text_encoder", "text_encoder_2") if name in parts] == text
    config = plan.components["unet"].config
    expected = config_from_dict(UNet2DConditionConfig, unet, title)
    assert (config.down_levels, config.mid_levels, config.up_levels) == (
        expected.down_levels,
        expected.mid_levels,
        expected.up_levels,
    )
    # What is settled by the levels, and what has no effect.
    settled = ("transformer_layers_per_block", "reverse_transformer_layers_per_block", "upcast_attention")
    same = {name: getattr(expected, name) for name in settled} | {"sample_size": config.sample_size}
    assert dataclasses.replace(config, **same) == dataclasses.replace(expected, sample_size=config.sample_size)
    published_sizes = {"SD2.1": 64, "LCM Dreamshaper": 96}
    assert config.sample_size == published_sizes.get(title, 128 if len(text) > 1 else 64)
    assert ["predict velocity" in note for note in plan.notes] == ([True] if title == "SD2.1" else [])
