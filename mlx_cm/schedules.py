"""Noise schedules: which noise levels exist, and how much signal and noise each one means."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_cm.errors import UsageError


def karras_sigmas(num_scales: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """The noise levels sigma_0 = sigma_max > ... > sigma_{N-1} = sigma_min.

    [EDM] equation 5, [CM] section 3 (there counted upwards): (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) -
    sigma_max^(1/rho)))^rho.

    Returns:
        float64, shape (num_scales,). A single level is sigma_max.
    """
    ramp = np.linspace(0.0, 1.0, num_scales)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


@dataclass(frozen=True)
class KarrasSchedule:
    """Variance-exploding schedule of [EDM] and [CM]: x_t = x_0 + t * noise, and t is sigma itself."""

    num_scales: int = 40  # N, levels of the grid that distillation or training ended with
    sigma_min: float = 0.002  # the level at which a consistency function is the identity
    sigma_max: float = 80.0  # the level at which sampling starts
    sigma_data: float = 0.5  # standard deviation of the data
    rho: float = 7.0  # how much finer the grid is at low noise

    def __post_init__(self):
        levels = (self.sigma_min, self.sigma_max, self.sigma_data, self.rho)
        if not all(math.isfinite(value) for value in levels) or not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"expected finite 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.sigma_data <= 0 or self.rho <= 0:
            raise ValueError(f"expected sigma_data > 0 and rho > 0, got {self.sigma_data} and {self.rho}")
        if self.num_scales < 2:
            raise ValueError(f"expected num_scales >= 2, got {self.num_scales}")

    @property
    def t_min(self) -> float:
        """Where a consistency function lands."""
        return self.sigma_min

    @property
    def t_max(self) -> float:
        """Where sampling starts."""
        return self.sigma_max

    def marginal(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) with x_t = alpha * x_0 + sigma * noise; [EDM] with s(t) = 1, sigma(t) = t."""
        return 1.0, t

    def grid(self) -> np.ndarray:
        """The N levels, descending, float64."""
        return karras_sigmas(self.num_scales, self.sigma_min, self.sigma_max, self.rho)

    def times_at(self, indices: Sequence[int]) -> tuple[float, ...]:
        """Noise levels at indices of the grid, the form in which the published lists are written (`0, 22, 39`).

        Index N-1 at the end names sigma_min, where the consistency function changes nothing: it is left out.

        Raises:
            UsageError: an index outside 0..N-1.
        """
        outside = [index for index in indices if not 0 <= index < self.num_scales]
        if outside:
            raise UsageError(f"grid index {outside[0]}", f"this model's grid has indices 0 to {self.num_scales - 1}")
        kept = indices[:-1] if len(indices) > 1 and indices[-1] == self.num_scales - 1 else indices
        levels = self.grid()
        return tuple(float(levels[index]) for index in kept)

    def spaced_times(self, steps: int) -> tuple[float, ...]:
        """`steps` levels at every (N // steps)-th index of the grid, beginning with sigma_max.

        The spacing of diffusers' `CMStochasticIterativeScheduler`.

        Raises:
            UsageError: steps below 1 or above N.
        """
        if not 1 <= steps <= self.num_scales:
            raise UsageError(f"steps {steps}", f"expected 1 to {self.num_scales}, the size of this model's grid")
        return self.times_at([index * (self.num_scales // steps) for index in range(steps)])

    def check_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """Validates noise levels given by a caller.

        Raises:
            UsageError: empty, not finite, not descending, or outside [sigma_min, sigma_max].
        """
        times = tuple(float(t) for t in times)
        if not times:
            raise UsageError("times", "the list is empty; give at least one noise level", f"--times {self.sigma_max:g}")
        bad = [t for t in times if not self.sigma_min <= t <= self.sigma_max]  # false for NaN too
        if bad:
            raise UsageError(
                f"times {bad[0]:g}", f"a noise level of this model lies in [{self.sigma_min:g}, {self.sigma_max:g}]"
            )
        if any(later >= earlier for earlier, later in itertools.pairwise(times)):
            raise UsageError(f"times {', '.join(f'{t:g}' for t in times)}", "noise levels must descend")
        return times
