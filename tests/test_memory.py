"""Estimates of memory: against what was measured, against arithmetic, and as reasons to refuse."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from latent_configs import LCM_DREAMSHAPER, PUBLISHED, SDXL, shrink
from measured_peaks import CASES
from mlx.utils import tree_flatten

from mlx_cm import memory
from mlx_cm.config import config_from_dict
from mlx_cm.errors import MemoryBudgetError, UsageError
from mlx_cm.loading import check_memory
from mlx_cm.memory import Estimate, Map, available_memory, check_budget, estimate, peak_values, weight_bytes
from mlx_cm.model_folder import MODELS, ModelIndex, tensor_sources, write_component, write_model_index
from mlx_cm.models.autoencoder_kl import SD_VAE, SDXL_VAE
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.models.unet2d import IMAGENET_64
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.pipelines.latent import TILE
from mlx_cm.quantization import quantization_of, quantize_model

CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
BIG_G = CLIPTextConfig(
    architectures=("CLIPTextModelWithProjection",),
    hidden_size=1280,
    intermediate_size=5120,
    num_attention_heads=20,
    num_hidden_layers=32,
    projection_dim=1280,
    hidden_act="gelu",
)


def unet(values: dict) -> UNet2DConditionConfig:
    return config_from_dict(UNet2DConditionConfig, values, "config.json")


SD = {"unet": unet(LCM_DREAMSHAPER), "text_encoder": CLIP_L, "vae": SD_VAE}
XL = {"unet": unet(SDXL), "text_encoder": CLIP_L, "text_encoder_2": BIG_G, "vae": SDXL_VAE}


@pytest.fixture
def gpu(monkeypatch):
    """What the estimate assumes of a GPU; nothing is computed on one."""
    monkeypatch.setattr(memory, "on_gpu", lambda: True)


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    script = Path(__file__).with_name("measured_peaks.py")
    path = os.pathsep.join([str(script.parent), str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, check=True)
    return dict(zip((case.name for case in CASES), json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_activations_are_as_measured(case, measured):
    config = config_from_dict(MODELS[case.kind][1], case.config, case.name)
    assert 4 * peak_values(config, Map(*case.size)) == pytest.approx(measured[case.name], rel=0.25)


# Peaks of one call at full size, measured once on a CPU in float32, in MB.
@pytest.mark.parametrize(
    ("config", "size", "megabytes"),
    [(SD["unet"], (1, 32, 32), 107.3), (SD_VAE, (1, 32, 32), 593.8), (CLIP_L, (1, 77, 1), 6.4)],
    ids=["LCM Dreamshaper, 256 pixels", "SD autoencoder, 256 pixels", "CLIP-L"],
)
def test_activations_of_full_size_models(config, size, megabytes):
    assert 4 * peak_values(config, Map(*size)) / 1e6 == pytest.approx(megabytes, rel=0.15)


def test_more_images_and_pixels_take_more():
    previous = 0
    for size in (Map(1, 16, 16), Map(1, 24, 16), Map(1, 32, 32), Map(2, 32, 32), Map(4, 64, 64)):
        values = peak_values(SD["unet"], size)
        assert values > previous
        previous = values


def test_a_gpu_stores_no_scores_for_heads_that_its_kernel_takes(monkeypatch):
    size = Map(1, 64, 64)
    scores = 8 * 4096**2
    on_cpu = peak_values(SD["unet"], size)
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    assert on_cpu > scores > 2 * peak_values(SD["unet"], size)  # heads of 40, 80; those of 160 are on small maps
    wide = dataclasses.replace(SD["unet"], attention_head_dim=(2, 8, 8, 8))
    assert peak_values(wide, size) > scores / 4  # heads of 160 on the widest map


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_weights_are_counted_from_shapes(name):
    config, parameters, _ = PUBLISHED[name]
    config = unet(config)
    assert weight_bytes(config, 4) == 4 * parameters
    model = MODELS["UNet2DCondition"][0](config)
    kept = sum(v.size for name, v in tree_flatten(model.parameters()) if name.startswith(model.float32_parts))
    assert weight_bytes(config, 2) == 2 * parameters + 2 * kept
    assert weight_bytes(config, 4, quantize=4) == 4 * parameters, "a CPU unpacks them"


@pytest.mark.parametrize(("bits", "gigabytes"), [(4, 1.97), (8, 3.08)])
def test_quantised_weights_on_a_gpu(gpu, bits, gigabytes):
    assert weight_bytes(XL["unet"], 2, bits) / 1e9 == pytest.approx(gigabytes, abs=0.02)
    assert weight_bytes(SDXL_VAE, 2, bits) == weight_bytes(SDXL_VAE, 2)


def test_parts_stored_in_bits_are_counted_so(gpu):
    plain, unet_only, all_parts = (
        estimate(SD, dtype="float16", quantize=bits).weights for bits in (None, {"unet": 8}, 8)
    )
    assert unet_only == plain | {"unet": all_parts["unet"]}
    assert all_parts["unet"] < plain["unet"] and all_parts["text_encoder"] < plain["text_encoder"]


def test_quantised_weights_are_as_many_as_in_memory(gpu):
    config = CLIPTextConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
    model = MODELS["CLIPTextModel"][0](config)
    model.set_dtype(mx.float16)
    quantize_model(model, 4)
    assert weight_bytes(config, 2, 4) == sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def test_stages_of_a_latent_model():
    given = estimate(SD, dtype="float32", width=512, height=512)
    total = sum(given.weights.values())
    assert list(given.weights) == list(SD)
    assert list(given.stages) == ["encode text", "denoise", "decode"]
    activations = {stage: peak - total for stage, peak in given.stages.items()}
    assert activations["encode text"] == pytest.approx(7e6, rel=0.2)
    assert activations["denoise"] == pytest.approx(0.69e9, rel=0.1)  # 0.54 GB of them attention scores
    assert activations["decode"] == pytest.approx(2.29e9, rel=0.1)  # measured: 2.13 GiB
    assert given.peak == given.stages["decode"]


def test_what_saves_memory_is_seen_to():
    def stages(**options):
        return estimate(XL, dtype="float32", **options).stages

    usual = stages()
    assert usual == stages(width=1024, height=1024, tiled=False), "the size it was trained on, which is decoded whole"
    assert stages(tiled=True)["decode"] < usual["decode"] - 5e9
    assert stages(vae="tiny")["decode"] < usual["decode"] - 1.5e9
    assert stages(width=512, height=512)["denoise"] < usual["denoise"]
    assert stages(guidance_batch=2)["denoise"] > usual["denoise"] == stages()["denoise"]
    assert stages(batch=2)["decode"] > usual["decode"]
    frugal = estimate(XL, dtype="float32", low_ram=True)
    for stage, parts in {"encode text": XL.keys() - {"unet", "vae"}, "denoise": {"unet"}, "decode": {"vae"}}.items():
        released = sum(size for part, size in frugal.weights.items() if part not in parts)
        assert frugal.stages[stage] == usual[stage] - released
    half = estimate(XL, dtype="bfloat16")
    assert half.weights["vae"] == estimate(XL, dtype="float32").weights["vae"] / 2
    assert half.stages["denoise"] < 0.51 * usual["denoise"]


def test_an_autoencoder_that_overflows_stays_in_float32():
    assert SD_VAE.force_upcast
    sturdy = SD | {"vae": dataclasses.replace(SD_VAE, force_upcast=False)}
    float32, upcast, half = (
        estimate(parts, dtype=dtype, low_ram=True)
        for parts, dtype in ((SD, "float32"), (SD, "float16"), (sturdy, "float16"))
    )
    assert upcast.stages["decode"] == float32.stages["decode"] == pytest.approx(2 * half.stages["decode"], rel=1e-9)
    assert upcast.stages["denoise"] == half.stages["denoise"]


def test_tiles_bound_the_decoder():
    """Twice the side costs the picture, not the work of the decoder."""
    small, large = (estimate(SD, dtype="float32", width=side, height=side, tiled=True) for side in (1024, 2048))
    assert large == estimate(SD, dtype="float32", width=2048, height=2048), "beyond 1024 pixels without being asked"
    grown = large.stages["decode"] - small.stages["decode"]
    assert grown == 2 * 4 * 3 * (2048**2 - 1024**2)
    one_tile = estimate(SD, dtype="float32", width=8 * TILE, height=8 * TILE)
    assert small.stages["decode"] - one_tile.stages["decode"] == 2 * 4 * 3 * 1024**2


def test_a_pixel_model_has_one_stage():
    given = estimate({"unet": IMAGENET_64}, dtype="float32", batch=4)
    assert list(given.stages) == ["denoise"]
    activations = given.peak - given.weights["unet"]
    assert activations == pytest.approx(16 * peak_values(IMAGENET_64, Map(1, 64, 64)), rel=0.1)


def test_unknown_settings_are_refused(gpu):
    with pytest.raises(UsageError, match="dtype 'int8'"):
        estimate(SD, dtype="int8")
    with pytest.raises(UsageError, match="expected one of 4, 8 bits"):
        estimate(SD, quantize=5)


# Budgets.

NEEDED = Estimate({"unet": 3_400_000_000, "vae": 300_000_000}, {"denoise": 4_500_000_000, "decode": 6_250_000_000})


def test_what_fits_passes(monkeypatch):
    check_budget(NEEDED, 6.25)
    monkeypatch.setattr(memory, "available_memory", lambda: 6_250_000_000)
    check_budget(NEEDED)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_budget(NEEDED)


def test_what_does_not_fit_is_refused_with_numbers(monkeypatch):
    with pytest.raises(MemoryBudgetError) as refusal:
        check_budget(NEEDED, 6.2)
    assert str(refusal.value) == (
        "memory: needs an estimated 4.50 GB to denoise, 6.25 GB to decode "
        "(of which weights: unet 3.40 GB, vae 0.30 GB); allowed: 6.20 GB"
    )
    assert refusal.value.exit_code == 5
    assert refusal.value.hint == "--low-ram, --tiled, --vae tiny, a smaller --width and --height"
    monkeypatch.setattr(memory, "available_memory", lambda: 4_000_000_000)
    with pytest.raises(MemoryBudgetError, match=r"available: 4\.00 GB"):
        check_budget(NEEDED)
    check_budget(NEEDED, 7)  # the user's word goes above the machine's


@pytest.mark.parametrize(
    ("on_gpu", "stages", "hint"),
    [
        (True, {"denoise": 9, "decode": 5}, "--quantize 8, --low-ram, a smaller --width and --height"),
        (False, {"denoise": 9, "decode": 5}, "--low-ram, a smaller --width and --height"),
        (False, {"encode text": 9, "denoise": 5}, "--low-ram"),
        (True, {"denoise": 9}, "a smaller --batch"),
    ],
)
def test_only_what_helps_is_advised(monkeypatch, on_gpu, stages, hint):
    monkeypatch.setattr(memory, "on_gpu", lambda: on_gpu)
    with pytest.raises(MemoryBudgetError) as refusal:
        check_budget(Estimate({}, {stage: size * 10**9 for stage, size in stages.items()}), 8)
    assert refusal.value.hint == hint


@pytest.mark.parametrize("amount", [0, -1, float("nan"), float("inf")])
def test_impossible_budgets_are_refused(amount):
    with pytest.raises(UsageError, match="max_memory"):
        check_budget(NEEDED, amount)


def test_available_memory():
    found = available_memory()
    assert isinstance(found, int)
    assert 10**8 < found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"memory_size": 16, "max_recommended_working_set_size": 12}, 12),
        ({"device_name": "NVIDIA", "total_memory": 24}, 24),
        ({"device_name": "unknown"}, None),
    ],
)
def test_available_memory_of_a_gpu(monkeypatch, gpu, info, expected):
    monkeypatch.setattr(memory.mx, "device_info", lambda: info)
    assert available_memory() == expected


def test_available_memory_without_proc(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(memory.Path, "read_text", absent)
    assert available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("bits", [None, 8])
def test_stored_bits_are_known_before_loading(tmp_path, gpu, bits):
    """A quantised folder is counted as it is, not refused for what it would take unpacked."""
    config = unet(shrink(LCM_DREAMSHAPER) | {"cross_attention_dim": 32, "block_out_channels": [32, 64, 64, 64]})
    model = MODELS["UNet2DCondition"][0](config)
    if bits is not None:
        quantize_model(model, bits)
    write_component(tmp_path / "unet", config, tensor_sources(model), quantization_of(model))
    write_model_index(tmp_path, ModelIndex("P", {"unet": "UNet2DCondition"}, {}, {}, {}))
    expected = weight_bytes(config, 2, bits)
    assert check_memory(tmp_path, dtype="float16", max_memory=1).weights == {"unet": expected}
    with pytest.raises(MemoryBudgetError):
        check_memory(tmp_path, dtype="float16", max_memory=expected / 1e9)
