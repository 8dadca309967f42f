"""Planning the conversion of pixel-space consistency models: a U-Net, a Karras schedule, and what a preset knows."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_cm.config import config_from_dict
from mlx_cm.convert.keymaps.openai_unet import openai_unet_config, openai_unet_rules
from mlx_cm.convert.planning import (
    Component,
    Options,
    Plan,
    component_with_config,
    mapped,
    refuse_overrides,
    refuse_parts,
)
from mlx_cm.convert.readers import Checkpoint
from mlx_cm.convert.schedulers import SCHEDULER, SCHEDULER_CONFIG, karras_schedule
from mlx_cm.errors import ModelError
from mlx_cm.models.unet2d import UNet2DConfig
from mlx_cm.pipelines.pixel import PixelSettings, check_levels
from mlx_cm.presets import PRESETS
from mlx_cm.schedules import KarrasSchedule
from mlx_cm.storage import read_json

PIPELINE = "ConsistencyModelPipeline"
UNET, NETWORK = "unet", "UNet2D"
OPENAI_TITLE = "OpenAI consistency model or EDM teacher"
CTM_TITLE = "consistency trajectory model"


def plan_pipeline(source: Path, index: Mapping[str, Any], options: Options) -> Plan:
    """A diffusers pipeline folder."""
    refuse_overrides(options)
    component = component_with_config(source / UNET, options)
    scheduler = source / SCHEDULER / SCHEDULER_CONFIG
    schedule, settings = karras_schedule(read_json(scheduler), str(scheduler))
    return _with_preset(_plan(index["_class_name"], component, schedule, settings), options)


def plan_component(component: Component, options: Options) -> Plan:
    """A U-Net alone, which is the whole model but for its scheduler."""
    refuse_overrides(options)
    return _with_preset(_plan(component.kind, component), options)


def plan_openai_file(source: Path, checkpoint: Checkpoint, options: Options) -> Plan:
    """A state dict of OpenAI's, whose size is read off the tensors."""
    try:
        fields = openai_unet_config(checkpoint.tensors, options.overrides)
    except ModelError as error:
        raise ModelError(str(source), error.why, error.hint) from None
    config = config_from_dict(UNet2DConfig, fields, str(source))
    component = mapped(config, checkpoint, openai_unet_rules(config), options, str(source))
    if config.trajectory:  # tensors of a second level, which only these have
        return _with_preset(_plan(CTM_TITLE, component, settings={"parameterization": "trajectory"}), options)
    return _with_preset(_plan(OPENAI_TITLE, component), options)


def _plan(
    family: str, component: Component, schedule: KarrasSchedule | None = None, settings: dict[str, Any] | None = None
) -> Plan:
    return Plan(PIPELINE, family, {UNET: component}, schedule or KarrasSchedule(), settings or {})


def _with_preset(plan: Plan, options: Options) -> Plan:
    """Adds what a preset knows, or says that nobody told which of the published models this is."""
    refuse_parts(options)
    given, schedule, notes = dict(plan.sampler), plan.schedule, list(plan.notes)
    if options.preset:
        preset = PRESETS[options.preset]
        given |= {"preset": options.preset, "parameterization": preset.parameterization}
        schedule = replace(schedule, num_scales=preset.num_scales)
    elif not plan.sampler:
        notes.append(
            "the tensors do not tell how the model was trained: taken as a consistency model with a grid of "
            f"{schedule.num_scales} noise levels; if it is a published one, pass --preset NAME ({', '.join(PRESETS)})"
        )
    settings = PixelSettings(**given)
    check_levels(plan.components[UNET].config.trajectory, settings)
    return replace(plan, schedule=schedule, sampler=vars(settings), notes=tuple(notes))
