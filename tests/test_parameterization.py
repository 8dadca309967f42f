"""Scalings against diffusers', and whole solvers against data for which the answer is known in closed form.

For data N(m, s^2) per pixel the probability flow from level t to level u ends at m + (x - m) sqrt((s^2 + u^2) / (s^2 +
t^2)), and the best denoiser is m + (x - m) s^2 / (s^2 + t^2).
"""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler

from mlx_cm.parameterization import (
    cm_scalings,
    consistency_function,
    edm_denoiser,
    edm_scalings,
    log_sigma_conditioning,
    trajectory_denoiser,
    trajectory_function,
)
from mlx_cm.rng import mlx_noise
from mlx_cm.samplers import (
    consistency_jump,
    euler_jump,
    heun_jump,
    sample_ctm,
    sample_multistep,
    sample_trajectory,
)
from mlx_cm.schedules import KarrasSchedule, karras_sigmas

MEAN, DEVIATION = 0.3, 0.4  # m and s of the data
LEVELS = [0.002, 0.0021, 0.05, 0.5, 1.38, 17.0, 80.0]


def flow(x: mx.array, t: float, u: float) -> mx.array:
    """Where the probability flow carries x from level t to level u."""
    return MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + u**2) / (DEVIATION**2 + t**2))


def network_of(solution, scalings):
    """The network F that makes `c_skip x + c_out F(c_in x, 250 ln t)` equal to `solution(x, t)`."""

    def net(scaled: mx.array, c_noise: mx.array) -> mx.array:
        t = mx.exp(c_noise / 250)
        c_skip, c_out, c_in = scalings(t)
        x = scaled / c_in
        return (solution(x, t.reshape(-1, 1, 1, 1)) - c_skip * x) / c_out

    return net


def analytic_denoiser(x: mx.array, t: float) -> mx.array:
    return MEAN + (x - MEAN) * DEVIATION**2 / (DEVIATION**2 + t**2)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_scalings_are_diffusers(sigma_data):
    reference = CMStochasticIterativeScheduler(sigma_data=sigma_data)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    inner = 1 / (levels**2 + sigma_data**2) ** 0.5
    for ours, theirs in [
        (edm_scalings(mx.array(LEVELS), sigma_data), reference.get_scalings(levels)),
        (cm_scalings(mx.array(LEVELS), sigma_data, 0.002), reference.get_scalings_for_boundary_condition(levels)),
    ]:
        for one, other in zip(ours, (*theirs, inner), strict=True):
            assert one.shape == (len(LEVELS), 1, 1, 1)
            assert one.dtype == mx.float32
            # t - sigma_min cancels digits near sigma_min
            np.testing.assert_allclose(np.array(one).reshape(-1), other.numpy(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_scalings_are_float32_whatever_comes_in(dtype):
    for scalings in (edm_scalings(mx.array([2.0], dtype=dtype), 0.5), cm_scalings(mx.array([2.0], dtype), 0.5, 0.002)):
        assert [one.dtype for one in scalings] == [mx.float32] * 3


@pytest.mark.parametrize("sigma_min", [0.002, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.3])
def test_boundary_condition_holds_to_the_last_bit(sigma_min, sigma_data):
    schedule = KarrasSchedule(sigma_min=sigma_min, sigma_data=sigma_data)
    f = consistency_function(lambda x, t: 1e4 * mx.sin(x) + t.reshape(-1, 1, 1, 1), schedule, clip=False)
    x = 3 * mx.random.normal((2, 5, 4, 3), key=mx.random.key(0))
    assert mx.array_equal(f(x, sigma_min), x)


def test_boundary_condition_is_not_the_teachers():
    schedule = KarrasSchedule(sigma_min=0.1)
    x = mx.ones((1, 2, 2, 3))
    assert not mx.allclose(edm_denoiser(lambda x, t: 0 * x, schedule, clip=False)(x, 0.1), x)


@pytest.mark.parametrize("make", [consistency_function, edm_denoiser])
def test_result_is_float32_and_clipped_on_request(make):
    x = mx.random.normal((2, 3, 3, 3), key=mx.random.key(1)).astype(mx.float16) * 8

    def net(x, t):
        return (9 * x).astype(mx.float16)

    plain, clipped = (make(net, KarrasSchedule(), clip=clip)(x, 2.0) for clip in (False, True))
    assert plain.dtype == clipped.dtype == mx.float32
    assert mx.abs(plain).max() > 1
    assert mx.array_equal(clipped, mx.clip(plain, -1, 1))


@pytest.mark.parametrize("make", [consistency_function, edm_denoiser])
def test_a_level_per_image_is_that_image_alone(make):
    f = make(lambda x, t: mx.sin(x) + 0.001 * t.reshape(-1, 1, 1, 1), KarrasSchedule(), clip=False)
    x = mx.random.normal((3, 2, 2, 1), key=mx.random.key(2))
    together = f(x, mx.array([80.0, 1.5, 0.002]))
    for image, level in enumerate((80.0, 1.5, 0.002)):
        assert mx.array_equal(together[image], f(x[image : image + 1], level)[0])


def test_conditions_reach_the_network():
    seen = {}

    def net(x, t, class_labels):
        seen["labels"] = class_labels
        return x

    consistency_function(net, KarrasSchedule())(mx.ones((2, 2, 2, 3)), 1.0, class_labels=mx.array([4, 7]))
    assert seen["labels"].tolist() == [4, 7]


@pytest.mark.parametrize("noise_scale", [250.0, 0.25])
def test_the_network_is_told_the_scaled_logarithm(noise_scale):
    seen = []
    f = consistency_function(lambda x, t: seen.append(t) or x, KarrasSchedule(), noise_scale=noise_scale)
    f(mx.ones((2, 2, 2, 3)), 80.0)
    assert seen[0].tolist() == pytest.approx([noise_scale * math.log(80.0)] * 2, rel=1e-6)


@pytest.mark.parametrize("level", [0.0, 1e-44, 1e-20, 0.002, 80.0])
def test_the_lowest_level_is_the_released_codes(level):
    """OpenAI's and CTM's add 1e-44 to sigma; a level of 0 stays finite."""
    theirs = 1000 * 0.25 * torch.log(torch.tensor([level]) + 1e-44)
    ours = log_sigma_conditioning(mx.array([level]), 250.0)
    if level > 1e-40:
        np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-6)
    else:  # so small a number may count as 0
        assert ours.item() == pytest.approx(250 * math.log(1e-44), rel=1e-3)
        assert theirs.item() == pytest.approx(250 * math.log(1e-44), rel=7e-3)


# --- jumps of a trajectory model


def analytic_trajectory(schedule: KarrasSchedule, noise_scale: float = 250.0):
    """The network F whose jumps are the flow's: g = (x_s - (s/t) x) / (1 - s/t), the preconditioning undone."""

    def net(scaled: mx.array, c_noise: mx.array, s: mx.array) -> mx.array:
        t = mx.exp(c_noise / noise_scale)
        c_skip, c_out, c_in = edm_scalings(t, schedule.sigma_data)
        x, t, s = scaled / c_in, t.reshape(-1, 1, 1, 1), mx.exp(s / noise_scale).reshape(-1, 1, 1, 1)
        x_s = MEAN + (x - MEAN) * mx.sqrt((DEVIATION**2 + s**2) / (DEVIATION**2 + t**2))
        return ((x_s - s / t * x) / (1 - s / t) - c_skip * x) / c_out

    return net


def jumps(schedule: KarrasSchedule, noise_scale: float = 250.0):
    return trajectory_function(analytic_trajectory(schedule, noise_scale), schedule, noise_scale=noise_scale)


@pytest.mark.parametrize(("schedule", "noise_scale"), [(KarrasSchedule(), 250.0), (KarrasSchedule(sigma_data=1), 0.25)])
def test_jumps_of_a_known_flow(schedule, noise_scale):
    g = jumps(schedule, noise_scale)
    x = mx.random.normal((3, 5, 4, 2), key=mx.random.key(9)) * mx.array([80.0, 5.0, 1.0]).reshape(-1, 1, 1, 1)
    starts, ends = (80.0, 5.0, 0.7), (0.3, 0.002, 0.0)
    together = g(x, mx.array(starts), mx.array(ends))
    assert together.dtype == mx.float32
    for image, (t, s) in enumerate(zip(starts, ends, strict=True)):
        alone = g(x[image : image + 1], t, s)
        np.testing.assert_allclose(np.array(alone), np.array(flow(x[image : image + 1], t, s)), rtol=2e-4, atol=1e-4)
        np.testing.assert_allclose(np.array(together[image]), np.array(alone[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0.002, 1.5, 80.0])
def test_a_jump_to_where_one_stands_changes_nothing(t):
    """To the last bit, whatever the network says."""
    g = trajectory_function(lambda x, t, s: 1e4 * mx.sin(x) + s.reshape(-1, 1, 1, 1), KarrasSchedule())
    x = 3 * mx.random.normal((2, 5, 4, 3), key=mx.random.key(0))
    assert mx.array_equal(g(x, t, t), x)
    assert mx.array_equal(g(x, mx.array([t, t]), mx.array([t, t])), x)


def test_the_inside_of_a_jump_is_edms_denoiser():
    """Of a network that does not look at s; and the jump to 0 is the inside alone."""
    schedule = KarrasSchedule()

    def net(x, t, s=None):
        return mx.sin(2 * x) + t.reshape(-1, 1, 1, 1) / 1000

    x, t = mx.random.normal((2, 3, 4, 3), key=mx.random.key(1)), mx.array([3.0, 0.2])
    expected = edm_denoiser(net, schedule, clip=False)(x, t)
    assert mx.array_equal(trajectory_denoiser(net, schedule)(x, t, mx.array([1.0, 0.0])), expected)
    assert mx.array_equal(trajectory_function(net, schedule)(x, t, 0.0), expected)
    assert not mx.allclose(trajectory_function(net, schedule)(x, t, 0.1), expected)


def test_the_network_is_told_both_levels():
    seen = []
    g = trajectory_function(lambda x, t, s, label: seen.append((t, s, label)) or x, KarrasSchedule(), noise_scale=0.25)
    g(mx.ones((2, 2, 2, 3), dtype=mx.float16), 80.0, mx.array([0.002, 0.0]), label=7)
    ((t, s, label),) = seen
    assert label == 7
    assert t.tolist() == pytest.approx([0.25 * math.log(80)] * 2, rel=1e-6)
    assert s.tolist() == pytest.approx([0.25 * math.log(0.002), 0.25 * math.log(1e-44)], rel=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("times", [(8.0,), (8.0, 1.0), (8.0, 3.0, 0.6)])
def test_gamma_sampling_ends_in_the_data_distribution(times, eta):
    schedule = KarrasSchedule(sigma_min=0.5, sigma_max=8.0)
    noise = mlx_noise([11])
    shape = (1, 300, 300, 1)
    x = MEAN + math.sqrt(DEVIATION**2 + times[0] ** 2) * noise(shape, 0)
    samples = np.array(sample_ctm(jumps(schedule), x, times, schedule, eta=eta, noise=noise), dtype=np.float64)
    variance = DEVIATION**2 + schedule.sigma_min**2
    count = samples.size
    assert samples.mean() == pytest.approx(MEAN, abs=4 * math.sqrt(variance / count))
    assert samples.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / count))


# --- consistency sampling of a known distribution
# sigma_min is large, so that noise of sqrt(t^2 - sigma_min^2) and noise of t are told apart.
COARSE = KarrasSchedule(sigma_min=0.5, sigma_max=8.0)
CONSISTENCY_NET = network_of(
    lambda x, t: MEAN + (x - MEAN) * mx.sqrt((DEVIATION**2 + COARSE.sigma_min**2) / (DEVIATION**2 + t**2)),
    lambda t: cm_scalings(t, COARSE.sigma_data, COARSE.sigma_min),
)


def test_one_step_is_the_closed_form():
    f = consistency_function(CONSISTENCY_NET, COARSE, clip=False)
    noise = mlx_noise([5])
    x = 8.0 * noise((1, 9, 7, 3), 0)
    ours = sample_multistep(consistency_jump(f), x, (8.0,), COARSE, noise=noise)
    np.testing.assert_allclose(np.array(ours), np.array(flow(x, 8.0, COARSE.sigma_min)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("times", [(8.0,), (8.0, 1.0), (8.0, 3.0, 0.6)])
def test_multistep_ends_in_the_data_distribution(times):
    f = consistency_function(CONSISTENCY_NET, COARSE, clip=False)
    noise = mlx_noise([11])
    shape = (1, 300, 300, 1)
    # The exact marginal at the start, so that any deviation comes from the sampler.
    x = MEAN + math.sqrt(DEVIATION**2 + times[0] ** 2) * noise(shape, 0)
    samples = np.array(sample_multistep(consistency_jump(f), x, times, COARSE, noise=noise), dtype=np.float64)
    variance = DEVIATION**2 + COARSE.sigma_min**2
    count = samples.size
    assert samples.mean() == pytest.approx(MEAN, abs=4 * math.sqrt(variance / count))
    assert samples.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / count))


# --- solvers of the probability flow


def solve(jump, steps: int) -> float:
    """Largest error of a solver that walks from level 10 to sigma_min, relative to the data's deviation."""
    schedule = KarrasSchedule(sigma_min=0.02, sigma_max=10.0)
    x = 10.0 * mlx_noise([3])((1, 8, 8, 3), 0)
    levels = karras_sigmas(steps + 1, schedule.sigma_min, schedule.sigma_max, 3.0).tolist()
    states = []
    sample_trajectory(
        jump(analytic_denoiser), x, levels, schedule, noise=None, callback=lambda step: states.append(step.x)
    )
    return float(mx.abs(states[-2] - flow(x, 10.0, schedule.sigma_min)).max()) / DEVIATION


@pytest.mark.parametrize(("jump", "order"), [(euler_jump, 1), (heun_jump, 2)])
def test_error_falls_with_the_order_of_the_solver(jump, order):
    steps = np.array([16, 32, 64, 128])
    errors = np.array([solve(jump, int(count)) for count in steps])
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2), errors
    assert errors[-1] < {1: 0.1, 2: 2e-3}[order]


def test_heun_beats_euler():
    assert solve(heun_jump, 32) < solve(euler_jump, 32) / 5


@pytest.mark.parametrize("jump", [euler_jump, heun_jump])
def test_the_last_step_to_zero_is_the_denoiser(jump):
    x = mx.random.normal((1, 4, 4, 3), key=mx.random.key(6))
    ours = sample_trajectory(jump(analytic_denoiser), x, (0.7,), KarrasSchedule(), noise=None)
    np.testing.assert_allclose(np.array(ours), np.array(analytic_denoiser(x, 0.7)), atol=1e-6)


@pytest.mark.parametrize("jump", [euler_jump, heun_jump])
def test_levels_per_image_are_that_image_alone(jump):
    """Also where one image of the batch jumps to 0, at which the slope is not defined."""
    g = jump(edm_denoiser(lambda x, t: mx.sin(x) + 0.001 * t.reshape(-1, 1, 1, 1), KarrasSchedule()))
    x = mx.random.normal((4, 3, 2, 3), key=mx.random.key(7))
    starts, ends = (80.0, 1.5, 0.002, 0.7), (17.0, 0.0, 0.0, 0.002)
    together = g(x, mx.array(starts), mx.array(ends))
    for image, (t, s) in enumerate(zip(starts, ends, strict=True)):
        alone = g(x[image : image + 1], t, s)[0]
        np.testing.assert_allclose(np.array(together[image]), np.array(alone), rtol=3e-6, atol=3e-6)
    mixed = g(x, 90.0, mx.array(ends))
    np.testing.assert_allclose(np.array(mixed[1:2]), np.array(g(x[1:2], 90.0, 0.0)), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("jump", [euler_jump, heun_jump])
@pytest.mark.parametrize("end", [0.0, 0.5])
def test_gradients_through_a_jump_to_zero_are_finite(jump, end):
    """A slope that is not defined must not reach a gradient either: 0 times NaN is NaN."""

    def mean(a: mx.array) -> mx.array:
        denoise = edm_denoiser(lambda x, t: a * x + 0.001 * t.reshape(-1, 1, 1, 1), KarrasSchedule(), clip=False)
        return jump(denoise)(mx.ones((2, 3, 2, 3)), mx.array([2.0, 1.0]), mx.array([end, 0.5])).mean()

    step = 1e-2
    expected = (mean(mx.array(0.3 + step)) - mean(mx.array(0.3 - step))).item() / (2 * step)
    assert mx.grad(mean)(mx.array(0.3)).item() == pytest.approx(expected, rel=2e-3)


def test_an_edm_network_solves_the_flow():
    schedule = KarrasSchedule()
    net = network_of(analytic_denoiser, lambda t: edm_scalings(t, schedule.sigma_data))
    denoise = edm_denoiser(net, schedule, clip=False)
    x = 80.0 * mlx_noise([8])((1, 6, 6, 3), 0)
    levels = karras_sigmas(240, schedule.sigma_min, schedule.sigma_max, schedule.rho).tolist()
    ours = sample_trajectory(heun_jump(denoise), x, levels, schedule, noise=None)
    np.testing.assert_allclose(np.array(ours), np.array(flow(x, 80.0, 0.0)), atol=1e-3)
