"""Files on disk: atomic writing, and safetensors that are checked before a byte of them is trusted.

A file or folder is built under a `.partial` sibling, flushed to the disk and renamed, so that a loader finds either
the old thing, the new thing, or nothing.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from mlx_cm.errors import DiskError, ModelError

# Names of the safetensors format => the NumPy type that holds the same bits. NumPy has no bfloat16 and no float8,
# so those travel as raw bits; whoever computes with them says what they are.
NUMPY_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

PIECE_BYTES = 4 << 20  # written at once

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_DISK_ERRNOS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grows beyond the allowed size",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.EISDIR: "is a folder",
    errno.ENAMETOOLONG: "the name is too long",
}
_LINKLESS_ERRNOS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of FAT, exFAT and some shares


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's write errors into a `DiskError` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            raise
        raise DiskError(str(path), _DISK_ERRNOS[error.errno], "free some space or choose another place") from error


def partial_sibling(path: Path) -> Path:
    """A temporary name beside a file or folder, another one each time."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def partials(folder: Path, of: str | None = None, *, deep: bool = False) -> list[Path]:
    """The temporary siblings in a folder: what is being written there, or was when its process was killed.

    Args:
        of: the name of what they are siblings of; None: of anything.
        deep: whether to look in all folders below too.
    """
    meant = r".+" if of is None else re.escape(of)
    is_partial = re.compile(rf"\.{meant}\.[0-9a-f]{{8}}\.partial", re.DOTALL).fullmatch
    return [path for path in (folder.rglob if deep else folder.glob)(".*.partial") if is_partial(path.name)]


def _fsync_folder(folder: Path) -> None:
    """Flushes the folder's entries, without which a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _sibling_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write, which is gone afterwards unless it was renamed."""
    partial = partial_sibling(path)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _fsync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write; on success it is flushed and takes the place of `path`.

    Raises:
        DiskError: no space, no permission. The sibling is removed and an existing `path` is untouched.
    """
    path = Path(path)
    with _sibling_file(path) as partial:
        yield partial
        _fsync_file(partial)
        partial.replace(path)
        _fsync_folder(path.parent)


def write_under_free_name(path: Path, data: bytes) -> Path:
    """Writes a file as `x.png`, or the first of `x_1.png`, `x_2.png`, ... that nothing has.

    Programs that do so at once take different names.

    Returns:
        The path written.

    Raises:
        DiskError: no space, no permission; nothing half-written is left behind.
    """
    path = Path(path)
    with _sibling_file(path) as partial:
        partial.write_bytes(data)
        _fsync_file(partial)
        for free in _numbered(path):
            with contextlib.suppress(FileExistsError):
                _take_name(partial, free)
                break
        _fsync_folder(path.parent)
    return free


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}")


def _take_name(partial: Path, path: Path) -> None:
    """Gives a whole file a name that nothing has, by a link, since a rename would replace what has it.

    Raises:
        FileExistsError: something has it.
    """
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _LINKLESS_ERRNOS:
            raise
        path.open("xb").close()  # an empty file holds the name meanwhile
        try:
            partial.replace(path)
        finally:
            if partial.exists():
                path.unlink()


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses a target that exists, unless it may be replaced.

    Raises:
        DiskError: `path` exists and `overwrite` is false.
    """
    if os.path.lexists(path) and not overwrite:
        raise DiskError(str(path), "exists already", "choose another name or pass --overwrite")


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder to fill; on success it is renamed to `path`.

    Raises:
        DiskError: `path` exists and `overwrite` is false, or writing fails. Nothing half-written stays behind.
    """
    path = Path(path)
    check_free(path, overwrite)
    partial = partial_sibling(path)
    with disk_errors(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _fsync_file(file)
                else:
                    _fsync_folder(file)
            _fsync_folder(partial)
            _replace_folder(partial, path)
            _fsync_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """A folder cannot be renamed over a full one: the old one steps aside first and comes back if the rename fails."""
    if not os.path.lexists(path):
        new.replace(path)
        return
    aside = partial_sibling(path)
    try:
        path.replace(aside)
        new.replace(path)
    finally:  # an interruption included
        if not os.path.lexists(path):
            aside.replace(path)
        elif aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Writes readable JSON; inside an atomic folder or file."""
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
        ModelError: missing, not JSON, or not an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(str(path), "file is missing") from None
    except (ValueError, RecursionError) as error:
        reason = lfs_pointer_reason(path) or f"not valid JSON ({error})"
        raise ModelError(str(path), reason) from None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise ModelError(str(path), f"expected a JSON object, got {type(value).__name__}")
    return value


def lfs_pointer_reason(path: Path) -> str | None:
    """Says so when a file is git-lfs's text stand-in for a large file that was never downloaded."""
    with Path(path).open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is a git-lfs pointer, not the file itself; run `git lfs pull` or download it from the Hub"
    return None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: what the header needs now, and its bytes when their turn comes."""

    name: str
    dtype: str  # safetensors name, a key of NUMPY_DTYPES
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # holds the same bits in NUMPY_DTYPES[dtype]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_DTYPES[self.dtype].itemsize


def write_safetensors(path: Path, tensors: Iterable[TensorSource], metadata: dict[str, str]) -> str:
    """Writes a safetensors file holding a piece of one tensor in memory at a time.

    The `safetensors` package wants all of them at once, which a 10 GB checkpoint cannot give on a small machine.

    Returns:
        SHA-256 of the file.
    """
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins at a multiple of 8

    digest = hashlib.sha256()
    with Path(path).open("wb") as file:
        for chunk in (len(encoded).to_bytes(8, "little"), encoded):
            file.write(chunk)
            digest.update(chunk)
        for tensor in tensors:
            data = tensor.read()
            if data.nbytes != tensor.nbytes:
                raise ModelError(tensor.name, f"has {data.nbytes} bytes of data where {tensor.nbytes} were announced")
            for piece in contiguous_pieces(data):
                file.write(piece.data)
                digest.update(piece.data)
    return digest.hexdigest()


def contiguous_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in row-major order, some megabytes at a time, so that a view of a mapped file is never copied whole."""
    array = np.atleast_1d(array)
    row = max(array.nbytes // max(len(array), 1), 1)
    rows = max(PIECE_BYTES // row, 1)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows])


def check_safetensors(path: Path) -> dict[str, str]:
    """Validates header, offsets and length of a safetensors file and returns its metadata.

    `mx.load` alone accepts corrupt headers and can read beyond the file, so every file passes here first.

    Raises:
        ModelError: missing, truncated, corrupt, or a git-lfs pointer.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise ModelError(str(path), "file is missing") from None
    except safetensors.SafetensorError as error:
        reason = lfs_pointer_reason(path) or f"is truncated or corrupt ({error})"
        raise ModelError(str(path), reason, "download the file again") from None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from None


def sibling_file(folder: Path, name: str) -> Path:
    """Resolves a file named by an index or a config: a plain name inside `folder`, nothing else.

    Raises:
        ModelError: the name has a path in it, is empty, or is no string.
    """
    if not isinstance(name, str) or name in {"", ".", ".."} or set(name) & set("/\\\0:"):
        raise ModelError(str(folder), f"refers to {name!r}, which is not a plain file name beside it")
    return Path(folder) / name
