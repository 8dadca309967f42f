"""The operations whose best form depends on where they run: one function each, the same result on every back end.

On a GPU (Metal, CUDA) these are MLX's own kernels. MLX's CPU build has no vector code for reductions and transcendental
functions and accumulates rows serially, so there the same mathematics is arranged differently.
"""

import functools
import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

# Sizes of the heads that Metal's fused attention takes. With others it stores all scores of a layer, silently: hundreds
# of megabytes on the widest maps of a Stable Diffusion U-Net, whose heads are 40 wide.
FUSED_HEAD_SIZES = (64, 80, 96, 128)
# On a CPU MLX computes transcendental functions value by value, sums and products many at a time. So up to this many
# values they are made of the latter, two to three times faster; beyond, on the maps of large pictures, the intermediate
# arrays would take too much memory.
IN_ARITHMETIC = 2**22


def on_gpu() -> bool:
    """Whether arrays are computed on a GPU by default."""
    return mx.default_device().type == mx.gpu


def on_metal() -> bool:
    """Whether that GPU is Apple's."""
    return on_gpu() and mx.metal.is_available()


def default_dtype() -> mx.Dtype:
    """float16 on a GPU; float32 on a CPU, where half-precision products are 50-200 times slower."""
    return mx.float16 if on_gpu() else mx.float32


def group_norm(x: mx.array, weight: mx.array, bias: mx.array, groups: int, eps: float) -> mx.array:
    """Normalises groups of adjacent channels over all positions, with float32 statistics.

    Args:
        x: (B, ..., C); weight and bias (C,).

    Returns:
        x's shape and type.
    """
    normalise = _group_norm_kernel if on_gpu() else _group_norm_sums
    return normalise(x, groups, eps).astype(x.dtype) * weight + bias


def _group_norm_kernel(x: mx.array, groups: int, eps: float) -> mx.array:
    """`mx.fast.layer_norm` over the rows of a group: one kernel, float32 accumulation whatever the type of x."""
    batch, *positions, channels = x.shape
    rows = x.reshape(batch, -1, groups, channels // groups).swapaxes(1, 2)  # (B, G, HW, C/G)
    flat = mx.fast.layer_norm(rows.reshape(batch, groups, -1), weight=None, bias=None, eps=eps)
    return flat.reshape(batch, groups, -1, channels // groups).swapaxes(1, 2).reshape(batch, *positions, channels)


def _group_norm_sums(x: mx.array, groups: int, eps: float) -> mx.array:
    """Sums over the positions axis by axis, then the group's channels: short sums, a thousand times more accurate.

    A serial float32 sum over all of a large map's values loses three digits.
    """
    batch, *positions, channels = x.shape
    x = x.astype(mx.float32)
    count = x[0].size // groups

    def per_channel(total_of: mx.array) -> mx.array:  # (B, ..., C) => (B, 1, ..., 1, C), equal within a group
        for axis in range(len(positions), 0, -1):
            total_of = total_of.sum(axis=axis, keepdims=True)
        grouped = total_of.reshape(batch, groups, channels // groups).sum(axis=-1, keepdims=True) / count
        full = mx.broadcast_to(grouped, (batch, groups, channels // groups))
        return full.reshape(batch, *([1] * len(positions)), channels)

    centred = x - per_channel(x)
    return centred * mx.rsqrt(per_channel(mx.square(centred)) + eps)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x). One fused kernel on a GPU; on a CPU compiling it would call g++ at run time."""
    return nn.silu(x) if on_gpu() else _gated(x, 1.0)


def gelu(x: mx.array) -> mx.array:
    """x Phi(x) with the exact normal distribution function."""
    if on_gpu():
        return nn.gelu(x)
    if x.size > IN_ARITHMETIC:
        return x * (1 + mx.erf(x * 2**-0.5)) * 0.5
    wide = x.astype(mx.float32)
    size = mx.abs(wide)
    return (0.5 * wide + size * (0.5 - _normal_tail(size))).astype(x.dtype)


def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), the approximation of OpenAI's CLIP."""
    return nn.gelu_fast_approx(x) if on_gpu() else _gated(x, 1.702)


def _gated(x: mx.array, steepness: float) -> mx.array:
    """x * sigmoid(steepness * x) on a CPU."""
    if x.size > IN_ARITHMETIC:
        return x * mx.sigmoid(steepness * x)
    wide = x.astype(mx.float32)
    return (wide / (1 + _exp(-steepness * wide))).astype(x.dtype)


# exp(x) = 2^k exp(r) with k whole and |r| <= ln(2) / 2; a polynomial in r after Cephes' expf.
_EXP_RANGE = (-87.0, 88.0)  # of results that are normal float32 numbers
_LOG2_E = 1.4426950408889634
_LN2 = (0.693359375, -2.12194440e-4)  # ln 2 = the sum; the first has few enough bits to multiply exactly
_ROUNDING = 1.5 * 2**23  # added to a small number, leaves of it the nearest whole one, in the lowest bits
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


@mx.custom_function
def _exp(x: mx.array) -> mx.array:
    """exp(x) of float32 in basic arithmetic, to 1e-7 relative; ends at exp(-87) and exp(88)."""
    x = mx.clip(x, *_EXP_RANGE)
    shifted = x * _LOG2_E + _ROUNDING
    whole = shifted - _ROUNDING
    rest = x - whole * _LN2[0] - whole * _LN2[1]
    total = _EXP[0]
    for coefficient in _EXP[1:]:
        total = total * rest + coefficient
    total = total * mx.square(rest) + rest + 1
    return total * ((shifted.view(mx.int32) + 127) << 23).view(mx.float32)  # 2^k, from its bits


@_exp.vjp
def _exp_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


# Abramowitz, Stegun: Handbook of Mathematical Functions, 7.1.26: erfc(z) = P(t) exp(-z^2) with t = 1 / (1 + p z).
_TAIL_P = 0.3275911
_TAIL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@mx.custom_function
def _normal_tail(z: mx.array) -> mx.array:
    """1 - Phi(z) of float32 z >= 0, to 1e-7 absolute."""
    t = 1 / (1 + (_TAIL_P * 2**-0.5) * z)
    total = _TAIL[0]
    for coefficient in _TAIL[1:]:
        total = total * t + coefficient
    return 0.5 * total * t * _exp(-0.5 * mx.square(z))


@_normal_tail.vjp
def _normal_tail_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return -((2 * math.pi) ** -0.5) * cotangent * _exp(-0.5 * mx.square(primal))


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None = None) -> mx.array:
    """softmax(scale q k^T + mask) v with a float32 softmax.

    Args:
        q, k, v: (B, heads, tokens, head size).
        mask: "causal"; or an array that broadcasts to (B, heads, query tokens, key tokens), either boolean (True where
            a query may see a key) or added to the scores, in whatever float type: values below what q's type holds,
            -inf among them, become a finite number that still weighs nothing, so no row turns into NaN.

    Returns:
        (B, heads, tokens, head size).
    """
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mx.maximum(mask.astype(q.dtype), mx.finfo(q.dtype).min / 2)  # half: room for the score added to it
    if on_metal():
        return padded_attention(q, k, v, scale, mask, fused_head_size(q.shape[-1]))
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if not on_gpu() and q.dtype == mx.float32 and mask is None and scores <= IN_ARITHMETIC:
        return _attention_in_arithmetic(q, k, v, scale)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _attention_in_arithmetic(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """The same attention with its softmax in basic arithmetic."""
    scores = (q * scale) @ k.swapaxes(-1, -2)
    # The largest score cancels, so no gradient has to pass through it.
    weights = _exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return (weights @ v) / weights.sum(axis=-1, keepdims=True)


def fused_head_size(size: int) -> int:
    """The smallest head size of Metal's fused attention that holds heads of this size; their own where none does."""
    return next((fused for fused in FUSED_HEAD_SIZES if fused >= size), size)


def padded_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None, head_size: int
) -> mx.array:
    """The same attention computed in heads of another size: zeros appended to q and k add nothing to a score."""
    size = q.shape[-1]
    if head_size > size:
        q, k, v = (mx.pad(part, [(0, 0)] * 3 + [(0, head_size - size)]) for part in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)[..., :size]


def conv2d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, *, stride: int = 1, padding: int = 0
) -> mx.array:
    """2-D convolution (cross-correlation) with zero padding on all sides.

    Args:
        x: (B, H, W, C); weight (out, kernel, kernel, C); bias (out,).

    Returns:
        (B, H', W', out).
    """
    kernel = (weight.shape[1:3], stride, padding)
    if not on_gpu() and kernel == ((1, 1), 1, 0):
        return _add_product(bias, x, weight[:, 0, 0])
    if not on_gpu() and kernel == ((3, 3), 1, 1) and shifting_pays(x.shape):
        y = _conv3x3_shifted(x, weight)
    elif not on_gpu() and kernel[:2] == ((3, 3), 2):
        y = _halving_conv3x3(padding)(x, weight)
    else:
        y = mx.conv2d(x, weight, stride=stride, padding=padding)
    return y if bias is None else y + bias


def upsample_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """3x3 convolution, zero-padded by one, of a map doubled in height and width by repetition.

    Args:
        x: (B, H, W, C); weight (out, 3, 3, C); bias (out,).

    Returns:
        (B, 2H, 2W, out).
    """
    batch, height, width, channels = x.shape
    if not on_gpu() and shifting_pays((batch, 2 * height, 2 * width, channels)):
        y = _upsample_conv3x3_phases(x, weight)
        return y if bias is None else y + bias
    return conv2d(upsample_nearest(x), weight, bias, padding=1)


def upsample_nearest(x: mx.array) -> mx.array:
    """Doubles height and width by repetition: (B, H, W, C) => (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def shifting_pays(shape: tuple[int, ...]) -> bool:
    """Whether a 3x3 convolution to a map of this height and width is faster on a CPU as a sum of shifted products.

    Measured: small maps lose by the reordering of the kernel, few channels by the many passes over the output.
    """
    batch, height, width, channels = shape
    return batch * height * width >= 4096 and min(height, width) >= 16 and channels >= 16


@mx.custom_function
def _conv3x3_shifted(x: mx.array, weight: mx.array) -> mx.array:
    """A 3x3 convolution as nine matrix products, one per tap, of the padded map shifted by whole rows of its matrix.

    Where positions are the rows of a matrix, a tap is an offset; nothing is gathered, which on a CPU costs nine times
    the input's memory and most of the time. The columns of padding are computed too, and dropped.
    """
    return _sum_of_shifts(x, weight)


def _sum_of_shifts(x: mx.array, weight: mx.array) -> mx.array:
    taps = mx.contiguous(weight.transpose(1, 2, 0, 3))  # (3, 3, out, C)
    return _sum_of_taps(_flatten_padded(x), x.shape, [(dy, dx, taps[dy, dx]) for dy in range(3) for dx in range(3)])


@_conv3x3_shifted.vjp
def _conv3x3_shifted_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    """The gradient of x is a convolution again, with the kernel turned around; by itself it would be nine scatters."""
    x, weight = primals
    turned = weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)
    _, (of_weight,) = mx.vjp(lambda weight: _sum_of_shifts(x, weight), [weight], [cotangent])
    return conv2d(cotangent, turned, padding=1), of_weight


@functools.cache
def _halving_conv3x3(padding: int) -> Callable[[mx.array, mx.array], mx.array]:
    """A 3x3 convolution with stride 2 whose gradients are those of `_conv3x3_halving`."""

    @mx.custom_function
    def convolution(x: mx.array, weight: mx.array) -> mx.array:
        return mx.conv2d(x, weight, stride=2, padding=padding)

    @convolution.vjp
    def _(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> list[mx.array]:
        return mx.vjp(lambda x, weight: _conv3x3_halving(x, weight, padding), list(primals), [cotangent])[1]

    return convolution


def _conv3x3_halving(x: mx.array, weight: mx.array, padding: int) -> mx.array:
    """A 3x3 convolution with stride 2 as one of 2x2 with stride 1 over blocks of 2x2 positions.

    MLX's CPU build computes the gradient of a strided convolution value by value; this one's is a matrix product. It
    takes more memory, and is worth it for the gradient alone.
    """
    batch, height, width, channels = x.shape
    sides = [(side + 2 * padding - 3) // 2 + 1 for side in (height, width)]
    # The last blocks reach a position further than the kernel, where it is zero; what lies behind is never met.
    ends = [2 * (side + 1) - padding - whole for side, whole in zip(sides, (height, width), strict=True)]
    x = mx.pad(x, [(0, 0), *((padding, max(end, 0)) for end in ends), (0, 0)])
    rows, columns = (side + 1 for side in sides)
    blocks = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)
    blocks = blocks.swapaxes(2, 3).reshape(batch, rows, columns, 4 * channels)
    kernel = mx.pad(weight, [(0, 0), (0, 1), (0, 1), (0, 0)]).reshape(-1, 2, 2, 2, 2, channels)
    return mx.conv2d(blocks, kernel.swapaxes(2, 3).reshape(-1, 2, 2, 4 * channels))


@mx.custom_function
def _upsample_conv3x3_phases(x: mx.array, weight: mx.array) -> mx.array:
    """The four phases (even and odd rows and columns) of the result, each a 2x2 convolution of the small map.

    Repeated positions share an input, so their taps are added beforehand: 16 products in place of 36.
    """
    batch, height, width, _ = x.shape
    flat = _flatten_padded(x)
    phases = []
    for phase_y in range(2):
        rows = _fold_taps(weight.swapaxes(0, 1), phase_y)  # two of (out, 3, C)
        for phase_x in range(2):
            taps = [
                (phase_y + dy, phase_x + dx, tap)
                for dy, row in enumerate(rows)
                for dx, tap in enumerate(_fold_taps(row.swapaxes(0, 1), phase_x))
            ]
            phases.append(_sum_of_taps(flat, x.shape, taps))
    y = mx.stack(phases, axis=3).reshape(batch, height, width, 2, 2, -1)
    return y.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, -1)


@_upsample_conv3x3_phases.vjp
def _upsample_conv3x3_phases_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> list[mx.array]:
    """The gradients of what is meant, a convolution of the repeated map."""
    _, gradients = mx.vjp(lambda x, weight: _conv3x3_shifted(upsample_nearest(x), weight), list(primals), [cotangent])
    return gradients


def _fold_taps(taps: mx.array, phase: int) -> tuple[mx.array, mx.array]:
    """Three taps over repeated positions as two over the positions themselves."""
    return (taps[0], taps[1] + taps[2]) if phase == 0 else (taps[0] + taps[1], taps[2])


def _flatten_padded(x: mx.array) -> mx.array:
    """(B, H, W, C) => (B, (H + 3) (W + 2), C): a border of zeros, and a row more for the last shift to end in."""
    batch, height, width, channels = x.shape
    return mx.pad(x, [(0, 0), (1, 2), (1, 1), (0, 0)]).reshape(batch, (height + 3) * (width + 2), channels)


def _sum_of_taps(flat: mx.array, shape: tuple[int, ...], taps: list[tuple[int, int, mx.array]]) -> mx.array:
    """Sum over taps (dy, dx, kernel (out, C)) of the padded map moved by (dy, dx) times the kernel.

    Args:
        flat: from `_flatten_padded`.
        shape: of the map before that, (B, H, W, C).

    Returns:
        (B, H, W, out).
    """
    batch, height, width, _ = shape
    total = None
    for dy, dx, kernel in taps:
        start = dy * (width + 2) + dx
        total = _add_product(total, flat[:, start : start + height * (width + 2)], kernel)
    return total.reshape(batch, height, width + 2, -1)[:, :, :width]


def _add_product(start: mx.array | None, x: mx.array, kernel: mx.array) -> mx.array:
    """start + x kernel^T, in one pass."""
    return x @ kernel.T if start is None else mx.addmm(start, x, kernel.T)
