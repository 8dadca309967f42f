"""CLIP's text encoder as transformers names it, in its own folder or inside another checkpoint."""

import re
from collections.abc import Mapping

from mlx_cm.convert.keymaps.rules import Drop, Move, RuleLike
from mlx_cm.errors import ModelError
from mlx_cm.models.clip_text import LEGACY_EOS_TOKEN_ID, CLIPTextConfig
from mlx_cm.storage import TensorSource

HEAD_CHANNELS = 64  # of every published CLIP text encoder; the tensors do not tell it

# Some versions of transformers, and checkpoints made with them, write the encoder without the module around it.
MODULES = ("embeddings", "encoder", "final_layer_norm")
# The other half of CLIP, and a constant that older versions stored.
NOT_TEXT = (
    Drop("embeddings.position_ids", "counts from 0 to 76"),
    Drop("logit_scale", "belongs to the comparison of text and image"),
    Drop("", "encodes images", prefix="vision_model."),
    Drop("", "projects images", prefix="visual_projection."),
)


def clip_text_rules(config: CLIPTextConfig) -> list[RuleLike]:
    """The name table for a text encoder with or without its projection."""
    rules: list[RuleLike] = [*NOT_TEXT, *(Move(module, f"text_model.{module}") for module in MODULES)]
    if not config.with_projection:
        rules.append(Drop("", "this encoder is used without its projection", prefix="text_projection."))
    return rules


def clip_text_config(tensors: Mapping[str, TensorSource]) -> dict[str, object]:
    """Reads the size of OpenAI's text encoder off names and shapes.

    Returns:
        Fields of a `CLIPTextConfig`.

    Raises:
        ModelError: tensors are missing.
    """
    around = "text_model." if "text_model.embeddings.token_embedding.weight" in tensors else ""
    layers = f"{around}encoder.layers"
    return encoder_size(
        tensors,
        tokens=f"{around}embeddings.token_embedding.weight",
        positions=f"{around}embeddings.position_embedding.weight",
        hidden=f"{layers}.0.mlp.fc1.weight",
        layers=layers,
    ) | {"hidden_act": "quick_gelu"}


def encoder_size(
    tensors: Mapping[str, TensorSource], *, tokens: str, positions: str, hidden: str, layers: str
) -> dict[str, object]:
    """Sizes of a CLIP text encoder, whatever its names.

    Args:
        tokens, positions, hidden: names of the embeddings and of the first weight of the first MLP.
        layers: the module whose children are numbered layers.

    Raises:
        ModelError: tensors are missing.
    """
    for name in (tokens, positions, hidden):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ModelError("checkpoint", f"{name} is missing or no matrix: not a CLIP text encoder")
    pattern = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    vocabulary, width = tensors[tokens].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors[hidden].shape[0],
        "num_hidden_layers": 1 + max(int(match[1]) for match in map(pattern.match, tensors) if match),
        "num_attention_heads": max(1, width // HEAD_CHANNELS),
        "max_position_embeddings": tensors[positions].shape[0],
        "eos_token_id": LEGACY_EOS_TOKEN_ID,  # of the published configs, which find the end by the largest id
    }
