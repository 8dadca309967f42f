"""Planning the conversion of single files in the layout of the original programs, as Stable Diffusion was published."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cm.config import config_from_dict
from mlx_cm.convert.casting import to_float32
from mlx_cm.convert.keymaps.clip_text import clip_text_config, clip_text_rules
from mlx_cm.convert.keymaps.ldm_autoencoder import ldm_autoencoder_config, ldm_autoencoder_rules
from mlx_cm.convert.keymaps.ldm_unet import is_ldm_unet, ldm_unet_config, ldm_unet_rules
from mlx_cm.convert.keymaps.open_clip import open_clip_config, open_clip_rules
from mlx_cm.convert.keymaps.rules import SHOWN, RuleLike
from mlx_cm.convert.latent import SETTINGS, part_by_itself, plan_model, sort_overrides
from mlx_cm.convert.latent_parts import (
    PARTS,
    SD2_TEXT_WIDTH,
    TEXT_ENCODERS,
    TOKENIZERS,
    MissingParts,
    Parts,
    base_of,
    parts_from_base,
    parts_wanted,
    tokenizer_files,
)
from mlx_cm.convert.planning import Component, Options, Plan, mapped, refuse_parts
from mlx_cm.convert.readers import Checkpoint
from mlx_cm.errors import ModelError
from mlx_cm.model_folder import MODELS
from mlx_cm.models.autoencoder_kl import SD_VAE, SDXL_VAE, AutoencoderKLConfig
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import TensorSource
from mlx_cm.tokenizer import CONFIG as TOKENIZER_CONFIG
from mlx_cm.tokenizer import MODEL_MAX_LENGTH, TOKENIZER_JSON, VOCABULARY_FILES

Tensors = Mapping[str, TensorSource]

TITLE = "Stable Diffusion in its original layout"
AUTOENCODER_TITLE = "autoencoder of latent diffusion in its original layout"

FILE_SETTINGS = (UNet2DConditionConfig, *SETTINGS, AutoencoderKLConfig)  # such a file comes without configs
CLIP_LEFTOVERS = ("logit_scale", "text_projection")
START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_PADDING = "!"  # id 0; OpenAI's encoder was trained with END as padding
VOCABULARY_REPOSITORY = "openai/clip-vit-large-patch14"


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
    overrides = sort_overrides(options, FILE_SETTINGS, where)
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
        parts |= parts_from_base(options, missing, _missing_in_file(where, missing, unet))
    else:
        refuse_parts(options, "base")

    schedule = config_from_dict(DiscreteSchedule, trained, where)
    schedule, notes = _stored_schedule(schedule, checkpoint.tensors)
    if any(name.startswith(AVERAGED) for name in checkpoint.tensors):
        notes.append("the file also holds averaged weights (model_ema), which are left out")
    if unet.cross_attention_dim == SD2_TEXT_WIDTH and "prediction_type" not in trained:
        notes.append(
            "the tensors do not tell what the network predicts: taken as noise; of Stable Diffusion 2 those for 768 "
            "pixels predict velocity, for them pass --config prediction_type=v_prediction"
        )
    return plan_model(TITLE, parts, (schedule, None), {}, overrides, options, where, notes)


def plan_autoencoder_file(source: Path, checkpoint: Checkpoint, options: Options) -> Plan:
    """An autoencoder alone in the layout of the original programs."""
    where = str(source)
    slot = Slot("", "vae", ldm_autoencoder_config, ldm_autoencoder_rules)
    overrides = sort_overrides(options, (AutoencoderKLConfig,), where)[AutoencoderKLConfig]
    component = _file_component(slot, checkpoint, _vae_defaults(is_xl=False) | overrides, options, where)
    plan = part_by_itself(component, AUTOENCODER_TITLE, replace(options, overrides={}))
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
    base, hint = base_of(unet), None
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
    for name, encoder in zip(TOKENIZERS, TEXT_ENCODERS, strict=True):
        if name not in parts_wanted(unet):
            continue
        if (folder / name).is_dir():
            parts |= Parts(files=tokenizer_files(folder / name, name))
        else:
            config = components[encoder].config if encoder in components else None
            padding = OPEN_CLIP_PADDING if _is_open_clip(encoder, config, unet) else END
            parts |= Parts(files=_tokenizer_of_vocabulary(folder, name, padding))
    return parts


def _is_open_clip(encoder: str, config: CLIPTextConfig | None, unet: UNet2DConditionConfig) -> bool:
    """Whether a text encoder is one of OpenCLIP's: by its activation, and by its place where it is not in the file."""
    if config is not None:
        return config.hidden_act == "gelu"
    return encoder == "text_encoder_2" or unet.cross_attention_dim == SD2_TEXT_WIDTH


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
