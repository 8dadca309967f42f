"""Between two arrays: along a straight line, or along an arc that keeps the length."""

from collections.abc import Callable

import mlx.core as mx

from mlx_cm.rng import Noise

SMALLEST_SINE = 1e-4  # of the angle between two arrays; below it there is no telling which arc joins them
SMALLEST_LENGTH = 1e-12

Path = Callable[[mx.array, mx.array, float], mx.array]


def lerp(a: mx.array, b: mx.array, fraction: float) -> mx.array:
    """The point at `fraction` of the straight way from a to b; exactly a at 0 and b at 1."""
    if fraction in (0, 1):
        return b if fraction else a
    return (1 - fraction) * a + fraction * b


def slerp(a: mx.array, b: mx.array, fraction: float) -> mx.array:
    """The point at `fraction` of the way from a to b along a great circle; exactly a at 0 and b at 1.

    Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985, section 3.3, for vectors of any length: the
    direction follows the arc, the length changes linearly. Between two draws of noise every point has the length of a
    draw; a straight line would pass through weaker noise, which a network takes for another noise level.

    Args:
        a, b: one shape, (B, ...); each of the B parts is one vector. Vectors that point the same or the opposite way
            are joined by a straight line.

    Returns:
        float32 but at the ends, the shape of a.
    """
    if fraction in (0, 1):
        return b if fraction else a
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    axes = tuple(range(1, a.ndim))
    length_a, length_b = (mx.sqrt(mx.square(x).sum(axis=axes, keepdims=True)) for x in (a, b))
    a, b = a / mx.maximum(length_a, SMALLEST_LENGTH), b / mx.maximum(length_b, SMALLEST_LENGTH)
    angle = mx.arccos(mx.clip((a * b).sum(axis=axes, keepdims=True), -1, 1))
    sine = mx.sin(angle)
    weight_a, weight_b = (
        mx.where(sine < SMALLEST_SINE, part, mx.sin(part * angle) / mx.maximum(sine, SMALLEST_SINE))
        for part in (1 - fraction, fraction)
    )
    return lerp(length_a, length_b, fraction) * (weight_a * a + weight_b * b)


def slerp_tokens(a: mx.array, b: mx.array, fraction: float) -> mx.array:
    """`slerp` of each vector along the last axis by itself: of the states of each token, or of a pooled state."""
    rows = slerp(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), fraction)
    return rows.reshape(a.shape).astype(a.dtype)


# How to go from one prompt's features to another's.
FEATURE_PATHS: dict[str, Path] = {"linear": lerp, "spherical": slerp_tokens}


def slerp_noise(first: Noise, second: Noise, fraction: float) -> Noise:
    """A noise source at `fraction` of the way from one source to another, in every draw."""
    return lambda shape, index: slerp(first(shape, index), second(shape, index), fraction)
