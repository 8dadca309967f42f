"""LPIPS on VGG16, the perceptual distance that consistency models of pixels are trained with.

[LPIPS]; parameters carry torchvision's names for the network and the `lpips` package's for the heads. The variant of
OpenAI's consistency models is that of the `piq` package: the same weights with means in place of maxima, on pictures
that are enlarged first. The two packages normalise colours alike, one from [-1, 1] and one from [0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_cm.models.layers import Conv2d, downsample_mean

# Convolutions of each stage by torchvision's numbers, which count activations and pooling too.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SMALLEST = 2 ** (len(STAGES) - 1)  # pixels a side of which the last stage sees one
COLOURS = 3

# Mean and deviation of ImageNet's colours, carried from [0, 1] to [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

EPS = 1e-10  # added to the length of a position's features
SMALLEST_SQUARE = 1e-30  # of that length


def downsample_max(x: mx.array) -> mx.array:
    """Halves height and width by 2x2 maxima, an odd last row or column left out: (B, H, W, C) => (B, H//2, W//2, C).

    Equal maxima, as in even parts of a picture, share the gradient; PyTorch gives it to the first.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


POOLING = {"max": downsample_max, "avg": downsample_mean}


@dataclass(frozen=True)
class LPIPSConfig:
    """How an `LPIPS` looks at pictures."""

    block_out_channels: tuple[int, ...] = (64, 128, 256, 512, 512)  # width per stage; VGG16's
    pooling: str = "max"  # between stages; "avg": as OpenAI's consistency models were trained
    resize: int | None = None  # pixels a side to which small pictures are brought first; OpenAI's: 224
    resize_below: int = 256  # pixels; a picture with a shorter side is small

    def __post_init__(self):
        if len(self.block_out_channels) != len(STAGES):
            raise ValueError(
                f"block_out_channels: expected {len(STAGES)} values, one per stage, got {len(self.block_out_channels)}"
            )
        if self.pooling not in POOLING:
            raise ValueError(f"pooling: {self.pooling!r} is not supported, expected one of {list(POOLING)}")
        if min(self.block_out_channels) < 1:
            raise ValueError(f"block_out_channels: expected at least 1, got {min(self.block_out_channels)}")
        if self.resize is not None and self.resize < SMALLEST:
            raise ValueError(f"resize: expected at least {SMALLEST} pixels, got {self.resize}")


def interpolation_matrix(source: int, target: int) -> mx.array:
    """What each of `target` positions along an axis takes from `source` ones: (target, source), float32.

    Linear interpolation between centres of pixels, the ends repeated; PyTorch's `interpolate` with `mode="linear"` and
    `align_corners=False`, which weighs two neighbours also where it reduces.
    """
    centres = (mx.arange(target, dtype=mx.float32) + 0.5) * (source / target) - 0.5
    centres = mx.clip(centres, 0, source - 1)
    return mx.maximum(1 - mx.abs(centres[:, None] - mx.arange(source, dtype=mx.float32)), 0)


def resize_bilinear(x: mx.array, height: int, width: int) -> mx.array:
    """Brings maps to another size: (B, H, W, C) => (B, height, width, C), float32.

    As two matrix products, whose gradients are products too: a gather's would add up in an order of the device's.
    """
    x = x.astype(mx.float32)
    batch, rows, columns, channels = x.shape
    x = interpolation_matrix(rows, height) @ x.reshape(batch, rows, columns * channels)  # (B, height, W C)
    x = interpolation_matrix(columns, width) @ x.reshape(batch, height, columns, channels)
    return x.reshape(batch, height, width, channels)


def normalise(features: mx.array) -> mx.array:
    """Scales the features of each position to length one: f / (|f| + 1e-10), (B, H, W, C).

    [LPIPS] section 3. Where all features are zero, as in dark and even parts of a picture, |f| has no gradient; it is
    taken as zero, so that no NaN goes back into the network.
    """
    squares = mx.square(features).sum(axis=-1, keepdims=True)
    return features / (mx.sqrt(mx.maximum(squares, SMALLEST_SQUARE)) + EPS)


class LPIPS(nn.Module):
    """Weighted squared differences of normalised VGG16 features, summed over five stages.

    [LPIPS] equation 1. The heads' weights are not negative, so neither is the distance.
    """

    # All of it: the share of one among 50 000 positions in a mean, and so in a gradient, is below float16's numbers.
    float32_parts: tuple[str, ...] = ("features", "lins")

    def __init__(self, config: LPIPSConfig):
        super().__init__()
        self.config = config
        self.features = [nn.Identity() for _ in range(STAGES[-1][-1] + 1)]  # those left are activations and pooling
        channels = COLOURS
        for stage, width in zip(STAGES, config.block_out_channels, strict=True):
            for number in stage:
                self.features[number] = Conv2d(channels, width, 3, padding=1)
                channels = width
        self.lins = [nn.Linear(width, 1, bias=False) for width in config.block_out_channels]

    def __call__(self, a: mx.array, b: mx.array) -> mx.array:
        """Distances of pictures.

        Args:
            a, b: (B, H, W, 3) in [-1, 1]; with one channel they are grey. A gradient is computed only of the one that
                needs it.

        Returns:
            (B,), float32.

        Raises:
            ValueError: pictures too small for the network, or not of one or three channels.
        """
        total = mx.zeros((a.shape[0],))
        for one, other, head in zip(self.stages(a), self.stages(b), self.lins, strict=True):
            squares = mx.square(normalise(one) - normalise(other))
            total = total + head(squares.mean(axis=1).mean(axis=1))[:, 0]  # the mean of the head's output
        return total

    def stages(self, x: mx.array) -> Iterator[mx.array]:
        """Features after the last activation of each stage: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

        Args:
            x: pictures as for a call.

        Returns:
            Five arrays (B, H/2^stage, W/2^stage, width of the stage), sizes rounded down, computed as they are asked
            for.
        """
        x = self._prepared(x)
        for number, stage in enumerate(STAGES):
            if number > 0:
                x = POOLING[self.config.pooling](x)
            for layer in stage:
                x = mx.maximum(self.features[layer](x), 0)
            yield x

    def _prepared(self, x: mx.array) -> mx.array:
        """Pictures in the size and the colours that the network knows."""
        _, height, width, channels = x.shape
        config = self.config
        if channels not in (1, COLOURS):
            raise ValueError(f"expected pictures of 1 or {COLOURS} channels, got {channels}")
        if config.resize is not None and min(height, width) < config.resize_below:
            x = resize_bilinear(x, config.resize, config.resize)
        elif min(height, width) < SMALLEST:
            raise ValueError(f"expected pictures of at least {SMALLEST} pixels a side, got {height}x{width}")
        return (x.astype(mx.float32) - mx.array(SHIFT)) / mx.array(SCALE)
