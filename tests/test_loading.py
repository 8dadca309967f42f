"""From a Hub id to a picture: the real client, a Hub on the loopback interface, small published models."""

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tiny_latent import autoencoder, reference_pipeline, unet
from tiny_models import save_pipeline

from mlx_cm.convert import convert
from mlx_cm.model_folder import read_model_index, stored_tensors
from tests.hub_server import TOKEN, HubServer

# Reads one JSON job per line and answers with one. A job loads a model and makes a picture, or runs a command.
PROGRAM = """
import contextlib, hashlib, io, json, logging, os, resource, shutil, signal, sys, time, traceback
import huggingface_hub.constants
import mlx_cm.convert
from mlx.utils import tree_flatten
from mlx_cm import cli, hub
from mlx_cm.errors import MlxCmError

hub.RETRY_WAITS = (0.01, 0.01)
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 20_000
logging.getLogger("huggingface_hub").setLevel("ERROR")
convert, conversions, said = mlx_cm.convert.convert, [], []

def counted(source, destination, options):
    conversions.append(destination.name)
    return convert(source, destination, options)

mlx_cm.convert.convert = counted
log = logging.getLogger("mlx_cm")
log.addHandler(handler := logging.Handler())
handler.emit = lambda record: said.append(record.getMessage())

def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(1),
    "full disk": lambda: limit_files(1000),
}

def dtypes(model):
    return model and sorted({str(value.dtype) for _, value in tree_flatten(model.parameters())})

def load(ref, at=(None, None), part=None, picture=None, **options):
    def progress(done, total, name):
        if name == at[0]:
            ACTIONS[at[1]]()

    if part:
        model = mlx_cm.load_component(ref, **options)
        return {"kind": type(model).__name__}
    pipeline = mlx_cm.load(ref, progress=progress, **options)
    made = pipeline.generate(**picture) if picture else []
    return {
        "kind": type(pipeline).__name__,
        "autoencoder": type(getattr(pipeline, "autoencoder", None)).__name__,
        "dtypes": {name: dtypes(getattr(pipeline, name, None)) for name in ("backbone", "autoencoder")},
        "sampler": getattr(pipeline.settings, "sampler", None),
        "preset": getattr(pipeline.settings, "preset", None),
        "provenance": pipeline.provenance,
        "pictures": [hashlib.sha256(one.tobytes()).hexdigest() for one in made],
    }

def command(*arguments):
    sys.argv = ["mlx-cm", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

for line in sys.stdin:
    job = json.loads(line)
    conversions.clear()
    said.clear()
    try:
        answer = command(*job["command"]) if "command" in job else load(**job)
    except MlxCmError as error:
        answer = {"error": type(error).__name__, "text": str(error), "hint": error.hint, "code": error.exit_code}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": traceback.format_exc(), "code": 1}
    finally:
        limit_files(resource.RLIM_INFINITY)
    print(json.dumps({**answer, "conversions": conversions, "said": said}), file=sys.__stdout__, flush=True)
"""

Files = dict[str, bytes]

PIXEL = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
LATENT = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
LATENT_CLUTTER = (
    "LCM_Dreamshaper_v7_4k.safetensors",
    "feature_extractor/preprocessor_config.json",
    "lcm_pipeline.py",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/flax_model.msgpack",
    "unet/diffusion_pytorch_model.bin",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "vae_decoder/model.onnx",
)
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
EULER = functools.partial(EulerDiscreteScheduler, steps_offset=1)
PICTURE = {"labels": [3], "seed": 5}
PROMPT_PICTURE = {"prompt": "a fox", "steps": 1, "seed": 5}


class Client:
    """A process that loads models; jobs go in and answers come out, one line each."""

    def __init__(self, hub: HubServer, folder: Path, **environment: str):
        self.folder = folder
        self.process = hub.start(PROGRAM, folder, **environment)

    def send(self, **job) -> None:
        print(json.dumps(job), file=self.process.stdin, flush=True)

    def receive(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def load(self, ref: object, **options) -> dict:
        """What `mlx_cm.load` gives, or the error."""
        self.send(ref=str(ref), **options)
        return self.receive()

    def run(self, *arguments: object) -> dict:
        """What `mlx-cm` prints, and its exit code."""
        self.send(command=list(map(str, arguments)))
        return self.receive()

    def entry(self, repo_id: str, name: str) -> Path:
        return self.folder / "mlx-cm" / "models" / repo_id.replace("/", "--") / name

    def download(self, repo_id: str) -> Path:
        return self.folder / "hf" / "hub" / f"models--{repo_id.replace('/', '--')}"

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


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
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def client(server, folder):
    client = Client(server, folder)
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(server, folder):
    """The same user without a network."""
    client = Client(server, folder, HF_HUB_OFFLINE="1")
    yield client
    client.close()


@pytest.fixture
def start(hub, folder):
    """Starts more processes of the same user."""
    clients = []

    def start(**environment: str) -> Client:
        clients.append(Client(hub, folder, **environment))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


# ---- what is published ----


def contents(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pixel(tmp_path_factory) -> Files:
    return contents(save_pipeline(tmp_path_factory.mktemp("pixel") / "model"))


def saved(pipeline, folder: Path, **options) -> Files:
    pipeline.save_pretrained(folder, **options)
    return contents(folder)


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Files:
    """A latent consistency model."""
    pipeline = reference_pipeline("lcm", LatentConsistencyModelPipeline, LCMScheduler)
    return saved(pipeline, tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Files:
    """The model that adapters are for."""
    return saved(reference_pipeline("sd", StableDiffusionPipeline, EULER), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Files:
    """The model that a lone U-Net lacks the rest of."""
    pipeline = reference_pipeline("xl", StableDiffusionXLPipeline, EULER)
    return saved(pipeline, tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def lone_unet(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("lone")
    unet("xl lcm")[1].save_pretrained(folder)
    return contents(folder)


def changed(files: Mapping[str, bytes], name: str = UNET_WEIGHTS) -> Files:
    """The same with other weights."""
    tensors = load_tensors(files[name])
    return {**files, name: save_tensors({key: value * 0.9 for key, value in tensors.items()})}


def halved(content: bytes) -> bytes:
    return save_tensors({key: value.half() for key, value in load_tensors(content).items()})


def native(files: Files, folder: Path) -> Path:
    """The same converted here, as the measure of what the cache holds."""
    for name, content in files.items():
        (folder / "foreign" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "foreign" / name).write_bytes(content)
    return convert(folder / "foreign", folder / "native").destination


def weights(folder: Path) -> dict[str, str]:
    return read_model_index(folder).weights


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".partial", ".incomplete"))]


# ---- a pixel model ----


def test_a_pixel_model(hub, client, offline, pixel, tmp_path):
    repo_id = "openai/diffusers-cd_imagenet64_l2"
    clutter = {"cd_imagenet64_l2.pt": b"x", "unet/diffusion_pytorch_model.bin": b"x", "example.png": b"x"}
    commit = hub.add(repo_id, {**pixel, **clutter, "README.md": b"# Consistency"})
    first = client.load(repo_id, picture=PICTURE)
    assert first["kind"] == "ConsistencyModelPipeline"
    assert hub.fetched(repo_id) == sorted((*PIXEL, "README.md"))
    assert first["preset"] == "cd-imagenet64-l2"
    assert (first["provenance"]["source"], first["provenance"]["revision"]) == (repo_id, commit)
    assert first["conversions"] == [commit[:12]]
    assert first["provenance"]["weights"] == weights(native(pixel, tmp_path))

    hub.log.clear()
    again = client.load(repo_id, picture=PICTURE)
    assert again == {**first, "conversions": []}
    assert [request.path for request in hub.log] == [f"/api/models/{repo_id}"]

    hub.log.clear()
    assert client.load(f"{repo_id}@{commit}", picture=PICTURE) == again
    assert offline.load(repo_id, picture=PICTURE) == again
    assert hub.log == []

    shutil.rmtree(client.download(repo_id))  # what was converted does not need it any more
    assert client.load(repo_id, picture=PICTURE) == again
    assert hub.fetched(repo_id) == []
    shutil.rmtree(client.download(repo_id))
    assert offline.load(repo_id, picture=PICTURE) == again
    unseen = offline.load("o/never-seen")
    assert (unseen["code"], "offline mode is on" in unseen["text"]) == (4, True)


def test_commits_branches_and_tags(hub, client, pixel):
    repo_id = "openai/diffusers-ct_bedroom256"
    old = hub.add(repo_id, pixel)
    tagged = hub.add(repo_id, changed(pixel), revision="v1.0")
    branch = hub.add(repo_id, changed(changed(pixel)), revision="fixes/2")
    loaded = {}
    for ref, commit in {
        repo_id: old,
        f"{repo_id}@v1.0": tagged,
        f"{repo_id}@fixes/2": branch,
        f"{repo_id}@{tagged}": tagged,
    }.items():
        loaded[ref] = client.load(ref, picture={"seed": 5})
        assert loaded[ref]["provenance"]["revision"] == commit
        assert loaded[ref]["preset"] == "ct-bedroom256"
    assert [answer["conversions"] for answer in loaded.values()] == [[old[:12]], [tagged[:12]], [branch[:12]], []]
    assert len({answer["pictures"][0] for answer in loaded.values()}) == 3

    new = hub.add(repo_id, changed(pixel))
    answer = client.load(repo_id, picture={"seed": 5})
    assert (answer["provenance"]["revision"], answer["conversions"]) == (new, [new[:12]])
    assert answer["pictures"] == loaded[f"{repo_id}@v1.0"]["pictures"]
    listed = json.loads(client.run("models", "list", "--json")["out"])["models"]
    assert {model["revision"] for model in listed if model["source"] == repo_id} == {old, tagged, branch, new}


# ---- latent models ----


def test_a_latent_model(hub, client, latent, tmp_path):
    repo_id = "SimianLuo/LCM_Dreamshaper_v7"
    index = json.loads(latent["model_index.json"])
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    clutter = dict.fromkeys(LATENT_CLUTTER, b"x")
    hub.add(repo_id, {**latent, **clutter, "model_index.json": json.dumps(index).encode()})
    first = client.load(repo_id, picture=PROMPT_PICTURE)
    assert (first["kind"], first["sampler"]) == ("LatentConsistencyPipeline", "lcm")
    assert hub.fetched(repo_id) == sorted(LATENT)
    (said,) = first["said"]
    assert said.startswith(f"{repo_id}: ")
    assert all(word in said for word in ("safety_checker", "feature_extractor", "left out"))
    copy = native(latent, tmp_path)
    assert first["provenance"]["weights"] == weights(copy)
    assert client.load(copy, picture=PROMPT_PICTURE)["pictures"] == first["pictures"]
    again = client.load(repo_id)
    assert (again["conversions"], again["said"]) == ([], [])


def test_half_precision_is_another_download_and_another_model(hub, client, offline, latent):
    """Where a part has it; the others come as they are."""
    repo_id = "o/variants"
    half = {
        name.replace(".safetensors", ".fp16.safetensors"): halved(latent[name])
        for name in (UNET_WEIGHTS, "text_encoder/model.safetensors")
    }
    full = {name: latent[name] for name in (UNET_WEIGHTS, "text_encoder/model.safetensors")}
    commit = hub.add(repo_id, latent | half)[:12]
    answer = client.load(repo_id, dtype="float16")
    assert answer["conversions"] == [f"{commit}-fp16"]
    assert hub.fetched(repo_id) == sorted({*LATENT, *half} - {*full})
    kept = {
        part: {dtype for dtype, _ in stored_tensors(client.entry(repo_id, f"{commit}-fp16") / part).values()}
        for part in ("unet", "text_encoder", "vae")
    }
    assert kept == {"unet": {"F16"}, "text_encoder": {"F16"}, "vae": {"F32"}}
    wanted = offline.load(repo_id, dtype="float32")
    assert wanted["code"] == 4
    assert UNET_WEIGHTS in wanted["text"]

    hub.log.clear()
    answer = client.load(repo_id, dtype="float32")
    assert answer["conversions"] == [commit]
    assert hub.fetched(repo_id) == sorted(full)
    for dtype in ("float16", "float32"):
        assert offline.load(repo_id, dtype=dtype)["conversions"] == []

    hub.add("o/plain", latent)  # nothing of it in half precision: one conversion for both
    assert len(client.load("o/plain", dtype="float32")["conversions"]) == 1
    again = client.load("o/plain", dtype="float16")
    assert again["conversions"] == []
    assert "mlx.core.float16" in again["dtypes"]["backbone"]


def test_half_precision_of_a_folder_here(client, latent, tmp_path):
    for name, content in {**latent, UNET_WEIGHTS.replace(".safe", ".fp16.safe"): halved(latent[UNET_WEIGHTS])}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    made = [client.load(tmp_path, dtype=dtype)["conversions"] for dtype in ("float16", "float32", "float16")]
    assert made[0] == [f"{made[1][0]}-fp16"]
    assert made[2] == []
    assert len(client.run("models", "where", tmp_path)["out"].split()) == 2


def test_a_native_model_is_used_as_it_is(hub, client, offline, latent, tmp_path):
    folder = native(latent, tmp_path)
    commit = hub.add("o/native", folder)
    answer = client.load("o/native", picture=PROMPT_PICTURE)
    assert answer["conversions"] == []
    assert answer["pictures"] == client.load(folder, picture=PROMPT_PICTURE)["pictures"]
    assert hub.fetched("o/native") == sorted(contents(folder))
    assert not client.entry("o/native", commit[:12]).exists()
    assert offline.load("o/native")["provenance"] == answer["provenance"]
    refused = client.load("o/native", base="o/other")
    assert (refused["error"], "whole model already" in refused["text"]) == ("UsageError", True)


# ---- a U-Net alone ----


def test_a_unet_alone_is_completed_by_the_base_that_its_card_names(hub, client, offline, lone_unet, xl):
    repo_id, base_id = "latent-consistency/lcm-sdxl", "stabilityai/stable-diffusion-xl-base-1.0"
    hub.add(base_id, {**xl, "README.md": b"# SDXL", "sd_xl_base_1.0.safetensors": b"x"})
    card = f"---\nlibrary_name: diffusers\nbase_model: {base_id}\n---\n# LCM".encode()
    commit = hub.add(repo_id, {**lone_unet, "README.md": card})
    answer = client.load(repo_id, picture=PROMPT_PICTURE)
    assert (answer["kind"], answer["sampler"], answer["conversions"]) == (
        "LatentConsistencyPipeline",
        "lcm",
        [commit[:12]],
    )
    assert answer["provenance"]["base"]["source"] == base_id
    assert hub.fetched(repo_id) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    unneeded = {"README.md", "unet/config.json", UNET_WEIGHTS}
    assert not unneeded & set(hub.fetched(base_id))  # 5 GB of the published one
    assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"} <= set(hub.fetched(base_id))

    hub.log.clear()
    assert client.load(repo_id, picture=PROMPT_PICTURE) == {**answer, "conversions": []}
    assert [request.path for request in hub.log] == [f"/api/models/{repo_id}"]
    assert offline.load(repo_id)["conversions"] == []


def test_another_base_makes_another_model(hub, client, lone_unet, xl, tmp_path):
    repo_id = "o/lone"
    card = b"---\nbase_model: o/gone\n---\n"
    hub.add(repo_id, {**lone_unet, "README.md": card})
    hub.add("o/base", changed(xl, "vae/diffusion_pytorch_model.safetensors"), revision="v2")
    gone = client.load(repo_id)
    assert (gone["code"], gone["conversions"]) == (4, [])
    assert gone["text"].startswith("o/gone: does not exist")
    assert "names it as its base" in gone["text"]
    assert "--base" in gone["hint"]

    folder = native(xl, tmp_path)
    answers = [client.load(repo_id, base=one) for one in ("o/base@v2", str(folder))]
    assert [answer["provenance"]["base"]["source"] for answer in answers] == ["o/base@v2", "native"]
    assert answers[0]["conversions"] != answers[1]["conversions"]
    vae = [answer["provenance"]["weights"]["vae/model.safetensors"] for answer in answers]
    assert vae[0] != vae[1] == weights(folder)["vae/model.safetensors"]
    hub.log.clear()
    assert client.load(repo_id, base="o/base@v2")["conversions"] == []
    assert [request.path for request in hub.log] == [f"/api/models/{repo_id}"]

    (tmp_path / "local").mkdir()
    for name, content in lone_unet.items():
        (tmp_path / "local" / name).write_bytes(content)
    assert (
        client.load(tmp_path / "local", base="o/base@v2")["provenance"]["weights"]
        == answers[0]["provenance"]["weights"]
    )
    hub.log.clear()
    assert client.load(tmp_path / "local", base="o/base@v2")["conversions"] == []
    assert hub.log == []


def test_a_unet_alone_without_a_base(hub, client, lone_unet, latent):
    hub.add("o/bare", {**lone_unet, "README.md": b"# no front matter"})
    answer = client.load("o/bare")
    assert (answer["error"], answer["code"], answer["conversions"]) == ("MissingParts", 3, [])
    assert "is a U-Net alone" in answer["text"]
    assert answer["hint"] == "pass --base stabilityai/stable-diffusion-xl-base-1.0"
    hub.add("o/wrong-base", latent)
    wrong = client.load("o/bare", base="o/wrong-base")
    assert (wrong["code"], "text_encoder_2" in wrong["text"]) == (3, True)
    hub.add("o/complete", latent)
    unused = client.load("o/complete", base="o/wrong-base")
    assert (unused["error"], unused["text"]) == ("UsageError", "base: o/complete is complete without it")


def test_a_part_is_no_whole_model(hub, client, lone_unet, xl):
    """Loaded by itself and completed, one repository gives two models."""
    hub.add("o/xl", xl)
    hub.add("o/part", {**lone_unet, "README.md": b"---\nbase_model: o/xl\n---\n"})
    assert client.load("o/part", part=True)["kind"] == "UNet2DCondition"
    assert client.load("o/part")["kind"] == "LatentConsistencyPipeline"
    assert client.load("o/part", part=True)["conversions"] == []


# ---- adapters and autoencoders ----


def adapter(seed: int) -> bytes:
    """A LoRA as it is published, in kohya's spelling."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.0.resnets.0.conv1"):
        name = f"lora_unet_{path.replace('.', '_')}"
        out, *rest = unet("base")[1].get_submodule(path).weight.shape
        up = (out, 2, 1, 1) if len(rest) == 3 else (out, 2)
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, *rest, generator=generator),
            f"{name}.lora_up.weight": torch.randn(up, generator=generator),
            f"{name}.alpha": torch.tensor(1.0),
        }
    return save_tensors(tensors)


def test_an_adapter(hub, client, offline, base):
    model, lora = "stable-diffusion-v1-5/stable-diffusion-v1-5", "latent-consistency/lcm-lora-sdv1-5"
    hub.add(model, base)
    hub.add(lora, {"pytorch_lora_weights.safetensors": adapter(1), "README.md": b"x", "image.png": b"x"})
    hub.add(lora, {"pytorch_lora_weights.safetensors": adapter(2)}, revision="v2")

    def load(*adapters: str, **settings) -> dict:
        return client.load(model, lora=adapters, picture=PROMPT_PICTURE | settings)

    assert f"--lora {lora}" in load()["hint"]  # a base model takes many steps
    plain = load(sampler="lcm")
    whole, part, other, both = (
        load(*adapters) for adapters in ((lora,), (f"{lora}@0.7",), (f"{lora}@v2",), (f"{lora}@v2@0.7", lora))
    )
    assert hub.fetched(lora) == ["README.md", *["pytorch_lora_weights.safetensors"] * 2]
    assert plain["sampler"] is None
    assert {answer["sampler"] for answer in (whole, part, other, both)} == {"lcm"}  # the file does not say it
    assert len({answer["pictures"][0] for answer in (plain, whole, part, other, both)}) == 5
    used = [(entry["ref"], entry["scale"]) for entry in both["provenance"]["lora"]]
    assert used == [(f"{lora}@v2", 0.7), (lora, 1.0)]
    assert part["provenance"]["lora"][0]["sha256"] == whole["provenance"]["lora"][0]["sha256"]
    assert other["provenance"]["lora"][0]["sha256"] != whole["provenance"]["lora"][0]["sha256"]
    assert offline.load(model, lora=[lora], picture=PROMPT_PICTURE)["pictures"] == whole["pictures"]
    missing = client.load(model, lora=["o/no-lora"])
    assert (missing["code"], missing["text"].startswith("o/no-lora: does not exist")) == (4, True)
    foreign = client.load(model, lora=[model])
    assert foreign["code"] == 3


def test_an_autoencoder_of_another_model(hub, client, latent):
    """One that overflows in half precision stays out of it, like the model's own."""
    hub.add("o/own", latent)
    hub.add("o/other", changed(latent, "vae/diffusion_pytorch_model.safetensors"))
    alone = {name.removeprefix("vae/"): content for name, content in latent.items() if name.startswith("vae/")}
    hub.add("o/vae", alone)
    own, other, alone = (
        client.load("o/own", vae=vae, dtype="float16", picture=PROMPT_PICTURE) for vae in ("full", "o/other", "o/vae")
    )
    assert own["pictures"] == alone["pictures"] != other["pictures"]
    assert all(answer["dtypes"]["autoencoder"] == ["mlx.core.float32"] for answer in (own, other, alone))
    assert all("mlx.core.float16" in answer["dtypes"]["backbone"] for answer in (own, other, alone))


def test_a_tiny_autoencoder(hub, client, latent, tmp_path):
    autoencoder("tiny")[1].save_pretrained(tmp_path / "taesd")
    files = {**contents(tmp_path / "taesd"), "taesd_decoder.safetensors": b"x", "README.md": b"# TAESD"}
    hub.add("madebyollin/taesd", files)
    hub.add("o/latent", latent)
    full, tiny = (client.load("o/latent", vae=vae, picture=PROMPT_PICTURE) for vae in ("full", "tiny"))
    assert hub.fetched("madebyollin/taesd") == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert (full["autoencoder"], tiny["autoencoder"]) == ("AutoencoderKL", "AutoencoderTiny")
    assert tiny["pictures"] != full["pictures"]
    again = client.load("o/latent", vae="madebyollin/taesd", picture=PROMPT_PICTURE)
    assert (again["pictures"], again["conversions"]) == (tiny["pictures"], [])
    assert client.run("convert", "madebyollin/taesd", tmp_path / "native")["code"] == 0
    assert client.load("o/latent", vae=str(tmp_path / "native"), picture=PROMPT_PICTURE)["pictures"] == tiny["pictures"]


# ---- what is refused ----


def test_repositories_that_cannot_be_had(hub, client, pixel):
    hub.add("o/gated", pixel, gated=True)
    hub.add("o/there", pixel)
    for ref, why, hint in (
        ("o/gated", "is gated: its licence has to be accepted", f"accept it at {hub.url}/o/gated"),
        ("o/missing", "does not exist", "hf auth login"),
        ("o/there@nowhere", "has no branch, tag or commit nowhere", f"{hub.url}/o/there"),
    ):
        result = client.run("generate", "-m", ref, "--label", 1)
        assert (result["code"], result["out"]) == (4, "")
        assert result["err"].startswith(f"error: {ref.partition('@')[0]}")
        assert why in result["err"]
        assert f"try: {hint}" in result["err"] or hint in result["err"].partition("\ntry: ")[2]
    assert leftovers(client.download("o/gated")) == []
    assert client.run("models", "where", "o/gated")["code"] == 3


def test_gated_with_access(hub, start, pixel):
    hub.add("o/granted", pixel, gated=True)
    assert start(HF_TOKEN=TOKEN).load("o/granted")["kind"] == "ConsistencyModelPipeline"


def test_a_repository_without_the_weights_of_a_part(hub, client, latent):
    weightless = {
        name: content for name, content in latent.items() if name != "vae/diffusion_pytorch_model.safetensors"
    }
    hub.add("o/no-vae", weightless)
    result = client.run("generate", "a fox", "-m", "o/no-vae")
    assert result["code"] == 3
    assert "vae: has no weight files; it holds config.json" in result["err"]
    assert not client.entry("o/no-vae", "").exists() or not list(client.entry("o/no-vae", "").iterdir())


class Payload:
    """What runs a command when Python unpickles it."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles(hub, client, pixel, tmp_path):
    """As data where they are nothing else; what is asked for beyond that is refused."""
    bare = {name: content for name, content in pixel.items() if name != UNET_WEIGHTS}
    tensors = load_tensors(pixel[UNET_WEIGHTS])
    torch.save(tensors, tmp_path / "good.bin")
    torch.save({**tensors, "x": Payload(f"touch {tmp_path / 'canary'}")}, tmp_path / "evil.bin")
    name = UNET_WEIGHTS.replace(".safetensors", ".bin")

    hub.add("o/good", {**bare, name: (tmp_path / "good.bin").read_bytes()})
    hub.add("o/same", pixel)
    good, same = (client.load(ref, picture=PICTURE) for ref in ("o/good", "o/same"))
    assert good["pictures"] == same["pictures"]
    assert good["provenance"]["weights"] == same["provenance"]["weights"]
    assert name in hub.fetched("o/good")

    hub.add("o/evil", {**bare, name: (tmp_path / "evil.bin").read_bytes()})
    result = client.run("generate", "-m", "o/evil", "--label", 1)
    assert result["code"] == 3
    assert "system" in result["err"]
    assert not (tmp_path / "canary").exists()
    assert client.run("models", "where", "o/evil")["code"] == 3


def test_shards(hub, client, latent, tmp_path):
    folder = tmp_path / "sharded"
    unet("lcm")[1].save_pretrained(folder / "unet", max_shard_size="100KB")
    sharded = contents(folder)
    assert len(sharded) > 3
    hub.add("o/sharded", {name: content for name, content in latent.items() if name != UNET_WEIGHTS} | sharded)
    hub.add("o/unsharded", latent)
    answers = [client.load(ref)["provenance"]["weights"] for ref in ("o/sharded", "o/unsharded")]
    assert answers[0] == answers[1]
    assert set(sharded) <= set(hub.fetched("o/sharded"))


# ---- interruptions ----


def test_an_interrupted_download_goes_on_where_it_stopped(hub, client, start, pixel):
    hub.add("o/cut", pixel)
    hub.fault("stall", "diffusion_pytorch_model.safetensors", after=25_000)
    another = start()
    another.send(ref="o/cut")
    assert hub.stalled.wait(60)
    deadline = time.monotonic() + 20
    while not (there := sum(path.stat().st_size for path in leftovers(client.download("o/cut")))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    another.close()
    rest = sorted({*PIXEL} - {*hub.fetched("o/cut")} | {UNET_WEIGHTS})
    hub.log.clear()
    assert client.load("o/cut")["kind"] == "ConsistencyModelPipeline"
    assert hub.fetched("o/cut") == rest
    assert [request.range for request in hub.log if request.path.startswith("/lfs/")] == [f"bytes={there}-"]
    assert leftovers(client.download("o/cut")) == []


def test_two_processes_convert_once(hub, client, start, pixel):
    commit = hub.add("o/twice", pixel)
    hub.fault("delay", "scheduler_config.json", seconds=0.5)
    both = client, start()
    for each in both:
        each.send(ref="o/twice", at=["conv_out.weight", "sleep"], picture=PICTURE)
    answers = [each.receive() for each in both]
    assert answers[0]["pictures"] == answers[1]["pictures"]
    assert answers[0]["conversions"] + answers[1]["conversions"] == [commit[:12]]
    assert hub.fetched("o/twice") == sorted(PIXEL)


def test_a_killed_conversion_leaves_nothing_to_load(hub, client, start, pixel):
    commit = hub.add("o/killed", pixel)
    another = start()
    another.send(ref="o/killed", at=["conv_out.weight", "kill"])
    assert another.process.wait(60) == -signal.SIGKILL
    entry = client.entry("o/killed", commit[:12])
    assert [path.name.endswith(".partial") for path in entry.parent.iterdir()] == [True]
    assert client.run("models", "where", "o/killed")["code"] == 3
    hub.log.clear()
    answer = client.load("o/killed", picture=PICTURE)
    assert (answer["kind"], answer["conversions"]) == ("ConsistencyModelPipeline", [commit[:12]])
    assert hub.fetched("o/killed") == []
    assert list(entry.parent.iterdir()) == [entry]


def test_a_disk_that_fills_up_during_a_conversion(hub, client, pixel):
    """A limit on the length of files stands in for the full disk: both make `write` fail half-way."""
    commit = hub.add("o/full", pixel)
    full = client.load("o/full", at=["conv_out.weight", "full disk"])
    assert (full["error"], full["code"], full["conversions"]) == ("DiskError", 6, [commit[:12]])
    assert commit[:12] in full["text"]
    assert leftovers(client.folder / "mlx-cm") == []
    assert not client.entry("o/full", commit[:12]).exists()
    assert client.load("o/full")["conversions"] == [commit[:12]]


# ---- commands ----


def test_commands(hub, client, pixel, tmp_path):
    repo_id = "openai/diffusers-cd_cat256_l2"
    commit = hub.add(repo_id, {**pixel, "README.md": b"# cats"})

    shown = json.loads(client.run("inspect", repo_id, "--json")["out"])
    assert (shown["kind"], shown["revision"]) == ("repository", commit)
    sizes = {file["name"]: file["bytes"] for file in shown["files"]}
    assert sizes == {name: len(content) for name, content in pixel.items()} | {"README.md": 6}
    assert UNET_WEIGHTS in client.run("inspect", repo_id)["out"]
    assert hub.fetched(repo_id) == []
    assert not client.download(repo_id).exists()

    made = client.run("convert", repo_id, tmp_path / "model", "--verify", "--json")
    assert made["code"] == 0
    report = json.loads(made["out"])
    assert (report["verified"], report["destination"]) == (True, str(tmp_path / "model"))
    index = read_model_index(tmp_path / "model")
    assert (index.provenance["source"], index.provenance["revision"]) == (repo_id, commit)
    assert index.sampler["preset"] == "cd-cat256-l2"
    hub.log.clear()
    assert client.run("convert", repo_id, tmp_path / "model")["code"] == 6
    assert hub.log == []
    assert client.run("models", "where", repo_id)["code"] == 3  # that one is the user's own

    pictures = [tmp_path / "first.png", tmp_path / "again.png"]
    assert client.run("generate", "-m", repo_id, "--seed", 5, "-o", pictures[0])["out"] == f"{pictures[0]}\n"
    assert client.run("generate", "--from", pictures[0], "-o", pictures[1])["code"] == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert client.load(repo_id)["provenance"]["weights"] == index.weights
    entry = client.entry(repo_id, commit[:12])
    assert client.run("models", "where", f"{repo_id}@{commit[:7]}")["out"] == f"{entry}\n"
    (line,) = [line for line in client.run("models", "list")["out"].splitlines() if repo_id in line]
    assert line.startswith(f"{repo_id}@{commit[:12]}\t")
    assert client.run("models", "remove", repo_id)["code"] == 0
    assert not entry.exists()
    assert client.download(repo_id).exists()
    assert client.run("models", "remove", repo_id)["code"] == 3


def test_converting_a_unet_alone(hub, client, lone_unet, xl, tmp_path):
    hub.add("o/rest", xl)
    hub.add("o/completed", {**lone_unet, "README.md": b"---\nbase_model:\n- o/rest\n---\n"})
    made = client.run("convert", "o/completed", tmp_path / "model", "-q")
    assert (made["code"], made["out"], made["err"]) == (0, f"{tmp_path / 'model'}\n", "")
    assert read_model_index(tmp_path / "model").provenance["base"]["source"] == "o/rest"
    assert UNET_WEIGHTS not in hub.fetched("o/rest")
