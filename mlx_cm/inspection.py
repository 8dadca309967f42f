"""What a model, a checkpoint, a repository or a picture is; nothing is loaded for it but headers."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_cm import hub, metadata
from mlx_cm.config import config_to_dict
from mlx_cm.errors import ModelError
from mlx_cm.images import FORMATS
from mlx_cm.memory import estimate
from mlx_cm.model_folder import (
    MODELS,
    build_model,
    is_native,
    new_model,
    parameter_shapes,
    read_model_index,
    stored_quantization,
    stored_tensors,
)
from mlx_cm.sources import adapter_summary, hub_reference, plan_ref
from mlx_cm.storage import NUMPY_DTYPES

PICTURES = {extension for kind in FORMATS.values() for extension in kind.extensions}


def describe(ref: str | Path) -> dict[str, Any]:
    """Describes a native model, a foreign checkpoint, an adapter, a Hub repository or a picture made by this program.

    Returns:
        JSON values, headed by `kind`: "model", "checkpoint", "adapter", "repository" or "picture".

    Raises:
        ModelError: not found, or broken. NetworkError: the Hub cannot be reached or refuses.
    """
    path = Path(ref).expanduser()
    if not path.exists():
        return _describe_repository(str(ref))
    if path.is_file() and path.suffix.lower() in PICTURES:
        return _describe_picture(path)
    if path.is_dir() and is_native(path):
        return _describe_model(path)
    adapter = adapter_summary(path)
    if adapter is not None:
        return {"kind": "adapter", "name": path.resolve().name, **adapter}
    return _describe_checkpoint(path)


def _describe_picture(path: Path) -> dict[str, Any]:
    recipe, parameters, reasons = None, None, []
    try:
        recipe = metadata.read_recipe(path)
    except ModelError as error:
        reasons.append(error)
    try:
        parameters = metadata.read_parameters(path)
    except ModelError as error:
        reasons.append(error)
    if recipe is None and parameters is None:
        raise reasons[0]
    return {"kind": "picture", "name": path.name, "recipe": recipe, "parameters": parameters}


def _describe_repository(ref: str) -> dict[str, Any]:
    listing = hub.list_files(hub_reference(ref))
    files = [{"name": file.name, "bytes": file.size} for file in listing.files]
    return {"kind": "repository", "name": listing.repo_id, "revision": listing.revision, "files": files}


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    plan = plan_ref(path)
    components = {
        part: describe_component(
            component.kind,
            component.config,
            {name: (tensor.dtype, tensor.shape) for name, tensor in component.tensors.items()},
        )
        for part, component in plan.components.items()
    }
    return {
        "kind": "checkpoint",
        "name": path.resolve().name,
        "family": plan.family,
        "pipeline": plan.pipeline,
        "sampler": plan.sampler,
        "components": components,
        "memory_bytes": estimate({part: component.config for part, component in plan.components.items()}).peak,
        "notes": list(plan.notes),
    }


def _describe_model(folder: Path) -> dict[str, Any]:
    index = read_model_index(folder)
    parts = {part: kind for part, kind in index.components.items() if kind in MODELS}
    configs = {part: build_model(folder / part).config for part in parts}
    components = {
        part: describe_component(kind, configs[part], stored_tensors(folder / part)) for part, kind in parts.items()
    }
    quantized = {part: stored_quantization(folder / part) for part in parts}
    bits = {part: stored.bits for part, stored in quantized.items() if stored is not None}
    return {
        "kind": "model",
        "name": folder.resolve().name,
        "pipeline": index.pipeline,
        "sampler": index.sampler,
        "components": components,
        "memory_bytes": estimate(configs, quantize=bits).peak,
        "bits": bits,
        "provenance": index.provenance,
        "weights": index.weights,
    }


def describe_component(kind: str, config: Any, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Numbers of one component.

    Args:
        tensors: name => (safetensors dtype, shape).
    """
    sizes = {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    shapes = parameter_shapes(new_model(config, kind))  # those of the tensors, but for quantised ones, which are packed
    return {
        "class": kind,
        "parameters": sum(map(math.prod, shapes.values())),
        "tensors": len(tensors),
        "dtypes": sorted({dtype for dtype, _ in tensors.values()}),
        "bytes": sum(sizes[name] * NUMPY_DTYPES[dtype].itemsize for name, (dtype, _) in tensors.items()),
        "config": config_to_dict(config),
        "shapes": {name: list(shape) for name, (_, shape) in tensors.items()},
    }


def report_lines(description: dict[str, Any]) -> Iterator[str]:
    """A description for people."""
    yield from REPORTS[description["kind"]](description)


def _picture_lines(description: dict[str, Any]) -> Iterator[str]:
    yield f"picture {description['name']}"
    if description["recipe"] is None:
        yield "made by another program, which says:"
        yield description["parameters"]
        return
    for key, value in description["recipe"].items():
        if value is not None:
            yield f"  {key}: {value}"


def _repository_lines(description: dict[str, Any]) -> Iterator[str]:
    yield f"repository {description['name']} at {description['revision']}"
    for file in description["files"]:
        size = "" if file["bytes"] is None else f"{file['bytes'] / 1e6:,.1f} MB"
        yield f"  {file['name']}  {size}"


def _adapter_lines(description: dict[str, Any]) -> Iterator[str]:
    ranks = ", ".join(map(str, description["ranks"]))
    size = f"{', '.join(description['dtypes'])}, {description['bytes'] / 1e6:,.1f} MB"
    yield f"adapter {description['name']}: LoRA"
    yield f"  {description['modules']} modules in {description['spelling']} spelling, rank {ranks}, {size}"
    yield f"  base: {description['base'] or 'not said'}"
    yield f"  sampler: {description['sampler'] or 'not said'}"


def _model_lines(description: dict[str, Any]) -> Iterator[str]:
    yield f"{description['kind']} {description['name']}: {description['pipeline']}"
    for part, component in description["components"].items():
        size = f"{component['parameters']:,} parameters in {component['tensors']} tensors"
        stored = f"{', '.join(component['dtypes'])}, {component['bytes'] / 1e6:,.1f} MB"
        bits = description.get("bits", {}).get(part)
        size += f" of {bits} bits where linear" if bits else ""
        yield f"  {part}: {component['class']}, {size}, {stored}"
    if description["memory_bytes"]:  # otherwise nothing is generated with it
        yield f"  memory to generate, estimated: {description['memory_bytes'] / 1e9:.2f} GB"
    for key, value in description["sampler"].items():
        yield f"  {key}: {value}"
    provenance = description.get("provenance", {})
    for key in ("source", "revision", "family", "converter"):
        if provenance.get(key):
            yield f"  {key}: {provenance[key]}"
    for file in provenance.get("files", []):
        yield f"  from {file['name']}, sha256 {file['sha256']}"
    for note in description.get("notes", []):
        yield f"  note: {note}"


REPORTS = {
    "adapter": _adapter_lines,
    "picture": _picture_lines,
    "repository": _repository_lines,
    "checkpoint": _model_lines,
    "model": _model_lines,
}
