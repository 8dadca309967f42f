"""Optimisers: MLX's, the one that it lacks, what gradients are clipped to, and the learning rate over training."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map


class RAdam(optim.Adam):
    """Adam whose adaptive step waits until its second moment can be trusted, in place of a warm-up.

    Liu et al.: On the Variance of the Adaptive Learning Rate and Beyond, arXiv 1908.03265, algorithm 2, in the form of
    PyTorch's `RAdam`; the optimiser of [CM], [iCT] and [ECT]. Weight decay is decoupled, as in AdamW.
    """

    def __init__(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0):  # fmt: skip
        super().__init__(learning_rate, betas=list(betas), eps=eps)
        self.weight_decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """One update of one parameter."""
        beta1, beta2 = self.betas
        rate, step = self.learning_rate.astype(mx.float32), self.step.astype(mx.float32)
        state["m"] = beta1 * state["m"] + (1 - beta1) * gradient
        state["v"] = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)

        # 1 - beta^step by expm1: at the first steps the powers are so near 1 that a difference would keep three digits.
        total1, total2 = (-mx.expm1(step * (math.log(beta) if beta else -math.inf)) for beta in (beta1, beta2))
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * (1 - total2) / total2  # of the moving average, in steps
        trusted = mx.maximum(length, 5)
        rectification = mx.sqrt((trusted - 4) * (trusted - 2) * longest / ((longest - 4) * (longest - 2) * trusted))
        adaptive = rectification * mx.sqrt(total2) / (mx.sqrt(state["v"]) + self.eps)
        mean = state["m"] / total1
        parameter = parameter * (1 - rate * self.weight_decay)
        return parameter - rate * mean * mx.where(length > 5, adaptive, 1)


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda rate, betas, eps, weight_decay: optim.Adam(rate, list(betas), eps, bias_correction=True),
    "adamw": lambda rate, betas, eps, weight_decay: optim.AdamW(
        rate, list(betas), eps, weight_decay, bias_correction=True
    ),
    "radam": RAdam,
}


def clip_gradients(gradients: Any, limit: float) -> tuple[Any, mx.array]:
    """Scales gradients so that their norm, taken over all of them, is at most a limit.

    Pascanu, Mikolov, Bengio: On the Difficulty of Training Recurrent Neural Networks, arXiv 1211.5063, algorithm 1, in
    the form of PyTorch's `clip_grad_norm_`.

    Args:
        gradients: a tree of arrays.
        limit: 0: they stay as they are.

    Returns:
        The gradients, and the norm that they had: a scalar.
    """
    norm = mx.sqrt(sum(_square_sum(gradient) for _, gradient in tree_flatten(gradients)))
    if limit == 0:
        return gradients, norm
    scale = mx.minimum(limit / (norm + 1e-6), 1)
    return tree_map(lambda gradient: gradient * scale, gradients), norm


def _square_sum(x: mx.array) -> mx.array:
    """Axis by axis: a CPU's serial float32 sum over the values of a large layer would lose three digits and more."""
    squares = mx.square(x)
    while squares.ndim:
        squares = squares.sum(axis=-1)
    return squares


# How the learning rate goes on after its warm-up: fraction of the rest of training => factor.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def learning_rate_factor(step: int, total: int, warmup: int, decay: str) -> float:
    """What the learning rate of a step, counted from 0, is multiplied by: a linear warm-up, then `DECAYS`."""
    if step < warmup:
        return (step + 1) / warmup
    return DECAYS[decay]((step - warmup) / max(total - warmup, 1))
