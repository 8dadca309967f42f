"""A native model folder made from another by quantising it."""

import shutil
from pathlib import Path
from typing import Any

import mlx_cm
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import (
    MODEL_INDEX,
    MODELS,
    ModelIndex,
    load_stored,
    read_model_index,
    stored_quantization,
    tensor_sources,
    write_component,
    write_model_index,
)
from mlx_cm.quantization import BITS, FLOAT_LAYERS, quantize_model
from mlx_cm.storage import atomic_folder


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
    source, destination = Path(source), Path(destination)
    if bits not in BITS:
        raise UsageError(f"quantize {bits}", f"expected one of {', '.join(map(str, BITS))} bits")
    if source.resolve().is_relative_to(destination.resolve()) or destination.resolve().is_relative_to(source.resolve()):
        raise UsageError(str(destination), "is the source, or one of the two is inside the other")
    index = read_model_index(source)
    parts = [part for part, kind in index.components.items() if kind in MODELS and MODELS[kind][0] in FLOAT_LAYERS]
    if not parts:
        raise UsageError(f"quantize {bits}", f"{index.pipeline} has no component that gains by it")
    for part in parts:
        stored = stored_quantization(source / part)
        if stored is not None:
            raise ModelError(str(source / part), f"is quantised to {stored.bits} bits already", "quantize the original")

    with atomic_folder(destination, overwrite=overwrite) as partial:
        _copy_rest(source, partial, parts)
        weights = {path: digest for path, digest in index.weights.items() if path.partition("/")[0] not in parts}
        for part in parts:
            digests = _write_quantized(source / part, partial / part, bits)
            weights |= {f"{part}/{name}": digest for name, digest in digests.items()}
        step = _provenance(index, parts, bits)
        provenance = index.provenance | {"quantization": step}
        write_model_index(partial, ModelIndex(index.pipeline, index.components, index.sampler, provenance, weights))
    return destination


def _write_quantized(source: Path, destination: Path, bits: int) -> dict[str, str]:
    model = quantize_model(load_stored(source), bits)
    return write_component(destination, model.config, tensor_sources(model), model.quantization)


def _copy_rest(source: Path, destination: Path, parts: list[str]) -> None:
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in (MODEL_INDEX, *parts):
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, destination / path.name)


def _provenance(index: ModelIndex, parts: list[str], bits: int) -> dict[str, Any]:
    """What was done to the model, and the digests of the weights that it was done to."""
    return {
        "bits": bits,
        "components": parts,
        "program": f"mlx-cm {mlx_cm.__version__}",
        "weights": {path: digest for path, digest in index.weights.items() if path.partition("/")[0] in parts},
    }
