"""From a network to a denoiser or a consistency function: scalings and conditioning on the noise level.

All of it is computed in float32 whatever the weights' type, since it decides the picture.
"""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule

Network = Callable[..., mx.array]  # net(x, t, **cond) -> F; x, F (B, H, W, C), t (B,)
Denoiser = Callable[..., mx.array]  # f(x, t, **cond) -> x0; t a noise level, a number or shape (B,)
Trajectory = Callable[..., mx.array]  # g(x, t, s, **cond), where s is another level, likewise
Scalings = tuple[mx.array, mx.array, mx.array]

LOWEST_LOG_SIGMA = math.log(7 * 2**-149)  # of 1e-44 as float32 has it; GPUs take so small a number for 0


def per_image(t: mx.array | float) -> mx.array | float:
    """A level per image in the form that multiplies images: (B,) => (B, 1, 1, 1), float32. A number stays a number."""
    return t.astype(mx.float32).reshape(-1, 1, 1, 1) if isinstance(t, mx.array) else t


def edm_scalings(t: mx.array, sigma_data: float) -> Scalings:
    """Preconditioning of a denoiser D(x, t).

    [EDM] table 1. c_skip(0) = 1 and c_out(0) = 0: the boundary condition of [CM] with sigma_min = 0.

    Args:
        t: noise levels in data units, shape (B,).

    Returns:
        (c_skip, c_out, c_in), each of shape (B, 1, 1, 1), float32.
    """
    t = per_image(t)
    total = t**2 + sigma_data**2
    return sigma_data**2 / total, t * sigma_data * mx.rsqrt(total), mx.rsqrt(total)


def cm_scalings(t: mx.array, sigma_data: float, sigma_min: float) -> Scalings:
    """Scalings that make the boundary condition f(x, sigma_min) = x hold exactly.

    [CM] appendix C. At t = sigma_min: c_skip = 1, c_out = 0. c_in is [EDM]'s.

    Args:
        t: noise levels in data units, shape (B,), each >= sigma_min.

    Returns:
        (c_skip, c_out, c_in), each of shape (B, 1, 1, 1), float32.
    """
    t = per_image(t)
    above = t - sigma_min
    c_in = mx.rsqrt(t**2 + sigma_data**2)
    return sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data * c_in, c_in


def log_sigma_conditioning(t: mx.array, scale: float) -> mx.array:
    """c_noise = scale * ln(sigma), float32, shape (B,).

    scale 250 for OpenAI's consistency models ([CM]: 1000 times [EDM]'s), 0.25 for [EDM] and the CIFAR-10 models.
    A level of 0, to which a trajectory model may jump, counts as 1e-44: what the released codes add to sigma.
    """
    return scale * mx.maximum(mx.log(t.astype(mx.float32)), LOWEST_LOG_SIGMA)


def lcm_scalings(
    timestep: mx.array | float, sigma_data: float, timestep_scaling: float
) -> tuple[mx.array, mx.array] | tuple[float, float]:
    """Scalings of a latent consistency function, (c_skip, c_out); near the identity at timestep 0.

    [LCM] section 4.1 and its released code. Unlike `cm_scalings`, c_out has no factor sigma_data: the network's x0
    enters whole.

    Args:
        timestep: one, or shape (B,); 0 or more.

    Returns:
        Numbers for one timestep; else arrays of shape (B, 1, 1, 1), float32.
    """
    scaled = timestep_scaling * per_image(timestep)
    total = scaled**2 + sigma_data**2
    root = mx.sqrt(total) if isinstance(total, mx.array) else math.sqrt(total)
    return sigma_data**2 / total, scaled / root


# prediction_type => (x_t, network output, alpha, sigma) => (x0, noise)
Level = mx.array | float  # a number for all images, or shape (B, 1, 1, 1)
PREDICTIONS: dict[str, Callable[[mx.array, mx.array, Level, Level], tuple[mx.array, mx.array]]] = {
    # x_t = alpha x0 + sigma noise, solved for what the network does not give.
    "epsilon": lambda x, output, alpha, sigma: ((x - sigma * output) / alpha, output),
    "sample": lambda x, output, alpha, sigma: (output, (x - alpha * output) / sigma),
    # v = alpha noise - sigma x0: Salimans, Ho, Progressive Distillation, arXiv 2202.00512, appendix D.
    "v_prediction": lambda x, output, alpha, sigma: (alpha * x - sigma * output, alpha * output + sigma * x),
}


def discrete_marginal(schedule: DiscreteSchedule, timestep: mx.array | int) -> tuple[Level, Level]:
    """(alpha, sigma) of one timestep as numbers, or of shape (B,) as arrays of shape (B, 1, 1, 1)."""
    return schedule.marginals(timestep) if isinstance(timestep, mx.array) else schedule.marginal(timestep)


def predicted_x0_and_noise(
    net: Network, schedule: DiscreteSchedule, x: mx.array, timestep: mx.array | int, **cond
) -> tuple[mx.array, mx.array]:
    """What one network call says of the clean latents and the noise in x_t, both float32, shape (B, H, W, C).

    Args:
        timestep: one for all images, or integers of shape (B,).
    """
    x = x.astype(mx.float32)
    t = mx.array(timestep, dtype=mx.float32).reshape(-1)
    output = net(x, t, **cond).astype(mx.float32)
    return PREDICTIONS[schedule.prediction_type](x, output, *discrete_marginal(schedule, timestep))


def latent_consistency_function(net: Network, schedule: DiscreteSchedule, *, sigma_data: float = 0.5) -> Denoiser:
    """f(x, t) = c_skip(t) x + c_out(t) x0(x, t).

    [LCM] equation 9. The published models have sigma_data = 0.5 whatever the scale of their latents.

    Returns:
        f(x, timestep, **cond) -> x0 in float32, shape (B, H, W, C); timestep a number, or integers of shape (B,).
    """

    def f(x: mx.array, timestep: mx.array | int, **cond) -> mx.array:
        x0, _ = predicted_x0_and_noise(net, schedule, x, timestep, **cond)
        c_skip, c_out = lcm_scalings(timestep, sigma_data, schedule.timestep_scaling)
        return c_skip * x.astype(mx.float32) + c_out * x0

    return f


def consistency_function(
    net: Network, schedule: KarrasSchedule, *, noise_scale: float = 250.0, clip: bool = True
) -> Denoiser:
    """f(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t)), with f(x, sigma_min) = x.

    [CM] equation 5.

    Args:
        net: the network F.
        schedule: gives sigma_data and sigma_min.
        noise_scale: of `log_sigma_conditioning`.
        clip: clip x0 to [-1, 1], as the published pixel models are sampled.

    Returns:
        f(x, t, **cond) -> x0 in float32, shape (B, H, W, C).
    """
    return _preconditioned(net, lambda t: cm_scalings(t, schedule.sigma_data, schedule.sigma_min), noise_scale, clip)


def edm_denoiser(net: Network, schedule: KarrasSchedule, *, noise_scale: float = 250.0, clip: bool = True) -> Denoiser:
    """D(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t)), the posterior mean E[x0 | x_t] of a diffusion teacher.

    [EDM] equation 7. Arguments and result as for `consistency_function`.
    """
    return _preconditioned(net, lambda t: edm_scalings(t, schedule.sigma_data), noise_scale, clip)


def trajectory_denoiser(net: Network, schedule: KarrasSchedule, *, noise_scale: float = 250.0) -> Trajectory:
    """g(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t), c_noise(s)), the scalings [EDM]'s.

    [CTM] section 3.1: what a straight line from x at t through x_s meets at level 0. g(x, t, t) is the denoiser
    E[x0 | x_t], g(x, t, 0) the end of the trajectory.

    Args:
        net: the network F, which takes s by name.
        schedule: gives sigma_data.
        noise_scale: of `log_sigma_conditioning`.

    Returns:
        g(x, t, s, **cond) in float32, shape (B, H, W, C); t and s numbers or of shape (B,).
    """
    denoise = edm_denoiser(net, schedule, noise_scale=noise_scale, clip=False)

    def g(x: mx.array, t: mx.array | float, s: mx.array | float, **cond) -> mx.array:
        return denoise(x, t, s=log_sigma_conditioning(_for_each(s, x), noise_scale), **cond)

    return g


def trajectory_function(net: Network, schedule: KarrasSchedule, *, noise_scale: float = 250.0) -> Trajectory:
    """G(x, t, s) = (s/t) x + (1 - s/t) g(x, t, s), a jump along the probability flow from t to s; G(x, t, t) = x.

    [CTM] section 3.1. Of the released code's settings those of the published models: `edm` inside, `euler` outside.

    Args:
        net, schedule, noise_scale: see `trajectory_denoiser`.

    Returns:
        G(x, t, s, **cond) -> x_s in float32, shape (B, H, W, C); t > 0 and s numbers or of shape (B,).
    """
    g = trajectory_denoiser(net, schedule, noise_scale=noise_scale)

    def jump(x: mx.array, t: mx.array | float, s: mx.array | float, **cond) -> mx.array:
        left = per_image(s / t)
        return left * x.astype(mx.float32) + (1 - left) * g(x, t, s, **cond)

    return jump


def _for_each(t: mx.array | float, x: mx.array) -> mx.array:
    """A level for every image of x, float32, shape (B,)."""
    return mx.broadcast_to(mx.array(t, dtype=mx.float32), (x.shape[0],))


def _preconditioned(net: Network, scalings: Callable[[mx.array], Scalings], noise_scale: float, clip: bool) -> Denoiser:
    def denoise(x: mx.array, t: mx.array | float, **cond) -> mx.array:
        x = x.astype(mx.float32)
        t = _for_each(t, x)
        c_skip, c_out, c_in = scalings(t)
        output = net(c_in * x, log_sigma_conditioning(t, noise_scale), **cond)
        x0 = c_skip * x + c_out * output.astype(mx.float32)
        return mx.clip(x0, -1.0, 1.0) if clip else x0

    return denoise
