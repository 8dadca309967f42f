"""`torch.save` before PyTorch 1.6: five pickles, then each storage as an element count and its bytes."""

from typing import Any

from mlx_cm.convert.readers.checkpoint import Checkpoint, MappedFile
from mlx_cm.convert.readers.pickle_data import PickleStream, load_pickle
from mlx_cm.convert.readers.state_dict import find_state_dict
from mlx_cm.convert.readers.torch_tensors import ITEM_SIZES, TORCH_CALLS, Storage, storage_from_id, tensor_source
from mlx_cm.errors import ModelError

MAGIC = 0x1950A86A20F9469CFC6C
FORMAT_VERSION = 1001
# A pickle of protocol 2 or later, or the magic number as protocols 0 and 1 write it.
SIGNATURES = (b"\x80", b"L%dL\n" % MAGIC)

COUNT_BYTES = 8


def is_torch_legacy(file: MappedFile) -> bool:
    """Whether the content begins like a pickle."""
    return file.data[:32].startswith(SIGNATURES)


def read_torch_legacy(file: MappedFile) -> Checkpoint:
    """Reads the pickles of a file that `torch.save` wrote without zip.

    Raises:
        ModelError: no such file, damaged, or asking for anything beyond tensors and data.
    """
    where = str(file.path)
    storages: dict[str, Storage] = {}

    def persistent(saved: Any) -> Storage:
        storage = storage_from_id(saved)
        storages.setdefault(storage.key, storage)
        return storage

    magic, position = _pickle(file, 0)
    if magic != MAGIC:
        why = "is a plain Python pickle, not a checkpoint of torch.save"
        raise ModelError(where, why, "export its weights as .safetensors with the program it comes from")
    version, position = _pickle(file, position)
    system, position = _pickle(file, position)
    if version != FORMAT_VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ModelError(where, "was saved in an unknown version of the format, or with big-endian numbers")
    value, position = _pickle(file, position, persistent=persistent)
    keys, position = _pickle(file, position)
    regions = _regions(file, position, keys, storages)

    found, skipped = find_state_dict(value, where)
    tensors = {name: tensor_source(name, tensor, file, regions, where) for name, tensor in found.items()}
    return Checkpoint((file.path,), tensors, skipped=skipped)


def _pickle(file: MappedFile, position: int, persistent=None) -> tuple[Any, int]:
    stream = PickleStream(file.data, position, len(file))
    return load_pickle(stream, str(file.path), TORCH_CALLS if persistent else None, persistent), stream.tell()


def _regions(file: MappedFile, position: int, keys: Any, storages: dict[str, Storage]) -> dict[str, tuple[int, int]]:
    """Walks the storages, which follow each other without a directory: key => (first byte, bytes)."""
    where = str(file.path)
    if not isinstance(keys, list) or any(not isinstance(key, str) or key not in storages for key in keys):
        raise ModelError(where, "lists storages that no tensor uses")
    regions: dict[str, tuple[int, int]] = {}
    for key in keys:
        start = position + COUNT_BYTES
        count = int.from_bytes(file.data[position:start], "little", signed=True)
        nbytes = count * ITEM_SIZES[storages[key].dtype]
        position = start + nbytes
        if count < 0 or position > len(file) or key in regions:
            why = f"is truncated or corrupt: storage {key!r} of {count} elements does not fit into {len(file)} bytes"
            raise ModelError(where, why, "download the file again")
        regions[key] = (start, nbytes)
    if position != len(file):
        raise ModelError(where, f"is corrupt: {len(file) - position} bytes after the last storage")
    return regions
