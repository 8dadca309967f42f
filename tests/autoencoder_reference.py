"""Diffusers' autoencoder at full size, in a process without mlx_cm: `python autoencoder_reference.py RESULTS.npz`.

In one process with mlx_cm the OpenBLAS it loads takes over torch's matrix products and makes them slower.
"""

import sys

import diffusers
import numpy as np
import torch
from parity import randomise

SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}


def reference() -> diffusers.AutoencoderKL:
    """The same random weights in every process; small ones, as those of such wide layers are."""
    torch.manual_seed(0)
    return randomise(diffusers.AutoencoderKL(**SD_VAE), scale=0.01)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """(image in [-1, 1], raw latents)."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((1, 3, 512, 512), generator=generator) * 2 - 1
    return image, torch.randn((1, 4, 64, 64), generator=generator) * 5


if __name__ == "__main__":
    model, (image, z) = reference(), inputs()
    posterior = model.encode(image).latent_dist
    np.savez(sys.argv[1], mean=posterior.mean, logvar=posterior.logvar, image=model.decode(z).sample)
