"""The cache of converted models: where native folders live, what is there, and who is writing.

    <root>/models/<owner>--<name>/<commit>[-<variant>][+...]/    converted from the Hub
    <root>/local/<name>-<key>[-<variant>][+...]/                 converted from a file or folder of this machine
    <root>/listings/<owner>--<name>/                             which files a commit has, which commit a branch is
    <root>/features/                                             what training computed once of pictures and captions
    <root>/locks/                                                one empty file per model that was ever converted

The root is `$MLX_CM_CACHE`, else `$XDG_CACHE_HOME/mlx-cm`, else `~/.cache/mlx-cm`.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.storage import disk_errors, partial_sibling, partials, read_json

STALE_SECONDS = 3600  # a .partial folder in which nothing was written for this long belongs to no living process

_MODELS, _LOCAL, _LOCKS = "models", "local", "locks"
_KEY_LENGTH = 12  # hexadecimal digits of a commit or of a hash in a folder's name


def cache_root() -> Path:
    """The folder that everything here lives in; it need not exist."""
    if root := os.environ.get("MLX_CM_CACHE"):
        return Path(root).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "mlx-cm"


def repo_folder(repo_id: str) -> str:
    """`owner/name` as one folder name. The Hub allows no `--` in an id, so no two ids meet."""
    return repo_id.replace("/", "--")


def hub_entry(repo_id: str, revision: str, variant: str | None = None) -> Path:
    """Where a model of the Hub is converted to.

    Args:
        revision: the commit's SHA, not a branch.
        variant: of the weights, such as "fp16".

    Raises:
        UsageError: an argument that is no plain name.
    """
    for what, text, pattern in (
        ("repository", repo_id, r"\w[\w.-]*(/\w[\w.-]*)?"),
        ("revision", revision, r"[0-9a-f]{12,64}"),
        ("variant", variant or "none", r"\w+"),
    ):
        if not re.fullmatch(pattern, text, re.ASCII) or ".." in text:
            raise UsageError(f"{what} {text!r}", "cannot name a folder of the cache")
    name = revision[:_KEY_LENGTH] + (f"-{variant}" if variant else "")
    return cache_root() / _MODELS / repo_folder(repo_id) / name


def local_entry(path: Path, variant: str | None = None) -> Path:
    """Where a file or folder of this machine is converted to.

    The name depends on the real path and on the size and time of change of every file that is not hidden, so a
    source that changed is converted again.

    Args:
        variant: of the weights, such as "fp16".

    Raises:
        ModelError: `path` does not exist or a file of it cannot be read.
    """
    source = Path(path)
    try:
        source = source.resolve(strict=True)
        files = [source] if source.is_file() else sorted(visible_files(source))
        stats = [(str(file.relative_to(source)), file.stat()) for file in files]
    except FileNotFoundError as error:
        raise ModelError(str(path), f"{error.filename or path} does not exist") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise ModelError(str(path), f"cannot be read ({error})") from None
    facts = [str(source), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    key = hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()[:_KEY_LENGTH]
    name = re.sub(r"[^\w.-]+", "_", source.stem if source.is_file() else source.name).strip(".")[:80]
    return cache_root() / _LOCAL / (f"{name or 'model'}-{key}" + (f"-{variant}" if variant else ""))


def visible_files(folder: Path) -> Iterator[Path]:
    """All files below `folder`, links followed, without the hidden ones, which file managers write as they please."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place) / name for name in files if not name.startswith("."))


@dataclass(frozen=True)
class Entry:
    """A converted model in the cache. What its `model_index.json` does not say is None."""

    path: Path
    source: str | None  # "owner/name", or the name of a local file or folder
    revision: str | None  # commit SHA on the Hub
    family: str | None
    size_bytes: int
    created: float  # seconds since the epoch


def entries() -> list[Entry]:
    """All finished models in the cache, by path. Folders that are still being written are not among them."""
    root = cache_root()
    folders = [*root.glob(f"{_MODELS}/*/*"), *root.glob(f"{_LOCAL}/*")]
    return [_read_entry(folder) for folder in sorted(folders) if folder.is_dir() and not folder.name.startswith(".")]


def _read_entry(folder: Path) -> Entry:
    """Reads what is there: a model that cannot be read any more must still be listed, or nobody could remove it."""
    index: dict = {}
    with contextlib.suppress(ModelError):
        index = read_json(folder / "model_index.json")
    provenance = index.get("provenance")
    facts = provenance if isinstance(provenance, dict) else {}
    source, revision, family = (
        value if isinstance(value := facts.get(key), str) else None for key in ("source", "revision", "family")
    )
    if source is None and folder.parent.parent.name == _MODELS:
        source = folder.parent.name.replace("--", "/")
    return Entry(folder, source, revision, family, _size_of(folder), folder.stat().st_mtime)


def _size_of(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())


def find(ref: str) -> list[Entry]:
    """The entries that `ref` means.

    Args:
        ref: "owner/name" (every revision of it), "owner/name@REVISION" with the beginning of a commit SHA, the path of
            an entry, or the path of a local model, which means what it was converted to as it is now.
    """
    source, _, revision = ref.partition("@")
    path, local = Path(ref).expanduser().absolute(), None
    with contextlib.suppress(ModelError):
        local = local_entry(path)

    def is_meant(entry: Entry) -> bool:
        if entry.path == path:
            return True
        if local and entry.path.parent == local.parent and entry.path.name.startswith(local.name):
            return True  # the name ends in a hash; behind it stand variants
        return entry.source == source and (entry.revision or entry.path.name).startswith(revision)

    return [entry for entry in entries() if is_meant(entry)]


def remove(entry: Entry) -> int:
    """Removes a model from the cache, and what interrupted conversions left behind.

    The folder steps aside in one rename before anything is deleted: another process finds all of it or nothing.

    Returns:
        Freed bytes.

    Raises:
        UsageError: the entry does not lie in the cache.
        DiskError: no permission.
    """
    root = cache_root()
    if not {root / _MODELS, root / _LOCAL} & set(entry.path.parents) or ".." in entry.path.parts:
        raise UsageError(str(entry.path), f"lies outside of the cache at {root}")
    freed = 0
    with conversion_lock(entry.path), disk_errors(entry.path):
        if entry.path.exists():
            entry.path.rename(partial_sibling(entry.path))
        freed += remove_leftovers(entry.path)
    return freed + remove_stale()


def remove_leftovers(entry: Path) -> int:
    """Removes what interrupted conversions to `entry` left behind; only for whoever holds its `conversion_lock`.

    Returns:
        Freed bytes.
    """
    return sum(_delete(path) for path in partials(entry.parent, entry.name))


def remove_stale() -> int:
    """Removes `.partial` folders in which nothing was written for an hour.

    Returns:
        Freed bytes.
    """
    root, freed = cache_root(), 0
    places = [root / _LOCAL, *root.glob(f"{_MODELS}/*")]
    for partial in [partial for place in places for partial in partials(place)]:
        with contextlib.suppress(FileNotFoundError):  # its writer finished, or another process cleans up too
            last_write = max(file.lstat().st_mtime for file in [partial, *partial.rglob("*")])
            if time.time() - last_write > STALE_SECONDS:
                freed += _delete(partial)
    return freed


def _delete(folder: Path) -> int:
    size = _size_of(folder)
    with disk_errors(folder):
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # the repository's folder, once its last revision is gone
        folder.parent.rmdir()
    return size


@contextlib.contextmanager
def conversion_lock(entry: Path) -> Iterator[None]:
    """Holds the right to write `entry`, waiting while another process has it.

    Whoever waited looks first whether the entry exists now. The lock ends with its process, however that ends.

    Raises:
        DiskError: the cache cannot be written.
    """
    key = hashlib.sha256(os.path.realpath(entry).encode("utf-8", "surrogateescape")).hexdigest()
    # Lock files are never deleted: a process that waits on a deleted one and a process that makes it anew would both
    # hold the lock.
    lock = cache_root() / _LOCKS / f"{key[:32]}.lock"
    with contextlib.ExitStack() as stack:
        with disk_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(lock))
        yield
