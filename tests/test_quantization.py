"""Quantised linear layers: which, how exact, and stored so that nothing can be mistaken for something else."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from latent_configs import PUBLISHED, SDXL, shrink
from mlx.utils import tree_flatten

from mlx_cm.config import config_from_dict
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.model_folder import (
    ModelIndex,
    load_model,
    load_stored,
    read_model_index,
    stored_quantization,
    tensor_sources,
    write_component,
    write_model_index,
    write_schedule,
)
from mlx_cm.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_cm.models.clip_text import CLIPTextConfig, CLIPTextModel
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.quantization import (
    Quantization,
    dequantize_model,
    in_device_form,
    plan_quantization,
    quantization_of,
    quantize_model,
)
from mlx_cm.rewriting import quantize_folder
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import read_json, sha256_file

# The layout of SDXL, with every width that matters: divisible by 64 (128, 192), by 32 only (32, 96), by neither (24).
UNET = UNet2DConditionConfig(
    block_out_channels=(32, 128, 96),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 1, 2),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=24,
    norm_num_groups=4,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
    time_cond_proj_dim=32,
)
CLIP = CLIPTextConfig(
    architectures=("CLIPTextModelWithProjection",),
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    projection_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    eos_token_id=49,
)
VAE = AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4)


def build(config, seed: int = 0) -> nn.Module:
    """A model whose every parameter is random."""
    kinds = {UNet2DConditionConfig: UNet2DCondition, CLIPTextConfig: CLIPTextModel, AutoencoderKLConfig: AutoencoderKL}
    mx.random.seed(seed)
    model = kinds[type(config)](config)
    rng = np.random.default_rng(seed)
    changed = [
        (name, value + 0.02 * mx.array(rng.standard_normal(value.shape, dtype=np.float32)))
        for name, value in tree_flatten(model.parameters())
    ]
    mx.eval([value for _, value in changed])
    model.load_weights(changed)
    return model.eval()


def evaluate(model: nn.Module) -> mx.array:
    """One evaluation of either model, on fixed inputs."""
    rng = np.random.default_rng(1)
    if isinstance(model, CLIPTextModel):
        out = model(mx.array(rng.integers(0, 50, (2, 9))))
        return mx.concatenate([out.last_hidden_state.flatten(), out.text_embeds.flatten()])
    draw = lambda *shape: mx.array(rng.standard_normal(shape, dtype=np.float32))  # noqa: E731
    sizes = mx.array([[64.0, 48, 0, 0, 64, 48]])
    return model(
        draw(1, 9, 11, 4),
        499.0,
        draw(1, 5, 24),
        timestep_cond=draw(1, 32),
        text_embeds=draw(1, 16),
        time_ids=sizes,
    )


def relative_error(ours: mx.array, theirs: mx.array) -> float:
    assert mx.isfinite(ours).all().item()
    return (mx.linalg.norm(ours - theirs) / mx.linalg.norm(theirs)).item()


def layers(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, kind)}


# Measured: 0.0063 and 0.107 of the U-Net, 0.0073 and 0.144 of the text encoder.
@pytest.mark.parametrize(
    ("config", "bits", "limit"), [(UNET, 8, 0.01), (UNET, 4, 0.15), (CLIP, 8, 0.01), (CLIP, 4, 0.2)]
)
def test_error_of_the_output(config, bits, limit):
    model = build(config)
    exact = evaluate(model)
    error = relative_error(evaluate(dequantize_model(quantize_model(model, bits))), exact)
    assert limit / 10 < error < limit


@pytest.mark.parametrize("config", [UNET, CLIP])
def test_which_layers_stay_float(config):
    model = build(config)
    linear = layers(model, nn.Linear)
    others = {path: type(module) for path, module in model.named_modules() if path not in linear}
    quantize_model(model, 4)
    packed, left = layers(model, nn.QuantizedLinear), layers(model, nn.Linear)
    assert packed | left == linear and packed
    assert {path: type(module) for path, module in model.named_modules() if path in others} == others
    if config is CLIP:
        assert left == {"text_projection"}
        return
    embeddings = {f"{part}.{leaf}" for part in ("time_embedding", "add_embedding") for leaf in ("linear_1", "linear_2")}
    embeddings |= {"time_embedding.cond_proj"} | {path for path in linear if path.endswith("time_emb_proj")}
    narrow = {path for path in linear if path.endswith(("attn2.to_k", "attn2.to_v"))}  # the text states are 24 wide
    assert left == embeddings | narrow
    assert len(narrow) == 2 * sum(path.endswith("attn2.to_q") for path in linear)


def test_group_sizes_follow_the_input_width():
    model = quantize_model(build(UNET), 8)
    sizes = {(module.weight.shape[1] * 4, module.group_size) for module in model.modules() if "scales" in module}
    assert sizes == {(96, 32), (128, 64), (384, 64), (512, 64)}


@pytest.mark.parametrize("config", [UNET, CLIP])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_layers_compute_what_packed_ones_do(config, bits):
    model = quantize_model(build(config), bits)
    packed = evaluate(model)
    assert layers(model, nn.QuantizedLinear)
    unpacked = evaluate(dequantize_model(model))
    assert not layers(model, nn.QuantizedLinear)
    assert relative_error(unpacked, packed) < 1e-5


def test_values_are_rounded_to_the_nearest_step():
    model = build(CLIP)
    attention = model.text_model.encoder.layers[1].self_attn
    before = attention.q_proj.weight
    quantize_model(model, 4)
    packed = attention.q_proj
    error = mx.abs(dequantize_model(model).text_model.encoder.layers[1].self_attn.q_proj.weight - before)
    steps = error / mx.repeat(mx.abs(packed.scales), 64, axis=1)
    assert steps.max().item() < 1, "at the end of the range, which MLX shifts so that zero is exact; 1/2 elsewhere"
    assert mx.mean(steps).item() == pytest.approx(0.25, abs=0.02)
    assert attention.q_proj.bias is packed.bias


def test_device_form(monkeypatch):
    on_cpu = in_device_form(quantize_model(build(CLIP), 4))
    assert layers(on_cpu, nn.QuantizedLinear) == set()
    monkeypatch.setattr("mlx_cm.quantization.on_gpu", lambda: True)
    on_gpu = in_device_form(quantize_model(build(CLIP), 4))
    assert len(layers(on_gpu, nn.QuantizedLinear)) == 12
    assert relative_error(evaluate(on_cpu), evaluate(on_gpu)) < 1e-5


@pytest.mark.parametrize("bits", [0, 2, 3, 6, 16, True])
def test_other_bits_are_refused(bits, tmp_path):
    with pytest.raises(UsageError, match="expected one of 4, 8 bits"):
        quantize_model(build(CLIP), bits)
    with pytest.raises(UsageError, match="expected one of 4, 8 bits"):
        quantize_folder(tmp_path, tmp_path / "out", bits)


@pytest.mark.parametrize("unpack", [False, True])
def test_quantising_twice_is_refused(unpack):
    model = quantize_model(build(CLIP), 8)
    with pytest.raises(ModelError, match="CLIPTextModel: is quantised to 8 bits already"):
        quantize_model(dequantize_model(model) if unpack else model, 4)


def test_models_of_convolutions_are_refused():
    pixel = UNet2D(UNet2DConfig(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                up_block_types=("UpBlock2D",)))  # fmt: skip
    for model in (AutoencoderKL(VAE), pixel):
        with pytest.raises(UsageError, match="too few linear layers"):
            quantize_model(model, 8)


# Bytes of the published U-Nets with float16 around packed layers, from shapes alone.
@pytest.mark.parametrize(
    ("name", "bits", "gigabytes"),
    [("SDXL", 4, 1.976), ("SDXL", 8, 3.080), ("SD1.5", 4, 1.375), ("SD2.1", 8, 1.480)],
)
def test_published_sizes(name, bits, gigabytes):
    config, parameters, _ = PUBLISHED[name]
    config = config_from_dict(UNet2DConditionConfig, config, name)
    model = UNet2DCondition(config)
    plan = plan_quantization(model, bits)
    assert set(plan.exceptions.values()) == {0}, "64 divides every width of the published models"
    saved = 0
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and plan.group_size_of(path):
            saved += math.prod(layer.weight.shape) * (16 - bits) // 8 - 2 * 2 * math.prod(layer.weight.shape) // 64
    kept = sum(value.size for name, value in tree_flatten(model.parameters()) if name.startswith(model.float32_parts))
    total = 2 * parameters + 2 * kept - saved
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.001)


# Files.


def save(folder, model):
    write_component(folder, model.config, tensor_sources(model), quantization_of(model))


@pytest.mark.parametrize("config", [UNET, CLIP])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_round_trip_is_bit_equal(tmp_path, config, dtype):
    model = build(config)
    model.set_dtype(dtype)
    quantize_model(model, 4)
    save(tmp_path, model)
    loaded = load_stored(tmp_path)
    assert quantization_of(loaded) == quantization_of(model)
    expected, found = dict(tree_flatten(model.parameters())), dict(tree_flatten(loaded.parameters()))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and mx.array_equal(found[name], value).item(), name
    with_scales = {name for name in found if name.endswith(".scales")}
    assert with_scales and all(found[name.replace("scales", "weight")].dtype == mx.uint32 for name in with_scales)
    assert mx.array_equal(evaluate(load_model(tmp_path, "float32")), evaluate(load_model(tmp_path, "float32"))).item()


def test_loading_computes_with_the_quantised_values(tmp_path, monkeypatch):
    model = quantize_model(build(UNET), 8)
    save(tmp_path, model)
    expected = evaluate(model)
    on_cpu = load_model(tmp_path)
    assert layers(on_cpu, nn.QuantizedLinear) == set() and not on_cpu.training
    assert relative_error(evaluate(on_cpu), expected) < 1e-5
    with pytest.raises(ModelError, match="is quantised to 8 bits already"):
        quantize_model(on_cpu, 8)
    monkeypatch.setattr("mlx_cm.quantization.on_gpu", lambda: True)
    on_gpu = load_model(tmp_path, "float16")
    assert layers(on_gpu, nn.QuantizedLinear) == layers(model, nn.QuantizedLinear)
    dtypes = {name: value.dtype for name, value in tree_flatten(on_gpu.parameters())}
    assert dtypes["mid_block.attentions.0.proj_in.scales"] == mx.float16
    assert dtypes["mid_block.attentions.0.proj_in.weight"] == mx.uint32
    assert dtypes["time_embedding.linear_1.weight"] == mx.float32


def edit_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("quantization"), r"another quantization \(\{.*\}\) than config.json says \(none\)"),
        (lambda v: v["quantization"].update(bits=8), "another quantization"),
        (lambda v: v["quantization"].update(group_size=32), "another quantization"),
        (lambda v: v["quantization"].update(bits=3), r"bits: expected one of \[4, 8\], got 3"),
        (lambda v: v["quantization"].update(bits="4"), "bits: expected int"),
        (lambda v: v["quantization"].pop("bits"), "bits"),
        (lambda v: v["quantization"].update(group_size=48), "group_size: expected one of"),
        (lambda v: v["quantization"].update(mode="mxfp4"), "does not know mode"),
        (
            lambda v: v["quantization"]["exceptions"].update({"nothing": 0}),
            "nothing: CLIPTextModel has no linear layer",
        ),
        (lambda v: v["quantization"]["exceptions"].update({"text_projection": 16}), "expected a group size of"),
        (lambda v: v["quantization"]["exceptions"].clear() or v.update(hidden_size=32), "32 inputs cannot be split"),
        (lambda v: v.update(quantization=4), "expected an object, got 4"),
    ],
)
def test_mismatched_configs_are_refused(tmp_path, change, message):
    save(tmp_path, quantize_model(build(CLIP), 4))
    edit_config(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_other_tensors_than_announced_are_refused(tmp_path):
    plan = plan_quantization(build(CLIP), 4)
    plain = build(CLIP)
    write_component(tmp_path, CLIP, tensor_sources(plain), plan)
    with pytest.raises(ModelError, match=r"scales is missing"):
        load_model(tmp_path)
    packed = quantize_model(build(CLIP), 4)
    write_component(tmp_path, CLIP, tensor_sources(packed), None)
    with pytest.raises(ModelError, match="scales is not known to this model"):
        load_model(tmp_path)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    packed.text_model.encoder.layers[0].mlp.fc1.weight = packed.text_model.encoder.layers[0].mlp.fc1.weight.astype(
        mx.float32
    )
    write_component(tmp_path, CLIP, tensor_sources(packed), plan)
    with pytest.raises(ModelError, match=rf"{name}: expected mlx.core.uint32, got mlx.core.float32"):
        load_model(tmp_path)
    plain.text_projection.weight = plain.text_projection.weight.view(mx.uint32)
    write_component(tmp_path, CLIP, tensor_sources(plain), None)
    with pytest.raises(ModelError, match=r"text_projection.weight: expected mlx.core.float32, got mlx.core.uint32"):
        load_model(tmp_path)


# Whole models.


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A native latent model in float16."""
    folder = tmp_path_factory.mktemp("native") / "model"
    weights = {}
    for part, config in {"unet": UNET, "text_encoder": CLIP, "vae": VAE}.items():
        model = build(config)
        model.set_dtype(mx.float16)
        digests = write_component(folder / part, config, tensor_sources(model))
        weights |= {f"{part}/{name}": digest for name, digest in digests.items()}
    write_schedule(folder / "scheduler", DiscreteSchedule())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "README.md").write_text("a model")
    components = {
        "unet": "UNet2DCondition",
        "text_encoder": "CLIPTextModel",
        "vae": "AutoencoderKL",
        "scheduler": "DiscreteSchedule",
    }
    index = ModelIndex("LatentConsistencyModelPipeline", components, {"steps": 4}, {"source": "a/b"}, weights)
    write_model_index(folder, index)
    return folder


def test_quantising_a_folder(tmp_path, model_folder):
    destination = quantize_folder(model_folder, tmp_path / "q4", 4)
    before, after = read_model_index(model_folder), read_model_index(destination)
    assert (after.pipeline, after.components, after.sampler) == (before.pipeline, before.components, before.sampler)
    assert after.provenance["source"] == "a/b"
    step = after.provenance["quantization"]
    assert (step["bits"], step["components"]) == (4, ["unet", "text_encoder"])
    assert step["weights"].items() == {k: v for k, v in before.weights.items() if not k.startswith("vae")}.items()
    assert after.weights == {path: sha256_file(destination / path) for path in before.weights}
    for name in ("vae/model.safetensors", "vae/config.json", "tokenizer/merges.txt", "README.md"):
        assert (destination / name).read_bytes() == (model_folder / name).read_bytes()
    assert (destination / "scheduler" / "scheduler_config.json").is_file()
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))

    assert stored_quantization(destination / "unet") == plan_quantization(build(UNET), 4)
    assert stored_quantization(destination / "vae") is None
    stored = load_stored(destination / "unet")
    expected = load_stored(model_folder / "unet")
    quantize_model(expected, 4)
    for (name, ours), (_, theirs) in zip(
        tree_flatten(stored.parameters()), tree_flatten(expected.parameters()), strict=True
    ):
        assert ours.dtype == theirs.dtype and mx.array_equal(ours, theirs).item(), name
    assert read_json(destination / "unet" / "config.json")["quantization"]["bits"] == 4


def test_folders_that_cannot_be_quantised(tmp_path, model_folder):
    quantised = quantize_folder(model_folder, tmp_path / "q8", 8)
    with pytest.raises(ModelError, match="is quantised to 8 bits already"):
        quantize_folder(quantised, tmp_path / "again", 8)
    with pytest.raises(DiskError, match="exists already"):
        quantize_folder(model_folder, quantised, 8)
    for inside in (model_folder, model_folder / "q", model_folder.parent):
        with pytest.raises(UsageError, match="is the source, or one of the two is inside the other"):
            quantize_folder(model_folder, inside, 8, overwrite=True)
    with pytest.raises(ModelError, match="file is missing"):
        quantize_folder(tmp_path / "nothing", tmp_path / "out", 8)
    lone = tmp_path / "vae only"
    lone.mkdir()
    write_model_index(lone, ModelIndex("P", {"vae": "AutoencoderKL"}, {}, {}, {}))
    with pytest.raises(UsageError, match="no component that gains by it"):
        quantize_folder(lone, tmp_path / "out", 8)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(tmp_path, model_folder, monkeypatch):
    def fail(*_):
        raise ModelError("unet", "cannot be read")

    monkeypatch.setattr("mlx_cm.rewriting.load_stored", fail)
    with pytest.raises(ModelError, match="cannot be read"):
        quantize_folder(model_folder, tmp_path / "q4", 4)
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path, model_folder):
    quantize_folder(model_folder, tmp_path / "q", 8)
    quantize_folder(model_folder, tmp_path / "q", 4, overwrite=True)
    assert stored_quantization(tmp_path / "q" / "unet").bits == 4


def test_the_layout_of_sdxl_survives_a_folder_of_its_own_plan(tmp_path):
    """Exceptions of every kind: float, groups of 32, and the default, read back from the file alone."""
    config = config_from_dict(UNet2DConditionConfig, shrink(SDXL), "SDXL")
    plan = plan_quantization(UNet2DCondition(config), 8)
    assert config_from_dict(Quantization, json.loads(json.dumps(vars(plan))), "plan") == plan
