"""Small models of Stable Diffusion's family, made by diffusers and transformers, with every parameter random."""

import functools
import tempfile
from pathlib import Path

import torch
from clip_vocabulary import write_vocabulary
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from parity import randomise
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTHS = (32, 64)
UNET = {
    "sample_size": 8,
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
UNETS = {
    "sd1": UNET,
    "sd1 inpainting": UNET | {"in_channels": 9},
    "lcm": UNET | {"time_cond_proj_dim": 12},
    "sd2": UNET | {"block_out_channels": (64, 128), "attention_head_dim": (1, 2), "use_linear_projection": True},
    "sdxl": UNET
    | {
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 128,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 48 + 6 * 256,
    },
}
UNETS["lcm sdxl"] = UNETS["sdxl"] | {"time_cond_proj_dim": 12}
VAE = {
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
}


def text_config(**changes) -> CLIPTextConfig:
    """A text encoder of one head."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    tokens = {"vocab_size": vocabulary_size(), "bos_token_id": vocabulary_size() - 2, "eos_token_id": 2}
    return CLIPTextConfig(**(sizes | tokens | changes))


@functools.cache
def vocabulary_folder() -> Path:
    """A folder with `vocab.json` and `merges.txt`; it lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="clip-vocabulary-")
    KEPT.append(folder)
    return write_vocabulary(Path(folder.name))


KEPT: list[tempfile.TemporaryDirectory] = []


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """transformers' tokenizer with the test vocabulary."""
    return CLIPTokenizer.from_pretrained(vocabulary_folder(), pad_token=pad_token, model_max_length=77)


@functools.cache
def vocabulary_size() -> int:
    return len(tokenizer())


@functools.cache
def make_unet(kind: str) -> UNet2DConditionModel:
    """One of `UNETS`; shared, to be read only."""
    torch.manual_seed(1)
    return randomise(UNet2DConditionModel(**UNETS[kind]), 1)


@functools.cache
def make_vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return randomise(AutoencoderKL(**VAE), 2)


@functools.cache
def make_tiny_vae() -> AutoencoderTiny:
    torch.manual_seed(3)
    widths = {"encoder_block_out_channels": (16,) * 2, "decoder_block_out_channels": (16,) * 2}
    return randomise(AutoencoderTiny(**widths, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1)), 3)


@functools.cache
def make_text_encoder(kind: str = "clip") -> CLIPTextModel:
    """OpenAI's layout, OpenCLIP's of Stable Diffusion 2 with its last layer, or the one of XL with a projection."""
    torch.manual_seed(4)
    if kind == "clip":
        return randomise(CLIPTextModel(text_config()), 4)
    if kind == "open_clip":
        return randomise(CLIPTextModel(text_config(hidden_act="gelu", num_hidden_layers=23)), 5)
    return randomise(CLIPTextModelWithProjection(text_config(hidden_act="gelu", projection_dim=48)), 6)


def text_state(model: CLIPTextModel) -> dict[str, torch.Tensor]:
    """The state under the published names; transformers 5 leaves the module around the encoder out."""
    return {
        name if name.startswith("text_") else f"text_model.{name}": value for name, value in model.state_dict().items()
    }
