"""Arrays kept by what they were computed from, in safetensors files that are written once and never changed.

An interruption costs what was not in a file yet. A file that is broken is noticed, removed and made again.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mlx_cm.cache import conversion_lock
from mlx_cm.errors import ModelError
from mlx_cm.storage import TensorSource, atomic_file, check_safetensors, disk_errors, partials, write_safetensors

log = logging.getLogger("mlx_cm")

FORMAT = "mlx-cm features 1"
# How much is computed before it is written, and lost by an interruption: what one file holds.
SHARD_ENTRIES = 256  # at most
SHARD_BYTES = 64 << 20  # of pixels, about
SHARD_TEXTS = 64
OPEN_SHARDS = 1024  # files mapped into memory at a time
DTYPE_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}


@dataclass(frozen=True)
class Item:
    """Something to compute features of."""

    key: str  # SHA-256 of the content
    name: str  # for people
    content: np.ndarray | str  # uint8 pixels (H, W, 3), or text

    @property
    def shape(self) -> tuple[int, ...]:
        """Items of one shape can be computed together."""
        return () if isinstance(self.content, str) else self.content.shape

    @property
    def share(self) -> float:
        """How much of a file the item fills."""
        return 1 / SHARD_TEXTS if isinstance(self.content, str) else self.content.nbytes / SHARD_BYTES


class FeatureStore:
    """Arrays by content, in files of one folder that are written once and never changed.

    Args:
        folder: of one model; it need not exist.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._seen: set[str] = set()  # file names
        self._places: dict[str, tuple[str, tuple[str, ...]]] = {}  # key => file name, names of its arrays
        self._opened = functools.lru_cache(OPEN_SHARDS)(self._open)
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Takes notice of the files that were written meanwhile; a broken one is removed, to be made again."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._seen:
                continue
            try:
                metadata = check_safetensors(path)
            except ModelError as error:
                log.warning("%s: %s; its features are computed again", error.what, error.why)
                with disk_errors(path):
                    path.unlink(missing_ok=True)
                continue
            if metadata.get("format") != FORMAT:
                continue
            names = self._opened(path.name).keys()
            parts: dict[str, list[str]] = {}
            for name in names:
                parts.setdefault(name.partition(".")[0], []).append(name.partition(".")[2])
            self._places |= {key: (path.name, tuple(found)) for key, found in parts.items()}
            self._seen.add(path.name)

    def fill(
        self,
        items: Iterable[Item],
        compute: Callable[[list[Item]], Sequence[dict[str, np.ndarray]]],
        batch_size: int = 1,
        done: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Computes and writes the features that are not there, a file at a time.

        Processes that do so at the same time take turns, and use what the others have written.

        Args:
            compute: features of up to `batch_size` items of one shape.
            done: called with each item's name once its features are there.
        """

        def unknown() -> Iterator[Item]:
            for item in items:
                if item.key in self:
                    done(item.name)
                else:
                    yield item

        for shard in _shards(unknown()):
            with conversion_lock(self.folder):
                self._remove_leftovers()
                self.refresh()
                missing = list({item.key: item for item in shard if item.key not in self}.values())
                found: dict[str, dict[str, np.ndarray]] = {}
                for batch in _batches(missing, batch_size):
                    found |= zip((item.key for item in batch), compute(batch), strict=True)
                if found:
                    self._write(found)
            for item in shard:
                done(item.name)

    def read(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of one key, which must be there.

        Raises:
            ModelError: its file was removed meanwhile.
        """
        shard, parts = self._places[key]
        return {part: self._opened(shard).get_tensor(f"{key}.{part}") for part in parts}

    def _open(self, shard: str) -> Any:
        """A file mapped into memory; what is not read of it takes none."""
        path = self.folder / shard
        try:
            return safetensors.safe_open(path, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(str(path), f"was removed or damaged ({error})", "start again; it is made again") from None

    def _remove_leftovers(self) -> None:
        """Removes what a killed process had begun to write; whoever holds the lock is the only one to write."""
        for partial in partials(self.folder):
            with disk_errors(partial):
                partial.unlink(missing_ok=True)

    def _write(self, found: dict[str, dict[str, np.ndarray]]) -> None:
        tensors = [
            TensorSource(f"{key}.{part}", DTYPE_NAMES[array.dtype], array.shape, lambda array=array: array)
            for key, parts in found.items()
            for part, array in parts.items()
        ]
        name = f"{hashlib.sha256(' '.join(found).encode()).hexdigest()[:32]}.safetensors"
        with atomic_file(self.folder / name) as partial:
            write_safetensors(partial, tensors, {"format": FORMAT})
        self.refresh()


def _shards(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items file by file."""
    shard: list[Item] = []
    for item in items:
        shard.append(item)
        if len(shard) == SHARD_ENTRIES or sum(one.share for one in shard) >= 1:
            yield shard
            shard = []
    if shard:
        yield shard


def _batches(items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    """Items of one shape, up to `batch_size` at a time."""
    by_shape = sorted(items, key=lambda item: item.shape)
    for _, group in itertools.groupby(by_shape, key=lambda item: item.shape):
        members = list(group)
        yield from (members[start : start + batch_size] for start in range(0, len(members), batch_size))
