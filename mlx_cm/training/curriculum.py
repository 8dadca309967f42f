"""Which noise levels a step of training looks at: schedules over training, and distributions of levels.

Everything is a function of the step, so that a resumed run goes on with exactly the levels that an uninterrupted one
would have drawn. Numbers are float64 here and rounded once.
"""

import math
from collections.abc import Callable

import numpy as np

from mlx_cm.schedules import KarrasSchedule, karras_sigmas


def progressive_scales(step: int, total: int, start: int, end: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1, from s0 to s1 + 1 levels.

    [CM] appendix C, in the form of the released code, whose ceiling is at least 1.
    """
    squared = step / total * ((end + 1) ** 2 - start**2) + start**2
    return max(1, math.ceil(math.sqrt(squared) - 1)) + 1


def progressive_rate(num_scales: int, start: int, start_rate: float) -> float:
    """mu(k) = exp(s0 ln(mu0) / (N(k) - 1)): the finer the grid, the slower the target follows.

    [CM] appendix C; the released code divides by the number of intervals.
    """
    return math.exp(start * math.log(start_rate) / (num_scales - 1))


def doubling_scales(step: int, total: int, start: int, end: int) -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (floor(log2(s1 / s0)) + 1)).

    [iCT] section 3.4.
    """
    stage = max(1, total // (math.floor(math.log2(end / start)) + 1))
    return min(start * 2 ** (step // stage), end) + 1


# How N and mu go over training: (step, total steps, start, end, start_rate) => (N, mu). Where mu is 0 the target is the
# student itself.
CURRICULA: dict[str, Callable[[int, int, int, int, float], tuple[int, float]]] = {
    "fixed": lambda step, total, start, end, rate: (end, rate),
    "progressive": lambda step, total, start, end, rate: (
        (scales := progressive_scales(step, total, start, end)),
        progressive_rate(scales, start, rate),
    ),
    "doubling": lambda step, total, start, end, rate: (doubling_scales(step, total, start, end), 0.0),
}


def grid(schedule: KarrasSchedule, num_scales: int) -> np.ndarray:
    """The schedule's levels where there are N of them, descending, float64."""
    return karras_sigmas(num_scales, schedule.sigma_min, schedule.sigma_max, schedule.rho)


def lognormal_probabilities(levels: np.ndarray, mean: float, std: float) -> np.ndarray:
    """p(i) of the intervals of a grid, as a normal distribution of ln(sigma) would fill them.

    [iCT] section 3.5: p(sigma_i) ~ erf((ln sigma_{i+1} - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_i - ...) / ...).

    Args:
        levels: descending, shape (N,).

    Returns:
        Shape (N - 1,), summing to 1; entry i is of the interval between levels i and i + 1.
    """
    edges = [math.erf((math.log(level) - mean) / (math.sqrt(2) * std)) for level in levels]
    weights = np.maximum(-np.diff(edges), 0.0)
    return weights / weights.sum()


def easy_consistency_level(t: np.ndarray, stage: int, *, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> np.ndarray:
    """r(t) <= t, the lower level of a pair; it nears t as the stages go by, from 0.

    [ECT] equation 12 and its released code: r = t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), at least 0.
    """
    closeness = 1 + k / (1 + np.exp(b * t))
    return np.maximum(t * (1 - closeness / q ** (stage + 1)), 0.0)
