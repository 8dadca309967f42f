"""Safetensors: an 8-byte length, a JSON header, and the tensors' bytes."""

import json

from mlx_cm.convert.readers.checkpoint import Checkpoint, MappedFile
from mlx_cm.errors import ModelError
from mlx_cm.storage import NUMPY_DTYPES, check_safetensors

# The format allows 100 MB, which a hostile file turns into gigabytes of Python objects. The headers of the largest
# published models stay below 1 MB; training notes in the metadata can add a few.
LARGEST_HEADER = 32 << 20


def is_safetensors(file: MappedFile) -> bool:
    """Whether the content begins like a safetensors file; a truncated one does, too."""
    return file.data[8:9] == b"{"


def read_safetensors(file: MappedFile) -> Checkpoint:
    """Reads the header of a safetensors file.

    Raises:
        ModelError: truncated, corrupt, or a tensor of a type that has no place here.
    """
    length = int.from_bytes(file.data[:8], "little")
    if length > LARGEST_HEADER:
        why = f"its header claims {length} bytes, where {min(LARGEST_HEADER, len(file) - 8)} are possible"
        raise ModelError(str(file.path), why, "download the file again")
    metadata = check_safetensors(file.path)

    start = 8 + length
    header = json.loads(file.data[8:start])
    header.pop("__metadata__", None)
    unsupported = sorted({entry["dtype"] for entry in header.values()} - NUMPY_DTYPES.keys())
    if unsupported:
        names = sorted(name for name, entry in header.items() if entry["dtype"] in unsupported)
        why = f"tensors of type {', '.join(unsupported)} are not supported: {', '.join(map(repr, names[:10]))}"
        raise ModelError(str(file.path), why)
    tensors = {
        name: file.tensor(name, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return Checkpoint((file.path,), tensors, metadata)
