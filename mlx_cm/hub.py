"""Models from the Hugging Face Hub; the only module that opens a connection.

Files land in the cache of `huggingface_hub`, which other programs share, and `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE` mean what they mean there. Added to what that library does: only the files a model needs are fetched,
an interrupted download continues where it stopped even after the process is gone, no file enters the cache whose
content differs from what the Hub announced, and offline a model is either complete or the missing files are named.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import (
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from mlx_cm.cache import cache_root, repo_folder
from mlx_cm.errors import DiskError, MlxCmError, ModelError, NetworkError, UsageError
from mlx_cm.storage import atomic_file, disk_errors, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_WAITS = (1.0, 3.0)  # seconds before the second and the third try of a request that the server failed
README_LIMIT = 1_000_000  # bytes; the model card tells the base model, but some cards carry pictures

_DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_REPO_PART = re.compile(r"\w([\w.-]{0,94}\w)?", re.ASCII)
_RESERVED_OWNERS = {"api", "datasets", "models", "spaces"}

# huggingface_hub passes on the errors of its HTTP library, which is requests, httpx or httpx2 by its version. They are
# `OSError`s in the first, and descend from the base class of the Hub's own errors in the others.
_TRANSPORT_ERRORS = (OSError, *HfHubHTTPError.__bases__)
_BROKEN_CONNECTION = {"ReadError", "RemoteProtocolError", "ChunkedEncodingError"}


# ---- references ----


@dataclass(frozen=True)
class HubRef:
    """A repository on the Hub, and the branch, tag or commit meant; None is the default branch."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def parse_ref(text: str) -> HubRef | None:
    """Reads "owner/name" or "owner/name@revision"; None when it cannot be the name of a repository on the Hub."""
    repo_id, at, revision = text.partition("@")
    owner, _, name = repo_id.partition("/")
    if not (_REPO_PART.fullmatch(owner) and _REPO_PART.fullmatch(name)) or owner in _RESERVED_OWNERS:
        return None
    if "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or revision.endswith((".", ".lock"))):
        return None
    return HubRef(repo_id, revision or None)


# ---- what a repository holds ----


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository."""

    name: str  # with "/" between folders
    size: int | None = None  # bytes
    digest: str | None = None  # SHA-256 of the content of a large (LFS) file, git's SHA-1 of any other


@dataclass(frozen=True)
class Listing:
    """The files of one commit."""

    repo_id: str
    revision: str  # commit SHA
    files: tuple[RepoFile, ...]


@dataclass(frozen=True)
class Snapshot:
    """A commit on the disk: `path` holds at least `files`, as the repository names them."""

    path: Path
    repo_id: str
    revision: str  # commit SHA
    files: tuple[str, ...]


Progress = Callable[[int, int, str], None]  # (bytes that are there, bytes in all, file on its way)


def list_files(ref: HubRef) -> Listing:
    """Resolves the revision to a commit and lists its files, from the cache where the Hub cannot be reached.

    Raises:
        NetworkError: unknown, private or gated repository, unknown revision, no connection and nothing in the cache.
        ModelError: the repository lists a file that would leave its folder.
    """
    return _list(ref)[0]


def _list(ref: HubRef) -> tuple[Listing, NetworkError | None]:
    """The listing, and why the Hub could not be asked where it comes from the cache."""
    commit = ref.revision if _COMMIT.fullmatch(ref.revision or "") else None
    offline = None
    if constants.HF_HUB_OFFLINE:
        offline = NetworkError(str(ref), "is not in the cache and offline mode is on", "unset HF_HUB_OFFLINE")
    if commit and (listing := _recall(ref.repo_id, commit)):
        return listing, offline  # a commit never changes: nothing to ask for
    if offline is None:
        try:
            return _ask(ref), None
        except NetworkError as error:
            if not _hub_is_down(error):
                raise
            offline = error
    commit = commit or _cached_commit(ref)
    listing = commit and (_recall(ref.repo_id, commit) or _what_is_there(ref.repo_id, commit))
    if not listing:
        raise offline
    return listing, offline


def _ask(ref: HubRef) -> Listing:
    """One request to the Hub's API."""
    timeout = constants.HF_HUB_ETAG_TIMEOUT  # without one the library would wait for ever
    try:
        with _hub_errors(ref, ref.repo_id):
            info = _patiently(
                lambda: HfApi().model_info(ref.repo_id, revision=ref.revision, files_metadata=True, timeout=timeout)
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a login page, or JSON of another service
        raise _not_the_hub(ref.repo_id) from error
    if not _COMMIT.fullmatch(info.sha or "") or info.siblings is None:
        raise _not_the_hub(ref.repo_id)
    files = tuple(_repo_file(ref.repo_id, sibling) for sibling in info.siblings)
    return Listing(ref.repo_id, info.sha, files)


def _repo_file(repo_id: str, sibling: Any) -> RepoFile:
    name = _safe_name(repo_id, sibling.rfilename)
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return RepoFile(name, sibling.size, digest if _DIGEST.fullmatch(digest or "") else None)


def _safe_name(repo_id: str, name: Any) -> str:
    """Refuses names that lead out of the repository's folder on any system.

    Raises:
        ModelError: absolute, with a drive, a backslash, a NUL, or a `.` or `..` between slashes.
    """
    plain = isinstance(name, str) and not set(name) & set("\\\0")
    if not plain or set(name.split("/")) & {"", ".", ".."} or PureWindowsPath(name).drive:
        raise ModelError(repo_id, f"lists a file named {name!r}, which is not a plain path inside the repository")
    return name


# ---- the cache ----


def _storage(repo_id: str) -> Path:
    """The folder huggingface_hub keeps a model in: blobs by digest, snapshots by commit, refs by branch."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _snapshot(listing: Listing) -> Path:
    return _storage(listing.repo_id) / "snapshots" / listing.revision


def _cached_commit(ref: HubRef) -> str | None:
    """The commit that a branch or tag meant when it was last downloaded."""
    return next(filter(None, map(_read_commit, _ref_paths(ref))), None)


def _read_commit(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        text = path.read_text().strip()
        return text if _COMMIT.fullmatch(text) else None
    return None


def _ref_paths(ref: HubRef) -> list[Path]:
    """Where it is written what a branch means: for every program, and for a model whose download was removed."""
    folders = (_storage(ref.repo_id), _listing_folder(ref.repo_id))
    return [folder / "refs" / (ref.revision or _DEFAULT_REVISION) for folder in folders]


def _remember(ref: HubRef, listing: Listing) -> None:
    """Keeps the listing, and what the branch means; a cache that cannot be written costs only offline use."""
    with contextlib.suppress(OSError, DiskError):
        if _recall(listing.repo_id, listing.revision) != listing:
            with atomic_file(_listing_path(listing.repo_id, listing.revision)) as partial:
                write_json(partial, asdict(listing))
        for path in _ref_paths(ref):
            if listing.revision not in (ref.revision, _read_commit(path)):
                with atomic_file(path) as partial:
                    partial.write_text(listing.revision)


def _recall(repo_id: str, commit: str) -> Listing | None:
    """The listing of a commit that was downloaded before."""
    with contextlib.suppress(ModelError, KeyError, TypeError):
        files = read_json(_listing_path(repo_id, commit))["files"]
        return Listing(repo_id, commit, tuple(RepoFile(**file) for file in files))
    return None


def _listing_path(repo_id: str, commit: str) -> Path:
    return _listing_folder(repo_id) / f"{commit}.json"


def _listing_folder(repo_id: str) -> Path:
    return cache_root() / "listings" / repo_folder(repo_id)


def _what_is_there(repo_id: str, commit: str) -> Listing | None:
    """A snapshot that another program downloaded, whose files on the disk stand in for the listing."""
    folder = _storage(repo_id) / "snapshots" / commit
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Listing(repo_id, commit, tuple(RepoFile(name) for name in names)) if names else None


# ---- download ----


def download(
    ref: HubRef,
    *,
    choose: Callable[[list[RepoFile]], list[str]],
    progress: Progress | None = None,
    made: Callable[[Snapshot], bool] | None = None,
) -> Snapshot:
    """Brings the needed files of a repository onto the disk, all from one commit.

    What is in the cache is not fetched again; when all of it is, the Hub is asked one question (which commit is it?),
    and none when `ref` names a commit.

    Args:
        choose: names of the wanted files among those of the repository, such as `choose_files` gives.
        progress: is told how far it is, before, during and after each file.
        made: whether what the files are wanted for is there already; then none is fetched, even if none is left.

    Raises:
        NetworkError: the Hub cannot be reached or refuses, or a file does not arrive whole.
        ModelError: nothing to choose, or a file whose content is not the announced one.
        DiskError: not enough space.
    """
    listing, unreachable = _list(ref)
    wanted = _wanted(listing, choose)
    snapshot = Snapshot(_snapshot(listing), listing.repo_id, listing.revision, tuple(file.name for file in wanted))
    there = made is not None and made(snapshot)
    missing = [file for file in wanted if not there and not _is_cached(listing, file)]
    if missing and unreachable:
        raise _incomplete(ref, missing, unreachable)
    if unreachable and not constants.HF_HUB_OFFLINE:
        logger.warning("%s: %s; using the copy in the cache (commit %.12s)", ref, unreachable.why, listing.revision)
    if missing:
        _check_space(listing.repo_id, missing)
        with _no_library_bars():
            _fetch_all(listing, missing, progress or (lambda done, total, name: None))
    if not unreachable:
        _remember(ref, listing)
    return snapshot


def _wanted(listing: Listing, choose: Callable[[list[RepoFile]], list[str]]) -> list[RepoFile]:
    by_name = {file.name: file for file in listing.files}
    names = choose(list(listing.files))
    if not names:
        candidates = [name for name in by_name if name.endswith(_SINGLE_FORMATS)]
        found = f"its weight files are {', '.join(sorted(candidates)[:10])}" if candidates else "it has no weight file"
        raise ModelError(listing.repo_id, f"holds nothing that is plainly one model; {found}")
    if unknown := [name for name in names if name not in by_name]:
        raise ModelError(listing.repo_id, f"has no file {', '.join(unknown)} at commit {listing.revision[:12]}")
    return [by_name[name] for name in dict.fromkeys(names)]


def _is_cached(listing: Listing, file: RepoFile) -> bool:
    """Whether the file is there with its full length; a shorter one was damaged by something else."""
    path = try_to_load_from_cache(listing.repo_id, file.name, revision=listing.revision)
    return isinstance(path, str) and file.size in (None, Path(path).stat().st_size)


def _discard(path: Path) -> None:
    """Removes a file of a snapshot, and the blob it is a link to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _incomplete(ref: HubRef, missing: list[RepoFile], unreachable: NetworkError) -> NetworkError:
    largest = sorted(missing, key=lambda file: -(file.size or 0))
    names = ", ".join(file.name for file in largest[:5])
    if len(missing) > 5:
        names += f" and {len(missing) - 5} more"
    if constants.HF_HUB_OFFLINE:
        return NetworkError(str(ref), f"{names}: not in the cache and offline mode is on", unreachable.hint)
    return NetworkError(str(ref), f"{unreachable.why}; not in the cache: {names}", unreachable.hint)


def _check_space(repo_id: str, missing: list[RepoFile]) -> None:
    """Refuses before the first byte what would fail at the last.

    Raises:
        DiskError: with what is needed and what is free.
    """
    blobs = _storage(repo_id) / "blobs"
    needed = sum(max(0, (file.size or 0) - _length(blobs / f"{file.digest}.incomplete")) for file in missing)
    place = next(folder for folder in blobs.parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        why = f"{repo_id} needs {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free"
        raise DiskError(str(place), why, "free some space, or set HF_HOME to a folder on another disk")


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextlib.contextmanager
def _no_library_bars() -> Iterator[None]:
    """huggingface_hub draws one bar per file unasked; here the caller is told and draws or does not."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _fetch_all(listing: Listing, missing: list[RepoFile], progress: Progress) -> None:
    total = sum(file.size or 0 for file in missing)
    done = 0
    for file in missing:

        def report(length: int, start: int = done, name: str = file.name) -> None:
            progress(start + length, total, name)

        report(0)
        _fetch(listing, file, report)
        done += file.size or 0
        report(file.size or 0)


def _fetch(listing: Listing, file: RepoFile, report: Callable[[int], None]) -> None:
    """Brings one file into the snapshot.

    huggingface_hub keeps the cache's order: it finds the checked blob and links it. Fetching through it as well would
    start from zero after each interruption, because it throws away what a process that ended had received.
    """
    ref = HubRef(listing.repo_id, listing.revision)
    blob = _storage(listing.repo_id) / "blobs" / file.digest if file.digest else None
    with _hub_errors(ref, f"{listing.repo_id}/{file.name}"), disk_errors(_snapshot(listing) / file.name):
        if _is_cached(listing, file):
            return  # another process brought it meanwhile
        _discard(_snapshot(listing) / file.name)
        if blob:
            _fetch_blob(listing, file, blob, report)
        path = Path(hf_hub_download(listing.repo_id, file.name, revision=listing.revision))
    if blob and path.resolve() != blob.resolve() and _digest(path, file.digest) != file.digest:
        arrived = _length(path)
        _discard(path)
        raise _wrong_content(listing, file, arrived)


def _fetch_blob(listing: Listing, file: RepoFile, blob: Path, report: Callable[[int], None]) -> None:
    """Fetches a file under the name of its digest, going on where an earlier attempt stopped.

    Raises:
        ModelError: the content is not the announced one; it is removed, so the next attempt starts anew.
        NetworkError: more or fewer bytes than announced.
    """
    partial = blob.with_name(f"{blob.name}.incomplete")
    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if file.size not in (None, _length(blob)):
            blob.unlink(missing_ok=True)  # damaged under another commit's name
        while not blob.exists():
            if file.size is not None and _length(partial) > file.size:
                partial.unlink()
            resumed = _length(partial) > 0
            try:
                _patiently(lambda: _append(listing, file, partial, report))
            finally:
                if not _length(partial) and file.size != 0:
                    partial.unlink(missing_ok=True)  # refused before the first byte
            if _digest(partial, file.digest) == file.digest:
                partial.replace(blob)
            else:
                arrived = _length(partial)
                partial.unlink()
                if not resumed:  # otherwise the fault may lie in what an earlier process left behind
                    raise _wrong_content(listing, file, arrived)


def _append(listing: Listing, file: RepoFile, partial: Path, report: Callable[[int], None]) -> None:
    """Appends what `partial` still lacks."""
    url = hf_hub_url(listing.repo_id, file.name, revision=listing.revision)
    # Without compression the bytes on the wire are the bytes of the file, which is what resuming counts.
    headers = {**build_hf_headers(library_name="mlx-cm"), "Accept-Encoding": "identity"}
    try:
        with partial.open("ab") as out:
            http_get(
                url,
                _Metered(out, report),
                resume_size=_length(partial),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
            )
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        # A bare OSError is how http_get says that the length is another than announced; the digest will say so too.
        if type(error) is not OSError or error.errno is not None:
            raise


class _Metered:
    """A file that tells its length as it grows, for `http_get`, which cannot be asked how far it is."""

    def __init__(self, file: Any, report: Callable[[int], None]):
        self._file, self._report = file, report

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._report(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _digest(path: Path, announced: str) -> str:
    """The digest of a file, of the kind that was announced: SHA-256, or git's SHA-1 of a blob."""
    if len(announced) == 64:
        return sha256_file(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _wrong_content(listing: Listing, file: RepoFile, arrived: int) -> MlxCmError:
    what = f"{listing.repo_id}/{file.name}"
    if file.size not in (None, arrived):
        return NetworkError(what, f"{arrived} bytes arrived where {file.size} were announced", "run the command again")
    kind = "SHA-256" if len(file.digest) == 64 else "git SHA-1"
    return ModelError(
        what,
        f"what arrived does not have the announced {kind} {file.digest[:12]}…; it was removed",
        "run the command again; if it comes back, look for a proxy that changes files",
    )


# ---- errors ----


def _patiently(request: Callable[[], T]) -> T:
    """Repeats a request that the server failed (5xx) or whose connection broke, after short waits."""
    for wait in RETRY_WAITS:
        try:
            return request()
        except _TRANSPORT_ERRORS as error:
            if _status(error) < 500 and type(error).__name__ not in _BROKEN_CONNECTION:
                raise
        time.sleep(wait)
    return request()


def _status(error: BaseException | None) -> int:
    """HTTP status an error stands for; 0 where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", 0)


@contextlib.contextmanager
def _hub_errors(ref: HubRef, what: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub and its HTTP library into one clear `NetworkError`."""
    try:
        yield
    except MlxCmError:
        raise
    except HFValidationError as error:
        raise UsageError(str(ref), f"is no name of a repository on the Hub ({error})") from error
    except _TRANSPORT_ERRORS as error:
        raise _network_error(error, ref, what) from error


def _network_error(error: BaseException, ref: HubRef, what: str) -> NetworkError:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # wrapped by hf_hub_download when it failed to ask and found nothing in the cache
    for kind, why, hint in _REFUSALS:
        if isinstance(error, kind):
            names = {"revision": ref.revision, "endpoint": constants.ENDPOINT, "repo_id": ref.repo_id}
            return NetworkError(what, why.format(**names), hint and hint.format(**names))
    if status := _status(error):
        why, hint = _STATUSES.get(status, (f"the server answers with HTTP status {status}", _TRY_LATER))
        return NetworkError(what, why, hint)
    if "Timeout" in type(error).__name__:
        return NetworkError(what, f"{constants.ENDPOINT} does not answer in time", _CONNECTION)
    return NetworkError(what, f"{constants.ENDPOINT} cannot be reached ({error})", _CONNECTION)


def _hub_is_down(error: NetworkError) -> bool:
    """Whether the Hub gave no answer at all, so that the cache may answer for it."""
    cause = error.__cause__
    return cause is None or not 0 < _status(cause) < 500


def _not_the_hub(what: str) -> NetworkError:
    return NetworkError(
        what,
        f"{constants.ENDPOINT} answers with something that is not the Hub's API",
        "check HF_ENDPOINT, the proxy, and whether the network wants a login",
    )


_CONNECTION = "check the connection, the proxy and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses only what is in the cache"
_TRY_LATER = "try again later"
_REFUSALS: tuple[tuple[type[BaseException], str, str | None], ...] = (
    (
        GatedRepoError,
        "is gated: its licence has to be accepted on the model's page",
        "accept it at {endpoint}/{repo_id}, then run `hf auth login` or set HF_TOKEN",
    ),
    (RevisionNotFoundError, "has no branch, tag or commit {revision}", "see {endpoint}/{repo_id}/tree/main"),
    (
        RepositoryNotFoundError,
        "does not exist on {endpoint}, or is private",
        "check the spelling; for a private model run `hf auth login` or set HF_TOKEN",
    ),
    (DisabledRepoError, "was disabled on {endpoint}", None),
    (OfflineModeIsEnabled, "is not in the cache and offline mode is on", "unset HF_HUB_OFFLINE"),
    (EntryNotFoundError, "is listed by {endpoint} but not delivered", _TRY_LATER),
)
_STATUSES = {
    401: ("the access token is not valid", "run `hf auth login`, or correct or unset HF_TOKEN"),
    403: ("the access token does not allow this", "use a token with the right to read gated models: `hf auth login`"),
    429: ("too many requests", "wait some minutes; logged-in users (`hf auth login`) have higher limits"),
}


# ---- which files ----

_SMALL_FILES = {
    "config.json",
    "scheduler_config.json",
    "adapter_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
}
_IGNORED_FOLDERS = {"safety_checker", "feature_extractor"}  # an onnx or flax file is ignored by its format
_SINGLE_FORMATS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".msgpack")

WeightChooser = Callable[[set[str], str | None], Sequence[str]]


def choose_files(files: Sequence[RepoFile], variant: str | None, choose_weights: WeightChooser) -> list[str]:
    """The files that make one model, in the layouts models are published in.

    A pipeline (`model_index.json` and a folder per component), one component or LoRA under a customary name, or the
    only weights in the repository.

    Args:
        variant: of the weights, such as "fp16"; a component without it gives its ordinary weights.
        choose_weights: the one set of weights to take from the names in a folder, empty where there is none; the
            readers' own rule, `mlx_cm.convert.readers.choose_weight_files`, so that what is fetched is what is read.

    Returns:
        Names in the order of the repository; empty where it is not plain what the model is.
    """
    folders: dict[str, set[str]] = {}
    for file in files:
        path = PurePosixPath(file.name)
        folders.setdefault(str(path.parent), set()).add(path.name)
    root = folders.get(".", set())
    if "model_index.json" in root:
        chosen = {"model_index.json"}
        for folder, names in folders.items():
            if "/" not in folder and folder != "." and folder not in _IGNORED_FOLDERS:
                chosen |= {f"{folder}/{name}" for name in {*(names & _SMALL_FILES), *choose_weights(names, variant)}}
    elif weights := set(choose_weights(root, variant)) or _only_file(root):
        chosen = weights | root & _SMALL_FILES
    else:
        return []
    card = {file.name for file in files if file.name == "README.md" and (file.size or 0) <= README_LIMIT}
    return [file.name for file in files if file.name in chosen | card]


def _only_file(root: set[str]) -> set[str]:
    """The only weight file of the best format there is; nothing where there are several."""
    for suffix in _SINGLE_FORMATS:
        if found := {name for name in root if name.endswith(suffix) and ".non_ema." not in name}:
            return found if len(found) == 1 else set()
    return set()
