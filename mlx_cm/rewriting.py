"""A native model folder made from another: of another type, quantised, or with adapters fused into its weights."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import mlx_cm
from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.loading import adapted_settings, adapter_provenance, parse_adapters
from mlx_cm.lora import adaptable_modules, fuse_adapters
from mlx_cm.model_folder import (
    MODEL_INDEX,
    MODELS,
    ModelIndex,
    cast_model,
    load_stored,
    read_model_index,
    resolve_dtype,
    stored_quantization,
    tensor_sources,
    write_component,
    write_model_index,
)
from mlx_cm.pipelines.latent import LatentSettings
from mlx_cm.quantization import BITS, FLOAT_LAYERS, quantization_of, quantize_model
from mlx_cm.sources import Progress, native_folder, open_adapter
from mlx_cm.storage import atomic_folder

LATENT = "LatentConsistencyPipeline"


def quantize_folder(source: Path, destination: Path, bits: int, *, overwrite: bool = False) -> Path:
    """Writes a native model whose U-Net and text encoders have linear layers of few bits; the rest is copied.

    One component is in memory at a time, in its quantised form. What is not quantised keeps its type, so a model
    stored in float32 is best converted to float16 first.

    Args:
        source: a native model folder.
        destination: the folder to make; it appears under its name when it is complete.
        bits: 4 or 8.

    Returns:
        The destination.

    Raises:
        UsageError: other bits; a model without such components; or the destination is the source.
        ModelError: the source is missing, broken, or quantised already.
        DiskError: the destination exists, or there is no space.
    """
    source = Path(source)
    if bits not in BITS:
        raise UsageError(f"quantize {bits}", f"expected one of {', '.join(map(str, BITS))} bits")
    index = read_model_index(source)
    parts = [part for part, kind in index.components.items() if kind in MODELS and MODELS[kind][0] in FLOAT_LAYERS]
    if not parts:
        raise UsageError(f"quantize {bits}", f"{index.pipeline} has no component that gains by it")
    for part in parts:
        stored = stored_quantization(source / part)
        if stored is not None:
            raise ModelError(str(source / part), f"is quantised to {stored.bits} bits already", "quantize the original")

    def change(part: str, model: nn.Module) -> nn.Module:
        return quantize_model(model, bits)

    step = {"bits": bits, **_step(index, parts)}
    return _rewrite(source, Path(destination), index, parts, change, {"quantization": step}, overwrite)


def cast_folder(source: Path, destination: Path, dtype: str, *, overwrite: bool = False) -> Path:
    """Writes a native model with weights of another type; what a network keeps in float32, and integers, stay.

    Args:
        source: a native model folder.
        destination: the folder to make; it appears under its name when it is complete.
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        The destination.

    Raises:
        UsageError: an unknown type, or the destination is the source.
        ModelError: the source is missing or broken, or a weight is too large for the type.
        DiskError: the destination exists, or there is no space.
    """
    source, wanted = Path(source), resolve_dtype(dtype)
    index = read_model_index(source)
    parts = [part for part, kind in index.components.items() if kind in MODELS]

    def change(part: str, model: nn.Module) -> nn.Module:
        model = cast_model(model, wanted)
        for name, value in tree_flatten(model.parameters()):
            if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all():
                raise ModelError(f"{source}: {part}.{name}", f"is beyond what {dtype} holds", "--dtype bfloat16")
        return model

    return _rewrite(source, Path(destination), index, parts, change, {"cast": dtype, **_step(index, parts)}, overwrite)


def fuse_folder(
    ref: str | Path,
    destination: Path,
    lora: Sequence[str],
    *,
    lora_partial: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a native model with adapters fused into its weights, in the type they are stored in.

    Args:
        ref: a model, as for `mlx_cm.load`.
        destination: the folder to make; it appears under its name when it is complete.
        lora: adapters, each "REF" or "REF@SCALE".
        lora_partial: leave out what of an adapter the model has no modules for.

    Returns:
        The destination.

    Raises:
        UsageError: a model that takes no adapters, no adapter, or the destination is the source.
        ModelError: model or adapter are missing, broken, or do not fit together.
        DiskError: the destination exists, or there is no space.
    """
    if not lora:
        raise UsageError("lora", "expected at least one adapter")
    source = native_folder(ref, progress=progress)
    index = read_model_index(source)
    if index.pipeline != LATENT:
        raise UsageError("lora", "is for latent models; pixel-space consistency models are used as they are")
    parts = [part for part, kind in index.components.items() if kind in ("UNet2DCondition", "CLIPTextModel")]
    modules = {part: adaptable_modules(load_stored(source / part)) for part in parts}
    adapters = [
        (open_adapter(one, modules, progress, partial=lora_partial), scale) for one, scale in parse_adapters(lora)
    ]
    changed = [part for part in parts if any(part in adapter.layers for adapter, _ in adapters)]

    def change(part: str, model: nn.Module) -> nn.Module:
        fuse_adapters(
            {part: model}, [(replace(one, layers={part: one.layers.get(part, {})}), s) for one, s in adapters]
        )
        return model

    settings = config_from_dict(LatentSettings, index.sampler, str(source / MODEL_INDEX))
    index = replace(index, sampler=config_to_dict(adapted_settings(settings, adapters)))
    step = {"adapters": adapter_provenance(adapters), **_step(index, changed)}
    return _rewrite(source, Path(destination), index, changed, change, {"fused": step}, overwrite)


def _rewrite(
    source: Path,
    destination: Path,
    index: ModelIndex,
    parts: Sequence[str],
    change: Callable[[str, nn.Module], nn.Module],
    provenance: dict[str, Any],
    overwrite: bool,
) -> Path:
    """Copies a model folder, but for the parts that change, one of which is in memory at a time."""
    if source.resolve().is_relative_to(destination.resolve()) or destination.resolve().is_relative_to(source.resolve()):
        raise UsageError(str(destination), "is the source, or one of the two is inside the other")
    with atomic_folder(destination, overwrite=overwrite) as partial:
        for path in sorted(source.iterdir()):
            if path.name.startswith(".") or path.name in (MODEL_INDEX, *parts):
                continue
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, partial / path.name)
        weights = {path: digest for path, digest in index.weights.items() if path.partition("/")[0] not in parts}
        for part in parts:
            model = change(part, load_stored(source / part))
            digests = write_component(partial / part, model.config, tensor_sources(model), quantization_of(model))
            weights |= {f"{part}/{name}": digest for name, digest in digests.items()}
        write_model_index(partial, replace(index, provenance=index.provenance | provenance, weights=weights))
    return destination


def _step(index: ModelIndex, parts: Sequence[str]) -> dict[str, Any]:
    """Which parts were changed, and the digests of the weights that they were made from."""
    return {
        "components": list(parts),
        "program": f"mlx-cm {mlx_cm.__version__}",
        "weights": {path: digest for path, digest in index.weights.items() if path.partition("/")[0] in parts},
    }
