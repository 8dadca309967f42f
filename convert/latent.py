"""Planning the conversion of Stable Diffusion's family: folders, and what makes a whole model of its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_cm.config import config_from_dict
from mlx_cm.convert.latent_parts import (
    PARTS,
    PIPELINE,
    TEXT_ENCODERS,
    MissingParts,
    Parts,
    base_in_card,
    base_index,
    base_of,
    base_schedule,
    entry,
    is_xl,
    parts_from_base,
    parts_wanted,
    pipeline_component,
    pipeline_parts,
)
from mlx_cm.convert.planning import Component, Options, Plan, refuse_overrides, refuse_parts, refuse_preset
from mlx_cm.convert.schedulers import SCHEDULER, SCHEDULER_CONFIG, discrete_schedule
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.pipelines.latent import LatentSettings
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import read_json

SETTINGS = (DiscreteSchedule, LatentSettings)  # what can be set from outside, of any source
GUIDANCE_SCALES = {False: 8.5, True: 8.0}  # of the published guidance-embedded models, by whether they are SDXL's
SIZES_TOLD = 6  # to SDXL's U-Net: original height and width, corner of the crop, target height and width


def plan_pipeline(source: Path, index: Mapping[str, Any], options: Options) -> Plan:
    """A diffusers pipeline folder; what its index leaves empty comes from the base."""
    unet = pipeline_component(source, index, "unet", options)
    wanted = parts_wanted(unet.config)
    empty = [name for name in wanted if entry(source, index, name) is None]
    rest = [name for name in wanted if name not in ("unet", *empty)]
    parts = Parts({"unet": unet}) | pipeline_parts(source, index, rest, options)
    if empty:
        why = f"has no {', '.join(empty)}"
        parts |= parts_from_base(options, empty, MissingParts(str(source), why, tuple(empty), base_of(unet.config)))
    else:
        refuse_parts(options, "base")
    refuse_parts(options, "tokenizer")
    used = {*PARTS, SCHEDULER}
    left_out = [name for name in index if name not in used and entry(source, index, name) is not None]
    notes = [f"{', '.join(left_out)}: left out, pictures are made without"] if left_out else []
    scheduler = source / SCHEDULER / SCHEDULER_CONFIG
    return plan_model(
        index["_class_name"],
        parts,
        discrete_schedule(read_json(scheduler), str(scheduler)),
        {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt")},
        sort_overrides(options, SETTINGS, str(source)),
        options,
        str(source),
        notes,
    )


def plan_component(component: Component, source: Path, options: Options) -> Plan:
    """A U-Net alone, the rest of which comes from the base; or any part by itself, where that is asked for."""
    if component.kind != "UNet2DCondition" or options.component:
        return part_by_itself(component, component.kind, options)
    refuse_parts(options, "tokenizer")
    names = [name for name in parts_wanted(component.config) if name != "unet"]
    missing = MissingParts(
        str(source),
        "is a U-Net alone; text encoder, tokenizer and autoencoder are those of the model it was made from",
        (*names, SCHEDULER),
        base_in_card(source) or base_of(component.config),
    )
    rest = parts_from_base(options, names, missing)
    index = base_index(options.base)
    settings = {"force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt")}
    schedule, _ = base_schedule(options.base)
    parts = Parts({"unet": component}) | rest
    overrides = sort_overrides(options, SETTINGS, str(source))
    return plan_model(component.kind, parts, (schedule, None), settings, overrides, options, str(source))


def plan_model(
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
    refuse_preset(options)
    _check_fit(parts, where)
    unet = parts.components["unet"].config
    distilled = unet.time_cond_proj_dim is not None
    chosen = {
        "sampler": schedule[1] or ("lcm" if distilled else None),
        "guidance_scale": GUIDANCE_SCALES[is_xl(unet)] if distilled else 1.0,
        "force_zeros_for_empty_prompt": is_xl(unet),
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


def part_by_itself(component: Component, family: str, options: Options) -> Plan:
    """A plan that writes one component, named by its class."""
    refuse_preset(options)
    refuse_overrides(options)
    refuse_parts(options)
    part = next(name for name, kinds in PARTS.items() if component.kind in kinds)
    return Plan(component.kind, family, {part: component}, None, {})


def sort_overrides(options: Options, configs: Sequence[type], where: str) -> dict[type, dict[str, Any]]:
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
    encoders = [parts.components[name].config for name in TEXT_ENCODERS if name in parts.names]
    text_width = sum(encoder.hidden_size for encoder in encoders)
    latents = vae.latent_channels
    pairs = [
        ("out_channels of the U-Net and latent_channels of the autoencoder", unet.out_channels, (latents,)),
        ("in_channels of the U-Net", unet.in_channels, (latents, 2 * latents + 1)),
    ]
    widths = unet.cross_attention_dim if isinstance(unet.cross_attention_dim, tuple) else (unet.cross_attention_dim,)
    pairs += [("cross_attention_dim of the U-Net and width of the text", width, (text_width,)) for width in widths]
    if is_xl(unet):
        pooled = encoders[1].projection_dim if encoders[1].with_projection else None
        expected = unet.projection_class_embeddings_input_dim - SIZES_TOLD * unet.addition_time_embed_dim
        pairs += [("pooled text of text_encoder_2 and of the U-Net", pooled, (expected,))]
    for what, value, known in pairs:
        if value not in known:
            expected = " or ".join(map(str, known))
            raise ModelError(where, f"its parts do not fit: {what}: expected {expected}, got {value}")
