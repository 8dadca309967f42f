"""The way back: a native model folder under the names, in the layout and with the configs of diffusers."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.convert import latent, pixel
from mlx_cm.convert.conversion import check_space
from mlx_cm.convert.keymaps.rules import to_channels_first
from mlx_cm.convert.latent_parts import TOKENIZERS, tokenizer_files
from mlx_cm.convert.planning import CONFIG
from mlx_cm.convert.readers import open_checkpoint
from mlx_cm.convert.schedulers import SCHEDULER, SCHEDULER_CONFIG, discrete_scheduler_config, karras_scheduler_config
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import (
    MODEL_INDEX,
    MODELS,
    ModelIndex,
    build_model,
    check_names_and_shapes,
    class_of,
    read_model_index,
    read_schedule,
    stored_quantization,
)
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.pipelines.latent import LatentSettings
from mlx_cm.pipelines.pixel import PixelSettings
from mlx_cm.storage import TensorSource, atomic_folder, check_free, write_json, write_safetensors

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
# Class here => library, class there, and the name of its weights; a text encoder's class is in its config.
PUBLISHED = {
    "UNet2D": (DIFFUSERS, "UNet2DModel", "diffusion_pytorch_model.safetensors"),
    "UNet2DCondition": (DIFFUSERS, "UNet2DConditionModel", "diffusion_pytorch_model.safetensors"),
    "AutoencoderKL": (DIFFUSERS, "AutoencoderKL", "diffusion_pytorch_model.safetensors"),
    "AutoencoderTiny": (DIFFUSERS, "AutoencoderTiny", "diffusion_pytorch_model.safetensors"),
    "CLIPTextModel": (TRANSFORMERS, "CLIPTextModel", "model.safetensors"),
}
WEIGHTS_METADATA = {"format": "pt"}
LAYOUT = {"_diffusers_version": "0.42.1"}  # whose layout and fields these are; its loaders look for it
DERIVED_FIELDS = {"AutoencoderTiny": ("block_out_channels",)}  # which diffusers makes from others itself
# Fields of this program alone => what they are in the models that diffusers has.
OWN_FIELDS = {"UNet2D": {"trajectory": False}}
TOKENIZER = "CLIPTokenizer"
# Components that diffusers' pipelines have a place for and that these models do without.
NOTHING = [None, None]
WITHOUT_EYES = {"feature_extractor": NOTHING, "image_encoder": NOTHING}


def export(folder: Path, destination: Path, *, overwrite: bool = False) -> Path:
    """Writes a native model as a folder that diffusers' `from_pretrained` reads, a lone component as one of its own.

    Weights keep their type and are streamed, one tensor in memory at a time. The folder appears under its name only
    when it is complete.

    Args:
        folder: a native model folder.
        destination: the folder to make.

    Returns:
        The destination.

    Raises:
        ModelError: the model is missing, broken, or of a kind that diffusers has no pipeline for.
        UsageError: the model is quantised; or the destination holds the source.
        DiskError: the destination exists, or there is not enough space.
    """
    folder, destination = Path(folder), Path(destination)
    check_free(destination, overwrite)
    if folder.resolve().is_relative_to(destination.resolve()):
        raise UsageError(str(destination), "holds the source, which would be overwritten")
    index = read_model_index(folder)
    for kind in index.components.values():
        if kind in MODELS and kind not in PUBLISHED:
            raise ModelError(str(folder), f"has a part of class {kind}, which diffusers lacks")
    parts = {part: _tensors(folder / part) for part, kind in index.components.items() if kind in MODELS}
    check_space(destination, sum(tensor.nbytes for _, tensors in parts.values() for tensor in tensors))
    alone = index.pipeline in MODELS
    with atomic_folder(destination, overwrite=overwrite) as partial:
        if not alone:  # first, since it can fail
            _write_rest(partial, folder, index, {part: config for part, (config, _) in parts.items()})
        for part, (config, tensors) in parts.items():
            _write_component(partial if alone else partial / part, index.components[part], config, tensors)
    return destination


def _tensors(folder: Path) -> tuple[Any, list[TensorSource]]:
    """Config and tensors of a component, the latter in PyTorch's layout."""
    if stored_quantization(folder) is not None:
        raise UsageError(str(folder), "is quantised, which diffusers cannot read", "export the model it was made from")
    model = build_model(folder)
    for name, value in OWN_FIELDS.get(class_of(model.config), {}).items():
        if getattr(model.config, name) != value:
            raise ModelError(str(folder), f"{name} is {getattr(model.config, name)}, which diffusers has no model for")
    tensors = open_checkpoint(folder).tensors
    check_names_and_shapes(model, {name: tensor.shape for name, tensor in tensors.items()}, str(folder))
    return model.config, [replace(to_channels_first(tensor), name=name) for name, tensor in tensors.items()]


def _class_there(kind: str, config: Any) -> list[str]:
    """Library and class of a component, as a `model_index.json` has it."""
    library, published, _ = PUBLISHED[kind]
    return [library, config.architectures[0] if isinstance(config, CLIPTextConfig) else published]


def _write_component(folder: Path, kind: str, config: Any, tensors: Iterable[TensorSource]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    library, published = _class_there(kind, config)
    head = {"_class_name": published, **LAYOUT} if library == DIFFUSERS else {"model_type": "clip_text_model"}
    absent = {*DERIVED_FIELDS.get(kind, ()), *OWN_FIELDS.get(kind, ())}
    values = {name: value for name, value in config_to_dict(config).items() if name not in absent}
    write_json(folder / CONFIG, head | values)
    write_safetensors(folder / PUBLISHED[kind][2], tensors, WEIGHTS_METADATA)


def _pixel_pipeline(index: ModelIndex, folder: Path, configs: Mapping[str, Any]) -> tuple[dict, dict]:
    """Index and scheduler of a pixel-space consistency model."""
    settings = config_from_dict(PixelSettings, index.sampler, str(folder / MODEL_INDEX))
    plain = PixelSettings()
    if (settings.parameterization, settings.noise_scale) != (plain.parameterization, plain.noise_scale):
        raise ModelError(str(folder), "is a diffusion teacher, for which diffusers has no pipeline")
    scheduler = karras_scheduler_config(read_schedule(folder / SCHEDULER), clip_denoised=settings.clip_denoised)
    return {"_class_name": "ConsistencyModelPipeline"}, scheduler


def _latent_pipeline(index: ModelIndex, folder: Path, configs: Mapping[str, Any]) -> tuple[dict, dict]:
    """Index and scheduler of a model of Stable Diffusion's family."""
    settings = config_from_dict(LatentSettings, index.sampler, str(folder / MODEL_INDEX))
    unet = configs["unet"]
    inpaints = unet.in_channels != unet.out_channels
    encoders = [part for part, config in configs.items() if isinstance(config, CLIPTextConfig)]
    tokenizers = {part.replace("text_encoder", "tokenizer"): [TRANSFORMERS, TOKENIZER] for part in encoders}
    if unet.addition_embed_type == "text_time":
        name = "StableDiffusionXLInpaintPipeline" if inpaints else "StableDiffusionXLPipeline"
        said = {"force_zeros_for_empty_prompt": settings.force_zeros_for_empty_prompt, **WITHOUT_EYES}
    else:
        distilled = settings.sampler == "lcm" and unet.time_cond_proj_dim is not None
        name = "LatentConsistencyModelPipeline" if distilled else "StableDiffusionPipeline"
        name = "StableDiffusionInpaintPipeline" if inpaints else name
        said = {"requires_safety_checker": False, "safety_checker": NOTHING, **WITHOUT_EYES}
    scheduler = discrete_scheduler_config(read_schedule(folder / SCHEDULER), settings.sampler)
    return {"_class_name": name, **said, **tokenizers}, scheduler


PIPELINES = {pixel.PIPELINE: _pixel_pipeline, latent.PIPELINE: _latent_pipeline}


def _write_rest(partial: Path, folder: Path, index: ModelIndex, configs: Mapping[str, Any]) -> None:
    """Tokenizers, scheduler and index of a pipeline."""
    if index.pipeline not in PIPELINES:
        raise ModelError(str(folder / MODEL_INDEX), f"{index.pipeline!r} is unknown, expected one of {list(PIPELINES)}")
    published, scheduler = PIPELINES[index.pipeline](index, folder, configs)
    published |= {part: _class_there(index.components[part], config) for part, config in configs.items()}
    published[SCHEDULER] = [DIFFUSERS, scheduler["_class_name"]]
    for name in published.keys() & set(TOKENIZERS):
        (partial / name).mkdir()
        for target, file in tokenizer_files(folder / name, name).items():
            shutil.copyfile(file, partial / target)
    (partial / SCHEDULER).mkdir()
    write_json(partial / SCHEDULER / SCHEDULER_CONFIG, scheduler | LAYOUT)
    write_json(partial / MODEL_INDEX, published | LAYOUT)
