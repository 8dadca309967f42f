"""Small pixel models of the published layouts, made by diffusers, with every parameter random."""

import functools
from pathlib import Path

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from parity import copy_weights, randomise

from mlx_cm.config import config_from_dict
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig

# The ImageNet-64 layout: class-conditional, scale_shift, resampling residual blocks, attention at the lower levels.
CONDITIONAL = {
    "sample_size": 16,
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 10,
}
# The LSUN layout: unconditional, the embedding is added.
UNCONDITIONAL = CONDITIONAL | {
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}


def make_unet(config: dict, seed: int = 0) -> UNet2DModel:
    """diffusers' U-Net, random but for the seed."""
    torch.manual_seed(seed)
    return randomise(UNet2DModel(**config), seed)


def native_unet(unet: UNet2DModel) -> UNet2D:
    """Our U-Net with the same config and weights."""
    return copy_weights(UNet2D(native_config(unet)), unet)


def native_config(unet: UNet2DModel) -> UNet2DConfig:
    """The config as a converted folder has it: read from the JSON that diffusers writes."""
    return config_from_dict(UNet2DConfig, dict(unet.config), "config.json")


@functools.cache
def shared_unet(kind: str) -> UNet2DModel:
    """One "conditional" and one "unconditional" U-Net for all tests that only read them."""
    return make_unet({"conditional": CONDITIONAL, "unconditional": UNCONDITIONAL}[kind], seed=3)


def make_pipeline(kind: str, num_scales: int = 40) -> ConsistencyModelPipeline:
    """diffusers' whole pipeline around a shared U-Net."""
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=num_scales)
    pipeline = ConsistencyModelPipeline(shared_unet(kind), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder: Path, kind: str = "conditional", num_scales: int = 40, **options) -> Path:
    """The pipeline as a folder of the Hub's layout."""
    make_pipeline(kind, num_scales).save_pretrained(folder, **options)
    return folder


def openai_state_dict(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """The U-Net's weights under the names of OpenAI's code, q, k and v joined in one 1x1 convolution.

    Written from the modules in the order in which OpenAI's `UNetModel` makes them, not from the table under test.
    """
    state: dict[str, torch.Tensor] = {}

    def put(name: str, module: torch.nn.Module | None) -> None:
        for kind, value in module.named_parameters() if module is not None else ():
            state[f"{name}.{kind}"] = value

    def put_resnet(name: str, block: torch.nn.Module) -> None:
        leaves = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
        ours = (block.norm1, block.conv1, block.time_emb_proj, block.norm2, block.conv2, block.conv_shortcut)
        for leaf, module in zip(leaves, ours, strict=True):
            put(f"{name}.{leaf}", module)

    def put_attention(name: str, block: torch.nn.Module) -> None:
        put(f"{name}.norm", block.group_norm)
        projections = (block.to_q, block.to_k, block.to_v)
        state[f"{name}.qkv.weight"] = torch.cat([one.weight for one in projections])[:, :, None, None]
        state[f"{name}.qkv.bias"] = torch.cat([one.bias for one in projections])
        state[f"{name}.proj_out.weight"] = block.to_out[0].weight[:, :, None, None]
        state[f"{name}.proj_out.bias"] = block.to_out[0].bias

    def put_sequence(name: str, modules: list[torch.nn.Module]) -> None:
        for position, module in enumerate(modules):
            place = f"{name}.{position}"
            (put_attention if hasattr(module, "to_q") else put_resnet)(place, module)

    put("time_embed.0", unet.time_embedding.linear_1)
    put("time_embed.2", unet.time_embedding.linear_2)
    put("label_emb", unet.class_embedding)
    put("input_blocks.0.0", unet.conv_in)
    down = []
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        down += [[one for one in pair if one is not None] for pair in zip(block.resnets, attentions, strict=True)]
        down += [[one] for one in block.downsamplers or []]
    for number, modules in enumerate(down, start=1):
        put_sequence(f"input_blocks.{number}", modules)
    mid = unet.mid_block
    put_sequence("middle_block", [mid.resnets[0], mid.attentions[0], mid.resnets[1]])
    up = []
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        up += [[one for one in pair if one is not None] for pair in zip(block.resnets, attentions, strict=True)]
        up[-1] += list(block.upsamplers or [])
    for number, modules in enumerate(up):
        put_sequence(f"output_blocks.{number}", modules)
    put("out.0", unet.conv_norm_out)
    put("out.2", unet.conv_out)
    return state
