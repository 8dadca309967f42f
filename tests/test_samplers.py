"""The one sampler loop: what it asks for, in which order, and whose pictures it makes."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_cm.parameterization import consistency_function, edm_denoiser
from mlx_cm.rng import mlx_noise, replay_noise
from mlx_cm.samplers import (
    Step,
    consistency_jump,
    euler_jump,
    heun_jump,
    renoise,
    sample_ctm,
    sample_jumps,
    sample_multistep,
    sample_trajectory,
)
from mlx_cm.schedules import KarrasSchedule

SHAPE = (2, 5, 4, 3)


class Recorded:
    """A noise source that remembers what it was asked for."""

    def __init__(self, seeds=(0, 1)):
        self.source, self.asked = mlx_noise(seeds), []

    def __call__(self, shape, index):
        self.asked.append((tuple(shape), index))
        return self.source(shape, index)


@dataclass(frozen=True)
class Preserving:
    """x_t = cos(t) x_0 + sin(t) noise: signal shrinks as noise grows."""

    t_min: float = 0.0

    def marginal(self, t):
        return math.cos(t), math.sin(t)


def smooth_network(xp):
    """A network of elementary functions that MLX and NumPy both have."""

    def net(x, c_noise, **cond):
        return xp.sin(2 * x + c_noise.reshape(-1, 1, 1, 1) / 1000) + 0.3 * x

    return net


# --- the loop


def test_draws_asked_for():
    noise = Recorded()
    f = consistency_function(smooth_network(mx), KarrasSchedule())
    sample_multistep(consistency_jump(f), mx.ones(SHAPE), (80, 5, 1.5, 0.2), KarrasSchedule(), noise=noise)
    assert noise.asked == [(SHAPE, 1), (SHAPE, 2), (SHAPE, 3)]


@pytest.mark.parametrize("times", [(80.0,), (1.0,), (0.002,)])
def test_one_step_draws_nothing(times):
    noise = Recorded()
    f = consistency_function(smooth_network(mx), KarrasSchedule())
    sample_multistep(consistency_jump(f), mx.ones(SHAPE), times, KarrasSchedule(), noise=noise)
    assert noise.asked == []


@pytest.mark.parametrize("jump", [euler_jump, heun_jump])
def test_a_trajectory_draws_nothing(jump):
    noise = Recorded()
    denoise = edm_denoiser(smooth_network(mx), KarrasSchedule())
    sample_trajectory(jump(denoise), mx.ones(SHAPE), (80, 5, 1.5, 0.2), KarrasSchedule(), noise=noise)
    assert noise.asked == []


def test_no_draw_where_the_next_level_is_the_landing():
    noise = Recorded()
    f = consistency_function(smooth_network(mx), KarrasSchedule())
    sample_multistep(consistency_jump(f), mx.ones(SHAPE), (80, 5, 0.002), KarrasSchedule(), noise=noise)
    assert noise.asked == [(SHAPE, 1)]


def test_levels_and_landings_reach_the_jump_in_order():
    calls = []

    def g(x, t, s):
        calls.append((t, s))
        return x

    schedule = KarrasSchedule()
    x = mx.zeros(SHAPE)
    sample_multistep(g, x, (80, 5, 1), schedule, noise=Recorded())
    assert calls == [(80, 0.002), (5, 0.002), (1, 0.002)]
    calls.clear()
    sample_trajectory(g, x, (80, 5, 1), schedule, noise=Recorded())
    assert calls == [(80, 5), (5, 1), (1, 0.0)]
    calls.clear()
    sample_jumps(g, x, (80, 5, 1), (2, 1, 0.5), schedule, noise=Recorded())
    assert calls == [(80, 2), (5, 1), (1, 0.5)]


@pytest.mark.parametrize(
    ("eta", "landings", "draws"),
    [
        (0.0, [5, 1, 0.002], []),
        (0.6, [0.8 * (5 - 0.002) + 0.002, 0.8 * (1 - 0.002) + 0.002, 0.002], [1, 2]),
        (1.0, [0.002, 0.002, 0.002], [1, 2]),
    ],
)
def test_ctm_lands_between_the_next_time_and_the_end(eta, landings, draws):
    noise, landed = Recorded(), []

    def g(x, t, s):
        landed.append(s)
        return x

    sample_ctm(g, mx.zeros(SHAPE), (80, 5, 1), KarrasSchedule(), eta=eta, noise=noise)
    assert landed == pytest.approx(landings, rel=1e-12)
    assert [index for _, index in noise.asked] == draws


def test_every_time_has_a_landing():
    with pytest.raises(ValueError):
        sample_jumps(lambda x, t, s: x, mx.zeros(SHAPE), (3, 2), (1,), KarrasSchedule(), noise=Recorded())


def test_callback_sees_every_step():
    seen: list[Step] = []
    schedule = KarrasSchedule()
    f = consistency_function(smooth_network(mx), schedule)
    result = sample_multistep(
        consistency_jump(f), mx.ones(SHAPE), (80, 5, 1), schedule, noise=Recorded(), callback=seen.append
    )
    assert [(step.index, step.total, step.t, step.s) for step in seen] == [
        (0, 3, 80, 0.002),
        (1, 3, 5, 0.002),
        (2, 3, 1, 0.002),
    ]
    assert mx.array_equal(seen[-1].x, result)
    assert mx.array_equal(seen[0].x, f(mx.ones(SHAPE), 80))  # x0, before noise is added again


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_callback_ends_the_work(stop, error):
    evaluations, noise = [], Recorded()

    def f(x, t):
        evaluations.append(t)
        return x

    def callback(step):
        if step.index == stop:
            raise error

    with pytest.raises(error):
        sample_multistep(
            consistency_jump(f), mx.ones(SHAPE), (80, 5, 1), KarrasSchedule(), noise=noise, callback=callback
        )
    assert evaluations == [80, 5, 1][: stop + 1]
    assert len(noise.asked) == stop


@pytest.mark.parametrize(("jump", "calls"), [(euler_jump, [4, 2, 1]), (heun_jump, [4, 2, 2, 1, 1])])
def test_network_calls_of_a_solver(jump, calls):
    levels = []

    def denoise(x, t):
        levels.append(t)
        return 0.5 * x

    sample_trajectory(jump(denoise), mx.ones(SHAPE), (4, 2, 1), KarrasSchedule(), noise=None)
    assert levels == calls


def test_conditions_reach_every_call():
    seen = []

    def f(x, t, class_labels):
        seen.append(class_labels)
        return 0.5 * x

    for jump in (consistency_jump, euler_jump, heun_jump):
        jump(f, class_labels=7)(mx.ones(SHAPE), 2.0, 1.0)
    assert seen == [7] * 4


# --- re-noising


def test_renoise_follows_the_marginals_of_a_preserving_schedule():
    """From x_s made of x_0 and one noise, the result has the marginal of level t, the variances adding up."""
    s, t = 0.4, 1.1
    shape = (1, 400, 400, 1)
    noise = mlx_noise([4])
    x_s = math.cos(s) * 2.0 + math.sin(s) * noise(shape, 0)
    x_t = np.array(renoise(x_s, s, t, Preserving(), lambda: noise(shape, 1)), dtype=np.float64)
    deviation, count = math.sin(t), x_t.size
    assert x_t.mean() == pytest.approx(math.cos(t) * 2.0, abs=4 * deviation / math.sqrt(count))
    assert x_t.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * count))


def test_renoise_is_the_equation():
    x, z = mx.array([[1.0, -2.0]]), mx.array([[0.5, 3.0]])
    ratio = math.cos(1.1) / math.cos(0.4)
    spread = math.sqrt(math.sin(1.1) ** 2 - ratio**2 * math.sin(0.4) ** 2)
    ours = renoise(x, 0.4, 1.1, Preserving(), lambda: z)
    np.testing.assert_allclose(np.array(ours), ratio * np.array(x) + spread * np.array(z), rtol=1e-6)
    ours = renoise(x, 0.002, 1.5, KarrasSchedule(), lambda: z)
    np.testing.assert_allclose(np.array(ours), np.array(x) + math.sqrt(1.5**2 - 0.002**2) * np.array(z), rtol=1e-6)


@pytest.mark.parametrize("schedule", [KarrasSchedule(), Preserving()])
def test_nothing_is_drawn_where_nothing_is_added(schedule):
    def draw():
        raise AssertionError("a draw was made")

    x = mx.random.normal(SHAPE)
    assert mx.array_equal(renoise(x, 0.5, 0.5, schedule, draw), x)


# --- another implementation's pictures


def stochastic_iterative(distiller, x, draws, ts, steps, t_min=0.002, t_max=80.0, rho=7.0):
    """Multistep sampling as openai/consistency_models defines it, in float64: a list of grid indices ts, of which the
    last is only where the last step's noise would end."""
    low, high = t_min ** (1 / rho), t_max ** (1 / rho)
    levels = [(high + index / (steps - 1) * (low - high)) ** rho for index in ts]
    for i in range(len(ts) - 1):
        x0 = distiller(x, levels[i])
        x = x0 + draws[i] * math.sqrt(min(max(levels[i + 1], t_min), t_max) ** 2 - t_min**2)
    return np.clip(x, -1, 1)


def distiller_of(net, sigma_data=0.5, sigma_min=0.002):
    """Preconditioning and clipping in float64."""

    def distiller(x, t):
        c_in = 1 / math.sqrt(t**2 + sigma_data**2)
        c_skip = sigma_data**2 / ((t - sigma_min) ** 2 + sigma_data**2)
        c_out = (t - sigma_min) * sigma_data * c_in
        output = net(c_in * x, np.full(len(x), 250 * math.log(t)))
        return np.clip(c_skip * x + c_out * output, -1, 1)

    return distiller


# Every published list with its grid, and longer ones.
LISTS = [
    ((0, 22, 39), 40),
    ((0, 17, 39), 40),
    ((0, 18, 39), 40),
    ((0, 106, 200), 201),
    ((0, 67, 150), 151),
    ((0, 62, 150), 151),
    ((0, 10, 20, 30, 39), 40),
    ((0, 39), 40),
]


@pytest.mark.parametrize(("ts", "steps"), LISTS)
def test_replayed_noise_makes_the_published_samplers_picture(ts, steps):
    rng = np.random.default_rng(sum(ts))
    start, *draws = rng.standard_normal((len(ts), *SHAPE))
    schedule = KarrasSchedule(num_scales=steps)
    times = schedule.times_at(ts)
    noise = replay_noise([start, *draws])
    f = consistency_function(smooth_network(mx), schedule)
    ours = sample_multistep(consistency_jump(f), times[0] * noise(SHAPE, 0), times, schedule, noise=noise)
    theirs = stochastic_iterative(distiller_of(smooth_network(np)), 80.0 * start, draws, ts, steps)
    assert len(np.unique(theirs)) > theirs.size / 3  # the clip at the end does not hide the rest
    np.testing.assert_allclose(np.array(mx.clip(ours, -1, 1)), theirs, atol=2e-5)
