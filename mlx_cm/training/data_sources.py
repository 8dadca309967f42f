"""Where training pictures lie: a folder of images, a `.npz` file, or tar shards. Nothing is decoded here.

    folder      images at any depth; captions in `NAME.txt` beside them or in `metadata.jsonl`; labels there too, or
                from first-level subfolders, one per class
    NAME.npz    `images` or `arr_0`, uint8, (N, H, W) or (N, H, W, C); `labels`, `y` or `arr_1`; `captions`
    NAME.tar    samples of files that share a name, as in WebDataset: `000123.jpg`, `.txt`, `.cls`, `.json`;
                also a folder of such shards

Members of a tar file are read where they lie and never extracted, so that their names can do nothing.
"""

import functools
import io
import json
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from mlx_cm.cache import visible_files
from mlx_cm.errors import ModelError
from mlx_cm.images import open_image

PICTURE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
UNREADABLE_EXTENSIONS = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2"})
METADATA = "metadata.jsonl"
OTHER_METADATA = ("metadata.csv", "metadata.parquet")
CAPTION_KEYS = ("text", "caption", "prompt")
LABEL_KEY = "label"
NPZ_IMAGES, NPZ_LABELS, NPZ_CAPTIONS = ("images", "arr_0"), ("labels", "y", "arr_1"), ("captions",)

MAX_TEXT_BYTES = 1 << 20  # of a caption, or of what is said about one picture
MAX_MEMBER_BYTES = 1 << 29  # of a picture inside a tar file

Label = int | str | None  # as it was found; a name gets its number once all are known


@dataclass(frozen=True)
class Entry:
    """A picture of a data set, not decoded."""

    name: str  # unique within the data set and the same on every machine: relative, with "/" between the parts
    stamp: tuple[int, int]  # size and time of change of the file it lies in, nanoseconds: another one, another picture
    read: Callable[[], Image.Image]  # raises ModelError
    caption: str | None = None
    label: int | None = None
    size: tuple[int, int] | None = None  # (height, width), where known without decoding


@dataclass(frozen=True)
class Container:
    """What a path holds."""

    kind: str  # what it was recognised as, for people
    entries: list[Entry]
    class_names: tuple[str, ...] | None = None  # by label, where classes have names
    faults: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of what cannot be used


def read_container(path: Path, classes: bool | None = None) -> Container:
    """Lists the pictures at a path in a fixed order, with captions and labels.

    Args:
        classes: whether pictures have labels; None: those that say so, and those in two or more first-level
            subfolders with no picture outside of them and no captions.

    Raises:
        ModelError: there is nothing, no such kind of data, or it can be understood in two ways.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, classes)
    if not path.exists():
        raise ModelError(str(path), "does not exist")
    readers = {".npz": _read_npz, ".tar": lambda path, classes: _read_shards({path.name: path}, classes)}
    if path.suffix.lower() not in readers:
        raise ModelError(
            str(path),
            "is no kind of training data",
            "give a folder of images, an .npz file, an uncompressed .tar file or a folder of such files",
        )
    return readers[path.suffix.lower()](path, classes)


# --- a folder of images


def _read_folder(root: Path, classes: bool | None) -> Container:
    files = {file.relative_to(root).as_posix(): file for file in visible_files(root)}
    names = sorted(name for name in files if _extension(name) in PICTURE_EXTENSIONS)
    shards = {name: files[name] for name in sorted(files) if _extension(name) == ".tar"}
    if names and shards:
        raise ModelError(str(root), f"holds images ({names[0]}) and tar files ({next(iter(shards))})", "give one kind")
    if shards:
        return _read_shards(shards, classes)
    metadata = _read_metadata(files, root)
    entries, faults = _stamped(files, names)
    faults += _unreadable(files)
    beside = {entry.name: _caption_beside(files, entry.name) for entry in entries}
    if metadata is None:
        captions, labels = beside, {}
    else:
        captions = {name: row[0] for name, row in metadata.items()}
        labels = {name: row[1] for name, row in metadata.items() if row[1] is not None}
        faults += [(name, f"{METADATA} lists it, but it is missing") for name in sorted(set(metadata) - set(names))]
        twice = next((name for name in beside if beside[name] is not None and captions.get(name) is not None), None)
        if twice is not None:
            raise ModelError(str(root), f"{twice} has a caption beside it and one in {METADATA}", "remove one kind")
    has_captions = any(caption is not None for caption in captions.values())
    in_folders = not labels and _are_classes(root, names, classes, has_captions)
    if in_folders:
        labels = {name: name.partition("/")[0] for name in names}
    entries, class_names = _labelled(root, entries, labels, classes)
    entries = [replace(entry, caption=captions.get(entry.name)) for entry in entries]
    kind = "a folder of images" + (" in class subfolders" if in_folders and class_names else "")
    if has_captions:
        kind += f" with captions in {METADATA}" if metadata is not None else " with captions beside them"
    return Container(kind, entries, class_names, faults)


def _stamped(files: Mapping[str, Path], names: Sequence[str]) -> tuple[list[Entry], list[tuple[str, str]]]:
    entries, faults = [], []
    for name in names:
        try:
            entries.append(Entry(name, _stamp(files[name]), functools.partial(open_image, files[name])))
        except OSError as error:
            faults.append((name, f"cannot be read ({error.strerror or error})"))
    return entries, faults


def _unreadable(files: Mapping[str, Path]) -> list[tuple[str, str]]:
    reason = "is an image of a format that is not read; convert it to PNG or JPEG"
    return [(name, reason) for name in sorted(files) if _extension(name) in UNREADABLE_EXTENSIONS]


def _caption_beside(files: Mapping[str, Path], name: str) -> str | None:
    text = files.get(str(PurePosixPath(name).with_suffix(".txt")))
    return None if text is None else _decode_text(_read_small(text), text)


def _are_classes(root: Path, names: Sequence[str], classes: bool | None, has_captions: bool) -> bool:
    """Whether the first-level subfolders are classes."""
    outside = next((name for name in names if "/" not in name), None)
    if classes is None:
        folders = {name.partition("/")[0] for name in names}
        return outside is None and len(folders) > 1 and not has_captions
    if classes and outside is not None:
        raise ModelError(str(root), f"{outside} lies in no class subfolder and has no label", "move it into one")
    return classes


def _read_metadata(files: Mapping[str, Path], root: Path) -> dict[str, tuple[str | None, Label]] | None:
    """Captions and labels by picture, under the names the files have; None where there is no such file."""
    path = files.get(METADATA)
    below = next((name for name in sorted(files) if name.endswith(f"/{METADATA}")), None)
    if below is not None:
        raise ModelError(str(root), f"has a {METADATA} in a subfolder, {below}", f"give {files[below].parent}")
    if path is None:
        other = next((name for name in OTHER_METADATA if name in files), None)
        if other is not None:
            raise ModelError(str(root / other), "is not read", f"write it as {METADATA}, one JSON object a line")
        return None
    spelled = {unicodedata.normalize("NFC", name): name for name in files}  # macOS takes letters and accents apart
    rows: dict[str, tuple[str | None, Label]] = {}
    for number, line in enumerate(_read_small(path, limit=None).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parse_json(line, where)
        name = row.get("file_name")
        if not isinstance(name, str):
            raise ModelError(where, f"file_name: expected text, got {name!r:.40}")
        name = unicodedata.normalize("NFC", str(PurePosixPath(name)))
        name = spelled.get(name, name)
        if name in rows:
            raise ModelError(where, f"{name} was listed before")
        rows[name] = (_caption_of(row, where), _label_of(row, where))
    return rows


# --- tar shards


@dataclass(frozen=True)
class _Member:
    """A file inside a tar file."""

    path: Path  # of the tar file
    name: str
    offset: int
    size: int

    def read(self, limit: int) -> bytes:
        if self.size > limit:
            raise ModelError(str(self.path / self.name), f"is {self.size} bytes long, at most {limit} are read")
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ModelError(str(self.path), f"cannot be read ({error.strerror or error})") from None
        if len(data) < self.size:
            raise ModelError(str(self.path / self.name), "is truncated")
        return data

    def picture(self) -> Image.Image:
        return open_image(self.path / self.name, io.BytesIO(self.read(MAX_MEMBER_BYTES)))


def _read_shards(shards: Mapping[str, Path], classes: bool | None) -> Container:
    entries, faults, labels = [], [], {}
    for shard, path in shards.items():
        members, fault = _members(path)
        faults += [] if fault is None else [(shard, fault)]
        samples: dict[str, dict[str, _Member]] = {}
        for member in members:
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[f".{extension.lower()}"] = member
        for parts in samples.values():
            pictures = [part for extension, part in parts.items() if extension in PICTURE_EXTENSIONS]
            if len(pictures) > 1:
                raise ModelError(str(path), f"a sample has two pictures, {pictures[0].name} and {pictures[1].name}")
            if pictures:
                name = f"{shard}/{pictures[0].name}"
                caption, labels[name] = _told_of_sample(parts)
                entries.append(Entry(name, _stamp(path), pictures[0].picture, caption))
    repeated = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if repeated:
        raise ModelError(repeated[0], "is there twice")
    labels = {name: label for name, label in labels.items() if label is not None}
    entries, class_names = _labelled(next(iter(shards.values())).parent, entries, labels, classes)
    return Container(f"{len(shards)} tar shard{'s' * (len(shards) > 1)}", entries, class_names, faults)


def _members(path: Path) -> tuple[list[_Member], str | None]:
    """The plain files of a tar file, and what is wrong with it; those before the fault can be read."""
    members: list[_Member] = []
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if info.offset_data + info.size > length:
                    return members, "is truncated or corrupt"
                if info.isreg():
                    members.append(_Member(path, info.name, info.offset_data, info.size))
    except (tarfile.TarError, EOFError, OverflowError, RecursionError, ValueError) as error:
        return members, f"is truncated, corrupt or compressed ({error})"
    except OSError as error:
        return members, f"cannot be read ({error.strerror or error})"
    return members, None


def _told_of_sample(parts: Mapping[str, _Member]) -> tuple[str | None, Label]:
    """Caption and label of a sample; `.txt` and `.cls` come before what `.json` says."""
    caption, label = None, None
    if ".json" in parts and not {".txt", ".cls"} <= parts.keys():
        where = str(parts[".json"].path / parts[".json"].name)
        told = _parse_json(parts[".json"].read(MAX_TEXT_BYTES), where)
        caption = None if ".txt" in parts else _caption_of(told, where)
        label = _label_of(told, where)
    if ".txt" in parts:
        caption = _decode_text(parts[".txt"].read(MAX_TEXT_BYTES), parts[".txt"].path / parts[".txt"].name)
    if ".cls" in parts:
        text = parts[".cls"].read(MAX_TEXT_BYTES).strip()
        if not text.isdigit() or len(text) > 9:
            raise ModelError(str(parts[".cls"].path / parts[".cls"].name), f"expected a whole number, got {text!r:.40}")
        label = int(text)
    return caption, label


# --- .npz


def _read_npz(path: Path, classes: bool | None) -> Container:
    arrays = _load_npz(path)
    images = _only(arrays, NPZ_IMAGES, path)
    if images is None:
        raise ModelError(str(path), f"holds {sorted(arrays)}, expected pictures under one of {', '.join(NPZ_IMAGES)}")
    images = _checked_images(images, path)
    labels, captions = _only(arrays, NPZ_LABELS, path), _only(arrays, NPZ_CAPTIONS, path)
    count, size, stamp = len(images), images.shape[1:3], _stamp(path)
    if labels is not None and (labels.size != count or len(labels) != count or labels.dtype.kind not in "iu"):
        raise ModelError(str(path), f"labels: expected {count} whole numbers, got {labels.dtype} {labels.shape}")
    if captions is not None and (captions.shape != (count,) or captions.dtype.kind != "U"):
        raise ModelError(str(path), f"captions: expected {count} texts, got {captions.dtype} {captions.shape}")
    names = [f"{path.name}/{index}" for index in range(count)]
    texts = [None] * count if captions is None else [_checked_text(text, str(path)) for text in captions.tolist()]
    entries = [
        Entry(name, stamp, functools.partial(Image.fromarray, image), caption, None, size)
        for name, image, caption in zip(names, images, texts, strict=True)
    ]
    numbers = {} if labels is None else dict(zip(names, labels.ravel().tolist(), strict=True))
    entries, _ = _labelled(path, entries, numbers, classes)
    return Container("an .npz file" + (" with captions" if captions is not None else ""), entries)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    known = {*NPZ_IMAGES, *NPZ_LABELS, *NPZ_CAPTIONS}
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip file")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] if name in known else np.empty(0) for name in archive.files}
    except (ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        hint = "save captions as an array of text, dtype U" if "pickle" in str(error) else None
        raise ModelError(str(path), f"is truncated or corrupt, or holds objects ({error})", hint) from None
    except MemoryError:
        raise ModelError(str(path), "does not fit into memory", "split it, or save the pictures as files") from None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from None
    return arrays


def _only(arrays: Mapping[str, np.ndarray], names: Sequence[str], path: Path) -> np.ndarray | None:
    present = [name for name in names if name in arrays]
    if len(present) > 1:
        raise ModelError(str(path), f"holds {' and '.join(present)}, which mean the same", "leave one of them out")
    return arrays[present[0]] if present else None


def _checked_images(images: np.ndarray, path: Path) -> np.ndarray:
    """Pictures as Pillow takes them: (N, H, W), (N, H, W, 3) or (N, H, W, 4)."""
    if images.dtype != np.uint8:
        raise ModelError(
            str(path), f"has pictures of type {images.dtype}, expected uint8", "save whole numbers from 0 to 255"
        )
    if images.ndim not in (3, 4) or 0 in images.shape[1:] or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4)):
        channels_first = images.ndim == 4 and images.shape[1] in (1, 3, 4)
        raise ModelError(
            str(path),
            f"has pictures of shape {images.shape}, expected (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels",
            "save images.transpose(0, 2, 3, 1)" if channels_first else None,
        )
    return images[..., 0] if images.shape[3:] == (1,) else images


# --- captions and labels


def _caption_of(row: Mapping[str, Any], where: str) -> str | None:
    given = [key for key in CAPTION_KEYS if row.get(key) is not None]
    if len(given) > 1:
        raise ModelError(where, f"has {' and '.join(given)}, which all mean the caption", "leave one of them")
    caption = row[given[0]] if given else None
    if not isinstance(caption, str | None):
        raise ModelError(where, f"{given[0]}: expected text, got {caption!r:.40}")
    return None if caption is None else _checked_text(caption, where)


def _checked_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON and NumPy let through
        raise ModelError(where, f"has a caption that is not valid Unicode: {text!r:.40}") from None
    return text.strip()


def _label_of(row: Mapping[str, Any], where: str) -> Label:
    label = row.get(LABEL_KEY)
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ModelError(where, f"{LABEL_KEY}: expected a whole number or a name, got {label!r:.40}")
    return label


def _labelled(
    where: Path, entries: Sequence[Entry], labels: Mapping[str, Label], classes: bool | None
) -> tuple[list[Entry], tuple[str, ...] | None]:
    """Entries with numbers as labels, and the names those stand for; names are numbered in sorted order.

    Raises:
        ModelError: only some have a label, numbers and names are mixed, or a number is negative.
    """
    if classes is False or (not labels and not classes):
        return list(entries), None
    missing = next((entry.name for entry in entries if entry.name not in labels), None)
    if missing is not None:
        raise ModelError(str(where), f"{missing} has no label", "label all pictures, or train without classes")
    kinds = {type(label) for label in labels.values()}
    if len(kinds) > 1:
        raise ModelError(str(where), "has labels that are numbers and labels that are names", "use one kind")
    if kinds == {str}:
        class_names = tuple(sorted(set(labels.values())))
        numbers: Mapping[Any, int] = {name: number for number, name in enumerate(class_names)}
    else:
        class_names, numbers = None, {label: label for label in labels.values()}
    negative = next((label for label in numbers.values() if label < 0), None)
    if negative is not None:
        raise ModelError(str(where), f"has the label {negative}, expected 0 or more")
    return [replace(entry, label=numbers[labels[entry.name]]) for entry in entries], class_names


# --- files


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _read_small(path: Path, limit: int | None = MAX_TEXT_BYTES) -> bytes:
    try:
        if limit is not None and path.stat().st_size > limit:
            raise ModelError(str(path), f"is {path.stat().st_size} bytes long, too much for a caption")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror or error})") from None


def _decode_text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ModelError(str(path), f"is not UTF-8 text ({error})", "save it as UTF-8") from None


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelError(where, f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(where, f"expected a JSON object, got {type(value).__name__}")
    return value
