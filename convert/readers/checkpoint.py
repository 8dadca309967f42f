"""What every container reader returns, and the file it reads from."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_cm.errors import ModelError
from mlx_cm.storage import NUMPY_DTYPES, TensorSource


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one component, none of them read yet."""

    files: tuple[Path, ...]  # weight files, in the order they were read
    tensors: dict[str, TensorSource]
    metadata: dict[str, str] = field(default_factory=dict)  # safetensors `__metadata__`
    skipped: dict[str, str] = field(default_factory=dict)  # entries passed over: name => what they were


class MappedFile:
    """A file's bytes, mapped read-only: one mapping, however many tensors point into it.

    Raises:
        ModelError: missing, empty, not a regular file, or unreadable.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            # A pipe or a device would block or never end.
            if not self.path.is_file():
                raise ModelError(str(path), "is not a file" if self.path.exists() else "file is missing")
            with self.path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ModelError(str(path), "is empty", "download the file again") from None
        except OSError as error:
            raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from None

    def __len__(self) -> int:
        return len(self.data)

    def tensor(
        self, name: str, dtype: str, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None = None
    ) -> TensorSource:
        """A tensor whose bytes stay in the file until it is read, and are shared with it then.

        Args:
            name: the tensor's name.
            dtype: safetensors name, a key of `NUMPY_DTYPES`.
            shape: sizes.
            offset: where the first element begins, in bytes.
            strides: in bytes; row-major order without it.
        """
        return TensorSource(name, dtype, shape, self._reader(NUMPY_DTYPES[dtype], shape, offset, strides))

    def _reader(self, dtype: np.dtype, shape: tuple[int, ...], offset: int, strides) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if 0 in shape:
                return np.empty(shape, dtype)
            # NumPy checks offset, shape and strides against the buffer once more.
            return np.ndarray(shape, dtype, self.data, offset, strides)

        return read
