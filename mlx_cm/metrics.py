"""Distances between pictures: what a consistency loss measures, one number per pair, float32 whatever the inputs' type.

A distance is `(a, b) -> (B,)`, a and b of one shape (B, H, W, C). Distances that have settings are made by a function
of these; `METRICS` holds the makers by the names of training configs.
"""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_cm.errors import UsageError

Distance = Callable[[mx.array, mx.array], mx.array]

PSEUDO_HUBER_SCALE = 0.00054  # of c, times the root of the number of values: [iCT] section 3.3


def l1(a: mx.array, b: mx.array) -> mx.array:
    """Mean absolute difference.

    [CM] section 4, up to the factor H W C: the released code takes means.

    Args:
        a, b: (B, H, W, C).

    Returns:
        (B,), float32.

    Raises:
        ValueError: a and b differ in shape.
    """
    return _mean(mx.abs(_difference(a, b)))


def l2(a: mx.array, b: mx.array) -> mx.array:
    """Mean square difference.

    [CM] section 4, up to the factor H W C: the released code takes means, as the one of [LCM] does.

    Args:
        a, b: (B, H, W, C).

    Returns:
        (B,), float32.

    Raises:
        ValueError: a and b differ in shape.
    """
    return _mean(mx.square(_difference(a, b)))


def pseudo_huber(c: float | None = None) -> Distance:
    """sqrt(||a - b||^2 + c^2) - c, the norm taken over a whole picture.

    [iCT] section 3.3; [ECT] uses it too, by default with c = 0: the Euclidean distance. There the gradient where a = b,
    which is not defined, is zero.

    Args:
        c: below it the distance is quadratic, above linear; None: 0.00054 sqrt(H W C), the choice of [iCT].

    Raises:
        UsageError: c is negative.
    """
    if c is not None and not c >= 0:
        raise UsageError(f"c {c}", "expected at least 0")

    def distance(a: mx.array, b: mx.array) -> mx.array:
        difference = _difference(a, b)
        squares = _sum(mx.square(difference))
        width = PSEUDO_HUBER_SCALE * math.sqrt(difference[0].size) if c is None else c
        return _hyperbola(squares, width) if width else _root(squares)

    return distance


def mean_pseudo_huber(c: float = 0.001) -> Distance:
    """Mean of sqrt(d^2 + c^2) - c over the differences d of single values.

    The released training code of [LCM] ("huber"). Unlike `pseudo_huber` it takes each value's difference by itself, and
    with its small c it is nearly `l1`.

    Raises:
        UsageError: c is not positive; at 0 this is `l1`.
    """
    if not c > 0:
        raise UsageError(f"c {c}", "expected a number above 0; l1 is the distance at 0")
    return lambda a, b: _mean(_hyperbola(mx.square(_difference(a, b)), c))


def lpips_distance(network: Distance) -> Distance:
    """The perceptual distance of a network: LPIPS.

    [LPIPS], [CM] section 4. What the network costs is paid for both pictures, and for the gradient of those it is asked
    for.

    Args:
        network: `mlx_cm.models.lpips.LPIPS`, or another with its call (a, b) -> (B,); images in [-1, 1].
    """

    def distance(a: mx.array, b: mx.array) -> mx.array:
        _require_one_shape(a, b)
        return network(a.astype(mx.float32), b.astype(mx.float32))

    return distance


# Name => function of the metric's settings.
METRICS: dict[str, Callable[..., Distance]] = {
    "l1": lambda: l1,
    "l2": lambda: l2,
    "pseudo_huber": pseudo_huber,
    "mean_pseudo_huber": mean_pseudo_huber,
    "lpips": lpips_distance,
}


def _difference(a: mx.array, b: mx.array) -> mx.array:
    _require_one_shape(a, b)
    return a.astype(mx.float32) - b.astype(mx.float32)


def _require_one_shape(a: mx.array, b: mx.array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"expected pictures of one shape, got {a.shape} and {b.shape}")


def _sum(x: mx.array) -> mx.array:
    """(B, ...) => (B,), axis by axis: a serial float32 sum over a large picture, as on CPUs, loses three digits."""
    while x.ndim > 1:
        x = x.sum(axis=1)
    return x


def _mean(x: mx.array) -> mx.array:
    return _sum(x) / x[0].size


def _hyperbola(squares: mx.array, c: float) -> mx.array:
    """sqrt(squares + c^2) - c without the cancellation: small differences keep their digits. c > 0."""
    return squares / (mx.sqrt(squares + c**2) + c)


def _root(squares: mx.array) -> mx.array:
    """sqrt with gradient 0 at 0, where it would be infinite times zero."""
    positive = squares > 0
    return mx.where(positive, mx.sqrt(mx.where(positive, squares, 1)), 0)
