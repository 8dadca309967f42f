"""OpenAI's flat state dicts (`cd_*.pt`, `ct_*.pt`, `edm_*.pt`): names and sizes of the pixel U-Net.

The reference is openai/consistency_models `cm/unet.py`, and sony/ctm's of the same name, which adds the second level of
[CTM] (`ema_*.pt`). Blocks are numbered in the order they run; `UNet2D` groups them by resolution level.
"""

import re
from collections.abc import Mapping

from mlx_cm.convert.keymaps.rules import Rule, rename
from mlx_cm.errors import ModelError
from mlx_cm.models.unet2d import UNet2DConfig
from mlx_cm.storage import TensorSource

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
TWO_LEVEL_RESNET = RESNET | {"emb_layers_s.1": "time_emb_proj_s"}
ATTENTION = {"norm": "group_norm", "qkv": ("to_q", "to_k", "to_v"), "proj_out": "to_out.0"}
OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed_s.0": "time_embedding_s.linear_1",
    "time_embed_s.2": "time_embedding_s.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": ("mid_block.resnets.0", TWO_LEVEL_RESNET),
    "middle_block.1": ("mid_block.attentions.0", ATTENTION),
    "middle_block.2": ("mid_block.resnets.1", TWO_LEVEL_RESNET),
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
HEAD_CHANNELS = 64  # of every published model; the tensors do not tell it
FINEST_ATTENTION = 32  # the largest map with attention in every published model; gives the image size


def is_openai_unet(tensors: Mapping[str, TensorSource]) -> bool:
    """Whether the names are those of OpenAI's unconditional or class-conditional pixel U-Net."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= tensors.keys()


def openai_unet_rules(config: UNet2DConfig) -> list[Rule]:
    """The name table for a U-Net of this size."""
    rules = []
    for source, target in OUTSIDE.items():
        rules += rename(source, *target) if isinstance(target, tuple) else rename(source, target)
    levels, layers = len(config.block_out_channels), config.layers_per_block

    number = 1  # input_blocks.0 is conv_in
    for level in range(levels):
        for layer in range(layers):
            rules += rename(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}", TWO_LEVEL_RESNET)
            rules += rename(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{layer}", ATTENTION)
            number += 1
        if level < levels - 1:
            rules += rename(f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0", TWO_LEVEL_RESNET)
            number += 1

    number = 0
    for level, kind in enumerate(config.up_block_types):
        for layer in range(layers + 1):
            rules += rename(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}", TWO_LEVEL_RESNET)
            has_attention = kind == "AttnUpBlock2D"
            if has_attention:
                rules += rename(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{layer}", ATTENTION)
            if layer == layers and level < levels - 1:
                place = 2 if has_attention else 1
                rules += rename(f"output_blocks.{number}.{place}", f"up_blocks.{level}.upsamplers.0", TWO_LEVEL_RESNET)
            number += 1
    return rules


def openai_unet_config(tensors: Mapping[str, TensorSource], overrides: Mapping[str, object]) -> dict[str, object]:
    """Reads the size of the U-Net off names and shapes.

    Head size and image size leave no trace in the tensors: heads of 64 channels are taken, and the image size at which
    the finest attention map is 32x32, as in every published model.

    Args:
        overrides: config fields known better.

    Returns:
        Fields of a `UNet2DConfig`.

    Raises:
        ModelError: not a layout that OpenAI's code makes.
    """
    width = _size(tensors, "input_blocks.0.0.weight")
    numbers = sorted({int(m[1]) for m in (re.match(r"input_blocks\.(\d{1,4})\.", name) for name in tensors) if m})
    if numbers != list(range(len(numbers))):
        raise ModelError("checkpoint", f"input_blocks are not numbered 0 to {len(numbers) - 1}: some are missing")
    if any(re.match(r"input_blocks\.\d+\.0\.op\.", name) for name in tensors):
        raise ModelError("checkpoint", "has convolutional downsampling (resblock_updown=False), which is not supported")
    if "middle_block.1.qkv.weight" not in tensors:
        raise ModelError("checkpoint", "middle_block.1.qkv.weight is missing: not a consistency model's U-Net")

    level_count, layers = _levels_and_layers(tensors, len(numbers) - 1)
    firsts = [1 + level * (layers + 1) for level in range(level_count)]
    widths = tuple(_out_channels(tensors, f"input_blocks.{first}.0") for first in firsts)
    attended = [f"input_blocks.{first}.1.qkv.weight" in tensors for first in firsts]
    projected = _size(tensors, "middle_block.0.emb_layers.1.weight")
    scale_shift = projected == 2 * _out_channels(tensors, "middle_block.0")
    finest = attended.index(True) if any(attended) else 0
    fields: dict[str, object] = {
        "sample_size": FINEST_ATTENTION * 2**finest,
        "in_channels": _size(tensors, "input_blocks.0.0.weight", axis=1),
        "out_channels": _size(tensors, "out.2.weight"),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attended),
        "up_block_types": tuple("AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(attended)),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": HEAD_CHANNELS,
        "attn_norm_num_groups": 32 if scale_shift else None,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "num_class_embeds": _size(tensors, "label_emb.weight") if "label_emb.weight" in tensors else None,
        "trajectory": "time_embed_s.0.weight" in tensors,
    }
    if (embedded := _size(tensors, "time_embed.0.weight")) != 4 * width:
        fields["time_embedding_dim"] = embedded
    return {**fields, **overrides}


def _out_channels(tensors: Mapping[str, TensorSource], block: str) -> int:
    return _size(tensors, f"{block}.in_layers.2.weight")


def _size(tensors: Mapping[str, TensorSource], name: str, axis: int = 0) -> int:
    if name not in tensors:
        raise ModelError("checkpoint", f"{name} is missing")
    shape = tensors[name].shape
    if len(shape) <= axis:
        raise ModelError("checkpoint", f"{name}: expected at least {axis + 1} axes, got shape {shape}")
    return shape[axis]


def _levels_and_layers(tensors: Mapping[str, TensorSource], blocks: int) -> tuple[int, int]:
    """(levels, residual blocks per level), from levels * (layers + 1) - 1 blocks on the way down.

    The way up tells the two apart: the last output block of each level but the top one also holds a doubling block.
    """
    doubling = sum(
        1
        for number in range(blocks + 1)
        if f"output_blocks.{number}.2.in_layers.0.weight" in tensors
        or f"output_blocks.{number}.1.in_layers.0.weight" in tensors
    )
    levels = doubling + 1
    if (blocks + 1) % levels or (blocks + 1) // levels < 2:
        raise ModelError("checkpoint", f"{blocks} input blocks do not divide into {levels} resolution levels")
    return levels, (blocks + 1) // levels - 1
