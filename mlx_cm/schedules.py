"""Noise schedules: which noise levels exist, and how much signal and noise each one means."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
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
    levels = (high + ramp * (low - high)) ** rho
    # Roots and powers round; a level beyond the schedule's range would be refused when a recipe names it.
    levels[-1], levels[0] = sigma_min, sigma_max
    return levels


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


CLEAN = -1  # the level below timestep 0 of a discrete schedule: no noise at all

# Noise added per timestep, by its published name; Stable Diffusion's is linear in the square root.
BETA_SCHEDULES: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": lambda start, end, count: np.linspace(start, end, count),
    "scaled_linear": lambda start, end, count: np.linspace(start**0.5, end**0.5, count) ** 2,
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(alphas_cumprod) so that the last timestep holds no signal.

    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891, algorithm 1.
    """
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@dataclass(frozen=True)
class DiscreteSchedule:
    """Variance-preserving schedule with integer timesteps: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    a_t is `alphas_cumprod[t]`, the running product of 1 - beta. [LCM] section 3; field names are diffusers'.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"  # what the network gives: noise, velocity or data
    original_inference_steps: int = 50  # solver steps of the distillation; a consistency model knows these timesteps
    timestep_scaling: float = 10.0  # of the boundary condition, `lcm_scalings`

    def __post_init__(self):
        for name, known in (("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTION_TYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not supported, expected one of {list(known)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"expected 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}")
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"original_inference_steps {self.original_inference_steps}: expected 1 to {self.num_train_timesteps}"
            )
        if not math.isfinite(self.timestep_scaling) or self.timestep_scaling <= 0:
            raise ValueError(f"expected timestep_scaling > 0, got {self.timestep_scaling}")

    @property
    def t_min(self) -> int:
        """Where a consistency function lands."""
        return CLEAN

    @property
    def t_max(self) -> int:
        """Where sampling starts."""
        return self.num_train_timesteps - 1

    @property
    def solver_spacing(self) -> int:
        """k of the timesteps k - 1, 2k - 1, ... of the distillation, `original_inference_steps` of them."""
        return self.num_train_timesteps // self.original_inference_steps

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """a_0 > a_1 > ..., float64, shape (num_train_timesteps,)."""
        betas = BETA_SCHEDULES[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps)
        products = np.cumprod(1 - betas)
        return zero_terminal_snr(products) if self.rescale_betas_zero_snr else products

    def marginal(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) with x_t = alpha * x_0 + sigma * noise; (1, 0) at CLEAN."""
        product = 1.0 if t == CLEAN else float(self.alphas_cumprod[t])
        return math.sqrt(product), math.sqrt(1 - product)

    @cached_property
    def _marginal_table(self) -> mx.array:
        """`marginal` of CLEAN and of every timestep, float32, shape (num_train_timesteps + 1, 2)."""
        levels = range(CLEAN, self.num_train_timesteps)
        return mx.array(np.array([self.marginal(t) for t in levels], dtype=np.float32))

    def marginals(self, timesteps: mx.array) -> tuple[mx.array, mx.array]:
        """`marginal` of a timestep per image, rounded to float32 at the very end.

        Args:
            timesteps: integers, each CLEAN or 0 ... T-1, shape (B,).

        Returns:
            (alpha, sigma), each of shape (B, 1, 1, 1), float32.
        """
        alpha, sigma = mx.split(self._marginal_table[timesteps.reshape(-1, 1, 1) - CLEAN], 2, axis=-1)
        return alpha, sigma

    def lcm_timesteps(
        self, steps: int, *, strength: float = 1.0, original_inference_steps: int | None = None
    ) -> tuple[int, ...]:
        """`steps` timesteps at even distance among those of the distillation, descending.

        [LCM] section 4.3, in the form of diffusers' `LCMScheduler`: of the timesteps k - 1, 2k - 1, ... with
        k = T // original_inference_steps the first `strength` part is kept.

        Args:
            strength: how much of the trajectory is walked, (0, 1]; below 1 for a start from a picture.

        Raises:
            UsageError: more steps than timesteps are left, or a setting out of range.
        """
        original = self.original_inference_steps if original_inference_steps is None else original_inference_steps
        if not 1 <= original <= self.num_train_timesteps:
            raise UsageError(f"original steps {original}", f"expected 1 to {self.num_train_timesteps}")
        if not 0 < strength <= 1:  # false for NaN too
            raise UsageError(f"strength {strength}", "expected above 0, at most 1")
        available = int(original * strength)
        if not 1 <= steps <= available:
            raise UsageError(
                f"steps {steps}",
                f"expected 1 to {available}: the model was distilled with {original} steps, of which strength "
                f"{strength:g} leaves {available}",
            )
        distilled = np.arange(available, 0, -1) * (self.num_train_timesteps // original) - 1
        chosen = np.floor(np.linspace(0, available, steps, endpoint=False)).astype(int)
        return tuple(int(timestep) for timestep in distilled[chosen])

    def ddim_timesteps(self, steps: int, *, strength: float = 1.0) -> tuple[int, ...]:
        """`steps` timesteps at even distance from 1 up, descending, of which the last `strength` part is kept.

        The "leading" spacing of diffusers' `DDIMScheduler` with steps_offset 1, Stable Diffusion's; with strength as
        its image-to-image pipelines cut it.

        Args:
            strength: how much of the way is walked, (0, 1]; below 1 for a start from a picture.

        Raises:
            UsageError: a setting out of range, or a strength that leaves no step.
        """
        limit = self.num_train_timesteps - 1
        if not 2 <= steps <= limit:  # one step alone would start at timestep 1
            raise UsageError(f"steps {steps}", f"expected 2 to {limit}")
        kept = int(steps * strength)
        if not 1 <= kept <= steps:
            raise UsageError(f"strength {strength:g}", f"leaves none of {steps} steps")
        stride = self.num_train_timesteps // steps
        return tuple(stride * index + 1 for index in reversed(range(kept)))

    def check_times(self, times: Sequence[float]) -> tuple[int, ...]:
        """Validates timesteps given by a caller.

        Raises:
            UsageError: empty, no integers, not descending, or outside 0 ... T-1.
        """
        if not len(times):
            raise UsageError("times", "the list is empty; give at least one timestep", f"--times {self.t_max}")
        for t in times:
            if not math.isfinite(t) or t != int(t):
                raise UsageError(f"times {t}", "a timestep of this model is a whole number")
            if not 0 <= t <= self.t_max:
                raise UsageError(f"times {t:g}", f"a timestep of this model lies in 0 to {self.t_max}")
        if any(later >= earlier for earlier, later in itertools.pairwise(times)):
            raise UsageError(f"times {', '.join(f'{t:g}' for t in times)}", "timesteps must descend")
        return tuple(int(t) for t in times)
