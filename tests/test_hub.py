"""Downloads with the real huggingface_hub client, in its own process, from a Hub on the loopback interface."""

import hashlib
import json
import time
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mlx_cm.convert.readers import choose_weight_files
from mlx_cm.hub import HubRef, RepoFile, choose_files, parse_ref
from tests.hub_server import OTHER_TOKEN, TOKEN, HubServer

# Reads one JSON job per line and answers with one; huggingface_hub reads its environment when it is imported.
CLIENT = """
import json, logging, sys
import huggingface_hub.constants
from mlx_cm import hub
from mlx_cm.convert.readers import choose_weight_files
from mlx_cm.errors import MlxCmError
hub.RETRY_WAITS = (0.02, 0.05)
logging.getLogger("huggingface_hub").setLevel("ERROR")
for line in sys.stdin:
    job = json.loads(line)
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = job.get("chunk", 10 * 1024 * 1024)
    def choose(files):
        return job["names"] if "names" in job else hub.choose_files(files, job["variant"], choose_weight_files)
    steps = []
    try:
        ref = hub.HubRef(*job["ref"])
        if job.get("list"):
            answer = {"revision": (listing := hub.list_files(ref)).revision, "files": [f.name for f in listing.files]}
        else:
            found = hub.download(ref, choose=choose, progress=lambda *step: steps.append(step))
            answer = {"path": str(found.path), "revision": found.revision, "files": found.files}
    except MlxCmError as error:
        answer = {"error": type(error).__name__, "text": str(error), "hint": error.hint, "code": error.exit_code}
    print(json.dumps({**answer, "steps": steps}), flush=True)
"""


class Client:
    """A process with the client; jobs go in and answers come out, one line each."""

    def __init__(self, hub: HubServer, folder: Path, prelude: str = "", **environment: str):
        self.folder = folder
        self.process = hub.start(prelude + CLIENT, folder, **environment)

    def send(self, repo_id: str, revision: str | None = None, variant: str | None = None, **job) -> None:
        print(json.dumps({"ref": [repo_id, revision], "variant": variant, **job}), file=self.process.stdin, flush=True)

    def download(self, *args, **job) -> dict:
        self.send(*args, **job)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.forget()
    return server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def client(server, folder):
    client = Client(server, folder)
    yield client
    client.close()


@pytest.fixture
def start(hub, folder):
    """Starts more clients, with another environment."""
    clients = []

    def start(**environment):
        clients.append(Client(hub, folder, **environment))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def weights(name: str, size: int = 300) -> bytes:
    """Bytes that differ from name to name and do not repeat."""
    return hashlib.shake_256(name.encode()).digest(size)


def files(*names: str) -> dict[str, bytes]:
    return {name: weights(name) for name in names}


PIPELINE = (
    "model_index.json",
    "README.md",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
CLUTTER = (
    ".gitattributes",
    "preview.png",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "lcm_pipeline.py",
    "docs/README.md",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx",
    "text_encoder/openvino_model.bin",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_flax_model.msgpack",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "unet/checkpoint-500/config.json",
    "unet/checkpoint-500/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae_decoder/model.onnx",
)


# ---- which files ----

SHARDS = tuple(f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
FP16_SHARDS = tuple(f"transformer/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2))
OLD_SHARDS = tuple(f"transformer/diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2))
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
FP16_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.fp16.json"
OLD_INDEX = "transformer/diffusion_pytorch_model.safetensors.fp16.index.json"
PARTS = ("model_index.json", "transformer/config.json")


@pytest.mark.parametrize(
    ("variant", "wanted", "others"),
    [
        pytest.param(None, PIPELINE, CLUTTER, id="pipeline"),
        pytest.param("fp16", PIPELINE, CLUTTER, id="variant nowhere"),
        pytest.param(None, (*PARTS, "transformer/model.safetensors"), SHARDS[:2], id="incomplete shards"),
        pytest.param(None, (*PARTS, *SHARDS, INDEX), (*FP16_SHARDS, FP16_INDEX), id="shards"),
        pytest.param("fp16", (*PARTS, *FP16_SHARDS, FP16_INDEX), (*SHARDS, INDEX), id="variant shards"),
        pytest.param("fp16", (*PARTS, *OLD_SHARDS, OLD_INDEX), (*SHARDS, INDEX), id="variant shards, older naming"),
        pytest.param("bf16", (*PARTS, *SHARDS, INDEX), (*FP16_SHARDS, FP16_INDEX), id="variant shards fall back"),
        pytest.param(None, (*PARTS, *FP16_SHARDS, FP16_INDEX), (), id="only a variant"),
        pytest.param(
            "fp16",
            ("model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"),
            ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.bin"),
            id="variant per component",
        ),
        pytest.param(None, ("model_index.json", "t/pytorch_model.bin"), ("t/model.fp16.safetensors",), id="bin"),
        pytest.param(None, ("model_index.json", "tok/spiece.model", "tok/added_tokens.json"), ("a/x.txt",), id="t5"),
        pytest.param(
            None,
            ("README.md", "config.json", "diffusion_pytorch_model.safetensors"),
            ("diffusion_pytorch_model.fp16.safetensors", "unet/config.json", "taesd_decoder.safetensors"),
            id="one component",
        ),
        pytest.param(
            None,
            ("README.md", "pytorch_lora_weights.safetensors"),
            ("pytorch_lora_weights.bin", "other.safetensors", "image.png"),
            id="lora",
        ),
        pytest.param(None, ("adapter_config.json", "adapter_model.safetensors"), ("x.bin",), id="peft lora"),
        pytest.param(None, ("cd_imagenet64_l2.pt",), ("notes.txt",), id="one old checkpoint"),
        pytest.param(None, ("lcm.safetensors",), ("lcm.ckpt", "lcm.non_ema.safetensors"), id="one safetensors"),
        pytest.param(None, (), ("a.safetensors", "b.safetensors", "README.md"), id="several: not plain"),
        pytest.param(None, (), ("README.md", "config.json", "sub/model.safetensors"), id="nothing"),
    ],
)
def test_chooses_the_files_of_one_model(variant, wanted, others):
    listed = [RepoFile(name, 1) for name in sorted({*wanted, *others})]
    assert choose_files(listed, variant, choose_weight_files) == sorted(wanted)


def test_a_model_card_of_many_megabytes_stays_away():
    listed = [RepoFile("README.md", 20_000_000), RepoFile("lora.safetensors", 5)]
    assert choose_files(listed, None, choose_weight_files) == ["lora.safetensors"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubRef("owner/name")),
        ("SimianLuo/LCM_Dreamshaper_v7", HubRef("SimianLuo/LCM_Dreamshaper_v7")),
        ("a/b.c-d_e", HubRef("a/b.c-d_e")),
        ("owner/name@main", HubRef("owner/name", "main")),
        ("owner/name@refs/pr/3", HubRef("owner/name", "refs/pr/3")),
        ("owner/name@v1.0+x", HubRef("owner/name", "v1.0+x")),
        ("a" * 96 + "/" + "b" * 96, HubRef("a" * 96 + "/" + "b" * 96)),
        *[
            (text, None)
            for text in (
                *("", "name", "owner/", "/name", "a/b/c", "./model", "../model", "/abs/path", "~/model", "C:\\model"),
                *("owner/na me", "owner/name/", "own er/name", "owner/-name", "owner/name-", "owner/.name", "a/b..c"),
                *("a/b--c", "a/b.git", "a/b\n", "a/ñ", "a/" + "b" * 97, "datasets/x", "spaces/x", "https://hf.co/a/b"),
                *("owner/name@", "owner/name@a..b", "owner/name@../x", "owner/name@/x", "owner/name@x/", "a/b@c@d"),
                *("owner/name@a b", "owner/name@x.lock", "owner/name@-x", "owner/name@a//b", "owner/name@a\\b"),
            )
        ],
    ],
)
def test_parses_references(text, expected):
    assert parse_ref(text) == expected
    if expected:
        validate_repo_id(expected.repo_id)  # what we accept, the client accepts


@pytest.mark.parametrize("owner", ["o", "-o", "o-", ".o", "o.git", "o--o", "_o", "o..o"])
@pytest.mark.parametrize("name", ["n", "n.git", "n_", "n.", "n--n", "n n"])
def test_accepts_what_the_client_accepts(owner, name):
    try:
        validate_repo_id(f"{owner}/{name}")
        accepted = True
    except HFValidationError:
        accepted = False
    assert (parse_ref(f"{owner}/{name}") is not None) == accepted


# ---- downloads ----


def contents(snapshot: dict) -> dict[str, bytes]:
    folder = Path(snapshot["path"])
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fetches_the_needed_files_and_nothing_else(hub, client):
    commit = hub.add("o/pipeline", files(*PIPELINE, *CLUTTER))
    got = client.download("o/pipeline")
    assert got["revision"] == commit
    assert got["path"].endswith(commit)
    assert sorted(got["files"]) == sorted(PIPELINE)
    assert contents(got) == files(*PIPELINE)
    assert hub.fetched("o/pipeline") == sorted(PIPELINE)
    asked = {request.path for request in hub.log if not request.path.startswith(("/o/pipeline/resolve/", "/lfs/"))}
    assert asked == {"/api/models/o/pipeline"}
    assert all(commit in request.path for request in hub.log if "/resolve/" in request.path)


def test_second_run_asks_one_question_and_fetches_nothing(hub, client, start):
    hub.add("o/twice", files(*PIPELINE))
    first = client.download("o/twice")
    hub.log.clear()
    again = client.download("o/twice")
    assert again == {**first, "steps": []}
    assert [request.path for request in hub.log] == ["/api/models/o/twice"]

    hub.log.clear()
    assert client.download("o/twice", first["revision"])["path"] == first["path"]
    assert start(HF_HUB_OFFLINE="1").download("o/twice")["path"] == first["path"]
    assert hub.log == []  # a commit never changes, and offline is offline


def test_reports_progress(hub, client):
    hub.add("o/progress", {"a.safetensors": weights("a", 1000), "README.md": b"0123456789"})
    steps = client.download("o/progress", chunk=300)["steps"]
    done, totals, names = zip(*steps, strict=True)
    assert set(totals) == {1010}
    assert set(names) == {"a.safetensors", "README.md"}
    assert done[0] == 0
    assert done[-1] == 1010
    assert list(done) == sorted(done)
    assert {300, 600, 900, 1000} <= set(done)


def test_branch_tag_and_commit(hub, client):
    old = hub.add("o/revisions", {"a.safetensors": b"old", "README.md": b"same"})
    tagged = hub.add("o/revisions", {"a.safetensors": b"tag", "README.md": b"same"}, revision="v1.0")
    pull = hub.add("o/revisions", {"a.safetensors": b"pull", "README.md": b"same"}, revision="refs/pr/3")
    for revision, commit, text in (
        (None, old, b"old"),
        ("main", old, b"old"),
        ("v1.0", tagged, b"tag"),
        ("refs/pr/3", pull, b"pull"),
        (tagged, tagged, b"tag"),
    ):
        got = client.download("o/revisions", revision)
        assert (got["revision"], contents(got)["a.safetensors"]) == (commit, text)
    assert hub.fetched("o/revisions").count("README.md") == 1  # the same blob in all three commits
    new = hub.add("o/revisions", {"a.safetensors": b"new"})
    got = client.download("o/revisions")
    assert (got["revision"], contents(got)) == (new, {"a.safetensors": b"new"})


def test_variant_with_fallback_per_component(hub, client):
    both = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors")
    hub.add("o/variant", files("model_index.json", *both, "vae/diffusion_pytorch_model.safetensors"))
    client.download("o/variant", variant="fp16")
    assert hub.fetched("o/variant") == ["model_index.json", both[1], "vae/diffusion_pytorch_model.safetensors"]
    client.download("o/variant")
    assert hub.fetched("o/variant").count(both[0]) == 1


def test_the_caller_chooses(hub, client):
    hub.add("o/many", files("a.safetensors", "b.safetensors", "c.txt"))
    assert contents(client.download("o/many", names=["b.safetensors"])) == files("b.safetensors")
    missing = client.download("o/many", names=["b.safetensors", "z.safetensors"])
    assert (missing["error"], missing["code"]) == ("ModelError", 3)
    assert "z.safetensors" in missing["text"]
    unclear = client.download("o/many")
    assert unclear["error"] == "ModelError"
    assert "a.safetensors, b.safetensors" in unclear["text"]
    assert hub.fetched("o/many") == ["b.safetensors"]


def test_lists_without_fetching(hub, client):
    commit = hub.add("o/listed", files("b.safetensors", "c.txt"))
    got = client.download("o/listed", list=True)
    assert (got["revision"], sorted(got["files"])) == (commit, ["b.safetensors", "c.txt"])
    assert len(hub.log) == 1


# ---- interruptions ----


def test_a_cut_connection_continues_where_it_stopped(hub, client):
    """With the client's real chunk size, which is what it writes, and keeps, at once."""
    content = weights("cut", 12_000_000)
    hub.add("o/cut", {"a.safetensors": content})
    hub.fault("cut", "a.safetensors", after=11_000_000)
    got = client.download("o/cut")
    assert contents(got)["a.safetensors"] == content
    ranges = [request.range for request in hub.log if request.path.startswith("/lfs/")]
    assert ranges == [None, f"bytes={10 * 1024 * 1024}-"]


def test_a_killed_process_is_continued_by_the_next(hub, start):
    content = weights("killed", 50_000)
    hub.add("o/killed", {"a.safetensors": content})
    hub.fault("stall", "a.safetensors", after=30_500)
    victim = start()
    victim.send("o/killed", chunk=10_000)  # larger than what Python's files buffer
    assert hub.stalled.wait(20)
    blobs = victim.folder / "hf" / "hub" / "models--o--killed" / "blobs"
    incomplete = blobs / f"{hashlib.sha256(content).hexdigest()}.incomplete"
    deadline = time.monotonic() + 10
    while incomplete.stat().st_size < 30_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.close()
    got = start().download("o/killed")
    assert contents(got)["a.safetensors"] == content
    ranges = [request.range for request in hub.log if request.path.startswith("/lfs/")]
    assert ranges == [None, "bytes=30000-"]
    assert got["steps"][-1][0] == 50_000
    assert not incomplete.exists()


def leave_partial(folder: Path, repo_id: str, content: bytes, partial: bytes) -> Path:
    """What an earlier process would have left of a file."""
    blobs = folder / "hf" / "hub" / f"models--{repo_id.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    path = blobs / f"{hashlib.sha256(content).hexdigest()}.incomplete"
    path.write_bytes(partial)
    return path


def test_two_processes_fetch_a_file_once(hub, client, start):
    hub.add("o/both", files("a.safetensors", "README.md"))
    other = start()
    other.download("o/both", names=["README.md"])
    hub.fault("delay", "a.safetensors", seconds=0.5)
    client.send("o/both")
    other.send("o/both")
    answers = [json.loads(each.process.stdout.readline()) for each in (client, other)]
    assert contents(answers[0]) == contents(answers[1]) == files("a.safetensors", "README.md")
    assert hub.fetched("o/both") == ["README.md", "a.safetensors"]


@pytest.mark.parametrize(
    ("case", "partial", "fault"),
    [
        ("complete", weights("partial", 5000), None),
        ("too-long", weights("partial", 5000) + b"x", None),
        ("garbage", b"garbage" * 300, None),
        ("range-ignored", weights("partial", 5000)[:2000], "ignore_range"),
    ],
)
def test_whatever_is_left_of_an_earlier_attempt(hub, client, folder, case, partial, fault):
    content = weights("partial", 5000)
    hub.add(f"o/left-{case}", {"a.safetensors": content})
    left = leave_partial(folder, f"o/left-{case}", content, partial)
    if fault:
        hub.fault(fault, "a.safetensors")
    assert contents(client.download(f"o/left-{case}"))["a.safetensors"] == content
    assert not left.exists()


def test_server_errors_are_waited_out(hub, client):
    hub.add("o/flaky", files("a.safetensors", "README.md"))
    hub.fault("status", "/api/models/o/flaky", times=2, status=503)
    hub.fault("status", "a.safetensors", times=2, status=500)
    hub.fault("status", "README.md", times=1, status=502)
    assert contents(client.download("o/flaky")) == files("a.safetensors", "README.md")


def test_server_errors_that_stay(hub, client):
    hub.add("o/broken", files("a.safetensors"))
    hub.fault("status", "/api/models/o/broken", times=9, status=503)
    got = client.download("o/broken")
    assert (got["error"], got["code"]) == ("NetworkError", 4)
    assert "503" in got["text"]
    assert len(hub.log) == 3
    hub.forget()
    hub.fault("status", "a.safetensors", times=9, status=500)
    got = client.download("o/broken")
    assert got["error"] == "NetworkError"
    assert "a.safetensors" in got["text"]
    assert "500" in got["text"]


# ---- content ----


@pytest.mark.parametrize("name", ["a.safetensors", "config.json"])
def test_wrong_content_never_enters_the_cache(hub, client, folder, name):
    repo_id = f"o/corrupt-{name.partition('.')[0]}"
    hub.add(repo_id, {name: weights(name), "lora.safetensors": b"."})
    hub.fault("corrupt", name)
    got = client.download(repo_id, names=[name])
    assert (got["error"], got["code"]) == ("ModelError", 3)
    assert name in got["text"]
    blobs = folder / "hf" / "hub" / f"models--{repo_id.replace('/', '--')}" / "blobs"
    assert list(blobs.iterdir()) == []
    assert contents(client.download(repo_id, names=[name]))[name] == weights(name)


def test_a_cached_file_that_was_damaged_is_fetched_again(hub, client):
    hub.add("o/damaged", files("a.safetensors"))
    path = Path(client.download("o/damaged")["path"]) / "a.safetensors"
    path.resolve().write_bytes(b"short")
    assert contents(client.download("o/damaged")) == files("a.safetensors")
    assert len(hub.fetched("o/damaged")) == 2
    path.resolve().write_bytes(b"short")
    hub.add("o/damaged", files("a.safetensors", "README.md"))  # another commit with the same file
    assert contents(client.download("o/damaged")) == files("a.safetensors", "README.md")


def test_another_length_than_announced(hub, client):
    hub.add("o/long", files("a.safetensors"))
    hub.fault("long", "a.safetensors")
    got = client.download("o/long")
    assert got["error"] == "NetworkError"
    assert "319 bytes arrived where 300 were announced" in got["text"]
    assert contents(client.download("o/long")) == files("a.safetensors")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:evil", "a//b", "./x", "a/"])
def test_names_that_lead_out_of_the_folder(hub, client, name):
    hub.add("o/evil", files("a.safetensors"), extra_names=[name])
    got = client.download("o/evil", names=[name])
    assert (got["error"], got["code"]) == ("ModelError", 3)
    assert repr(name) in got["text"]
    assert hub.fetched("o/evil") == []


def test_a_commit_that_leads_out_of_the_folder(hub, client):
    hub.add("o/evil-sha", files("a.safetensors"))
    repo = hub.repos["o/evil-sha"]
    repo.commits["../../../evil"] = repo.commits[repo.refs["main"]]
    repo.refs["main"] = "../../../evil"
    got = client.download("o/evil-sha")
    assert got["error"] == "NetworkError"
    assert "not the Hub's API" in got["text"]


# ---- disk ----


def test_too_little_space_is_seen_before_the_first_byte(hub, client):
    hub.add("o/huge", files("a.safetensors"), declared_sizes={"a.safetensors": 10**16})
    got = client.download("o/huge")
    assert (got["error"], got["code"]) == ("DiskError", 6)
    assert "10000000.00 GB more" in got["text"]
    assert "HF_HOME" in got["hint"]
    assert hub.fetched("o/huge") == []


def test_a_disk_that_is_full_after_all(hub, start):
    """A limit on the length of files stands in for the full disk: both make `write` fail half-way."""
    hub.add("o/full", {"a.safetensors": weights("full", 400_000)})
    limited = start(prelude="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n")
    got = limited.download("o/full", chunk=50_000)
    assert (got["error"], got["code"]) == ("DiskError", 6)
    assert "a.safetensors" in got["text"]
    assert contents(start().download("o/full"))["a.safetensors"] == weights("full", 400_000)


# ---- refusals ----


@pytest.mark.parametrize(
    ("token", "gated", "private", "hidden"),
    [
        (None, "gated", "private", "unknown"),
        (OTHER_TOKEN, "gated", "private", "unknown"),
        (TOKEN, None, None, "unknown"),
    ],
    ids=["anonymous", "no access", "access"],
)
def test_gated_private_and_unknown(hub, start, token, gated, private, hidden):
    key = "anonymous" if token is None else token[-6:]
    for kind, settings in (("gated", {"gated": True}), ("private", {"private": True})):
        hub.add(f"o/{kind}-{key}", files("a.safetensors"), **settings)
    client = start(**({"HF_TOKEN": token} if token else {}))

    for kind, refused in (("gated", gated), ("private", private), ("unknown", hidden)):
        got = client.download(f"o/{kind}-{key}")
        if not refused:
            assert contents(got) == files("a.safetensors")
            continue
        assert (got["error"], got["code"]) == ("NetworkError", 4)
        assert f"o/{kind}-{key}" in got["text"]
        assert "hf auth login" in got["hint"]
        if kind == "gated":
            assert "licence" in got["text"]
            assert f"{hub.url}/o/gated-{key}" in got["hint"]
        else:
            assert "does not exist" in got["text"]
            assert "private" in got["text"]
    if token:
        sent = {request.authorization for request in hub.log if request.host.startswith("127.0.0.1")}
        assert sent == {f"Bearer {token}"}
    # the token stays with the Hub and does not follow to the host that serves the files
    assert {request.authorization for request in hub.log if request.host.startswith("localhost")} <= {None}


def test_a_token_that_is_not_valid(hub, start):
    hub.add("o/token", files("a.safetensors"))
    got = start(HF_TOKEN="hf_expired").download("o/token")
    assert (got["error"], "token is not valid" in got["text"]) == ("NetworkError", True)


def test_unknown_revision(hub, client):
    hub.add("o/norev", files("a.safetensors"))
    for revision in ("nope", "0" * 40):
        got = client.download("o/norev", revision)
        assert (got["error"], got["code"]) == ("NetworkError", 4)
        assert f"no branch, tag or commit {revision}" in got["text"]


def test_a_listed_file_that_is_not_delivered(hub, client):
    hub.add("o/ghost", files("a.safetensors"), extra_names=["b.safetensors"])
    got = client.download("o/ghost", names=["b.safetensors"])
    assert got["error"] == "NetworkError"
    assert "b.safetensors" in got["text"]


def test_too_many_requests(hub, client):
    hub.fault("status", "/api/models/o/limit", status=429)
    got = client.download("o/limit")
    assert got["error"] == "NetworkError"
    assert "too many requests" in got["text"]


# ---- no network ----


def test_offline_names_what_is_missing(hub, client, start):
    hub.add("o/half", files(*PIPELINE) | {"vae/diffusion_pytorch_model.safetensors": weights("large", 5000)})
    client.download("o/half", names=["model_index.json", "unet/config.json"])
    offline = start(HF_HUB_OFFLINE="1")
    hub.log.clear()
    got = offline.download("o/half")
    assert (got["error"], got["code"]) == ("NetworkError", 4)
    assert "offline mode is on" in got["text"]
    assert got["text"].startswith("o/half: vae/diffusion_pytorch_model.safetensors, ")  # the largest first
    assert "and 6 more: not in the cache" in got["text"]
    assert "HF_HUB_OFFLINE" in got["hint"]
    got = offline.download("o/never-seen")
    assert "not in the cache and offline mode is on" in got["text"]
    assert hub.log == []


def test_offline_with_what_another_program_downloaded(hub, start, folder):
    commit = hub.add("o/other", files("config.json", "model.safetensors"))
    snapshot = folder / "hf" / "hub" / "models--o--other" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, content in files("config.json", "model.safetensors").items():
        (snapshot / name).write_bytes(content)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    got = start(HF_HUB_OFFLINE="1").download("o/other")
    assert (got["path"], sorted(got["files"])) == (str(snapshot), ["config.json", "model.safetensors"])


def test_without_a_network_the_cache_serves(hub, client, start):
    hub.add("o/down", files("a.safetensors"))
    there = client.download("o/down")
    with HubServer() as gone:
        url = gone.url
    cut_off = start(HF_ENDPOINT=url)
    assert cut_off.download("o/down")["path"] == there["path"]
    got = cut_off.download("o/never-seen")
    assert (got["error"], got["code"]) == ("NetworkError", 4)
    assert f"{url} cannot be reached" in got["text"]
    assert "HF_ENDPOINT" in got["hint"]


def test_a_server_that_does_not_answer(hub, start):
    hub.add("o/slow", files("a.safetensors"))
    hub.fault("delay", "/api/models/o/slow", seconds=3)
    got = start(HF_HUB_ETAG_TIMEOUT="1").download("o/slow")
    assert (got["error"], "does not answer in time" in got["text"]) == ("NetworkError", True)


def test_an_endpoint_that_is_something_else(hub, start):
    hub.fault("status", "/api/models/o/portal", status=200)
    got = start().download("o/portal")
    assert (got["error"], "not the Hub's API" in got["text"]) == ("NetworkError", True)
