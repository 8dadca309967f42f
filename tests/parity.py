"""Comparing a model with the live reference implementation: same weights, every one of them random."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten

TOLERANCE = 1e-4  # relative, float32


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 0.05) -> torch.nn.Module:
    """Perturbs every parameter, so that neither zero-initialised layers nor norms at one and zero hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval().requires_grad_(False)


def channels_last(array: torch.Tensor) -> mx.array:
    """A torch tensor as MLX array; rank 4 goes from (A, B, H, W) to (A, H, W, B): images and kernels alike."""
    array = array.detach().numpy()
    return mx.array(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


def copy_weights(model: nn.Module, reference: torch.nn.Module, ignore: tuple[str, ...] = ()) -> nn.Module:
    """Loads the reference's state strictly: every name must exist on both sides with the same shape."""
    state = {key: value for key, value in reference.state_dict().items() if not key.endswith(ignore or ("\0",))}
    model.load_weights([(key, channels_last(value)) for key, value in state.items()], strict=True)
    return model


def relative_error(ours: mx.array, theirs: torch.Tensor) -> float:
    """||a - b|| / ||b||, after moving a rank-4 reference to channels-last."""
    ours, theirs = np.array(ours, dtype=np.float64), np.array(channels_last(theirs), dtype=np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    assert np.isfinite(ours).all()
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def parameter_count(model: nn.Module) -> tuple[int, int]:
    """(number of parameters, number of tensors)."""
    leaves = tree_flatten(model.parameters())
    return sum(value.size for _, value in leaves), len(leaves)
