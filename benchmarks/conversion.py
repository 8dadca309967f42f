"""What converting a checkpoint costs, in units of copying the file and of its largest tensor.

A random ImageNet-64 consistency model in OpenAI's dialect (295,899,267 parameters, 1.2 GB) is converted in a fresh
process each time, from safetensors and from the format of `torch.save`. Between conversions the file is copied and
flushed to the disk.

    python benchmarks/conversion.py
"""

import argparse
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import checkpoints
import harness
import tables
from harness import Side
from tables import MIB, Table

from mlx_cm.convert import convert
from mlx_cm.convert.planning import Options
from mlx_cm.models.unet2d import IMAGENET_64
from mlx_cm.storage import write_safetensors
from recipes.seeded_model import CONFIG as SMALL_MODEL

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "--verify": {"verify": True},
    "--dtype float16": {"dtype": "float16"},
}
COLUMNS = {
    "source": "{source}",
    "options": "{options}",
    "time ÷ copying": tables.RATIO,
    "memory ÷ largest tensor": "{growth_by_largest:.2f}",
    "memory ÷ file": "{growth_by_file:.3f}",
    "s": "{seconds:.2f}",
    "copying, s": "{copy_seconds:.2f}",
    "memory, MiB": "{growth_mib:.0f}",
    "with interpreter and libraries, MiB": "{peak_mib:.0f}",
}


def convert_stage(source: str, destination: str, **options: Any) -> dict[str, Any]:
    """Converts, and says what came of it."""
    report = convert(Path(source), Path(destination), Options(**options))
    return {"parameters": report.parameters}


def copy_stage(source: str, destination: str) -> None:
    """Copies a file as fast as the system can and waits until it is on the disk."""
    shutil.copyfile(source, destination)
    with Path(destination).open("rb+") as file:
        os.fsync(file.fileno())


def make_sources(folder: Path, quick: bool) -> tuple[dict[str, Path], int]:
    """Writes the checkpoint in both formats; its files, and the bytes of its largest tensor."""
    tensors = checkpoints.openai_tensors(SMALL_MODEL if quick else IMAGENET_64)
    sources = {"safetensors": folder / "source.safetensors", "torch.save": folder / "source.pt"}
    harness.progress(f"writing {sum(tensor.nbytes for tensor in tensors) / 1e9:.2f} GB twice")
    with checkpoints.atomic_file(sources["safetensors"]) as partial:
        write_safetensors(partial, tensors, {"format": "pt"})
    checkpoints.write_torch(sources["torch.save"], tensors)
    return sources, max(tensor.nbytes for tensor in tensors)


def measure(arguments: argparse.Namespace, folder: Path) -> list[Table]:
    """Converts every source in every way, in turn."""
    sources, largest = make_sources(folder, arguments.quick)
    cases = [(source, options) for source in sources for options in VARIANTS]
    replies: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    copies: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for run in range(arguments.runs):
        for source, options in cases:
            harness.progress(f"run {run + 1} of {arguments.runs}: {source} {options}")
            with Side(__file__, "--side") as side:
                copy, model = folder / "copy", folder / "model"
                path = str(sources[source])
                copied = side.ask("copy", source=path, destination=str(copy))
                copy.unlink()
                converted = side.ask("convert", source=path, destination=str(model), **VARIANTS[options])
                shutil.rmtree(model)
            copies[source, options].append(copied["seconds"])
            replies[source, options].append(converted)
    rows = [
        row(source, options, replies[source, options], copies[source, options], sources[source], largest)
        for source, options in cases
    ]
    return [Table("conversion", COLUMNS, rows)]


def row(
    source: str, options: str, replies: list[dict[str, Any]], copies: list[float], path: Path, largest: int
) -> dict[str, Any]:
    """One line of the table: medians of all runs."""
    growth = statistics.median(reply["memory_growth"] for reply in replies)
    peak = statistics.median(reply["memory_peak"] for reply in replies)
    seconds = [reply["seconds"] for reply in replies]
    return {
        "source": source,
        "options": options,
        "parameters": replies[0]["parameters"],
        "file_mib": path.stat().st_size / MIB,
        "largest_tensor_mib": largest / MIB,
        "memory": harness.memory_kind(),
        **tables.ratios(seconds, copies),
        "growth_by_largest": growth / largest,
        "growth_by_file": growth / path.stat().st_size,
        "seconds": statistics.median(seconds),
        "copy_seconds": statistics.median(copies),
        "growth_mib": growth / MIB,
        "peak_mib": peak / MIB,
    }


def main() -> None:
    """Measures, or runs as one side."""
    parser = harness.make_parser(__doc__)
    arguments = parser.parse_args()
    if arguments.side is not None:
        harness.serve({"convert": convert_stage, "copy": copy_stage})
    else:
        harness.run(parser, arguments, measure)


if __name__ == "__main__":
    main()
