"""The component classes that can be converted: one row each.

A component is recognised by the class that its config, or the folder above it, names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_cm.config import config_from_dict
from mlx_cm.convert.keymaps.clip_text import clip_text_rules
from mlx_cm.convert.keymaps.ldm_autoencoder import old_attention_rules
from mlx_cm.convert.keymaps.rules import RuleLike
from mlx_cm.convert.transformers_config import config_from_transformers


@dataclass(frozen=True)
class ComponentFamily:
    """A component that comes with a config file; its tensors carry the names of the library that wrote it."""

    native: str  # class in mlx_cm.model_folder.MODELS
    rules: Callable[[Any], list[RuleLike]] = lambda config: []
    read_config: Callable[[type, Mapping[str, Any], str], Any] = config_from_dict  # (class, values, file) => config


CLIP = ComponentFamily("CLIPTextModel", clip_text_rules, config_from_transformers)

COMPONENTS = {
    "UNet2DModel": ComponentFamily("UNet2D"),
    "UNet2DConditionModel": ComponentFamily("UNet2DCondition"),
    "AutoencoderKL": ComponentFamily("AutoencoderKL", old_attention_rules),
    "AutoencoderTiny": ComponentFamily("AutoencoderTiny"),
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
}
