"""Native folders of the small models, as conversion would make them."""

import shutil
from pathlib import Path
from typing import Any

import mlx.nn as nn
from tiny_latent import FAMILIES, native_pipeline, vocabulary_folder
from tiny_models import native_unet, shared_unet

from mlx_cm.config import config_to_dict
from mlx_cm.model_folder import (
    ModelIndex,
    class_of,
    tensor_sources,
    write_component,
    write_model_index,
    write_schedule,
)
from mlx_cm.pipelines.pixel import ConsistencyModelPipeline, PixelSettings
from mlx_cm.quantization import quantization_of
from mlx_cm.schedules import KarrasSchedule
from mlx_cm.storage import write_json


def latent_folder(folder: Path, family: str, **parts: Any) -> Path:
    """A model of `tiny_latent`.

    Args:
        parts: of the pipeline that differ.
    """
    pipeline = native_pipeline(family, **parts)
    modules = {"unet": pipeline.backbone, "vae": pipeline.autoencoder}
    for suffix, encoder, pad in zip(("", "_2"), pipeline.text_encoders, FAMILIES[family].pads, strict=False):
        modules[f"text_encoder{suffix}"] = encoder
        shutil.copytree(vocabulary_folder(), folder / f"tokenizer{suffix}")
        write_json(folder / f"tokenizer{suffix}" / "tokenizer_config.json", {"pad_token": pad, "model_max_length": 77})
    return _written(folder, pipeline, modules)


def pixel_folder(folder: Path, kind: str, **settings: Any) -> Path:
    """A model of `tiny_models`.

    Args:
        kind: "conditional" or "unconditional".
        settings: of `PixelSettings`.
    """
    unet = native_unet(shared_unet(kind))
    pipeline = ConsistencyModelPipeline(unet, KarrasSchedule(), PixelSettings(**settings))
    return _written(folder, pipeline, {"unet": unet})


def component_folder(folder: Path, module: nn.Module) -> Path:
    """A component by itself."""
    write_component(folder, module.config, tensor_sources(module), quantization_of(module))
    return folder


def _written(folder: Path, pipeline: Any, modules: dict[str, nn.Module]) -> Path:
    weights, components = {}, {"scheduler": type(pipeline.schedule).__name__}
    for part, module in modules.items():
        digests = write_component(folder / part, module.config, tensor_sources(module), quantization_of(module))
        weights |= {f"{part}/{name}": digest for name, digest in digests.items()}
        components[part] = class_of(module.config)
    write_schedule(folder / "scheduler", pipeline.schedule)
    sampler, told = config_to_dict(pipeline.settings), {"source": f"someone/{folder.name}", "converter": "a test"}
    write_model_index(folder, ModelIndex(type(pipeline).__name__, components, sampler, told, weights))
    return folder
