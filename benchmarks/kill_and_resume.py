"""Kills training at random moments, time after time, and looks whether the run comes to the same end.

One run is left alone. The others are killed with SIGKILL and resumed until they have been killed often enough: at any
moment of a start, of the training, and every third time as soon as something is half written. A resume that fails, or
a byte of weights, optimiser, averages, samples, model or log that differs from the run left alone, is an error.

    python benchmarks/kill_and_resume.py
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx_cm  # noqa: F401, so that the line about the machine tells what its processes compute with

# isort: split
import harness
import numpy as np
from harness import BenchmarkError
from tables import Table

PROGRAM = Path(__file__).resolve().parent.parent / "cli.py"
KILLS, QUICK_KILLS = 50, 2
SIDE, PICTURES = 8, 61
POLL_S = 0.001
KILLED = -9
CONFIG = """
[train]
steps = {steps}
batch_size = 4
accumulate = 2
ema = [0.9, 0.999]
log_every = 1
sample_every = 20
checkpoint_every = 3

[samples]
count = 4
steps = [1, 2]

[model.unet]
sample_size = 8
in_channels = 1
out_channels = 1
block_out_channels = [8]
layers_per_block = 1
down_block_types = ["DownBlock2D"]
up_block_types = ["UpBlock2D"]
norm_num_groups = 4
dropout = 0.1
"""
STEPS, QUICK_STEPS = 150, 8
COLUMNS = {
    "kills": "{kills}",
    "before a step was made": "{at_start}",
    "later": "{later}",
    "with something half written": "{half_written}",
    "runs that came to the same end": "{ended}",
    "steps made again": "{again}",
    "s": "{seconds:.0f}",
}


class Run:
    """A run in a folder, which may be killed."""

    def __init__(self, place: Path, name: str):
        self.place, self.folder, self.messages = place, place / name, place / f"{name}.txt"

    def start(self) -> subprocess.Popen:
        """A process that begins the run, or goes on with it."""
        arguments = ["--data", self.place / "data.npz", "--config", self.place / "ct.toml"]
        if (self.folder / "config.toml").exists():
            arguments = ["--resume"]
        command = [sys.executable, PROGRAM, "train", "ct", "-o", self.folder, *arguments]
        with self.messages.open("w") as messages:
            return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=messages)

    def check(self, code: int, *expected: int) -> None:
        """Looks how a process has ended.

        Raises:
            BenchmarkError: with another exit code, or with an error message.
        """
        said = self.messages.read_text()
        if code not in expected or "error" in said or "Traceback" in said:
            raise BenchmarkError(f"{self.folder.name} ended with exit code {code}: {said}")

    @property
    def steps(self) -> int:
        """How many steps the log has."""
        path = self.folder / "log.csv"
        return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0

    @property
    def is_half_written(self) -> bool:
        """Whether a file or folder is being written."""
        return any(self.folder.rglob("*.partial"))

    def end(self) -> dict[str, str]:
        """What the run has come to: digests by name."""
        newest = max((self.folder / "checkpoints").iterdir())
        files = [*newest.glob("*.safetensors"), *self.folder.glob("model/**/*"), *self.folder.glob("samples/*")]
        found = {str(path.relative_to(self.folder)): path.read_bytes() for path in files if path.is_file()}
        rows = [line.split(",") for line in (self.folder / "log.csv").read_text().splitlines()]
        speed = rows[0].index("images_per_second")  # is never the same
        found["log.csv"] = repr([row[:speed] + row[speed + 1 :] for row in rows]).encode()
        return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def measure(arguments: argparse.Namespace, folder: Path) -> list[Table]:
    """Kills and resumes.

    Raises:
        BenchmarkError: a resume failed, or a run came to another end.
    """
    kills = arguments.kills or (QUICK_KILLS if arguments.quick else KILLS)
    os.environ["MLX_CM_CACHE"] = str(folder / "cache")
    chance = random.Random(arguments.seed)
    shape = (PICTURES, SIDE, SIDE, 1)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(PICTURES) % 3)
    (folder / "ct.toml").write_text(CONFIG.format(steps=QUICK_STEPS if arguments.quick else STEPS))

    harness.progress("the run that is left alone")
    alone = Run(folder, "alone")
    start_s = finish(alone)
    expected = alone.end()

    row: dict[str, Any] = dict.fromkeys(("kills", "at_start", "later", "half_written", "ended", "again"), 0)
    began, run = time.perf_counter(), Run(folder, "run1")
    while row["kills"] < kills:
        if not kill(run, chance, start_s, row):  # it came to its end before
            compare(run, expected, row)
            run = Run(folder, f"run{row['ended'] + 1}")
        harness.progress(f"kill {row['kills']} of {kills}: at step {run.steps} of {run.folder.name}")
    finish(run)
    compare(run, expected, row)
    return [Table("kills", COLUMNS, [row | {"start_s": start_s, "seconds": time.perf_counter() - began}])]


def kill(run: Run, chance: random.Random, start_s: float, row: dict[str, Any]) -> bool:
    """Starts or resumes a run and kills it; whether there was time for that.

    Args:
        start_s: what a start takes.
        row: counts.

    Raises:
        BenchmarkError: it had failed before.
    """
    before, began = run.steps, time.perf_counter()
    process = run.start()
    wait_s, waits_for_writing = chance.uniform(0, 2 * start_s), row["kills"] % 3 == 2
    while process.poll() is None and time.perf_counter() - began < wait_s:
        time.sleep(POLL_S)
    while process.poll() is None and waits_for_writing and not run.is_half_written:
        time.sleep(POLL_S)
    process.kill()
    run.check(process.wait(), 0, KILLED)
    if process.returncode == 0:
        return False
    reached = run.steps
    row["kills"] += 1
    row["half_written"] += run.is_half_written
    row["at_start" if reached <= before else "later"] += 1
    kept = max((int(path.name[5:]) for path in run.folder.glob("checkpoints/step_*")), default=0)
    row["again"] += max(reached - kept, 0) if reached > before else 0
    return True


def finish(run: Run) -> float:
    """Lets a run come to its end; what it took until its first step, in seconds.

    Raises:
        BenchmarkError: it failed.
    """
    before, began, start_s = run.steps, time.perf_counter(), 0.0
    process = run.start()
    while process.poll() is None:
        if not start_s and run.steps > before:
            start_s = time.perf_counter() - began
        time.sleep(POLL_S)
    run.check(process.returncode, 0)
    return start_s


def compare(run: Run, expected: dict[str, str], row: dict[str, Any]) -> None:
    """Counts a run that came to its end.

    Raises:
        BenchmarkError: it is another one.
    """
    row["ended"] += 1
    found = run.end()
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different or run.is_half_written:
        raise BenchmarkError(f"{run.folder.name} came to another end: {', '.join(different) or 'a file half written'}")


def main() -> None:
    """Kills and resumes, and prints how that went."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--kills", type=harness.positive, help=f"how often (default: {KILLS})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    harness.run(parser, parser.parse_args(), measure)


if __name__ == "__main__":
    main()
