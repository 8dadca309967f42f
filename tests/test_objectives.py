"""What objectives draw, and what they make of it: purity, distributions, and the losses that result against torch."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import loss_reference as reference
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, LCMScheduler
from mlx.utils import tree_flatten
from parity import TOLERANCE, copy_weights
from tiny_latent import autoencoder as latent_autoencoder
from tiny_latent import native_autoencoder, text_encoder, unet
from tiny_models import CONDITIONAL, UNCONDITIONAL, make_unet, native_unet
from trajectory_reference import make_trajectory_unet, native_trajectory_unet

from mlx_cm.errors import UsageError
from mlx_cm.metrics import METRICS, l2, mean_pseudo_huber, pseudo_huber
from mlx_cm.models.unet2d import UNet2D
from mlx_cm.parameterization import edm_denoiser
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule
from mlx_cm.training.curriculum import CURRICULA, easy_consistency_level, grid, lognormal_probabilities
from mlx_cm.training.objectives import (
    DROPOUT,
    NOISE,
    POSTERIOR,
    AutoencoderSettings,
    Autoencoding,
    Consistency,
    ConsistencySettings,
    EdmTeacher,
    LatentConsistency,
    LatentConsistencySettings,
    LatentModel,
    LatentTeacher,
    Objective,
    PixelModel,
    Randomness,
    TeacherSettings,
    Trajectory,
    TrajectorySettings,
    make_distance,
)
from mlx_cm.training.weights import Weighted, master_parameters

ROWS, SHAPE, LATENT_SHAPE = 4, (6, 10, 3), (4, 6, 4)  # of pictures and latents, channels last
SCHEDULE = KarrasSchedule()
STEPS = 100
RANDOM = Randomness(11)
LIKELY = 0.01  # p-values below it would be a fault, with the seeds that are fixed here


@functools.cache
def pixel_nets(conditional: bool, number: int) -> tuple[UNet2D, torch.nn.Module]:
    theirs = make_unet(CONDITIONAL if conditional else UNCONDITIONAL, number)
    return native_unet(theirs), theirs


@functools.cache
def trajectory_nets(number: int) -> tuple[UNet2D, torch.nn.Module]:
    theirs = make_trajectory_unet(CONDITIONAL, number)
    return native_trajectory_unet(theirs), theirs


@functools.cache
def latent_nets(kind: str, number: int) -> tuple[nn.Module, torch.nn.Module]:
    """The shared network, its weights moved."""
    theirs, generator = reference.trainable(unet(kind)[1]).requires_grad_(False), torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return copy_weights(type(unet(kind)[0])(unet(kind)[0].config), theirs), theirs


def teacher_of(conditional: bool) -> Callable:
    return edm_denoiser(pixel_nets(conditional, 3)[0], SCHEDULE, clip=False)


def normal(*shape: int, seed: int, scale: float = 1.0) -> mx.array:
    return scale * mx.random.normal(shape, key=mx.random.key(seed))


def data(kind: str, rows: int = ROWS) -> dict[str, mx.array]:
    """What the data gives: pictures with labels or without, latents of two kinds, or token ids."""
    if kind in ("pixels", "pictures"):
        made = {"x0": mx.clip(normal(rows, *SHAPE, seed=1, scale=0.5), -1, 1)}
        return made | ({"class_labels": mx.array([7, 0, 2, 9][:rows])} if kind == "pixels" else {})
    latents = {"mean": normal(rows, *LATENT_SHAPE, seed=1), "std": mx.abs(normal(rows, *LATENT_SHAPE, seed=2)) / 3}
    if kind == "ids":
        return latents | {"ids": mx.array(np.random.default_rng(3).integers(0, 300, (rows, 77)))}
    if kind == "xl":
        ids = mx.array([[48, 64, 8, 0, 32, 48], [32, 32, 0, 0, 32, 48], [99, 64, 3, 7, 9, 8], [9, 9, 1, 1, 9, 9]])
        text = {"states": normal(rows, 7, 72, seed=3), "pooled": normal(rows, 20, seed=4)}
        return latents | text | {"time_ids": ids[:rows].astype(mx.float32)}
    return latents | {"states": normal(rows, 7, 32, seed=3)}


EMPTY = {
    "latents": {"states": normal(1, 7, 32, seed=5)},
    "xl": {"states": mx.zeros((1, 7, 72)), "pooled": mx.zeros((1, 20))},
    "ids": {"ids": mx.array(np.full((1, 77), 5))},
}


def pixel_model(**changes) -> PixelModel:
    return PixelModel(SCHEDULE, noise_scale=250.0, **changes)


def consistency(distils: bool = False, measure=l2, dropout: bool = False, **settings) -> Consistency:
    teacher = teacher_of(True) if distils else None
    return Consistency(ConsistencySettings(**settings), pixel_model(dropout=dropout), RANDOM, STEPS, measure, teacher)


def trajectory(distils: bool = True, **settings) -> Trajectory:
    teacher = teacher_of(True) if distils else None
    return Trajectory(TrajectorySettings(**settings), pixel_model(), RANDOM, l2, teacher)


def latent_consistency(kind: str, teacher: str | None, measure=l2, **settings) -> LatentConsistency:
    text, width = ("xl" if kind.startswith("xl") else "latents"), (16 if "lcm" in kind else None)
    model = LatentModel(DiscreteSchedule(), EMPTY[text], width)
    network = None if teacher is None else latent_nets(teacher, 3)[0]
    return LatentConsistency(LatentConsistencySettings(**settings), model, RANDOM, measure, network)


def latent_teacher(kind: str, **settings) -> LatentTeacher:
    return LatentTeacher(TeacherSettings(**settings), LatentModel(DiscreteSchedule(), EMPTY[kind]), RANDOM)


ICT = {
    "curriculum": "doubling", "start_scales": 10, "end_scales": 1280, "target_rate": 0.0, "levels": "lognormal",
    "weight": "inverse", "distance": "pseudo_huber",
}  # fmt: skip
EASY = {"curriculum": "easy", "weight": "inverse"}
CT = {"curriculum": "progressive", "start_scales": 2, "end_scales": 150, "target_rate": 0.9}

# name => (how the objective is made, kind of data, shape of a row)
OBJECTIVES: dict[str, tuple[Callable[[], Objective], str, tuple[int, ...]]] = {
    "teacher": (lambda: EdmTeacher(TeacherSettings(), pixel_model(), RANDOM), "pixels", SHAPE),
    "cd": (lambda: consistency(distils=True), "pixels", SHAPE),
    "cd with euler": (lambda: consistency(distils=True, solver="euler", end_scales=18), "pixels", SHAPE),
    "ct": (lambda: consistency(**CT), "pixels", SHAPE),
    "ict": (lambda: consistency(measure=pseudo_huber(), **ICT), "pixels", SHAPE),
    "ect": (lambda: consistency(measure=pseudo_huber(0.06), **EASY), "pictures", SHAPE),
    "ctm": (lambda: trajectory(num_scales=8, solver_steps=5, denoising_weight=0.7), "pixels", SHAPE),
    "ctm without a teacher": (lambda: trajectory(distils=False), "pixels", SHAPE),
    "latent teacher": (lambda: latent_teacher("latents", empty_prompts=0.5), "latents", LATENT_SHAPE),
    "latent teacher of SDXL": (lambda: latent_teacher("xl", empty_prompts=0.5), "xl", LATENT_SHAPE),
    "lcd": (lambda: latent_consistency("lcm", "base"), "latents", LATENT_SHAPE),
    "lcd of SDXL": (lambda: latent_consistency("xl lcm", "xl"), "xl", LATENT_SHAPE),
    "lcm-lora": (
        lambda: latent_consistency("base", "base", mean_pseudo_huber(), target_rate=0.0),
        "latents",
        LATENT_SHAPE,
    ),
    "lcf": (lambda: latent_consistency("lcm", None), "latents", LATENT_SHAPE),
    "autoencoder": (
        lambda: Autoencoding(AutoencoderSettings(kl_weight=0.01), RANDOM, l2, 8, 4),
        "pictures",
        (16, 24, 3),
    ),
}
objectives = pytest.mark.parametrize("name", OBJECTIVES)


@functools.cache
def made(name: str) -> Objective:
    """One of the table, with its teacher."""
    return OBJECTIVES[name][0]()


def numpy(draws: dict[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in draws.items()}


def many(objective: Objective, rows: int = 20_000, step: int = 3) -> dict[str, np.ndarray]:
    """The draws of a large batch of tiny pictures."""
    return numpy(objective.draw(step, rows, (8, 8, 1)))


# --- randomness


def test_draws_are_a_function_of_seed_step_and_stream():
    places = list(itertools.product((0, 1, 2, 2**40), range(3), (NOISE, POSTERIOR, DROPOUT)))
    drawn = {place: np.array(Randomness(place[0]).normal(*place[1:], (5,))) for place in places}
    again = {place: np.array(Randomness(place[0]).normal(*place[1:], (5,))) for place in reversed(places)}
    assert all(np.array_equal(drawn[place], again[place]) for place in places)
    assert len({value.tobytes() for value in drawn.values()}) == len(places)
    levels = {(seed, step): Randomness(seed).levels(step).random() for seed, step, _ in places}
    assert len(set(levels.values())) == len(levels)
    assert all(Randomness(seed).levels(step).random() == value for (seed, step), value in levels.items())


def test_noise_is_standard_normal_across_steps_and_streams():
    drawn = [np.array(Randomness(5).normal(step, stream, (4000,))) for step in range(3) for stream in range(2)]
    for one in drawn:
        assert scipy.stats.kstest(one, "norm").pvalue > LIKELY
    correlations = np.corrcoef(drawn)[np.triu_indices(len(drawn), 1)]
    assert np.abs(correlations).max() < 4 / math.sqrt(4000)


@objectives
def test_a_step_draws_the_same_again_and_other_steps_and_seeds_something_else(name):
    objective, shape = made(name), OBJECTIVES[name][2]
    first, again, later = (numpy(objective.draw(step, ROWS, shape)) for step in (2, 2, 3))
    other = numpy(dataclasses.replace(objective, random=Randomness(12)).draw(2, ROWS, shape))
    assert all(len(value) == ROWS for value in first.values())
    assert set(first) == set(again) == set(later) == set(other)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    noise = "posterior" if name == "autoencoder" else "noise"
    assert not np.allclose(first[noise], later[noise]) and not np.allclose(first[noise], other[noise])
    if "t" in first:
        assert not np.array_equal(first["t"], later["t"]) and not np.array_equal(first["t"], other["t"])
    assert all(value.dtype in (np.float32, np.int32, np.uint32, bool) for value in first.values())


# --- what is drawn


def assert_uniform(values: np.ndarray, kinds: int) -> None:
    """Whole numbers from 0 on."""
    assert values.min() >= 0 and values.max() < kinds
    if kinds > 1:
        assert scipy.stats.chisquare(np.bincount(values, minlength=kinds)).pvalue > LIKELY


def place_of(levels: np.ndarray, grid_levels: np.ndarray) -> np.ndarray:
    """Index of each level in a descending grid, to the last bit."""
    index = np.abs(np.log(grid_levels.astype(np.float32))[:, None] - np.log(levels)).argmin(axis=0)
    assert np.array_equal(grid_levels.astype(np.float32)[index], levels)
    return index


@pytest.mark.parametrize(("given", "mean", "std"), [({}, -1.2, 1.2), ({"mean": -0.4, "std": 0.9}, -0.4, 0.9)])
def test_a_teachers_levels_are_lognormal(given, mean, std):
    drawn = many(EdmTeacher(TeacherSettings(**given), pixel_model(), RANDOM))
    assert scipy.stats.kstest(np.log(drawn["t"]), "norm", (mean, std)).pvalue > LIKELY


def test_distillation_draws_neighbours_uniformly():
    drawn = many(consistency(distils=True, end_scales=18))
    index = place_of(drawn["t"], grid(SCHEDULE, 18))
    assert_uniform(index, 17)
    assert np.array_equal(place_of(drawn["s"], grid(SCHEDULE, 18)), index + 1)
    assert (drawn["weight"] == 1).all()


def test_improved_training_draws_neighbours_of_its_grid_as_a_normal_distribution_fills_it():
    objective = consistency(**ICT)
    drawn = many(objective, step=30)  # the third of eight stages: 40 intervals
    levels = grid(SCHEDULE, 41)
    index = place_of(drawn["t"], levels)
    assert np.array_equal(place_of(drawn["s"], levels), index + 1)
    expected = len(index) * lognormal_probabilities(levels, -1.1, 2.0)
    assert expected.min() > 5
    assert scipy.stats.chisquare(np.bincount(index, minlength=40), expected).pvalue > LIKELY
    np.testing.assert_allclose(drawn["weight"], 1 / (levels[index] - levels[index + 1]), rtol=1e-6)


@pytest.mark.parametrize("settings", [CT, ICT, {"end_scales": 7}], ids=["ct", "ict", "cd"])
def test_levels_are_of_the_grid_that_the_curriculum_has_reached(settings):
    objective = consistency(**settings)
    given = objective.settings
    for step in (0, 1, 49, 50, STEPS - 1):
        scales, rate = CURRICULA[given.curriculum](step, STEPS, given.start_scales, given.end_scales, given.target_rate)
        drawn = many(objective, rows=500, step=step)
        index = place_of(drawn["t"], grid(SCHEDULE, scales))
        assert np.array_equal(place_of(drawn["s"], grid(SCHEDULE, scales)), index + 1)
        assert (drawn["t"] > drawn["s"]).all() and drawn["s"].min() >= np.float32(SCHEDULE.sigma_min)
        assert objective.target_rate(step) == rate
        assert objective.describe(step) == {"num_scales": scales, "target_rate": rate}


@pytest.mark.parametrize("step", [0, 24, 25, STEPS - 1])
def test_easy_pairs_are_lognormal_and_of_the_stage(step):
    objective = consistency(stages=4, **EASY)
    drawn, stage = many(objective, step=step), step // 25
    assert objective.describe(step) == {"stage": stage}
    assert objective.target_rate(step) == 0
    t, s = (drawn[name].astype(np.float64) for name in ("t", "s"))
    low = 2 * SCHEDULE.sigma_min
    assert t.min() >= np.float32(low) and t.max() <= SCHEDULE.sigma_max
    inside = t[(t > 1.001 * low) & (t < 79.9)]
    cdf = scipy.stats.truncnorm(*((math.log(edge) + 1.1) / 2 for edge in (1.001 * low, 79.9)), -1.1, 2).cdf
    assert scipy.stats.kstest(np.log(inside), cdf).pvalue > LIKELY
    wanted = easy_consistency_level(t, stage)
    np.testing.assert_allclose(s, np.where(wanted < SCHEDULE.sigma_min, 0, wanted), rtol=1e-4, atol=1e-6)
    assert (t > s).all() and ((s == 0) | (s >= np.float32(SCHEDULE.sigma_min))).all()
    np.testing.assert_allclose(drawn["weight"], 1 / (t - s), rtol=1e-4)


@pytest.mark.parametrize(("num_scales", "solver_steps", "longest"), [(18, 17, 17), (18, 4, 4), (5, 17, 4), (2, 17, 1)])
def test_trajectories_are_drawn_as_the_released_code_does(num_scales, solver_steps, longest):
    """t > u >= s; lengths in proportion to themselves, t and s uniform among those that are left."""
    objective = trajectory(num_scales=num_scales, solver_steps=solver_steps)
    drawn, levels = many(objective), grid(SCHEDULE, num_scales)
    t, u, s = (place_of(drawn[name], levels) for name in ("t", "u", "s"))
    assert ((t < u) & (u <= s)).all()
    lengths = np.arange(1, longest + 1)
    counts = np.bincount(u - t, minlength=longest + 1)
    assert counts[0] == 0
    if longest > 1:
        assert scipy.stats.chisquare(counts[1:], len(t) * lengths / lengths.sum()).pvalue > LIKELY
    for length in (1, longest):
        assert_uniform(t[u - t == length], num_scales - length)
    for middle in {1, num_scales // 2}:
        assert_uniform(s[u == middle] - middle, num_scales - middle)
    assert scipy.stats.kstest(np.log(drawn["sigma"]), "norm", (-1.2, 1.2)).pvalue > LIKELY

    walk = np.stack([place_of(column, levels) for column in drawn["walk"].T], axis=1)
    assert walk.shape[1] == longest + 1
    assert np.array_equal(walk, np.minimum(t[:, None] + np.arange(longest + 1), u[:, None]))


def test_trajectories_without_a_teacher_are_of_neighbours():
    drawn, levels = many(trajectory(distils=False)), grid(SCHEDULE, 18)
    t, u, s = (place_of(drawn[name], levels) for name in ("t", "u", "s"))
    assert np.array_equal(u, t + 1) and (s >= u).all()
    assert_uniform(t, 17)


@pytest.mark.parametrize("count", [50, 25, 10, 1000, 1, 30, 60, 600])
def test_latent_consistency_draws_the_solvers_timesteps(count):
    """Those of diffusers' two schedulers, each with the one below it, and timestep 0 below the first."""
    scheduler = LCMScheduler()
    scheduler.set_timesteps(count, original_inference_steps=count)
    solver = scheduler.timesteps.tolist()
    if 1000 % count == 0:  # otherwise diffusers' DDIM rounds fractions, and its LCM walks whole steps
        ddim = DDIMScheduler(timestep_spacing="trailing")
        ddim.set_timesteps(count)
        assert ddim.timesteps.tolist() == solver

    model = LatentModel(DiscreteSchedule(original_inference_steps=count), EMPTY["latents"], 16)
    drawn = many(LatentConsistency(LatentConsistencySettings(), model, RANDOM, l2))
    below = dict(itertools.pairwise(solver)) | {solver[-1]: 0}
    assert all(below[t] == s for t, s in zip(drawn["t"].tolist(), drawn["s"].tolist(), strict=True))
    ascending = np.array(solver[::-1])
    index = np.searchsorted(ascending, drawn["t"])
    assert np.array_equal(ascending[index], drawn["t"])
    assert_uniform(index, count)


@pytest.mark.parametrize("skip", [40, 250, 500, 1000])
def test_pairs_lie_as_far_apart_as_is_asked_for(skip):
    """At every timestep of the solver, so that no number of steps samples where nothing was learnt."""
    model = LatentModel(DiscreteSchedule(), EMPTY["latents"], 16)
    drawn = many(LatentConsistency(LatentConsistencySettings(skip=skip), model, RANDOM, l2))
    assert np.array_equal(drawn["s"], np.maximum(drawn["t"] - skip, 0))
    sampled = {t for steps in (1, 2, 3, 4, 8) for t in model.schedule.lcm_timesteps(steps)}
    assert sampled < set(drawn["t"].tolist())
    assert_uniform(drawn["t"] // 20, 50)


@pytest.mark.parametrize(("low", "high"), [(2.0, 14.0), (0.0, 0.5)])
def test_guidance_is_uniform(low, high):
    drawn = many(latent_consistency("lcm", "base", w_min=low, w_max=high))
    assert scipy.stats.kstest(drawn["w"], "uniform", (low, high - low)).pvalue > LIKELY


def test_guidance_of_one_strength():
    assert set(many(latent_consistency("lcm", "base", w_min=7.5, w_max=7.5))["w"].tolist()) == {7.5}


@pytest.mark.parametrize(("share", "expected"), [(None, 0.1), (0.0, 0.0), (0.35, 0.35), (1.0, 1.0)])
def test_a_latent_teacher_draws_every_timestep_and_leaves_out_prompts(share, expected):
    drawn = many(latent_teacher("latents", empty_prompts=share))
    assert_uniform(drawn["t"], 1000)
    dropped = int(drawn["drop"].sum())
    assert scipy.stats.binomtest(dropped, len(drawn["drop"]), expected).pvalue > LIKELY
    assert abs(np.corrcoef(drawn["t"], drawn["drop"])[0, 1]) < 0.03 if 0 < expected < 1 else True


def test_a_shift_draws_more_of_the_noisy_timesteps():
    """[SD3] equation 23; its inverse makes the timesteps uniform again."""
    shift = 4.0
    drawn = many(latent_teacher("latents", shift=shift))
    t = (drawn["t"] + 0.5) / 1000
    assert scipy.stats.kstest(t / (shift - (shift - 1) * t), "uniform").pvalue > LIKELY
    assert np.mean(drawn["t"] >= 700) == pytest.approx(1 - 0.7 / (shift - (shift - 1) * 0.7), abs=0.03)
    assert drawn["t"].min() >= 0 and drawn["t"].max() == 999


def test_a_posteriors_draws_have_its_shape_and_are_not_the_noise():
    drawn = made("lcd").draw(0, ROWS, LATENT_SHAPE)
    assert drawn["noise"].shape == drawn["posterior"].shape == (ROWS, *LATENT_SHAPE)
    assert not mx.array_equal(drawn["noise"], drawn["posterior"])
    assert made("autoencoder").draw(0, 2, (24, 40, 3))["posterior"].shape == (2, 3, 5, 4)


# --- what is made of it

T = torch.tensor


def theirs(value: mx.array) -> torch.Tensor:
    array = np.array(value)
    return T(array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array)


def batch_for(name: str) -> dict[str, mx.array]:
    """In the middle of training; of easy pairs at its beginning, where some are with the data."""
    _, kind, shape = OBJECTIVES[name]
    step = 0 if name == "ect" else 40
    given = data(kind)
    if name == "autoencoder":
        given = {"x0": normal(ROWS, *shape, seed=1, scale=0.5)}
    return given | made(name).draw(step, ROWS, shape)


def nets_for(name: str) -> tuple[tuple[nn.Module, torch.nn.Module], tuple[nn.Module, torch.nn.Module]]:
    """(ours, theirs) of student and target."""
    if name == "autoencoder":
        return ((native_autoencoder("kl"), latent_autoencoder("kl")[1]),) * 2
    if name.startswith("ctm"):
        return trajectory_nets(1), trajectory_nets(2)
    latent = {"lcd": "lcm", "lcd of SDXL": "xl lcm", "lcf": "lcm", "lcm-lora": "base", "latent teacher": "base"}
    if name in latent or "SDXL" in name:
        kind = latent.get(name, "xl")
        return latent_nets(kind, 1), latent_nets(kind, 2)
    return pixel_nets(name != "ect", 1), pixel_nets(name != "ect", 2)


def weighted(module: nn.Module, part: str = "unet") -> Weighted:
    return Weighted({part: module}, {})


def expected_pixels(name: str, batch: dict[str, torch.Tensor], student, target) -> torch.Tensor:
    """The loss by the reference, from the drawn noise and levels."""
    x0, noise, t, labels = (batch.get(key) for key in ("x0", "noise", "t", "class_labels"))
    x_t = reference.add_noise(x0, noise, t)
    teacher = pixel_nets(True, 3)[1]
    if name == "teacher":
        return reference.edm_loss(reference.denoiser(student, labels), x0, t, noise)
    if name.startswith("ctm"):
        u, s, sigma = (batch[key] for key in ("u", "s", "sigma"))
        if name == "ctm":
            walked = []
            for row in range(ROWS):
                way = batch["walk"][row].tolist()
                way = way[: way.index(u[row].item()) + 1]
                denoise = reference.denoiser(teacher, labels[row : row + 1])
                walked.append(reference.walk(denoise, x_t[row : row + 1], way, reference.heun_step))
            x_u, denoising_weight = torch.cat(walked), 0.7
        else:
            x_u, denoising_weight = reference.add_noise(x0, noise, u), 1.0
        jumps = [reference.trajectory_function(net, labels) for net in (student, target)]
        matching = reference.trajectory_loss(*jumps, x_t, x_u, t, u, s, reference.mean_square)
        inner = reference.inner_trajectory(student, labels)
        return matching + denoising_weight * reference.edm_loss(lambda x, at: inner(x, at, at), x0, sigma, noise)
    s = batch["s"]
    functions = [reference.consistency_function(net, labels) for net in (student, target)]
    if name == "ect":
        assert 0 < (s == 0).sum() < ROWS
        return reference.easy_consistency_loss(*functions, x0, noise, t, s, c=0.06)
    if name.startswith("cd"):
        step = reference.STEPS["euler" if "euler" in name else "heun"]
        x_s = step(reference.denoiser(teacher, labels), x_t, t, s)
    else:
        x_s = reference.add_noise(x0, noise, s)
    distance = reference.pseudo_huber if name == "ict" else reference.mean_square
    weight = 1 / (t - s) if name == "ict" else torch.ones(ROWS)
    return reference.consistency_loss(*functions, x_t, x_s, t, s, distance, weight)


def expected_latents(name: str, batch: dict[str, torch.Tensor], student, target) -> torch.Tensor:
    latents = reference.Latents()
    x0, noise, t = batch["mean"] + batch["std"] * batch["posterior"], batch["noise"], batch["t"].long()
    is_xl = "SDXL" in name
    empty = {key: theirs(value) for key, value in EMPTY["xl" if is_xl else "latents"].items()}

    def cond(states, pooled):
        added = {"added": {"text_embeds": pooled, "time_ids": batch["time_ids"]}} if is_xl else {}
        return {"states": states, **added}

    given = cond(batch["states"], batch.get("pooled"))
    if name.startswith("latent teacher"):
        kept = ~batch["drop"]
        assert 0 < kept.sum() < ROWS
        states = torch.where(kept[:, None, None], batch["states"], empty["states"])
        given = cond(states, torch.where(kept[:, None], batch["pooled"], empty["pooled"]) if is_xl else None)
        output = reference.predict(student, latents.noisy(x0, noise, t), t, **given)
        return ((output - noise) ** 2).mean()
    index, x_t = (t + 1) // 20 - 1, latents.noisy(x0, noise, t)
    if name == "lcf":
        x_s = latents.noisy(x0, noise, batch["s"].long())
    else:
        uncond = cond(*(one.expand(ROWS, *one.shape[1:]) for one in (empty["states"], empty.get("pooled", T([[0.0]])))))
        x_s = latents.solver_step(latent_nets("xl" if is_xl else "base", 3)[1], x_t, index, batch["w"], given, uncond)
    w = {} if name == "lcm-lora" else {"w": batch["w"]}
    distance = reference.value_huber if name == "lcm-lora" else reference.mean_square
    return latents.distillation_loss(student, target, x_t, x_s, index, distance, **given, **w)


@objectives
@torch.no_grad()
def test_the_loss_of_a_drawn_batch_is_that_of_torch(name):
    objective, batch = made(name), batch_for(name)
    (student, their_student), (target, their_target) = nets_for(name)
    part = "vae" if name == "autoencoder" else "unet"
    value, metrics = objective.loss(weighted(student, part), weighted(target, part), batch)
    given = {key: theirs(array) for key, array in batch.items()}
    if name == "autoencoder":
        expected = reference.autoencoder_loss(
            their_student, given["x0"], given["posterior"], 0.01, reference.mean_square
        )
    elif "mean" in batch:
        expected = expected_latents(name, given, their_student, their_target)
    else:
        expected = expected_pixels(name, given, their_student, their_target)
    assert value.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    assert all(metric.size == 1 and math.isfinite(metric.item()) for metric in metrics.values())


def parts_of(batch: dict[str, mx.array], size: int) -> list[dict[str, mx.array]]:
    """As accumulation and processes slice it."""
    return [{key: value[start : start + size] for key, value in batch.items()} for start in range(0, ROWS, size)]


@objectives
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name):
    objective, batch = made(name), batch_for(name)
    (student, _), (target, _) = nets_for(name)
    part = "vae" if name == "autoencoder" else "unet"
    nets = weighted(student, part), weighted(target, part)
    whole = objective.loss(*nets, batch)[0].item()
    found = [objective.loss(*nets, rows)[0].item() for rows in parts_of(batch, 2)]
    assert sum(found) / len(found) == pytest.approx(whole, rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_easy_pairs_with_the_data_ask_no_target():
    objective = made("ect")
    batch = batch_for("ect")
    nets = [weighted(pixel_nets(False, number)[0]) for number in (1, 2, 3)]

    def losses(batch: dict[str, mx.array]) -> list[float]:
        return [objective.loss(nets[0], target, batch)[0].item() for target in nets[1:]]

    one, other = losses(batch | {"s": mx.zeros((ROWS,))})
    assert one == other
    one, other = losses(batch)
    assert one != other


# --- prompts


def test_a_dropped_prompt_is_the_empty_one():
    """With all of them dropped it does not matter what they were; with none, what the empty one is."""
    objective, batch = made("latent teacher of SDXL"), batch_for("latent teacher of SDXL")
    nets = (weighted(nets_for("latent teacher of SDXL")[0][0]),) * 2
    other_text = {"states": normal(ROWS, 7, 72, seed=8), "pooled": normal(ROWS, 20, seed=9)}
    other_empty = {"states": normal(1, 7, 72, seed=10), "pooled": normal(1, 20, seed=11)}
    elsewhere = dataclasses.replace(objective, model=dataclasses.replace(objective.model, empty=other_empty))

    def loss(objective: LatentTeacher, drop: bool, **changes) -> float:
        return objective.loss(*nets, batch | {"drop": mx.full((ROWS,), drop)} | changes)[0].item()

    assert loss(objective, True) == loss(objective, True, **other_text) != loss(elsewhere, True)
    assert loss(objective, False) == loss(elsewhere, False) != loss(objective, False, **other_text)


def test_a_text_encoder_is_trained_on_token_ids():
    """Ids dropped for the empty prompt's, encoded by the student's own encoder: gradients of both parts."""
    encoder, their_encoder = text_encoder("L")
    net, their_net = latent_nets("base", 1)
    objective = latent_teacher("ids", empty_prompts=0.5)
    batch = data("ids") | objective.draw(40, ROWS, LATENT_SHAPE)
    modules = {"unet": net, "text_encoder": encoder}
    weights = master_parameters(modules)

    def loss(parameters):
        return objective.loss(Weighted(modules, parameters), Weighted(modules, parameters), batch)[0]

    value, gradients = mx.value_and_grad(loss)(weights)
    given = {key: theirs(array) for key, array in batch.items()}
    ids = torch.where(given["drop"][:, None], T(np.array(EMPTY["ids"]["ids"])), given["ids"])
    with torch.no_grad():
        states = their_encoder(ids.long()).last_hidden_state
        x0, t = given["mean"] + given["std"] * given["posterior"], given["t"].long()
        noisy = reference.Latents().noisy(x0, given["noise"], t)
        expected = ((reference.predict(their_net, noisy, t, states) - given["noise"]) ** 2).mean()
    assert value.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    for part in modules:
        assert all(mx.isfinite(gradient).all() for gradient in gradients[part].values())
        assert sum(mx.abs(gradient).sum().item() for gradient in gradients[part].values()) > 0


# --- dropout


@functools.cache
def dropping() -> UNet2D:
    return native_unet(make_unet(CONDITIONAL | {"dropout": 0.4}, 1))


def test_dropout_keys_are_one_for_each_picture():
    drawn = consistency(dropout=True).draw(2, ROWS, SHAPE)
    keys = np.array(drawn["dropout_key"])
    assert keys.shape == (ROWS, 2)
    assert len({key.tobytes() for key in keys}) == ROWS
    later = np.array(consistency(dropout=True).draw(3, ROWS, SHAPE)["dropout_key"])
    assert not {key.tobytes() for key in keys} & {key.tobytes() for key in later}
    assert "dropout_key" not in consistency().draw(2, ROWS, SHAPE)


def test_student_and_target_drop_the_same_values():
    """At one level, of one point, the same network gives the same picture twice only with the same masks."""
    objective = consistency(dropout=True)
    batch = data("pixels") | objective.draw(2, ROWS, SHAPE)
    same = batch | {"s": batch["t"]}
    nets = (weighted(dropping()),) * 2
    assert objective.loss(*nets, same)[0].item() == 0
    kept = {key: value for key, value in batch.items() if key != "dropout_key"}
    assert objective.loss(*nets, batch)[0].item() != pytest.approx(objective.loss(*nets, kept)[0].item(), rel=1e-2)


def test_what_is_dropped_of_a_picture_does_not_depend_on_the_part_that_it_is_in():
    objective = consistency(dropout=True)
    batch = data("pixels") | objective.draw(2, ROWS, SHAPE)
    nets = (weighted(dropping()),) * 2
    whole = objective.loss(*nets, batch)[0].item()
    for size in (1, 2):
        found = [objective.loss(*nets, rows)[0].item() for rows in parts_of(batch, size)]
        assert np.mean(found) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("make", [consistency, trajectory])
def test_a_teacher_is_told_the_class_and_drops_nothing(make):
    asked = []

    def teacher(x: mx.array, t: mx.array, **cond) -> mx.array:
        asked.append(set(cond))
        return 0.9 * x

    objective = make(distils=False)
    objective = dataclasses.replace(objective, teacher=teacher, model=pixel_model(dropout=True))
    if make is trajectory:
        net = weighted(native_trajectory_unet(make_trajectory_unet(CONDITIONAL | {"dropout": 0.4}, 1)))
    else:
        net = weighted(dropping())
    batch = data("pixels") | objective.draw(2, ROWS, SHAPE)
    assert "dropout_key" in batch
    assert math.isfinite(objective.loss(net, net, batch)[0].item())
    assert asked and all(told == {"class_labels"} for told in asked)


# --- settings


def test_rates_of_targets():
    rates = {name: made(name).target_rate(0) for name in OBJECTIVES}
    assert rates == {
        "teacher": None, "autoencoder": None, "latent teacher": None, "latent teacher of SDXL": None,
        "cd": 0.95, "cd with euler": 0.95, "ct": pytest.approx(0.81), "ict": 0.0, "ect": 0.0,
        "ctm": 0.999, "ctm without a teacher": 0.999, "lcd": 0.95, "lcd of SDXL": 0.95, "lcm-lora": 0.0, "lcf": 0.95,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        (TeacherSettings, {"std": 0.0}, "std: expected above 0"),
        (TeacherSettings, {"std": math.nan}, "std"),
        (LatentConsistencySettings, {"skip": 0}, "skip: expected at least 1, got 0"),
        (TeacherSettings, {"shift": 0.0}, "shift: expected above 0, got 0.0"),
        (TeacherSettings, {"shift": math.nan}, "shift"),
        (TeacherSettings, {"empty_prompts": 1.5}, "empty_prompts: expected 0 to 1, got 1.5"),
        (ConsistencySettings, {"curriculum": "steep"}, "curriculum: 'steep' is unknown"),
        (ConsistencySettings, {"levels": "even"}, "levels"),
        (ConsistencySettings, {"weight": "snr"}, "weight"),
        (ConsistencySettings, {"solver": "dpm"}, "solver"),
        (ConsistencySettings, {"start_scales": 0}, "start_scales"),
        (ConsistencySettings, {"start_scales": 5, "end_scales": 4}, "5 and 4"),
        (ConsistencySettings, {"end_scales": 1, "start_scales": 1}, "end_scales"),
        (ConsistencySettings, {"target_rate": 1.0}, "target_rate"),
        (ConsistencySettings, {"std": -1.0}, "std"),
        (ConsistencySettings, {"stages": 0}, "stages"),
        (ConsistencySettings, {"q": 1.0}, "q > 1"),
        (ConsistencySettings, {"q": math.nan}, "q > 1"),
        (ConsistencySettings, {"curriculum": "easy", "q": 256.0}, r"q\^stages of at most 2\^16, got 256\^8"),
        (TrajectorySettings, {"solver": "dpm"}, "solver"),
        (TrajectorySettings, {"num_scales": 1}, "num_scales"),
        (TrajectorySettings, {"solver_steps": 0}, "solver_steps"),
        (TrajectorySettings, {"target_rate": -0.1}, "target_rate"),
        (TrajectorySettings, {"denoising_weight": math.nan}, "denoising_weight"),
        (TrajectorySettings, {"std": 0.0}, "std"),
        (LatentConsistencySettings, {"w_min": 5.0, "w_max": 4.0}, "w_min"),
        (LatentConsistencySettings, {"w_min": -1.0}, "w_min"),
        (LatentConsistencySettings, {"target_rate": 1.0}, "target_rate"),
        (AutoencoderSettings, {"kl_weight": -1.0}, "kl_weight"),
        (AutoencoderSettings, {"kl_weight": math.nan}, "kl_weight"),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind, values, told):
    with pytest.raises(ValueError, match=told):
        kind(**values)


def test_distances_by_name():
    a, b = normal(2, 5, 4, 3, seed=1), normal(2, 5, 4, 3, seed=2)
    assert mx.array_equal(make_distance("pseudo_huber", 0.3, None)(a, b), pseudo_huber(0.3)(a, b))
    assert mx.array_equal(make_distance("pseudo_huber", None, None)(a, b), pseudo_huber()(a, b))
    assert mx.array_equal(make_distance("l2", None, None)(a, b), l2(a, b))
    assert make_distance("lpips", None, lambda a, b: mx.array([1.0, 2.0]))(a, b).tolist() == [1, 2]
    with pytest.raises(UsageError, match="expected one of " + ", ".join(METRICS)):
        make_distance("ssim", None, None)
    with pytest.raises(UsageError, match="needs the network's weights"):
        make_distance("lpips", None, None)
    for name in ("l1", "l2", "lpips"):
        with pytest.raises(UsageError, match=f"{name} has no c"):
            make_distance(name, 0.1, lambda a, b: a)


# --- weights


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_networks_compute_in_half_precision_but_for_the_parts_that_decide_a_picture(dtype):
    module = native_unet(make_unet(CONDITIONAL, 1))
    masters = master_parameters({"unet": module})
    made = Weighted({"unet": module}, masters, dtype).part("unet")
    for name, value in tree_flatten(made.parameters()):
        kept = name.startswith(tuple(f"{part}." for part in UNet2D.float32_parts))
        assert value.dtype == (mx.float32 if kept else dtype), name
    assert all(value.dtype == mx.float32 for value in masters["unet"].values())


def test_one_module_serves_several_sets_of_weights():
    module = native_unet(make_unet(UNCONDITIONAL, 1))
    sets = [master_parameters({"unet": native_unet(make_unet(UNCONDITIONAL, seed))}) for seed in (1, 2)]
    first, second = (Weighted({"unet": module}, parameters) for parameters in sets)
    x, t = normal(1, *SHAPE, seed=1), mx.array([3.0])
    one, other, again = first.unet(x, t), second.unet(x, t), first.unet(x, t)
    assert mx.array_equal(one, again) and not mx.allclose(one, other)
    assert mx.array_equal(other, native_unet(make_unet(UNCONDITIONAL, 2))(x, t))


def test_frozen_parameters_stay_as_the_module_has_them():
    module = native_unet(make_unet(UNCONDITIONAL, 1))
    module.freeze()
    module.conv_out.unfreeze()
    masters = master_parameters({"unet": module})
    assert set(masters["unet"]) == {"conv_out.weight", "conv_out.bias"}
    before = dict(tree_flatten(module.parameters()))["conv_in.weight"]
    made = Weighted({"unet": module}, {"unet": {name: value + 1 for name, value in masters["unet"].items()}})
    after = dict(tree_flatten(made.part("unet").parameters()))
    assert mx.array_equal(after["conv_in.weight"], before)
    assert mx.array_equal(after["conv_out.bias"], masters["unet"]["conv_out.bias"] + 1)
