"""Loading: from a reference to a pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cm.config import config_from_dict
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.lora import Adapter, adaptable_modules, fuse_adapters, parse_lora_ref
from mlx_cm.memory import Estimate, check_budget, estimate
from mlx_cm.model_folder import (
    MODEL_INDEX,
    MODELS,
    ModelIndex,
    build_model,
    load_model,
    read_model_index,
    read_schedule,
    resolve_dtype,
)
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.pipelines.latent import SAMPLERS, LatentConsistencyPipeline, LatentSettings
from mlx_cm.pipelines.pixel import ConsistencyModelPipeline, PixelSettings
from mlx_cm.quantization import in_device_form, quantization_of, quantize_model
from mlx_cm.sources import Progress, component_folder, native_folder, open_adapter
from mlx_cm.tokenizer import CLIPTokenizer

Pipeline = ConsistencyModelPipeline | LatentConsistencyPipeline

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
VAES = ("full", "tiny")  # what is not the reference of an autoencoder
# By the added embedding of the U-Net, which tells SDXL's latents from the others.
TINY_AUTOENCODERS = {None: "madebyollin/taesd", "text_time": "madebyollin/taesdxl"}


@dataclass(frozen=True)
class LoadOptions:
    """How to load."""

    dtype: str | None
    quantize: int | None
    lora: tuple[tuple[str, float], ...]  # (reference, scale)
    lora_partial: bool
    vae: str  # "full", "tiny" or a reference
    progress: Progress | None


def load(
    ref: str | Path,
    dtype: str | None = None,
    quantize: int | None = None,
    lora: Sequence[str | tuple[str, float]] = (),
    *,
    lora_partial: bool = False,
    vae: str = "full",
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> Pipeline:
    """Loads a model ready to generate.

    A foreign checkpoint is converted once into the cache and loaded from there.

    Args:
        ref: a native model folder; a foreign folder or file; or a Hub id `owner/name[@revision]`.
        dtype: "float32", "float16" or "bfloat16" to compute in; None: float16 on a GPU, float32 on a CPU.
        quantize: 4 or 8 bits per weight of the linear layers.
        lora: adapters to apply, each "REF", "REF@SCALE" or (ref, scale).
        lora_partial: leave out what of an adapter the model has no modules for; otherwise that is an error.
        vae: "full", the model's own autoencoder; "tiny"; or the reference of another one.
        base: for a lone U-Net, the model that its other parts come from; None: what its model card says.
        progress: told of downloads and conversions.

    Raises:
        ModelError: not found, broken, or of an unknown family.
        NetworkError: the Hub cannot be reached or refuses.
        UsageError: a setting that this model has no use for.
        DiskError: no space for the download or the conversion.
    """
    folder = native_folder(ref, dtype=dtype, base=base, progress=progress)
    index = read_model_index(folder)
    if index.pipeline in MODELS:
        raise ModelError(str(ref), f"is a lone {index.pipeline}, which makes no pictures by itself")
    if index.pipeline not in PIPELINES:
        raise ModelError(str(folder / MODEL_INDEX), f"{index.pipeline!r} is unknown, expected one of {list(PIPELINES)}")
    options = LoadOptions(dtype, quantize, parse_adapters(lora), lora_partial, vae, progress)
    return PIPELINES[index.pipeline](folder, index, options)


def check_memory(
    ref: str | Path,
    *,
    max_memory: float | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    vae: str = "full",
    base: str | Path | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    progress: Progress | None = None,
    **size: Any,
) -> Estimate:
    """Refuses what will not fit, before weights are loaded.

    Args:
        ref, dtype, quantize, vae, base, progress: as for `load`.
        max_memory: allowed, in GB; None: what the device has, where that is known.
        guidance_scale: None: the default, which is the sampler's.
        sampler: as for `generate`; None: "auto".
        size: of `mlx_cm.memory.estimate`: width, height, batch, low_ram.

    Raises:
        MemoryBudgetError: naming what each stage needs. Others as for `load`.
    """
    folder = native_folder(ref, dtype=dtype, base=base, progress=progress)
    index = read_model_index(folder)
    kinds = {part: folder / part for part, kind in index.components.items() if kind in MODELS}
    if vae not in VAES and "vae" in kinds:
        kinds["vae"] = autoencoder_folder(vae, progress)
    models = {part: build_model(path) for part, path in kinds.items()}
    parts = {part: model.config for part, model in models.items()}
    stored = {part: quantization_of(model) for part, model in models.items()}
    bits = {part: quantize if quantization is None else quantization.bits for part, quantization in stored.items()}
    size["guidance_batch"] = 2 if _is_guided(index, parts.get("unet"), guidance_scale, sampler) else 1
    needed = estimate(parts, dtype=dtype, quantize=bits, vae="tiny" if vae == "tiny" else "full", **size)
    check_budget(needed, max_memory)
    return needed


def _is_guided(index: ModelIndex, unet: Any, guidance_scale: float | None, sampler: str | None) -> bool:
    """Whether each step calls the network with and without the prompt."""
    if not isinstance(unet, UNet2DConditionConfig) or unet.time_cond_proj_dim is not None:
        return False
    settings = config_from_dict(LatentSettings, index.sampler, MODEL_INDEX)
    default = settings.defaults(sampler)[1] if sampler in SAMPLERS else settings.guidance_scale
    return (default if guidance_scale is None else guidance_scale) > 1


def load_component(folder: str | Path, dtype: str | None = None) -> nn.Module:
    """Loads one component (`unet/`) of a model, native or foreign.

    Raises:
        ModelError: not found, broken, or of an unknown class.
    """
    return load_model(component_folder(folder), dtype)


def parse_adapters(lora: Sequence[str | tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """(reference, scale) of each adapter."""
    return tuple(parse_lora_ref(one) if isinstance(one, str) else (str(one[0]), float(one[1])) for one in lora)


def adapter_provenance(adapters: Sequence[tuple[Adapter, float]]) -> list[dict[str, Any]]:
    """What a recipe or a model index says of adapters; local ones are named without their path."""
    return [
        {"name": adapter.name, "ref": adapter.ref, "scale": scale, "sha256": adapter.sha256}
        for adapter, scale in adapters
    ]


def adapted_settings(settings: LatentSettings, adapters: Sequence[tuple[Adapter, float]]) -> LatentSettings:
    """How a model with adapters is used: as without, or where it was not distilled as the adapter that distils it says.

    Raises:
        UsageError: adapters made for different samplers, or for another than the model.
    """
    said = {adapter.sampler for adapter, scale in adapters if adapter.sampler and scale}
    own = settings.sampler if settings.distilled else None
    if len(said | ({own} - {None})) > 1:
        raise UsageError("lora", f"distilled for {', '.join(sorted(said))}, the model for {own or 'none of them'}")
    return settings.adapted(next(iter(said), None))


def _load_pixel(folder: Path, index: ModelIndex, options: LoadOptions) -> ConsistencyModelPipeline:
    refused = {"quantize": options.quantize, "lora": options.lora, "vae": options.vae != "full"}
    for name, given in refused.items():
        if given:
            raise UsageError(name, "is for latent models; pixel-space consistency models are used as they are")
    return ConsistencyModelPipeline(
        backbone=load_model(folder / "unet", options.dtype),
        schedule=read_schedule(folder / "scheduler"),
        settings=config_from_dict(PixelSettings, index.sampler, str(folder / MODEL_INDEX)),
        provenance=index.provenance | {"weights": index.weights},
    )


def _load_latent(folder: Path, index: ModelIndex, options: LoadOptions) -> LatentConsistencyPipeline:
    settings = config_from_dict(LatentSettings, index.sampler, str(folder / MODEL_INDEX))
    encoders = [name for name in TEXT_ENCODERS if name in index.components]
    models = {name: load_model(folder / name, options.dtype) for name in ("unet", *encoders)}
    modules = {name: adaptable_modules(model) for name, model in models.items()}
    adapters = [
        (open_adapter(ref, modules, options.progress, partial=options.lora_partial), scale)
        for ref, scale in options.lora
    ]
    fuse_adapters(models, adapters)
    if options.quantize is not None:
        for model in models.values():
            in_device_form(quantize_model(model, options.quantize))
    tokenizers = [CLIPTokenizer.from_folder(folder / name.replace("text_encoder", "tokenizer")) for name in encoders]
    for name, tokenizer in zip(encoders, tokenizers, strict=True):
        known = models[name].config.vocab_size
        if tokenizer.vocab_size > known:  # an id beyond the table would be read from outside of it
            raise ModelError(str(folder / name), f"knows {known} tokens, its tokenizer has {tokenizer.vocab_size}")
    provenance = index.provenance | {"weights": index.weights, "quantize": options.quantize}
    if adapters:
        provenance |= {"lora": adapter_provenance(adapters), "lora_partial": options.lora_partial or None}
    if options.vae != "full":
        is_local = options.vae not in VAES and Path(options.vae).expanduser().exists()
        provenance["vae"] = {"name": Path(options.vae).name, "ref": None if is_local else options.vae}
    return LatentConsistencyPipeline(
        backbone=models["unet"],
        autoencoder=_load_autoencoder(folder, models["unet"], options),
        text_encoders=[models[name] for name in encoders],
        tokenizers=tokenizers,
        schedule=read_schedule(folder / "scheduler"),
        settings=adapted_settings(settings, adapters),
        provenance=provenance,
    )


def _load_autoencoder(folder: Path, unet: nn.Module, options: LoadOptions) -> nn.Module:
    """The autoencoder asked for; one that overflows in float16 stays in float32."""
    path = folder / "vae"
    if options.vae != "full":
        ref = TINY_AUTOENCODERS[unet.config.addition_embed_type] if options.vae == "tiny" else options.vae
        path = autoencoder_folder(ref, options.progress)
    overflows = getattr(build_model(path).config, "force_upcast", False)
    half = resolve_dtype(options.dtype) == mx.float16
    return load_model(path, "float32" if half and overflows else options.dtype)


def autoencoder_folder(ref: str | Path, progress: Progress | None = None) -> Path:
    """The native folder of an autoencoder, by itself or of a model that has one.

    Raises:
        ModelError: not found, broken, or something else.
    """
    folder = component_folder(ref, progress, part="vae")
    kind = type(build_model(folder)).__name__
    if kind not in AUTOENCODERS:
        raise ModelError(str(ref), f"is a {kind}, expected one of {', '.join(AUTOENCODERS)}")
    return folder


PIPELINES = {"ConsistencyModelPipeline": _load_pixel, "LatentConsistencyPipeline": _load_latent}
