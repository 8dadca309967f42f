"""Curricula and distributions of levels: published formulas, tables worked out by hand, and the released codes."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from mlx_cm.errors import UsageError
from mlx_cm.schedules import KarrasSchedule
from mlx_cm.training.curriculum import (
    CURRICULA,
    doubling_scales,
    easy_consistency_level,
    grid,
    lognormal_probabilities,
    progressive_rate,
    progressive_scales,
)

SCHEDULE = KarrasSchedule()


def released_scales_and_rate(step, total, start, end, start_rate):
    """openai/consistency_models `ema_and_scales_fn`, adaptive and progressive: intervals c, N = c + 1, mu by c."""
    root = np.sqrt(step / total * ((end + 1) ** 2 - start**2) + start**2)
    intervals = max(int(np.ceil(root - 1)), 1)
    return intervals + 1, float(np.exp(start * np.log(start_rate) / intervals))


# --- progressive


@pytest.mark.parametrize(
    ("start", "end", "rate"), [(2, 150, 0.9), (2, 200, 0.95), (2, 150, 0.95), (1, 2, 0.5), (10, 10, 0.9)]
)
def test_progressive_is_the_released_code(start, end, rate):
    total = 5000
    for step in range(0, total, 7):
        expected = released_scales_and_rate(step, total, start, end, rate)
        scales, mu = CURRICULA["progressive"](step, total, start, end, rate)
        assert scales == expected[0]
        assert mu == pytest.approx(expected[1], rel=1e-12)


def test_progressive_scales_for_cifar():
    """[CM] appendix C: s0 = 2, s1 = 150; N from 2 to 151, mu from 0.81 to nearly 1."""
    total = 800_000
    assert progressive_scales(0, total, 2, 150) == 2
    assert progressive_scales(total - 1, total, 2, 150) == 151
    # Half of the way: sqrt((151^2 + 2^2) / 2) = 106.78..., less 1, rounded up, plus 1.
    assert progressive_scales(total // 2, total, 2, 150) == 107
    # 151^2 - 2^2 = 22797 parts: N grows from m to m + 1 where more than m^2 - 4 of them are done.
    for m in (2, 3, 50, 150):
        boundary = math.floor(Fraction(total * (m**2 - 4), 22797))
        assert progressive_scales(boundary, total, 2, 150) == max(m, 2)
        assert progressive_scales(boundary + 1, total, 2, 150) == m + 1
    assert progressive_rate(2, 2, 0.9) == pytest.approx(0.81)  # exp(2 ln 0.9)
    assert progressive_rate(151, 2, 0.9) == pytest.approx(math.exp(2 * math.log(0.9) / 150))


@pytest.mark.parametrize("total", [1, 2, 37, 1000])
def test_progressive_grows_and_stays_in_its_range(total):
    made = [CURRICULA["progressive"](step, total, 2, 150, 0.9) for step in range(total)]
    scales, rates = ([one[index] for one in made] for index in (0, 1))
    assert scales == sorted(scales) and rates == sorted(rates)
    assert scales[0] == 2 and scales[-1] <= 151
    assert all(0 < rate < 1 for rate in rates)


def test_a_progressive_curriculum_without_an_average():
    """mu0 = 0, the ablation of [iCT] section 3.2: the grid grows, the target is the student."""
    assert CURRICULA["progressive"](0, 100, 2, 150, 0.0) == (2, 0.0)
    assert CURRICULA["progressive"](99, 100, 2, 150, 0.0)[1] == 0.0


# --- doubling


def test_doubling_is_the_papers_table():
    """[iCT] table 1 and section 3.4: s0 = 10, s1 = 1280, so K' = K / 8 and N = 11, 21, 41, ..., 1281."""
    total = 400_000
    table = [11, 21, 41, 81, 161, 321, 641, 1281]
    for stage, scales in enumerate(table):
        first, last = stage * 50_000, (stage + 1) * 50_000 - 1
        assert doubling_scales(first, total, 10, 1280) == scales
        assert doubling_scales(last, total, 10, 1280) == scales
        assert CURRICULA["doubling"](first, total, 10, 1280, 0.0) == (scales, 0.0)


@pytest.mark.parametrize(
    ("total", "start", "end", "stage_length", "reached"),
    [
        (800, 10, 1280, 100, 1281),
        (803, 10, 1280, 100, 1281),  # what is left over belongs to the last stage
        (100, 2, 6, 38, 7),  # log2(3) + 1 = 2.58 stages: 3, 5, and 7 for a shorter one
        (100, 10, 1000, 13, 1001),  # log2(100) + 1 = 7.64
        (100, 2, 5, 50, 5),  # floor(5 / 2) = 2: two stages, and 5 is not reached
        (100, 4, 4, 100, 5),
        (3, 10, 1280, 1, 41),  # fewer steps than stages
    ],
)
def test_doubling_boundaries(total, start, end, stage_length, reached):
    """K' = floor(K / (log2(floor(s1 / s0)) + 1)), worked out by hand; N doubles there, up to s1."""
    expected = [min(start * 2 ** (step // stage_length), end) + 1 for step in range(total)]
    assert [doubling_scales(step, total, start, end) for step in range(total)] == expected
    assert expected[-1] == reached
    assert expected == sorted(expected)


def test_a_fixed_curriculum_does_not_change():
    assert {CURRICULA["fixed"](step, 10, 2, 40, 0.95) for step in range(10)} == {(40, 0.95)}


# --- levels


@pytest.mark.parametrize("num_scales", [2, 3, 18, 1281])
def test_grid_of_a_curriculum(num_scales):
    """The released code's formula, and both ends exact, whatever N the schedule itself has."""
    low, high = SCHEDULE.sigma_min ** (1 / 7), SCHEDULE.sigma_max ** (1 / 7)
    expected = [(high + i / (num_scales - 1) * (low - high)) ** 7 for i in range(num_scales)]
    levels = grid(SCHEDULE, num_scales)
    np.testing.assert_allclose(levels, expected, rtol=1e-12)
    assert (levels[0], levels[-1]) == (80.0, 0.002)
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize(("mean", "std"), [(-1.1, 2.0), (0.4, 0.3), (3.0, 5.0)])
@pytest.mark.parametrize("num_scales", [2, 11, 1281])
def test_lognormal_probabilities_are_areas_of_a_normal_distribution(num_scales, mean, std):
    levels = grid(SCHEDULE, num_scales)
    edges = scipy.special.erf((np.log(levels) - mean) / (math.sqrt(2) * std))
    expected = edges[:-1] - edges[1:]
    found = lognormal_probabilities(levels, mean, std)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-9, atol=1e-15)
    area = np.diff(scipy.stats.norm.cdf(np.log(levels[::-1]), mean, std))[::-1]
    np.testing.assert_allclose(found, area / area.sum(), rtol=1e-6, atol=1e-15)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_lognormal_probabilities_are_how_often_draws_fall_between_levels():
    levels = grid(SCHEDULE, 11)
    random = np.random.default_rng(5)
    sigma = np.exp(random.normal(-1.1, 2.0, 200_000))
    sigma = sigma[(sigma > levels[-1]) & (sigma < levels[0])]
    counts = np.histogram(sigma, levels[::-1])[0][::-1]
    assert scipy.stats.chisquare(counts, len(sigma) * lognormal_probabilities(levels, -1.1, 2.0)).pvalue > 0.01


@pytest.mark.parametrize("mean", [-60.0, 60.0])
def test_levels_that_are_nowhere_near_the_grid_are_refused(mean):
    with pytest.raises(UsageError, match="none is in the schedule's range"):
        lognormal_probabilities(grid(SCHEDULE, 11), mean, 0.5)


# --- easy consistency


def released_pair(t: np.ndarray, stage: int, q: float, k: float, b: float) -> np.ndarray:
    """locuslab/ect `t_to_r_sigmoid`."""
    t = torch.tensor(t)
    decay = 1 / q ** (stage + 1)
    return torch.clamp(t * (1 - decay * (1 + k * torch.sigmoid(-b * t))), min=0).numpy()


@pytest.mark.parametrize(
    ("stage", "q", "k", "b"),
    [*((stage, 2.0, 8.0, 1.0) for stage in range(8)), (0, 256.0, 8.0, 1.0), (1, 256.0, 8.0, 1.0), (3, 4.0, 3.0, 0.5)],
)
def test_easy_pairs_are_the_released_code(stage, q, k, b):
    t = np.exp(np.random.default_rng(0).normal(-1.1, 2.0, 1000))
    found = easy_consistency_level(t, stage, q=q, k=k, b=b)
    np.testing.assert_allclose(found, released_pair(t, stage, q, k, b), rtol=1e-9, atol=1e-12)
    assert ((found >= 0) & (found < t)).all()


def test_easy_pairs_near_each_other_from_stage_to_stage():
    t = np.array([0.05, 0.7, 3.0, 60.0, 1e4])
    stages = [easy_consistency_level(t, stage) for stage in range(9)]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(stages))
    # High levels: n(t) is 1, so r / t = 1 - 1 / 2^(stage + 1). Low ones: n(t) is nearly 5, so r is 0 until stage 2.
    assert stages[0][3:] / t[3:] == pytest.approx([0.5, 0.5])
    assert stages[3][3:] / t[3:] == pytest.approx([15 / 16, 15 / 16])
    assert stages[1][0] == 0 < stages[2][0]
    assert stages[2][0] / t[0] == pytest.approx(1 - (1 + 8 / (1 + math.exp(0.05))) / 8)
