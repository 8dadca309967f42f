"""Writes a small untrained consistency model in the layout of OpenAI's published checkpoints.

Its weights are drawn from a seed, each 3x3 kernel a random matrix times one blur, so its pictures are abstract and
soft. It shows the way from a foreign checkpoint to a picture without a download.

    python recipes/seeded_model.py seeded.safetensors
    mlx-cm convert seeded.safetensors seeded
    mlx-cm generate -m seeded --count 16 --grid -o seeded.png
"""

import argparse
import math
from pathlib import Path

import numpy as np
import safetensors.numpy

from mlx_cm.convert.keymaps.openai_unet import openai_unet_rules
from mlx_cm.model_folder import parameter_shapes
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig
from mlx_cm.storage import atomic_file

CONFIG = UNet2DConfig(
    sample_size=64,
    block_out_channels=(64, 64, 128),
    layers_per_block=1,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    attention_head_dim=64,
    attn_norm_num_groups=32,
    resnet_time_scale_shift="scale_shift",
    num_class_embeds=10,
)
GAINS = {"weight": 1.0, "bias": 0.1}  # how far the untrained network is from an even grey
BLUR = np.outer((1, 2, 1), (1, 2, 1)) / 16


def openai_shapes(config: UNet2DConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an OpenAI checkpoint of this size."""
    shapes = {}
    native = parameter_shapes(UNet2D(config))
    for rule in openai_unet_rules(config):
        if rule.targets[0] not in native:
            continue
        first, *rest = native[rule.targets[0]]
        shape = (first * len(rule.targets), *rest)
        if len(shape) == 4:
            shape = (shape[0], shape[3], shape[1], shape[2])  # kernels: (out, in, height, width)
        if rule.source.endswith(("qkv.weight", "proj_out.weight")):
            shape = (*shape, 1, 1)  # a 1x1 convolution
        shapes[rule.source] = shape
    return shapes


def seeded_weights(config: UNet2DConfig, seed: int) -> dict[str, np.ndarray]:
    """Random weights under OpenAI's names; normalisations scale by one."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in openai_shapes(config).items():
        is_kernel = shape[2:] == BLUR.shape
        values = generator.standard_normal(shape[:2] if is_kernel else shape) * GAINS[name.rpartition(".")[2]]
        values /= math.sqrt(math.prod(shape[1:2]))
        if is_kernel:
            values = values[..., None, None] * BLUR / np.linalg.norm(BLUR)
        weights[name] = (values + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32)
    return weights


def main() -> None:
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with atomic_file(arguments.path) as partial:
        safetensors.numpy.save_file(seeded_weights(CONFIG, arguments.seed), partial)
    print(arguments.path)


if __name__ == "__main__":
    main()
