"""From a picture to a row of a batch: its size, what is cut off, and what SDXL is told of it.

Sizes are (height, width) in pixels. What is left to chance is decided by draws, uniform numbers given as arguments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mlx_cm.errors import UsageError

Size = tuple[int, int]  # (height, width), pixels

CROPS = ("center", "random")
MODES = {1: "L", 3: "RGB"}  # channels => Pillow's mode
MAX_ASPECT = 2.0  # of a bucket's longer side to its shorter


@dataclass(frozen=True)
class DataSettings:
    """How pictures become rows of a batch; the `[data]` section of a training config."""

    size: int | tuple[int, int] = 0  # pixels: a square's side, or height and width; 0: the model's
    crop: str = "center"  # of CROPS
    flip: bool = False  # left to right, half of the times
    buckets: bool = False  # latent models: keep aspect ratios, each batch of one size of about the same area
    bucket_step: int = 64  # pixels: the sides of buckets are multiples
    variants: int = 1  # latent models: how many crops and flips of each picture are encoded
    workers: int = 0  # threads that decode; 0: as many as there are cores, at most 8

    def __post_init__(self):
        if not (len(self.size) == 2 and min(self.size) > 0 if isinstance(self.size, tuple) else self.size >= 0):
            raise ValueError(f"size: expected a side or height and width in pixels, got {self.size}")
        if self.crop not in CROPS:
            raise ValueError(f"crop: expected one of {', '.join(CROPS)}, got {self.crop!r}")
        for name, least in (("bucket_step", 1), ("variants", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")

    @property
    def target(self) -> Size:
        """Height and width of a picture; with buckets, their product bounds the area.

        Raises:
            UsageError: the size is left to the model, and nobody has filled it in (`dataclasses.replace`).
        """
        if self.size == 0:
            raise UsageError("data.size 0", "stands for the model's size, which was not filled in")
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def distinct_variants(self) -> int:
        """How many variants of a picture can differ."""
        return self.variants if self.flip or self.crop == "random" else 1


# --- sizes


def bucket_sizes(target: Size, step: int) -> list[Size]:
    """The sizes of aspect buckets: for each width the greatest height within the target's area, and the reverse.

    Args:
        target: bounds the area.
        step: pixels; sides are multiples of it.

    Returns:
        Sizes whose longer side is at most twice the shorter, from the tallest to the widest.

    Raises:
        UsageError: no size fits.
    """
    area = target[0] * target[1]
    found = set()
    for side in range(step, int((area * MAX_ASPECT) ** 0.5) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= MAX_ASPECT * min(side, other):
            found |= {(side, other), (other, side)}
    if not found:
        raise UsageError(
            f"data.size {target[0]}x{target[1]}", f"no bucket with sides of multiples of {step} fits", "a larger size"
        )
    return sorted(found, key=lambda size: (size[1] / size[0], size))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to a picture's; of equals, the larger one."""
    aspect = math.log(size[1] / size[0])

    def distance(bucket: Size) -> tuple[float, int]:
        return round(abs(math.log(bucket[1] / bucket[0]) - aspect), 9), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


# --- one picture


def covering_size(size: Size, target: Size) -> Size:
    """The smallest size of a picture's aspect ratio that covers the target."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(round(size[0] * scale), target[0]), max(round(size[1] * scale), target[1])


def resize_to_cover(image: Image.Image, target: Size, channels: int = 3) -> np.ndarray:
    """A picture resized with a Lanczos filter so that one side fits the target and the other is no shorter.

    Args:
        image: RGB.
        channels: 1 makes it greyscale.

    Returns:
        uint8, (H, W, channels).
    """
    height, width = covering_size((image.height, image.width), target)
    image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)


def crop_corner(size: Size, target: Size, settings: DataSettings, draws: Sequence[float]) -> tuple[int, int]:
    """Where a covering picture is cut: (top, left), pixels.

    Args:
        size: of the picture, no smaller than the target.
        draws: uniform numbers in [0, 1); the first two decide where it is left to chance.
    """
    free = (size[0] - target[0], size[1] - target[1])
    if settings.crop == "center":
        return free[0] // 2, free[1] // 2
    return int(draws[0] * (free[0] + 1)), int(draws[1] * (free[1] + 1))


def crop_and_flip(pixels: np.ndarray, target: Size, settings: DataSettings, draws: Sequence[float]) -> np.ndarray:
    """The part of a covering picture that is shown, a view of size `target`.

    A flip comes before the cut, so that the corner of the cut is that of the picture as it is shown.

    Args:
        pixels: (H, W, C), no smaller than the target.
        draws: three uniform numbers in [0, 1): for top, left and flip.
    """
    top, left = crop_corner(pixels.shape[:2], target, settings, draws)
    if settings.flip and draws[2] < 0.5:
        pixels = pixels[:, ::-1]
    return pixels[top : top + target[0], left : left + target[1]]


def micro_conditioning(size: Size, target: Size, settings: DataSettings, draws: Sequence[float]) -> tuple[int, ...]:
    """What SDXL is told of a picture: original height and width, crop top and left, target height and width.

    Args:
        size: of the picture before it is resized.
        draws: as for `crop_and_flip`.
    """
    return (*size, *crop_corner(covering_size(size, target), target, settings, draws), *target)


def prepare(
    image: Image.Image,
    settings: DataSettings,
    draws: Sequence[float] = (0.5, 0.5, 0.5),
    *,
    target: Size | None = None,
    channels: int = 3,
) -> np.ndarray:
    """The pixels of a picture as a row of a batch: resized to cover the target, flipped, cropped.

    Args:
        image: upright, RGB.
        draws: three uniform numbers in [0, 1), which decide crop and flip where the settings leave them to chance.
        target: another size than the settings', such as a bucket's.
        channels: 1 makes it greyscale.

    Returns:
        uint8, (H, W, channels); `micro_conditioning` says what SDXL is told of them.
    """
    target = target or settings.target
    return np.ascontiguousarray(crop_and_flip(resize_to_cover(image, target, channels), target, settings, draws))


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels from 0 ... 255 to [-1, 1], float32, as `images.from_pil` does."""
    return pixels.astype(np.float32) / 127.5 - 1
