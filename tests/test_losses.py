"""Every training loss against torch: its value and the gradient of every parameter, with the same noise and levels."""

import dataclasses
from collections.abc import Callable

import loss_reference as reference
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from lpips_reference import LPIPSReference, openai_lpips
from mlx.utils import tree_map
from parity import TOLERANCE, channels_last, relative_error
from tiny_latent import autoencoder as latent_autoencoder
from tiny_latent import native_autoencoder, unet
from tiny_models import CONDITIONAL, UNCONDITIONAL, make_unet, native_unet
from trajectory_reference import make_trajectory_unet, native_trajectory_unet

from mlx_cm.guidance import guidance_embedding
from mlx_cm.losses import (
    PREDICTION_TARGETS,
    autoencoder_loss,
    consistency_loss,
    diffusion_loss,
    edm_loss,
    forward_pair,
    latent_consistency_loss,
    solved_pair,
    teacher_step,
    trajectory_loss,
)
from mlx_cm.metrics import l1, l2, lpips_distance, mean_pseudo_huber, pseudo_huber
from mlx_cm.models.lpips import LPIPS, LPIPSConfig
from mlx_cm.parameterization import consistency_function, edm_denoiser, trajectory_denoiser, trajectory_function
from mlx_cm.samplers import euler_jump, heun_jump
from mlx_cm.schedules import PREDICTION_TYPES, DiscreteSchedule, KarrasSchedule
from mlx_cm.training.curriculum import easy_consistency_level, grid
from mlx_cm.training.weights import Weighted, master_parameters

SCHEDULE = KarrasSchedule()
ROWS, HEIGHT, WIDTH = 3, 6, 10
# A gradient that is nothing but rounding (a key's bias does not change a softmax) is compared with this part of all.
NEGLIGIBLE = 1e-3


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and noise."""
    shape = (ROWS, 3, HEIGHT, WIDTH)
    return draw(*shape, seed=seed, scale=0.5).clamp(-1, 1), draw(*shape, seed=seed + 1)


def ours(tensor: torch.Tensor) -> mx.array:
    return channels_last(tensor)


def gradients(loss: Callable, student: nn.Module, target: nn.Module | None = None) -> tuple[mx.array, dict]:
    """Value and gradients as training takes them: one module, called with weights of student and target.

    Args:
        loss: of two sets of weights.
        target: None: the student is its own target.
    """
    modules = {"unet": student}
    frozen = None if target is None else master_parameters({"unet": target})

    def of(parameters):
        held = tree_map(mx.stop_gradient, parameters) if frozen is None else frozen
        return loss(Weighted(modules, parameters), Weighted(modules, held))[0]

    value, found = mx.value_and_grad(of)(master_parameters(modules))
    return value, found["unet"]


def assert_same(found: tuple[mx.array, dict], loss: torch.Tensor, net: torch.nn.Module) -> None:
    """The loss, the norm of all gradients, and the gradient of each parameter."""
    value, computed = found
    loss.backward()
    expected = {name: channels_last(parameter.grad) for name, parameter in net.named_parameters()}
    assert value.dtype == mx.float32
    assert value.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    assert set(computed) == set(expected)
    norms = {name: float(mx.linalg.norm(gradient.reshape(-1))) for name, gradient in expected.items()}
    total = float(np.linalg.norm(list(norms.values())))
    assert total > 0
    joined = np.linalg.norm([float(mx.linalg.norm(gradient.reshape(-1))) for gradient in computed.values()])
    assert joined == pytest.approx(total, rel=TOLERANCE)
    for name, gradient in computed.items():
        difference = float(mx.linalg.norm((gradient - expected[name]).reshape(-1)))
        assert difference < TOLERANCE * max(norms[name], NEGLIGIBLE * total), name


@dataclasses.dataclass(frozen=True)
class Nets:
    """Student, target and teacher of one layout, ours and diffusers', each with weights of its own."""

    conditional: bool

    @property
    def config(self) -> dict:
        return CONDITIONAL if self.conditional else UNCONDITIONAL

    def net(self, seed: int) -> torch.nn.Module:
        return make_unet(self.config, seed)

    @property
    def labels(self) -> torch.Tensor | None:
        return torch.tensor([7, 0, 2]) if self.conditional else None

    @property
    def cond(self) -> dict[str, mx.array]:
        return {"class_labels": mx.array(self.labels.numpy())} if self.conditional else {}


LAYOUTS = {"class-conditional": Nets(conditional=True), "unconditional": Nets(conditional=False)}
layouts = pytest.mark.parametrize("nets", LAYOUTS.values(), ids=LAYOUTS)


def pair_of_levels(num_scales: int = 18, indices: tuple[int, ...] = (0, 7, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours of a grid: the first, one in the middle, and the last."""
    levels = torch.tensor(grid(SCHEDULE, num_scales), dtype=torch.float32)
    index = torch.tensor(indices)
    return levels[index], levels[index + 1]


# --- denoisers


@layouts
@pytest.mark.parametrize("sigma_data", [0.5, 0.31])
def test_edm_loss(nets, sigma_data):
    student, (x0, noise) = reference.trainable(nets.net(1)), pictures()
    sigma = torch.tensor([0.004, 0.9, 31.0])
    schedule = dataclasses.replace(SCHEDULE, sigma_data=sigma_data)

    def loss(weights, _):
        denoise = edm_denoiser(weights.unet, schedule, clip=False)
        return edm_loss(denoise, ours(x0), ours(sigma), ours(noise), sigma_data=sigma_data, **nets.cond)

    theirs = reference.edm_loss(reference.denoiser(student, nets.labels, sigma_data), x0, sigma, noise, sigma_data)
    assert_same(gradients(loss, native_unet(student)), theirs, student)


def test_an_untrained_denoiser_has_an_edm_loss_of_one_at_every_level():
    """What the weight is for: a network that gives nothing leaves unit variance to be explained, data of sigma_data."""
    shape = (64, 16, 16, 3)
    x0, noise = (mx.random.normal(shape, key=mx.random.key(seed)) for seed in (0, 1))
    denoise = edm_denoiser(lambda x, t: mx.zeros_like(x), SCHEDULE, clip=False)
    for sigma in (0.01, 0.5, 40.0):
        value, _ = edm_loss(denoise, 0.5 * x0, mx.full((64,), sigma), noise, sigma_data=0.5)
        assert value.item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_diffusion_loss(kind):
    theirs = reference.trainable(unet("base")[1])
    latents = reference.Latents(prediction_type=kind)
    x0, noise, states = draw(3, 4, 4, 6), draw(3, 4, 4, 6, seed=1), draw(3, 7, 32, seed=2)
    t = torch.tensor([0, 431, 999])
    schedule = DiscreteSchedule(prediction_type=kind)

    def loss(weights, _):
        given = (ours(x0), mx.array(t.numpy()), ours(noise))
        return diffusion_loss(weights.unet, schedule, *given, encoder_hidden_states=ours(states))

    expected = reference.diffusion_loss(latents, theirs, x0, t, noise, states)
    assert_same(gradients(loss, unet("base")[0]), expected, theirs)


def test_every_prediction_type_has_a_target():
    assert set(PREDICTION_TARGETS) == set(PREDICTION_TYPES)


# --- consistency of pixels

DISTANCES = {
    "l1": (l1, reference.mean_absolute),
    "l2": (l2, reference.mean_square),
    "pseudo_huber": (pseudo_huber(), reference.pseudo_huber),
}
STEPS = {"heun": heun_jump, "euler": euler_jump}


@layouts
@pytest.mark.parametrize("solver", STEPS)
def test_consistency_distillation(nets, solver):
    """[CM] algorithm 2: three networks, the one that solves without the boundary condition."""
    student, target, teacher = reference.trainable(nets.net(1)), nets.net(2), nets.net(3)
    (x0, noise), (t, s), weight = pictures(), pair_of_levels(), torch.tensor([0.3, 2.0, 1.1])
    solve = STEPS[solver](edm_denoiser(native_unet(teacher), SCHEDULE, clip=False), **nets.cond)

    def loss(weights, held):
        f, f_target = (consistency_function(one.unet, SCHEDULE, clip=False) for one in (weights, held))
        x_t, x_s = solved_pair(solve, ours(x0), ours(noise), ours(t), ours(s))
        given = {"distance": l2, "weight": ours(weight), **nets.cond}
        return consistency_loss(f, f_target, x_t, x_s, ours(t), ours(s), **given)

    x_t = reference.add_noise(x0, noise, t)
    x_s = reference.STEPS[solver](reference.denoiser(teacher, nets.labels), x_t, t, s)
    f, f_target = (reference.consistency_function(net, nets.labels) for net in (student, target))
    expected = reference.consistency_loss(f, f_target, x_t, x_s, t, s, reference.mean_square, weight)
    assert_same(gradients(loss, native_unet(student), native_unet(target)), expected, student)


@pytest.mark.parametrize("distance", DISTANCES)
def test_consistency_training(distance):
    """[CM] algorithm 3, and [iCT] with its weights: the released code's Euler step with x0 for a denoiser."""
    nets = LAYOUTS["unconditional"]
    student, target = reference.trainable(nets.net(1)), nets.net(2)
    (x0, noise), (t, s) = pictures(), pair_of_levels(11, (0, 4, 9))
    weight = 1 / (t - s)
    ours_d, theirs_d = DISTANCES[distance]

    def loss(weights, held):
        f, f_target = (consistency_function(one.unet, SCHEDULE, clip=False) for one in (weights, held))
        pair = forward_pair(ours(x0), ours(noise), ours(t), ours(s))
        return consistency_loss(f, f_target, *pair, ours(t), ours(s), distance=ours_d, weight=ours(weight))

    x_t = reference.add_noise(x0, noise, t)
    x_s = reference.euler_step(lambda x, t: x0, x_t, t, s)
    f, f_target = (reference.consistency_function(net) for net in (student, target))
    expected = reference.consistency_loss(f, f_target, x_t, x_s, t, s, theirs_d, weight)
    assert_same(gradients(loss, native_unet(student), native_unet(target)), expected, student)


@layouts
def test_the_student_as_its_own_target_gets_no_gradient_through_it(nets):
    """[iCT] section 3.2: the target is the student, stopped."""
    student, (x0, noise), (t, s) = reference.trainable(nets.net(4)), pictures(), pair_of_levels()

    def loss(weights, held):
        f, f_target = (consistency_function(one.unet, SCHEDULE, clip=False) for one in (weights, held))
        pair = forward_pair(ours(x0), ours(noise), ours(t), ours(s))
        return consistency_loss(f, f_target, *pair, ours(t), ours(s), distance=pseudo_huber(), **nets.cond)

    x_t, x_s = (reference.add_noise(x0, noise, level) for level in (t, s))
    f = reference.consistency_function(student, nets.labels)
    expected = reference.consistency_loss(f, f, x_t, x_s, t, s, reference.pseudo_huber, torch.ones(ROWS))
    assert_same(gradients(loss, native_unet(student)), expected, student)


@pytest.mark.parametrize("c", [0.0, 0.06])
@pytest.mark.parametrize("stage", [0, 1, 5])
def test_easy_consistency(stage, c):
    """Pairs of [ECT] at an early stage, all with the data, in between, and late, with the levels of its formula."""
    nets = LAYOUTS["unconditional"]
    student, (x0, noise) = reference.trainable(nets.net(1)), pictures()
    t = torch.tensor([0.05, 1.9, 44.0])
    s = torch.tensor(easy_consistency_level(t.double().numpy(), stage), dtype=torch.float32)
    assert (s == 0).tolist() == {0: [True, True, False], 1: [True, False, False], 5: [False] * 3}[stage]

    def loss(weights, held):
        f, f_target = (consistency_function(one.unet, SCHEDULE, clip=False) for one in (weights, held))
        pair = forward_pair(ours(x0), ours(noise), ours(t), ours(s))
        given = {"distance": pseudo_huber(c), "weight": ours(1 / (t - s)), "clean": ours(x0)}
        return consistency_loss(f, f_target, *pair, ours(t), ours(s), **given)

    f = reference.consistency_function(student)
    expected = reference.easy_consistency_loss(f, f, x0, noise, t, s, c)
    assert_same(gradients(loss, native_unet(student)), expected, student)


def test_lpips_as_the_distance_of_a_distillation():
    """The loss of the published models: pictures enlarged, means between the stages of VGG, all of it random."""
    nets = LAYOUTS["class-conditional"]
    student, target, teacher = reference.trainable(nets.net(1)), nets.net(2), nets.net(3)
    (x0, noise), (t, s) = pictures(), pair_of_levels()
    vgg = LPIPSReference()
    network = LPIPS(LPIPSConfig(tuple(head.shape[1] for head in vgg.heads), pooling="avg", resize=24))
    network.load_weights(list(vgg.native_weights().items()), strict=True)
    solve = heun_jump(edm_denoiser(native_unet(teacher), SCHEDULE, clip=False), **nets.cond)

    def loss(weights, held):
        f, f_target = (consistency_function(one.unet, SCHEDULE, clip=False) for one in (weights, held))
        x_t, x_s = solved_pair(solve, ours(x0), ours(noise), ours(t), ours(s))
        return consistency_loss(f, f_target, x_t, x_s, ours(t), ours(s), distance=lpips_distance(network), **nets.cond)

    x_t = reference.add_noise(x0, noise, t)
    x_s = reference.heun_step(reference.denoiser(teacher, nets.labels), x_t, t, s)
    f, f_target = (reference.consistency_function(net, nets.labels) for net in (student, target))

    def distance(a, b):
        return openai_lpips(vgg.features, vgg.heads, a, b, size=24)

    expected = reference.consistency_loss(f, f_target, x_t, x_s, t, s, distance, torch.ones(ROWS))
    assert_same(gradients(loss, native_unet(student), native_unet(target)), expected, student)


# --- trajectories


@layouts
@pytest.mark.parametrize("solver", STEPS)
def test_trajectory_distillation(nets, solver):
    """[CTM]: a teacher's walk of one, three and seven levels, a frozen jump to the end, and a denoiser where s = t."""
    student, target = (make_trajectory_unet(nets.config, seed) for seed in (1, 2))
    student, teacher, (x0, noise) = reference.trainable(student), nets.net(3), pictures()
    levels = torch.tensor(grid(SCHEDULE, 9), dtype=torch.float32)
    index_t, index_u, index_s = torch.tensor([7, 2, 0]), torch.tensor([8, 5, 7]), torch.tensor([8, 6, 7])
    t, u, s, sigma = levels[index_t], levels[index_u], levels[index_s], torch.tensor([0.02, 0.4, 7.0])
    ways = [levels[int(a) : int(b) + 1].tolist() for a, b in zip(index_t, index_u, strict=True)]
    longest = max(map(len, ways))
    walk = torch.tensor([way + way[-1:] * (longest - len(way)) for way in ways])
    step = STEPS[solver](edm_denoiser(native_unet(teacher), SCHEDULE, clip=False), **nets.cond)

    def solve(x, t, u):
        for k in range(longest - 1):
            x = step(x, ours(walk[:, k]), ours(walk[:, k + 1]))
        return x

    def loss(weights, held):
        g, g_target = (trajectory_function(one.unet, SCHEDULE) for one in (weights, held))
        x_t, x_u = solved_pair(solve, ours(x0), ours(noise), ours(t), ours(u))
        given = {"distance": l2, "t_min": SCHEDULE.sigma_min, **nets.cond}
        matching, _ = trajectory_loss(g, g_target, x_t, x_u, ours(t), ours(u), ours(s), **given)
        inner = trajectory_denoiser(weights.unet, SCHEDULE)
        denoising, _ = edm_loss(
            lambda x, sigma, **cond: inner(x, sigma, sigma, **cond),
            ours(x0), ours(sigma), ours(noise), sigma_data=0.5, **nets.cond,
        )  # fmt: skip
        return matching + 0.7 * denoising, {}

    x_t = reference.add_noise(x0, noise, t)
    walked = []
    for row, way in enumerate(ways):
        labels = None if nets.labels is None else nets.labels[row : row + 1]
        denoise = reference.denoiser(teacher, labels)
        walked.append(reference.walk(denoise, x_t[row : row + 1], way, reference.STEPS[solver]))
    g, g_target = (reference.trajectory_function(net, nets.labels) for net in (student, target))
    expected = reference.trajectory_loss(g, g_target, x_t, torch.cat(walked), t, u, s, reference.mean_square)
    inner = reference.inner_trajectory(student, nets.labels)
    expected = expected + 0.7 * reference.edm_loss(lambda x, sigma: inner(x, sigma, sigma), x0, sigma, noise)
    found = gradients(loss, native_trajectory_unet(student), native_trajectory_unet(target))
    assert_same(found, expected, student)


def test_a_trajectory_loss_is_a_consistency_loss_where_the_jump_is_to_the_end():
    """s = sigma_min: the frozen jump stands still."""
    net = native_trajectory_unet(make_trajectory_unet(UNCONDITIONAL, 1))
    (x0, noise), (t, u) = (tuple(map(ours, pair)) for pair in (pictures(), pair_of_levels()))
    jump = trajectory_function(net, SCHEDULE)
    end = mx.full((ROWS,), SCHEDULE.sigma_min)
    x_t, x_u = forward_pair(x0, noise, t, u)
    value, _ = trajectory_loss(jump, jump, x_t, x_u, t, u, end, distance=l2, t_min=SCHEDULE.sigma_min)
    to_end = lambda x, t: jump(x, t, end)  # noqa: E731
    expected, _ = consistency_loss(to_end, to_end, x_t, x_u, t, u, distance=l2)
    assert value.item() == expected.item() > 0


# --- latents

INDICES = torch.tensor([0, 17, 49])  # of the solver's timesteps: the first steps to timestep 0
SHAPE = (3, 4, 4, 6)


def latent_case(kind: str) -> tuple[torch.Tensor, torch.Tensor, dict, dict]:
    """x0, noise, and what diffusers' network is told with the prompt and without."""
    x0, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    if not kind.startswith("xl"):
        states, empty = draw(3, 7, 32, seed=2), draw(1, 7, 32, seed=3).expand(3, -1, -1)
        return x0, noise, {"states": states}, {"states": empty}
    states, pooled = draw(3, 7, 72, seed=2), draw(3, 20, seed=3)
    time_ids = torch.tensor([[48, 64, 8, 0, 32, 48], [32.0, 32, 0, 0, 32, 48], [1024, 768, 3, 77, 32, 48]])
    cond = {"states": states, "added": {"text_embeds": pooled, "time_ids": time_ids}}
    zeros = {"text_embeds": torch.zeros_like(pooled), "time_ids": time_ids}
    return x0, noise, cond, {"states": torch.zeros_like(states), "added": zeros}


def told(cond: dict) -> dict[str, mx.array]:
    """The same in our names."""
    added = {name: ours(value) for name, value in cond.get("added", {}).items()}
    return {"encoder_hidden_states": ours(cond["states"]), **added}


CASES = {
    # student's network, teacher's, prediction type, distance, whether the target is the student
    "lcd": ("lcm", "base", "epsilon", "l2", False),
    "lcd of velocities": ("lcm", "base", "v_prediction", "l2", False),
    "lcd of data": ("lcm", "base", "sample", "l2", False),
    "lcd with huber": ("lcm", "base", "epsilon", "huber", False),
    "lcd of SDXL": ("xl lcm", "xl", "epsilon", "huber", False),
    "lcm-lora": ("base", "base", "epsilon", "huber", True),
    "lcm-lora of SDXL": ("xl", "xl", "epsilon", "l2", True),
}
LATENT_DISTANCES = {
    "l2": (l2, reference.mean_square),
    "huber": (mean_pseudo_huber(), reference.value_huber),
}


def shaken(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Another network of the same layout: the shared one's weights, moved."""
    moved, generator = reference.trainable(net), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return moved


def native(kind: str, net: torch.nn.Module) -> nn.Module:
    model = type(unet(kind)[0])(unet(kind)[0].config)
    weights = [(name, channels_last(value)) for name, value in net.state_dict().items()]
    model.load_weights(weights, strict=True)
    return model


@pytest.mark.parametrize("name", CASES)
def test_latent_consistency_distillation(name):
    kind, teacher_kind, prediction, distance, own_target = CASES[name]
    student = shaken(unet(kind)[1], 1)
    target = student if own_target else shaken(unet(kind)[1], 2)
    teacher = shaken(unet(teacher_kind)[1], 3).requires_grad_(False)
    x0, noise, cond, uncond = latent_case(kind)
    latents, schedule = reference.Latents(prediction_type=prediction), DiscreteSchedule(prediction_type=prediction)
    w = torch.tensor([2.0, 13.3, 7.7])
    start, end = latents.start_and_end(INDICES)
    assert start.tolist() == [19, 359, 999] and end.tolist() == [0, 339, 979]
    ours_d, theirs_d = LATENT_DISTANCES[distance]
    embeds = {"w": w} if "lcm" in kind else {}
    native_teacher = native(teacher_kind, teacher)

    def loss(weights, held):
        t, s = (mx.array(one.numpy()) for one in (start, end))
        alpha, sigma = schedule.marginals(t)
        x_t = alpha * ours(x0) + sigma * ours(noise)
        x_s = teacher_step(native_teacher, schedule, x_t, t, s, ours(w), told(cond), told(uncond))
        given = told(cond)
        if embeds:
            given["timestep_cond"] = guidance_embedding(ours(w), student.config.time_cond_proj_dim)
        return latent_consistency_loss(weights.unet, held.unet, schedule, x_t, x_s, t, s, distance=ours_d, cond=given)

    x_t = latents.noisy(x0, noise, start)
    x_s = latents.solver_step(teacher, x_t, INDICES, w, cond, uncond)
    expected = latents.distillation_loss(student, target, x_t, x_s, INDICES, theirs_d, **cond, **embeds)
    found = gradients(loss, native(kind, student), None if own_target else native(kind, target))
    assert_same(found, expected, student)


def test_latent_consistency_fine_tuning():
    """[LCM] section 4.4: the same latents and noise at both timesteps, no teacher; here with another solver's steps."""
    student, target = shaken(unet("lcm")[1], 1), shaken(unet("lcm")[1], 2)
    x0, noise, cond, _ = latent_case("lcm")
    latents, schedule = reference.Latents(steps=25), DiscreteSchedule(original_inference_steps=25)
    w, index = torch.tensor([3.0, 13.0, 7.7]), torch.tensor([0, 11, 24])
    start, end = latents.start_and_end(index)
    assert start.tolist() == [39, 479, 999] and end.tolist() == [0, 439, 959]

    def loss(weights, held):
        t, s = (mx.array(one.numpy()) for one in (start, end))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.marginals(t), schedule.marginals(s)
        x_t, x_s = (alpha * ours(x0) + sigma * ours(noise) for alpha, sigma in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        given = told(cond) | {"timestep_cond": guidance_embedding(ours(w), student.config.time_cond_proj_dim)}
        return latent_consistency_loss(weights.unet, held.unet, schedule, x_t, x_s, t, s, distance=l2, cond=given)

    x_t, x_s = (latents.noisy(x0, noise, level) for level in (start, end))
    expected = latents.distillation_loss(student, target, x_t, x_s, index, reference.mean_square, **cond, w=w)
    assert_same(gradients(loss, native("lcm", student), native("lcm", target)), expected, student)


def test_a_target_may_be_told_something_else_than_the_student():
    net, schedule = unet("base")[0], DiscreteSchedule()
    x, t, s = ours(draw(*SHAPE)), mx.array([19, 359, 999]), mx.array([0, 339, 979])
    first, other = ({"encoder_hidden_states": ours(draw(3, 7, 32, seed=seed))} for seed in (1, 2))
    given = {"distance": l2, "cond": first}
    same, _ = latent_consistency_loss(net, net, schedule, x, x, t, s, **given)
    repeated, _ = latent_consistency_loss(net, net, schedule, x, x, t, s, **given, target_cond=first)
    changed, _ = latent_consistency_loss(net, net, schedule, x, x, t, s, **given, target_cond=other)
    assert same.item() == repeated.item() != changed.item()


# --- autoencoders


@pytest.mark.parametrize("kl_weight", [0.0, 1e-6, 0.3])
def test_autoencoder_loss(kl_weight):
    student = reference.trainable(latent_autoencoder("kl")[1])
    x0, noise = draw(2, 3, 16, 24, scale=0.5), draw(2, 4, 2, 3, seed=1)

    def loss(weights, _):
        vae = weights.part("unet")
        return autoencoder_loss(
            vae.decode, vae.encode(ours(x0)), ours(x0), ours(noise), distance=l1, kl_weight=kl_weight
        )

    expected = reference.autoencoder_loss(student, x0, noise, kl_weight, reference.mean_absolute)
    assert_same(gradients(loss, native_autoencoder("kl")), expected, student)


# --- what all have in common


def test_metrics_say_what_the_loss_is_made_of():
    net = native_unet(make_unet(UNCONDITIONAL, 1))
    f = consistency_function(net, SCHEDULE, clip=False)
    (x0, noise), (t, s) = (tuple(map(ours, pair)) for pair in (pictures(), pair_of_levels()))
    pair = forward_pair(x0, noise, t, s)
    plain, metrics = consistency_loss(f, f, *pair, t, s, distance=l2)
    heavier, unchanged = consistency_loss(f, f, *pair, t, s, distance=l2, weight=3.0)
    assert plain.item() == metrics["distance"].item() == unchanged["distance"].item() > 0
    assert heavier.item() == pytest.approx(3 * plain.item(), rel=1e-6)


def test_a_pair_at_one_level_has_no_distance():
    net = native_unet(make_unet(UNCONDITIONAL, 1))
    f = consistency_function(net, SCHEDULE, clip=False)
    (x0, noise), (t, _) = (tuple(map(ours, pair)) for pair in (pictures(), pair_of_levels()))
    x_t, x_s = forward_pair(x0, noise, t, t)
    value, _ = consistency_loss(f, f, x_t, x_s, t, t, distance=l2)
    assert value.item() == 0
    assert relative_error(x_s, reference.add_noise(*pictures(), pair_of_levels()[0])) < 1e-6
