"""A latent consistency model at Stable Diffusion's size against diffusers: each part, and whole pictures.

The U-Net of LCM Dreamshaper, CLIP-L and Stable Diffusion's autoencoder with random weights, the same on both sides,
each side a process of its own; they take turns. Their results are compared before their times are.

    python benchmarks/latent.py --size 256
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import mlx_cm  # noqa: F401, before MLX, or MLX does not find OpenBLAS

# isort: split
import checkpoints
import harness
import mlx.core as mx
import mlx.nn as nn
import mlx_side
import numpy as np
import tables
from tables import OURS, Table

from mlx_cm.config import config_from_dict
from mlx_cm.guidance import guidance_embedding, w_from_guidance_scale
from mlx_cm.models.autoencoder_kl import SD_VAE, AutoencoderKL, AutoencoderKLConfig
from mlx_cm.models.clip_text import CLIPTextConfig, CLIPTextModel
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.pipelines.latent import WHOLE_UP_TO, LatentConsistencyPipeline, LatentSettings
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.storage import read_json

STEPS = 4
GUIDANCE_SCALE = 8.0
SEED = 0
TIMESTEP = 499  # of the network call that is timed alone
PARTS_TITLE = f"text, {STEPS} network calls, decoding"
PROMPT = ""  # the ids are random, whatever the prompt


@dataclass(frozen=True)
class Part:
    """A component of both sides."""

    model: type[nn.Module]  # of ours
    config: type
    published: str
    file: str


DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
PARTS = {
    "unet": Part(UNet2DCondition, UNet2DConditionConfig, "UNet2DConditionModel", DIFFUSERS_FILE),
    "vae": Part(AutoencoderKL, AutoencoderKLConfig, "AutoencoderKL", DIFFUSERS_FILE),
    "text_encoder": Part(CLIPTextModel, CLIPTextConfig, "CLIPTextModel", TRANSFORMERS_FILE),
}
FULL = {
    "unet": UNet2DConditionConfig(
        sample_size=96,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        attention_head_dim=8,
        cross_attention_dim=768,
        time_cond_proj_dim=256,
    ),
    "vae": SD_VAE,
    "text_encoder": CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
}
TINY = {
    "unet": UNet2DConditionConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
        time_cond_proj_dim=16,
    ),
    "vae": AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
    ),
    "text_encoder": CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=1000,
        bos_token_id=998,
        eos_token_id=999,
    ),
}


class FixedIds:
    """Stands for a tokenizer: the same ids for every prompt."""

    def __init__(self, ids: mx.array):
        self.ids = ids

    def encode(self, prompts: list[str]) -> mx.array:
        """Ids of shape (prompts, 77)."""
        return mx.repeat(self.ids, len(prompts), axis=0)


def write_inputs(folder: Path, configs: dict, size: int) -> None:
    """Weights, inputs and settings for both sides."""
    for name, part in PARTS.items():
        harness.progress(f"writing random weights: {name}")
        checkpoints.write_component(folder / name, part.model(configs[name]), part.published, part.file)
    unet, vae, text = (configs[name] for name in PARTS)
    generator = np.random.default_rng(0)
    length, side = text.max_position_embeddings, size // vae.pixels_per_latent
    words = generator.integers(0, text.bos_token_id, (1, length - 2))
    w = mx.array([w_from_guidance_scale(GUIDANCE_SCALE)])
    np.savez(
        folder / "inputs.npz",
        ids=np.hstack([[[text.bos_token_id]], words, [[text.eos_token_id]]]),
        states=generator.standard_normal((1, length, text.hidden_size), dtype=np.float32),
        x=generator.standard_normal((1, vae.latent_channels, side, side), dtype=np.float32),
        timestep_cond=np.array(guidance_embedding(w, unet.time_cond_proj_dim)),
    )
    schedule = DiscreteSchedule()
    settings = {
        "size": size,
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": SEED,
        "timestep": TIMESTEP,
        "schedule": {name: getattr(schedule, name) for name in ("beta_start", "beta_end", "beta_schedule")},
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def load_part(folder: Path, name: str) -> nn.Module:
    """Our model of a component that `write_inputs` wrote."""
    part, path = PARTS[name], folder / name
    config = config_from_dict(part.config, read_json(path / checkpoints.CONFIG), str(path))
    return mlx_side.load_component(part.model(config), path / part.file)


def serve(folder: Path) -> None:
    """Our side."""
    size = read_json(folder / "settings.json")["size"]
    given = mlx_side.load_inputs(folder / "inputs.npz")
    unet, vae, text_encoder = (load_part(folder, name) for name in PARTS)
    tokenizer = FixedIds(given["ids"].astype(mx.int32))
    settings = LatentSettings(sampler="lcm", guidance_scale=GUIDANCE_SCALE, steps=STEPS)
    pipeline = LatentConsistencyPipeline(unet, vae, [text_encoder], [tokenizer], DiscreteSchedule(), settings)
    wanted = {"width": size, "height": size, "seed": SEED, "rng": "torch"}  # diffusers' draws
    request = pipeline.resolve(PROMPT, **wanted)
    context = unet.prepare(given["states"], timestep_cond=given["timestep_cond"])
    mlx_side.evaluate(context)

    def prepare() -> None:
        mlx_side.evaluate(pipeline.prepare(request))

    def generate() -> np.ndarray:
        return np.asarray(pipeline.generate(PROMPT, **wanted)[0])

    calls = {"prepare": 1, "backbone": STEPS, "decode": 1}
    harness.serve(
        {
            "text": mlx_side.computed(lambda: pipeline.encode_prompt([PROMPT]).states),
            "prepare": prepare,
            "backbone": mlx_side.computed(lambda: unet(given["x"], TIMESTEP, context)),
            "decode": mlx_side.computed(lambda: pipeline.decode(given["x"])),
            "generate": generate,
            "watched": mlx_side.watched(pipeline, calls, generate),
        }
    )


def measure(arguments: argparse.Namespace, folder: Path) -> list[Table]:
    """Compares every part and whole generations, then ours with the sum of its parts."""
    harness.check_comparison(arguments)
    size = 64 if arguments.quick else arguments.size
    write_inputs(folder, TINY if arguments.quick else FULL, size)
    titles = {
        "text": "text, 77 tokens",
        "backbone": f"U-Net, {size // 8}x{size // 8} latents",
        "decode": f"decoding {size}x{size}",
        "generate": f"{STEPS} steps, {size}x{size}",
    }
    stages = ["text", *["backbone"] * STEPS, "decode", "generate"]
    with harness.both(__file__, "latent", folder, arguments.ours_only) as sides:
        first = {}
        for name, side in sides.items():
            harness.progress(f"warming up, {name}")
            first[name] = side.ask("generate")  # runs every part
        seconds, differences = harness.alternate(sides, stages, arguments.runs, folder)
        prepare = statistics.median(sides[OURS].ask("prepare")["seconds"] for _ in range(arguments.runs))
        inside = []
        for run in range(arguments.runs):
            harness.progress(f"run {run + 1} of {arguments.runs}: inside generate, {OURS}")
            inside.append(sides[OURS].ask("watched"))
    calls = tables.per_run(seconds[OURS, "backbone"], STEPS)
    apart = [prepare + networks + decode for networks, decode in zip(calls, seconds[OURS, "decode"], strict=True)]
    return [
        tables.comparison(titles, seconds, differences),
        tables.memory("the first picture", first),
        tables.overhead(PARTS_TITLE, seconds[OURS, "generate"], apart, inside),
    ]


def picture_size(text: str) -> int:
    """Pixels a side: a multiple of 64, and no more than both sides decode in one piece."""
    size, limit = int(text), WHOLE_UP_TO * SD_VAE.pixels_per_latent
    if size % 64 or not 64 <= size <= limit:
        raise argparse.ArgumentTypeError(f"expected a multiple of 64, at most {limit}, got {text}")
    return size


def main() -> None:
    """Measures, or runs as our side."""
    parser = harness.make_parser(__doc__)
    harness.add_comparison(parser)
    parser.add_argument("--size", type=picture_size, default=512, help="of the pictures, pixels (default: 512)")
    arguments = parser.parse_args()
    if arguments.side is not None:
        serve(arguments.side)
    else:
        harness.run(parser, arguments, measure, mx.default_device().type.name)


if __name__ == "__main__":
    main()
