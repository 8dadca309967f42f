"""Pictures to batches: which pictures are usable, in which order they come, and rows of pixels for each step.

Whatever is random is a function of the seed and the step.
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
from mlx_cm.training.preparation import (
    MODES,
    DataSettings,
    Size,
    bucket_sizes,
    crop_and_flip,
    nearest_bucket,
    resize_to_cover,
    to_unit,
)
from mlx_cm.training.remembered import Remembered

log = logging.getLogger("mlx_cm")

Progress = Callable[[int, int, str], None]  # (pictures done, pictures in all, the one just done)

MAX_ELONGATION = 20  # of a picture's longer side to its shorter: covering a square, it would fill the memory
MAX_WORKERS = 8
AHEAD = 4  # results per thread that may wait to be taken
KEPT_BYTES = 2 << 30  # of resized pictures held in memory

T = TypeVar("T")
R = TypeVar("R")


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
    skipped: list[str] = []

    def skip(name: str, why: str) -> None:
        if strict:
            raise ModelError(name, why, "repair or remove it")
        log.warning("%s is skipped: %s", name, why)
        skipped.append(name)

    for name, why in container.faults:
        skip(name, why)
    usable, sizes = [], []
    known = [_known_size(entry, remembered) for entry in container.entries]
    unknown = [entry for entry, size in zip(container.entries, known, strict=True) if size is None]
    try:
        with contextlib.closing(parallel(_decoded_size, unknown, workers)) as decoded:
            for done, (entry, size) in enumerate(zip(container.entries, known, strict=True), start=1):
                found = size or next(decoded)
                if isinstance(found, ModelError):  # not remembered: it may be out of reach only now
                    skip(entry.name, found.why)
                elif max(found) > MAX_ELONGATION * min(found):
                    skip(entry.name, f"is {found[1]}x{found[0]}, too long to be cut to a size")
                else:
                    usable.append(entry)
                    sizes.append(found)
                    remembered.put(entry.name, entry.stamp, list(found))
                if progress:
                    progress(done, len(container.entries), entry.name)
    finally:
        remembered.save()
    if not usable:
        why = "holds no usable picture" if skipped else "holds no pictures"
        raise ModelError(str(path), why, "give a folder of images, an .npz file, or .tar files")
    data = PictureData(path, container.kind, tuple(usable), tuple(sizes), container.class_names, skipped)
    log.info("%s: %s", path, data.description)
    return data


def _known_size(entry: Entry, remembered: Remembered) -> Size | None:
    """The size of a picture that need not be decoded."""
    if entry.size is not None:
        return entry.size
    match remembered.get(entry.name, entry.stamp):
        case [int(height), int(width)]:
            return height, width
    return None


def _decoded_size(entry: Entry) -> Size | ModelError:
    """The size of a picture, or why it cannot be read."""
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


def target_sizes(data: PictureData, settings: DataSettings) -> list[Size]:
    """The size that each picture is brought to."""
    if not settings.buckets:
        return [settings.target] * len(data)
    buckets = bucket_sizes(settings.target, settings.bucket_step)
    return [nearest_bucket(size, buckets) for size in data.sizes]


def check_order(order: Order, targets: Sequence[Size]) -> None:
    """Refuses an order that is not of these pictures, or whose batches would mix sizes.

    Raises:
        UsageError: as said; `make_order` makes one that fits.
    """
    if order.count != len(targets):
        raise UsageError("order", f"is of {order.count} pictures, the data has {len(targets)}")
    if any(len({targets[index] for index in bucket}) > 1 for bucket in order.buckets):
        raise UsageError("order", "mixes sizes in a batch, but data.buckets brings pictures to several")


def make_order(data: PictureData, settings: DataSettings, batch_size: int, seed: int) -> Order:
    """The order of a data set, where every batch has pictures of one size."""
    return Order(len(data), batch_size, seed, target_sizes(data, settings) if settings.buckets else None)


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
        for name, is_used in (("buckets", settings.buckets), ("variants", settings.variants > 1)):
            if is_used:
                raise UsageError(
                    f"data.{name}", "is for latent models; pixels are of one size, and cut anew every time"
                )
        self.data, self.order, self.settings, self.channels, self.seed = data, order, settings, channels, seed
        check_order(order, target_sizes(data, settings))
        self._target = settings.target
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
        stop = self.order.checked_stop(start, stop)
        pieces = self._submit(step, start, stop)
        del self._ahead[step, start, stop]
        for key in [key for key in self._ahead if key[0] not in (step, step + 1)]:
            for piece in self._ahead.pop(key):
                piece.cancel()
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
        draws = augmentation_draws(self.seed, step, stop)
        rows = [
            crop_and_flip(self._covering(index), self._target, self.settings, draws[row])
            for row, index in enumerate(self.order.batch(step)[start:stop], start=start)
        ]
        return to_unit(np.stack(rows))

    def _covering(self, index: int) -> np.ndarray:
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = resize_to_cover(self.data.read(index), self._target, self.channels)
            with self._lock:
                if index not in self._kept and self._kept_bytes + pixels.nbytes <= KEPT_BYTES:
                    self._kept_bytes += pixels.nbytes
                    self._kept[index] = pixels
        return pixels


def augmentation_draws(seed: int, step: int, rows: int) -> np.ndarray:
    """Three uniform numbers in [0, 1) for each row of a step, (rows, 3); how many rows there are changes none."""
    return np.random.Generator(random_bits(seed, Purpose.AUGMENTATION, step)).random((rows, 3))
