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
