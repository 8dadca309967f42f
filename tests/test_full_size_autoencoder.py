"""The autoencoder of Stable Diffusion at its full size, 512 x 512 pixels, against diffusers."""

import subprocess
import sys
from pathlib import Path

import autoencoder_reference
import numpy as np
import torch
from parity import TOLERANCE, channels_last, copy_weights, relative_error

from mlx_cm.models.autoencoder_kl import SD_VAE, AutoencoderKL


def test_512_pixels_as_diffusers(tmp_path):
    results = tmp_path / "reference.npz"
    subprocess.run([sys.executable, Path(autoencoder_reference.__file__), results], check=True)
    expected = {name: torch.from_numpy(array) for name, array in np.load(results).items()}
    model = copy_weights(AutoencoderKL(SD_VAE), autoencoder_reference.reference())
    image, z = map(channels_last, autoencoder_reference.inputs())
    mean, logvar = model.encode(image)
    assert relative_error(mean, expected["mean"]) < TOLERANCE
    assert relative_error(logvar, expected["logvar"]) < TOLERANCE
    assert relative_error(model.decode(z), expected["image"]) < TOLERANCE
