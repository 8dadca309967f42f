"""Which noise levels a step of training looks at: schedules over training, and distributions of levels.

Everything is a function of the step, so that a resumed run goes on with exactly the levels that an uninterrupted one
would have drawn. Numbers are float64 here and rounded once.
"""

import math
from collections.abc import Callable

import numpy as np

from mlx_cm.errors import UsageError
from mlx_cm.schedules import KarrasSchedule, karras_sigmas


def progressive_scales(step: int, total: int, start: int, end: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1: s0 levels at first, s1 + 1 at last, so s1 intervals.

    [CM] appendix C, in the form of the released code, where there is at least one interval.
    """
    squared = step / total * ((end + 1) ** 2 - start**2) + start**2
    return max(1, math.ceil(math.sqrt(squared) - 1)) + 1


def progressive_rate(num_scales: int, start: int, start_rate: float) -> float:
    """mu(k) = exp(s0 ln(mu0) / (N(k) - 1)): the finer the grid, the slower the target follows.

    [CM] appendix C has N(k) for a divisor; its released code has the number of intervals, and so have we. mu0 = 0 stays
    0: the target is the student itself.
    """
    return start_rate ** (start / (num_scales - 1))


def doubling_scales(step: int, total: int, start: int, end: int) -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2(floor(s1 / s0)) + 1)).

    [iCT] section 3.4. Where s1 / s0 is a power of two all stages are equally long; else the last one is shorter, or is
    left out where s1 is not yet reached.
    """
    stage = max(1, math.floor(total / (math.log2(end // start) + 1)))
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

    [iCT] section 3.5: p(sigma_i) ~ erf((ln sigma_{i+1} - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_i - P_mean) /
    (sqrt(2) P_std)), there with levels that ascend.

    Args:
        levels: descending, shape (N,).

    Returns:
        Shape (N - 1,), summing to 1; entry i is of the interval between levels i and i + 1.

    Raises:
        UsageError: the distribution has nothing in the grid's range, to the precision of float64.
    """
    edges = [math.erf((math.log(level) - mean) / (math.sqrt(2) * std)) for level in levels]
    weights = np.maximum(-np.diff(edges), 0.0)
    if not weights.sum() > 0:
        low, high = math.log(levels[-1]), math.log(levels[0])
        raise UsageError(
            f"levels of mean {mean:g} and std {std:g}", f"none is in the schedule's range, {low:.3g} to {high:.3g}"
        )
    return weights / weights.sum()


def easy_consistency_level(t: np.ndarray, stage: int, *, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> np.ndarray:
    """r(t) < t, the lower level of a pair: r = t (1 - n(t) / q^(stage + 1)), at least 0, n(t) = 1 + k sigmoid(-b t).

    [ECT], in the form of its released code. The first stages of q = 2 pair low levels with 0, that is with the data:
    denoising. With every stage the levels of a pair come nearer to each other by the factor q.

    Args:
        t: noise levels, above 0.
        stage: counted from 0.
    """
    distance = 1 + k * (1 - np.tanh(b * t / 2)) / 2  # n(t); a sigmoid by tanh, which does not overflow
    return np.maximum(t * (1 - distance / q ** (stage + 1)), 0.0)
