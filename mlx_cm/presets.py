"""How the published pixel-space checkpoints were trained and are meant to be sampled.

From `scripts/launch.sh` of openai/consistency_models. The tensors of these checkpoints do not tell them apart, so a
preset is chosen by the Hub repository a model comes from, or by the user.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One published checkpoint, or several that are sampled alike."""

    num_scales: int  # N of the grid
    indices: tuple[int, ...] | None = None  # the published multistep list; None: there is none
    parameterization: str = "consistency"  # or "edm", a diffusion teacher
    repositories: tuple[str, ...] = ()  # on the Hub


PRESETS = {
    "cd-imagenet64-l2": Preset(40, (0, 22, 39), repositories=("openai/diffusers-cd_imagenet64_l2",)),
    "cd-imagenet64-lpips": Preset(40, (0, 22, 39), repositories=("openai/diffusers-cd_imagenet64_lpips",)),
    "ct-imagenet64": Preset(201, (0, 106, 200), repositories=("openai/diffusers-ct_imagenet64",)),
    "cd-bedroom256-l2": Preset(40, (0, 18, 39), repositories=("openai/diffusers-cd_bedroom256_l2",)),
    "cd-bedroom256-lpips": Preset(40, (0, 17, 39), repositories=("openai/diffusers-cd_bedroom256_lpips",)),
    "ct-bedroom256": Preset(151, (0, 67, 150), repositories=("openai/diffusers-ct_bedroom256",)),
    "cd-cat256-l2": Preset(40, repositories=("openai/diffusers-cd_cat256_l2",)),
    "cd-cat256-lpips": Preset(40, repositories=("openai/diffusers-cd_cat256_lpips",)),
    "ct-cat256": Preset(151, (0, 62, 150), repositories=("openai/diffusers-ct_cat256",)),
    "edm": Preset(40, parameterization="edm"),
}


def preset_of_repository(repo_id: str | None) -> str | None:
    """The preset of a Hub repository, None where it is not one of the published ones."""
    return next((name for name, preset in PRESETS.items() if repo_id in preset.repositories), None)
