"""Scheduler configs of diffusers, and what of them a checkpoint's schedule and sampler are."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from mlx_cm.config import config_from_dict
from mlx_cm.errors import ModelError
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule

SCHEDULER = "scheduler"
SCHEDULER_CONFIG = "scheduler_config.json"

# What a scheduler's class takes for fields that its config leaves out, where that is not Stable Diffusion's schedule.
DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
KARRAS_FORM = {"beta_schedule": "linear"}
# Schedulers of discrete timesteps => (their sampler here, their defaults). The solvers of diffusion models take many
# steps; such a model waits for an adapter that distils it, so of its scheduler only the noise schedule matters.
DISCRETE_SCHEDULERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "LCMScheduler": ("lcm", {}),
    "TCDScheduler": ("tcd", {}),
    "PNDMScheduler": (None, DDPM),
    "DDIMScheduler": (None, DDPM),
    "DDPMScheduler": (None, DDPM),
    "EulerDiscreteScheduler": (None, DDPM),
    "EulerAncestralDiscreteScheduler": (None, DDPM),
    "LMSDiscreteScheduler": (None, DDPM),
    "HeunDiscreteScheduler": (None, KARRAS_FORM),
    "KDPM2DiscreteScheduler": (None, KARRAS_FORM),
    "KDPM2AncestralDiscreteScheduler": (None, KARRAS_FORM),
    "DPMSolverSDEScheduler": (None, KARRAS_FORM),
    "DPMSolverMultistepScheduler": (None, DDPM),
    "DPMSolverSinglestepScheduler": (None, DDPM),
    "DEISMultistepScheduler": (None, DDPM),
    "UniPCMultistepScheduler": (None, DDPM),
    "SASolverScheduler": (None, DDPM),
}
# Settings that would change the picture, and the values under which they do not.
NEUTRAL_SETTINGS = {"clip_sample": (False,), "thresholding": (False,), "trained_betas": (None,)}

DISTILLATION_FIELDS = ("original_inference_steps", "timestep_scaling")  # which solvers' configs do not have
PLAIN_SOLVER = "DDIMScheduler"
PLAIN_SOLVER_SETTINGS = {"set_alpha_to_one": False, "steps_offset": 1}  # as in Stable Diffusion's own configs

KARRAS_SCHEDULER = "CMStochasticIterativeScheduler"
# Field of its config => field of KarrasSchedule.
KARRAS_FIELDS = {"num_train_timesteps": "num_scales"} | {
    name: name for name in ("sigma_min", "sigma_max", "sigma_data", "rho")
}


def karras_schedule(values: Mapping[str, Any], where: str) -> tuple[KarrasSchedule, dict[str, Any]]:
    """diffusers' `CMStochasticIterativeScheduler` config as schedule and sampler settings.

    Raises:
        ModelError: values that no schedule has, or noise other than unit noise between the steps.
    """
    if values.get("_class_name", KARRAS_SCHEDULER) != KARRAS_SCHEDULER:
        raise ModelError(where, f"_class_name {values['_class_name']!r} is not supported, expected {KARRAS_SCHEDULER}")
    if values.get("s_noise", 1.0) != 1.0:
        raise ModelError(where, f"s_noise {values['s_noise']} is not supported, expected 1.0")
    clip = values.get("clip_denoised", True)
    if not isinstance(clip, bool):
        raise ModelError(where, f"clip_denoised: expected true or false, got {clip!r}")
    given = {name: values[published] for published, name in KARRAS_FIELDS.items() if published in values}
    return config_from_dict(KarrasSchedule, given, where), {"clip_denoised": clip}


def discrete_schedule(values: Mapping[str, Any], where: str) -> tuple[DiscreteSchedule, str | None]:
    """The config of a scheduler of discrete timesteps as schedule and sampler.

    Returns:
        The schedule, and "lcm" or "tcd"; None for a solver of diffusion models.

    Raises:
        ModelError: an unknown scheduler, a schedule or a setting that is not supported.
    """
    published = values.get("_class_name")
    if published not in DISCRETE_SCHEDULERS:
        raise ModelError(
            where, f"_class_name {published!r} is not supported, expected one of {(*DISCRETE_SCHEDULERS,)}"
        )
    sampler, defaults = DISCRETE_SCHEDULERS[published]
    for name, neutral in NEUTRAL_SETTINGS.items():
        if name in values and values[name] not in neutral:
            raise ModelError(where, f"{name}: {values[name]!r} is not supported, expected {neutral[0]!r}")
    known = [field.name for field in fields(DiscreteSchedule)]
    given = {name: values[name] for name in known if values.get(name) is not None}
    return config_from_dict(DiscreteSchedule, {**defaults, **given}, where), sampler


def karras_scheduler_config(schedule: KarrasSchedule, *, clip_denoised: bool) -> dict[str, Any]:
    """The config of diffusers' `CMStochasticIterativeScheduler` with this schedule."""
    values = {published: getattr(schedule, name) for published, name in KARRAS_FIELDS.items()}
    return {"_class_name": KARRAS_SCHEDULER, **values, "s_noise": 1.0, "clip_denoised": clip_denoised}


def discrete_scheduler_config(schedule: DiscreteSchedule, sampler: str | None) -> dict[str, Any]:
    """The config of the scheduler of this sampler; of the plainest solver for a model that was not distilled."""
    values = asdict(schedule) | {name: neutral[0] for name, neutral in NEUTRAL_SETTINGS.items()}
    distilling = {known: name for name, (known, _) in DISCRETE_SCHEDULERS.items() if known is not None}
    if sampler in distilling:
        return {"_class_name": distilling[sampler], **values}
    kept = {name: value for name, value in values.items() if name not in DISTILLATION_FIELDS}
    return {"_class_name": PLAIN_SOLVER, **kept, **PLAIN_SOLVER_SETTINGS}
