"""The methods of training by name: which space they work in, what they are told, and how they train by default."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_cm.training.objectives import (
    AutoencoderSettings,
    ConsistencySettings,
    LatentConsistencySettings,
    TeacherSettings,
    TrajectorySettings,
)

PIXEL, LATENT, AUTOENCODER = "pixel", "latent", "autoencoder"


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    space: str | None  # PIXEL, LATENT or AUTOENCODER; None: that of the model
    settings: type  # of the `[objective]` section
    needs_model: str | None = None  # what has to be given with --model; None: a new network will do
    distils: bool = False  # whether the model given is a teacher
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # section => settings


_SEED_OPTIMIZER = {"optimizer": "radam", "clip": 0.0, "ema": [0.9999, 0.999]}  # of [CM] and its successors

METHODS = {
    "teacher": Method(None, TeacherSettings, defaults={"samples": {"steps": [20]}}),
    "autoencoder": Method(AUTOENCODER, AutoencoderSettings, defaults={"train": {"learning_rate": 5e-4}}),
    # [CM] appendix C: N = 40, mu = 0.95, Heun, RAdam.
    "cd": Method(
        PIXEL, ConsistencySettings, needs_model="a diffusion teacher", distils=True,
        defaults={"train": _SEED_OPTIMIZER | {"learning_rate": 8e-6}},
    ),
    # [CM] appendix C, CIFAR-10: N from 2 to 150, mu from 0.9.
    "ct": Method(
        PIXEL, ConsistencySettings,
        defaults={
            "train": _SEED_OPTIMIZER,
            "objective": {"curriculum": "progressive", "start_scales": 2, "end_scales": 150, "target_rate": 0.9},
        },
    ),
    # [iCT] table 1.
    "ict": Method(
        PIXEL, ConsistencySettings,
        defaults={
            "train": _SEED_OPTIMIZER,
            "objective": {
                "curriculum": "doubling", "start_scales": 10, "end_scales": 1280, "target_rate": 0.0,
                "levels": "lognormal", "weight": "inverse", "distance": "pseudo_huber",
            },
        },
    ),
    # [CTM] appendix D, and its released code for CIFAR-10.
    "ctm": Method(
        PIXEL, TrajectorySettings, defaults={"train": _SEED_OPTIMIZER | {"learning_rate": 4e-4}},
    ),
    # [LCM] section 5.1; the released script for Stable Diffusion.
    "lcd": Method(
        LATENT, LatentConsistencySettings, needs_model="a latent diffusion model", distils=True,
        defaults={"train": {"learning_rate": 8e-6}},
    ),
    # Luo et al.: LCM-LoRA, arXiv 2311.05556; the released script.
    "lcm-lora": Method(
        LATENT, LatentConsistencySettings, needs_model="a latent diffusion model", distils=True,
        defaults={
            "train": {"learning_rate": 1e-4, "weight_decay": 1e-2},
            "objective": {"target_rate": 0.0, "w_min": 5.0, "w_max": 15.0, "distance": "mean_pseudo_huber"},
            "lora": {"rank": 64},
        },
    ),
    # [LCM] section 4.4.
    "lcf": Method(
        LATENT, LatentConsistencySettings, needs_model="a latent consistency model",
        defaults={"train": {"learning_rate": 8e-6}, "objective": {"w_min": 3.0, "w_max": 13.0}},
    ),
}  # fmt: skip
