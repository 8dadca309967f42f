"""The native model folder: `model_index.json`, one folder per component with `config.json` and safetensors weights.

The layout is the one of diffusers' pipelines, so that people and tools recognise it. Weights are stored channels-last
under the names of the modules' parameters and load without any renaming.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors
from mlx.utils import tree_flatten, tree_map_with_path

import mlx_cm
from mlx_cm.backend import default_dtype
from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_cm.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from mlx_cm.models.clip_text import CLIPTextConfig, CLIPTextModel
from mlx_cm.models.lpips import LPIPS, LPIPSConfig
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.quantization import Quantization, in_device_form, quantization_of, replace_linear_layers
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule
from mlx_cm.storage import (
    INDEX_NAME,
    WEIGHTS_NAME,
    TensorSource,
    check_safetensors,
    read_json,
    sibling_file,
    write_json,
    write_safetensors,
)

MODEL_INDEX = "model_index.json"
FORMAT = "mlx-cm"
FORMAT_VERSION = 1
SHARD_BYTES = 5 * 10**9
WEIGHTS_METADATA = {"format": "mlx", "layout": "channels-last"}
QUANTIZATION = "quantization"  # in a component's config and in the metadata of its weights

# Everything a model folder can hold, by the name its config gives.
MODELS = {
    "UNet2D": (UNet2D, UNet2DConfig),
    "UNet2DCondition": (UNet2DCondition, UNet2DConditionConfig),
    "AutoencoderKL": (AutoencoderKL, AutoencoderKLConfig),
    "AutoencoderTiny": (AutoencoderTiny, AutoencoderTinyConfig),
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "LPIPS": (LPIPS, LPIPSConfig),
}
SCHEDULES = {"KarrasSchedule": KarrasSchedule, "DiscreteSchedule": DiscreteSchedule}
SCHEDULE_CONFIG = "scheduler_config.json"

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
SAFETENSORS_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}


@dataclass(frozen=True)
class ModelIndex:
    """What `model_index.json` says of a model."""

    pipeline: str  # "ConsistencyModelPipeline"
    components: dict[str, str]  # folder => class: {"unet": "UNet2D", "scheduler": "KarrasSchedule"}
    sampler: dict[str, Any]  # the pipeline's own settings
    provenance: dict[str, Any]  # source, revision, files with sha256, converter
    weights: dict[str, str]  # path of each weights file => sha256


def is_native(folder: Path) -> bool:
    """Whether a folder is a native model, rather than one of another program."""
    index = Path(folder) / MODEL_INDEX
    return index.is_file() and read_json(index).get("_format") == FORMAT


def write_model_index(folder: Path, index: ModelIndex) -> None:
    """Writes `model_index.json`; last, since its presence makes the folder a model."""
    value = {"_class_name": index.pipeline, "_format": FORMAT, "_format_version": FORMAT_VERSION}
    value |= {name: [mlx_cm.__name__, kind] for name, kind in index.components.items()}
    value |= {"sampler": index.sampler, "provenance": index.provenance, "weights": index.weights}
    write_json(Path(folder) / MODEL_INDEX, value)


def read_model_index(folder: Path) -> ModelIndex:
    """Reads `model_index.json`.

    Raises:
        ModelError: missing, malformed, or of a newer format.
    """
    path = Path(folder) / MODEL_INDEX
    value = read_json(path)
    if value.get("_format") != FORMAT:
        raise ModelError(str(path), "is not a native mlx-cm model", f"mlx-cm convert {folder} DST")
    if value.get("_format_version") != FORMAT_VERSION:
        raise ModelError(
            str(path), f"has format version {value.get('_format_version')!r}, this program reads {FORMAT_VERSION}"
        )
    sections = {name: value.get(name) for name in ("sampler", "provenance", "weights")}
    components = {
        name: pair[1]
        for name, pair in value.items()
        if isinstance(pair, list) and len(pair) == 2 and not name.startswith("_")
    }
    malformed = [name for name, section in sections.items() if not isinstance(section, dict)]
    malformed += [name for name, kind in components.items() if kind not in [*MODELS, *SCHEDULES]]
    if malformed or not isinstance(value.get("_class_name"), str):
        raise ModelError(str(path), f"malformed or unknown entry {(malformed or ['_class_name'])[0]!r}")
    return ModelIndex(value["_class_name"], components, **sections)


def class_of(config: Any) -> str:
    """Name of the model that a config is for."""
    return next(name for name, (_, config_class) in MODELS.items() if config_class is type(config))


def weights_digest(weights: Mapping[str, str]) -> str | None:
    """One digest for the weights of a model: that of its only file, or a SHA-256 over names and digests of all."""
    if len(weights) <= 1:
        return next(iter(weights.values()), None)
    return hashlib.sha256(json.dumps(sorted(weights.items())).encode()).hexdigest()


def write_component(
    folder: Path, config: Any, tensors: Iterable[TensorSource], quantization: Quantization | None = None
) -> dict[str, str]:
    """Writes config and weights of one component, sharded where they exceed 5 GB.

    Args:
        quantization: of the tensors.

    Returns:
        Name of each weights file => sha256.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {} if quantization is None else {QUANTIZATION: config_to_dict(quantization)}
    write_json(folder / "config.json", {"_class_name": class_of(config), **config_to_dict(config), **stored})
    metadata = weights_metadata(quantization)
    shards = _shards(list(tensors))
    if len(shards) == 1:
        return {WEIGHTS_NAME: write_safetensors(folder / WEIGHTS_NAME, shards[0], metadata)}
    stem = Path(WEIGHTS_NAME).stem
    names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    digests = {
        name: write_safetensors(folder / name, shard, metadata) for name, shard in zip(names, shards, strict=True)
    }
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def write_schedule(folder: Path, schedule: Any) -> None:
    """Writes the schedule's settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCHEDULE_CONFIG, {"_class_name": type(schedule).__name__, **config_to_dict(schedule)})


def read_schedule(folder: Path) -> Any:
    """Reads the schedule's settings.

    Raises:
        ModelError: missing, malformed, or of an unknown kind.
    """
    path = Path(folder) / SCHEDULE_CONFIG
    values = read_json(path)
    kind = values.get("_class_name")
    if not isinstance(kind, str) or kind not in SCHEDULES:
        raise ModelError(str(path), f"_class_name {kind!r} is unknown, expected one of {list(SCHEDULES)}")
    return config_from_dict(SCHEDULES[kind], values, str(path))


def weights_metadata(quantization: Quantization | None) -> dict[str, str]:
    """What a weights file says of itself."""
    if quantization is None:
        return WEIGHTS_METADATA
    return WEIGHTS_METADATA | {QUANTIZATION: json.dumps(config_to_dict(quantization), sort_keys=True)}


def build_model(folder: Path) -> nn.Module:
    """The model that a component's `config.json` describes, quantised where it says so, with weights not yet loaded.

    Raises:
        ModelError: the config is missing, malformed, or of an unknown class.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    kind = values.get("_class_name")
    if not isinstance(kind, str) or kind not in MODELS:
        raise ModelError(str(path), f"_class_name {kind!r} is unknown, expected one of {list(MODELS)}")
    _, config_class = MODELS[kind]
    values = {key: value for key, value in values.items() if key != QUANTIZATION}
    model = new_model(config_from_dict(config_class, values, str(path)), str(path))
    quantization = stored_quantization(folder)
    if quantization is None:
        return model
    try:
        return replace_linear_layers(model, quantization)
    except ModelError as error:
        raise ModelError(str(path), str(error)) from None


def new_model(config: Any, where: str) -> nn.Module:
    """The model that a config describes; nothing is allocated before weights are loaded.

    Raises:
        ModelError: no array can have these sizes.
    """
    model_class, _ = MODELS[class_of(config)]
    try:
        return model_class(config)
    except (OverflowError, ValueError) as error:
        raise ModelError(where, f"describes no possible {model_class.__name__} ({error})") from None


def stored_quantization(folder: Path) -> Quantization | None:
    """How the weights of a component are quantised; None: they are not.

    Raises:
        ModelError: the config is missing or malformed.
    """
    path = Path(folder) / "config.json"
    values = read_json(path).get(QUANTIZATION)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ModelError(str(path), f"{QUANTIZATION}: expected an object, got {values!r}")
    return config_from_dict(Quantization, values, f"{path}: {QUANTIZATION}")


def load_model(folder: Path, dtype: str | None = None) -> nn.Module:
    """Builds a component and loads its weights, in the form to compute in.

    Args:
        dtype: "float32", "float16" or "bfloat16"; None: float16 on a GPU, float32 on a CPU.

    Raises:
        UsageError: an unknown dtype.
        ModelError: files missing or corrupt, tensors missing, unknown or of another shape.
    """
    wanted = resolve_dtype(dtype)
    return in_device_form(cast_model(load_stored(folder), wanted))


def cast_model(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Gives a model's weights a type, in place; its `float32_parts` float32, and packed integers stay."""
    kept = tuple(f"{part}." for part in model.float32_parts)

    def cast(name: str, value: mx.array) -> mx.array:
        if not mx.issubdtype(value.dtype, mx.floating):
            return value
        return value.astype(mx.float32 if name.startswith(kept) else dtype)

    model.update(tree_map_with_path(cast, model.parameters()))
    return model


def load_stored(folder: Path) -> nn.Module:
    """Builds a component and loads its weights as they are stored.

    Raises:
        ModelError: files missing or corrupt, tensors missing, unknown, of another shape, or quantised otherwise than
            the config says.
    """
    folder = Path(folder)
    model = build_model(folder)
    expected = weights_metadata(quantization_of(model))
    weights: dict[str, mx.array] = {}
    for path in weight_files(folder):
        metadata = check_safetensors(path)
        if metadata.get("format") != expected["format"]:
            raise ModelError(str(path), "is not in native layout", f"mlx-cm convert {folder} DST")
        if metadata.get(QUANTIZATION) != expected.get(QUANTIZATION):
            found, wanted = (values.get(QUANTIZATION, "none") for values in (metadata, expected))
            raise ModelError(str(path), f"is of another quantization ({found}) than config.json says ({wanted})")
        weights |= mx.load(str(path))
    check_names_and_shapes(model, {name: value.shape for name, value in weights.items()}, str(folder))
    for name, parameter in tree_flatten(model.parameters()):
        found = weights[name].dtype
        fits = found == mx.uint32 if parameter.dtype == mx.uint32 else mx.issubdtype(found, mx.floating)
        if not fits:
            raise ModelError(f"{folder}: {name}", f"expected {parameter.dtype}, got {found}")
    model.load_weights(list(weights.items()))
    return model.eval()


def resolve_dtype(dtype: str | None) -> mx.Dtype:
    """The type to compute in.

    Raises:
        UsageError: an unknown name.
    """
    if dtype is None:
        return default_dtype()
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}", f"expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def weight_files(folder: Path) -> list[Path]:
    """The weights files of a component.

    Raises:
        ModelError: there are none, or the index is malformed.
    """
    folder = Path(folder)
    if not (folder / INDEX_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(str(folder / INDEX_NAME), "has no weight_map")
    return sorted({sibling_file(folder, name) for name in weight_map.values()})


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name => (safetensors dtype, shape) of every tensor of a component; reads headers only.

    Raises:
        ModelError: missing or corrupt files.
    """
    found = {}
    for path in weight_files(folder):
        check_safetensors(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no mapping
            found |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    return found


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name; nothing is computed."""
    return {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}


def check_names_and_shapes(model: nn.Module, given: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Every parameter has its tensor and every tensor its parameter.

    Raises:
        ModelError: naming the first ten of each fault.
    """
    expected = parameter_shapes(model)
    faults = [f"{name} is missing" for name in expected if name not in given]
    faults += [f"{name} is not known to this model" for name in given if name not in expected]
    faults += [
        f"{name}: expected {shape}, got {tuple(given[name])}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != shape
    ]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ModelError(where, "; ".join(faults[:10]) + more)


def tensor_sources(model: nn.Module) -> list[TensorSource]:
    """A model's parameters, ready to be written."""
    return [
        TensorSource(name, SAFETENSORS_NAMES[value.dtype], tuple(value.shape), lambda value=value: _bits(value))
        for name, value in tree_flatten(model.parameters())
    ]


def _bits(value: mx.array) -> np.ndarray:
    return np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)


def _shards(tensors: list[TensorSource]) -> list[list[TensorSource]]:
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards
