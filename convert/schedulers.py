"""Scheduler configs of diffusers, and what of them a checkpoint's schedule and sampler are."""

from collections.abc import Mapping
from typing import Any

from mlx_cm.errors import ModelError
from mlx_cm.schedules import KarrasSchedule

SCHEDULER = "scheduler"
SCHEDULER_CONFIG = "scheduler_config.json"

KARRAS_FIELDS = ("sigma_min", "sigma_max", "sigma_data", "rho")


def karras_schedule(values: Mapping[str, Any], where: str) -> tuple[KarrasSchedule, dict[str, Any]]:
    """diffusers' `CMStochasticIterativeScheduler` config as schedule and sampler settings.

    Raises:
        ModelError: values that no schedule has, or noise other than unit noise between the steps.
    """
    if values.get("s_noise", 1.0) != 1.0:
        raise ModelError(where, f"s_noise {values['s_noise']} is not supported, expected 1.0")
    try:
        schedule = KarrasSchedule(
            num_scales=values.get("num_train_timesteps", 40),
            **{name: float(values[name]) for name in KARRAS_FIELDS if name in values},
        )
    except (TypeError, ValueError) as error:
        raise ModelError(where, str(error)) from None
    return schedule, {"clip_denoised": values.get("clip_denoised", True)}
