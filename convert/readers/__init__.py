"""Reads foreign checkpoint files: safetensors, and what `torch.save` writes, which is a pickle and is read as data.

Without torch, and without importing or executing anything that a file names. Tensors stay in the file until they are
read, one at a time.
"""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_cm.convert.readers.checkpoint import Checkpoint, MappedFile
from mlx_cm.convert.readers.safetensors_file import is_safetensors, read_safetensors
from mlx_cm.convert.readers.torch_legacy import is_torch_legacy, read_torch_legacy
from mlx_cm.convert.readers.torch_zip import is_torch_zip, read_torch_zip
from mlx_cm.convert.readers.weight_files import choose_weight_files, read_weight_index, variant_of
from mlx_cm.errors import ModelError
from mlx_cm.storage import lfs_pointer_reason

__all__ = ["Checkpoint", "choose_weight_files", "open_checkpoint", "read_weight_index", "variant_of"]

logger = logging.getLogger("mlx_cm")

# Safetensors come first: the length of a header may begin with the bytes of the other signatures.
CONTAINERS: tuple[tuple[Callable[[MappedFile], bool], Callable[[MappedFile], Checkpoint]], ...] = (
    (is_safetensors, read_safetensors),
    (is_torch_zip, read_torch_zip),
    (is_torch_legacy, read_torch_legacy),
)

# Beginnings of files that people take for checkpoints.
OTHER_FILES = (
    (b"<", "is a web page, probably an error message that was saved in place of the file"),
    (b"{", "is JSON, not a weight file"),
    (b"GGUF", "is a GGUF file, which is not supported"),
    (b"\x89HDF", "is an HDF5 file, which is not supported"),
)
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257

LISTED = 10


def open_checkpoint(path: Path, *, variant: str | None = None) -> Checkpoint:
    """Opens a weight file, an index of shards, or a component folder. A file is known by its content, not its name.

    Args:
        path: the file or folder.
        variant: which of a folder's sets of weights to take, "fp16" and the like. Where the folder lacks it, the
            plain files are taken with a warning.

    Raises:
        ModelError: missing, damaged, unknown, inconsistent, or asking for anything beyond data.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a parent folder may not be searched
        path = _choose(path, variant)
    return _open_shards(path) if path.suffix == ".json" else _open_file(path)


def _choose(folder: Path, variant: str | None) -> Path:
    names = _file_names(folder)
    chosen = choose_weight_files(names, variant)
    if not chosen:
        why = f"has no weight files; it holds {', '.join(sorted(names)[:LISTED]) or 'nothing'}"
        raise ModelError(str(folder), why, "name the weight file itself if it has an unusual name")
    if variant_of(chosen[0]) != variant:
        logger.warning("%s: has no %s weights, reads %s", folder, variant or "plain", chosen[0])
    return folder / chosen[0]


def _file_names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir() if entry.is_file()}
    except OSError as error:
        raise ModelError(str(folder), f"cannot be read ({error.strerror or error})") from None


def _open_file(path: Path) -> Checkpoint:
    file = MappedFile(path)
    for recognises, read in CONTAINERS:
        if recognises(file):
            return read(file)
    raise ModelError(str(path), lfs_pointer_reason(path) or _unknown(file))


def _unknown(file: MappedFile) -> str:
    if file.data[TAR_MAGIC_AT : TAR_MAGIC_AT + len(TAR_MAGIC)] == TAR_MAGIC:
        return "is a tar archive; checkpoints of PyTorch 0.1 have to be saved again with a later version"
    for beginning, why in OTHER_FILES:
        if file.data[: len(beginning)] == beginning:
            return why
    return f"is neither safetensors nor a checkpoint of torch.save; it begins with {file.data[:8]!r}"


def _open_shards(index: Path) -> Checkpoint:
    """Opens every shard and holds the index and the shards against each other."""
    shards = read_weight_index(index)
    missing = sorted(shards.keys() - _file_names(index.parent))
    if missing:
        why = f"{len(missing)} of {len(shards)} shards are missing: {_listed(missing)}"
        raise ModelError(str(index), why, "download the missing files")
    merged = Checkpoint((), {})
    for name, listed in shards.items():
        shard = _open_file(index.parent / name)
        _compare(index, name, "lacks, though the index lists them", set(listed) - shard.tensors.keys())
        _compare(index, name, "holds, though the index does not list them", shard.tensors.keys() - set(listed))
        merged = Checkpoint(
            merged.files + shard.files,
            merged.tensors | shard.tensors,
            merged.metadata | shard.metadata,
            merged.skipped | shard.skipped,
        )
    return merged


def _compare(index: Path, shard: str, what: str, names: set[str]) -> None:
    if names:
        raise ModelError(str(index), f"shard {shard!r} {what}: {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:LISTED]))
