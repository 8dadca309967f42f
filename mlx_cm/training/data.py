"""Pictures to batches: what is usable, how it is resized, cropped and flipped, and rows of pixels for each step.

Sizes are (height, width) in pixels throughout. Whatever is random is a function of the seed and the step.
"""

import collections
import contextlib
import hashlib
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_cm.cache import cache_root
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.images import to_rgb
from mlx_cm.training.data_sources import Entry, read_container
from mlx_cm.training.order import Order, Purpose, random_bits
from mlx_cm.training.remembered import Remembered

log = logging.getLogger("mlx_cm")

Progress = Callable[[int, int, str], None]  # (pictures done, pictures in all, the one just done)
Size = tuple[int, int]  # (height, width), pixels

CROPS = ("center", "random")
MODES = {1: "L", 3: "RGB"}  # channels => Pillow's mode
MAX_ASPECT = 2.0  # of a bucket's longer side to its shorter
MAX_WORKERS = 8
AHEAD = 4  # results per thread that may wait to be taken
KEPT_BYTES = 2 << 30  # of resized pictures held in memory

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class DataSettings:
    """How pictures become rows of a batch; the `[data]` section of a training config."""

    size: int | tuple[int, int] = 0  # pixels: a square's side, or height and width; 0: the model's
    crop: str = "center"  # of CROPS
    flip: bool = False  # left to right, every other picture at random
    buckets: bool = False  # latent models: keep aspect ratios, each batch of one size of about the same area
    bucket_step: int = 64  # pixels: the sides of buckets are multiples
    variants: int = 1  # latent models: how many crops and flips of each picture are encoded
    workers: int = 0  # threads that decode; 0: as many as there are cores, at most 8

    def __post_init__(self):
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if len(sides) > 2 or min(sides, default=-1) < 0 or (len(sides) == 2 and 0 in sides):
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
    def is_random(self) -> bool:
        """Whether a picture looks different from time to time."""
        return self.flip or self.crop == "random"


# --- opening


@dataclass(frozen=True)
class PictureData:
    """The usable pictures of a data set, in a fixed order."""

    path: Path
    kind: str  # what the path was recognised as, for people
    entries: tuple[Entry, ...]
    sizes: tuple[Size, ...]  # of the pictures, upright
    class_names: tuple[str, ...] | None  # by label, where classes have names
    skipped: list[str]  # names of what could not be used
    in_memory: bool = False  # whether reading a picture takes no decoding

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Image.Image:
        """A picture, upright and RGB.

        Raises:
            ModelError: it has become unreadable since the data was opened.
        """
        return to_rgb(self.entries[index].read())

    @property
    def captions(self) -> list[str | None]:
        """One per picture."""
        return [entry.caption for entry in self.entries]

    @property
    def labels(self) -> list[int] | None:
        """One per picture; None where the data has no classes."""
        return None if self.entries[0].label is None else [entry.label for entry in self.entries]

    @property
    def num_classes(self) -> int | None:
        """How many classes a network must know; None where the data has none."""
        if self.labels is None:
            return None
        return len(self.class_names) if self.class_names else max(self.labels) + 1

    @property
    def description(self) -> str:
        """One line for people: what was recognised, and how much of it."""
        parts = [f"{len(self)} picture{'s' * (len(self) > 1)} from {self.kind}"]
        captions = sum(caption is not None for caption in self.captions)
        parts += [f"{captions} with a caption"] if captions else []
        parts += [f"{self.num_classes} classes"] if self.num_classes else []
        parts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        return ", ".join(parts)


def open_data(
    path: Path,
    *,
    strict: bool = False,
    classes: bool | None = None,
    workers: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> PictureData:
    """Opens training data: a folder of images, an `.npz` file, or tar shards; see `data_sources`.

    Every picture is decoded once, so that the order of training never depends on what turns out to be broken; what was
    found is remembered, and a second opening decodes only what changed.

    Args:
        strict: whether a picture that cannot be used is an error; otherwise it is named in a warning and left out.
        classes: whether pictures have labels; None: as found, see `data_sources.read_container`.
        workers: threads that decode; 0: as many as there are cores, at most 8.
        cache: folder to remember in; by default of mlx-cm's cache.
        progress: called after each picture.

    Raises:
        ModelError: nothing usable, an ambiguity, or with `strict` anything that cannot be used.
    """
    path = Path(path)
    container = read_container(path, classes)
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    remembered = Remembered((cache or cache_root() / "features") / "checked" / f"{key}.json")
    faults = list(container.faults)
    usable, sizes = [], []
    try:
        with contextlib.closing(parallel(lambda one: _check(one, remembered), container.entries, workers)) as results:
            for done, (entry, found) in enumerate(zip(container.entries, results, strict=True), start=1):
                if isinstance(found, ModelError):  # not remembered: it may be out of reach only now
                    faults.append((entry.name, found.why))
                else:
                    usable.append(entry)
                    sizes.append(found)
                    remembered.put(entry.name, entry.stamp, list(found))
                if progress:
                    progress(done, len(container.entries), entry.name)
    finally:
        remembered.save()
    for name, why in faults:
        if strict:
            raise ModelError(name, why, "repair or remove it")
        log.warning("%s is skipped: %s", name, why)
    if not usable:
        hint = "all of it is unreadable" if faults else "give a folder of images, an .npz file or .tar files"
        raise ModelError(str(path), "holds no usable picture", hint)
    skipped = [name for name, _ in faults]
    data = PictureData(
        path, container.kind, tuple(usable), tuple(sizes), container.class_names, skipped, container.in_memory
    )
    log.info("%s: %s", path, data.description)
    return data


def _check(entry: Entry, remembered: Remembered) -> Size | ModelError:
    """The size of a picture, or why it cannot be read."""
    if entry.size is not None:
        return entry.size
    match remembered.get(entry.name, entry.stamp):
        case [int(height), int(width)]:
            return height, width
    try:
        image = to_rgb(entry.read())
    except ModelError as error:
        return error
    return image.height, image.width


def parallel(function: Callable[[T], R], items: Iterable[T], workers: int = 0) -> Iterator[R]:
    """Results of a function in the order of the items, computed by threads a little ahead of whoever takes them.

    Whoever stops before the last result closes the generator, which leaves no work behind.

    Args:
        workers: threads; 0: as many as there are cores, at most 8.
    """
    workers = worker_count(workers)
    executor = ThreadPoolExecutor(workers)
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def worker_count(workers: int) -> int:
    """Threads to decode with; 0: as many as there are cores, at most 8."""
    return workers or min(os.cpu_count() or 1, MAX_WORKERS)


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
    aspect = np.log(size[1] / size[0])
    return min(
        buckets, key=lambda bucket: (round(abs(np.log(bucket[1] / bucket[0]) - aspect), 9), -bucket[0] * bucket[1])
    )


def target_sizes(data: PictureData, settings: DataSettings) -> list[Size]:
    """The size that each picture is brought to."""
    if not settings.buckets:
        return [settings.target] * len(data)
    buckets = bucket_sizes(settings.target, settings.bucket_step)
    return [nearest_bucket(size, buckets) for size in data.sizes]


def make_order(data: PictureData, settings: DataSettings, batch_size: int, seed: int) -> Order:
    """The order of a data set, where every batch has pictures of one size."""
    return Order(len(data), batch_size, seed, target_sizes(data, settings) if settings.buckets else None)


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


# --- batches of pixels


class PixelBatches:
    """The pixels of every step.

    Resized pictures are kept in memory up to 2 GB. While a step is computed, threads prepare the rows of the next one.

    Args:
        data: the pictures.
        order: which pictures a step has.
        settings: how they are prepared; the size filled in.
        channels: 3, or 1 for greyscale.
        seed: of crops and flips.
    """

    def __init__(self, data: PictureData, order: Order, settings: DataSettings, channels: int = 3, seed: int = 0):
        if channels not in MODES:
            raise UsageError(f"channels {channels}", "pictures have 3 channels, or 1 as greyscale")
        self.data, self.order, self.settings, self.channels, self.seed = data, order, settings, channels, seed
        self._targets = target_sizes(data, settings)
        self._labels = data.labels
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._ahead: dict[tuple[int, int, int], list[Future[np.ndarray]]] = {}
        self._workers = worker_count(settings.workers)
        self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix="mlx-cm-data")
        self._close = weakref.finalize(self, self._executor.shutdown, wait=False, cancel_futures=True)

    def load(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        """Rows [start, stop) of a step's batch.

        Returns:
            `x0`: float32, (B, H, W, C), in [-1, 1]; `class_labels`: int32, (B,), where the data has labels.

        Raises:
            ModelError: a picture has become unreadable since the data was opened.
        """
        stop = self.order.batch_size if stop is None else stop
        if not 0 <= start < stop <= self.order.batch_size:
            raise UsageError(f"rows {start} to {stop}", f"expected some of the {self.order.batch_size} rows of a batch")
        pieces = self._submit(step, start, stop)
        for key in [key for key in self._ahead if key[0] < step or key[0] > step + 1 or key == (step, start, stop)]:
            del self._ahead[key]
        self._submit(step + 1, start, stop)
        rows = {"x0": mx.array(np.concatenate([piece.result() for piece in pieces]))}
        if self._labels is not None:
            labels = [self._labels[index] for index in self.order.batch(step)[start:stop]]
            rows["class_labels"] = mx.array(labels, dtype=mx.int32)
        return rows

    def close(self) -> None:
        """Stops the threads; nothing can be loaded afterwards."""
        self._close()

    def _submit(self, step: int, start: int, stop: int) -> list[Future[np.ndarray]]:
        """The rows of a step, under way in about equal pieces, one for each thread."""
        key = (step, start, stop)
        if key not in self._ahead:
            edges = np.linspace(start, stop, min(self._workers, stop - start) + 1).astype(int).tolist()
            self._ahead[key] = [self._executor.submit(self._rows, step, *piece) for piece in itertools.pairwise(edges)]
        return self._ahead[key]

    def _rows(self, step: int, start: int, stop: int) -> np.ndarray:
        draws = augmentation_draws(self.seed, step, self.order.batch_size)
        rows = [
            crop_and_flip(self._covering(index), self._targets[index], self.settings, draws[row])
            for row, index in enumerate(self.order.batch(step)[start:stop], start=start)
        ]
        return to_unit(np.stack(rows))

    def _covering(self, index: int) -> np.ndarray:
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = resize_to_cover(self.data.read(index), self._targets[index], self.channels)
            with self._lock:
                if not self.data.in_memory and self._kept_bytes + pixels.nbytes <= KEPT_BYTES:
                    self._kept_bytes += pixels.nbytes if index not in self._kept else 0
                    self._kept[index] = pixels
        return pixels


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels from 0 ... 255 to [-1, 1], float32, as `images.from_pil` does."""
    return pixels.astype(np.float32) / 127.5 - 1


def augmentation_draws(seed: int, step: int, rows: int) -> np.ndarray:
    """Three uniform numbers in [0, 1) for each row of a step, (rows, 3); how many rows there are changes none."""
    return np.random.Generator(random_bits(seed, Purpose.AUGMENTATION, step)).random((rows, 3))
