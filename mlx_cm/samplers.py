"""Samplers: one loop, "jump to s, then re-noise to the next t".

A jump is a function g(x, t, s) -> x_s. A consistency function jumps to the clean end of the trajectory; an ODE solver's
step, a trajectory model and TCD jump part of the way. Where a jump lands is all that tells the samplers apart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_cm.parameterization import Denoiser, Network, discrete_marginal, per_image, predicted_x0_and_noise
from mlx_cm.rng import Noise
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule

Time = mx.array | float  # a level for all images, or one for each, shape (B,); samplers use numbers, losses arrays
Jump = Callable[[mx.array, Time, Time], mx.array]  # g(x, t, s) -> x_s
Constraint = Callable[[mx.array, float], mx.array]  # (x_t, t) -> x_t with its known part put in


@dataclass(frozen=True)
class Step:
    """What a callback is told after each step."""

    index: int  # from 0
    total: int
    t: float  # the level jumped from
    s: float  # the level jumped to
    x: mx.array  # the state at s, (B, H, W, C); an estimate of x0 for consistency samplers


Callback = Callable[[Step], None]


def renoise(x_s: mx.array, s: float, t: float, schedule, draw: Callable[[], mx.array]) -> mx.array:
    """Carries x_s forward to a noisier level t: x_t = a x_s + sqrt(sigma_t^2 - a^2 sigma_s^2) z, a = alpha_t / alpha_s.

    [CM] algorithm 1 (there alpha = 1), [TCD] equation 10. Nothing is drawn where no noise is to be added.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.marginal(s), schedule.marginal(t)
    ratio = alpha_t / alpha_s
    variance = sigma_t**2 - ratio**2 * sigma_s**2
    if variance <= 0:
        return ratio * x_s
    return ratio * x_s + math.sqrt(variance) * draw()


def sample_jumps(
    g: Jump,
    x: mx.array,
    times: Sequence[float],
    landings: Sequence[float],
    schedule,
    *,
    noise: Noise,
    callback: Callback | None = None,
    constrain: Constraint | None = None,
) -> mx.array:
    """Jumps from each time to its landing, re-noising to the next time in between.

    Each step is evaluated before the callback runs, so that a raised exception (Ctrl-C included) ends the work there.

    Args:
        g: the jump.
        x: the start at level times[0], shape (B, H, W, C).
        times: descending noise levels in the model's units.
        landings: as many levels; landings[i] <= times[i + 1].
        schedule: gives `marginal`.
        noise: source of the draws; index i + 1 is the draw after step i.
        callback: called with a `Step` after each jump.
        constrain: applied to the state at every time but the first, and at the end, where what is known is clean.

    Returns:
        The state after the last jump, shape (B, H, W, C).
    """
    for i, (t, s) in enumerate(zip(times, landings, strict=True)):
        x = g(x, t, s)
        mx.eval(x)
        if callback is not None:
            callback(Step(i, len(times), t, s, x))
        last = i + 1 == len(times)
        if not last:
            x = renoise(x, s, times[i + 1], schedule, lambda x=x, i=i: noise(x.shape, i + 1))
        if constrain is not None:
            x = constrain(x, min(s, schedule.t_min) if last else times[i + 1])
    return x


def sample_multistep(g: Jump, x: mx.array, times: Sequence[float], schedule, **options) -> mx.array:
    """Multistep consistency sampling: to the clean end, re-noise, again. With one time it is one-step generation.

    [CM] algorithm 1, [LCM] algorithm 3. Arguments, options and result as for `sample_jumps`.
    """
    return sample_jumps(g, x, times, [schedule.t_min] * len(times), schedule, **options)


def sample_trajectory(g: Jump, x: mx.array, times: Sequence[float], schedule, **options) -> mx.array:
    """Follows the trajectory: each jump lands on the next time, the last one on 0, and no noise is added.

    With `euler_jump` and `heun_jump` the deterministic samplers of [EDM]. With `trajectory_jump` DDIM, Song, Meng,
    Ermon, arXiv 2010.02502, which ends on timestep 0 and not below it, as Stable Diffusion's scheduler does.
    Arguments, options and result as for `sample_jumps`.
    """
    return sample_jumps(g, x, times, [*times[1:], 0], schedule, **options)


def sample_tcd(
    g: Jump, x: mx.array, times: Sequence[int], schedule: DiscreteSchedule, *, eta: float, **options
) -> mx.array:
    """Strategic stochastic sampling: each jump lands on s = floor((1 - eta) t_next), the last one on timestep 0.

    [TCD] algorithm 4, there gamma. eta = 0 follows the trajectory, eta = 1 jumps to its end each time.
    Other arguments, options and result as for `sample_jumps`.
    """
    landings = [math.floor((1 - eta) * t_next) for t_next in (*times[1:], 0)]
    return sample_jumps(g, x, times, landings, schedule, **options)


def sample_ctm(
    g: Jump, x: mx.array, times: Sequence[float], schedule: KarrasSchedule, *, eta: float, **options
) -> mx.array:
    """Gamma sampling: each jump lands between sigma_min and the next time, the last one on sigma_min.

    [CTM] algorithm 2, there gamma; s = sqrt(1 - eta^2) (t_next - sigma_min) + sigma_min is its released code's. eta = 0
    follows the trajectory, eta = 1 jumps to its end each time.
    Other arguments, options and result as for `sample_jumps`.
    """
    kept = math.sqrt(1 - eta**2)  # written so that eta = 0 lands on the next time to the last bit, and draws nothing
    landings = [kept * t_next + (1 - kept) * schedule.t_min for t_next in (*times[1:], schedule.t_min)]
    return sample_jumps(g, x, times, landings, schedule, **options)


def trajectory_jump(net: Network, schedule: DiscreteSchedule, **cond) -> Jump:
    """x_s = alpha_s x0 + sigma_s noise with both as the network predicts them at t.

    [TCD] equation 8; one step of DDIM.
    """

    def jump(x: mx.array, t: Time, s: Time) -> mx.array:
        x0, noise = predicted_x0_and_noise(net, schedule, x, t, **cond)
        alpha_s, sigma_s = discrete_marginal(schedule, s)
        return alpha_s * x0 + sigma_s * noise

    return jump


def consistency_jump(f: Denoiser, **cond) -> Jump:
    """A consistency function as a jump, which always lands on the clean end whatever s."""
    return lambda x, t, s: f(x, t, **cond)


def ode_slope(denoise: Denoiser, x: mx.array, t: Time, cond: dict) -> mx.array:
    """dx/dt = (x - D(x, t)) / t, the probability flow.

    [EDM] equation 3 with sigma(t) = t.
    """
    return (x - denoise(x, t, **cond)) / per_image(t)


def euler_jump(denoise: Denoiser, **cond) -> Jump:
    """One first-order step of the probability flow: x_s = x + (s - t) dx/dt."""
    return lambda x, t, s: x + per_image(s - t) * ode_slope(denoise, x, t, cond)


def heun_jump(denoise: Denoiser, **cond) -> Jump:
    """One second-order step of the probability flow: the slope is the mean of those at both ends.

    [EDM] algorithm 1; the step to 0 is Euler's, since the slope there is not defined.
    """

    def jump(x: mx.array, t: Time, s: Time) -> mx.array:
        slope, step = ode_slope(denoise, x, t, cond), per_image(s - t)
        x_s = x + step * slope
        if isinstance(s, mx.array):  # some may be 0: those images take t's slope twice, whatever is found at `defined`
            defined = mx.where(s == 0, t, s)
            slope_s = mx.where(per_image(s) == 0, slope, ode_slope(denoise, x_s, defined, cond))
        elif s == 0:
            return x_s
        else:
            slope_s = ode_slope(denoise, x_s, s, cond)
        return x + step * (slope + slope_s) / 2

    return jump
