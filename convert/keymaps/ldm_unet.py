"""The text-conditioned U-Net of latent diffusion as CompVis and Stability published it: names and sizes.

The reference is CompVis/latent-diffusion `ldm/modules/diffusionmodules/openaimodel.py`. Its blocks are numbered in the
order they run; `UNet2DCondition` groups them by resolution level.
"""

import re
from collections.abc import Mapping

from mlx_cm.convert.keymaps.openai_unet import RESNET
from mlx_cm.convert.keymaps.rules import Move, RuleLike, rename
from mlx_cm.errors import ModelError
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.storage import TensorSource

Tensors = Mapping[str, TensorSource]

OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",  # of a consistency model: the strength of guidance
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# What the tensors do not tell: heads, and the sinusoid of each size that an SDXL model is told.
HEADS = 8  # of the models with 1x1 convolutions around their transformers, at every width
HEAD_CHANNELS = 64  # of the models with linear layers there
SIZE_CHANNELS = 256
FIRST_ATTENTION = "transformer_blocks.0.attn2.to_k.weight"


def is_ldm_unet(tensors: Tensors) -> bool:
    """Whether the names are those of a text-conditioned U-Net of latent diffusion."""
    return "input_blocks.0.0.weight" in tensors and any(_is_attention(name) for name in tensors)


def ldm_unet_rules(config: UNet2DConditionConfig) -> list[RuleLike]:
    """The name table for a U-Net of this size."""
    rules: list[RuleLike] = [rule for source, target in OUTSIDE.items() for rule in rename(source, target)]
    rules += rename("middle_block.0", "mid_block.resnets.0", RESNET)
    rules += [Move("middle_block.1", "mid_block.attentions.0")]
    rules += rename("middle_block.2", "mid_block.resnets.1", RESNET)
    last = len(config.block_out_channels) - 1

    number = 1  # input_blocks.0 is conv_in
    for i, level in enumerate(config.down_levels):
        for layer in range(len(level.depths)):
            rules += rename(f"input_blocks.{number}.0", f"down_blocks.{i}.resnets.{layer}", RESNET)
            rules.append(Move(f"input_blocks.{number}.1", f"down_blocks.{i}.attentions.{layer}"))
            number += 1
        if i < last:
            rules.append(Move(f"input_blocks.{number}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
            number += 1

    number = 0
    for i, level in enumerate(config.up_levels):
        for layer in range(len(level.depths)):
            rules += rename(f"output_blocks.{number}.0", f"up_blocks.{i}.resnets.{layer}", RESNET)
            if level.attention:
                rules.append(Move(f"output_blocks.{number}.1", f"up_blocks.{i}.attentions.{layer}"))
            number += 1
        doubling = 2 if level.attention else 1  # behind the last residual block and its transformer
        rules.append(Move(f"output_blocks.{number - 1}.{doubling}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
    return rules


def ldm_unet_config(tensors: Tensors) -> dict[str, object]:
    """Reads the size of the U-Net off names and shapes.

    Returns:
        Fields of a `UNet2DConditionConfig`, without `sample_size`.

    Raises:
        ModelError: not a layout that this family has.
    """
    _check_outside(tensors)
    down = _levels(tensors, "input_blocks", first=1, ends=lambda number: f"input_blocks.{number}.0.op.weight")
    up = _up_levels(tensors, [len(level) + 1 for level in reversed(down)])
    widths = tuple(_width(tensors, f"input_blocks.{level[0]}.0") for level in down)
    middle = _depth(tensors, "middle_block.1")
    down_depths = [_depths(tensors, "input_blocks", level) for level in down]
    up_depths = [_depths(tensors, "output_blocks", level) for level in up]
    first = next(name for name in tensors if _is_attention(name))
    entry = tensors.get(first.replace(FIRST_ATTENTION, "proj_in.weight"))
    linear = entry is not None and len(entry.shape) == 2
    fields: dict[str, object] = {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": _same_or_each([len(level) for level in down]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in down_depths),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "up_block_types": tuple("CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in up_depths),
        "cross_attention_dim": tensors[first].shape[1],
        "attention_head_dim": tuple(max(1, width // HEAD_CHANNELS) for width in widths) if linear else HEADS,
        "use_linear_projection": linear,
        **_transformer_layers(down_depths, middle, up_depths),
    }
    if "time_embed.cond_proj.weight" in tensors:
        fields["time_cond_proj_dim"] = tensors["time_embed.cond_proj.weight"].shape[1]
    if "label_emb.0.0.weight" in tensors:
        fields |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_CHANNELS,
            "projection_class_embeddings_input_dim": tensors["label_emb.0.0.weight"].shape[1],
        }
    if tensors["time_embed.0.weight"].shape[0] != 4 * widths[0]:
        fields["time_embedding_dim"] = tensors["time_embed.0.weight"].shape[0]
    return fields


def _check_outside(tensors: Tensors) -> None:
    needed = ("input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ModelError("checkpoint", f"{missing[0]} is missing: not a whole U-Net of latent diffusion")


def _is_attention(name: str) -> bool:
    return name.startswith("input_blocks.") and name.endswith(FIRST_ATTENTION)


def _levels(tensors: Tensors, blocks: str, *, first: int, ends) -> list[list[int]]:
    """Numbers of the residual blocks per level; `ends(number)` is the tensor of the block that halves after them."""
    numbers = sorted({int(match[1]) for match in (re.match(rf"{blocks}\.(\d+)\.", name) for name in tensors) if match})
    if numbers != list(range(len(numbers))):
        raise ModelError("checkpoint", f"{blocks} are not numbered 0 to {len(numbers) - 1}: some are missing")
    levels: list[list[int]] = [[]]
    for number in numbers[first:]:
        if ends(number) in tensors:
            levels.append([])
        else:
            levels[-1].append(number)
    if not all(levels):
        raise ModelError("checkpoint", f"a resolution level without residual blocks among {blocks}")
    return levels


def _up_levels(tensors: Tensors, counts: list[int]) -> list[list[int]]:
    """Numbers of the residual blocks per level on the way up, given how many each level has."""
    [numbers] = _levels(tensors, "output_blocks", first=0, ends=lambda number: None)
    if len(numbers) != sum(counts):
        raise ModelError("checkpoint", f"has {len(numbers)} output_blocks, its input_blocks ask for {sum(counts)}")
    starts = [sum(counts[:level]) for level in range(len(counts))]
    return [numbers[start : start + count] for start, count in zip(starts, counts, strict=True)]


def _width(tensors: Tensors, block: str) -> int:
    name = f"{block}.in_layers.2.weight"
    if name not in tensors:
        raise ModelError("checkpoint", f"{name} is missing")
    return tensors[name].shape[0]


def _depth(tensors: Tensors, module: str) -> int:
    """Layers of a transformer; 0 where there is none."""
    pattern = re.compile(rf"{re.escape(module)}\.transformer_blocks\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, tensors) if match})


def _depths(tensors: Tensors, blocks: str, numbers: list[int]) -> tuple[int, ...]:
    """Layers of the transformer behind each residual block of a level; empty where the level has none."""
    depths = tuple(_depth(tensors, f"{blocks}.{number}.1") for number in numbers)
    if any(depths) and not all(depths):
        raise ModelError("checkpoint", f"transformers behind some of {blocks} {numbers} only, which is not supported")
    return depths if any(depths) else ()


def _transformer_layers(down: list[tuple], middle: int, up: list[tuple]) -> dict[str, object]:
    """The fields for the depths: one number per level where that says it all, else one per residual block.

    A level without transformers holds 1, as in the published configs; the middle block goes by the last level.
    """
    levels = [_same_or_each(depths) if depths else 1 for depths in down]
    if not down[-1] and middle:
        levels[-1] = middle
    last = levels[-1][0] if isinstance(levels[-1], tuple) else levels[-1]
    if middle not in (0, last):
        raise ModelError("checkpoint", f"middle_block has {middle} transformer layers, the level before it {last}")
    backwards = [_same_or_each(depths) if depths else 1 for depths in up]
    mirrored = all(
        not depths or depths == (level,) * len(depths) for depths, level in zip(up, reversed(levels), strict=True)
    )
    if mirrored:
        return {"transformer_layers_per_block": _same_or_each(levels)}
    return {"transformer_layers_per_block": tuple(levels), "reverse_transformer_layers_per_block": tuple(backwards)}


def _same_or_each(values) -> object:
    """One value that all share, or all of them."""
    values = tuple(values)
    return values[0] if len(set(values)) == 1 else values
