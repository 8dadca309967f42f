"""Training so small that a step takes a moment: networks of one level, latent ones without encoders."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_cm.metrics import l2
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.pipelines.pixel import ConsistencyModelPipeline, PixelSettings
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule
from mlx_cm.training.assembly import make_objective
from mlx_cm.training.checkpoints import Checkpoint
from mlx_cm.training.loop import Trainer
from mlx_cm.training.models import build_trainee, new_network
from mlx_cm.training.objectives import LatentConsistency, LatentConsistencySettings, LatentModel, Randomness
from mlx_cm.training.settings import Settings, TrainSettings, read_settings, to_toml
from mlx_cm.training.weights import Parameters

ROOT = Path(__file__).parent.parent
SIDE = 4
UNET = {
    "sample_size": SIDE,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "num_class_embeds": 3,
    "dropout": 0.1,
}
LATENT_UNET = UNet2DConditionConfig(
    sample_size=SIDE, block_out_channels=(4,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=6, attention_head_dim=2, norm_num_groups=2,
    time_cond_proj_dim=8,
)  # fmt: skip
GUIDANCE_WIDTH = 8


class PixelRows:
    """Random pictures with labels, a function of step and row."""

    def load(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        rows = [np.random.default_rng([step, row]) for row in range(start, stop)]
        return {
            "x0": mx.array(np.stack([row.uniform(-1, 1, (SIDE, SIDE, 1)) for row in rows]), dtype=mx.float32),
            "class_labels": mx.array([int(row.integers(3)) for row in rows]),
        }


class LatentRows:
    """Random latents and text states."""

    def load(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        def drawn(*shape: int) -> mx.array:
            rows = [np.random.default_rng([step, row]).normal(size=shape) for row in range(start, stop)]
            return mx.array(np.stack(rows), dtype=mx.float32)

        return {"mean": drawn(SIDE, SIDE, 4), "std": mx.abs(drawn(SIDE, SIDE, 4)), "states": drawn(5, 6)}


def perturbed(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved, so that none is zero, and the network is not what it was made as."""
    leaves = tree_flatten(module.parameters())
    random = np.random.default_rng(seed)
    moved = [(name, value + mx.array(0.1 * random.normal(size=value.shape), value.dtype)) for name, value in leaves]
    module.update(tree_unflatten(moved))
    return module


def pixel_settings(method: str, overrides: dict[str, Any] | None = None, **train: Any) -> Settings:
    """Settings of a new pixel network."""
    values = {f"model.unet.{name}": value for name, value in UNET.items()}
    values |= {f"train.{name}": value for name, value in train.items()}
    return read_settings(method, overrides=values | (overrides or {}))


def pixel_teacher() -> ConsistencyModelPipeline:
    """A diffusion model of the size of `UNET`."""
    unet = build_trainee(pixel_settings("teacher"), None, num_classes=3).modules["unet"]
    return ConsistencyModelPipeline(perturbed(unet, 1), KarrasSchedule(), PixelSettings(parameterization="edm"))


def pixel_trainer(method: str, overrides: dict[str, Any] | None = None, **train: Any) -> Trainer:
    """A trainer of a new pixel network.

    Args:
        overrides: "section.name" => value.
        train: settings of `[train]`.
    """
    settings = pixel_settings(method, overrides, **train)
    trainee = build_trainee(settings, None, num_classes=3)
    perturbed(trainee.modules["unet"])
    return Trainer(trainee.modules, make_objective(settings, trainee, PixelRows()), PixelRows(), settings.train)


def latent_trainer(**train: Any) -> Trainer:
    """A trainer of a latent consistency model, distilled from a teacher."""
    mx.random.seed(0)
    unet, teacher = (perturbed(new_network(LATENT_UNET), seed) for seed in (0, 1))
    model = LatentModel(DiscreteSchedule(), {"states": mx.zeros((1, 5, 6))}, GUIDANCE_WIDTH)
    guided = lambda x, t, **cond: teacher(x, t, **cond, timestep_cond=mx.zeros((len(x), GUIDANCE_WIDTH)))  # noqa: E731
    objective = LatentConsistency(LatentConsistencySettings(), model, Randomness(0), l2, guided)
    return Trainer({"unet": unet}, objective, LatentRows(), TrainSettings(**train))


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that a trainer is, as bytes."""
    return checkpoint_bits(trainer.checkpoint())


def checkpoint_bits(checkpoint: Checkpoint) -> dict[str, Any]:
    """All numbers of a checkpoint, as bytes."""
    arrays = {
        f"{group}.{name}": np.array(array).tobytes()
        for group, found in checkpoint.arrays.items()
        for name, array in found.items()
    }
    return arrays | {"step": checkpoint.step, "optimizer_steps": checkpoint.state["optimizer_steps"]}


def difference(ours: Parameters, theirs: Parameters) -> float:
    """Relative difference of all weights together."""
    pairs = [(ours[part][name], theirs[part][name]) for part in theirs for name in theirs[part]]
    distance = sum(float(mx.square(a - b).sum()) for a, b in pairs)
    return (distance / sum(float(mx.square(b).sum()) for _, b in pairs)) ** 0.5


# --- runs


def write_data(path: Path, count: int = 11) -> Path:
    """An `.npz` file of small pictures with labels."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, SIDE, SIDE, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 3)
    return path


RUN = {
    "train": {
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "ema": [0.9, 0.99],
        "log_every": 2,
        "sample_every": 3,
        "checkpoint_every": 2,
    },
    "samples": {"count": 2, "steps": [1, 2]},
    "model": {"unet": UNET},
}


# Each step makes every weight more than forty times as large.
DIVERGING = {"optimizer": "adamw", "learning_rate": 9.0, "weight_decay": 5.0, "steps": 60, "sample_every": 0}


def write_config(path: Path, method: str = "ct", **train: Any) -> Path:
    """Settings of a short run whose curriculum goes on at almost every step."""
    path.write_text(to_toml({"method": method} | RUN | {"train": RUN["train"] | train}))
    return path


def program(*arguments: object) -> list[str]:
    """The command line of the program in a process of its own."""
    return [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


def kept_in(run: Path) -> dict[str, bytes]:
    """What a run comes to: the files that have to be the same however often it was stopped."""
    files = [*run.glob("model/**/*.safetensors"), *run.glob("samples/*"), *newest(run).glob("*.safetensors")]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)} | {"log": logged(run)}


def newest(run: Path) -> Path:
    """The newest checkpoint's folder."""
    return max((run / "checkpoints").glob("step_*"))


def logged(run: Path) -> bytes:
    """The log but for the speed, which is never the same."""
    rows = [line.split(",") for line in (run / "log.csv").read_text().splitlines()]
    speed = rows[0].index("images_per_second")
    return json.dumps([row[:speed] + row[speed + 1 :] for row in rows]).encode()
