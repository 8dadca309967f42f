"""LoRA: every dialect against diffusers and peft run live, fusing against its definition, and what is refused."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from latent_configs import SD15, SD21, SDXL, SSD_1B
from mlx.utils import tree_flatten
from parity import TOLERANCE, channels_last, copy_weights, randomise, relative_error
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers import CLIPTextModel as TorchCLIPTextModel

from mlx_cm.config import config_from_dict
from mlx_cm.convert.adapters import load_adapter, sampler_hint, to_kohya, to_peft
from mlx_cm.convert.keymaps.lora import ldm_names
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.lora import (
    LCM_LORA_TARGETS,
    Adapter,
    LoraLayer,
    adaptable_modules,
    delta,
    fuse,
    fuse_adapters,
    lora_targets,
    parse_lora_ref,
)
from mlx_cm.models.clip_text import CLIPTextConfig, CLIPTextModel
from mlx_cm.models.layers import Conv2d
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig

# Transformers entered by 1x1 convolutions, as in SD 1.5.
TINY = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
# Transformers entered by linear layers, attention at the lower level, sizes and pooled text as conditions, as in SDXL.
TINY_XL = TINY | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 5 + 6 * 4,
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "eos_token_id": 19,
    "bos_token_id": 18,
    "pad_token_id": 0,
    "projection_dim": 10,
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small torch's threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet_config(config: dict) -> UNet2DConditionConfig:
    return config_from_dict(UNet2DConditionConfig, config, "config.json")


def torch_unet(config: dict) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return randomise(UNet2DConditionModel(**config))


def torch_text() -> TorchCLIPTextModel:
    torch.manual_seed(1)
    return randomise(TorchCLIPTextModel(TorchCLIPTextConfig(**TEXT)))


def native_unet(reference: UNet2DConditionModel, config: dict) -> UNet2DCondition:
    return copy_weights(UNet2DCondition(unet_config(config)), reference)


def native_text(reference: TorchCLIPTextModel) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig(architectures=("CLIPTextModel",), **TEXT))
    state = {"text_model." + key.removeprefix("text_model."): value for key, value in reference.state_dict().items()}
    known = dict(tree_flatten(model.parameters()))
    model.load_weights([(key, channels_last(value)) for key, value in state.items() if key in known], strict=True)
    return model


def models(config: dict = TINY) -> dict[str, nn.Module]:
    """A U-Net and a text encoder, the same every time."""
    mx.random.seed(7)
    text = CLIPTextModel(CLIPTextConfig(architectures=("CLIPTextModel",), **TEXT))
    return {"unet": UNet2DCondition(unet_config(config)), "text_encoder": text}


def modules(parts: dict[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {name: adaptable_modules(model) for name, model in parts.items()}


def random_layer(path: str, shape: tuple[int, ...], rank: int, alpha: float, rng: np.random.Generator) -> LoraLayer:
    down = rng.standard_normal((rank, *shape[1:])).astype(np.float32) * 0.3
    up = rng.standard_normal((shape[0], *(1,) * (len(shape) - 2), rank)).astype(np.float32) * 0.3
    return LoraLayer.from_numpy(path, down, up, alpha)


def random_adapter(parts: dict[str, nn.Module], names: dict[str, tuple[str, ...]], alpha: float = 2.0) -> Adapter:
    """Layers of ranks 2 and 3 in turn for the modules of these names."""
    rng, layers = np.random.default_rng(3), {}
    for component, targets in names.items():
        shapes = adaptable_modules(parts[component])
        layers[component] = {
            path: random_layer(path, shapes[path], 2 + i % 2, alpha, rng)
            for i, path in enumerate(lora_targets(parts[component], targets))
        }
    return Adapter("random", layers)


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def assert_same(ours: dict[str, nn.Module], theirs: dict[str, nn.Module], tolerance: float = 1e-6) -> None:
    for component in theirs:
        a, b = weights(ours[component]), weights(theirs[component])
        assert a.keys() == b.keys()
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


def channels_first(layer: LoraLayer) -> tuple[np.ndarray, np.ndarray]:
    arrays = (np.array(layer.down), np.array(layer.up))
    return tuple(np.ascontiguousarray(a.transpose(0, 3, 1, 2) if a.ndim == 4 else a) for a in arrays)


def save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def inputs(config: dict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(positional tensors, further conditions), of odd size."""
    generator = torch.Generator().manual_seed(5)
    given = {
        "sample": torch.randn((2, 4, 9, 7), generator=generator),
        "timestep": torch.tensor([999, 259]),
        "encoder_hidden_states": torch.randn((2, 5, 12), generator=generator),
    }
    added = {}
    if "addition_embed_type" in config:
        added["text_embeds"] = torch.randn((2, 5), generator=generator)
        added["time_ids"] = torch.randint(0, 64, (2, 6), generator=generator)
    return given, added


def run_torch(unet: torch.nn.Module, config: dict) -> torch.Tensor:
    given, added = inputs(config)
    with torch.no_grad():
        return unet(**given, added_cond_kwargs=added or None).sample


def run_native(unet: UNet2DCondition, config: dict) -> mx.array:
    given, added = inputs(config)
    conditions = {name: channels_last(value) for name, value in added.items()}
    return unet(*(channels_last(value) for value in given.values()), **conditions)


def assert_parity(unet: UNet2DCondition, reference: torch.nn.Module, config: dict, plain: torch.Tensor) -> None:
    """Same output as the reference with its adapter, which must be another than without."""
    theirs = run_torch(reference, config)
    assert torch.linalg.norm(theirs - plain) > 0.05 * torch.linalg.norm(plain)
    assert relative_error(run_native(unet, config), theirs) < TOLERANCE


# ---- the spellings of one LoRA ----


def folded(layer: LoraLayer) -> tuple[np.ndarray, np.ndarray]:
    """Down and up of a file that has no alpha."""
    down, up = channels_first(layer)
    return down, up * np.float32(layer.alpha / layer.rank)


def kohya(component: str, path: str, layer: LoraLayer, te: str = "te") -> dict[str, np.ndarray]:
    prefix = {"unet": "lora_unet_", "text_encoder": f"lora_{te}_"}[component] + path.replace(".", "_")
    down, up = channels_first(layer)
    alpha = np.array(layer.alpha, np.float32)
    return {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": alpha}


def kohya_te1(component: str, path: str, layer: LoraLayer) -> dict[str, np.ndarray]:
    return kohya(component, path, layer, "te1")


def kohya_flat_text(component: str, path: str, layer: LoraLayer) -> dict[str, np.ndarray]:
    return kohya(component, path.removeprefix("text_model."), layer)


def peft_names(component: str, path: str, layer: LoraLayer) -> dict[str, np.ndarray]:
    down, up = folded(layer)
    return {f"{component}.{path}.lora_A.weight": down, f"{component}.{path}.lora_B.weight": up}


def peft_names_with_alpha(component: str, path: str, layer: LoraLayer) -> dict[str, np.ndarray]:
    (down, up), name = channels_first(layer), f"{component}.base_model.model.{path}"
    return {
        f"{name}.lora_A.default_0.weight": down,
        f"{name}.lora_B.default_0.weight": up,
        f"{name}.alpha": np.array([layer.alpha], np.float16),
    }


def diffusers_names(component: str, path: str, layer: LoraLayer) -> dict[str, np.ndarray]:
    (down, up), ending = folded(layer), "lora" if component == "unet" else "lora_linear_layer"
    return {f"{component}.{path}.{ending}.down.weight": down, f"{component}.{path}.{ending}.up.weight": up}


OLD_ENDINGS = {
    ".to_out.0": ".to_out",
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
}


def old_diffusers_names(component: str, path: str, layer: LoraLayer) -> dict[str, np.ndarray]:
    down, up = folded(layer)
    for ending, other in OLD_ENDINGS.items():
        path = path.removesuffix(ending) + other if path.endswith(ending) else path
    attention, name = path.rsplit(".", 1)
    module = f"{component}.{attention}.{'processor.' if component == 'unet' else ''}{name}"
    return {f"{module}_lora.down.weight": down, f"{module}_lora.up.weight": up}


def bare_names(component: str, path: str, layer: LoraLayer) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{component}."): value for name, value in peft_names(component, path, layer).items()}


EVERYWHERE = {"unet": LCM_LORA_TARGETS, "text_encoder": TEXT_TARGETS}
ATTENTION_ONLY = {"unet": ATTENTION, "text_encoder": TEXT_TARGETS[:4]}
SPELLINGS = {
    "kohya": (kohya, EVERYWHERE),
    "kohya, numbered text encoder": (kohya_te1, EVERYWHERE),
    "kohya, flat text encoder": (kohya_flat_text, EVERYWHERE),
    "peft": (peft_names, EVERYWHERE),
    "peft, wrapped, named adapter, alpha": (peft_names_with_alpha, EVERYWHERE),
    "diffusers": (diffusers_names, EVERYWHERE),
    "old diffusers": (old_diffusers_names, ATTENTION_ONLY),
    "no component": (bare_names, EVERYWHERE),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("config", [TINY, TINY_XL], ids=["convolutions", "linear"])
def test_every_spelling_gives_the_same_weights(spelling, config, tmp_path):
    spell, targets = SPELLINGS[spelling]
    expected, parts = models(config), models(config)
    adapter = random_adapter(parts, targets)
    tensors = {}
    for component, layers in adapter.layers.items():
        for path, layer in layers.items():
            tensors |= spell(component, path, layer)
    loaded = load_adapter(save(tmp_path / "style.safetensors", tensors), modules(parts))
    assert loaded.name == "style"
    assert loaded.sha256 is not None and len(loaded.sha256) == 64
    fuse_adapters(expected, [(adapter, 0.7)])
    fuse_adapters(parts, [(loaded, 0.7)])
    assert_same(parts, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_number_formats_of_the_file(dtype, tmp_path):
    parts = models()
    adapter = random_adapter(parts, {"unet": ("to_q",)})
    state = {name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in to_kohya(adapter).items()}
    torch.save(state, tmp_path / "adapter.bin")
    loaded = load_adapter(tmp_path / "adapter.bin", modules(parts))
    for path, layer in adapter.layers["unet"].items():
        theirs = loaded.layers["unet"][path]
        assert theirs.alpha == 2.0
        for part in ("down", "up"):
            expected = torch.tensor(np.array(getattr(layer, part))).to(getattr(torch, dtype)).float().numpy()
            np.testing.assert_array_equal(np.array(getattr(theirs, part).astype(mx.float32)), expected)


def test_bare_names_of_two_text_encoders_are_told_apart_by_the_folder(tmp_path):
    parts = {"text_encoder": models()["text_encoder"], "text_encoder_2": models()["text_encoder"]}
    adapter = random_adapter(parts, {"text_encoder_2": ("q_proj",)})
    tensors = {}
    for path, layer in adapter.layers["text_encoder_2"].items():
        tensors |= bare_names("text_encoder_2", path, layer)
    save(tmp_path / "text_encoder_2" / "adapter_model.safetensors", tensors)
    save(tmp_path / "elsewhere" / "adapter_model.safetensors", tensors)
    assert list(load_adapter(tmp_path / "text_encoder_2", modules(parts)).layers) == ["text_encoder_2"]
    with pytest.raises(ModelError, match=r"can mean text_encoder\.\S+ or text_encoder_2\.\S+"):
        load_adapter(tmp_path / "elsewhere", modules(parts))


# ---- against peft and diffusers ----

PEFT_CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 2,
        "rank_pattern": {"conv1": 2, "attn1.to_q": 5},
        "alpha_pattern": {"^conv1": 9, "conv1": 7, "^mid_block.attentions.0.proj_in": 1, "attn1.to_q": 3},
    },
}


def lora_config(settings: dict) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=list(LCM_LORA_TARGETS), init_lora_weights=False, **settings)


def randomise_lora(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
@pytest.mark.parametrize("config", [TINY, TINY_XL], ids=["convolutions", "linear"])
def test_a_folder_of_peft_acts_as_in_peft(settings, config, tmp_path):
    reference = torch_unet(config)
    unet, plain = native_unet(reference, config), run_torch(reference, config)
    wrapped = peft.get_peft_model(reference, lora_config(settings)).eval()
    randomise_lora(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert any(name.startswith("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors"))
    adapter = load_adapter(tmp_path, modules({"unet": unet}))
    assert list(adapter.layers["unet"]) == lora_targets(unet, LCM_LORA_TARGETS)
    fuse(unet, adapter.layers["unet"])
    assert_parity(unet, wrapped.base_model.model, config, plain)


def test_a_folder_per_component_as_pefts_examples_write(tmp_path):
    references = {"unet": torch_unet(TINY), "text_encoder": torch_text()}
    parts = {"unet": native_unet(references["unet"], TINY), "text_encoder": native_text(references["text_encoder"])}
    ids = torch.tensor([[18, 3, 4, 19, 0]])
    targets = {"unet": ["to_q", "to_k"], "text_encoder": ["q_proj", "fc1"]}
    for name, reference in references.items():
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets[name], init_lora_weights=False)
        references[name] = peft.get_peft_model(reference, config).eval()
        randomise_lora(references[name])
        references[name].save_pretrained(tmp_path / name)
    adapter = load_adapter(tmp_path, modules(parts))
    assert set(adapter.layers) == {"unet", "text_encoder"}
    fuse_adapters(parts, [(adapter, 1.0)])
    assert relative_error(run_native(parts["unet"], TINY), run_torch(references["unet"], TINY)) < TOLERANCE
    with torch.no_grad():
        states = references["text_encoder"].base_model.model(ids).last_hidden_state
    assert relative_error(parts["text_encoder"](mx.array(ids.numpy())).last_hidden_state, states) < TOLERANCE


def test_diffusers_metadata_tells_alpha(tmp_path):
    """diffusers writes peft's names without alpha, and the alpha into the file's metadata."""
    reference = torch_unet(TINY)
    unet, plain = native_unet(reference, TINY), run_torch(reference, TINY)
    reference.add_adapter(lora_config(PEFT_CONFIGS["patterns"]))
    randomise_lora(reference)
    reference.save_lora_adapter(tmp_path / "bare")
    layers = peft.get_peft_model_state_dict(reference)
    packed = {f"unet.{key}": value for key, value in reference.peft_config["default"].to_dict().items()}
    StableDiffusionPipeline.write_lora_layers(
        {f"unet.{name}": tensor for name, tensor in layers.items()},
        str(tmp_path / "prefixed"),
        True,
        None,
        None,
        True,
        {key: sorted(value) if isinstance(value, set) else value for key, value in packed.items()},
    )
    for folder in ("bare", "prefixed"):
        fused = native_unet(torch_unet(TINY), TINY)
        fuse(fused, load_adapter(tmp_path / folder, modules({"unet": unet})).layers["unet"])
        assert_parity(fused, reference, TINY, plain)


def test_a_pipeline_of_diffusers_reads_kohya_files_as_we_do(tmp_path):
    references = {"unet": torch_unet(TINY), "text_encoder": torch_text()}
    parts = {"unet": native_unet(references["unet"], TINY), "text_encoder": native_text(references["text_encoder"])}
    ids = torch.tensor([[18, 3, 4, 19, 0]])
    plain = run_torch(references["unet"], TINY)
    path = save(tmp_path / "kohya.safetensors", to_kohya(random_adapter(parts, EVERYWHERE, alpha=1.5)))
    pipeline = StableDiffusionPipeline(
        vae=None,
        tokenizer=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **references,
    )
    with torch.no_grad():
        plain_states = references["text_encoder"](ids).last_hidden_state
        pipeline.load_lora_weights(tmp_path, weight_name=path.name)
        states = pipeline.text_encoder(ids).last_hidden_state
    fuse_adapters(parts, [(load_adapter(path, modules(parts)), 1.0)])
    assert_parity(parts["unet"], pipeline.unet, TINY, plain)
    ours = parts["text_encoder"](mx.array(ids.numpy())).last_hidden_state
    assert relative_error(ours, states) < TOLERANCE < relative_error(ours, plain_states)


def test_original_block_names_mean_what_they_mean_to_diffusers(tmp_path):
    reference = torch_unet(TINY_XL)
    unet, plain = native_unet(reference, TINY_XL), run_torch(reference, TINY_XL)
    shapes, rng = adaptable_modules(unet), np.random.default_rng(0)
    tensors = {}
    for path, name in ldm_names(shapes).items():
        tensors |= kohya("unet", name, random_layer(path, shapes[path], 3, 4.0, rng))
    assert len(tensors) == 3 * len(shapes)
    assert "lora_unet_input_blocks_3_0_op.alpha" in tensors
    path = save(tmp_path / "sgm.safetensors", tensors)
    fuse(unet, load_adapter(path, modules({"unet": unet})).layers["unet"])
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=reference.config)
    reference.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    assert_parity(unet, reference, TINY_XL, plain)


# By hand from the numbering of the original code: two blocks per level, the halvings in between.
ORIGINAL_NAMES = {
    "SD1.5": (
        SD15,
        {
            "input_blocks.0.0": "conv_in",
            "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
            "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
            "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
            "input_blocks.11.0.in_layers.2": "down_blocks.3.resnets.1.conv1",
            "middle_block.1.transformer_blocks.0.attn2.to_v": "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
            "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
            "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
            "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj": (
                "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj"
            ),
            "time_embed.2": "time_embedding.linear_2",
            "out.2": "conv_out",
        },
    ),
    "SDXL": (
        SDXL,
        {
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q": (
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
            ),
            "input_blocks.8.1.transformer_blocks.9.ff.net.2": (
                "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2"
            ),
            "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
            "output_blocks.8.0.out_layers.3": "up_blocks.2.resnets.2.conv2",
            "label_emb.0.2": "add_embedding.linear_2",
        },
    ),
    "SSD-1B": (SSD_1B, {"middle_block.0.in_layers.2": "mid_block.resnets.0.conv1"}),
}


@pytest.mark.parametrize("family", ORIGINAL_NAMES)
def test_original_block_names_of_the_published_models(family):
    config, expected = ORIGINAL_NAMES[family]
    shapes = adaptable_modules(UNet2DCondition(unet_config(config)))
    named = ldm_names(shapes)
    assert named.keys() == shapes.keys()
    assert len(set(named.values())) == len(named)
    back = {name: path for path, name in named.items()}
    assert {name: back.get(name) for name in expected} == expected


def test_original_dotted_names(tmp_path):
    parts = models()
    adapter = random_adapter(parts, {"unet": ATTENTION})
    names, tensors = ldm_names(adaptable_modules(parts["unet"])), {}
    for path, layer in adapter.layers["unet"].items():
        down, up = folded(layer)
        name = f"diffusion_model.{names[path]}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    loaded = load_adapter(save(tmp_path / "x.safetensors", tensors), modules(parts))
    assert loaded.layers["unet"].keys() == adapter.layers["unet"].keys()


@pytest.mark.parametrize("write", [to_kohya, to_peft])
@pytest.mark.parametrize("alpha", [2.0, 0.75, 0.0])
def test_written_files_read_back(write, alpha, tmp_path):
    parts = models()
    adapter = random_adapter(parts, EVERYWHERE, alpha)
    tensors = write(adapter)
    kernel = next(value for name, value in tensors.items() if "conv1" in name and value.ndim == 4)
    assert kernel.shape[2:] == (3, 3)
    loaded = load_adapter(save(tmp_path / "x.safetensors", tensors), modules(parts))
    for component, layers in adapter.layers.items():
        assert list(loaded.layers[component]) == list(layers)
        for path, layer in layers.items():
            ours = loaded.layers[component][path]
            np.testing.assert_allclose(np.array(delta(ours)), np.array(delta(layer)), rtol=1e-6, atol=1e-7)
            assert ours.alpha == (alpha if write is to_kohya else layer.rank)
    if write is to_kohya:
        assert all(np.array_equal(value, tensors[name]) for name, value in to_kohya(loaded).items())


def test_kohya_numbers_the_text_encoders_of_a_model_with_two(tmp_path):
    parts = {"text_encoder": models()["text_encoder"], "text_encoder_2": models()["text_encoder"]}
    adapter = random_adapter(parts, {"text_encoder": ("q_proj",), "text_encoder_2": ("fc2",)})
    tensors = to_kohya(adapter)
    assert {name.split("_text")[0] for name in tensors} == {"lora_te1", "lora_te2"}
    loaded = load_adapter(save(tmp_path / "x.safetensors", tensors), modules(parts))
    assert {name: list(layers) for name, layers in loaded.layers.items()} == {
        name: list(layers) for name, layers in adapter.layers.items()
    }


def test_bfloat16_layers_are_written_as_float32():
    layer = LoraLayer("conv_in", mx.ones((1, 3, 3, 4), mx.bfloat16), mx.ones((8, 1, 1, 1), mx.bfloat16), 1.0)
    tensors = to_kohya(Adapter("x", {"unet": {"conv_in": layer}}))
    assert tensors["lora_unet_conv_in.lora_down.weight"].dtype == np.float32
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (1, 4, 3, 3)


def test_a_kernel_between_the_kernels(tmp_path):
    """LyCORIS' LoCon with a middle: three convolutions in a row act like the fused one."""
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(shape, generator=generator) for shape in [(3, 5, 1, 1), (3, 3, 3, 3), (7, 3, 1, 1)])
    x = torch.randn((1, 5, 6, 4), generator=generator)
    functional = torch.nn.functional
    theirs = functional.conv2d(functional.conv2d(functional.conv2d(x, down), mid, padding=1), up) * (2.0 / 3)
    name = "lora_unet_conv"
    tensors = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    arrays = {f"{name}.{part}.weight": value.numpy() for part, value in tensors.items()}
    path = save(tmp_path / "x.safetensors", arrays | {f"{name}.alpha": np.array(2, np.int64)})
    module = Conv2d(5, 7, 3, padding=1, bias=False)
    module.weight = mx.zeros_like(module.weight)
    model = nn.Module()
    model.conv = module
    fuse(model, load_adapter(path, {"unet": adaptable_modules(model)}).layers["unet"])
    assert relative_error(module(channels_last(x)), theirs) < TOLERANCE


# ---- which modules ----

PUBLISHED_LCM_LORAS = {  # modules, of which linear; millions of parameters at rank 64
    "SD1.5": (SD15, 278, 182, 67.25),
    "SDXL": (SDXL, 788, 739, 196.75),
    "SSD-1B": (SSD_1B, 423, 376, 104.9),
}


@pytest.mark.parametrize("family", PUBLISHED_LCM_LORAS)
def test_module_counts_of_the_published_lcm_loras(family):
    config, count, linear, millions = PUBLISHED_LCM_LORAS[family]
    unet = UNet2DCondition(unet_config(config))
    paths, shapes = lora_targets(unet, LCM_LORA_TARGETS), adaptable_modules(unet)
    assert len(paths) == len(set(paths)) == count
    assert sum(len(shapes[path]) == 2 for path in paths) == linear
    parameters = sum(64 * (math.prod(shapes[path][1:]) + shapes[path][0]) for path in paths)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_targets_are_whole_names():
    unet = models()["unet"]
    assert lora_targets(unet, ["mid_block.resnets.1.conv1"]) == ["mid_block.resnets.1.conv1"]
    assert lora_targets(unet, ["conv_in"]) == ["conv_in"]
    assert {path.rsplit(".", 1)[1] for path in lora_targets(unet, ["conv"])} == {"conv"}


def test_targets_that_nothing_is_called():
    with pytest.raises(UsageError, match="to_w, v"):
        lora_targets(models()["unet"], ["to_q", "to_w", "v"])


def test_norms_and_embeddings_are_not_adapted():
    parts = models()
    assert not [path for path in adaptable_modules(parts["unet"]) if "norm" in path]
    assert not [path for path in adaptable_modules(parts["text_encoder"]) if "embedding" in path or "norm" in path]


# ---- fusing ----

MODULES = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6), (4, 3), (2, 5, 6)),
    "1x1 convolution": (lambda: nn.Conv2d(6, 4, 1), (3, 1, 1, 6), (4, 1, 1, 3), (2, 5, 4, 6)),
    "3x3 convolution": (lambda: Conv2d(6, 4, 3, padding=1), (3, 3, 3, 6), (4, 1, 1, 3), (2, 5, 4, 6)),
    "halving convolution": (lambda: Conv2d(6, 4, 3, stride=2, padding=1), (3, 3, 3, 6), (4, 1, 1, 3), (2, 5, 4, 6)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("scale", [1.0, 0.35, -1.2, 0.0])
def test_fused_is_up_of_down(kind, scale):
    make, down_shape, up_shape, x_shape = MODULES[kind]
    mx.random.seed(0)
    model = nn.Module()
    model.layer = make()
    down, up, x = (mx.random.normal(shape) for shape in (down_shape, up_shape, x_shape))
    layer = LoraLayer("layer", down, up, alpha=5.0)
    expected = model.layer(x)
    if kind == "linear":
        change = (x @ down.T) @ up.T
    else:
        stride, padding = (model.layer.stride, model.layer.padding) if kind != "1x1 convolution" else (1, 0)
        change = mx.conv2d(mx.conv2d(x, down, stride=stride, padding=padding), up)
    expected = expected + scale * 5.0 / 3 * change
    fuse(model, {"layer": layer}, scale)
    np.testing.assert_allclose(np.array(model.layer(x)), np.array(expected), rtol=1e-4, atol=1e-4)
    assert delta(layer, scale).shape == model.layer.weight.shape


def linear_model(dtype: mx.Dtype = mx.float16, value: float = 1.0) -> nn.Module:
    model = nn.Module()
    model.layer = nn.Linear(64, 32)
    model.layer.weight = mx.full((32, 64), value, dtype=dtype)
    return model


def constant_layer(value: float, dtype: mx.Dtype = mx.float32) -> LoraLayer:
    return LoraLayer("layer", mx.full((1, 64), value, dtype=dtype), mx.ones((32, 1), dtype=dtype), 1.0)


def test_the_sum_is_rounded_once():
    """Two changes below half a step of float16 round to nothing each, but not together."""
    change = 0.0003
    assert np.float16(1 + change) == 1 < np.float16(1 + 2 * change)
    model = linear_model()
    adapters = [(Adapter(name, {"unet": {"layer": constant_layer(change)}}), 1.0) for name in "ab"]
    fuse_adapters({"unet": model}, adapters)
    assert model.layer.weight.dtype == mx.float16
    assert np.unique(np.array(model.layer.weight)) == [np.float16(1 + 2 * change)]


def test_order_and_scales_of_several_adapters():
    rng = np.random.default_rng(1)
    adapters = [
        (Adapter(str(scale), {"unet": {"layer": random_layer("layer", (32, 64), 4, 3.0, rng)}}), scale)
        for scale in (0.8, -0.5, 0.25)
    ]
    forward, backward = linear_model(mx.float32), linear_model(mx.float32)
    fuse_adapters({"unet": forward}, adapters)
    fuse_adapters({"unet": backward}, adapters[::-1])
    expected = 1 + sum(
        scale * 3 / 4 * np.array(layer.up, np.float64) @ np.array(layer.down, np.float64)
        for adapter, scale in adapters
        for layer in adapter.layers["unet"].values()
    )
    for model in (forward, backward):
        np.testing.assert_allclose(np.array(model.layer.weight), expected, rtol=1e-5, atol=1e-6)


def test_fusing_and_taking_away():
    parts, before = models(), {name: weights(model) for name, model in models().items()}
    adapter = random_adapter(parts, EVERYWHERE)
    fuse_adapters(parts, [(adapter, 0.9), (adapter, -0.9)])
    for name, model in parts.items():
        assert all(np.array_equal(value, before[name][key]) for key, value in weights(model).items())
    fuse_adapters(parts, [(adapter, 0.0)])
    for name, model in parts.items():
        assert all(np.array_equal(value, before[name][key]) for key, value in weights(model).items())


@pytest.mark.parametrize(
    "settings",
    [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 64}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}],
    ids=["4 bits", "8 bits", "mxfp4"],
)
def test_quantised_layers_keep_their_settings(settings):
    mx.random.seed(2)
    model = nn.Module()
    model.layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 32), **settings)
    layer = random_layer("layer", (32, 64), 4, 4.0, np.random.default_rng(0))
    assert adaptable_modules(model) == {"layer": (32, 64)}

    def values() -> mx.array:
        packed = {"scales": model.layer.scales, "biases": model.layer.get("biases"), **settings}
        return mx.dequantize(model.layer.weight, **packed, dtype=mx.float32)

    wanted = values() + delta(layer)
    fuse(model, {"layer": layer})
    rounded = mx.dequantize(*mx.quantize(wanted, **settings), **settings, dtype=mx.float32)
    np.testing.assert_array_equal(np.array(values()), np.array(rounded))
    assert model.layer(mx.ones((1, 64))).shape == (1, 32)
    assert {name: getattr(model.layer, name) for name in settings} == settings


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_must_be_finite(scale):
    model = linear_model()
    with pytest.raises(UsageError, match="finite"):
        fuse(model, {"layer": constant_layer(1.0)}, scale)


UNFIT = {
    "unknown module": (lambda: {"other": constant_layer(1.0)}, "other: no linear layer or convolution"),
    "other shape": (
        lambda: {"layer": LoraLayer("layer", mx.ones((1, 60)), mx.ones((32, 1)), 1.0)},
        r"weight of shape \(32, 60\), this model's has \(32, 64\)",
    ),
    "ranks differ": (
        lambda: {"layer": LoraLayer("layer", mx.ones((2, 64)), mx.ones((32, 1)), 1.0)},
        r"down of shape \(2, 64\) and an up of shape \(32, 1\)",
    ),
    "no rank": (
        lambda: {"layer": LoraLayer("layer", mx.ones((0, 64)), mx.ones((32, 0)), 1.0)},
        "no LoRA of rank 1 or more",
    ),
    "too large": (lambda: {"layer": constant_layer(7e4)}, "go beyond mlx.core.float16"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_layers_that_do_not_fit_change_nothing(fault):
    layers, why = UNFIT[fault]
    model = linear_model()
    with pytest.raises(ModelError, match=why):
        fuse(model, {"layer": constant_layer(0.5)} | layers())
    assert np.unique(np.array(model.layer.weight)) == [1.0]


def test_an_adapter_for_a_part_that_the_model_has_not():
    adapter = random_adapter(models(), {"text_encoder": ("q_proj",)})
    with pytest.raises(ModelError, match="'text_encoder', which this model has not"):
        fuse_adapters({"unet": models()["unet"]}, [(adapter, 1.0)])


# ---- references ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors@0.8", ("style.safetensors", 0.8)),
        ("owner/name", ("owner/name", 1.0)),
        ("owner/name@v1.0", ("owner/name@v1.0", 1.0)),
        ("owner/name@main@.5", ("owner/name@main", 0.5)),
        ("owner/name@-1", ("owner/name", -1.0)),
        ("owner/name@0", ("owner/name", 0.0)),
        ("owner/name@2e-1", ("owner/name", 0.2)),
        ("a@b/style@2.safetensors", ("a@b/style@2.safetensors", 1.0)),
        ("owner/name@", ("owner/name@", 1.0)),
    ],
)
def test_references(text, expected):
    assert parse_lora_ref(text) == expected


@pytest.mark.parametrize("text", ["", "@0.5", "x@nan", "x@inf", "x@-Infinity", "x@1e999"])
def test_references_that_are_refused(text):
    with pytest.raises(UsageError):
        parse_lora_ref(text)


# ---- what is refused ----

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
ORIGINAL_QUERY = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


def query(down: tuple[int, ...] = (2, 16), up: tuple[int, ...] = (16, 2), **more: np.ndarray) -> dict[str, np.ndarray]:
    """One layer that fits the tiny U-Net, unless told otherwise."""
    tensors = {"lora_down.weight": np.ones(down, np.float32), "lora_up.weight": np.ones(up, np.float32)} | more
    return {f"{QUERY}.{part}": value for part, value in tensors.items() if value is not None}


ONE = np.ones((1,), np.float32)
MATRIX = np.ones((2, 2), np.float32)
REFUSED = {
    "no LoRA": ({"conv_in.weight": MATRIX}, r"is no LoRA; its tensors are called conv_in\.weight"),
    "DoRA": (query(dora_scale=ONE), "DoRA"),
    "DoRA of peft": ({"unet.x.lora_magnitude_vector": ONE}, "DoRA"),
    "LoHa": ({f"{QUERY}.hada_w1_a": MATRIX}, "LoHa"),
    "LoKr": ({f"{QUERY}.lokr_w1": MATRIX}, "LoKr"),
    "OFT": ({f"{QUERY}.oft_blocks": MATRIX}, "OFT"),
    "full difference": ({f"{QUERY}.diff": MATRIX}, "full differences"),
    "bias": ({"unet.conv_in.lora_B.bias": ONE}, "LoRA with biases"),
    "down alone": (query(**{"lora_up.weight": None}), f"{QUERY}: has down, but no up"),
    "up alone": (query(**{"lora_down.weight": None}), f"{QUERY}: has up, but no down"),
    "rank 0": (query((0, 16), (16, 0)), "no LoRA of rank 1 or more"),
    "ranks differ": (query((2, 16), (16, 3)), r"down of shape \(2, 16\) and an up of shape \(16, 3\)"),
    "vectors": (query((2,), (16,)), "no LoRA of rank 1 or more"),
    "other width in": (query((2, 17)), r"down: expected \(2, 16\), got \(2, 17\)"),
    "other width out": (query(up=(15, 2)), r"up: expected \(16, 2\), got \(15, 2\)"),
    "kernel for a linear layer": (query((2, 16, 3, 3)), r"down: expected \(2, 16\), got \(2, 16, 3, 3\)"),
    "integers": (query(**{"lora_up.weight": np.ones((16, 2), np.int32)}), "up holds I32 numbers"),
    "NaN": (query(**{"lora_up.weight": np.full((16, 2), np.nan, np.float32)}), "up holds NaN or infinity"),
    "infinite alpha": (query(alpha=np.array(np.inf, np.float32)), "alpha is inf"),
    "two alphas": (query(alpha=np.ones(2, np.float32)), r"alpha has shape \(2,\)"),
    "mid without kernels": (query(**{"lora_mid.weight": np.ones((2, 2), np.float32)}), r"a mid of shape \(2, 2\)"),
    "twice": (
        query() | {f"{ORIGINAL_QUERY}.lora_{part}.weight": MATRIX for part in ("down", "up")},
        f"twice, as {QUERY} and as {ORIGINAL_QUERY}",
    ),
    "nothing fits": (
        {"lora_unet_blocks_0_q.lora_down.weight": MATRIX, "lora_unet_blocks_0_q.lora_up.weight": MATRIX},
        "fits nothing: 1 of its 1 modules are not in this model, in kohya spelling: lora_unet_blocks_0_q",
    ),
    "FLUX": (
        {f"lora_unet_double_blocks_0_img_attn_proj.lora_{part}.weight": MATRIX for part in ("down", "up")},
        "made for FLUX",
    ),
    "strange tensor": (query() | {"emb_params": MATRIX}, "fits only partly: 1 of its 2 modules .*: emb_params"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_files(fault, tmp_path):
    tensors, why = REFUSED[fault]
    path = save(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ModelError, match=why) as caught:
        load_adapter(path, modules(models()))
    assert caught.value.what.endswith("bad.safetensors")


def test_partly_fitting_files_name_what_is_left_over(tmp_path, caplog):
    tensors = query()
    for i in range(12):
        tensors |= {f"lora_unet_extra_{i:02}.lora_{part}.weight": MATRIX for part in ("down", "up")}
    path = save(tmp_path / "x.safetensors", tensors, {"ss_base_model_version": "sd_v2"})
    with pytest.raises(ModelError, match=r"12 of its 13 .*extra_00, .*extra_09 and 2 more; it is made for 'sd_v2'"):
        load_adapter(path, modules(models()))
    adapter = load_adapter(path, modules(models()), partial=True)
    assert list(adapter.layers["unet"]) == ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert "lora_unet_extra_00" in caplog.text


def test_partial_does_not_excuse_a_file_of_which_nothing_fits(tmp_path):
    path = save(tmp_path / "x.safetensors", {f"lora_unet_a.lora_{part}.weight": MATRIX for part in ("down", "up")})
    with pytest.raises(ModelError, match="fits nothing"):
        load_adapter(path, modules(models()), partial=True)


@pytest.mark.parametrize(
    ("made_for", "model", "names"),
    [(SDXL, SD15, ("SDXL", "1.x")), (SD15, SDXL, ("1.x", "SDXL")), (SD21, SD15, ("2.x", "1.x"))],
    ids=["SDXL on SD1.5", "SD1.5 on SDXL", "SD2 on SD1.5"],
)
@pytest.mark.parametrize("spell", [kohya, peft_names, old_diffusers_names])
def test_a_lora_for_another_base_is_called_so(made_for, model, names, spell, tmp_path):
    shapes = {"unet": adaptable_modules(UNet2DCondition(unet_config(made_for)))}
    paths = [path for path in shapes["unet"] if path.endswith((".to_q", ".to_k"))][:8]
    tensors, rng = {}, np.random.default_rng(0)
    for path in paths:
        tensors |= spell("unet", path, random_layer(path, shapes["unet"][path], 1, 1.0, rng))
    path = save(tmp_path / "x.safetensors", tensors)
    assert len(load_adapter(path, shapes).layers["unet"]) == len(paths)
    with pytest.raises(ModelError, match=rf"made for \D*{names[0]}.*; this model is \D*{names[1]}"):
        load_adapter(path, {"unet": adaptable_modules(UNet2DCondition(unet_config(model)))}, partial=True)


CONFIGS = {
    "other method": ({"peft_type": "IA3"}, "kind 'IA3', not LoRA"),
    "text for a number": ({"lora_alpha": "8"}, "lora_alpha: expected a number, got '8'"),
    "infinity": ({"lora_alpha": math.inf}, "lora_alpha: expected a number"),
    "beyond all numbers": ({"alpha_pattern": {"to_q": 10**400}}, "alpha_pattern to_q: expected a number"),
    "list for a pattern": ({"alpha_pattern": ["to_q"]}, "alpha_pattern: expected an object"),
    "expression": ({"alpha_pattern": {"(a+)+$": 1}}, "regular expression"),
    "other rank": ({"r": 4}, "has rank 2, but the adapter's config says 4"),
    "text for a switch": ({"use_rslora": "no"}, "use_rslora: expected true or false"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_refused_configs(fault, tmp_path):
    settings, why = CONFIGS[fault]
    save(tmp_path / "folder" / "adapter_model.safetensors", query())
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=why):
        load_adapter(tmp_path / "folder", modules(models()))
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    with pytest.raises(ModelError, match=why):
        load_adapter(save(tmp_path / "x.safetensors", query(), metadata), modules(models()))


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_refused_metadata(text, tmp_path):
    with pytest.raises(ModelError, match="lora_adapter_metadata"):
        load_adapter(save(tmp_path / "x.safetensors", query(), {"lora_adapter_metadata": text}), modules(models()))


def test_folders(tmp_path):
    """The only file of a folder is taken whatever its name; of several, one of a usual name; otherwise none."""
    parts = modules(models())
    save(tmp_path / "style" / "my_style_v2.safetensors", query())
    assert load_adapter(tmp_path / "style", parts).name == "style"
    save(tmp_path / "style" / "other.safetensors", query((3, 16), (16, 3)))
    with pytest.raises(ModelError, match="no weight files"):
        load_adapter(tmp_path / "style", parts)
    save(tmp_path / "style" / "pytorch_lora_weights.safetensors", query((4, 16), (16, 4)))
    (layer,) = load_adapter(tmp_path / "style", parts).layers["unet"].values()
    assert layer.rank == 4
    with pytest.raises(ModelError, match="missing"):
        load_adapter(tmp_path / "absent.safetensors", parts)


# ---- what a file says of itself ----


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"modelspec.title": "LCM-LoRA for SD 1.5"}, "lcm"),
        ({"ss_output_name": "my_tcd_style"}, "tcd"),
        ({"modelspec.tags": "LCM, TCD"}, None),
        ({"modelspec.tags": "lcm, tcd", "mlx_cm.sampler": "tcd"}, "tcd"),
        ({"ss_output_name": "falcmore"}, None),
        ({"ss_sd_model_name": "LCM_Dreamshaper_v7.safetensors"}, None),
    ],
)
def test_sampler_hints(metadata, expected, tmp_path):
    assert sampler_hint(metadata) == expected
    adapter = load_adapter(save(tmp_path / "lcm.safetensors", query(), metadata or None), modules(models()))
    assert adapter.sampler == expected
    assert adapter.metadata == metadata
