"""Memory and time of one training step of LCM-LoRA at Stable Diffusion's size, with and without gradient checkpointing.

The U-Net of Stable Diffusion 1.5 with random weights, batch 1, an adapter of rank 64: two calls of the teacher, one of
the target, one of the student, its gradient, and an update. Latents and text features are noise, as if from the cache.
Every measurement is the first step of a fresh process.

    python benchmarks/lora_step.py --size 256
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx_cm  # noqa: F401, before MLX, or MLX does not find OpenBLAS

# isort: split
import harness
import mlx.core as mx
from harness import BenchmarkError, Side
from latent import FULL, TINY, picture_size
from mlx.utils import tree_flatten
from tables import MIB, Table

from mlx_cm.lora import attach_lora
from mlx_cm.model_folder import DTYPES
from mlx_cm.models.autoencoder_kl import SD_VAE, AutoencoderKL
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.pipelines.latent import LatentConsistencyPipeline, LatentSettings
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.training.assembly import make_objective
from mlx_cm.training.loop import Trainer
from mlx_cm.training.methods import LATENT
from mlx_cm.training.models import Trainee, clone
from mlx_cm.training.recomputation import recompute_blocks
from mlx_cm.training.settings import read_settings

SEED = 0
TOKENS = 77
COLUMNS = {
    "step": "{what}",
    "MLX's peak ÷ first row": "{peak_ratio:.2f}",
    "time ÷ first row": "{time_ratio:.2f}",
    "MLX's peak, MiB": "{peak_mib:.0f}",
    "of that weights and state, MiB": "{state_mib:.0f}",
    "memory of the process, MiB": "{memory_mib:.0f}",
    "s": "{seconds:.2f}",
}


class Case(NamedTuple):
    """One way to take a step."""

    recompute: bool  # gradient checkpointing

    def title(self, size: int) -> str:
        """In words."""
        return f"{size}x{size}, {'blocks recomputed' if self.recompute else 'everything kept'}"


# The first is what the others are compared with.
CASES = (Case(recompute=False), Case(recompute=True))


class NoiseBatches:
    """Stands for cached features of pictures and prompts."""

    def __init__(self, side: int, config: UNet2DConditionConfig, dtype: mx.Dtype):
        self._shape = (side, side, config.in_channels)
        self._width, self._dtype = config.cross_attention_dim, dtype

    def load(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        """Rows of a step's batch."""
        mean = mx.random.normal((stop - start, *self._shape), key=mx.random.key(step))
        return {"mean": mean, "std": mx.full(mean.shape, 0.1), **self.prompt_rows([""] * len(mean))}

    def prompt_rows(self, texts: list[str]) -> dict[str, mx.array]:
        """Text features, the same for every text."""
        states = mx.random.normal((1, TOKENS, self._width), key=mx.random.key(SEED)).astype(self._dtype)
        return {"states": mx.broadcast_to(states, (len(texts), TOKENS, self._width))}


def make_trainer(config: UNet2DConditionConfig, side: int, dtype: str, recompute: bool) -> Trainer:
    """What `mlx-cm train lcm-lora` works with, its encoders released."""
    overrides = {"train.batch_size": 1, "train.dtype": dtype, "train.seed": SEED, "train.recompute": recompute}
    settings = read_settings("lcm-lora", overrides=overrides)
    mx.random.seed(SEED)
    teacher = UNet2DCondition(config)
    kept = tuple(f"{part}." for part in teacher.float32_parts)
    weights = tree_flatten(teacher.parameters())
    teacher.load_weights([(name, x if name.startswith(kept) else x.astype(DTYPES[dtype])) for name, x in weights])
    student, lora = clone(teacher, config), settings.lora
    attach_lora(student, lora.targets, rank=lora.rank, alpha=lora.rank, key=mx.random.key(SEED))
    if recompute:
        recompute_blocks(student)
    vae = AutoencoderKL(SD_VAE)  # never computed
    pipeline = LatentConsistencyPipeline(student, vae, [], [], DiscreteSchedule(), LatentSettings(sampler="lcm"))
    trainee = Trainee(LATENT, {"unet": student}, pipeline, teacher, has_lora=True)
    batches = NoiseBatches(side, config, DTYPES[dtype])
    trainer = Trainer(trainee.modules, make_objective(settings, trainee, batches), batches, settings.train)
    mx.eval(teacher.parameters(), student.parameters(), trainer.student, trainer.optimizer.state)
    return trainer


def serve(config: UNet2DConditionConfig) -> None:
    """Takes a step."""
    made = []

    def prepare(side: int, dtype: str, recompute: bool) -> dict[str, Any]:
        made.append(make_trainer(config, side, dtype, recompute))
        mx.clear_cache()
        return {}

    def step() -> dict[str, Any]:
        mx.reset_peak_memory()
        state = mx.get_active_memory()
        report = made[0].advance()
        if not report.is_finite:
            raise BenchmarkError(f"the loss is {report.loss}")
        return {"state": state, "peak": mx.get_peak_memory(), "loss": report.loss}

    harness.serve({"prepare": prepare, "step": step})


def measure(arguments: argparse.Namespace, folder: Path) -> list[Table]:
    """Takes a step in every way in turn, each in a process of its own; nothing is written."""
    size = 192 if arguments.quick else arguments.size
    side, options = size // SD_VAE.pixels_per_latent, ["--quick"] if arguments.quick else []
    replies: dict[Case, list[dict[str, Any]]] = {case: [] for case in CASES}
    for run in range(arguments.runs):
        for case in CASES:
            harness.progress(f"run {run + 1} of {arguments.runs}: {case.title(size)}")
            with Side(__file__, "--side", *options) as process:
                process.ask("prepare", side=side, dtype=arguments.dtype, **case._asdict())
                replies[case].append(process.ask("step"))
    losses = [replies[case][0]["loss"] for case in CASES]
    if max(losses) - min(losses) > harness.TOLERANCES["f"] * abs(losses[0]):
        raise BenchmarkError(f"the losses are {losses}: the two ways did not compute the same")
    rows = [{"what": case.title(size), **case._asdict(), **medians(replies[case])} for case in CASES]
    for row in rows:
        row["peak_ratio"], row["time_ratio"] = (row[key] / rows[0][key] for key in ("peak_mib", "seconds"))
    return [Table("lora_step", COLUMNS, rows)]


def medians(replies: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all runs."""

    def median(key: str, unit: float = MIB) -> float:
        return statistics.median(reply[key] for reply in replies) / unit

    return {
        "memory": harness.memory_kind(),
        "memory_mib": median("memory_peak"),
        "peak_mib": median("peak"),
        "state_mib": median("state"),
        "seconds": median("seconds", 1),
    }


def main() -> None:
    """Measures, or runs as one process of it."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--size", type=picture_size, default=512, help="of the pictures, pixels (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="to compute in (default: float32)")
    arguments = parser.parse_args()
    if arguments.side is not None:
        config = (TINY if arguments.quick else FULL)["unet"]
        serve(replace(config, time_cond_proj_dim=None))  # an adapter makes do without the embedding of guidance
    else:
        harness.run(parser, arguments, measure, mx.default_device().type.name)


if __name__ == "__main__":
    main()
