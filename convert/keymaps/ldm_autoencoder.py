"""The autoencoder of latent diffusion as CompVis published it: names and sizes, and two generations of attention names.

The reference is CompVis/latent-diffusion `ldm/modules/diffusionmodules/model.py`. Its decoder counts levels from the
widest map, `AutoencoderKL` in the order they run.
"""

import re
from collections.abc import Mapping

from mlx_cm.convert.keymaps.rules import Drop, Move, RuleLike, rename
from mlx_cm.errors import ModelError
from mlx_cm.models.autoencoder_kl import AutoencoderKLConfig
from mlx_cm.storage import TensorSource

RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SIDES = ("encoder", "decoder")
# Beside the autoencoder in files of its own training.
TRAINING = (
    Drop("", "judges pictures while the autoencoder is trained", prefix="loss."),
    Drop("", "running averages beside the weights", prefix="model_ema."),
)


def is_ldm_autoencoder(tensors: Mapping[str, TensorSource]) -> bool:
    """Whether the names are those of an autoencoder alone."""
    return {"encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"} <= tensors.keys()


def old_attention_rules(config: AutoencoderKLConfig) -> list[RuleLike]:
    """The name table for files of diffusers before its attention was one class for all models."""
    return [
        rule
        for side in SIDES
        for rule in rename(f"{side}.mid_block.attentions.0", f"{side}.mid_block.attentions.0", OLD_ATTENTION)
    ]


def ldm_autoencoder_rules(config: AutoencoderKLConfig) -> list[RuleLike]:
    """The name table for an autoencoder of this size."""
    rules: list[RuleLike] = [*TRAINING]
    last = len(config.block_out_channels) - 1
    for side in SIDES:
        rules += [
            *rename(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", RESNET),
            *rename(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", ATTENTION),
            *rename(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", RESNET),
            Move(f"{side}.norm_out", f"{side}.conv_norm_out"),
        ]
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        for layer in range(config.layers_per_block):
            rules += rename(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", RESNET)
        for layer in range(config.layers_per_block + 1):
            rules += rename(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", RESNET)
        rules += [
            Move(f"encoder.down.{level}.downsample", f"{down}.downsamplers.0"),
            Move(f"decoder.up.{level}.upsample", f"{up}.upsamplers.0"),
        ]
    return rules


def ldm_autoencoder_config(tensors: Mapping[str, TensorSource]) -> dict[str, object]:
    """Reads the size of the autoencoder off names and shapes; the scale of its latents leaves no trace in them.

    Returns:
        Fields of an `AutoencoderKLConfig`.

    Raises:
        ModelError: tensors are missing.
    """
    blocks = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", name) for name in tensors]
    places = [(int(match[1]), int(match[2])) for match in blocks if match]
    levels = 1 + max(level for level, _ in places)
    needed = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    needed += ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ModelError("checkpoint", f"{missing[0]} is missing: not an autoencoder of latent diffusion")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": tuple(tensors[name].shape[0] for name in needed[:levels]),
        "layers_per_block": 1 + max(layer for level, layer in places if level == 0),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
    }
