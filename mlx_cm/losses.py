"""Training losses: the equations, over networks, noise and levels that the caller gives.

Nothing is drawn here and nothing remembered, so a loss is a function that another implementation can be held against.
`student`, `target` and `teacher` are callables of the contracts in `mlx_cm.parameterization`; no gradient passes
through target and teacher. Levels t > s have shape (B,), pictures or latents (B, H, W, C), conditions the batch first.

Every loss returns (loss, metrics): a float32 scalar, and scalars to look at.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_cm.metrics import Distance, l2
from mlx_cm.parameterization import (
    Denoiser,
    Network,
    discrete_marginal,
    latent_consistency_function,
    per_image,
    predicted_x0_and_noise,
)
from mlx_cm.samplers import Jump
from mlx_cm.schedules import DiscreteSchedule

Losses = tuple[mx.array, dict[str, mx.array]]
Solver = Callable[[mx.array, mx.array, mx.array], mx.array]  # (x_t, t, s) -> x_s, a step of the probability flow


def edm_loss(student: Denoiser, x0: mx.array, sigma: mx.array, noise: mx.array, *, sigma_data: float, **cond) -> Losses:
    """lambda(sigma) ||D(x0 + sigma n, sigma) - x0||^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    [EDM] equation 2, its weight from table 1: every level starts with a loss of about 1.

    Args:
        student: the denoiser D(x, sigma, **cond), not clipped.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised = student(x0 + per_image(sigma) * noise, sigma, **cond)
    loss = (weight * l2(denoised, x0)).mean()
    return loss, {}


# prediction_type => (x0, noise, alpha, sigma) => what the network is to give; the inverse of PREDICTIONS.
PREDICTION_TARGETS: dict[str, Callable[..., mx.array]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "sample": lambda x0, noise, alpha, sigma: x0,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
}


def diffusion_loss(
    student: Network, schedule: DiscreteSchedule, x0: mx.array, timestep: mx.array, noise: mx.array, **cond
) -> Losses:
    """||F(x_t, t) - y||^2 with y the noise, the velocity or the data, by the schedule's `prediction_type`.

    Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, arXiv 2006.11239, equation 14; [LDM] equation 2.

    Args:
        student: the network F(x, timestep, **cond).
        timestep: integers, shape (B,).
    """
    alpha, sigma = schedule.marginals(timestep)
    output = student(alpha * x0 + sigma * noise, timestep.astype(mx.float32), **cond)
    wanted = PREDICTION_TARGETS[schedule.prediction_type](x0, noise, alpha, sigma)
    return l2(output, wanted).mean(), {}


def forward_pair(x0: mx.array, noise: mx.array, t: mx.array, s: mx.array) -> tuple[mx.array, mx.array]:
    """(x0 + t n, x0 + s n): two points of one line, which stands for a trajectory where there is no teacher.

    [CM] algorithm 3, and its theorem 2 for why.
    """
    return x0 + per_image(t) * noise, x0 + per_image(s) * noise


def solved_pair(solver: Solver, x0: mx.array, noise: mx.array, t: mx.array, s: mx.array) -> tuple[mx.array, mx.array]:
    """(x_t, x_s) with x_t = x0 + t n, and x_s where a step of a teacher's probability flow leads from there.

    [CM] algorithm 2. Arguments of the solver as of `euler_jump` and `heun_jump`.
    """
    x_t = x0 + per_image(t) * noise
    return x_t, mx.stop_gradient(solver(x_t, t, s))


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    x_t: mx.array,
    x_s: mx.array,
    t: mx.array,
    s: mx.array,
    *,
    distance: Distance,
    weight: mx.array | float = 1.0,
    clean: mx.array | None = None,
    **cond,
) -> Losses:
    """lambda d(f(x_t, t), f-(x_s, s)): two points of one trajectory have one origin.

    [CM] equation 7 with `solved_pair` (distillation) and equation 10 with `forward_pair` (training); [iCT] and [ECT]
    are the latter with another distance, weight and choice of levels.

    Args:
        student, target: consistency functions f(x, t, **cond).
        weight: lambda, a number or shape (B,).
        clean: x0; where given and s is 0, the target is x0 itself, as [ECT] begins.
    """
    goal = mx.stop_gradient(target(x_s, s if clean is None else mx.where(s == 0, t, s), **cond))
    if clean is not None:
        goal = mx.where(per_image(s) == 0, clean, goal)
    distances = distance(student(x_t, t, **cond), goal)
    return (weight * distances).mean(), {"distance": distances.mean()}


def trajectory_loss(
    student: Jump,
    target: Jump,
    x_t: mx.array,
    x_u: mx.array,
    t: mx.array,
    u: mx.array,
    s: mx.array,
    *,
    distance: Distance,
    t_min: float,
    **cond,
) -> Losses:
    """d(G-(G(x_t, t, s), s, 0), G-(G-(x_u, u, s), s, 0)): two jumps to s from one trajectory, compared at its end.

    [CTM] section 3, the soft consistency matching. The gradient of the student's jump passes through the frozen jump
    to the end. Both frozen jumps are the target's, as in the paper; the released code makes the one from u to s with
    the student's weights.

    Args:
        student, target: trajectory functions G(x, t, s, **cond).
        x_u: a point of x_t's trajectory at u, s <= u < t: `solved_pair` or `forward_pair`.
        t_min: the end of the trajectory.
    """
    end = mx.full(s.shape, t_min)
    goal = mx.stop_gradient(target(target(x_u, u, s, **cond), s, end, **cond))
    loss = distance(target(student(x_t, t, s, **cond), s, end, **cond), goal).mean()
    return loss, {"distance": loss}


def teacher_step(
    teacher: Network,
    schedule: DiscreteSchedule,
    x_t: mx.array,
    t: mx.array,
    s: mx.array,
    w: mx.array,
    cond: dict[str, Any],
    uncond: dict[str, Any],
) -> mx.array:
    """One DDIM step from t to s with guidance: x_s = alpha_s x0 + sigma_s eps, each cond + w (cond - uncond).

    [LCM] section 4.2 and its released training code, which guides x0 and eps apart; w = guidance_scale - 1.

    Args:
        t, s: timesteps, integers of shape (B,).
        w: shape (B,).
        cond, uncond: conditions of the network with the prompt and with the empty one.
    """
    strength = per_image(w)
    with_prompt = predicted_x0_and_noise(teacher, schedule, x_t, t, **cond)
    without = predicted_x0_and_noise(teacher, schedule, x_t, t, **uncond)
    x0, noise = (one + strength * (one - other) for one, other in zip(with_prompt, without, strict=True))
    alpha, sigma = discrete_marginal(schedule, s)
    return mx.stop_gradient(alpha * x0 + sigma * noise)


def latent_consistency_loss(
    student: Network,
    target: Network,
    schedule: DiscreteSchedule,
    x_t: mx.array,
    x_s: mx.array,
    t: mx.array,
    s: mx.array,
    *,
    distance: Distance,
    cond: dict[str, Any],
    target_cond: dict[str, Any] | None = None,
) -> Losses:
    """d(f(x_t, w, c, t), f-(x_s, w, c, s)) of latents.

    [LCM] section 4.3 with x_s from `teacher_step` (distillation); with x_s the same latents and noise at s it is latent
    consistency fine-tuning, section 4.4, which needs no teacher.

    Args:
        student, target: networks F(x, timestep, **cond).
        cond: the student's conditions, the guidance embedding among them where it has one.
        target_cond: the target's; None: the same.
    """
    f = latent_consistency_function(student, schedule)
    f_target = latent_consistency_function(target, schedule)
    goal = mx.stop_gradient(f_target(x_s, s, **(cond if target_cond is None else target_cond)))
    loss = distance(f(x_t, t, **cond), goal).mean()
    return loss, {"distance": loss}


def autoencoder_loss(
    reconstruct: Callable[[mx.array], mx.array],
    moments: tuple[mx.array, mx.array],
    x0: mx.array,
    noise: mx.array,
    *,
    distance: Distance,
    kl_weight: float,
) -> Losses:
    """d(decode(z), x0) + kl_weight KL(q(z | x0) || N(0, 1)) for a draw z of the posterior.

    Kingma, Welling: Auto-Encoding Variational Bayes, arXiv 1312.6114, equation 10; [LDM] appendix G for the small
    weight. The divergence is the mean over the latents' values, where the released code of [LDM] adds up both terms:
    its weight times the latents' values per value of a picture is ours.

    Args:
        reconstruct: raw latents => pictures.
        moments: mean and log variance of the posterior, (B, h, w, c).
        noise: standard normal, of the latents' shape.
    """
    mean, logvar = moments
    difference = distance(reconstruct(mean + mx.exp(0.5 * logvar) * noise), x0).mean()
    divergence = 0.5 * (mx.square(mean) + mx.exp(logvar) - 1 - logvar).mean()
    return difference + kl_weight * divergence, {"distance": difference, "kl": divergence}
