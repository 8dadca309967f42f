"""What is trained for: which loss, with which draws, at a given step.

An objective is asked three things. `target_rate(step)`: how fast the target follows the student, None where there is
none. `draw(step, rows, shape)`: everything random of a step, for all pictures of the step. `loss(student, target,
batch)`: the loss of some of these pictures; the batch holds what the data gives and what was drawn.

Draws are functions of (seed, step), so that neither accumulation, nor several processes, nor an interruption changes
them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cm.errors import UsageError
from mlx_cm.guidance import guidance_embedding
from mlx_cm.losses import (
    Losses,
    autoencoder_loss,
    consistency_loss,
    diffusion_loss,
    edm_loss,
    forward_pair,
    latent_consistency_loss,
    solved_pair,
    teacher_step,
    trajectory_loss,
)
from mlx_cm.metrics import METRICS, Distance
from mlx_cm.parameterization import (
    Denoiser,
    consistency_function,
    edm_denoiser,
    trajectory_denoiser,
    trajectory_function,
)
from mlx_cm.pipelines.latent import features_of
from mlx_cm.rng import fold_in
from mlx_cm.samplers import Jump, euler_jump, heun_jump
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule
from mlx_cm.training.curriculum import CURRICULA, easy_consistency_level, grid, lognormal_probabilities
from mlx_cm.training.weights import Weighted

Batch = dict[str, mx.array]  # every entry with a row per picture


class Randomness(NamedTuple):
    """Where the draws of a run come from."""

    seed: int

    def levels(self, step: int) -> np.random.Generator:
        """For numbers that are computed in float64."""
        return np.random.default_rng([self.seed, step])

    def normal(self, step: int, stream: int, shape: tuple[int, ...]) -> mx.array:
        """Standard normal float32; another stream of the same step is independent."""
        return mx.random.normal(shape, key=self.key(step, stream))

    def key(self, step: int, stream: int) -> mx.array:
        """The key of one draw."""
        run = mx.random.split(mx.random.key(self.seed))[0]  # hashed, so that seed and step cannot stand for each other
        return fold_in(fold_in(run, step), stream)


NOISE, POSTERIOR, DROPOUT = range(3)  # streams


class Objective(Protocol):
    """One way to train; see the module."""

    def target_rate(self, step: int) -> float | None:
        """mu of the target's update after a step; 0 for the student's own weights, None without a target."""

    def describe(self, step: int) -> dict[str, float]:
        """What of the curriculum is worth logging."""

    def draw(self, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
        """The draws of a step for all its pictures, each array with `rows` rows; `shape` is of one picture."""

    def loss(self, student: Weighted, target: Weighted, batch: Batch) -> Losses:
        """The loss of the batch's pictures."""


def make_distance(name: str, c: float | None, lpips: nn.Module | None) -> Distance:
    """A metric by its name in `METRICS`, with its setting.

    Raises:
        UsageError: an unknown name, a setting that it has no use for, or LPIPS without its network.
    """
    if name not in METRICS:
        raise UsageError(f"distance {name!r}", f"expected one of {', '.join(METRICS)}")
    if c is not None and name not in ("pseudo_huber", "mean_pseudo_huber"):
        raise UsageError(f"distance_c {c:g}", f"the distance {name} has no c")
    if name == "lpips":
        if lpips is None:
            raise UsageError(
                "distance lpips", "needs the network's weights", "objective.lpips = a folder that `mlx-cm convert` made"
            )
        return METRICS[name](lpips)
    return METRICS[name](**({} if c is None else {"c": c}))


# --- pixels


@dataclass(frozen=True)
class PixelModel:
    """What objectives in pixel space know of the model."""

    schedule: KarrasSchedule
    noise_scale: float  # of the conditioning on ln(sigma)
    dropout: bool = False

    def denoiser(self, weights: Weighted) -> Denoiser:
        """D(x, sigma); like the others not clipped, since that would stop gradients."""
        return edm_denoiser(weights.unet, self.schedule, noise_scale=self.noise_scale, clip=False)

    def consistency(self, weights: Weighted) -> Denoiser:
        """f(x, t)."""
        return consistency_function(weights.unet, self.schedule, noise_scale=self.noise_scale, clip=False)

    def trajectory(self, weights: Weighted) -> Jump:
        """G(x, t, s)."""
        return trajectory_function(weights.unet, self.schedule, noise_scale=self.noise_scale)

    def inner(self, weights: Weighted) -> Jump:
        """g(x, t, s) within G; a denoiser where s = t."""
        return trajectory_denoiser(weights.unet, self.schedule, noise_scale=self.noise_scale)


TEACHER_CONDITIONS = ("class_labels",)
STUDENT_CONDITIONS = (*TEACHER_CONDITIONS, "dropout_key")  # and the target's, with the same key


def _conditions(batch: Batch, names: tuple[str, ...] = STUDENT_CONDITIONS) -> Batch:
    return {name: batch[name] for name in names if name in batch}


@dataclass(frozen=True)
class TeacherSettings:
    """Of `teacher`; which of them mean something depends on the space."""

    mean: float | None = None  # pixels: ln(sigma) ~ N(mean, std^2); None: [EDM] table 1
    std: float | None = None
    empty_prompts: float | None = None  # latents: how often a prompt is left out, for guidance; None: one in ten
    shift: float | None = None  # latents: above 1 more of the noisy timesteps, see `shifted`; None: all alike

    def __post_init__(self):
        if self.std is not None:
            _check_std(self.std)
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected above 0, got {self.shift}")
        if self.empty_prompts is not None and not 0 <= self.empty_prompts <= 1:
            raise ValueError(f"empty_prompts: expected 0 to 1, got {self.empty_prompts}")


def _check_std(std: float) -> None:
    if not std > 0:  # false for NaN too
        raise ValueError(f"std: expected above 0, got {std}")


EDM_LEVELS = (-1.2, 1.2)  # mean and standard deviation of ln(sigma), [EDM] table 1
EMPTY_PROMPTS = 0.1


@dataclass(frozen=True)
class EdmTeacher:
    """A denoiser to distil from."""

    settings: TeacherSettings
    model: PixelModel
    random: Randomness

    def target_rate(self, step: int) -> None:
        return None

    def describe(self, step: int) -> dict[str, float]:
        return {}

    def draw(self, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
        given = (self.settings.mean, self.settings.std)
        mean, std = (default if one is None else one for one, default in zip(given, EDM_LEVELS, strict=True))
        sigma = np.exp(self.random.levels(step).normal(mean, std, rows))
        return _common_draws(self.random, step, rows, shape, self.model.dropout) | {"t": _float32(sigma)}

    def loss(self, student: Weighted, target: Weighted, batch: Batch) -> Losses:
        denoise = self.model.denoiser(student)
        data = self.model.schedule.sigma_data
        return edm_loss(denoise, batch["x0"], batch["t"], batch["noise"], sigma_data=data, **_conditions(batch))


EASY = "easy"  # the curriculum without a grid
CLOSEST = 16  # of that curriculum, in powers of two: a level over its distance from the other of its pair
SOLVERS: dict[str, Callable[..., Jump]] = {"heun": heun_jump, "euler": euler_jump}


@dataclass(frozen=True)
class ConsistencySettings:
    """Of `cd`, `ct` and `ict`, whose defaults differ; see `mlx_cm.training.methods`."""

    curriculum: str = "fixed"  # of CURRICULA, or "easy": [ECT]'s pairs of levels, without a grid
    start_scales: int = 2  # s0, intervals at the beginning of a growing curriculum
    end_scales: int = 40  # s1, intervals at its end; of a fixed one N, the number of levels
    target_rate: float = 0.95  # mu, or mu0 of a growing curriculum; 0: the target is the student itself
    levels: str = "uniform"  # how often each interval is drawn; or "lognormal"
    mean: float = -1.1  # of ln(sigma) where lognormal, and in the easy curriculum
    std: float = 2.0
    weight: str = "uniform"  # or "inverse": 1 / (t - s)
    solver: str = "heun"  # or "euler", of the teacher's steps
    distance: str = "l2"  # of mlx_cm.metrics
    distance_c: float | None = None
    lpips: str = ""  # folder of the converted network
    stages: int = 8  # of the easy curriculum, equally long
    q: float = 2.0  # by which every stage divides the distance between the levels of a pair

    def __post_init__(self):
        for name, known in (
            ("curriculum", (*CURRICULA, EASY)), ("levels", ("uniform", "lognormal")),
            ("weight", ("uniform", "inverse")), ("solver", tuple(SOLVERS)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown, expected one of {list(known)}")
        if not 1 <= self.start_scales <= self.end_scales or self.end_scales < 2:
            raise ValueError(
                f"expected 1 <= start_scales <= end_scales >= 2, got {self.start_scales} and {self.end_scales}"
            )
        if not 0 <= self.target_rate < 1:
            raise ValueError(f"target_rate: expected at least 0 and below 1, got {self.target_rate}")
        _check_std(self.std)
        if self.stages < 1 or not self.q > 1:
            raise ValueError(f"expected stages >= 1 and q > 1, got {self.stages} and {self.q}")
        if self.curriculum == EASY and self.stages * math.log2(self.q) > CLOSEST:
            raise ValueError(
                f"expected q^stages of at most 2^{CLOSEST}, got {self.q:g}^{self.stages}: float32 would not tell the "
                "levels of a pair apart"
            )


@dataclass(frozen=True)
class Consistency:
    """A consistency function, by distillation where there is a teacher, from data alone where there is none."""

    settings: ConsistencySettings
    model: PixelModel
    random: Randomness
    steps: int  # of the whole training
    distance: Distance
    teacher: Denoiser | None = None

    def _scales(self, step: int) -> tuple[int, float]:
        made = self.settings
        return CURRICULA[made.curriculum](step, self.steps, made.start_scales, made.end_scales, made.target_rate)

    def _stage(self, step: int) -> int:
        return step * self.settings.stages // self.steps

    def target_rate(self, step: int) -> float:
        return 0.0 if self.settings.curriculum == EASY else self._scales(step)[1]

    def describe(self, step: int) -> dict[str, float]:
        if self.settings.curriculum == EASY:
            return {"stage": self._stage(step)}
        scales, rate = self._scales(step)
        return {"num_scales": scales, "target_rate": rate}

    def draw(self, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
        pair = self._easy_pair if self.settings.curriculum == EASY else self._grid_pair
        t, s = pair(step, rows, self.random.levels(step))
        draws = _common_draws(self.random, step, rows, shape, self.model.dropout)
        weight = 1 / (t - s) if self.settings.weight == "inverse" else np.ones(rows)
        return draws | {"t": _float32(t), "s": _float32(s), "weight": _float32(weight)}

    def _grid_pair(self, step: int, rows: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of the grid that the curriculum has reached."""
        levels = grid(self.model.schedule, self._scales(step)[0])
        weights = None
        if self.settings.levels == "lognormal":
            weights = lognormal_probabilities(levels, self.settings.mean, self.settings.std)
        index = random.choice(len(levels) - 1, size=rows, p=weights)
        return levels[index], levels[index + 1]

    def _easy_pair(self, step: int, rows: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A lognormal level and the one that [ECT] pairs with it, 0 where that is below the schedule's range.

        At sigma_min and below there is nothing to learn, since f is the identity there; [ECT] trains a denoiser's
        scalings, whose range begins at 0, and needs no limit.
        """
        schedule = self.model.schedule
        t = np.exp(random.normal(self.settings.mean, self.settings.std, rows))
        t = np.clip(t, 2 * schedule.sigma_min, schedule.sigma_max)
        s = easy_consistency_level(t, self._stage(step), q=self.settings.q)
        return t, np.where(s < schedule.sigma_min, 0.0, s)

    def loss(self, student: Weighted, target: Weighted, batch: Batch) -> Losses:
        f, f_target = self.model.consistency(student), self.model.consistency(target)
        x0, noise, t, s = (batch[name] for name in ("x0", "noise", "t", "s"))
        if self.teacher is None:
            x_t, x_s = forward_pair(x0, noise, t, s)
        else:
            solver = SOLVERS[self.settings.solver](self.teacher, **_conditions(batch, TEACHER_CONDITIONS))
            x_t, x_s = solved_pair(solver, x0, noise, t, s)
        clean = x0 if self.settings.curriculum == EASY else None
        return consistency_loss(
            f, f_target, x_t, x_s, t, s,
            distance=self.distance, weight=batch["weight"], clean=clean, **_conditions(batch),
        )  # fmt: skip


@dataclass(frozen=True)
class TrajectorySettings:
    """Of `ctm`."""

    num_scales: int = 18  # N, levels of the grid
    solver_steps: int = 17  # of the teacher from t to u, at most
    target_rate: float = 0.999
    solver: str = "heun"
    distance: str = "l2"
    distance_c: float | None = None
    lpips: str = ""
    denoising_weight: float = 1.0  # of the denoising loss beside the trajectory loss
    mean: float = -1.2  # of ln(sigma) in the denoising loss
    std: float = 1.2

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: {self.solver!r} is unknown, expected one of {list(SOLVERS)}")
        if self.num_scales < 2 or self.solver_steps < 1:
            raise ValueError(
                f"expected num_scales >= 2 and solver_steps >= 1, got {self.num_scales} and {self.solver_steps}"
            )
        if not 0 <= self.target_rate < 1 or not self.denoising_weight >= 0:
            raise ValueError(
                "expected 0 <= target_rate < 1 and denoising_weight >= 0, "
                f"got {self.target_rate} and {self.denoising_weight}"
            )
        _check_std(self.std)


@dataclass(frozen=True)
class Trajectory:
    """A jump between any two levels: matching of trajectories, and denoising.

    [CTM] section 3, without the adversarial term; the weight between the two is constant, not balanced by gradients.
    """

    settings: TrajectorySettings
    model: PixelModel
    random: Randomness
    distance: Distance
    teacher: Denoiser | None = None

    def target_rate(self, step: int) -> float:
        return self.settings.target_rate

    def describe(self, step: int) -> dict[str, float]:
        return {"target_rate": self.settings.target_rate}

    def draw(self, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
        """Levels t > u >= s of the grid, and sigma of the denoising loss.

        As the released code of [CTM] draws them, here for each picture by itself: the number of levels from t to u,
        large ones more often in proportion; t, of those that have so many below them; s, of those from u on. Where
        there is no teacher, u is t's neighbour: the line from x_t to the data leaves the trajectory.
        """
        random, last = self.random.levels(step), self.settings.num_scales - 1
        levels = grid(self.model.schedule, self.settings.num_scales)
        longest = 1 if self.teacher is None else min(self.settings.solver_steps, last)
        lengths = np.arange(1, longest + 1)
        length = random.choice(lengths, rows, p=lengths / lengths.sum())
        t = random.integers(0, last + 1 - length)
        u = t + length
        s = random.integers(u, last + 1)
        sigma = np.exp(random.normal(self.settings.mean, self.settings.std, rows))
        drawn = {"t": levels[t], "u": levels[u], "s": levels[s], "sigma": sigma}
        # The teacher takes as many steps for every picture of every batch; one that has arrived stands still.
        walk = [np.minimum(t + k, u) for k in (0, *lengths)]
        drawn["walk"] = levels[np.stack(walk, axis=1)]
        draws = _common_draws(self.random, step, rows, shape, self.model.dropout)
        return draws | {name: _float32(value) for name, value in drawn.items()}

    def loss(self, student: Weighted, target: Weighted, batch: Batch) -> Losses:
        g, g_target = self.model.trajectory(student), self.model.trajectory(target)
        x0, noise, t, u, s = (batch[name] for name in ("x0", "noise", "t", "u", "s"))
        cond = _conditions(batch)
        x_t, x_u = self._pair(batch)
        end = self.model.schedule.sigma_min
        matching, metrics = trajectory_loss(g, g_target, x_t, x_u, t, u, s, distance=self.distance, t_min=end, **cond)
        inner = self.model.inner(student)
        denoising, _ = edm_loss(
            lambda x, sigma, **cond: inner(x, sigma, sigma, **cond),
            x0, batch["sigma"], noise, sigma_data=self.model.schedule.sigma_data, **cond,
        )  # fmt: skip
        return matching + self.settings.denoising_weight * denoising, metrics | {"denoising": denoising}

    def _pair(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """x_t, and x_u where the teacher's walk ends."""
        x0, noise, t, u, walk = (batch[name] for name in ("x0", "noise", "t", "u", "walk"))
        if self.teacher is None:
            return forward_pair(x0, noise, t, u)
        step = SOLVERS[self.settings.solver](self.teacher, **_conditions(batch, TEACHER_CONDITIONS))

        def solver(x: mx.array, t: mx.array, u: mx.array) -> mx.array:
            for k in range(walk.shape[1] - 1):
                x = step(x, walk[:, k], walk[:, k + 1])
            return x

        return solved_pair(solver, x0, noise, t, u)


# --- latents


@dataclass(frozen=True)
class LatentModel:
    """What objectives in latent space know of the model."""

    schedule: DiscreteSchedule
    empty: dict[str, mx.array]  # what the empty prompt is to the network: states and pooled, or ids; one row each
    guidance_width: int | None = None  # of the student's guidance embedding
    is_xl: bool = False  # whether it is told pooled text and sizes


def _latents(batch: Batch) -> mx.array:
    """A draw from the posterior over each picture's latents, scaled."""
    return batch["mean"] + batch["std"] * batch["posterior"]


# What the data calls a condition => what the network calls it.
CONDITIONS = {"states": "encoder_hidden_states", "pooled": "text_embeds", "time_ids": "time_ids"}


def _latent_conditions(batch: Batch) -> dict[str, mx.array]:
    return {name: batch[key] for key, name in CONDITIONS.items() if key in batch}


def _without_prompt(batch: Batch, empty: dict[str, mx.array]) -> Batch:
    """The batch with every prompt empty."""
    return batch | {name: mx.broadcast_to(row, batch[name].shape) for name, row in empty.items()}


def _some_without_prompt(batch: Batch, empty: dict[str, mx.array]) -> Batch:
    """The batch with the prompts empty that were drawn to be."""
    without = _without_prompt(batch, empty)
    rows = {name: batch["drop"].reshape(-1, *([1] * (batch[name].ndim - 1))) for name in empty}
    return batch | {name: mx.where(rows[name], without[name], batch[name]) for name in empty}


def shifted(u: np.ndarray, shift: float) -> np.ndarray:
    """Fractions of the way to pure noise, in [0, 1), moved towards it: s u / (1 + (s - 1) u). [SD3] equation 23.

    What a picture shows of its prompt is decided where there is little but noise; of a uniform draw a small network
    sees too few of those.
    """
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class LatentTeacher:
    """A latent diffusion model, with its text encoder where the data gives token ids."""

    settings: TeacherSettings
    model: LatentModel
    random: Randomness

    def target_rate(self, step: int) -> None:
        return None

    def describe(self, step: int) -> dict[str, float]:
        return {}

    def draw(self, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
        random = self.random.levels(step)
        share, shift = self.settings.empty_prompts, self.settings.shift
        part = shifted(random.random(rows), 1.0 if shift is None else shift)
        timestep = self.model.schedule.num_train_timesteps * part
        drop = random.random(rows) < (EMPTY_PROMPTS if share is None else share)
        draws = _latent_draws(self.random, step, rows, shape)
        return draws | {"t": _int32(np.floor(timestep)), "drop": mx.array(drop)}

    def loss(self, student: Weighted, target: Weighted, batch: Batch) -> Losses:
        batch = _some_without_prompt(batch, self.model.empty)
        if "ids" in batch:
            features = features_of(student.part("text_encoder")(batch["ids"]), self.model.is_xl)
            batch = batch | {name: value for name, value in features._asdict().items() if value is not None}
        cond = _latent_conditions(batch)
        return diffusion_loss(student.unet, self.model.schedule, _latents(batch), batch["t"], batch["noise"], **cond)


@dataclass(frozen=True)
class LatentConsistencySettings:
    """Of `lcd`, `lcm-lora` and `lcf`."""

    w_min: float = 2.0  # w = guidance_scale - 1 of the teacher's steps, or of the guidance embedding
    w_max: float = 14.0
    skip: int | None = None  # k, timesteps from t to s; None: from one of the solver's to the next. More learns sooner
    target_rate: float = 0.95  # 0: the target is the student itself
    distance: str = "l2"
    distance_c: float | None = None

    def __post_init__(self):
        if self.skip is not None and self.skip < 1:
            raise ValueError(f"skip: expected at least 1, got {self.skip}")
        if not 0 <= self.w_min <= self.w_max:
            raise ValueError(f"expected 0 <= w_min <= w_max, got {self.w_min} and {self.w_max}")
        if not 0 <= self.target_rate < 1:
            raise ValueError(f"target_rate: expected at least 0 and below 1, got {self.target_rate}")


@dataclass(frozen=True)
class LatentConsistency:
    """A latent consistency model: distilled where there is a teacher, fine-tuned where there is none."""

    settings: LatentConsistencySettings
    model: LatentModel
    random: Randomness
    distance: Distance
    teacher: nn.Module | None = None

    def target_rate(self, step: int) -> float:
        return self.settings.target_rate

    def describe(self, step: int) -> dict[str, float]:
        return {"target_rate": self.settings.target_rate}

    def draw(self, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
        """A timestep of the solver and the one k below it, and the guidance of each picture.

        [LCM] algorithm 1, with the solver's timesteps of the released code, which are those that are sampled at later;
        there, too, what would step below timestep 0 steps to it.
        """
        random, schedule = self.random.levels(step), self.model.schedule
        skip = self.settings.skip or schedule.solver_spacing
        t = (random.integers(0, schedule.original_inference_steps, rows) + 1) * schedule.solver_spacing - 1
        w = random.uniform(self.settings.w_min, self.settings.w_max, rows)
        drawn = {"t": _int32(t), "s": _int32(np.maximum(t - skip, 0)), "w": _float32(w)}
        return _latent_draws(self.random, step, rows, shape) | drawn

    def loss(self, student: Weighted, target: Weighted, batch: Batch) -> Losses:
        schedule, t, s = self.model.schedule, batch["t"], batch["s"]
        x0, noise, cond = _latents(batch), batch["noise"], _latent_conditions(batch)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.marginals(t), schedule.marginals(s)
        x_t = alpha_t * x0 + sigma_t * noise
        if self.teacher is None:
            x_s = alpha_s * x0 + sigma_s * noise
        else:
            uncond = _latent_conditions(_without_prompt(batch, self.model.empty))
            x_s = teacher_step(self.teacher, schedule, x_t, t, s, batch["w"], cond, uncond)
        if self.model.guidance_width is not None:
            cond = cond | {"timestep_cond": guidance_embedding(batch["w"], self.model.guidance_width)}
        return latent_consistency_loss(
            student.unet, target.unet, schedule, x_t, x_s, t, s, distance=self.distance, cond=cond
        )


# --- autoencoders


@dataclass(frozen=True)
class AutoencoderSettings:
    """Of `autoencoder`."""

    kl_weight: float = 1e-6
    distance: str = "l1"
    distance_c: float | None = None
    lpips: str = ""

    def __post_init__(self):
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight: expected at least 0, got {self.kl_weight}")


@dataclass(frozen=True)
class Autoencoding:
    """An autoencoder for latent models; no adversarial term."""

    settings: AutoencoderSettings
    random: Randomness
    distance: Distance
    pixels_per_latent: int
    latent_channels: int

    def target_rate(self, step: int) -> None:
        return None

    def describe(self, step: int) -> dict[str, float]:
        return {}

    def draw(self, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
        height, width, _ = shape
        unit = self.pixels_per_latent
        inner = (height // unit, width // unit, self.latent_channels)
        return {"posterior": self.random.normal(step, POSTERIOR, (rows, *inner))}

    def loss(self, student: Weighted, target: Weighted, batch: Batch) -> Losses:
        vae = student.part("vae")
        return autoencoder_loss(
            vae.decode, vae.encode(batch["x0"]), batch["x0"], batch["posterior"],
            distance=self.distance, kl_weight=self.settings.kl_weight,
        )  # fmt: skip


def _common_draws(random: Randomness, step: int, rows: int, shape: tuple[int, ...], dropout: bool) -> Batch:
    draws = {"noise": random.normal(step, NOISE, (rows, *shape))}
    return draws | ({"dropout_key": mx.random.split(random.key(step, DROPOUT), rows)} if dropout else {})


def _latent_draws(random: Randomness, step: int, rows: int, shape: tuple[int, ...]) -> Batch:
    return {
        "noise": random.normal(step, NOISE, (rows, *shape)),
        "posterior": random.normal(step, POSTERIOR, (rows, *shape)),
    }


def _float32(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))


def _int32(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.int32))
