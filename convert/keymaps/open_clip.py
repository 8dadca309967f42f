"""OpenCLIP's text encoders as Stable Diffusion 2 (ViT-H) and XL (ViT-bigG) store them in single files.

The reference is mlfoundations/open_clip `src/open_clip/transformer.py`.
"""

from collections.abc import Mapping

from mlx_cm.convert.keymaps.clip_text import encoder_size
from mlx_cm.convert.keymaps.rules import Drop, Move, Rule, RuleLike, rename
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.storage import TensorSource

LAYERS = "transformer.resblocks"
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PROJECTION = "text_projection"
# Stable Diffusion 2 is conditioned on what the layer before the last one says: its published encoder ends there.
H_LAYERS, H_LAYERS_USED = 24, 23


def open_clip_rules(config: CLIPTextConfig) -> list[RuleLike]:
    """The name table for an encoder of this size."""
    rules: list[RuleLike] = [
        Rule("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        Move("token_embedding", "text_model.embeddings.token_embedding"),
        Move("ln_final", "text_model.final_layer_norm"),
        Drop("logit_scale", "belongs to the comparison of text and image"),
        Drop("attn_mask", "is a constant"),
        Rule(PROJECTION, ("text_projection.weight",), transposed=True)
        if config.with_projection
        else Drop("", "this encoder is used without its projection", prefix=PROJECTION),
    ]
    for number in range(config.num_hidden_layers):
        source, target = f"{LAYERS}.{number}", f"text_model.encoder.layers.{number}"
        rules += rename(source, target, LAYER)
        for parameter in ("weight", "bias"):
            heads = tuple(f"{target}.self_attn.{name}_proj.{parameter}" for name in "qkv")
            rules.append(Rule(f"{source}.attn.in_proj_{parameter}", heads))
    if config.num_hidden_layers == H_LAYERS_USED:
        rules.append(Drop("", "the layer after the one that is used", prefix=f"{LAYERS}.{H_LAYERS_USED}."))
    return rules


def open_clip_config(tensors: Mapping[str, TensorSource], *, with_projection: bool) -> dict[str, object]:
    """Reads the size of the encoder off names and shapes.

    Args:
        with_projection: whether the pooled state is used, as in Stable Diffusion XL.

    Returns:
        Fields of a `CLIPTextConfig`.

    Raises:
        ModelError: tensors are missing.
    """
    fields = encoder_size(
        tensors,
        tokens="token_embedding.weight",
        positions="positional_embedding",
        hidden=f"{LAYERS}.0.mlp.c_fc.weight",
        layers=LAYERS,
    )
    fields |= {"hidden_act": "gelu"}
    if not with_projection:
        return fields | ({"num_hidden_layers": H_LAYERS_USED} if fields["num_hidden_layers"] == H_LAYERS else {})
    width = tensors[PROJECTION].shape[-1] if PROJECTION in tensors else fields["hidden_size"]
    return fields | {"architectures": ("CLIPTextModelWithProjection",), "projection_dim": width}
