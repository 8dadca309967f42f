"""Optimisers, clipping and learning rates against PyTorch's, in float64, and against closed forms."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from parity import TOLERANCE

from mlx_cm.training.optimizers import DECAYS, OPTIMIZERS, clip_gradients, learning_rate_factor
from mlx_cm.training.settings import TrainSettings

STEPS, RATE = 50, 0.01
SHAPES = {"kernel": (3, 2, 2, 5), "bias": (7,), "scale": ()}

THEIRS = {
    "adam": lambda parameters, **settings: torch.optim.Adam(parameters, **settings),
    "adamw": lambda parameters, **settings: torch.optim.AdamW(parameters, **settings),
    "radam": lambda parameters, **settings: torch.optim.RAdam(parameters, decoupled_weight_decay=True, **settings),
}
CASES = [
    (name, betas, eps, weight_decay)
    for name in THEIRS
    for betas, eps in (((0.9, 0.999), 1e-8), ((0.9, 0.9999), 1e-8), ((0.5, 0.9), 1e-3), ((0.0, 0.5), 1e-8))
    for weight_decay in ((0.0,) if name == "adam" else (0.0, 0.3))
]


def values(step: int, size: float = 1.0) -> dict[str, np.ndarray]:
    """Gradients of a step: some parameters get hardly any, all of them in changing directions."""
    random = np.random.default_rng([7, step])
    return {name: (size * random.normal(0.3, 1, shape)).astype(np.float32) for name, shape in SHAPES.items()}


def joined(arrays: dict) -> np.ndarray:
    return np.concatenate([np.asarray(arrays[name], np.float64).reshape(-1) for name in SHAPES])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fifty_steps_are_those_of_torch(case):
    """The way that the parameters have gone after every step, with a learning rate that changes."""
    name, betas, eps, weight_decay = case
    start = values(0)
    ours = {"unet": {key: mx.array(value) for key, value in start.items()}}
    optimizer = OPTIMIZERS[name](RATE, betas, eps, weight_decay)
    optimizer.init(ours)
    theirs = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in start.items()}
    reference = THEIRS[name](theirs.values(), lr=RATE, betas=betas, eps=eps, weight_decay=weight_decay)
    for step in range(1, STEPS + 1):
        gradients = values(step, size=10 ** math.sin(step))
        rate = RATE * learning_rate_factor(step - 1, STEPS, 10, "cosine")
        optimizer.learning_rate = rate
        ours = optimizer.apply_gradients({"unet": {key: mx.array(g) for key, g in gradients.items()}}, ours)
        reference.param_groups[0]["lr"] = rate
        for key, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[key], dtype=torch.float64)
        reference.step()
        here, there = joined(ours["unet"]), joined({key: value.detach() for key, value in theirs.items()})
        assert np.linalg.norm(here - there) < TOLERANCE * np.linalg.norm(there - joined(start)), step
    assert optimizer.step.item() == STEPS


def test_all_optimizers_are_compared():
    assert set(THEIRS) == set(OPTIMIZERS)


def test_rectified_steps_follow_the_first_moment_until_the_second_can_be_trusted():
    """Liu et al., algorithm 2: with beta2 = 0.999 the variance is tractable from the sixth step on."""
    optimizer = OPTIMIZERS["radam"](RATE, (0.9, 0.999), 1e-8, 0.0)
    parameters = {"a": mx.zeros((2,))}
    optimizer.init(parameters)
    gradient = mx.array([0.001, 1.0])
    moved = []
    for _ in range(8):
        before = parameters["a"]
        parameters = optimizer.apply_gradients({"a": gradient}, parameters)
        moved.append((before - parameters["a"]).tolist())
    for step in moved[:5]:  # plain momentum, in proportion to the gradient
        assert step == pytest.approx([0.001 * RATE, RATE], rel=1e-4)
    for step in moved[5:]:  # the same for a small gradient and a large one
        assert step[0] == pytest.approx(step[1], rel=1e-3)
        assert step[1] < RATE


def test_state_is_all_that_an_optimizer_remembers():
    """What a checkpoint holds: moments, and the number of steps."""
    for name, make in OPTIMIZERS.items():
        first, second = (make(RATE, (0.9, 0.999), 1e-8, 0.0) for _ in range(2))
        parameters = {"a": mx.ones((3,))}
        first.init(parameters)
        for step in range(7):
            parameters = first.apply_gradients({"a": mx.array([1.0, -2.0, step])}, parameters)
        second.init(parameters)
        second.state = {
            "step": mx.array(first.state["step"].item(), dtype=mx.uint64),
            "learning_rate": first.state["learning_rate"],
            "a": dict(first.state["a"]),
        }
        assert set(first.state["a"]) == {"m", "v"}, name
        gradient = {"a": mx.array([0.5, 0.1, -3.0])}
        one, other = (optimizer.apply_gradients(gradient, parameters)["a"] for optimizer in (first, second))
        assert mx.array_equal(one, other), name


def test_adam_refuses_a_weight_decay_that_it_has_no_use_for():
    with pytest.raises(ValueError, match=r"weight_decay 0\.1: adam has none"):
        TrainSettings(optimizer="adam", weight_decay=0.1)
    assert TrainSettings(optimizer="adam").weight_decay == 0


# --- clipping


@pytest.mark.parametrize("limit", [0.1, 1.0, 40.0, 1e4])
def test_clipping_is_that_of_torch(limit):
    gradients = values(3, size=5.0)
    theirs = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    for parameter, gradient in zip(theirs, gradients.values(), strict=True):
        parameter.grad = torch.tensor(gradient)
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    ours, norm = clip_gradients({"unet": {key: mx.array(g) for key, g in gradients.items()}}, limit)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, key in zip(theirs, SHAPES, strict=True):
        np.testing.assert_allclose(np.array(ours["unet"][key]), parameter.grad.numpy(), rtol=1e-5)


def test_a_limit_of_zero_leaves_gradients_as_they_are():
    gradients = {"unet": {key: mx.array(g) for key, g in values(3, size=5.0).items()}}
    same, norm = clip_gradients(gradients, 0)
    assert all(mx.array_equal(value, dict(tree_flatten(gradients))[key]) for key, value in tree_flatten(same))
    assert norm.item() == pytest.approx(np.linalg.norm(joined(values(3, size=5.0))), rel=1e-6)


def test_the_norm_of_a_large_layer_keeps_its_digits():
    """A kernel of Stable Diffusion's size: a serial float32 sum is off by a thousandth here."""
    random = np.random.default_rng(0)
    kernel = random.normal(size=(320, 3, 3, 1280)).astype(np.float32)
    _, norm = clip_gradients({"unet": {"conv.weight": mx.array(kernel)}}, 1.0)
    assert norm.item() == pytest.approx(np.linalg.norm(kernel.astype(np.float64)), rel=1e-5)


# --- learning rates


def closed_form(step: int, total: int, warmup: int, decay: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return {"constant": 1, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("total", "warmup"), [(100, 0), (100, 10), (7, 3), (1, 0)])
def test_learning_rates(decay, total, warmup):
    factors = [learning_rate_factor(step, total, warmup, decay) for step in range(total)]
    assert factors == pytest.approx([closed_form(step, total, warmup, decay) for step in range(total)])
    assert all(0 < factor <= 1 for factor in factors)  # the last step still moves
    assert factors[warmup] == 1
    rest = factors[warmup:]
    assert rest == sorted(rest, reverse=True)


def test_linear_warm_up_is_that_of_torch():
    """`LinearLR` from 1 / 10, in 9 more steps to 1."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    for step in range(15):
        assert learning_rate_factor(step, 15, 10, "constant") == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_cosine_decay_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert learning_rate_factor(step, 20, 0, "cosine") == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("decay", DECAYS)
def test_a_warm_up_longer_than_training_only_warms_up(decay):
    assert [learning_rate_factor(step, 3, 6, decay) for step in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
