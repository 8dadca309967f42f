"""Checkpoint containers, held against torch and safetensors, which write them."""

import argparse
import collections
import datetime
import json
import logging
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import uuid

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlx_cm.convert.readers import choose_weight_files, open_checkpoint, read_weight_index, torch_zip, variant_of
from mlx_cm.convert.readers.torch_tensors import DTYPES
from mlx_cm.errors import ModelError
from mlx_cm.storage import NUMPY_DTYPES, write_safetensors

DTYPE_NAMES = {getattr(torch, name): dtype for name, dtype in DTYPES.items()}
LEGACY_TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
LEGACY_TYPES += [torch.int8, torch.uint8, torch.bool]
NEW_TYPES = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits of a type; for booleans, random booleans."""
    generator = torch.Generator().manual_seed(len(shape))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty((), dtype=dtype).element_size()
    count = int(np.prod(shape))
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def random_state() -> dict[str, torch.Tensor]:
    """Every type and every way in which a tensor can sit in its storage."""
    state = {str(dtype): random_tensor(dtype, 3, 5) for dtype in LEGACY_TYPES + NEW_TYPES}
    base = random_tensor(torch.float32, 6, 8)
    half = random_tensor(torch.bfloat16, 4, 6, 2)
    return state | {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "window": base[2:5, 1::3],
        "diagonal": base.diagonal(),
        "one_row": base[3:4],
        "permuted": half.permute(2, 0, 1)[1:],
        "scalar": base[2, 3],
        "empty": torch.zeros(0, 3, dtype=torch.float16),
        "empty_view": base[6:],
        "odd_stride": torch.as_strided(base, (1, 3), (1 << 40, 2)),
        "parameter": torch.nn.Parameter(random_tensor(torch.float32, 7)),
        "high_rank": random_tensor(torch.int8, *[1] * 20, 3),
        "dotted.name with spaces/ä": random_tensor(torch.int16, 2),
    }


def expected_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == list(state)
    for name, tensor in state.items():
        source = checkpoint.tensors[name]
        assert (source.name, source.dtype, source.shape) == (name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        data = source.read()
        assert (data.dtype, data.shape) == (NUMPY_DTYPES[source.dtype], source.shape), name
        assert data.tobytes() == expected_bytes(tensor), name
        assert source.nbytes == data.nbytes


def save_legacy(value, path, protocol: int = 2) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)


CONTAINERS = [(torch.save, p) for p in (1, 2, 3, 4, 5)] + [(save_legacy, p) for p in (1, 2, 3, 4, 5)]


def save(container, value, path) -> None:
    write, protocol = container
    options = {"protocol": protocol} if write is save_legacy else {"pickle_protocol": protocol}
    write(value, path, **options)


@pytest.fixture(params=CONTAINERS, ids=lambda c: f"{'zip' if c[0] is torch.save else 'legacy'}-{c[1]}")
def container(request):
    return request.param


@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict], ids=["dict", "ordered"])
def test_torch_files_give_the_same_bits(tmp_path, container, wrap):
    state = random_state()
    save(container, wrap(state), tmp_path / "weights.any")
    checkpoint = open_checkpoint(tmp_path / "weights.any")
    assert_same(checkpoint, state)
    assert checkpoint.files == (tmp_path / "weights.any",)
    assert checkpoint.metadata == {} and checkpoint.skipped == {}


def test_a_module_state_dict_with_its_metadata(tmp_path, container):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    save(container, module.state_dict(), tmp_path / "m.pt")
    assert_same(open_checkpoint(tmp_path / "m.pt"), dict(module.state_dict()))


def test_parameters_and_tensors_with_attributes(tmp_path, container):
    tagged = torch.nn.Parameter(random_tensor(torch.float32, 3, 2))
    tagged.note = "kept by torch"
    plain = random_tensor(torch.float32, 4)
    plain.note = {"nested": 1}
    state = {"tagged": tagged, "plain": plain}
    save(container, state, tmp_path / "m.pt")
    assert_same(open_checkpoint(tmp_path / "m.pt"), state)


def test_the_oldest_calls(tmp_path):
    """`_rebuild_tensor` and lists of pairs are what PyTorch 0.x and Python 2 wrote."""
    raw = np.arange(6, dtype="<f4")
    body = b"\x80\x02ccollections\nOrderedDict\n(((U\x01w"
    body += b"ctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\nFloatStorage\nU\x011U\x06cuda:0K\x06Ntq"
    body += b"\x00QK\x00(K\x02K\x03t(K\x03K\x01ttRtltR."
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    tail = pickle.dumps(["1"], 2) + (6).to_bytes(8, "little") + raw.tobytes()
    (tmp_path / "old.pth").write_bytes(head + body + tail)
    source = open_checkpoint(tmp_path / "old.pth").tensors["w"]
    np.testing.assert_array_equal(source.read(), raw.reshape(2, 3))


@pytest.mark.parametrize("start", [0, 2])
def test_legacy_parts_of_storages(tmp_path, start):
    """Old files can store one storage and name a part of it: (key, offset, elements)."""
    raw = np.arange(10, dtype="<f4")
    pid = b"(U\x07storagectorch\nFloatStorage\nU\x01aU\x03cpuK\x0a(U\x01bK" + bytes([start]) + b"K\x06ttQ"
    body = b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor\n(" + pid + b"K\x01K\x05\x85K\x01\x85tRs."
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (tmp_path / "old.pth").write_bytes(
        head + body + pickle.dumps(["a"], 2) + (10).to_bytes(8, "little") + raw.tobytes()
    )
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "old.pth").tensors["w"].read(), raw[start + 1 : start + 6])


class Callbacks:
    """Stands for the classes of a training program that this program does not have."""

    def __init__(self):
        self.best = 0.5
        self.weights = torch.ones(2)


class Settings(dict):
    """A dictionary class of a training program."""


def lightning_checkpoint(state: dict[str, torch.Tensor]) -> dict:
    return {
        "epoch": 3,
        "global_step": np.int64(7),
        "loss": torch.tensor(0.5),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state | {"note": "text", "nothing": None},
        "callbacks": {Callbacks: {"best": torch.tensor(1.0)}, "object": Callbacks()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": Settings(
            args=argparse.Namespace(a=1, where=pathlib.PurePosixPath("/x")),
            space=types.SimpleNamespace(a=1),
            name=uuid.UUID(int=1),
            when=datetime.datetime(2022, 8, 1),
            array=np.arange(3.0),
            seen={1, 2},
            fixed=frozenset({3}),
            counts=collections.Counter("aab"),
            table=collections.defaultdict(list, {(1, 2): [3]}),
            recent=collections.deque([1]),
            raw=b"\x00\xff",
            size=torch.Size([2, 3]),
            device=torch.device("cpu"),
            kind=torch.float16,
            number=1 << 100,
            imaginary=1j,
        ),
    }


@pytest.mark.parametrize("container", [c for c in CONTAINERS if c[1] >= 2], indirect=True)  # objects need protocol 2
def test_a_training_checkpoint_gives_its_state_dict(tmp_path, container):
    state = {"a.w": random_tensor(torch.float32, 2, 3), "a.b": random_tensor(torch.float16, 3)}
    save(container, lightning_checkpoint(state), tmp_path / "last.ckpt")
    checkpoint = open_checkpoint(tmp_path / "last.ckpt")
    assert_same(checkpoint, state)
    assert checkpoint.skipped["note"] == "str" and checkpoint.skipped["nothing"] == "None"
    assert checkpoint.skipped["epoch"] == "int" and checkpoint.skipped["loss"] == "tensor"
    assert checkpoint.skipped["optimizer_states"] == "list of 1"
    assert checkpoint.skipped["global_step"] == "numpy scalar"
    assert checkpoint.skipped["hyper_parameters"].endswith("Settings object")


def test_real_lightning_names_are_passed_over(tmp_path, monkeypatch):
    """The callback class of Stable Diffusion's .ckpt files, whose package is not installed."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    Callbacks_ = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = Callbacks_
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    state = {"w": random_tensor(torch.float32, 2)}
    torch.save({"callbacks": {Callbacks_: {"best": 1}}, "state_dict": state}, tmp_path / "sd.ckpt")
    assert_same(open_checkpoint(tmp_path / "sd.ckpt"), state)


W, V = torch.ones(2), torch.zeros(3)


@pytest.mark.parametrize(
    ("value", "names", "skipped"),
    [
        ({"a": W, "step": 3}, ["a"], {"step": "int"}),
        ({"model": {"a": W}, "ema": {"b": V}}, ["b"], {"model": "dict of 1"}),
        ({"params": {"a": W}, "params_ema": {"b": V}}, ["b"], {"params": "dict of 1"}),
        ({"state_dict": {"a": W}, "model": {"b": V}}, ["a"], {"model": "dict of 1"}),
        ({"model_state_dict": {"a": W}, "loss": V}, ["a"], {"loss": "tensor"}),
        ({"model": "name", "a": W}, ["a"], {"model": "str"}),
        ({"ema": {"decay": 0.999}, "model": {"a": W}}, ["a"], {"ema": "dict of 1"}),
        ({"unet": {"a": W, "b": {"c": V}}, "clip": {"d": W}}, ["unet.a", "unet.b.c", "clip.d"], {}),
        ({"module.a": W}, ["module.a"], {}),
        ([W, V], ["0", "1"], {}),
        ({"string_to_param": {"*": W}, "string_to_token": {"*": 265}}, ["string_to_param.*"], None),
        ({5: W, (1, 2): V, None: V}, ["5"], {"tuple": "tensor", "None": "tensor"}),
    ],
)
def test_where_the_weights_are(tmp_path, value, names, skipped):
    torch.save(value, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert list(checkpoint.tensors) == names
    if skipped is not None:
        assert checkpoint.skipped == skipped


def test_a_choice_between_weights_is_said(tmp_path, caplog):
    torch.save({"model": {"a": W}, "ema": {"b": V}}, tmp_path / "m.pt")
    with caplog.at_level(logging.WARNING, logger="mlx_cm"):
        open_checkpoint(tmp_path / "m.pt")
    assert "'ema'" in caplog.text and "'model'" in caplog.text


class Unit(torch.nn.Linear):
    """A whole model, which some people save in place of its weights."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"step": 3}, "no named tensors"),
        ({}, "no named tensors"),
        (W, "no named tensors"),
        (5, "no named tensors"),
        (Unit(2, 2), "Unit object, where a dictionary of tensors"),
        ({"a.b": W, "a": {"b": V}}, "two tensors named 'a.b'"),
        ({"a" * 600: W}, "impossible name"),
        ({"a\nb": W}, "impossible name"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' has the type C64"),
        ({"a": torch.ones(2).expand(9, 2)}, "expanded"),
        ({"a": torch.ones(2).to_sparse()}, "_get_layout"),
        ({"a": torch.ones(2, dtype=torch.complex64).imag.neg() * 1j}, "C64"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "negation"),
        ({"a": torch.ones(2, device="meta")}, "_rebuild_meta_tensor"),
        ({"a": W, "b": torch.ones(2, dtype=torch.float8_e4m3fnuz)}, "float8_e4m3fnuz"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path, value, reason):
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(tmp_path / "m.pt")
    assert caught.value.what == str(tmp_path / "m.pt")


def test_unsupported_tensors_outside_the_state_dict_do_no_harm(tmp_path):
    torch.save({"state_dict": {"a": W}, "other": torch.ones(2, dtype=torch.complex64)}, tmp_path / "m.pt")
    assert list(open_checkpoint(tmp_path / "m.pt").tensors) == ["a"]


def test_safetensors_give_the_same_bits(tmp_path):
    state = {name: tensor.detach().clone().contiguous() for name, tensor in random_state().items()}
    save_file(state, tmp_path / "model.bin", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "model.bin")
    assert checkpoint.metadata == {"format": "pt"} and checkpoint.skipped == {}
    assert_same(checkpoint, {name: state[name] for name in checkpoint.tensors})
    assert checkpoint.tensors.keys() == state.keys()


def test_safetensors_headers_of_every_length_are_known(tmp_path):
    """The length stands first and may look like another format's beginning."""
    for length in range(64, 64 + 512):
        header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        data = length.to_bytes(8, "little") + header.ljust(length) + b"\x07"
        (tmp_path / "m").write_bytes(data)
        assert open_checkpoint(tmp_path / "m").tensors["w"].read() == 7


def test_sources_of_every_container_can_be_written_again(tmp_path, container):
    state = random_state()
    save(container, state, tmp_path / "m.pt")
    write_safetensors(tmp_path / "m.safetensors", open_checkpoint(tmp_path / "m.pt").tensors.values(), {})
    assert_same(open_checkpoint(tmp_path / "m.safetensors"), state)


def test_data_are_views_of_the_file_that_cannot_be_written(tmp_path):
    torch.save({"w": torch.ones(4)}, tmp_path / "m.pt")
    data = open_checkpoint(tmp_path / "m.pt").tensors["w"].read()
    assert not data.flags.owndata and not data.flags.writeable


def test_wide_numbers_of_large_archives():
    """Archives beyond 4 GB keep what does not fit into 32 bits in an extra field, in the order of the record."""
    wide = torch_zip.IN_EXTRA
    field = b"\x99\x99\x02\x00xx\x01\x00\x10\x00" + struct.pack("<2Q", 5 << 32, 9 << 32)
    assert torch_zip._wide_numbers(field, [wide, 7, wide]) == [5 << 32, 7, 9 << 32]
    assert torch_zip._wide_numbers(b"", [1, 2, 3]) == [1, 2, 3]


def test_an_archive_beyond_4_gb(tmp_path):
    """A sparse file: storages at positions that need 64 bits."""
    path = tmp_path / "large.pt"
    size = (4 << 30) + 4096
    storage = torch.UntypedStorage.from_file(str(tmp_path / "zeros"), shared=True, nbytes=size)
    large = torch.empty(0, dtype=torch.uint8).set_(storage)
    small = torch.arange(5)
    with torch.serialization.skip_data():
        torch.save({"large": large, "small": small}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["large"].shape == (size,)
    assert checkpoint.tensors["small"].read().tolist() == [0] * 5  # skip_data leaves holes for the data
    assert path.stat().st_size > size


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'{"weight_map": {}}', "JSON"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"PK", "neither"),
        (b"\x00" * 100, "neither"),
        (pickle.dumps({"a": 1}, 2), "plain Python pickle"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "truncated"),
    ],
)
def test_other_files_are_named(tmp_path, content, reason):
    (tmp_path / "m.ckpt").write_bytes(content)
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(tmp_path / "m.ckpt")
    assert caught.value.exit_code == 3 and "m.ckpt" in str(caught.value)


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a file"), ("absent", "missing"), ("x" * 300, "cannot be read|missing")):
        with pytest.raises(ModelError, match=reason):
            open_checkpoint(tmp_path / name)
    with tarfile.open(tmp_path / "t.pth", "w") as tar:
        tar.add(__file__, "pickle")
    with pytest.raises(ModelError, match=r"PyTorch 0\.1"):
        open_checkpoint(tmp_path / "t.pth")


def test_torchscript_and_other_zips(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    for name, reason in (("script.pt", "TorchScript"), ("arrays.npz", "data.pkl")):
        with pytest.raises(ModelError, match=reason):
            open_checkpoint(tmp_path / name)


PLAIN = "diffusion_pytorch_model.safetensors"
SHARDS = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
FP16_SHARDS = [name.replace("model-", "model.fp16-") for name in SHARDS]
OLD_FP16_SHARDS = [name.replace(".safetensors", ".fp16.safetensors") for name in SHARDS]


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ([], None, []),
        (["config.json", "diffusion_flax_model.msgpack", "model.onnx", "README.md"], None, []),
        ([PLAIN, "diffusion_pytorch_model.bin", "config.json"], None, [PLAIN]),
        ([PLAIN, "diffusion_pytorch_model.fp16.safetensors"], None, [PLAIN]),
        ([PLAIN, "model.safetensors"], None, [PLAIN]),
        (["model.safetensors", "pytorch_model.bin"], None, ["model.safetensors"]),
        (["pytorch_model.bin", "config.json"], None, ["pytorch_model.bin"]),
        (["pytorch_lora_weights.safetensors"], None, ["pytorch_lora_weights.safetensors"]),
        ([*SHARDS, f"{PLAIN}.index.json"], None, [f"{PLAIN}.index.json", *SHARDS]),
        ([*SHARDS, f"{PLAIN}.index.json", "diffusion_pytorch_model.bin"], None, [f"{PLAIN}.index.json", *SHARDS]),
        ([PLAIN, *SHARDS, f"{PLAIN}.index.json"], None, [PLAIN]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], None,
         ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]),
        ([PLAIN, "diffusion_pytorch_model.fp16.safetensors"], "fp16", ["diffusion_pytorch_model.fp16.safetensors"]),
        ([PLAIN, "diffusion_pytorch_model.fp16.bin"], "fp16", ["diffusion_pytorch_model.fp16.bin"]),
        ([PLAIN, "diffusion_pytorch_model.bin"], "fp16", [PLAIN]),
        ([*FP16_SHARDS, *SHARDS, f"{PLAIN}.index.json", f"{PLAIN}.index.fp16.json"], "fp16",
         [f"{PLAIN}.index.fp16.json", *FP16_SHARDS]),
        ([*OLD_FP16_SHARDS, f"{PLAIN}.fp16.index.json"], "fp16", [f"{PLAIN}.fp16.index.json", *OLD_FP16_SHARDS]),
        ([*FP16_SHARDS, "diffusion_pytorch_model.fp16.safetensors.index.json"], "fp16",
         ["diffusion_pytorch_model.fp16.safetensors.index.json", *FP16_SHARDS]),
        ([*FP16_SHARDS, *SHARDS, f"{PLAIN}.index.json", f"{PLAIN}.index.fp16.json"], None,
         [f"{PLAIN}.index.json", *SHARDS]),
        (["model.fp16.safetensors", "config.json"], None, ["model.fp16.safetensors"]),
        (["model.bf16.safetensors", "model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
        (["model.bf16.safetensors"], "fp16", ["model.bf16.safetensors"]),
        ([*FP16_SHARDS, f"{PLAIN}.index.fp16.json"], None, [f"{PLAIN}.index.fp16.json", *FP16_SHARDS]),
        (["diffusion_pytorch_model.non_ema.safetensors"], None, []),
        (["diffusion_pytorch_model.non_ema.bin", "diffusion_pytorch_model.bin"], None, ["diffusion_pytorch_model.bin"]),
    ],
)  # fmt: skip
def test_choice_of_weight_files(names, variant, chosen):
    assert list(choose_weight_files(names, variant)) == chosen
    if chosen:
        assert variant_of(chosen[0]) == next((v for v in ("fp16", "bf16") if v in chosen[0]), None)


def test_a_folder_is_opened_by_its_choice(tmp_path, caplog):
    save_file({"a": W}, tmp_path / "model.fp16.safetensors")
    with caplog.at_level(logging.WARNING, logger="mlx_cm"):
        assert list(open_checkpoint(tmp_path, variant="fp16").tensors) == ["a"]
        assert not caplog.records
        assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    assert "no plain weights" in caplog.text
    save_file({"b": W}, tmp_path / "model.safetensors")
    caplog.clear()
    assert open_checkpoint(tmp_path).files == (tmp_path / "model.safetensors",)
    (tmp_path / "model.fp16.safetensors").unlink()
    with caplog.at_level(logging.WARNING, logger="mlx_cm"):
        assert list(open_checkpoint(tmp_path, variant="fp16").tensors) == ["b"]
    assert "no fp16 weights" in caplog.text


def test_an_empty_folder_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no weight files; it holds config\.json"):
        open_checkpoint(tmp_path)


def sharded(folder, extension: str = "safetensors", index: dict | None = None):
    stem = "pytorch_model" if extension == "bin" else "model"
    write = save_file if extension == "safetensors" else torch.save
    names = [f"{stem}-0000{n}-of-00002.{extension}" for n in (1, 2)]
    write({"a": W, "b": V}, folder / names[0])
    write({"c": W}, folder / names[1])
    weight_map = {"c": names[1], "a": names[0], "b": names[0]} | (index or {})
    weight_map = {name: shard for name, shard in weight_map.items() if shard}
    path = folder / f"{stem}.{extension}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path, names


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_shards_are_put_together(tmp_path, extension):
    path, names = sharded(tmp_path, extension)
    for target in (tmp_path, path):
        checkpoint = open_checkpoint(target)
        assert checkpoint.files == tuple(tmp_path / name for name in names)
        assert_same(checkpoint, {"a": W, "b": V, "c": W})
    assert read_weight_index(path) == {names[0]: ["a", "b"], names[1]: ["c"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"d": "model-00002-of-00002.safetensors"}, "lacks, though the index lists them: 'd'"),
        ({"b": None}, "holds, though the index does not list them: 'b'"),
        ({"b": "model-00002-of-00002.safetensors"}, "shard 'model-00001-of-00002.safetensors' holds"),
        ({"d": "model-00009-of-00002.safetensors"}, "1 of 3 shards are missing: 'model-00009-of-00002.safetensors'"),
        ({"d": "x" * 300}, "missing"),
        ({"d": "../model.safetensors"}, "plain file name"),
        ({"d": "/etc/passwd"}, "plain file name"),
        ({"d": "C:evil"}, "plain file name"),
        ({"d": ["model-00001-of-00002.safetensors"]}, "plain file name"),
        ({"d": 5}, "plain file name"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, reason):
    sharded(tmp_path, index=change)
    with pytest.raises(ModelError, match=reason):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    _, names = sharded(tmp_path)
    save_file({"c": W, "a": V}, tmp_path / names[1])
    with pytest.raises(ModelError, match="does not list them: 'a'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError):
        open_checkpoint(tmp_path)


def test_links_as_in_the_hub_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file({"a": W}, tmp_path / "blobs" / "0123")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / PLAIN).symlink_to(tmp_path / "blobs" / "0123")
    assert list(open_checkpoint(tmp_path / "unet").tensors) == ["a"]


MEASURE = """
import sys
from mlx_cm.convert.readers import open_checkpoint

def anonymous() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024

before = anonymous()
checkpoint = open_checkpoint(sys.argv[1])
opened = anonymous()
highest = total = 0
for source in checkpoint.tensors.values():
    data = source.read().copy()
    total += data.nbytes
    highest = max(highest, anonymous())
    del data
print(opened - before, highest - before, total >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("write", [torch.save, save_legacy, save_file], ids=["zip", "legacy", "safetensors"])
def test_memory_stays_at_one_tensor(tmp_path, write):
    """200 MB in tensors of 10 MB."""
    write({f"w{n}": torch.full((10 << 18,), float(n)) for n in range(20)}, tmp_path / "m")
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "m"], capture_output=True, text=True, check=True)
    opened, highest, total = map(int, result.stdout.split())
    shutil.rmtree(tmp_path)
    assert total == 200
    assert opened < 20 and highest < 45


def test_one_descriptor_per_file(tmp_path):
    torch.save({f"w{n}": torch.ones(3) for n in range(300)}, tmp_path / "m.pt")
    descriptors = pathlib.Path("/proc/self/fd" if sys.platform == "linux" else "/dev/fd")
    before = len(list(descriptors.iterdir()))
    arrays = [source.read() for source in open_checkpoint(tmp_path / "m.pt").tensors.values()]
    assert len(list(descriptors.iterdir())) <= before + 1 and len(arrays) == 300
