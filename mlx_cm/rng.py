"""Randomness is an argument: where the noise of a sampler or an edit comes from.

A noise source is a callable `noise(shape, index)` that returns standard normal float32, channels-last, the batch first.
Index 0 is the starting noise, index i >= 1 the draw after step i; what an autoencoder draws for a given picture has an
index below 0. Image k of a batch depends on seed k alone, so it does not change with the batch it is made in.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_cm.errors import UsageError

Noise = Callable[[tuple[int, ...], int], mx.array]

IMAGE_POSTERIOR = -1  # the draw for the latents of a starting picture; made before the starting noise
MASKED_POSTERIOR = -2  # the draw for the latents of a masked picture; made after the starting noise

SEED_LIMIT = 2**64
_WORD = 0xFFFFFFFF


def expand_seeds(seeds: int | Sequence[int], count: int = 1) -> list[int]:
    """The seed of every image to be made: each given seed s stands for s, s + 1, ..., s + count - 1.

    Raises:
        UsageError: no seed, a count below 1, a seed outside 0 ... 2^64 - 1, or two images with the same seed.
    """
    if count < 1:
        raise UsageError(f"count {count}", "expected at least 1")
    first = list(seeds) if isinstance(seeds, Sequence) else [seeds]
    expanded = check_seeds([seed + k for seed in check_seeds(first) for k in range(count)])
    repeated = [str(seed) for seed, uses in Counter(expanded).items() if uses > 1]
    if repeated:
        raise UsageError(
            "seeds",
            f"{', '.join(repeated[:10])} would make the same image twice",
            f"space the seeds by at least {count}, the images made for each",
        )
    return expanded


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as plain integers.

    Raises:
        UsageError: no seed at all, no whole number, or outside 0 ... 2^64 - 1.
    """
    if len(seeds) == 0:
        raise UsageError("seeds", "expected at least one seed")
    checked = []
    for seed in seeds:
        try:
            number = operator.index(seed)
        except TypeError:
            raise UsageError(f"seed {seed!r}", "expected a whole number") from None
        if not 0 <= number < SEED_LIMIT:
            raise UsageError(f"seed {number}", "expected 0 <= seed < 2^64")
        checked.append(number)
    return checked


def mlx_noise(seeds: Sequence[int]) -> Noise:
    """MLX's generator with one key per image and draw, a pure function of (seed, index).

    Draws may be asked for in any order and again; the same (seed, index, shape without batch) gives the same values.

    Args:
        seeds: one per image of the batch.

    Raises:
        UsageError: a seed outside 0 ... 2^64 - 1; when called, a batch of another size or an unknown index.
    """
    keys = [mx.random.split(mx.random.key(seed))[0] for seed in check_seeds(seeds)]

    def noise(shape: tuple[int, ...], index: int) -> mx.array:
        _check_request(shape, index, len(keys))
        return mx.stack([mx.random.normal(tuple(shape[1:]), key=fold_in(key, index)) for key in keys])

    return noise


def fold_in(key: mx.array, index: int) -> mx.array:
    """A key for one draw: the index goes into the low word of a key that is a hash already, and is hashed with it."""
    return mx.random.split(key ^ mx.array([0, index & _WORD], dtype=mx.uint32))[0]


def _check_request(shape: tuple[int, ...], index: int, images: int) -> None:
    if len(shape) == 0 or shape[0] != images:
        raise UsageError("noise", f"asked for shape {tuple(shape)}, but there are seeds for a batch of {images}")
    if not MASKED_POSTERIOR <= index <= _WORD + MASKED_POSTERIOR:
        raise UsageError("noise", f"expected a draw index of {MASKED_POSTERIOR} or more, got {index}")


class TorchNoise:
    """The draws of PyTorch's CPU generators, one per image, bit for bit.

    Image k gets what successive calls of `torch.randn((1, C, H, W), generator=g)` return for a CPU generator g seeded
    with seed k, which is what diffusers pipelines draw from a list of generators; the values are drawn in that NCHW
    order and then moved to channels-last.

    A generator is a stream whose next value depends on all before it, so one object serves one run: indexes from 0 on
    are asked for in growing order (a step that draws nothing leaves its index out, as PyTorch draws nothing there), and
    an autoencoder's draws at the place where diffusers makes them.

    Draws of 16 values and more are those of PyTorch on x86 with AVX2, the path every x86 processor of the last decade
    takes; there logarithm, sine and cosine are float32 polynomials. On ARM, PyTorch uses the C library's functions
    instead and its values differ from these in the last bits. PyTorch reads the low 32 bits of a seed only.

    Args:
        seeds: one per image of the batch.

    Raises:
        UsageError: a seed outside 0 ... 2^64 - 1; when called, a batch of another size or an index out of order.
    """

    def __init__(self, seeds: Sequence[int]):
        self._generators = [_TorchGenerator(seed) for seed in check_seeds(seeds)]
        self._last_index = -1

    def __call__(self, shape: tuple[int, ...], index: int) -> mx.array:
        _check_request(shape, index, len(self._generators))
        if 0 <= index <= self._last_index:
            raise UsageError(
                "torch noise",
                f"draw {index} was asked for after draw {self._last_index}, but PyTorch's generator only goes forward",
                "make a new noise source for every run",
            )
        self._last_index = max(index, self._last_index)
        inner = tuple(shape[1:])
        channels_first = inner[-1:] + inner[:-1]
        draws = [generator.normal(math.prod(inner)).reshape(channels_first) for generator in self._generators]
        batch = np.stack(draws)
        return mx.array(np.moveaxis(batch, 1, -1) if inner else batch)


def torch_noise(seeds: Sequence[int]) -> Noise:
    """The noise PyTorch's CPU generators draw from these seeds; see `TorchNoise`."""
    return TorchNoise(seeds)


def replay_noise(arrays: Sequence[mx.array | np.ndarray] | Mapping[int, mx.array | np.ndarray]) -> Noise:
    """Replays given noise: `arrays[index]` is draw `index`, as taken from another implementation's run.

    Raises:
        UsageError: when called, for a draw beyond the last array or of another shape.
    """
    pairs = arrays.items() if isinstance(arrays, Mapping) else enumerate(arrays)
    draws = {index: mx.array(array).astype(mx.float32) for index, array in pairs}

    def noise(shape: tuple[int, ...], index: int) -> mx.array:
        if index not in draws:
            raise UsageError("replayed noise", f"draw {index} was asked for, but only {len(draws)} are there")
        if draws[index].shape != tuple(shape):
            raise UsageError(
                "replayed noise",
                f"draw {index} has shape {draws[index].shape}, but {tuple(shape)} was asked for (channels last)",
            )
        return draws[index]

    return noise


NOISE_SOURCES: dict[str, Callable[[Sequence[int]], Noise]] = {"mlx": mlx_noise, "torch": torch_noise}


class _TorchGenerator:
    """PyTorch's CPU generator: a Mersenne Twister, and the second half of the last scalar Box-Muller pair."""

    def __init__(self, seed: int):
        self._words = _mersenne_twister(seed)
        self._second: float | None = None

    def normal(self, size: int) -> np.ndarray:
        """`size` standard normal values as `torch.randn(size)` draws them; float32, shape (size,)."""
        if size < _BLOCK:
            return np.array([self._scalar() for _ in range(size)], dtype=np.float32)
        values = _box_muller_blocks(self._uniforms(size)[: size // _BLOCK * _BLOCK])
        if size % _BLOCK:  # the last 16 are drawn anew, so that those that fill no block make one with their neighbours
            values = np.concatenate([values[: size - _BLOCK], _box_muller_blocks(self._uniforms(_BLOCK))])
        return values

    def _uniforms(self, size: int) -> np.ndarray:
        """Whole numbers of 24 bits: torch's float32 uniforms in units of 2^-24."""
        return self._words.random_raw(size) & 0xFFFFFF

    def _uniform_double(self) -> float:
        high, low = self._words.random_raw(2)
        return ((int(high) << 32 | int(low)) & (2**53 - 1)) * 2.0**-53

    def _scalar(self) -> float:
        """Box-Muller in double precision; of each pair the cosine comes now and the sine at the next call."""
        if self._second is not None:
            value, self._second = self._second, None
            return value
        u1, u2 = self._uniform_double(), self._uniform_double()
        radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._second = radius * math.sin(theta)
        return radius * math.cos(theta)


def _mersenne_twister(seed: int) -> np.random.MT19937:
    """MT19937 seeded with one 32-bit word (init_genrand of Matsumoto and Nishimura), as PyTorch does."""
    key = [seed & _WORD]
    for i in range(1, 624):
        key.append((1812433253 * (key[-1] ^ key[-1] >> 30) + i) & _WORD)
    generator = np.random.MT19937()
    generator.state = {"bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": 624}}
    return generator


# From here on: float32 arithmetic, held in float64. A sum, product or root of float32 numbers taken in float64 and then
# rounded to float32 is the float32 result; a fused multiply-add is too, but for a double rounding in rare cases, none
# of which is among the 2^24 arguments that can occur.

_BLOCK = 16  # 8 radii, then 8 angles
_CHUNK = 1 << 15  # values worked on at a time, so that they stay in the processor's cache


def _f32(value: float) -> float:
    return float(np.float32(value))


_LOG = [
    _f32(c)
    for c in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
]  # fmt: skip
_LN2 = _f32(-2.12194440e-4), 0.693359375  # ln 2 = the sum, the larger part with few enough bits to multiply exactly
_SIN = [_f32(c) for c in (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)]
_COS = [_f32(c) for c in (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)]
_QUARTER_PI = 0.78515625, _f32(2.4187564849853515625e-4), _f32(3.77489497744594108e-8)  # pi / 4 = the sum
_FOUR_OVER_PI = _f32(4 / math.pi)
_TWO_PI = _f32(2 * math.pi)
_SQRT_HALF = _f32(math.sqrt(0.5))


def _round(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Horner's rule in fused multiply-adds."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = _round(y * x + c)
    return y


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of 0 < x <= 1 after Cephes' logf: x = 2^e m with sqrt(1/2) <= m < sqrt(2)."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    e = exponent - small.astype(np.float64)
    m = np.where(small, 2 * mantissa, mantissa) - 1
    z = _round(m * m)
    y = _round(_polynomial(_LOG, m) * m)
    y = _round(y * z + _round(e * _LN2[0]))
    y = _round(y - 0.5 * z)
    return _round(_round(m + y) + e * _LN2[1])


def _sincos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of 0 <= x <= 2 pi after Cephes' sinf: x less the nearest multiple j of pi / 2."""
    octant = _round(x * _FOUR_OVER_PI).astype(np.int64)
    octant = octant + 1 & ~1  # even: 2 j
    for part in _QUARTER_PI:
        x = _round(x - octant * part)
    z = _round(x * x)
    cos = _round(_polynomial(_COS, z) * z)
    cos = _round(_round(cos * z - 0.5 * z) + 1)
    sin = _round(_polynomial(_SIN, z) * z)
    sin = _round(sin * x + x)
    swapped = octant & 2 != 0
    sin, cos = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    return np.where(octant & 4 != 0, -sin, sin), np.where((octant - 2) & 4 != 0, cos, -cos)


def _box_muller_blocks(uniforms: np.ndarray) -> np.ndarray:
    """Box-Muller over blocks of 16.

    Args:
        uniforms: whole numbers in units of 2^-24, shape (n,), n a multiple of 16.

    Returns:
        float32, shape (n,).
    """
    values = np.empty(len(uniforms), dtype=np.float32)
    for start in range(0, len(uniforms), _CHUNK):
        part = slice(start, start + _CHUNK)
        blocks = uniforms[part].reshape(-1, 2, _BLOCK // 2)
        radius = np.sqrt(-2 * _log((2**24 - blocks[:, 0]) * 2.0**-24))
        sin, cos = _sincos(_round(_TWO_PI * (blocks[:, 1] * 2.0**-24)))
        # Adding zero turns -0 into 0, as torch's scaling by a standard deviation and a mean does.
        values[part] = np.stack([_round(radius) * cos, _round(radius) * sin], axis=1).reshape(-1) + 0.0
    return values
