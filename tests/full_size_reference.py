"""A full-size U-Net of diffusers evaluated in a process of its own: `python full_size_reference.py OUTPUT.npy`.

OpenBLAS, which MLX needs on Linux, captures the matrix products of a torch in the same process and slows them down; and
two nets of 3.4 GB need not be in memory at once. Both sides make the same weights from the tensors' names.
"""

import math
import sys
import zlib

import numpy as np
from latent_configs import LCM_DREAMSHAPER

CONFIG = LCM_DREAMSHAPER
TIMESTEP = 759


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor for this name, in torch's layout: scaled to keep variances, norms near one, biases small."""
    values = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32)
    values -= 0.5
    if len(shape) == 1:
        values *= 0.2
        return values + np.float32(name.endswith("weight"))
    values *= math.sqrt(12 / math.prod(shape[1:]))
    return values


def inputs() -> dict[str, np.ndarray]:
    """One evaluation at 512 pixels; x is (B, C, H, W)."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (1, 4, 64, 64),
        "encoder_hidden_states": (1, 77, CONFIG["cross_attention_dim"]),
        "timestep_cond": (1, CONFIG["time_cond_proj_dim"]),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def main(output: str):
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(2)
    with torch.device("meta"):
        model = UNet2DConditionModel(**CONFIG)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}
    model.load_state_dict(state, assign=True)
    given = {name: torch.from_numpy(value) for name, value in inputs().items()}
    with torch.inference_mode():
        result = model.eval()(given.pop("x"), TIMESTEP, **given, return_dict=False)[0]
    np.save(output, result.numpy())


if __name__ == "__main__":
    main(sys.argv[1])
