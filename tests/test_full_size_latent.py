"""The U-Net of LCM Dreamshaper at its real size: accuracy does not fade with width and depth."""

import subprocess
import sys

import full_size_reference as reference
import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from parity import TOLERANCE, channels_last, relative_error

from mlx_cm.config import config_from_dict
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig


def made(name: str, shape: tuple[int, ...]) -> mx.array:
    """The reference's tensor of this name, for a parameter of this shape."""
    if len(shape) != 4:
        return mx.array(reference.weight(name, shape))
    out, height, width, channels = shape
    return mx.array(reference.weight(name, (out, channels, height, width)).transpose(0, 2, 3, 1))


def test_lcm_dreamshaper_at_512_pixels(tmp_path):
    output = tmp_path / "reference.npy"
    subprocess.run([sys.executable, reference.__file__, str(output)], check=True, timeout=600)
    theirs = np.load(output)

    model = UNet2DCondition(config_from_dict(UNet2DConditionConfig, reference.CONFIG, "config.json"))
    model.load_weights([(name, made(name, value.shape)) for name, value in tree_flatten(model.parameters())])
    given = {name: channels_last(torch.from_numpy(value)) for name, value in reference.inputs().items()}
    context = model.prepare(given["encoder_hidden_states"], timestep_cond=given["timestep_cond"])
    ours = model(given["x"], reference.TIMESTEP, context)
    assert ours.shape == (1, 64, 64, 4)
    assert relative_error(ours, torch.from_numpy(theirs)) < TOLERANCE
    assert theirs.std() > 0.1  # a net that answers nothing would agree with anything
