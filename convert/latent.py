"""Planning the conversion of Stable Diffusion's family: pipeline folders, U-Nets with a base, single files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cm.config import config_from_dict
from mlx_cm.convert.casting import DTYPE_NAMES, cast, to_float32
from mlx_cm.convert.keymaps.clip_text import clip_text_config, clip_text_rules
from mlx_cm.convert.keymaps.ldm_autoencoder import (
    ldm_autoencoder_config,
    ldm_autoencoder_rules,
)
from mlx_cm.convert.keymaps.ldm_unet import is_ldm_unet, ldm_unet_config, ldm_unet_rules
from mlx_cm.convert.keymaps.open_clip import open_clip_config, open_clip_rules
from mlx_cm.convert.keymaps.rules import SHOWN, RuleLike
from mlx_cm.convert.model_card import base_model_of_card
from mlx_cm.convert.planning import (
    Component,
    Options,
    Plan,
    component_with_config,
    mapped,
    refuse_overrides,
    refuse_parts,
)
from mlx_cm.convert.readers import Checkpoint, open_checkpoint
from mlx_cm.convert.schedulers import SCHEDULER, SCHEDULER_CONFIG, discrete_schedule
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.model_folder import (
    MODEL_INDEX,
    MODELS,
    build_model,
    check_names_and_shapes,
    is_native,
    read_model_index,
    read_schedule,
    stored_quantization,
)
from mlx_cm.models.autoencoder_kl import SD_VAE, SDXL_VAE, AutoencoderKLConfig
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.pipelines.latent import LatentSettings
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import TensorSource, read_json
from mlx_cm.tokenizer import CONFIG as TOKENIZER_CONFIG
from mlx_cm.tokenizer import FILES as TOKENIZER_FILES
from mlx_cm.tokenizer import MODEL_MAX_LENGTH, TOKENIZER_JSON, VOCABULARY_FILES, CLIPTokenizer

Tensors = Mapping[str, TensorSource]

PIPELINE = "LatentConsistencyPipeline"
FILE_TITLE = "Stable Diffusion in its original layout"
AUTOENCODER_TITLE = "autoencoder of latent diffusion in its original layout"

# The parts of a model, by folder, and the native classes that can stand there.
PARTS = {
    "unet": ("UNet2DCondition",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer",),
    "tokenizer_2": ("CLIPTokenizer",),
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
ONLY_XL = ("text_encoder_2", "tokenizer_2")
# What can be set from outside: of any source, and of a single file, which comes without configs.
SETTINGS = (DiscreteSchedule, LatentSettings)
FILE_SETTINGS = (UNet2DConditionConfig, *SETTINGS, AutoencoderKLConfig)

# Of the published guidance-embedded models, by whether they are SDXL's.
GUIDANCE_SCALES = {False: 8.5, True: 8.0}

# Which published model a U-Net was made from, as far as its config tells.
BASE_SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BASE_SD2 = "stabilityai/stable-diffusion-2-1-base"
BASE_XL = "stabilityai/stable-diffusion-xl-base-1.0"
BASE_SSD = "segmind/SSD-1B"
SD2_TEXT_WIDTH = 1024
SIZES_TOLD = 6  # to SDXL's U-Net: original height and width, corner of the crop, target height and width
CLIP_LEFTOVERS = ("logit_scale", "text_projection")
START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_PADDING = "!"  # id 0; OpenAI's encoder was trained with END as padding
VOCABULARY_REPOSITORY = "openai/clip-vit-large-patch14"


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


# --- folders


def plan_pipeline(source: Path, index: Mapping[str, Any], options: Options) -> Plan:
    """A diffusers pipeline folder; what its index leaves empty comes from the base."""
    unet = _pipeline_component(source, index, "unet", options)
    wanted = parts_wanted(unet.config)
    empty = [name for name in wanted if _entry(source, index, name) is None]
    rest = [name for name in wanted if name not in ("unet", *empty)]
    parts = Parts({"unet": unet}) | _pipeline_parts(source, index, rest, options)
    if empty:
        why = f"has no {', '.join(empty)}"
        parts |= _from_base(options, empty, MissingParts(str(source), why, tuple(empty), _base_of(unet.config)))
    else:
        refuse_parts(options, "base")
    refuse_parts(options, "tokenizer")
    used = {*PARTS, SCHEDULER}
    left_out = [name for name in index if name not in used and _entry(source, index, name) is not None]
    notes = [f"{', '.join(left_out)}: left out, pictures are made without"] if left_out else []
    scheduler = source / SCHEDULER / SCHEDULER_CONFIG
    return _plan(
        index["_class_name"],
        parts,
        discrete_schedule(read_json(scheduler), str(scheduler)),
        {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt")},
        _overrides(options, SETTINGS, str(source)),
        options,
        str(source),
        notes,
    )


def plan_component(component: Component, source: Path, options: Options) -> Plan:
    """A U-Net alone, the rest of which comes from the base; or any part by itself, where that is asked for."""
    if component.kind != "UNet2DCondition" or options.component:
        return _part_by_itself(component, component.kind, options)
    refuse_parts(options, "tokenizer")
    names = [name for name in parts_wanted(component.config) if name != "unet"]
    missing = MissingParts(
        str(source),
        "is a U-Net alone; text encoder, tokenizer and autoencoder are those of the model it was made from",
        (*names, SCHEDULER),
        _base_in_card(source) or _base_of(component.config),
    )
    rest = _from_base(options, names, missing)
    index = _base_index(options.base)
    settings = {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt")}
    schedule, _ = _base_schedule(options.base)
    parts = Parts({"unet": component}) | rest
    overrides = _overrides(options, SETTINGS, str(source))
    return _plan(component.kind, parts, (schedule, None), settings, overrides, options, str(source))


def parts_wanted(config: UNet2DConditionConfig) -> list[str]:
    """The folders of a model with such a U-Net."""
    return [name for name in PARTS if _is_xl(config) or name not in ONLY_XL]


def _is_xl(config: UNet2DConditionConfig) -> bool:
    return config.addition_embed_type == "text_time"


def _entry(folder: Path, index: Mapping[str, Any], name: str) -> str | None:
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


def _pipeline_parts(folder: Path, index: Mapping[str, Any], names: list[str], options: Options) -> Parts:
    """Parts of a pipeline folder.

    Raises:
        ModelError: one is missing, broken or of another class.
    """
    parts = Parts()
    for name in names:
        if name in TOKENIZERS:
            parts |= Parts(files=tokenizer_files(folder / name, name))
        else:
            parts |= Parts({name: _pipeline_component(folder, index, name, options)})
    return parts


def _pipeline_component(folder: Path, index: Mapping[str, Any], name: str, options: Options) -> Component:
    published = _entry(folder, index, name)
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


# --- the base


def _from_base(options: Options, names: list[str], missing: MissingParts) -> Parts:
    """Parts that the source lacks.

    Raises:
        MissingParts: there is no base.
    """
    if options.base is None:
        raise missing
    base = Path(options.base)
    if not base.is_dir():
        raise ModelError(str(base), "no such folder; the base is a pipeline folder or a native model")
    index = _base_index(base)
    if is_native(base):
        parts = Parts()
        for name in names:
            if name in TOKENIZERS:
                parts |= Parts(files=tokenizer_files(base / name, name))
            else:
                parts |= Parts({name: _native_component(base / name, options)})
    else:
        parts = _pipeline_parts(base, index, names, options)
    return replace(parts, components={name: replace(part, from_base=True) for name, part in parts.components.items()})


def _base_index(base: Path) -> Mapping[str, Any]:
    """What `model_index.json` of the base says, settings of a native model as those of a foreign one."""
    if is_native(base):
        index = read_model_index(base)
        if index.pipeline != PIPELINE:
            raise ModelError(str(base), f"is a {index.pipeline}; the base has to be of Stable Diffusion's family")
        return index.sampler
    return read_json(Path(base) / MODEL_INDEX)


def _base_schedule(base: Path) -> tuple[DiscreteSchedule, str | None]:
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


def _base_of(config: UNet2DConditionConfig) -> str:
    """The published model that a U-Net of this layout was most likely made from."""
    if _is_xl(config):
        return BASE_XL if config.mid_block_type == "UNetMidBlock2DCrossAttn" else BASE_SSD
    return BASE_SD2 if config.cross_attention_dim == SD2_TEXT_WIDTH else BASE_SD1


def _base_in_card(source: Path) -> str | None:
    card = (source if source.is_dir() else source.parent) / "README.md"
    try:
        return base_model_of_card(card.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


# --- single files


@dataclass(frozen=True)
class Slot:
    """Where a part lies in a single file, and how it is read."""

    prefix: str
    part: str
    config: Callable[[Tensors], dict[str, object]]
    rules: Callable[[Any], list[RuleLike]]


UNET_PREFIX = "model.diffusion_model."
PLAIN_OPEN_CLIP = partial(open_clip_config, with_projection=False)
POOLED_OPEN_CLIP = partial(open_clip_config, with_projection=True)
SLOTS = (
    Slot(UNET_PREFIX, "unet", ldm_unet_config, ldm_unet_rules),
    Slot("first_stage_model.", "vae", ldm_autoencoder_config, ldm_autoencoder_rules),
    Slot("cond_stage_model.transformer.", "text_encoder", clip_text_config, clip_text_rules),
    Slot("cond_stage_model.model.", "text_encoder", PLAIN_OPEN_CLIP, open_clip_rules),
    Slot("conditioner.embedders.0.transformer.", "text_encoder", clip_text_config, clip_text_rules),
    Slot("conditioner.embedders.1.model.", "text_encoder_2", POOLED_OPEN_CLIP, open_clip_rules),
)
BARE_UNET = replace(SLOTS[0], prefix="")

AVERAGED = "model_ema."
ALPHAS = "alphas_cumprod"
SCHEDULE_BUFFERS = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "denoiser.sigmas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
# Tensors outside of the parts, by name or, ending in a dot, by the module they belong to.
OUTSIDE_PARTS = {
    AVERAGED: "running averages beside the weights",
    **dict.fromkeys(SCHEDULE_BUFFERS, "follows from the schedule"),
    **dict.fromkeys(("v_pred", "ztsnr"), "says how the model was trained, see MARKERS"),
    **dict.fromkeys(
        [f"{stage}.{name}" for stage in ("cond_stage_model", "conditioner.embedders.0") for name in CLIP_LEFTOVERS],
        "this encoder is used without its projection",
    ),
    "embedding_manager.": "words that were learned in a training run",
}
# Empty tensors by which some programs say what the weights do not show.
MARKERS = {"v_pred": {"prediction_type": "v_prediction"}, "ztsnr": {"rescale_betas_zero_snr": True}}
SCHEDULE_TOLERANCE = 2e-3  # of a stored schedule, which may be rounded to half precision

# Latents a side of the pictures that the published models were trained on.
SAMPLE_SIZE, SAMPLE_SIZE_V2_VELOCITY, SAMPLE_SIZE_LCM, SAMPLE_SIZE_XL = 64, 96, 96, 128


def is_ldm_file(tensors: Tensors) -> bool:
    """Whether the names are those of a single file of Stable Diffusion's family, or of its U-Net."""
    return is_ldm_unet(tensors) or is_ldm_unet(_inside(tensors, UNET_PREFIX))


def plan_ldm_file(source: Path, checkpoint: Checkpoint, options: Options) -> Plan:
    """A single file in the layout of the original programs; parts that it lacks come from the base."""
    where = str(source)
    slots = _slots(checkpoint.tensors, where)
    overrides = _overrides(options, FILE_SETTINGS, where)
    trained = {
        key: value for name, said in MARKERS.items() if name in checkpoint.tensors for key, value in said.items()
    }
    trained |= overrides[DiscreteSchedule]

    unet_fields = _fields(slots["unet"], checkpoint, where)
    is_xl = "addition_embed_type" in unet_fields
    given = {
        "unet": {"sample_size": _sample_size(unet_fields, trained)} | overrides[UNet2DConditionConfig],
        "vae": _vae_defaults(is_xl) | overrides[AutoencoderKLConfig],
    }
    components = {
        part: _file_component(slot, checkpoint, given.get(part, {}), options, where) for part, slot in slots.items()
    }
    unet = components["unet"].config
    unused = sorted(components.keys() - parts_wanted(unet))
    if unused:
        raise ModelError(where, f"holds a {unused[0]}, for which a U-Net of this layout has no use")
    parts = Parts(components) | _file_tokenizers(unet, components, options)
    missing = [name for name in parts_wanted(unet) if name not in parts.names]
    if missing:
        parts |= _from_base(options, missing, _missing_in_file(where, missing, unet))
    elif options.base is not None:
        raise UsageError(f"base {options.base}", "this source is complete without it")

    schedule = config_from_dict(DiscreteSchedule, trained, where)
    schedule, notes = _stored_schedule(schedule, checkpoint.tensors)
    if any(name.startswith(AVERAGED) for name in checkpoint.tensors):
        notes.append("the file also holds averaged weights (model_ema), which are left out")
    if unet.cross_attention_dim == SD2_TEXT_WIDTH and "prediction_type" not in trained:
        notes.append(
            "the tensors do not tell what the network predicts: taken as noise; of Stable Diffusion 2 those for 768 "
            "pixels predict velocity, for them pass --config prediction_type=v_prediction"
        )
    return _plan(FILE_TITLE, parts, (schedule, None), {}, overrides, options, where, notes)


def plan_autoencoder_file(source: Path, checkpoint: Checkpoint, options: Options) -> Plan:
    """An autoencoder alone in the layout of the original programs."""
    where = str(source)
    slot = Slot("", "vae", ldm_autoencoder_config, ldm_autoencoder_rules)
    overrides = _overrides(options, (AutoencoderKLConfig,), where)[AutoencoderKLConfig]
    component = _file_component(slot, checkpoint, _vae_defaults(is_xl=False) | overrides, options, where)
    plan = _part_by_itself(component, AUTOENCODER_TITLE, replace(options, overrides={}))
    if "scaling_factor" in overrides:
        return plan
    note = (
        f"the tensors do not tell the scale of the latents: taken as {SD_VAE.scaling_factor}, that of Stable Diffusion "
        f"1 and 2; for XL's pass --config scaling_factor={SDXL_VAE.scaling_factor}"
    )
    return replace(plan, notes=(note,))


def _inside(tensors: Tensors, prefix: str) -> dict[str, TensorSource]:
    """The tensors below a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _slots(tensors: Tensors, where: str) -> dict[str, Slot]:
    """The parts that a file holds.

    Raises:
        ModelError: tensors that belong to none, or two of one part.
    """
    if not any(name.startswith(UNET_PREFIX) for name in tensors):
        return {"unet": BARE_UNET}
    found = [slot for slot in SLOTS if any(name.startswith(slot.prefix) for name in tensors)]
    prefixes = tuple(slot.prefix for slot in found)
    unknown = [name for name in tensors if not name.startswith(prefixes) and not _is_outside(name)]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ModelError(where, f"tensors that belong to no known part: {', '.join(unknown[:SHOWN])}{more}")
    slots = {slot.part: slot for slot in found}
    if len(slots) < len(found):
        raise ModelError(where, f"holds two of one part: {', '.join(prefixes)}")
    return slots


def _is_outside(name: str) -> bool:
    return name in OUTSIDE_PARTS or any(name.startswith(entry) for entry in OUTSIDE_PARTS if entry.endswith("."))


def _fields(slot: Slot, checkpoint: Checkpoint, where: str) -> dict[str, object]:
    try:
        return slot.config(_inside(checkpoint.tensors, slot.prefix))
    except ModelError as error:
        raise ModelError(where, f"{slot.part}: {error.why}", error.hint) from None


def _file_component(
    slot: Slot, checkpoint: Checkpoint, given: Mapping[str, Any], options: Options, where: str
) -> Component:
    """A part of a single file.

    Args:
        given: config fields that its tensors do not tell, or that the user knows better.
    """
    native = PARTS[slot.part][0]
    config = config_from_dict(MODELS[native][1], {**_fields(slot, checkpoint, where), **given}, f"{where}: {slot.part}")
    part = replace(checkpoint, tensors=_inside(checkpoint.tensors, slot.prefix))
    return mapped(config, part, slot.rules(config), options, f"{where}: {slot.part}", slot.prefix)


def _sample_size(unet: Mapping[str, object], trained: Mapping[str, Any]) -> int:
    if "addition_embed_type" in unet:
        return SAMPLE_SIZE_XL
    if "time_cond_proj_dim" in unet:
        return SAMPLE_SIZE_LCM
    velocity = unet["cross_attention_dim"] == SD2_TEXT_WIDTH and trained.get("prediction_type") == "v_prediction"
    return SAMPLE_SIZE_V2_VELOCITY if velocity else SAMPLE_SIZE


def _vae_defaults(is_xl: bool) -> dict[str, Any]:
    published = SDXL_VAE if is_xl else SD_VAE
    return {"sample_size": published.sample_size, "scaling_factor": published.scaling_factor}


def _stored_schedule(schedule: DiscreteSchedule, tensors: Tensors) -> tuple[DiscreteSchedule, list[str]]:
    """The schedule that the file's own `alphas_cumprod` confirm, with or without zero terminal signal."""
    if ALPHAS not in tensors:
        return schedule, []
    stored = to_float32(tensors[ALPHAS].read(), tensors[ALPHAS].dtype)
    for candidate in (schedule, replace(schedule, rescale_betas_zero_snr=not schedule.rescale_betas_zero_snr)):
        known = candidate.alphas_cumprod
        if known.shape == stored.shape and np.abs(known - stored).max() < SCHEDULE_TOLERANCE:
            return candidate, []
    return schedule, [
        f"the file's {ALPHAS} are of another noise schedule than {schedule.beta_schedule} from {schedule.beta_start:g} "
        f"to {schedule.beta_end:g}, which is taken; --config beta_start=..., beta_end=..., beta_schedule=... change it"
    ]


def _missing_in_file(where: str, missing: list[str], unet: UNet2DConditionConfig) -> MissingParts:
    why = f"does not hold {', '.join(missing)}"
    base, hint = _base_of(unet), None
    if set(missing) <= set(TOKENIZERS):
        hint = (
            f"pass --base {base}, or --tokenizer with a folder that holds CLIP's {' and '.join(VOCABULARY_FILES)}, "
            f"which {VOCABULARY_REPOSITORY} has"
        )
    return MissingParts(where, why, tuple(missing), base, hint)


def _file_tokenizers(unet: UNet2DConditionConfig, components: Mapping[str, Component], options: Options) -> Parts:
    """The tokenizers that `Options.tokenizer` gives: those of a pipeline folder, or made from CLIP's vocabulary."""
    if options.tokenizer is None:
        return Parts()
    folder = Path(options.tokenizer)
    parts = Parts()
    for name in TOKENIZERS:
        encoder = name.replace("tokenizer", "text_encoder")
        if name not in parts_wanted(unet):
            continue
        if (folder / name).is_dir():
            parts |= Parts(files=tokenizer_files(folder / name, name))
        else:
            is_open_clip = name == "tokenizer_2" or (
                encoder in components and components[encoder].config.hidden_act == "gelu"
            )
            parts |= Parts(files=_tokenizer_of_vocabulary(folder, name, OPEN_CLIP_PADDING if is_open_clip else END))
    return parts


def _tokenizer_of_vocabulary(folder: Path, name: str, padding: str) -> dict[str, Path | bytes]:
    """CLIP's vocabulary and a tokenizer config beside it: the encoders share the words and differ in the padding."""
    given = tokenizer_files(folder, name)
    vocabulary = [file for file in (TOKENIZER_JSON, *VOCABULARY_FILES) if f"{name}/{file}" in given]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MODEL_MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": padding,
    }
    written = {f"{name}/{TOKENIZER_CONFIG}": (json.dumps(config, indent=2) + "\n").encode()}
    return {f"{name}/{file}": given[f"{name}/{file}"] for file in vocabulary} | written


# --- plans


def _plan(
    family: str,
    parts: Parts,
    schedule: tuple[DiscreteSchedule, str | None],
    settings: Mapping[str, Any],
    overrides: Mapping[type, Mapping[str, Any]],
    options: Options,
    where: str,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan for a whole model.

    Args:
        schedule: the schedule and the sampler it is published for.
        settings: of `LatentSettings`; None where nothing was said.
        overrides: the user's, which come last.
    """
    _refuse_preset(options)
    _check_fit(parts, where)
    unet = parts.components["unet"].config
    distilled = unet.time_cond_proj_dim is not None
    chosen = {
        "sampler": schedule[1] or ("lcm" if distilled else None),
        "guidance_scale": GUIDANCE_SCALES[_is_xl(unet)] if distilled else 1.0,
        "force_zeros_for_empty_prompt": _is_xl(unet),
        **{name: value for name, value in settings.items() if value is not None},
        **overrides[LatentSettings],
    }
    return Plan(
        PIPELINE,
        family,
        parts.components,
        config_from_dict(DiscreteSchedule, asdict(schedule[0]) | overrides[DiscreteSchedule], where),
        asdict(config_from_dict(LatentSettings, chosen, where)),
        tuple(notes),
        parts.files,
    )


def _part_by_itself(component: Component, family: str, options: Options) -> Plan:
    """A plan that writes one component, named by its class."""
    _refuse_preset(options)
    refuse_overrides(options)
    refuse_parts(options)
    part = next(name for name, kinds in PARTS.items() if component.kind in kinds)
    return Plan(component.kind, family, {part: component}, None, {})


def _refuse_preset(options: Options) -> None:
    if options.preset:
        raise UsageError(f"preset {options.preset}", "is for pixel-space consistency models only")


def _overrides(options: Options, configs: Sequence[type], where: str) -> dict[type, dict[str, Any]]:
    """The user's config fields by the config that they belong to: the first that has such a field.

    Raises:
        UsageError: a field that none of them has.
    """
    sorted_out: dict[type, dict[str, Any]] = {config: {} for config in configs}
    for name, value in options.overrides.items():
        owner = next((config for config in configs if name in config.__dataclass_fields__), None)
        if owner is None:
            known = ", ".join(field.name for config in configs for field in fields(config))
            raise UsageError(f"config {name}", f"cannot be set for {where}, these can: {known}")
        sorted_out[owner][name] = value
    return sorted_out


def _check_fit(parts: Parts, where: str) -> None:
    """Holds the parts of a model against each other: a wrong base shows here and not in a picture.

    Raises:
        ModelError: widths or channels that differ.
    """
    unet, vae = parts.components["unet"].config, parts.components["vae"].config
    encoders = [parts.components[name].config for name in ("text_encoder", "text_encoder_2") if name in parts.names]
    text_width = sum(encoder.hidden_size for encoder in encoders)
    latents = vae.latent_channels
    pairs = [
        ("out_channels of the U-Net and latent_channels of the autoencoder", unet.out_channels, (latents,)),
        ("in_channels of the U-Net", unet.in_channels, (latents, 2 * latents + 1)),
    ]
    widths = unet.cross_attention_dim if isinstance(unet.cross_attention_dim, tuple) else (unet.cross_attention_dim,)
    pairs += [("cross_attention_dim of the U-Net and width of the text", width, (text_width,)) for width in widths]
    if _is_xl(unet):
        pooled = encoders[1].projection_dim if encoders[1].with_projection else None
        expected = unet.projection_class_embeddings_input_dim - SIZES_TOLD * unet.addition_time_embed_dim
        pairs += [("pooled text of text_encoder_2 and of the U-Net", pooled, (expected,))]
    for what, value, known in pairs:
        if value not in known:
            expected = " or ".join(map(str, known))
            raise ModelError(where, f"its parts do not fit: {what}: expected {expected}, got {value}")
