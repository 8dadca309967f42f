"""The way back to diffusers: what its own loaders make of an exported folder is the model that was converted."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from latent_models import make_text_encoder, make_tiny_vae, make_unet, make_vae, text_state, tokenizer
from tiny_models import CONDITIONAL, make_pipeline, shared_unet
from transformers import CLIPTextModel

from mlx_cm.config import config_from_dict
from mlx_cm.convert import Options, convert, export
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.model_folder import MODEL_INDEX, ModelIndex, tensor_sources, write_component, write_model_index
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOTHING = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def latent_pipeline(kind: str, published: str, scheduler) -> DiffusionPipeline:
    """One of diffusers' pipelines around shared parts."""
    parts = {"unet": make_unet(kind), "vae": make_vae(), "text_encoder": make_text_encoder(), "tokenizer": tokenizer()}
    if "sdxl" in kind:
        parts |= {"text_encoder_2": make_text_encoder("pooled"), "tokenizer_2": tokenizer("!")}
        parts |= {"force_zeros_for_empty_prompt": False}
    return getattr(diffusers, published)(**parts, **({} if "sdxl" in kind else NOTHING), scheduler=scheduler)


@pytest.fixture
def native(tmp_path):
    """A native folder made from a pipeline of diffusers."""

    def make(pipeline: DiffusionPipeline, **options) -> Path:
        pipeline.save_pretrained(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "ours", Options(**options))
        return tmp_path / "ours"

    return make


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return text_state(model) if isinstance(model, CLIPTextModel) else model.state_dict()


def assert_same_pipeline(back: DiffusionPipeline, original: DiffusionPipeline) -> None:
    """Classes, every parameter and every field of the configs, tokens."""
    assert type(back) is type(original)
    for name, part in original.components.items():
        ours = back.components[name]
        assert type(ours) is type(part), name
        if isinstance(part, torch.nn.Module):
            found, expected = state_of(ours), state_of(part)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), name
            settings, wanted = (
                dict(one.config if hasattr(one, "register_to_config") else one.config.to_dict()) for one in (ours, part)
            )
            kept = [key for key in wanted if key[0] != "_" and key != "transformers_version"]
            assert plain([settings[key] for key in kept]) == plain([wanted[key] for key in kept]), name
        elif "tokenizer" in name:
            prompts = ["a bear, sitting!", ""]
            tokens = [one(prompts, padding="max_length").input_ids for one in (ours, part)]
            assert tokens[0] == tokens[1]


def plain(value):
    """Lists and tuples mean the same in a config, and so do a type and its name."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, torch.dtype) else value


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_a_pixel_model(native, tmp_path, kind):
    original = make_pipeline(kind, num_scales=18)
    export(native(original), tmp_path / "back")
    back = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "back")
    assert_same_pipeline(back, original)
    labels = {"class_labels": 3} if kind == "conditional" else {}
    made = [
        pipeline(num_inference_steps=1, generator=torch.Generator().manual_seed(3), output_type="np", **labels).images
        for pipeline in (back.to("cpu"), original)
    ]
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize(
    ("kind", "published", "scheduler"),
    [
        ("lcm", "LatentConsistencyModelPipeline", diffusers.LCMScheduler(original_inference_steps=40)),
        ("sd1", "StableDiffusionPipeline", diffusers.TCDScheduler(prediction_type="v_prediction")),
        ("sd1 inpainting", "StableDiffusionInpaintPipeline", diffusers.LCMScheduler()),
        ("sdxl", "StableDiffusionXLPipeline", diffusers.TCDScheduler()),
        ("lcm sdxl", "StableDiffusionXLPipeline", diffusers.LCMScheduler(rescale_betas_zero_snr=True)),
    ],
)
def test_a_latent_model(native, tmp_path, kind, published, scheduler):
    original = latent_pipeline(kind, published, scheduler)
    export(native(original), tmp_path / "back")
    back = DiffusionPipeline.from_pretrained(tmp_path / "back")
    assert_same_pipeline(back, original)
    without_effect = {"set_alpha_to_one", "steps_offset"}
    same = {key for key in scheduler.config if key[0] != "_"} - without_effect
    assert {key: back.scheduler.config[key] for key in same} == {key: scheduler.config[key] for key in same}
    if "sdxl" in kind:
        assert back.config.force_zeros_for_empty_prompt is False


def test_the_picture_is_the_same(native, tmp_path):
    original = latent_pipeline("lcm", "LatentConsistencyModelPipeline", diffusers.LCMScheduler())
    export(native(original), tmp_path / "back")
    back = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "back")
    made = []
    for pipeline in (original, back):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        made.append(pipeline("a bear", generator=torch.Generator().manual_seed(5), **settings).images)
    np.testing.assert_array_equal(*made)


def test_a_model_without_a_sampler_gets_a_plain_solver(native, tmp_path):
    scheduler = diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)
    original = latent_pipeline("sd1", "StableDiffusionPipeline", scheduler)
    export(native(original), tmp_path / "back")
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back", safety_checker=None)
    assert isinstance(back.scheduler, diffusers.DDIMScheduler)
    np.testing.assert_array_equal(back.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert (back.scheduler.config.clip_sample, back.scheduler.config.set_alpha_to_one) == (False, False)


def test_a_model_sampled_by_ddim_gets_that_scheduler(native, tmp_path):
    original = latent_pipeline("sd1", "StableDiffusionPipeline", diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False))
    folder = native(original, overrides={"sampler": "ddim", "steps": 30, "guidance_scale": 5.0})
    index = json.loads((folder / MODEL_INDEX).read_text())
    assert (index["sampler"]["sampler"], index["sampler"]["steps"]) == ("ddim", 30)
    export(folder, tmp_path / "back")
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back", safety_checker=None)
    assert isinstance(back.scheduler, diffusers.DDIMScheduler)
    assert (back.scheduler.config.steps_offset, back.scheduler.config.set_alpha_to_one) == (1, False)


def test_half_precision_stays(native, tmp_path):
    original = make_pipeline("conditional")
    export(native(original, dtype="float16"), tmp_path / "back")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "back" / "unet", torch_dtype=torch.float16).state_dict()
    expected = shared_unet("conditional").state_dict()
    assert all(torch.equal(back[key], value.half()) for key, value in expected.items())


def test_there_and_back_again_makes_the_same_files(native, tmp_path):
    folder = native(latent_pipeline("lcm", "LatentConsistencyModelPipeline", diffusers.LCMScheduler()))
    export(folder, tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != MODEL_INDEX]
    assert len(files) >= 9
    for path in files:
        assert (folder / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_a_component_by_itself(tmp_path):
    make_tiny_vae().save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    back = AutoencoderTiny.from_pretrained(tmp_path / "back")
    assert all(torch.equal(back.state_dict()[key], value) for key, value in make_tiny_vae().state_dict().items())


def test_refusals(native, tmp_path):
    folder = native(make_pipeline("conditional"))
    with pytest.raises(DiskError, match="exists already"):
        export(folder, tmp_path / "theirs")
    with pytest.raises(UsageError, match="holds the source"):
        export(folder, folder, overwrite=True)
    with pytest.raises(UsageError, match="holds the source"):
        export(folder, tmp_path, overwrite=True)
    with pytest.raises(ModelError, match="is not a native"):
        export(tmp_path / "theirs", tmp_path / "back")
    index = json.loads((folder / MODEL_INDEX).read_text())
    for change, message in (
        ({"_class_name": "OtherPipeline"}, "'OtherPipeline' is unknown"),
        ({"sampler": index["sampler"] | {"parameterization": "edm"}}, "diffusion teacher"),
    ):
        (folder / MODEL_INDEX).write_text(json.dumps(index | change))
        with pytest.raises(ModelError, match=message):
            export(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_a_trajectory_network_is_refused(tmp_path):
    config = config_from_dict(UNet2DConfig, CONDITIONAL | {"trajectory": True}, "test")
    write_component(tmp_path / "ours", config, tensor_sources(UNet2D(config)))
    write_model_index(tmp_path / "ours", ModelIndex("UNet2D", {".": "UNet2D"}, {}, {}, {}))
    with pytest.raises(ModelError, match="trajectory is True, which diffusers has no model for"):
        export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_overwriting(native, tmp_path):
    folder = native(make_pipeline("conditional"))
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "old").touch()
    export(folder, tmp_path / "back", overwrite=True)
    assert not (tmp_path / "back" / "old").exists()


def test_a_quantised_model_is_refused(native, tmp_path):
    folder = native(make_pipeline("conditional"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization": {"bits": 4}}))
    with pytest.raises(UsageError, match="is quantised"):
        export(folder, tmp_path / "back")


def test_a_failure_leaves_nothing(native, tmp_path, monkeypatch):
    folder = native(make_pipeline("conditional"))
    monkeypatch.setattr("mlx_cm.convert.exporting.write_safetensors", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(folder, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
