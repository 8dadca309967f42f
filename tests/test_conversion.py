"""Whole conversions: every published form of a pixel model, and every way in which one can go wrong."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import ConsistencyModelPipeline, UNet2DModel
from failing_disk import FAILURES, Failing
from mlx.utils import tree_flatten
from openai_names import openai_state_dict
from parity import channels_last
from safetensors.torch import load_file, save_file
from tiny_models import CONDITIONAL, make_unet, native_unet, save_pipeline, shared_unet

import mlx_cm
from mlx_cm import model_folder
from mlx_cm.convert import Options, convert
from mlx_cm.convert.casting import cast, float32_to_bfloat16
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.model_folder import load_model, read_model_index, read_schedule
from mlx_cm.schedules import KarrasSchedule
from mlx_cm.storage import TensorSource, check_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights_of(folder: Path, dtype: str = "float32") -> dict[str, mx.array]:
    return dict(tree_flatten(load_model(folder / "unet", dtype).parameters()))


def expected_weights(unet: UNet2DModel) -> dict[str, mx.array]:
    return {name: channels_last(value.float()) for name, value in unet.state_dict().items()}


def assert_same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert mx.array_equal(value, theirs[name]), name


def stored_dtypes(folder: Path) -> set[str]:
    with safetensors.safe_open(folder / "unet" / "model.safetensors", framework="numpy") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden leftovers included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A pipeline folder as it lies on the Hub; only read."""
    return save_pipeline(tmp_path_factory.mktemp("published") / "tiny-model")


@pytest.fixture
def source(published, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(published, tmp_path / "source"))


@pytest.fixture
def out(tmp_path) -> Path:
    """A folder of its own for the result, so that leftovers show."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "native"


@pytest.fixture(scope="session")
def converted(published, tmp_path_factory) -> Path:
    """The native folder; only read."""
    folder = tmp_path_factory.mktemp("converted") / "native"
    convert(published, folder)
    return folder


@pytest.fixture
def native(converted, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(converted, tmp_path / "native"))


# --- sources


def as_safetensors(unet: UNet2DModel, folder: Path) -> None:
    unet.save_pretrained(folder)


def as_bin(unet: UNet2DModel, folder: Path) -> None:
    unet.save_config(folder)
    torch.save(unet.state_dict(), folder / "diffusion_pytorch_model.bin")


def as_shards(unet: UNet2DModel, folder: Path) -> None:
    unet.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_variant(unet: UNet2DModel, folder: Path) -> None:
    unet.save_pretrained(folder, variant="fp16")


FORMS = {"safetensors": as_safetensors, "bin": as_bin, "shards": as_shards, "only a variant": as_variant}


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "lone unet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_diffusers_folder(form, whole, source, out):
    shutil.rmtree(source / "unet")
    FORMS[form](shared_unet("conditional"), source / "unet")
    report = convert(source if whole else source / "unet", out, Options(verify=True))
    assert_same(weights_of(out), expected_weights(shared_unet("conditional")))
    assert report.components == {"unet": "UNet2D"}
    assert report.tensors == len(shared_unet("conditional").state_dict())
    assert report.parameters == sum(value.numel() for value in shared_unet("conditional").state_dict().values())
    assert report.bytes == 4 * report.parameters
    assert report.verified
    assert report.destination == out
    assert bool(report.notes) == (not whole)  # a lone U-Net does not tell its grid


def test_a_variant_is_chosen(source, out):
    half = make_unet(CONDITIONAL, seed=9).half()
    half.save_pretrained(source / "unet", variant="fp16")
    convert(source, out, Options(variant="fp16"))
    assert stored_dtypes(out) == {"F16"}
    assert_same(weights_of(out), expected_weights(half))
    convert(source, out, Options(overwrite=True))
    assert_same(weights_of(out), expected_weights(shared_unet("conditional")))


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
@pytest.mark.parametrize("name", ["flat.pt", "flat.pth", "flat.ckpt", "flat.safetensors", "named.anything"])
def test_a_flat_checkpoint(name, kind, tmp_path, out):
    unet = make_unet(
        dict(shared_unet(kind).config)
        | {"norm_num_groups": 32, "block_out_channels": (32, 64), "attention_head_dim": 32}
        | ({"attn_norm_num_groups": 32} if kind == "conditional" else {})
    )
    state = {key: value.contiguous() for key, value in openai_state_dict(unet).items()}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    report = convert(tmp_path / name, out, Options(verify=True, overrides={"attention_head_dim": 32}))
    assert_same(weights_of(out), expected_weights(unet))
    assert "--preset" in report.notes[0]


def test_a_flat_checkpoint_whose_heads_are_not_of_64_channels(tmp_path, out):
    unet = make_unet(CONDITIONAL | {"norm_num_groups": 32, "attn_norm_num_groups": 32, "block_out_channels": (32, 64)})
    torch.save(openai_state_dict(unet), tmp_path / "flat.pt")
    with pytest.raises(ModelError, match="attention_head_dim 64 does not divide the block width 32"):
        convert(tmp_path / "flat.pt", out)


def test_the_result_is_a_model_of_the_house(converted, published):
    pipeline = mlx_cm.load(converted)
    assert pipeline.schedule == KarrasSchedule()
    assert pipeline.backbone.config.num_class_embeds == 10
    index = json.loads((converted / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert index["unet"][1] == "UNet2D"
    assert sorted(path.name for path in converted.iterdir()) == ["model_index.json", "scheduler", "unet"]
    metadata = check_safetensors(converted / "unet" / "model.safetensors")
    assert metadata["format"] == "mlx"
    assert metadata["layout"] == "channels-last"


def test_loading_a_foreign_folder_converts_it_once(published, monkeypatch, tmp_path):
    first = mlx_cm.load(published)
    monkeypatch.setattr("mlx_cm.convert.convert", None)  # whoever converts again, fails
    again = mlx_cm.load(published)
    assert_same(dict(tree_flatten(first.backbone.parameters())), dict(tree_flatten(again.backbone.parameters())))


def test_settings_of_the_scheduler_arrive(source, out):
    edit_json(
        source / "scheduler" / "scheduler_config.json",
        num_train_timesteps=201,
        sigma_min=0.01,
        sigma_max=40,
        sigma_data=1.0,
        rho=3,
        clip_denoised=False,
    )
    convert(source, out)
    assert read_schedule(out / "scheduler") == KarrasSchedule(201, 0.01, 40.0, 1.0, 3.0)
    assert read_model_index(out).sampler["clip_denoised"] is False
    assert mlx_cm.load(out).settings.clip_denoised is False


# --- number formats

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [None, *DTYPES])
def test_number_formats(stored, wanted, source, out):
    unet = make_unet(CONDITIONAL).to(DTYPES[stored])
    unet.save_pretrained(source / "unet")
    report = convert(source, out, Options(dtype=wanted, verify=True))
    assert stored_dtypes(out) == {NAMES[wanted or stored]}
    assert_same(weights_of(out), expected_weights(unet.to(DTYPES[wanted or stored])))
    assert report.bytes == report.parameters * (4 if (wanted or stored) == "float32" else 2)


def test_float64_becomes_float32(source, out):
    unet = make_unet(CONDITIONAL).double()
    save_file(unet.state_dict(), source / "unet" / WEIGHTS)
    convert(source, out)
    assert stored_dtypes(out) == {"F32"}
    assert_same(weights_of(out), expected_weights(unet))


def test_bfloat16_rounds_as_torch():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halfway = (bits & 0xFFFF0000) | 0x8000  # ties
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 1e-39], dtype=np.float32)
    values = np.concatenate([bits.view(np.float32), halfway.view(np.float32), special])
    values = values[~np.isnan(values)]
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(float32_to_bfloat16(values), theirs)


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFF8000])
def test_nan_stays_nan_in_bfloat16(pattern):
    rounded = float32_to_bfloat16(np.array([pattern], dtype=np.uint32).view(np.float32))
    assert np.isnan((rounded.astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("value", [65520.0, -1e6, 3e38])
def test_what_float16_cannot_hold_is_named(value, source, out):
    unet = make_unet(CONDITIONAL)
    unet.mid_block.resnets[0].norm1.bias[2] = value
    unet.save_pretrained(source / "unet")
    with pytest.raises(ModelError, match=r"mid_block.resnets.0.norm1.bias.*65504") as caught:
        convert(source, out, Options(dtype="float16"))
    assert "bfloat16" in caught.value.hint
    assert tree(out.parent) == {}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_of_the_source_are_the_sources(value, source, out):
    unet = make_unet(CONDITIONAL)
    unet.mid_block.resnets[0].norm1.bias[2] = value
    unet.save_pretrained(source / "unet")
    convert(source, out, Options(dtype="float16", verify=True))


def test_numbers_that_are_no_floats():
    integers = TensorSource("ids", "I64", (2,), lambda: np.arange(2))
    assert cast(integers, "F16") is integers
    eighths = TensorSource("w", "F8_E4M3", (2,), lambda: np.zeros(2, np.uint8))
    with pytest.raises(ModelError, match="F8_E4M3"):
        cast(eighths, "F16")


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"dtype": "fp16"}, {"preset": "cd-dogs"}])
def test_options_that_do_not_exist(options):
    with pytest.raises(UsageError, match="expected one of"):
        Options(**options)


# --- presets and overrides


@pytest.mark.parametrize(
    ("preset", "num_scales", "parameterization"),
    [("cd-imagenet64-l2", 40, "consistency"), ("ct-imagenet64", 201, "consistency"), ("edm", 40, "edm")],
)
@pytest.mark.parametrize("part", [".", "unet"])
def test_a_preset_tells_what_the_tensors_do_not(part, preset, num_scales, parameterization, published, out):
    report = convert(published / part, out, Options(preset=preset))
    assert report.notes == ()
    assert read_schedule(out / "scheduler").num_scales == num_scales
    settings = mlx_cm.load(out).settings
    assert (settings.preset, settings.parameterization) == (preset, parameterization)


def test_overrides_are_for_what_has_no_config(published, out):
    with pytest.raises(UsageError, match=r"config\.json"):
        convert(published, out, Options(overrides={"attention_head_dim": 2}))


# --- provenance


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_provenance(form, source, out, tmp_path):
    shutil.rmtree(source / "unet")
    FORMS[form](shared_unet("conditional"), source / "unet")
    convert(source, out, Options(dtype="bfloat16"))
    provenance = read_model_index(out).provenance
    assert provenance["source"] == "source"
    assert provenance["revision"] is None
    assert provenance["family"] == "ConsistencyModelPipeline"
    assert provenance["dtype"] == "bfloat16"
    assert provenance["converter"] == f"mlx-cm {mlx_cm.__version__}"
    on_disk = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in (source / "unet").iterdir()
        if path.suffix in (".safetensors", ".bin")
    }
    assert {row["name"]: (row["bytes"], row["sha256"]) for row in provenance["files"]} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in on_disk.items()
    }
    for name, digest in read_model_index(out).weights.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    written = b"".join(data for name, data in tree(out).items() if name.endswith(".json"))
    assert str(tmp_path).encode() not in written
    assert str(Path.home()).encode() not in written


def test_provenance_of_a_hub_model(published, out):
    convert(published, out, Options(source="openai/diffusers-cd_imagenet64_l2", revision="0123abc"))
    provenance = read_model_index(out).provenance
    assert (provenance["source"], provenance["revision"]) == ("openai/diffusers-cd_imagenet64_l2", "0123abc")


def test_a_file_named_by_a_relative_path_has_a_name(published, out, monkeypatch):
    monkeypatch.chdir(published / "unet")
    convert(Path(), out)
    assert read_model_index(out).provenance["source"] == "unet"


def test_progress_counts_to_the_end(published, out):
    told = []
    report = convert(published, out, Options(progress=lambda done, total, what: told.append((done, total, what))))
    done = [row[0] for row in told]
    assert done == sorted(done)
    assert told[-1][:2] == (report.bytes, report.bytes)
    assert {row[2] for row in told} == set(weights_of(out))


# --- sources that are not right


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n")


def change_weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        state = load_file(source / "unet" / WEIGHTS)
        change(state)
        save_file(state, source / "unet" / WEIGHTS)

    return damage


def rename_all(state: dict) -> None:
    for name in [name for name in state if name.startswith("up_blocks.")]:
        state["renamed." + name] = state.pop(name)


def misshape_all(state: dict) -> None:
    for name in [name for name in state if name.endswith("norm1.weight")]:
        state[name] = torch.zeros(3)


def sharded_index(**weight_map) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        shutil.move(source / "unet" / WEIGHTS, source / WEIGHTS)
        index = {"metadata": {}, "weight_map": weight_map}
        (source / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return damage


def component(**changes):
    return lambda source: edit_json(source / "unet" / "config.json", **changes)


def scheduler(**changes):
    return lambda source: edit_json(source / "scheduler" / "scheduler_config.json", **changes)


def truncate(source: Path) -> None:
    path = source / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


BAD_SOURCES = {
    "no middle norm": (
        change_weights(lambda state: state.pop("mid_block.attentions.0.group_norm.weight")),
        r"1 missing: mid_block.attentions.0.group_norm.weight",
    ),
    "many renamed": (
        change_weights(rename_all),
        r"\d\d missing: up_blocks.0[^,]*(, up_blocks[^,]*){9} and \d+ more; \d\d not known to this model: renamed",
    ),
    "many of another shape": (
        change_weights(misshape_all),
        r"\d of another shape: .*norm1.weight: expected .* got \(3,\)",
    ),
    "one more": (
        change_weights(lambda state: state.update(extra=torch.zeros(2))),
        "1 not known to this model: extra",
    ),
    "an empty file of tensors": (change_weights(dict.clear), "missing|no "),
    "truncated": (truncate, "truncated or corrupt"),
    "empty weights": (lambda source: (source / "unet" / WEIGHTS).write_bytes(b""), "empty"),
    "weights are a pointer": (lambda source: lfs_pointer(source / "unet" / WEIGHTS), "git-lfs pointer"),
    "config is a pointer": (lambda source: lfs_pointer(source / "unet" / "config.json"), "git-lfs pointer"),
    "index is a pointer": (lambda source: lfs_pointer(source / "model_index.json"), "git-lfs pointer"),
    "no weights": (lambda source: (source / "unet" / WEIGHTS).unlink(), "no weight files"),
    "no config": (lambda source: (source / "unet" / "config.json").unlink(), "config.json: file is missing"),
    "no unet": (lambda source: shutil.rmtree(source / "unet"), "unet"),
    "no scheduler": (lambda source: shutil.rmtree(source / "scheduler"), "scheduler_config.json: file is missing"),
    "broken index": (lambda source: (source / "model_index.json").write_text("{"), "not valid JSON"),
    "index is a list": (lambda source: (source / "model_index.json").write_text("[]"), "expected a JSON object"),
    "unknown pipeline": (
        lambda source: edit_json(source / "model_index.json", _class_name="NoSuchPipeline"),
        "NoSuchPipeline",
    ),
    "nameless pipeline": (lambda source: edit_json(source / "model_index.json", _class_name=...), "_class_name None"),
    "pipeline class is a list": (
        lambda source: edit_json(source / "model_index.json", _class_name=["diffusers", "X"]),
        "_class_name",
    ),
    "unknown component": (component(_class_name="UNet3DModel"), "UNet3DModel"),
    "component class is a list": (component(_class_name=["UNet2DModel"]), "class None is not supported"),
    "unknown setting": (component(dual_cross_attention=True), "dual_cross_attention"),
    "setting of another type": (component(layers_per_block="2"), "layers_per_block: expected int, got '2'"),
    "setting that is not supported": (component(act_fn="gelu"), "act_fn"),
    "width that does not divide": (component(norm_num_groups=7), "norm_num_groups 7"),
    "more layers than weights": (component(layers_per_block=2), "missing"),
    "other widths than weights": (component(block_out_channels=[8, 24]), "of another shape"),
    "huge": (component(num_class_embeds=10**12), "num_class_embeds"),
    "larger than its weights": (component(num_class_embeds=2**31 - 1), "of another shape"),
    "a product that is huge": (component(block_out_channels=[2**30, 2**30]), "describes no possible UNet2D"),
    "grid of one level": (scheduler(num_train_timesteps=1), "num_scales >= 2"),
    "grid of a broken number": (scheduler(num_train_timesteps=40.5), "num_train_timesteps|num_scales"),
    "grid of text": (scheduler(num_train_timesteps="40"), "num_train_timesteps|num_scales"),
    "grid of nothing": (scheduler(num_train_timesteps=None), "num_train_timesteps|num_scales"),
    "sigma_min of text": (scheduler(sigma_min="low"), "sigma_min"),
    "sigma_min of nothing": (scheduler(sigma_min=None), "sigma_min"),
    "sigma_min above sigma_max": (scheduler(sigma_min=100.0), "sigma_min < sigma_max"),
    "sigma_data is no number": (scheduler(sigma_data=float("nan")), "sigma_min|sigma_data"),
    "noise of another strength": (scheduler(s_noise=0.5), "s_noise 0.5"),
    "clip_denoised of text": (scheduler(clip_denoised="yes"), "clip_denoised"),
    "another scheduler": (scheduler(_class_name="DDPMScheduler"), "DDPMScheduler"),
    "shards outside the folder": (sharded_index(**{"conv_in.weight": f"../{WEIGHTS}"}), "not a plain file name"),
    "shards by an absolute path": (sharded_index(**{"conv_in.weight": f"/tmp/{WEIGHTS}"}), "not a plain file name"),
    "shards that are missing": (sharded_index(**{"conv_in.weight": "absent.safetensors"}), "absent.safetensors"),
    "an index of nothing": (sharded_index(), "weight_map"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_source(name, source, out):
    damage, says = BAD_SOURCES[name]
    damage(source)
    with pytest.raises(ModelError, match=says) as caught:
        convert(source, out)
    assert caught.value.exit_code == 3
    assert str(source) in str(caught.value)  # the message names the file or folder
    assert tree(out.parent) == {}


def test_source_that_is_not_there(tmp_path, out):
    with pytest.raises(ModelError, match="no such file or folder"):
        convert(tmp_path / "absent", out)


def test_source_that_is_native_already(converted, out):
    with pytest.raises(UsageError, match="native"):
        convert(converted, out)


BAD_FLAT = {
    "unknown family": ({"encoder.weight": torch.zeros(2)}, r"\(encoder.weight, ...\) belong to no known family"),
    "diffusers' names alone": ({"down_blocks.0.x": torch.zeros(2)}, "no config.json beside it"),
    "half an OpenAI model": (
        {
            "time_embed.0.weight": torch.zeros(256, 64),
            "input_blocks.0.0.weight": torch.zeros(64, 3, 3, 3),
            "out.2.weight": torch.zeros(3, 64, 3, 3),
        },
        "middle_block.1.qkv.weight is missing",
    ),
    "an OpenAI model of scalars": (
        dict.fromkeys(["time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"], torch.tensor(0.0)),
        "input_blocks.0.0.weight",
    ),
}


@pytest.mark.parametrize("name", BAD_FLAT)
def test_bad_flat_checkpoint(name, tmp_path, out):
    state, says = BAD_FLAT[name]
    torch.save(state, tmp_path / "flat.pt")
    with pytest.raises(ModelError, match=says) as caught:
        convert(tmp_path / "flat.pt", out)
    assert "flat.pt" in caught.value.what
    assert tree(out.parent) == {}


def test_flat_pointer(tmp_path, out):
    lfs_pointer(tmp_path / "cd_imagenet64_l2.pt")
    with pytest.raises(ModelError, match="git-lfs pointer"):
        convert(tmp_path / "cd_imagenet64_l2.pt", out)


# --- writing


def test_an_existing_result_is_not_overwritten(published, out):
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(DiskError, match="exists already") as caught:
        convert(published, out)
    assert caught.value.exit_code == 6
    assert "--overwrite" in caught.value.hint
    assert tree(out) == {"mine": b"kept"}


def test_a_link_to_nowhere_is_in_the_way_too(published, out):
    out.symlink_to("nowhere")
    with pytest.raises(DiskError, match="exists already"):
        convert(published, out)
    assert out.is_symlink()
    convert(published, out, Options(overwrite=True))
    assert not out.is_symlink()
    assert list(out.parent.iterdir()) == [out]


def test_an_existing_result_is_overwritten_on_request(published, out):
    out.mkdir()
    (out / "mine").write_text("gone")
    convert(published, out, Options(overwrite=True))
    assert "mine" not in tree(out)
    assert_same(weights_of(out), expected_weights(shared_unet("conditional")))
    assert [path.name for path in out.parent.iterdir()] == ["native"]


@pytest.mark.parametrize("inside", [".", "unet", f"unet/{WEIGHTS}"])
def test_a_source_within_the_result_is_not_overwritten(inside, source):
    before = tree(source)
    with pytest.raises(UsageError, match="holds the source"):
        convert(source / inside, source, Options(overwrite=True))
    assert tree(source) == before


def test_a_source_within_the_result_behind_a_link(source, tmp_path):
    (tmp_path / "link").symlink_to(source / "unet")
    with pytest.raises(UsageError, match="holds the source"):
        convert(tmp_path / "link", source, Options(overwrite=True))


def test_folders_above_the_result_are_made(published, tmp_path):
    convert(published, tmp_path / "a" / "b" / "native")
    assert mlx_cm.load(tmp_path / "a" / "b" / "native").schedule.num_scales == 40


def test_no_space_is_said_before_anything_is_written(published, out, monkeypatch):
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(DiskError, match="GB free"):
        convert(published, out)
    assert tree(out.parent) == {}


def test_a_file_size_limit(published, out):
    script = """
import resource, sys
from mlx_cm.convert import convert
from mlx_cm.errors import DiskError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    convert(sys.argv[1], sys.argv[2])
except DiskError as error:
    sys.exit(f"{error.exit_code} {error}")
"""
    done = subprocess.run([sys.executable, "-c", script, published, out], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("6 ")
    assert "allowed size" in done.stderr
    assert list(out.parent.iterdir()) == []


SMALL = CONDITIONAL | {
    "block_out_channels": (8,),
    "norm_num_groups": 2,
    "attn_norm_num_groups": 2,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


@pytest.mark.parametrize(("error", "late"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwritten"])
def test_a_failure_at_any_point_leaves_nothing_half_done(existing, error, late, tmp_path, out):
    make_unet(SMALL).save_pretrained(tmp_path / "unet")
    old = {"model_index.json": b"{}", "unet/old": b"old"}

    def attempt(at: int) -> list[str]:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        for name, data in old.items() if existing else ():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, at, error, late)
            convert(tmp_path / "unet", out, Options(overwrite=existing, verify=True))
        return failing.done

    steps = attempt(-1)
    assert {"mkdir", "open", "write", "fsync", "replace"} == set(steps)
    complete = tree(out)
    expected = DiskError if isinstance(error, OSError) else KeyboardInterrupt
    # Of the many writes of tensors the first, the last and a few between.
    writes = [at for at, name in enumerate(steps) if name == "write"]
    chosen = {*writes[:4], *writes[4:-4:10], *writes[-4:]}
    for at, name in enumerate(steps):
        if name == "write" and at not in chosen:
            continue
        with pytest.raises(expected):
            attempt(at)
        # Once the folder has its name, it is complete whatever comes after.
        renamed = steps[: at + late].count("replace") == steps.count("replace")
        assert tree(out.parent) == {
            f"native/{key}": value for key, value in (complete if renamed else old if existing else {}).items()
        }, (at, name)
        assert len(list(out.parent.iterdir())) == (1 if renamed or existing else 0)


def test_verification_finds_what_the_disk_changed(published, out, monkeypatch):
    real = model_folder.write_safetensors

    def corrupting(path, tensors, metadata):
        digest = real(path, tensors, metadata)
        with Path(path).open("rb+") as file:
            file.seek(-5, os.SEEK_END)
            byte = file.read(1)
            file.seek(-5, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return digest

    monkeypatch.setattr(model_folder, "write_safetensors", corrupting)
    with pytest.raises(ModelError, match="differs from the source"):
        convert(published, out, Options(verify=True))
    assert tree(out.parent) == {}


def test_shards_load_as_one_file_does(published, converted, out, monkeypatch):
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 30_000)
    convert(published, out, Options(verify=True))
    shards = sorted(path.name for path in (out / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all((out / "unet" / name).stat().st_size < 60_000 for name in shards)
    index = json.loads((out / "unet" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights_of(out).values())
    assert_same(weights_of(out), weights_of(converted))
    assert set(read_model_index(out).weights) == {f"unet/{name}" for name in shards}

    (out / "unet" / shards[1]).unlink()
    with pytest.raises(ModelError, match=shards[1]):
        mlx_cm.load(out)


# --- reading a native folder


def change_native(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "unet" / "model.safetensors"
        state = safetensors.numpy.load_file(path)
        change(state)
        safetensors.numpy.save_file(state, path, metadata=check_safetensors(path))

    return damage


def other_layout(folder: Path) -> None:
    path = folder / "unet" / "model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata={"format": "pt"})


def native_json(name: str, **changes):
    return lambda folder: edit_json(folder / name, **changes)


BAD_NATIVE = {
    "tensor missing": (change_native(lambda state: state.pop("conv_in.bias")), "conv_in.bias is missing"),
    "tensor renamed": (
        change_native(lambda state: state.update({"conv_on.bias": state.pop("conv_in.bias")})),
        "conv_in.bias is missing; conv_on.bias is not known",
    ),
    "tensor of another shape": (
        change_native(lambda state: state.update({"conv_in.bias": np.zeros(3, np.float32)})),
        r"conv_in.bias: expected \(16,\), got \(3,\)",
    ),
    "all tensors missing": (change_native(dict.clear), r"is missing(; .* is missing){9}; and \d+ more"),
    "not in native layout": (other_layout, "not in native layout"),
    "weights gone": (lambda folder: (folder / "unet" / "model.safetensors").unlink(), "file is missing"),
    "weights are a pointer": (lambda folder: lfs_pointer(folder / "unet" / "model.safetensors"), "git-lfs pointer"),
    "config gone": (lambda folder: (folder / "unet" / "config.json").unlink(), "file is missing"),
    "config of another size": (native_json("unet/config.json", layers_per_block=2), "is missing"),
    "config with an unknown setting": (native_json("unet/config.json", extra=1), "does not know extra"),
    "unknown model": (native_json("unet/config.json", _class_name="UNet4D"), "UNet4D"),
    "unknown schedule": (native_json("scheduler/scheduler_config.json", _class_name="Cosine"), "Cosine"),
    "schedule that means nothing": (native_json("scheduler/scheduler_config.json", sigma_min=-1.0), "sigma_min"),
    "schedule gone": (lambda folder: shutil.rmtree(folder / "scheduler"), "file is missing"),
    "later format": (native_json("model_index.json", _format_version=99), "format version 99"),
    "model class is a list": (native_json("unet/config.json", _class_name=["UNet2D"]), "UNet2D"),
    "schedule class is a list": (native_json("scheduler/scheduler_config.json", _class_name=["X"]), "X"),
    "part is a list": (native_json("model_index.json", unet=["mlx_cm", ["UNet2D"]]), "unet"),
    "part without a name": (native_json("model_index.json", **{"": ["mlx_cm", "X"]}), "unknown entry ''"),
    "config of an impossible size": (native_json("unet/config.json", num_class_embeds=2**31), "num_class_embeds"),
    "unknown part": (native_json("model_index.json", unet=["mlx_cm", "UNet4D"]), "unet"),
    "unknown pipeline": (native_json("model_index.json", _class_name="NoSuchPipeline"), "NoSuchPipeline"),
    "nameless pipeline": (native_json("model_index.json", _class_name=7), "_class_name"),
    "settings are a list": (native_json("model_index.json", sampler=[]), "sampler"),
    "unknown sampler setting": (native_json("model_index.json", sampler={"speed": 9}), "speed"),
    "unknown preset": (native_json("model_index.json", sampler={"preset": "cd-dogs"}), "cd-dogs"),
}


@pytest.mark.parametrize("name", BAD_NATIVE)
def test_bad_native_folder(name, native):
    damage, says = BAD_NATIVE[name]
    damage(native)
    with pytest.raises(ModelError, match=says) as caught:
        mlx_cm.load(native)
    assert str(native) in str(caught.value)


def test_truncated_native_weights(native):
    path = native / "unet" / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            mlx_cm.load(native)


def test_bits_flipped_in_the_header_of_native_weights(native, converted):
    """Each is refused, or hits nothing that matters: the notes, or the blanks after the header."""
    path = native / "unet" / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    right = weights_of(converted)
    rng = np.random.default_rng(0)
    refused = 0
    for position in [*range(8), *(8 + rng.integers(0, header, 150))]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            weights = weights_of(native)
        except ModelError:
            refused += 1
            continue
        assert_same(weights, right)
    assert refused > 140


def test_a_component_alone(converted, published):
    native_component = mlx_cm.load_component(converted / "unet", "float32")
    foreign_component = mlx_cm.load_component(published / "unet", "float32")
    expected = native_unet(shared_unet("conditional"))
    for component in (native_component, foreign_component):
        assert component.config == expected.config
        assert_same(dict(tree_flatten(component.parameters())), dict(tree_flatten(expected.parameters())))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parts_that_need_float32_have_it(dtype, converted):
    model = load_model(converted / "unet", dtype)
    wanted = getattr(mx, dtype)
    for name, value in tree_flatten(model.parameters()):
        assert value.dtype == (mx.float32 if name.startswith(model.float32_parts) else wanted), name
    assert not model.training


def test_unknown_dtype(converted):
    with pytest.raises(UsageError, match="expected one of float32, float16, bfloat16"):
        mlx_cm.load(converted, dtype="int8")


def test_reference_pipeline_reads_its_own_folder(published):
    """The fixture is what diffusers takes for a pipeline, not something that only looks like one."""
    assert ConsistencyModelPipeline.from_pretrained(published).unet.config.num_class_embeds == 10
