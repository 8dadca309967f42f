"""The parts of a model of Stable Diffusion's family: where they lie, and where those come from that a source lacks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_cm.convert.casting import DTYPE_NAMES, cast
from mlx_cm.convert.model_card import base_model_of_card
from mlx_cm.convert.planning import Component, Options, component_with_config
from mlx_cm.convert.readers import open_checkpoint
from mlx_cm.convert.schedulers import SCHEDULER, SCHEDULER_CONFIG, discrete_schedule
from mlx_cm.errors import ModelError
from mlx_cm.model_folder import (
    MODEL_INDEX,
    build_model,
    check_names_and_shapes,
    is_native,
    read_model_index,
    read_schedule,
    stored_quantization,
)
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import read_json
from mlx_cm.tokenizer import FILES as TOKENIZER_FILES
from mlx_cm.tokenizer import CLIPTokenizer

PIPELINE = "LatentConsistencyPipeline"

# The parts of a model, by folder, and the native classes that can stand there.
PARTS = {
    "unet": ("UNet2DCondition",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer",),
    "tokenizer_2": ("CLIPTokenizer",),
}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")  # in the order of their encoders
ONLY_XL = ("text_encoder_2", "tokenizer_2")

# Which published model a U-Net was made from, as far as its config tells.
BASE_SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BASE_SD2 = "stabilityai/stable-diffusion-2-1-base"
BASE_XL = "stabilityai/stable-diffusion-xl-base-1.0"
BASE_SSD = "segmind/SSD-1B"
SD2_TEXT_WIDTH = 1024


class MissingParts(ModelError):
    """The source is no whole model; `Options.base` gives the rest.

    Attributes:
        parts: the folders of the base that are needed, beside its `model_index.json`.
        base: a Hub id that has them: the one that the model's card names, or the published model of this size.
    """

    def __init__(self, what: str, why: str, parts: tuple[str, ...], base: str, hint: str | None = None):
        super().__init__(what, why, hint or f"pass --base {base}")
        self.parts, self.base = parts, base


@dataclass(frozen=True)
class Parts:
    """Parts of a model, and where nothing but files is needed, those."""

    components: dict[str, Component] = field(default_factory=dict)
    files: dict[str, Path | bytes] = field(default_factory=dict)  # path inside the model => content

    def __or__(self, other: "Parts") -> "Parts":
        return Parts(self.components | other.components, self.files | other.files)

    @property
    def names(self) -> set[str]:
        """The folders that are there."""
        return {*self.components, *(path.partition("/")[0] for path in self.files)}


def parts_wanted(config: UNet2DConditionConfig) -> list[str]:
    """The folders of a model with such a U-Net."""
    return [name for name in PARTS if is_xl(config) or name not in ONLY_XL]


def is_xl(config: UNet2DConditionConfig) -> bool:
    return config.addition_embed_type == "text_time"


def entry(folder: Path, index: Mapping[str, Any], name: str) -> str | None:
    """The class of a part, None where the index has none.

    Raises:
        ModelError: the entry is malformed.
    """
    value = index.get(name)
    if not isinstance(value, list) and name not in PARTS:
        return None  # a setting of the pipeline
    value = [None, None] if value is None else value
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], str | None):
        raise ModelError(str(folder / MODEL_INDEX), f"{name}: expected [library, class], got {value!r}")
    return value[1]


def pipeline_parts(folder: Path, index: Mapping[str, Any], names: list[str], options: Options) -> Parts:
    """Parts of a pipeline folder.

    Raises:
        ModelError: one is missing, broken or of another class.
    """
    parts = Parts()
    for name in names:
        if name in TOKENIZERS:
            parts |= Parts(files=tokenizer_files(folder / name, name))
        else:
            parts |= Parts({name: pipeline_component(folder, index, name, options)})
    return parts


def pipeline_component(folder: Path, index: Mapping[str, Any], name: str, options: Options) -> Component:
    published = entry(folder, index, name)
    if published is None:
        raise ModelError(str(folder / MODEL_INDEX), f"has no {name}")
    component = component_with_config(folder / name, options, published=published)
    if component.kind not in PARTS[name]:
        raise ModelError(
            str(folder / MODEL_INDEX), f"{name} is a {published}, which is no {' and no '.join(PARTS[name])}"
        )
    return component


def tokenizer_files(folder: Path, name: str) -> dict[str, Path]:
    """The files of a tokenizer by their path inside a model, once they have shown to be CLIP's.

    Raises:
        ModelError: missing, broken, or of another kind.
    """
    if not folder.is_dir():
        raise ModelError(str(folder), "folder is missing")
    CLIPTokenizer.from_folder(folder)
    return {f"{name}/{file}": folder / file for file in TOKENIZER_FILES if (folder / file).is_file()}


def parts_from_base(options: Options, names: list[str], missing: MissingParts) -> Parts:
    """Parts that the source lacks.

    Raises:
        MissingParts: there is no base.
    """
    if options.base is None:
        raise missing
    base = Path(options.base)
    if not base.is_dir():
        raise ModelError(str(base), "no such folder; the base is a pipeline folder or a native model")
    index = base_index(base)
    if is_native(base):
        parts = Parts()
        for name in names:
            if name in TOKENIZERS:
                parts |= Parts(files=tokenizer_files(base / name, name))
            else:
                parts |= Parts({name: _native_component(base / name, options)})
    else:
        parts = pipeline_parts(base, index, names, options)
    return replace(parts, components={name: replace(part, from_base=True) for name, part in parts.components.items()})


def base_index(base: Path) -> Mapping[str, Any]:
    """What `model_index.json` of the base says, settings of a native model as those of a foreign one."""
    if is_native(base):
        index = read_model_index(base)
        if index.pipeline != PIPELINE:
            raise ModelError(str(base), f"is a {index.pipeline}; the base has to be of Stable Diffusion's family")
        return index.sampler
    return read_json(Path(base) / MODEL_INDEX)


def base_schedule(base: Path) -> tuple[DiscreteSchedule, str | None]:
    if is_native(base):
        return read_schedule(base / SCHEDULER), None
    path = Path(base) / SCHEDULER / SCHEDULER_CONFIG
    return discrete_schedule(read_json(path), str(path))


def _native_component(folder: Path, options: Options) -> Component:
    """A component of a native model: its tensors are in place already."""
    if stored_quantization(folder) is not None:
        raise ModelError(str(folder), "is quantised; a base has to have its full weights")
    model = build_model(folder)
    checkpoint = open_checkpoint(folder)
    check_names_and_shapes(model, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, str(folder))
    dtype = DTYPE_NAMES[options.dtype] if options.dtype else None
    tensors = {name: cast(tensor, dtype) for name, tensor in checkpoint.tensors.items()}
    return Component(model.config, checkpoint, tensors)


def base_of(config: UNet2DConditionConfig) -> str:
    """The published model that a U-Net of this layout was most likely made from."""
    if is_xl(config):
        return BASE_XL if config.mid_block_type == "UNetMidBlock2DCrossAttn" else BASE_SSD
    return BASE_SD2 if config.cross_attention_dim == SD2_TEXT_WIDTH else BASE_SD1


def base_in_card(source: Path) -> str | None:
    card = (source if source.is_dir() else source.parent) / "README.md"
    try:
        return base_model_of_card(card.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
