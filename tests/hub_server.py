"""A Hugging Face Hub on the loopback interface, for tests: repositories with history, refusals, and faults on demand.

It answers the real `huggingface_hub` client as the real Hub does where that client can tell the difference: commits
and refs, git and LFS etags, large files behind a redirect to another host, error codes in headers.

    with HubServer() as hub:
        commit = hub.add("owner/name", {"config.json": b"{}"})   # or a folder
        hub.fault("cut", "unet/model.safetensors", after=1000)
        client = hub.start("import mlx_cm; ...", tmp_path)        # a process that finds the server instead of the Hub
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".pkl", ".msgpack")
ROOT = Path(__file__).resolve().parent.parent
# What would lead a client elsewhere: its own settings, and proxies.
HIDDEN = ("HF_", "HUGGING", "HTTP", "ALL_PROXY", "http", "all_proxy", "TRANSFORMERS", "XDG_CACHE")
TOKEN = "hf_token_with_access"
OTHER_TOKEN = "hf_token_without_access"


@dataclass(frozen=True)
class Request:
    """One line of the server's log."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


@dataclass
class Fault:
    """Something that goes wrong the next `times` times a path that ends in `suffix` is asked for."""

    kind: str  # "cut", "stall", "status", "corrupt", "delay", "ignore_range", "long"
    suffix: str
    times: int
    after: int = 0  # bytes before the connection is cut or stalls
    status: int = 500
    seconds: float = 0.0
    method: str = "GET"


@dataclass
class Repo:
    """Commits by SHA, each a table of contents by name; branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    declared_sizes: dict[str, int] = field(default_factory=dict)  # lies about the size of a file
    extra_names: list[str] = field(default_factory=list)  # listed, as they stand, and not there


class HubServer:
    """Serves repositories on 127.0.0.1 and logs every request; a context manager."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.stalled = threading.Event()  # set when a client is held by a "stall"
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def start(self, program: str, folder: Path, **environment: str) -> subprocess.Popen:
        """Runs Python code that takes this server for the Hub and keeps its files below `folder`; pipes are text."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(HIDDEN)}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "MLX_CM_CACHE": str(folder / "mlx-cm"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "10",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "-c", program],
            env=env | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def add(self, repo_id: str, files: Mapping[str, bytes] | Path, *, revision: str = "main", **settings) -> str:
        """Adds a commit and points `revision` at it.

        Args:
            files: contents by name, or a folder.
            settings: of the repository, fields of `Repo`.

        Returns:
            The commit's SHA.
        """
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        repo = self.repos.setdefault(repo_id, Repo())
        for name, value in settings.items():
            setattr(repo, name, value)
        digests = [(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())]
        commit = hashlib.sha1(json.dumps([repo_id, len(repo.commits), digests]).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[revision] = commit
        return commit

    def fault(self, kind: str, suffix: str, *, times: int = 1, **settings) -> None:
        """Lets the next `times` requests for a path ending in `suffix` go wrong; see `Fault`."""
        self._faults.append(Fault(kind, suffix, times, **settings))

    def take_fault(self, kinds: tuple[str, ...], method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.kind in kinds and fault.method == method and fault.times > 0 and path.endswith(fault.suffix):
                    fault.times -= 1
                    return fault
        return None

    def hold(self) -> None:
        """Keeps a client waiting until the server closes."""
        self.stalled.set()
        self._closing.wait(60)

    def forget(self) -> None:
        """Empties the log and disarms what faults are left."""
        self.log.clear()
        self._faults.clear()
        self.stalled.clear()

    def fetched(self, repo_id: str) -> list[str]:
        """Names of the files whose content was asked for, sorted, each as often as it was."""
        pattern = re.compile(rf"/{re.escape(repo_id)}/resolve/[^/]+/(.+)")
        return sorted(
            unquote(match[1])
            for request in self.log
            if request.method == "GET" and (match := pattern.fullmatch(request.path))
        )

    def file_of(self, digest: str) -> tuple[str, bytes]:
        for repo in self.repos.values():
            for contents in repo.commits.values():
                for name, content in contents.items():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return name, content
        raise KeyError(digest)


def is_lfs(name: str) -> bool:
    """Whether git keeps the file outside of the repository, as the Hub does with weights."""
    return name.endswith(LFS_SUFFIXES)


def git_digest(content: bytes) -> str:
    """The name git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """The log that counts is `HubServer.log`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        quoted = urlsplit(self.path).path
        path = unquote(quoted)
        self.hub.log.append(
            Request(
                self.command, path, self.headers["Range"], self.headers["Authorization"], self.headers["Host"] or ""
            )
        )
        if fault := self.hub.take_fault(("delay",), self.command, path):
            time.sleep(fault.seconds)
        if fault := self.hub.take_fault(("status",), self.command, path):
            self.refuse(fault.status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", quoted):
            self.api(match[1], match[2], unquote(match[3] or "main"))  # a slash in a revision arrives quoted
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", quoted):
            self.resolve(match[1], unquote(match[2]), unquote(match[3]))
        elif match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self.send_content(*self.hub.file_of(match[1]), {"ETag": f'"{match[1]}"'})
        else:
            self.refuse(404)

    # ---- answers ----

    def api(self, repo_id: str, kind: str | None, revision: str) -> None:
        found = self.find(repo_id, revision, is_file=False)
        if found is None:
            return
        repo, commit = found
        contents = repo.commits[commit]
        if kind == "tree":
            self.send_json([_tree_entry(repo, name, content) for name, content in contents.items()])
            return
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [_sibling(repo, name, content, blobs) for name, content in contents.items()]
        siblings += [{"rfilename": name} for name in repo.extra_names]
        self.send_json({"id": repo_id, "sha": commit, "siblings": siblings, "private": repo.private, "tags": []})

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self.find(repo_id, revision, is_file=True)
        if found is None:
            return
        repo, commit = found
        content = repo.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self.refuse(404, "EntryNotFound", headers)
        elif is_lfs(name):
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            # another origin, as the Hub's file servers are: a token must not follow there
            headers |= {"Location": f"http://localhost:{self.hub.port}/lfs/{digest}"}
            self.send_head(302, 0, headers)
        else:
            self.send_content(name, content, {**headers, "ETag": f'"{git_digest(content)}"'})

    def find(self, repo_id: str, revision: str, *, is_file: bool) -> tuple[Repo, str] | None:
        """The repository and the commit meant, or None after a refusal was sent. A gated one shows its file names."""
        repo = self.hub.repos.get(repo_id)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, OTHER_TOKEN):
            self.refuse(401, None, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and token != TOKEN):
            self.refuse(404 if token else 401, "RepoNotFound")
        elif repo.gated and is_file and token != TOKEN:
            self.refuse(403 if token else 401, "GatedRepo")
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
            self.refuse(404, "RevisionNotFound")
        else:
            return repo, commit
        return None

    def refuse(self, status: int, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        headers = dict(headers or {}) | ({"X-Error-Code": code} if code else {})
        body = json.dumps({"error": code or "refused"}).encode()
        self.send_head(status, len(body), {**headers, "Content-Type": "application/json"})
        self.send_body(body)

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_head(200, len(body), {"Content-Type": "application/json"})
        self.send_body(body)

    def send_content(self, name: str, content: bytes, headers: Mapping[str, str]) -> None:
        """A file or the range asked for, with whatever fault is due."""
        fault = self.hub.take_fault(("cut", "stall", "corrupt", "ignore_range", "long"), self.command, name)
        if fault and fault.kind == "corrupt":
            content = bytes(255 - byte for byte in content[:64]) + content[64:]
        if fault and fault.kind == "long":
            content += b"more than announced"
        start = self.range_start(len(content))
        if fault and fault.kind == "ignore_range":
            start = 0
        if start >= len(content) > 0:
            self.send_head(416, 0, {"Content-Range": f"bytes */{len(content)}"})
            return
        headers = dict(headers)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_head(206 if start else 200, len(content) - start, {**headers, "Accept-Ranges": "bytes"})
        if fault and fault.kind in ("cut", "stall"):
            self.send_body(content[start : start + fault.after])
            self.wfile.flush()
            if fault.kind == "stall":
                self.hub.hold()
            self.close_connection = True
        else:
            self.send_body(content[start:])

    def range_start(self, length: int) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        return min(int(match[1]), length) if match else 0

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_body(self, body: bytes) -> None:
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True


def _sibling(repo: Repo, name: str, content: bytes, blobs: bool) -> dict:
    """An entry of a model's info, with sizes and digests when `blobs` asks for them."""
    if not blobs:
        return {"rfilename": name}
    size = repo.declared_sizes.get(name, len(content))
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
    sibling = {"rfilename": name, "size": size, "blobId": git_digest(content)}
    return sibling | ({"lfs": lfs} if is_lfs(name) else {})


def _tree_entry(repo: Repo, name: str, content: bytes) -> dict:
    """An entry of a tree listing, which names the same facts in another way."""
    sibling = _sibling(repo, name, content, blobs=True)
    entry = {"type": "file", "path": name, "size": sibling["size"], "oid": sibling["blobId"]}
    if lfs := sibling.get("lfs"):
        entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return entry
