"""The other side of the comparisons: diffusers on torch's CPU back end, in a process without mlx_cm.

    python diffusers_side.py pixel FOLDER

Folders are those that pixel.py and latent.py write.
"""

import json
import sys
from pathlib import Path

import diffusers
import harness
import numpy as np
import torch
import transformers


def pixel(folder: Path) -> dict:
    """The stages of pixel.py."""
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    given = inputs(folder)

    def backbone() -> np.ndarray:
        out = unet(given["x"], given["t"], class_labels=given["labels"]).sample
        return channels_last(out)

    return {"backbone": backbone}


def latent(folder: Path) -> dict:
    """The stages of latent.py."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    given, settings = inputs(folder), json.loads((folder / "settings.json").read_text())
    pipeline = diffusers.LatentConsistencyModelPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.LCMScheduler(**settings["schedule"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def text() -> np.ndarray:
        return text_encoder(given["ids"]).last_hidden_state.numpy()

    def backbone() -> np.ndarray:
        out = unet(given["x"], settings["timestep"], given["states"], timestep_cond=given["timestep_cond"]).sample
        return channels_last(out)

    def decode() -> np.ndarray:
        return channels_last(vae.decode(given["x"] / vae.config.scaling_factor).sample)

    def generate() -> np.ndarray:
        images = pipeline(
            prompt_embeds=text_encoder(given["ids"]).last_hidden_state,
            height=settings["size"],
            width=settings["size"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            generator=torch.Generator("cpu").manual_seed(settings["seed"]),
        ).images
        return np.asarray(images[0])

    return {"text": text, "backbone": backbone, "decode": decode, "generate": generate}


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Inputs that both sides get."""
    with np.load(folder / "inputs.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def channels_last(x: torch.Tensor) -> np.ndarray:
    """A view of (B, C, H, W) in the layout of the other side."""
    return x.numpy().transpose(0, 2, 3, 1)


BENCHMARKS = {"pixel": pixel, "latent": latent}

if __name__ == "__main__":
    with torch.inference_mode():
        harness.serve(BENCHMARKS[sys.argv[1]](Path(sys.argv[2])))
