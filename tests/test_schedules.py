"""Noise levels: against the closed form, diffusers' scheduler and the published numbers."""

import math

import mlx.core as mx
import numpy as np
import pytest
from diffusers import CMStochasticIterativeScheduler

from mlx_cm.errors import UsageError
from mlx_cm.parameterization import log_sigma_conditioning
from mlx_cm.schedules import KarrasSchedule, karras_sigmas

# index of the published list, size of the grid, noise level
PUBLISHED = [
    (22, 40, 1.38237),
    (17, 40, 4.36556),
    (18, 40, 3.51970),
    (106, 201, 1.91284),
    (67, 151, 3.99122),
    (62, 151, 5.24850),
]


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_scales", [2, 5, 40, 201])
def test_grid_is_the_closed_form(num_scales, rho):
    grid = KarrasSchedule(num_scales=num_scales, rho=rho).grid()
    expected = [
        (80 ** (1 / rho) + i / (num_scales - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
        for i in range(num_scales)
    ]
    assert grid.dtype == np.float64
    np.testing.assert_allclose(grid, expected, rtol=1e-11)
    assert (np.diff(grid) < 0).all()


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(("sigma_min", "sigma_max"), [(0.002, 80.0), (0.01, 40.0), (0.02, 100.0), (0.005, 50.0)])
def test_grid_ends_exactly_at_its_ends(sigma_min, sigma_max, rho):
    """Otherwise a level that the schedule itself gives would be refused as outside its range."""
    for num_scales in (2, 10, 40):
        schedule = KarrasSchedule(num_scales, sigma_min, sigma_max, rho=rho)
        grid = schedule.grid()
        assert (grid[0], grid[-1]) == (sigma_max, sigma_min)
        assert schedule.check_times(grid) == tuple(grid)


@pytest.mark.parametrize("num_scales", [40, 151, 201])
def test_grid_is_diffusers_grid(num_scales):
    theirs = CMStochasticIterativeScheduler(num_train_timesteps=num_scales).sigmas.numpy()
    np.testing.assert_allclose(KarrasSchedule(num_scales=num_scales).grid(), theirs, rtol=1e-12)


def test_one_level_is_the_highest():
    assert karras_sigmas(1, 0.002, 80.0, 7.0) == pytest.approx([80.0])


@pytest.mark.parametrize(("index", "num_scales", "level"), PUBLISHED)
def test_levels_of_the_published_lists(index, num_scales, level):
    schedule = KarrasSchedule(num_scales=num_scales)
    times = schedule.times_at((0, index, num_scales - 1))
    assert times == pytest.approx((80.0, level), rel=1e-5)


@pytest.mark.parametrize(("level", "net_time"), [(80.0, 1095.5067), (0.002, -1553.65)])
def test_net_time(level, net_time):
    assert log_sigma_conditioning(mx.array([level]), 250.0).item() == pytest.approx(net_time, abs=5e-3)


@pytest.mark.parametrize(
    ("indices", "kept"),
    [
        ((0, 22, 39), (0, 22)),
        ((0, 39), (0,)),
        ((39,), (39,)),  # alone it is not an end mark but all there is
        ((0, 22), (0, 22)),
        ((5,), (5,)),
    ],
)
def test_last_index_at_the_end_is_left_out(indices, kept):
    schedule = KarrasSchedule()
    grid = schedule.grid()
    assert schedule.times_at(indices) == tuple(grid[list(kept)])


@pytest.mark.parametrize("indices", [(40,), (-1,), (0, 40), (0, 22, 41)])
def test_index_outside_the_grid(indices):
    with pytest.raises(UsageError, match=r"indices 0 to 39"):
        KarrasSchedule().times_at(indices)


@pytest.mark.parametrize("num_scales", [40, 151, 201])
@pytest.mark.parametrize("steps", range(1, 9))
def test_spacing_is_diffusers_spacing(steps, num_scales):
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=num_scales)
    scheduler.set_timesteps(steps)
    ours = KarrasSchedule(num_scales=num_scales).spaced_times(steps)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy()[:-1], rtol=1e-6)


@pytest.mark.parametrize(("steps", "levels"), [(2, (80, 2.2404)), (4, (80, 16.78, 2.2404, 0.1312))])
def test_spacing_of_a_few_steps(steps, levels):
    assert KarrasSchedule().spaced_times(steps) == pytest.approx(levels, rel=1e-3)


@pytest.mark.parametrize("steps", [0, -1, 41])
def test_spacing_has_limits(steps):
    with pytest.raises(UsageError, match=r"expected 1 to 40"):
        KarrasSchedule().spaced_times(steps)


def test_check_times_takes_what_is_right():
    assert KarrasSchedule().check_times([80, 1.5, 0.002]) == (80.0, 1.5, 0.002)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([], "empty"),
        ([math.nan], "lies in"),
        ([80, math.nan], "lies in"),
        ([math.inf], "lies in"),
        ([80.1], "lies in"),
        ([80, 0.001], "lies in"),
        ([0], "lies in"),
        ([-1], "lies in"),
        ([1, 80], "descend"),
        ([80, 80], "descend"),
    ],
)
def test_check_times_refuses(times, says):
    with pytest.raises(UsageError, match=says):
        KarrasSchedule().check_times(times)


@pytest.mark.parametrize(
    "fields",
    [
        {"sigma_min": 0.0},
        {"sigma_min": 80.0},
        {"sigma_max": math.inf},
        {"sigma_min": math.nan},
        {"sigma_data": 0.0},
        {"sigma_data": math.nan},
        {"rho": 0.0},
        {"rho": math.inf},
        {"num_scales": 1},
    ],
)
def test_a_schedule_that_means_nothing_is_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        KarrasSchedule(**fields)


def test_marginal_is_variance_exploding():
    schedule = KarrasSchedule()
    assert schedule.marginal(3.5) == (1.0, 3.5)
    assert (schedule.t_min, schedule.t_max) == (0.002, 80.0)
