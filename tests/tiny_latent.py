"""Small latent models of the published layouts, made by diffusers and transformers, with every parameter random."""

import functools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import torch
import transformers
from clip_vocabulary import write_vocabulary
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from parity import channels_last, copy_weights, randomise
from PIL import Image

from mlx_cm.config import config_from_dict
from mlx_cm.convert.transformers_config import config_from_transformers
from mlx_cm.models import autoencoder_kl, autoencoder_tiny, clip_text, unet2d_condition
from mlx_cm.pipelines.latent import LatentConsistencyPipeline, LatentSettings
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.tokenizer import CLIPTokenizer

LATENTS = 4  # a side, of what is made where no size is given
PIXELS = 8 * LATENTS

BASE = {
    "sample_size": LATENTS,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
XL = BASE | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32 + 40,
    "attention_head_dim": (2, 3),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
UNETS = {
    "lcm": BASE | {"time_cond_proj_dim": 16},
    "base": BASE,
    "inpainting": BASE | {"in_channels": 9},
    "xl": XL,
    "xl lcm": XL | {"time_cond_proj_dim": 16},
}

CLIP = {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2, "projection_dim": 20}
TEXT_ENCODERS = {
    "L": CLIP | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "hidden_act": "quick_gelu"},
    "H": CLIP | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "hidden_act": "gelu"},
    "bigG": CLIP | {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "hidden_act": "gelu"},
}
WITH_PROJECTION = {"bigG"}

VAE_LAYOUT = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
AUTOENCODERS = {
    "kl": lambda: AutoencoderKL(**VAE_LAYOUT),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ),
}
AUTOENCODER_SCALES = {"kl": 0.05, "tiny": 0.1}


@dataclass(frozen=True)
class Family:
    """Which parts make up a model, and how it is used."""

    unet: str
    encoders: tuple[str, ...] = ("L",)
    pads: tuple[str, ...] = ("<|endoftext|>",)  # of the tokenizers
    schedule: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


XL_TEXT = {"encoders": ("L", "bigG"), "pads": ("<|endoftext|>", "!")}
FAMILIES = {
    "lcm": Family("lcm", settings={"sampler": "lcm", "guidance_scale": 8.5}),
    "sd": Family("base"),
    "sd2": Family("base", ("H",), ("!",), schedule={"prediction_type": "v_prediction"}),
    "inpainting": Family("inpainting"),
    "xl": Family("xl", **XL_TEXT, settings={"force_zeros_for_empty_prompt": True}),
    "xl with empty prompts": Family("xl", **XL_TEXT),
    "xl lcm": Family("xl lcm", **XL_TEXT, settings={"sampler": "lcm", "guidance_scale": 8.0}),
}


@functools.cache
def vocabulary_folder() -> Path:
    """`vocab.json` and `merges.txt`, written once."""
    return write_vocabulary(Path(tempfile.mkdtemp(prefix="mlx-cm-vocabulary-")))


@functools.cache
def tokenizers(pad: str) -> tuple[CLIPTokenizer, transformers.CLIPTokenizer]:
    """Ours and transformers', which pad alike."""
    vocab_file, merges_file = (vocabulary_folder() / name for name in ("vocab.json", "merges.txt"))
    theirs = transformers.CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=77, pad_token=pad)
    lines = merges_file.read_text(encoding="utf-8").split("\n")[1:]
    vocabulary, merges = (
        json.loads(vocab_file.read_text(encoding="utf-8")),
        [tuple(line.split()) for line in lines if line],
    )
    return CLIPTokenizer(vocabulary, merges, roles={"pad_token": pad}), theirs


@functools.cache
def text_encoder(kind: str) -> tuple[nn.Module, torch.nn.Module]:
    """Ours and transformers', with the same weights."""
    vocab_size = tokenizers("<|endoftext|>")[0].vocab_size
    config = transformers.CLIPTextConfig(**TEXT_ENCODERS[kind], vocab_size=vocab_size)
    name = "CLIPTextModelWithProjection" if kind in WITH_PROJECTION else "CLIPTextModel"
    torch.manual_seed(1)
    theirs = randomise(getattr(transformers, name)(config), seed=1)
    values = theirs.config.to_dict() | {"architectures": [name]}
    ours = clip_text.CLIPTextModel(config_from_transformers(clip_text.CLIPTextConfig, values, "config.json"))
    state = {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
        for key, value in theirs.state_dict().items()
    }
    ours.load_weights([(key, channels_last(value)) for key, value in state.items()], strict=True)
    return ours, theirs


@functools.cache
def unet(kind: str) -> tuple[nn.Module, torch.nn.Module]:
    """Ours and diffusers', with the same weights."""
    torch.manual_seed(2)
    theirs = randomise(UNet2DConditionModel(**UNETS[kind]), seed=2, scale=0.1)
    config = config_from_dict(unet2d_condition.UNet2DConditionConfig, dict(theirs.config), "config.json")
    return copy_weights(unet2d_condition.UNet2DCondition(config), theirs), theirs


@functools.cache
def autoencoder(kind: str) -> tuple[nn.Module, torch.nn.Module]:
    """Ours and diffusers', with the same weights."""
    return native_autoencoder(kind), _reference_autoencoder(kind)


@functools.cache
def _reference_autoencoder(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    made = randomise(AUTOENCODERS[kind](), seed=3, scale=AUTOENCODER_SCALES[kind])
    if kind == "tiny":
        made.decoder.layers[-1].bias += 0.5  # its pictures are about [0, 1], and a clipped one would match anything
    return made


def native_autoencoder(kind: str) -> nn.Module:
    """A new one, for tests that change it."""
    theirs = _reference_autoencoder(kind)
    module, name = {"kl": (autoencoder_kl, "AutoencoderKL"), "tiny": (autoencoder_tiny, "AutoencoderTiny")}[kind]
    config = config_from_dict(getattr(module, f"{name}Config"), dict(theirs.config), "config.json")
    return copy_weights(getattr(module, name)(config), theirs)


def native_pipeline(family: str, *, vae: str = "kl", **parts: Any) -> LatentConsistencyPipeline:
    """Our pipeline of a family.

    Args:
        parts: arguments of the pipeline that differ.
    """
    made = FAMILIES[family]
    return LatentConsistencyPipeline(
        **{
            "backbone": unet(made.unet)[0],
            "autoencoder": autoencoder(vae)[0],
            "text_encoders": [text_encoder(kind)[0] for kind in made.encoders],
            "tokenizers": [tokenizers(pad)[0] for pad in made.pads],
            "schedule": DiscreteSchedule(**made.schedule),
            "settings": LatentSettings(**made.settings),
        }
        | parts
    )


def reference_pipeline(family: str, pipeline: type, scheduler: type, *, vae: str = "kl") -> DiffusionPipeline:
    """diffusers' pipeline of the same parts."""
    made = FAMILIES[family]
    parts = {"unet": unet(made.unet)[1], "vae": autoencoder(vae)[1], "scheduler": scheduler(**made.schedule)}
    for number, (kind, pad) in enumerate(zip(made.encoders, made.pads, strict=True), start=1):
        suffix = "" if number == 1 else f"_{number}"
        parts |= {f"text_encoder{suffix}": text_encoder(kind)[1], f"tokenizer{suffix}": tokenizers(pad)[1]}
    if len(made.encoders) == 2:
        parts["force_zeros_for_empty_prompt"] = made.settings.get("force_zeros_for_empty_prompt", False)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    built = pipeline(**parts)
    built.set_progress_bar_config(disable=True)
    return built


def picture(width: int = PIXELS, height: int = PIXELS, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture."""
    small = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int = PIXELS, height: int = PIXELS) -> Image.Image:
    """White in an ellipse off the middle; its edge has grey levels on both sides of the threshold."""
    y, x = np.mgrid[:height, :width]
    distance = ((x - 0.4 * width) / (0.4 * width)) ** 2 + ((y - 0.6 * height) / (0.3 * height)) ** 2
    return Image.fromarray(np.clip(255 * (1.5 - distance), 0, 255).astype(np.uint8))
