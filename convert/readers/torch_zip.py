"""`torch.save` since PyTorch 1.6: a zip archive with one pickle and one uncompressed entry per storage.

The archive is read here, and more strictly than by a general reader: every entry has to be uncompressed, lie where
the directory says, and overlap nothing, so that tensors can be views of the file and no size has to be believed.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise

from mlx_cm.convert.readers.checkpoint import Checkpoint, MappedFile
from mlx_cm.convert.readers.pickle_data import PickleStream, load_pickle
from mlx_cm.convert.readers.state_dict import find_state_dict
from mlx_cm.convert.readers.torch_tensors import TORCH_CALLS, storage_from_id, tensor_source
from mlx_cm.errors import ModelError

SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")

# signature, disk, disk of the directory, entries on disk, entries, directory size, directory offset, comment length
END = struct.Struct("<4s4H2LH")
# signature, disk, offset of END64, disks
LOCATOR64 = struct.Struct("<4sLQL")
# signature, size, version made by, version needed, disk, disk of the directory, entries on disk, entries, size, offset
END64 = struct.Struct("<4sQ2H2L4Q")
# signature, version made by, version needed, flags, method, time, date, crc, packed size, size, name length,
# extra length, comment length, disk, internal attributes, external attributes, header offset
CENTRAL = struct.Struct("<4s6H3L5H2L")
# signature, version needed, flags, method, time, date, crc, packed size, size, name length, extra length
LOCAL = struct.Struct("<4s5H3L2H")

LONGEST_COMMENT = 0xFFFF
MOST_ENTRIES = 100_000
LONGEST_NAME = 512
IN_EXTRA = 0xFFFFFFFF  # the number is in the zip64 field
ZIP64_FIELD = 1
STORED = 0  # the method without compression
ENCRYPTED_FLAGS = 0x2041
SIZES_AFTER_DATA_FLAG = 0x8


@dataclass(frozen=True)
class Entry:
    """One file of the archive, as bytes of the archive's file."""

    name: str
    header: int
    start: int
    size: int
    compressed: bool


def is_torch_zip(file: MappedFile) -> bool:
    """Whether the content begins like a zip archive."""
    return file.data[:4] in SIGNATURES


def read_torch_zip(file: MappedFile) -> Checkpoint:
    """Reads directory and pickle of an archive made by `torch.save`.

    Raises:
        ModelError: no such archive, damaged, or asking for anything beyond tensors and data.
    """
    where = str(file.path)
    try:
        entries = {entry.name: entry for entry in _entries(file)}
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise ModelError(where, f"is a truncated or corrupt zip archive ({error})", "download the file again") from None

    pickles = [name for name in entries if name.partition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ModelError(where, f"is a zip archive with {len(pickles)} data.pkl entries, where torch.save writes one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise ModelError(where, "is a TorchScript program, not a checkpoint", "save the model's state_dict()")
    compressed = sorted(name for name, entry in entries.items() if entry.compressed)
    if compressed:
        why = f"has compressed entries, which torch.save never writes, such as {compressed[0]!r}"
        raise ModelError(where, why, "load and save it again with torch, or use a .safetensors file")
    order = entries.get(f"{root}byteorder")
    if order and file.data[order.start : order.start + min(order.size, 16)] != b"little":
        raise ModelError(where, "was saved with another byte order than little-endian")

    pickle = entries[pickles[0]]
    stream = PickleStream(file.data, pickle.start, pickle.start + pickle.size)
    value = load_pickle(stream, where, TORCH_CALLS, storage_from_id)
    if stream.tell() != stream.end:
        raise ModelError(where, f"is corrupt: {stream.end - stream.tell()} bytes after its pickle")
    found, skipped = find_state_dict(value, where)
    prefix = f"{root}data/"
    regions = {
        name.removeprefix(prefix): (entry.start, entry.size)
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    tensors = {name: tensor_source(name, tensor, file, regions, where) for name, tensor in found.items()}
    return Checkpoint((file.path,), tensors, skipped=skipped)


def _entries(file: MappedFile) -> list[Entry]:
    """All entries, checked against their local headers and each other."""
    position, size, count = _directory(file)
    end = position + size
    if count > MOST_ENTRIES:
        raise ValueError(f"{count} entries")
    entries = []
    for _ in range(count):
        entry, position = _entry(file, position, end)
        entries.append(entry)
    if position != end:
        raise ValueError("the directory is longer than its entries")
    if len({entry.name for entry in entries}) < count:
        raise ValueError("two entries have one name")
    entries.sort(key=lambda entry: entry.header)
    for entry, following in pairwise(entries):
        if entry.start + entry.size > following.header:
            raise ValueError(f"entries {entry.name!r} and {following.name!r} overlap")
    if entries and entries[-1].start + entries[-1].size > end - size:
        raise ValueError(f"entry {entries[-1].name!r} overlaps the directory")
    return entries


def _directory(file: MappedFile) -> tuple[int, int, int]:
    """Position, size and entry count of the directory, which ends where the end records begin."""
    at = file.data.rfind(b"PK\x05\x06", max(0, len(file) - END.size - LONGEST_COMMENT))
    if at < 0:
        raise ValueError("the end of the directory is missing")
    _, disk, first_disk, on_disk, count, size, position, comment = END.unpack_from(file.data, at)
    if at + END.size + comment != len(file):
        raise ValueError("bytes after the end")
    disks = (disk, first_disk)

    locator = at - LOCATOR64.size
    if locator >= END64.size and file.data[locator : locator + 4] == b"PK\x06\x07":
        at = locator - END64.size  # torch writes this record for small files, too
        _, _, claimed, _ = LOCATOR64.unpack_from(file.data, locator)
        signature, _, _, _, *disks, on_disk, count, size, position = END64.unpack_from(file.data, at)
        if signature != b"PK\x06\x06" or claimed != at:
            raise ValueError("the zip64 end record is not where it should be")
    if any(disks) or on_disk != count:
        raise ValueError("a part of an archive in several files")
    if position + size != at:
        raise ValueError("the directory does not end where it should")
    return position, size, count


def _entry(file: MappedFile, position: int, end: int) -> tuple[Entry, int]:
    """The directory entry at `position`, and where the next one is."""
    if position + CENTRAL.size > end:
        raise ValueError("the directory is shorter than its entries")
    record = CENTRAL.unpack_from(file.data, position)
    signature, flags, method, packed, size = record[0], record[3], record[4], record[8], record[9]
    name_length, extra_length, comment_length, disk, header = *record[10:14], record[16]
    position += CENTRAL.size
    following = position + name_length + extra_length + comment_length
    if signature != b"PK\x01\x02" or name_length > LONGEST_NAME:
        raise ValueError("a damaged directory entry")
    raw_name = file.data[position : position + name_length]
    name = raw_name.decode("utf-8")
    extra = file.data[position + name_length : position + name_length + extra_length]
    size, packed, header = _wide_numbers(extra, [size, packed, header])
    if disk or flags & ENCRYPTED_FLAGS:
        raise ValueError(f"entry {name!r} is encrypted or in another file")
    if method == STORED and packed != size:
        raise ValueError(f"entry {name!r} has two sizes")
    start = _data_start(file, header, raw_name, (flags, method), packed)
    return Entry(name, header, start, packed, method != STORED), following


def _wide_numbers(extra: bytes, numbers: list[int]) -> list[int]:
    """Takes from the zip64 field, in order, the numbers that do not fit into 32 bits."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == ZIP64_FIELD:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    needed = numbers.count(IN_EXTRA)
    values = iter(struct.unpack_from(f"<{needed}Q", wide))
    return [next(values) if number == IN_EXTRA else number for number in numbers]


def _data_start(file: MappedFile, header: int, raw_name: bytes, kind: tuple[int, int], packed: int) -> int:
    """Where an entry's data begins; its local header must tell the same story as the directory."""
    if header + LOCAL.size > len(file):
        raise ValueError(f"entry {raw_name!r} begins beyond the file")
    signature, _, *local_kind, _, _, _, local_packed, _, name_length, extra_length = LOCAL.unpack_from(
        file.data, header
    )
    at_name = header + LOCAL.size
    sizes = {packed, IN_EXTRA} | ({0} if kind[0] & SIZES_AFTER_DATA_FLAG else set())
    if (
        signature != b"PK\x03\x04"
        or tuple(local_kind) != kind
        or local_packed not in sizes
        or file.data[at_name : at_name + name_length] != raw_name
    ):
        raise ValueError(f"entry {raw_name!r} does not match its local header")
    return at_name + name_length + extra_length
