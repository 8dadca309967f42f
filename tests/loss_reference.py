"""Training losses in torch, derived anew from the papers and their released codes; pictures are (B, C, H, W).

Written for one picture at a time where ours works on a batch of levels: so that what is special about one of them (it
is at the end of its walk, at the first timestep, paired with the data) is a plain `if` here.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

Function = Callable[..., Tensor]  # f(x, t) or g(x, t, s) of a batch, levels of shape (B,)


def trainable(net: nn.Module) -> nn.Module:
    """A copy of a shared network that collects gradients."""
    return copy.deepcopy(net).requires_grad_(True)


def wide(t: Tensor) -> Tensor:
    """(B,) => (B, 1, 1, 1)."""
    return t[:, None, None, None]


def one_by_one(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """A function of single pictures, each kept as a batch of one, applied to every row."""
    rows = [function(*(argument[i : i + 1] for argument in arguments)) for i in range(len(arguments[0]))]
    return torch.cat(rows)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of the variance-exploding process."""
    return x0 + noise * wide(t)


# --- pixels


def conditioning(sigma: Tensor) -> Tensor:
    """openai/consistency_models `denoise`: 1000 * 0.25 * ln(sigma)."""
    return 1000 * 0.25 * torch.log(sigma + 1e-44)


def denoiser(net: nn.Module, labels: Tensor | None = None, sigma_data: float = 0.5) -> Function:
    """Karras et al. 2022, table 1: D(x; sigma) of a network F."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        variance = wide(sigma) ** 2 + sigma_data**2
        output = net(x / variance.sqrt(), conditioning(sigma), labels).sample
        return x * sigma_data**2 / variance + output * wide(sigma) * sigma_data / variance.sqrt()

    return denoise


def consistency_function(
    net: nn.Module, labels: Tensor | None = None, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> Function:
    """Song et al. 2023, appendix C: f(x, t), the identity at sigma_min."""

    def f(x: Tensor, t: Tensor) -> Tensor:
        root = (wide(t) ** 2 + sigma_data**2).sqrt()
        above = wide(t) - sigma_min
        output = net(x / root, conditioning(t), labels).sample
        return x * sigma_data**2 / (above**2 + sigma_data**2) + output * above * sigma_data / root

    return f


def inner_trajectory(net: nn.Module, labels: Tensor | None = None, sigma_data: float = 0.5) -> Function:
    """Kim et al. 2024, section 3.1: g(x, t, s), which sony/ctm calls "edm" inside."""

    def g(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        variance = wide(t) ** 2 + sigma_data**2
        output = net.forward_to(x / variance.sqrt(), conditioning(t), conditioning(s), labels)
        return x * sigma_data**2 / variance + output * wide(t) * sigma_data / variance.sqrt()

    return g


def trajectory_function(net: nn.Module, labels: Tensor | None = None, sigma_data: float = 0.5) -> Function:
    """Kim et al. 2024, section 3.1: G(x, t, s), which sony/ctm calls "euler" outside."""
    g = inner_trajectory(net, labels, sigma_data)
    return lambda x, t, s: wide(s / t) * x + (1 - wide(s / t)) * g(x, t, s)


@torch.no_grad()
def euler_step(denoise: Function, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Along dx/dt = (x - D(x; t)) / t, first order."""
    return x + wide(s - t) * (x - denoise(x, t)) / wide(t)


@torch.no_grad()
def heun_step(denoise: Function, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Second order: the mean of the slopes at both ends."""
    slope = (x - denoise(x, t)) / wide(t)
    end = x + wide(s - t) * slope
    slope_there = (end - denoise(end, s)) / wide(s)
    return x + wide(s - t) * (slope + slope_there) / 2


STEPS = {"euler": euler_step, "heun": heun_step}


@torch.no_grad()
def walk(denoise: Function, x: Tensor, levels: Sequence[float], step: Callable[..., Tensor]) -> Tensor:
    """One picture through the levels, step by step."""
    for t, s in itertools.pairwise(levels):
        x = step(denoise, x, torch.tensor([t]), torch.tensor([s]))
    return x


def edm_loss(denoise: Function, x0: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float = 0.5) -> Tensor:
    """NVlabs/edm `EDMLoss`, as a mean."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (wide(weight) * (denoise(add_noise(x0, noise, sigma), sigma) - x0) ** 2).mean()


def consistency_loss(
    f: Function, f_target: Function, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, distance: Function, weight: Tensor
) -> Tensor:
    """openai/consistency_models `consistency_losses`."""
    with torch.no_grad():
        goal = f_target(x_s, s)
    return (distance(f(x_t, t), goal) * weight).mean()


def easy_consistency_loss(
    f: Function, f_target: Function, x0: Tensor, noise: Tensor, t: Tensor, s: Tensor, c: float
) -> Tensor:
    """locuslab/ect `ECMLoss`: a pair's target is the data where its lower level is 0."""

    @torch.no_grad()
    def goal_of(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        return x0 if s.item() == 0 else f_target(add_noise(x0, noise, s), s)

    difference = f(add_noise(x0, noise, t), t) - one_by_one(goal_of, x0, noise, s)
    distance = (difference.pow(2).flatten(1).sum(1) + c**2).sqrt() - c
    return (distance / (t - s)).mean()


def trajectory_loss(
    jump: Function, jump_target: Function, x_t: Tensor, x_u: Tensor, t: Tensor, u: Tensor, s: Tensor,
    distance: Function, sigma_min: float = 0.002,
) -> Tensor:  # fmt: skip
    """Kim et al. 2024, section 3: matched at s, compared at the end. `jump_target` collects no gradients."""
    end = torch.full_like(s, sigma_min)
    with torch.no_grad():
        goal = jump_target(jump_target(x_u, u, s), s, end)
    return distance(jump_target(jump(x_t, t, s), s, end), goal).mean()


# --- distances


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).flatten(1).mean(1)


def mean_absolute(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """Song, Dhariwal 2023, section 3.3, with their c."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).pow(2).flatten(1).sum(1) + c**2).sqrt() - c


def value_huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """`--loss_type huber` of diffusers' scripts."""
    return (((a - b) ** 2 + c**2).sqrt() - c).flatten(1).mean(1)


# --- latents


class Latents:
    """diffusers' `train_lcm_distill_{sd,sdxl}_wds.py`, with the noise levels of diffusers' scheduler."""

    def __init__(self, steps: int = 50, **settings):
        self.scheduler = DDPMScheduler(
            **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **settings}
        )
        self.alphas_cumprod = self.scheduler.alphas_cumprod
        self.skip = self.scheduler.config.num_train_timesteps // steps
        self.timesteps = [self.skip * (k + 1) - 1 for k in range(steps)]  # of the DDIM solver, ascending

    def start_and_end(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The timesteps of a solver's step: down to 0 from the first one."""
        start = torch.tensor(self.timesteps)[index]
        return start, torch.clamp(start - self.skip, min=0)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(x0, noise, t)

    def x0_and_noise(self, net: nn.Module, x: Tensor, t: Tensor, **cond) -> tuple[Tensor, Tensor]:
        """Both by what the network predicts."""
        output = predict(net, x, t, **cond)
        alpha, sigma = wide(self.alphas_cumprod[t].sqrt()), wide((1 - self.alphas_cumprod[t]).sqrt())
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (x - sigma * output) / alpha, output
        if kind == "v_prediction":
            return alpha * x - sigma * output, alpha * output + sigma * x
        return output, (x - alpha * output) / sigma

    def consistency(self, net: nn.Module, x: Tensor, t: Tensor, **cond) -> Tensor:
        """f(x, t) with the boundary scalings of the released code: sigma_data 0.5, timesteps times 10."""
        scaled = wide(10.0 * t.float())
        x0, _ = self.x0_and_noise(net, x, t, **cond)
        return x * 0.25 / (scaled**2 + 0.25) + x0 * scaled / (scaled**2 + 0.25).sqrt()

    @torch.no_grad()
    def solver_step(self, teacher: nn.Module, x: Tensor, index: Tensor, w: Tensor, cond: dict, uncond: dict) -> Tensor:
        """DDIM's step from a solver's timestep to the one below, or from the first one to timestep 0, guided."""
        start, _ = self.start_and_end(index)
        x0, noise = self.x0_and_noise(teacher, x, start, **cond)
        x0_without, noise_without = self.x0_and_noise(teacher, x, start, **uncond)
        x0, noise = x0 + wide(w) * (x0 - x0_without), noise + wide(w) * (noise - noise_without)
        landed = [self.alphas_cumprod[self.timesteps[i - 1] if i > 0 else 0] for i in index.tolist()]
        product = wide(torch.stack(landed))
        return product.sqrt() * x0 + (1 - product).sqrt() * noise

    def distillation_loss(
        self, student: nn.Module, target: nn.Module, x_t: Tensor, x_s: Tensor, index: Tensor, distance: Function,
        **cond,
    ) -> Tensor:  # fmt: skip
        start, end = self.start_and_end(index)
        with torch.no_grad():
            goal = self.consistency(target, x_s, end, **cond)
        return distance(self.consistency(student, x_t, start, **cond), goal).mean()


def predict(net: nn.Module, x: Tensor, t: Tensor, states: Tensor, w: Tensor | None = None, added: dict | None = None):
    """A call of diffusers' U-Net; w as an embedding where it is given."""
    embedding = None if w is None else guidance_embedding(w, net.config.time_cond_proj_dim)
    return net(x, t, encoder_hidden_states=states, timestep_cond=embedding, added_cond_kwargs=added).sample


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 w, from frequency 1 to 1/10000, sines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float32))
    angles = 1000 * w[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def diffusion_loss(latents: Latents, net: nn.Module, x0: Tensor, t: Tensor, noise: Tensor, states: Tensor) -> Tensor:
    """diffusers' `train_text_to_image.py`: mean square error to what the network is to predict."""
    kind = latents.scheduler.config.prediction_type
    wanted = {"epsilon": noise, "sample": x0, "v_prediction": latents.scheduler.get_velocity(x0, noise, t)}[kind]
    return ((predict(net, latents.noisy(x0, noise, t), t, states) - wanted) ** 2).mean()


# --- autoencoders


def autoencoder_loss(vae: nn.Module, x0: Tensor, noise: Tensor, kl_weight: float, distance: Function) -> Tensor:
    """Reconstruction of a draw, and diffusers' divergence of its posterior per latent value."""
    posterior = vae.encode(x0).latent_dist
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    return distance(reconstruction, x0).mean() + kl_weight * (posterior.kl() / noise[0].numel()).mean()
