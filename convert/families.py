"""What can be converted: one row per published component class, pipeline class and flat checkpoint family.

A family is recognised by the class its config names, or by the keys and shapes of its tensors; never by a file's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_cm.convert.keymaps.openai_unet import is_openai_unet, openai_unet_config, openai_unet_rules
from mlx_cm.convert.keymaps.rules import Drop, Rule
from mlx_cm.errors import ModelError
from mlx_cm.schedules import KarrasSchedule
from mlx_cm.storage import TensorSource

Tensors = Mapping[str, TensorSource]


@dataclass(frozen=True)
class ComponentFamily:
    """A component that comes with a config file; its tensors carry diffusers' names."""

    native: str  # class in mlx_cm.model_folder.MODELS
    rules: Callable[[Any], list[Rule | Drop]] = lambda config: []


@dataclass(frozen=True)
class FlatFamily:
    """A checkpoint that is nothing but tensors: size and layout are read off them."""

    title: str
    matches: Callable[[Tensors], bool]
    native: str
    config: Callable[[Tensors, Mapping[str, Any]], dict[str, Any]]
    rules: Callable[[Any], list[Rule | Drop]]
    component: str  # folder of the component in the native model
    pipeline: str


@dataclass(frozen=True)
class PipelineFamily:
    """A folder of components headed by a `model_index.json`."""

    native: str  # pipeline class
    components: tuple[str, ...]
    scheduler: Callable[[Mapping[str, Any]], tuple[Any, dict[str, Any]]]  # config => (schedule, sampler settings)


def cm_scheduler(values: Mapping[str, Any]) -> tuple[KarrasSchedule, dict[str, Any]]:
    """diffusers' `CMStochasticIterativeScheduler` config as schedule and sampler settings.

    Raises:
        ModelError: noise other than unit noise between the steps.
    """
    if values.get("s_noise", 1.0) != 1.0:
        raise ModelError("scheduler_config.json", f"s_noise {values['s_noise']} is not supported, expected 1.0")
    names = ("sigma_min", "sigma_max", "sigma_data", "rho")
    schedule = KarrasSchedule(
        num_scales=values.get("num_train_timesteps", 40),
        **{name: float(values[name]) for name in names if name in values},
    )
    return schedule, {"clip_denoised": values.get("clip_denoised", True)}


COMPONENTS = {"UNet2DModel": ComponentFamily("UNet2D")}

PIPELINES = {
    "ConsistencyModelPipeline": PipelineFamily("ConsistencyModelPipeline", ("unet",), cm_scheduler),
}

FLAT_FAMILIES = (
    FlatFamily(
        title="OpenAI consistency model or EDM teacher",
        matches=is_openai_unet,
        native="UNet2D",
        config=openai_unet_config,
        rules=openai_unet_rules,
        component="unet",
        pipeline="ConsistencyModelPipeline",
    ),
)

# A lone component with a config file is a whole model where nothing else is needed to sample it.
LONE_COMPONENTS = {"UNet2D": ("unet", "ConsistencyModelPipeline")}


def detect(tensors: Tensors, where: str) -> FlatFamily:
    """The family of a flat checkpoint.

    Raises:
        ModelError: none of the known ones, or names of a component whose config is missing.
    """
    for family in FLAT_FAMILIES:
        if family.matches(tensors):
            return family
    shown = ", ".join(list(tensors)[:5])
    if any(name.startswith("down_blocks.") for name in tensors):
        raise ModelError(
            where, "has diffusers' names but no config.json beside it", "convert the folder that holds both"
        )
    known = "; ".join(family.title for family in FLAT_FAMILIES)
    raise ModelError(where, f"its tensors ({shown}, ...) belong to no known family. Known: {known}")
