"""LoRA files of every dialect to adapters, and adapters to the two dialects that other programs read."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cm.convert.casting import FLOATS, to_float32
from mlx_cm.convert.keymaps import lora as names
from mlx_cm.convert.keymaps.rules import SHOWN, to_channels_last
from mlx_cm.convert.readers import Checkpoint, choose_weight_files, open_checkpoint
from mlx_cm.errors import ModelError
from mlx_cm.lora import Adapter, LoraLayer
from mlx_cm.model_folder import weights_digest
from mlx_cm.storage import TensorSource, atomic_folder, read_json, sha256_file, write_json, write_safetensors

log = logging.getLogger("mlx_cm")

ADAPTER_CONFIG = "adapter_config.json"  # of peft
PEFT_FILE, PEFT_FOLDER, PEFT_PREFIX = "adapter_model.safetensors", "peft", "base_model.model."
KOHYA_FILE = "pytorch_lora_weights.safetensors"
STORED = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # metadata in which diffusers keeps peft's config, by component

# What a file says of the sampler it is made for: a word among these metadata, the first of which is this program's own.
SAMPLER_KEY = "mlx_cm.sampler"
SAMPLER_NOTES = (
    SAMPLER_KEY,
    "modelspec.title",
    "modelspec.description",
    "modelspec.tags",
    "modelspec.usage_hint",
    "ss_output_name",
    "ss_training_comment",
)
SAMPLERS = {"lcm", "tcd"}

# What a file says of the model it is made for.
BASE_NOTES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")

LARGEST = 1e9  # rank or alpha of any sense; JSON has no limit
PATTERN = re.compile(r"\^?[\w.-]+\$?")

Parts = dict[str, TensorSource]  # "down", "up", "mid", "alpha" => tensor


@dataclass(frozen=True)
class PeftSettings:
    """What peft's config says of strengths; without one, alpha is the rank."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # module => its own rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False  # alpha is divided by the rank's square root. Kalajdzievski, arXiv 2312.03732

    def alpha_of(self, path: str, rank: int) -> float:
        """The alpha that, divided by the rank, gives the layer's strength.

        Raises:
            ValueError: the config says another rank than the tensors have.
        """
        said = _by_pattern(self.rank_pattern, path, self.rank)
        if said not in (None, rank):
            raise ValueError(f"has rank {rank}, but the adapter's config says {said}")
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        if alpha is None:
            return float(rank)
        return float(alpha * rank**0.5 if self.rank_stabilised else alpha)


@dataclass(frozen=True)
class Source:
    """One weights file and what is known beside it."""

    checkpoint: Checkpoint
    settings: Mapping[str, PeftSettings]  # by component; "" for all
    component: str | None = None  # the one that the folder is named after

    @property
    def path(self) -> Path:
        """The weights file."""
        return self.checkpoint.files[0]


@dataclass
class Matching:
    """The modules of a file, sorted into those that the model has and the rest."""

    found: dict[tuple[str, str], tuple[str, Parts, Source]] = field(default_factory=dict)  # (component, path)
    left_over: list[str] = field(default_factory=list)
    dialects: Counter = field(default_factory=Counter)
    text_widths: set[int] = field(default_factory=set)  # of the text states that the file's modules take


def load_adapter(path: Path, modules: names.Modules, *, name: str | None = None, partial: bool = False) -> Adapter:
    """Reads a LoRA for a model.

    Known are the spellings of kohya's trainer (over diffusers' or the original module names), of diffusers, old and
    new, and of peft, as a file or as a folder with its `adapter_config.json`, or one such folder per component.

    Args:
        path: the file or folder.
        modules: what the model has to adapt: `mlx_cm.lora.adaptable_modules` of each component.
        name: what to call the adapter; None: the file's name.
        partial: whether modules that the model has not are passed over with a warning.

    Raises:
        ModelError: missing or broken, no LoRA, made for another model, only partly fitting, or with tensors that do
            not make layers.
    """
    path = Path(path)
    try:
        sources = _open(path, modules)
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from None
    metadata = {key: text for source in sources for key, text in source.checkpoint.metadata.items()}
    matching = _match(sources, modules)
    _check_base(path, matching, modules)
    _check_complete(path, matching, metadata, partial)
    layers: dict[str, dict[str, LoraLayer]] = {}
    for component, shapes in modules.items():
        for module in (module for module in shapes if (component, module) in matching.found):
            spelling, parts, source = matching.found[component, module]
            settings = source.settings.get(component, source.settings.get("", PeftSettings()))
            try:
                layer = _layer(module, parts, shapes[module], settings)
            except ValueError as error:
                raise ModelError(str(source.path), f"{spelling}: {error}") from None
            layers.setdefault(component, {})[module] = layer
    files = [file for source in sources for file in source.checkpoint.files]
    digest = weights_digest({str(file.relative_to(path.parent)): sha256_file(file) for file in files})
    name = name or (path.name if path.is_dir() else path.stem)
    return Adapter(name, layers, metadata, sampler_hint(metadata), digest)


def describe_adapter(path: Path) -> dict[str, Any] | None:
    """What a LoRA is, without a model to match it with; None for a file or folder that is no adapter.

    Returns:
        JSON values: number of modules, their ranks, spelling, base and sampler where the file tells them, sizes.

    Raises:
        ModelError: an adapter of another kind.
    """
    path = Path(path)
    try:
        sources = _open(path, {component: {} for component in names.KOHYA_PREFIXES})
    except (ModelError, OSError):
        return None  # whatever it is, it is not for this function to say what is wrong with it
    tensors = [tensor for source in sources for tensor in source.checkpoint.tensors.values()]
    if not names.is_adapter(tensor.name for tensor in tensors):
        return None
    matching = Matching()
    modules = [item for source in sources for item in _grouped(source, matching).items()]
    widths = {width for spelling, parts in modules if (width := _text_width(spelling, parts))}
    metadata = {key: text for source in sources for key, text in source.checkpoint.metadata.items()}
    return {
        "modules": len(modules),
        "ranks": sorted({parts["down"].shape[0] for _, parts in modules if "down" in parts and parts["down"].shape}),
        "spelling": matching.dialects.most_common(1)[0][0],
        "base": names.base_of(widths) or next((metadata[key] for key in BASE_NOTES if metadata.get(key)), None),
        "sampler": sampler_hint(metadata),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "metadata": metadata,
    }


def sampler_hint(metadata: Mapping[str, str]) -> str | None:
    """The sampler that a file's metadata name, "lcm" or "tcd"; None where they name none, or both."""
    for keys in ((SAMPLER_KEY,), SAMPLER_NOTES):
        words = {word for key in keys for word in re.split(r"[\W_]+", metadata.get(key, "").lower())}
        if len(words & SAMPLERS) == 1:
            return next(iter(words & SAMPLERS))
    return None


# ---- opening ----


def _open(path: Path, modules: names.Modules) -> list[Source]:
    """The file; or the folder's file; or one folder per component, as peft's text-to-image examples write them."""
    if path.is_dir() and not (path / ADAPTER_CONFIG).is_file():
        folders = [path / component for component in modules if (path / component / ADAPTER_CONFIG).is_file()]
        if folders:
            return [_open_one(folder, folder.name) for folder in folders]
    component = path.name if path.is_dir() and path.name in modules else None
    return [_open_one(path, component)]


def _open_one(path: Path, component: str | None) -> Source:
    settings: dict[str, PeftSettings] = {}
    if path.is_dir():
        config = path / ADAPTER_CONFIG
        if config.is_file():
            settings[""] = _peft_settings(read_json(config), str(config))
        path = _weights_file(path)
    checkpoint = open_checkpoint(path)
    return Source(checkpoint, settings or _diffusers_settings(checkpoint), component)


def _weights_file(folder: Path) -> Path:
    """The file in a folder: one of a usual name, or the only one there is."""
    files = [file.name for file in folder.iterdir() if file.is_file()]
    candidates = [name for name in files if name.endswith(".safetensors")]
    return folder / candidates[0] if len(candidates) == 1 and not choose_weight_files(files) else folder


def _diffusers_settings(checkpoint: Checkpoint) -> dict[str, PeftSettings]:
    text = checkpoint.metadata.get(DIFFUSERS_CONFIG)
    if not text:
        return {}
    where = f"{checkpoint.files[0]}, metadata {DIFFUSERS_CONFIG}"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(where, f"not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(where, f"expected a JSON object, got {type(values).__name__}")
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, dot, setting = key.partition(".")
        by_component.setdefault(component if dot else "", {})[setting or key] = value
    return {component: _peft_settings(config, where) for component, config in by_component.items()}


def _peft_settings(values: Mapping[str, Any], where: str) -> PeftSettings:
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelError(where, f"is an adapter of kind {kind!r}, not LoRA")
    settings = PeftSettings(
        values.get("r"),
        values.get("lora_alpha"),
        values.get("rank_pattern") or {},
        values.get("alpha_pattern") or {},
        values.get("use_rslora") or False,
    )
    patterns = {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}
    numbers = {"r": settings.rank, "lora_alpha": settings.alpha}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ModelError(where, f"{key}: expected an object, got {pattern!r}")
        for module, number in pattern.items():
            if not PATTERN.fullmatch(module.replace(r"\.", ".")):
                raise ModelError(where, f"{key}: {module!r} is a regular expression, only names are supported")
            numbers[f"{key} {module}"] = number
    for key, number in numbers.items():
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= LARGEST
        if number is not None and not is_number:
            raise ModelError(where, f"{key}: expected a number, got {number!r}")
    if not isinstance(settings.rank_stabilised, bool):
        raise ModelError(where, f"use_rslora: expected true or false, got {settings.rank_stabilised!r}")
    return settings


def _by_pattern(pattern: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """peft's rule: the first name that is the module's path, or the end of it unless it begins with ^."""
    paths = (path, path.removeprefix(names.OMITTED_BEGINNING))
    for key, value in pattern.items():
        name = key.replace(r"\.", ".").removeprefix("^").removesuffix("$")
        if name in paths or (key[0] != "^" and path.endswith(f".{name}")):
            return value
    return otherwise


# ---- matching ----


def _match(sources: Iterable[Source], modules: names.Modules) -> Matching:
    meanings, matching = names.module_names(modules), Matching()
    for source in sources:
        for spelling, parts in _grouped(source, matching).items():
            meant = _meant(meanings.get(spelling, set()), spelling, source)
            if meant is None:
                matching.left_over.append(spelling)
            elif meant in matching.found:
                other = matching.found[meant][0]
                raise ModelError(str(source.path), f"has {'.'.join(meant)} twice, as {other} and as {spelling}")
            else:
                matching.found[meant] = (spelling, parts, source)
            width = _text_width(spelling, parts)
            if width:
                matching.text_widths.add(width)
    return matching


def _text_width(spelling: str, parts: Parts) -> int | None:
    """Width of the text states that a module takes, where it takes any."""
    takes_text = "down" in parts and len(parts["down"].shape) > 1 and names.TEXT_KEYS.search(spelling)
    return parts["down"].shape[1] if takes_text else None


def _grouped(source: Source, matching: Matching) -> dict[str, Parts]:
    """The tensors by module, as the file spells it; what is no part of a LoRA is left over."""
    tensors = source.checkpoint.tensors
    kind = names.other_kind(tensors)
    if kind:
        raise ModelError(str(source.path), f"is an adapter of another kind than LoRA: {kind}, which is not supported")
    grouped: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        split = names.split_name(name)
        if split is None:
            matching.left_over.append(name)
            continue
        module, part, dialect = split
        if part in grouped.setdefault(module, {}):
            raise ModelError(str(source.path), f"has two tensors for the {part} of {module}")
        grouped[module][part] = tensor
        if dialect:
            matching.dialects[dialect] += 1
    if not matching.dialects:
        raise ModelError(str(source.path), f"is no LoRA; its tensors are called {_listed(tensors) or 'nothing'}")
    return grouped


def _meant(meanings: set[tuple[str, str]], spelling: str, source: Source) -> tuple[str, str] | None:
    if len(meanings) > 1:
        meanings = {meaning for meaning in meanings if meaning[0] == source.component} or meanings
    if len(meanings) > 1:
        options = " or ".join(sorted(".".join(meaning) for meaning in meanings))
        raise ModelError(
            str(source.path), f"{spelling} can mean {options}", "name the folder after the component it is for"
        )
    return next(iter(meanings), None)


def _check_base(path: Path, matching: Matching, modules: names.Modules) -> None:
    """Refuses what is made for another base: the width of the text states tells."""
    widths = {
        shape[-1] for paths in modules.values() for module, shape in paths.items() if names.TEXT_KEYS.search(module)
    }
    if widths and matching.text_widths and not widths & matching.text_widths:
        made_for, model = names.base_of(matching.text_widths), names.base_of(widths)
        raise ModelError(str(path), f"is made for {made_for}; this model is {model}", "choose the LoRA for this base")


def _check_complete(path: Path, matching: Matching, metadata: Mapping[str, str], partial: bool) -> None:
    if not matching.left_over:
        return
    dialect = matching.dialects.most_common(1)[0][0]
    count = len(matching.found) + len(matching.left_over)
    why = (
        f"{len(matching.left_over)} of its {count} modules are not in this model, in {dialect} spelling: "
        f"{_listed(matching.left_over)}"
    )
    made_for = names.other_model(matching.left_over)
    said = next((metadata[key] for key in BASE_NOTES if metadata.get(key)), None)
    if made_for or said:
        why += f"; it is made for {made_for or repr(said)}"
    if not matching.found:
        raise ModelError(str(path), f"fits nothing: {why}", "choose the LoRA for this base")
    if not partial:
        raise ModelError(str(path), f"fits only partly: {why}", "choose the LoRA for this base, or pass --lora-partial")
    log.warning("%s: passed over: %s", path, why)


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


# ---- building ----


def _layer(path: str, parts: Parts, shape: tuple[int, ...], settings: PeftSettings) -> LoraLayer:
    """One layer in native layout.

    Raises:
        ValueError: a part is missing, has another shape or number format, or holds NaN or infinity.
    """
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise ValueError(f"has {' and '.join(parts)}, but no {' and no '.join(missing)}")
    down, up = parts["down"], parts["up"]
    if min(len(down.shape), len(up.shape)) < 2 or not down.shape[0] or up.shape[1] != down.shape[0]:
        raise ValueError(f"no LoRA of rank 1 or more has a down of shape {down.shape} and an up of shape {up.shape}")
    if "mid" in parts:
        down = _with_mid(down, parts["mid"])
    rank = down.shape[0]
    wanted = {"down": (rank, *shape[1:]), "up": (shape[0], *(1,) * (len(shape) - 2), rank)}
    arrays = {part: _in_layout(part, tensor, wanted[part]) for part, tensor in {"down": down, "up": up}.items()}
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else settings.alpha_of(path, rank)
    return LoraLayer.from_numpy(path, **arrays, alpha=alpha)


def _with_mid(down: TensorSource, mid: TensorSource) -> TensorSource:
    """A kernel between 1x1 kernels (LyCORIS' Tucker form) joined with the one below: together they are one down."""
    rank = down.shape[0]
    if len(mid.shape) != 4 or mid.shape[:2] != (rank, rank) or any(size != 1 for size in down.shape[2:]):
        raise ValueError(f"a mid of shape {mid.shape} does not go with a down of shape {down.shape}")

    def read() -> np.ndarray:
        below = _float32("down", down).reshape(rank, -1)  # (rank, in)
        joined = np.tensordot(_float32("mid", mid), below, axes=(1, 0))  # (rank, height, width, in)
        return joined.transpose(0, 3, 1, 2)

    return TensorSource(down.name, "F32", (rank, down.shape[1], *mid.shape[2:]), read)


def _in_layout(part: str, tensor: TensorSource, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's values in a layer's layout; a matrix serves as 1x1 kernel, as the reverse is true."""
    if len(tensor.shape) == 2 and len(shape) == 4:
        read, kernel = tensor.read, (*tensor.shape, 1, 1)
        tensor = replace(tensor, shape=kernel, read=lambda: read().reshape(kernel))
    try:
        tensor = to_channels_last(tensor, shape)
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from None
    array = tensor.read() if tensor.dtype == "F16" else _float32(part, tensor)
    if not np.isfinite(array).all():
        raise ValueError(f"{part} holds NaN or infinity")
    return array


def _float32(part: str, tensor: TensorSource) -> np.ndarray:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{part} holds {tensor.dtype} numbers, which are not supported")
    return to_float32(tensor.read(), tensor.dtype)


def _alpha(tensor: TensorSource) -> float:
    if int(np.prod(tensor.shape, dtype=np.int64)) != 1:
        raise ValueError(f"alpha has shape {tensor.shape}, expected one number")
    is_integer = tensor.dtype[0] in "IU"
    alpha = float((tensor.read() if is_integer else _float32("alpha", tensor)).reshape(()))
    if not np.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, expected a finite number")
    return alpha


# ---- the way back ----


def to_kohya(adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter's tensors in kohya's spelling, which the programs around Stable Diffusion read, in PyTorch's layout.

    The text encoder of a model with two of them is called te1, that of a model with one te.
    """
    numbered = "text_encoder_2" in adapter.layers
    tensors = {}
    for component, layers in adapter.layers.items():
        prefix = names.KOHYA_PREFIXES[component][-1 if numbered else 0]
        for path, layer in layers.items():
            name = names.kohya_name(prefix, path)
            down, up = map(_channels_first, layer.numpy())
            tensors |= {name + names.DOWN: down, name + names.UP: up}
            tensors[name + names.ALPHA] = np.array(layer.alpha, np.float32)
    return tensors


def to_peft(adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter's tensors as diffusers saves them with peft, in PyTorch's layout.

    These names have no common place for alpha. Where it is missing every program takes the rank, so what alpha says
    beyond that goes into the values of lora_B.
    """
    tensors = {}
    for component, layers in adapter.layers.items():
        for path, layer in layers.items():
            down, up = map(_channels_first, layer.numpy())
            scaled = (up.astype(np.float32) * (layer.alpha / layer.rank)).astype(up.dtype)
            tensors |= {
                f"{component}.{path}{names.PEFT_DOWN}": down,
                f"{component}.{path}{names.PEFT_UP}": scaled,
            }
    return tensors


def write_adapter(adapter: Adapter, folder: Path) -> Path:
    """Writes an adapter of a U-Net in the two forms that other programs load.

    `pytorch_lora_weights.safetensors` has kohya's keys, with each layer's alpha; `peft/` is a folder of peft, with the
    config that `PeftModel` reads. Both name the sampler that the adapter was made for.

    Args:
        folder: the folder to make; it takes the place of an old one when it is complete.

    Raises:
        DiskError: there is no space; nothing half-written stays behind.
    """
    notes = {**adapter.metadata, "format": "pt"} | ({SAMPLER_KEY: adapter.sampler} if adapter.sampler else {})
    with atomic_folder(folder, overwrite=True) as partial:
        write_safetensors(partial / KOHYA_FILE, _sources(to_kohya(adapter)), notes)
        (partial / PEFT_FOLDER).mkdir()
        write_json(partial / PEFT_FOLDER / ADAPTER_CONFIG, _peft_config(adapter))
        write_safetensors(partial / PEFT_FOLDER / PEFT_FILE, _sources(_peft_tensors(adapter)), notes)
    return folder


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """What peft's `LoraConfig` says of an adapter whose layers have one rank and one alpha."""
    (layers,) = adapter.layers.values()
    ranks, alphas = ({getattr(layer, name) for layer in layers.values()} for name in ("rank", "alpha"))
    if len(ranks) != 1 or len(alphas) != 1:
        raise ModelError(adapter.name, f"has layers of ranks {sorted(ranks)} and alphas {sorted(alphas)}")
    (rank,), (alpha,) = ranks, alphas
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers),
        "inference_mode": True,
    }


def _peft_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter's tensors as peft's `save_pretrained` names them; alpha is in the config."""
    tensors = {}
    for layers in adapter.layers.values():
        for path, layer in layers.items():
            down, up = map(_channels_first, layer.numpy())
            tensors |= {f"{PEFT_PREFIX}{path}{names.PEFT_DOWN}": down, f"{PEFT_PREFIX}{path}{names.PEFT_UP}": up}
    return tensors


def _sources(tensors: Mapping[str, np.ndarray]) -> list[TensorSource]:
    return [
        TensorSource(name, STORED[array.dtype], array.shape, lambda array=array: array)
        for name, array in tensors.items()
    ]


def _channels_first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)
