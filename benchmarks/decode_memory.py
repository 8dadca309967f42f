"""Memory and time of decoding latents whole and tile by tile, with Stable Diffusion's autoencoder.

Every measurement is the first of a fresh process: memory that was once used often stays with a process.

    python benchmarks/decode_memory.py
"""

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import mlx_cm  # noqa: F401, before MLX, or MLX does not find OpenBLAS

# isort: split
import harness
import mlx.core as mx
from harness import Side
from tables import MIB, Table

from mlx_cm.models.autoencoder_kl import SD_VAE, AutoencoderKL, AutoencoderKLConfig
from mlx_cm.tiling import decode_tiled


class Case(NamedTuple):
    """A picture to decode."""

    size: int  # pixels a side
    tile: int | None  # latents a side; None: whole


# The first of each is what the others are compared with.
CASES = (Case(512, None), Case(512, 32), Case(1024, 64), Case(1024, 32))
LARGE = (Case(1024, None),)
TINY_CASES = (Case(128, None), Case(128, 8), Case(256, 16))
COLUMNS = {
    "decoding": "{what}",
    "memory of the process ÷ first row": "{memory_ratio:.2f}",
    "MLX's peak ÷ first row": "{mlx_ratio:.2f}",
    "time per pixel ÷ first row": "{time_ratio:.2f}",
    "memory of the process, MiB": "{memory_mib:.0f}",
    "MLX's peak, MiB": "{mlx_mib:.0f}",
    "s": "{seconds:.2f}",
}
TINY_VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 16, 32, 32),
    norm_num_groups=4,
)


def title(case: Case) -> str:
    """A case in words."""
    how = "whole" if case.tile is None else f"tiles of {case.tile * SD_VAE.pixels_per_latent}"
    return f"{case.size}x{case.size} {how}"


def serve(config: AutoencoderKLConfig) -> None:
    """Decodes noise."""
    vae = AutoencoderKL(config)
    unit = config.pixels_per_latent
    mx.eval(vae.parameters())
    mx.eval(vae.decode_scaled(mx.zeros((1, 8, 8, config.latent_channels))))  # threads and kernels are ready
    mx.clear_cache()

    def decode(size: int, tile: int | None) -> dict[str, Any]:
        latents = mx.random.normal((1, size // unit, size // unit, config.latent_channels), key=mx.random.key(0))
        mx.eval(latents)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        decoded = vae.decode_scaled
        mx.eval(decoded(latents) if tile is None else decode_tiled(decoded, latents, tile=tile, scale=unit))
        return {"mlx_growth": mx.get_peak_memory() - before}

    harness.serve({"decode": decode})


def measure(arguments: argparse.Namespace, folder: Path) -> list[Table]:
    """Decodes every case in turn, each in a process of its own; nothing is written."""
    cases = TINY_CASES if arguments.quick else CASES + (LARGE if arguments.large else ())
    options = ["--quick"] if arguments.quick else []
    replies: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for run in range(arguments.runs):
        for case in cases:
            harness.progress(f"run {run + 1} of {arguments.runs}: {title(case)}")
            with Side(__file__, "--side", *options) as side:
                replies[case].append(side.ask("decode", **case._asdict()))
    rows = [{"what": title(case), **case._asdict(), **medians(replies[case])} for case in cases]
    first = rows[0]
    for row in rows:
        pixels = (row["size"] / first["size"]) ** 2
        row["memory_ratio"] = row["memory_mib"] / first["memory_mib"]
        row["mlx_ratio"] = row["mlx_mib"] / first["mlx_mib"]
        row["time_ratio"] = row["seconds"] / first["seconds"] / pixels
    return [Table("decoding", COLUMNS, rows)]


def medians(replies: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all runs; memory is what decoding adds to the weights."""
    return {
        "memory": harness.memory_kind(),
        "memory_mib": statistics.median(reply["memory_growth"] for reply in replies) / MIB,
        "mlx_mib": statistics.median(reply["mlx_growth"] for reply in replies) / MIB,
        "seconds": statistics.median(reply["seconds"] for reply in replies),
    }


def main() -> None:
    """Measures, or runs as one process of it."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--large", action="store_true", help="also 1024x1024 whole, in over four times the memory")
    arguments = parser.parse_args()
    if arguments.side is not None:
        serve(TINY_VAE if arguments.quick else SD_VAE)
    else:
        harness.run(parser, arguments, measure, mx.default_device().type.name)


if __name__ == "__main__":
    main()
