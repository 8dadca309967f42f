"""diffusers' U-Net at the size of the ImageNet-64 models: `python imagenet64_reference.py FOLDER`.

Runs in a process of its own: beside mlx_cm, the OpenBLAS it loads takes over torch's matrix products and slows them.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from openai_names import openai_state_dict

CHECKPOINT, DIGESTS, OUTPUT = "cd_imagenet64_l2.pt", "digests.json", "output.npy"
CONFIG = {
    "sample_size": 64,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 1000,
}
TIME, LABEL = 1095.5067, 207
POOL = 1_000_003  # a prime, so that no two rows of a matrix are alike


def inputs() -> torch.Tensor:
    """The scaled input, shape (1, 3, 64, 64)."""
    return torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))


def random_unet() -> UNet2DModel:
    """Every parameter from one pool of random numbers, which is much faster than 300 million draws."""
    with torch.device("meta"):
        unet = UNet2DModel(**CONFIG)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    start = 0
    for parameter in unet.parameters():
        flat = parameter.view(-1)
        at = 0
        while at < len(flat):
            taken = pool[start : start + len(flat) - at]
            flat[at : at + len(taken)] = taken
            at, start = at + len(taken), (start + len(taken)) % POOL
        if parameter.ndim == 1:
            parameter.mul_(0.1)
        else:
            parameter.mul_(parameter[0].numel() ** -0.5)  # keeps the variance of what passes through
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.add_(1)
    return unet


def digest(value: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, kernels channels-last."""
    value = value.permute(0, 2, 3, 1) if value.ndim == 4 else value
    return hashlib.sha256(value.contiguous().numpy().data).hexdigest()


def main(folder: Path) -> None:
    unet = random_unet()
    output = unet(inputs(), torch.tensor([TIME]), torch.tensor([LABEL])).sample
    np.save(folder / OUTPUT, output.numpy())
    (folder / DIGESTS).write_text(json.dumps({name: digest(value) for name, value in unet.state_dict().items()}))
    torch.save(openai_state_dict(unet), folder / CHECKPOINT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
