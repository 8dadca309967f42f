"""Which pictures a step of training sees: a pure function of the seed and the step."""

import bisect
import enum
import functools
import itertools
from collections.abc import Hashable, Sequence

import numpy as np

from mlx_cm.errors import UsageError
from mlx_cm.rng import check_seeds


class Purpose(enum.IntEnum):
    """What random bits are for: with the same seed, each purpose has its own."""

    ORDER = 0
    INTERLEAVING = 1
    AUGMENTATION = 2
    VARIANTS = 3


def random_bits(seed: int, purpose: Purpose, index: int, stream: int = 0) -> np.random.Philox:
    """A source of random bits that is a function of its arguments, each below 2^64.

    Raises:
        UsageError: a seed outside 0 ... 2^64 - 1.
    """
    key = np.array([*check_seeds([seed]), purpose], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, stream, index], np.uint64))


class Order:
    """The pictures of every step, each of one bucket's, shuffled anew in every epoch.

    The pictures of a bucket form an endless stream, one permutation after the other, cut into batches: none is left
    out, none comes more often than another, no batch is short, and where a bucket is smaller than a batch its pictures
    repeat. An epoch takes from each bucket the batches that its stream completes meanwhile, interleaved at random.

    Args:
        count: number of pictures.
        batch_size: pictures per step, over all processes and micro-batches.
        seed: another one, another order.
        buckets: for each picture what it shares with those it may be batched with; None: all of them.

    Raises:
        UsageError: no picture, an empty batch, or buckets of another number of pictures.
    """

    def __init__(self, count: int, batch_size: int, seed: int, buckets: Sequence[Hashable] | None = None):
        if count < 1 or batch_size < 1:
            raise UsageError("order", f"expected at least 1 picture and a batch of 1, got {count} and {batch_size}")
        if buckets is not None and len(buckets) != count:
            raise UsageError("order", f"expected a bucket for each of {count} pictures, got {len(buckets)}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate([None] * count if buckets is None else buckets):
            members.setdefault(bucket, []).append(index)
        self.buckets = [np.array(indices) for indices in members.values()]
        self._permutation = functools.lru_cache(4 * len(self.buckets))(self._permute)
        self._interleaved = functools.lru_cache(4)(self._interleave)

    def batch(self, step: int) -> list[int]:
        """Indices of the pictures of a step, `batch_size` of them."""
        if step < 0:
            raise UsageError(f"step {step}", "expected 0 or more")
        epoch = self._epoch_of(step)
        bucket, number = self._interleaved(epoch)[step - self._batches_before(epoch)]
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        size = len(self.buckets[bucket])
        return [int(self._permutation(bucket, position // size)[position % size]) for position in positions]

    def checked_stop(self, start: int, stop: int | None) -> int:
        """Where rows [start, stop) of a batch end; None: with the batch.

        Raises:
            UsageError: no rows, or some beyond the batch.
        """
        stop = self.batch_size if stop is None else stop
        if not 0 <= start < stop <= self.batch_size:
            raise UsageError(f"rows {start} to {stop}", f"expected some of the {self.batch_size} rows of a batch")
        return stop

    def epoch(self, step: int) -> float:
        """How many times every picture was seen before a step, on average."""
        return step * self.batch_size / self.count

    def _completed(self, bucket: int, epoch: int) -> int:
        """Batches that a bucket's stream completes before an epoch."""
        return epoch * len(self.buckets[bucket]) // self.batch_size

    def _batches_before(self, epoch: int) -> int:
        return sum(self._completed(bucket, epoch) for bucket in range(len(self.buckets)))

    def _epoch_of(self, step: int) -> int:
        """The epoch whose batches a step is one of; up to one batch per bucket waits for a later epoch."""
        first = step * self.batch_size // self.count
        last = (step + 1 + len(self.buckets)) * self.batch_size // self.count + 1
        return bisect.bisect_right(range(last + 1), step, lo=first, key=self._batches_before) - 1

    def _interleave(self, epoch: int) -> list[tuple[int, int]]:
        """The batches of an epoch in order: (bucket, number within the bucket's stream)."""
        first, end = ([self._completed(bucket, at) for bucket in range(len(self.buckets))] for at in (epoch, epoch + 1))
        turns = [bucket for bucket in range(len(self.buckets)) for _ in range(first[bucket], end[bucket])]
        places = _shuffled(len(turns), random_bits(self.seed, Purpose.INTERLEAVING, epoch))
        numbers = [itertools.count(number) for number in first]
        return [(turns[place], next(numbers[turns[place]])) for place in places]

    def _permute(self, bucket: int, epoch: int) -> np.ndarray:
        indices = self.buckets[bucket]
        return indices[_shuffled(len(indices), random_bits(self.seed, Purpose.ORDER, epoch, bucket))]


def _shuffled(count: int, bits: np.random.Philox) -> np.ndarray:
    """A permutation: the order of random numbers, the same with every NumPy."""
    return np.argsort(bits.random_raw(count), kind="stable")
