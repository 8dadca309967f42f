"""The ImageNet-64 U-Net against diffusers, and what generating costs beside it.

Both sides have the same random weights and the same inputs, each a process of its own; they take turns. Their results
are compared before their times are.

    python benchmarks/pixel.py
"""

import argparse
from pathlib import Path

import mlx_cm  # noqa: F401, before MLX, or MLX does not find OpenBLAS

# isort: split
import checkpoints
import harness
import mlx.core as mx
import mlx_side
import numpy as np
import tables
from tables import OURS, Table

from mlx_cm.config import config_from_dict
from mlx_cm.models.unet2d import IMAGENET_64, UNet2D, UNet2DConfig
from mlx_cm.pipelines.pixel import ConsistencyModelPipeline
from mlx_cm.schedules import KarrasSchedule
from mlx_cm.storage import read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = UNet2DConfig(
    sample_size=16,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    norm_num_groups=8,
    attn_norm_num_groups=8,
    resnet_time_scale_shift="scale_shift",
    num_class_embeds=10,
)
STEPS = 4
LABEL = 1
PARTS_TITLE = f"{STEPS} network calls"


def write_inputs(folder: Path, config: UNet2DConfig) -> None:
    """Weights and inputs for both sides."""
    harness.progress("writing random weights")
    checkpoints.write_component(folder / "unet", UNet2D(config), "UNet2DModel", WEIGHTS)
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    np.savez(folder / "inputs.npz", x=x, t=np.float32([250.0]), labels=np.array([LABEL]))


def serve(folder: Path) -> None:
    """Our side."""
    config = config_from_dict(UNet2DConfig, read_json(folder / "unet" / checkpoints.CONFIG), "config.json")
    unet = mlx_side.load_component(UNet2D(config), folder / "unet" / WEIGHTS)
    pipeline = ConsistencyModelPipeline(unet, KarrasSchedule())
    given = mlx_side.load_inputs(folder / "inputs.npz")

    def generate() -> np.ndarray:
        return np.asarray(pipeline.generate(steps=STEPS, labels=LABEL)[0])

    harness.serve(
        {
            "backbone": mlx_side.computed(lambda: unet(given["x"], given["t"], given["labels"].astype(mx.int32))),
            "generate": generate,
            "watched": mlx_side.watched(pipeline, {"backbone": STEPS}, generate),
        }
    )


def measure(arguments: argparse.Namespace, folder: Path) -> list[Table]:
    """Compares the network, then generation with its network calls."""
    harness.check_comparison(arguments)
    write_inputs(folder, TINY if arguments.quick else IMAGENET_64)
    with harness.both(__file__, "pixel", folder, arguments.ours_only) as sides:
        first = {name: side.ask("backbone") for name, side in sides.items()}
        seconds, differences = harness.alternate(sides, ["backbone"] * STEPS, arguments.runs, folder)
        ours = {OURS: sides[OURS]}
        sides[OURS].ask("generate")
        own, _ = harness.alternate(ours, ["backbone"] * STEPS + ["generate"], arguments.runs, folder)
        inside = [sides[OURS].ask("watched") for _ in range(arguments.runs)]
    apart = tables.per_run(own[OURS, "backbone"], STEPS)
    return [
        tables.comparison({"backbone": "network call"}, seconds, differences),
        tables.memory("the first network call", first),
        tables.overhead(PARTS_TITLE, own[OURS, "generate"], apart, inside),
    ]


def main() -> None:
    """Measures, or runs as our side."""
    parser = harness.make_parser(__doc__)
    harness.add_comparison(parser)
    arguments = parser.parse_args()
    if arguments.side is not None:
        serve(arguments.side)
    else:
        harness.run(parser, arguments, measure, mx.default_device().type.name)


if __name__ == "__main__":
    main()
