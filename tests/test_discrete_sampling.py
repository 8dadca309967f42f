"""Discrete timesteps: schedule, scalings and samplers against diffusers' LCMScheduler and TCDScheduler."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler
from parity import channels_last, relative_error

from mlx_cm.errors import UsageError
from mlx_cm.parameterization import PREDICTIONS, latent_consistency_function, lcm_scalings, predicted_x0_and_noise
from mlx_cm.rng import torch_noise
from mlx_cm.samplers import consistency_jump, sample_multistep, sample_tcd, sample_trajectory, trajectory_jump
from mlx_cm.schedules import CLEAN, PREDICTION_TYPES, DiscreteSchedule

SHAPE = (1, 6, 5, 4)


# --- the schedule


@pytest.mark.parametrize(("t", "product"), [(0, 0.99915), (499, 0.277669), (999, 0.0046601)])
def test_signal_of_stable_diffusion(t, product):
    assert DiscreteSchedule().alphas_cumprod[t] == pytest.approx(product, rel=1e-5)


SCHEDULES = [
    {},
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"num_train_timesteps": 77},
    {"rescale_betas_zero_snr": True},
    {"rescale_betas_zero_snr": True, "beta_schedule": "linear"},
]


@pytest.mark.parametrize("fields", SCHEDULES)
def test_signal_is_the_schedulers(fields):
    fields = {"original_inference_steps": 7} | fields
    ours, theirs = DiscreteSchedule(**fields).alphas_cumprod, LCMScheduler(**fields).alphas_cumprod.numpy()
    assert ours.dtype == np.float64
    assert (np.diff(ours) < 0).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-3 if "rescale_betas_zero_snr" in fields else 5e-5, atol=1e-7)


def test_zero_terminal_signal():
    plain, rescaled = DiscreteSchedule(), DiscreteSchedule(rescale_betas_zero_snr=True)
    assert rescaled.marginal(999) == (0.0, 1.0)
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)


@pytest.mark.parametrize("fields", SCHEDULES)
def test_variance_is_preserved(fields):
    schedule = DiscreteSchedule(**{"original_inference_steps": 7} | fields)
    assert schedule.marginal(CLEAN) == (1.0, 0.0)
    assert (schedule.t_min, schedule.t_max) == (CLEAN, schedule.num_train_timesteps - 1)
    for t in (0, 5, schedule.t_max):
        alpha, sigma = schedule.marginal(t)
        assert alpha**2 == pytest.approx(schedule.alphas_cumprod[t], abs=1e-15)
        assert alpha**2 + sigma**2 == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("fields", SCHEDULES)
def test_a_timestep_per_image_has_the_marginal_of_that_timestep(fields):
    schedule = DiscreteSchedule(**{"original_inference_steps": 7} | fields)
    timesteps = [schedule.t_max, CLEAN, 0, 31, 31]
    found = schedule.marginals(mx.array(timesteps))
    expected = np.array([schedule.marginal(t) for t in timesteps], dtype=np.float32).T
    for ours, column in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (mx.float32, (5, 1, 1, 1))
        assert np.array_equal(np.array(ours).reshape(-1), column)  # to the last bit, though 1 - a_t cancels


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"prediction_type": "score"}, "prediction_type"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"beta_start": 0.02}, "beta_start"),
        ({"beta_end": math.nan}, "beta_end"),
        ({"original_inference_steps": 0}, "original_inference_steps"),
        ({"original_inference_steps": 1001}, "original_inference_steps"),
        ({"timestep_scaling": 0.0}, "timestep_scaling"),
        ({"timestep_scaling": math.inf}, "timestep_scaling"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(fields, names):
    with pytest.raises(ValueError, match=names):
        DiscreteSchedule(**fields)


# --- timesteps


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (1, {}, (999,)),
        (2, {}, (999, 499)),
        (4, {}, (999, 759, 499, 259)),
        (6, {}, (999, 839, 679, 499, 339, 179)),
        (8, {}, (999, 879, 759, 639, 499, 379, 259, 139)),
        (4, {"strength": 0.5}, (499, 379, 259, 139)),
        (4, {"original_inference_steps": 100}, (999, 749, 499, 249)),
    ],
)
def test_published_timesteps(steps, options, expected):
    assert DiscreteSchedule().lcm_timesteps(steps, **options) == expected


def their_timesteps(scheduler, steps, **options):
    """diffusers' list; None where it refuses."""
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, ZeroDivisionError):
        return None
    return tuple(scheduler.timesteps.tolist())


def our_timesteps(steps, **options):
    try:
        return DiscreteSchedule().lcm_timesteps(steps, **options)
    except UsageError:
        return None


@pytest.mark.parametrize("original", [1, 3, 10, 30, 50, 100, 999, 1000, 1001])
def test_timesteps_are_the_lcm_schedulers(original):
    scheduler = LCMScheduler()
    answers = set()
    for strength, steps in itertools.product((1.0, 0.99, 0.8, 0.58, 0.57, 0.5, 0.3, 0.05, 0.01), range(51)):
        options = {"strength": strength, "original_inference_steps": original}
        ours, theirs = our_timesteps(steps, **options), their_timesteps(scheduler, steps, **options)
        assert ours == theirs, (strength, steps)
        answers.add(ours)
    assert len(answers) > 1 or original == 1001


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.58, 0.3, 0.02])
def test_timesteps_are_the_tcd_schedulers(strength):
    scheduler = TCDScheduler()
    for steps in range(51):
        assert our_timesteps(steps, strength=strength) == their_timesteps(scheduler, steps, strength=strength), steps


@pytest.mark.parametrize("train", [1000, 77, 3])
def test_timesteps_are_the_ddim_schedulers(train):
    scheduler = DDIMScheduler(train, steps_offset=1)
    schedule = DiscreteSchedule(train, original_inference_steps=1)
    for steps in {*range(2, 52), 100, 333, 499, 500, 501, 997, 999} & {*range(2, train)}:
        scheduler.set_timesteps(steps)
        theirs = tuple(scheduler.timesteps.tolist())
        assert schedule.ddim_timesteps(steps) == schedule.check_times(theirs) == theirs
        for strength in (0.9, 0.58, 0.57, 0.5):
            kept = int(steps * strength)  # as `get_timesteps` of its image-to-image pipelines has it
            assert schedule.ddim_timesteps(steps, strength=strength) == theirs[len(theirs) - kept :]


@pytest.mark.parametrize(
    ("steps", "strength", "says"),
    [
        (1, 1.0, "steps 1: expected 2 to 999"),
        (0, 1.0, "steps 0"),
        (-3, 1.0, "steps -3"),
        (1000, 1.0, "steps 1000"),
        (9, 0.1, "strength 0.1: leaves none of 9 steps"),
    ],
)
def test_ddim_timesteps_refused(steps, strength, says):
    with pytest.raises(UsageError, match=says):
        DiscreteSchedule().ddim_timesteps(steps, strength=strength)


@pytest.mark.parametrize(
    ("steps", "options", "says"),
    [
        (0, {}, "expected 1 to 50"),
        (-1, {}, "expected 1 to 50"),
        (51, {}, "expected 1 to 50: the model was distilled with 50 steps"),
        (26, {"strength": 0.5}, "strength 0.5 leaves 25"),
        (1, {"strength": 0.0}, "above 0"),
        (1, {"strength": -0.5}, "above 0"),
        (1, {"strength": 1.01}, "at most 1"),
        (1, {"strength": math.nan}, "above 0"),
        (1, {"original_inference_steps": 0}, "expected 1 to 1000"),
        (1, {"original_inference_steps": 1001}, "expected 1 to 1000"),
    ],
)
def test_timesteps_refused(steps, options, says):
    with pytest.raises(UsageError, match=says):
        DiscreteSchedule().lcm_timesteps(steps, **options)


def test_check_times_takes_what_is_right():
    found = DiscreteSchedule().check_times([999, 499.0, 0])
    assert found == (999, 499, 0)
    assert all(type(t) is int for t in found)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([], "empty"),
        ([999.5], "whole number"),
        ([math.nan], "whole number"),
        ([math.inf], "whole number"),
        ([1000], "lies in 0 to 999"),
        ([-1], "lies in 0 to 999"),
        ([499, 999], "descend"),
        ([999, 499, 499], "descend"),
    ],
)
def test_check_times_refuses(times, says):
    with pytest.raises(UsageError, match=says):
        DiscreteSchedule().check_times(times)


# --- scalings and predictions


@pytest.mark.parametrize("timestep_scaling", [10.0, 1.0, 0.01])
def test_scalings_are_the_schedulers(timestep_scaling):
    scheduler = LCMScheduler(timestep_scaling=timestep_scaling)
    for t in (0, 1, 19, 259, 999):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert lcm_scalings(t, 0.5, timestep_scaling) == pytest.approx([float(c) for c in theirs], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("timestep_scaling", [10.0, 0.01])
def test_scalings_of_a_timestep_per_image(timestep_scaling):
    timesteps = [0, 1, 19, 259, 999]
    found = lcm_scalings(mx.array(timesteps), 0.5, timestep_scaling)
    expected = np.array([lcm_scalings(t, 0.5, timestep_scaling) for t in timesteps]).T
    for ours, column in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (mx.float32, (5, 1, 1, 1))
        np.testing.assert_allclose(np.array(ours).reshape(-1), column, rtol=5e-7)


def test_scalings_are_the_identity_at_timestep_zero():
    assert lcm_scalings(0, 0.5, 10.0) == (1.0, 0.0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [1, 259, 999])
def test_every_prediction_says_the_same(prediction_type, t):
    """From the x_t of known data and noise, whichever of the three the network gives, both are found again."""
    schedule = DiscreteSchedule(prediction_type=prediction_type)
    alpha, sigma = schedule.marginal(t)
    x0, noise = (mx.random.normal(SHAPE, key=mx.random.key(key)) for key in (1, 2))
    output = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction_type]
    found = predicted_x0_and_noise(lambda x, t: output, schedule, alpha * x0 + sigma * noise, t)
    for ours, expected in zip(found, (x0, noise), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(expected), atol=2e-4)


def test_every_prediction_type_has_its_formula():
    assert set(PREDICTIONS) == set(PREDICTION_TYPES)


def test_half_precision_states_are_computed_in_float32():
    asked = []

    def net(x, t):
        asked.append((x.dtype, t.dtype, t.shape))
        return x.astype(mx.float16)

    f = latent_consistency_function(net, DiscreteSchedule())
    assert f(mx.ones(SHAPE, mx.float16), 259).dtype == mx.float32
    assert asked == [(mx.float32, mx.float32, (1,))]


def wavy(x: mx.array, t: mx.array) -> mx.array:
    """A network that tells images of one batch apart by their timestep."""
    return mx.tanh(1.3 * x + t.reshape(-1, 1, 1, 1) / 700) - 0.2 * x


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_timestep_per_image_is_that_image_alone(prediction_type):
    schedule = DiscreteSchedule(prediction_type=prediction_type)
    x, starts, ends = mx.random.normal((3, *SHAPE[1:]), key=mx.random.key(3)), (999, 259, 1), (499, 0, CLEAN)
    f, g = latent_consistency_function(wavy, schedule), trajectory_jump(wavy, schedule)
    t, s = mx.array(starts), mx.array(ends)
    together = (*predicted_x0_and_noise(wavy, schedule, x, t), f(x, t), g(x, t, s))
    for image, (one, other) in enumerate(zip(starts, ends, strict=True)):
        x_one = x[image : image + 1]
        alone = (*predicted_x0_and_noise(wavy, schedule, x_one, one), f(x_one, one), g(x_one, one, other))
        for ours, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(np.array(ours[image]), np.array(expected[0]), rtol=2e-6, atol=1e-6)


def test_one_timestep_for_all_images_is_a_number():
    """Samplers pay for no gathering, and what they compute does not depend on how losses compute."""
    asked = []
    g = trajectory_jump(lambda x, t: asked.append(t.tolist()) or x, DiscreteSchedule())
    g(mx.ones((3, *SHAPE[1:])), 259, 0)
    g(mx.ones((3, *SHAPE[1:])), mx.array([259, 4, 0]), mx.array([1, 0, CLEAN]))
    assert asked == [[259.0], [259.0, 4.0, 0.0]]


@pytest.mark.parametrize("timesteps", [259, [999, 259]])
def test_the_networks_gradient_passes(timesteps):
    """d/da of mean f with the network a * x: c_out times what a prediction of noise makes of it, in float64."""
    schedule = DiscreteSchedule()
    x = mx.random.normal((2, *SHAPE[1:]), key=mx.random.key(5))
    t = timesteps if isinstance(timesteps, int) else mx.array(timesteps)

    def mean(a: mx.array) -> mx.array:
        return latent_consistency_function(lambda x, t: a * x, schedule)(x, t).mean()

    factors = []
    for timestep in np.broadcast_to(timesteps, 2).tolist():
        alpha, sigma = schedule.marginal(timestep)
        factors.append(-lcm_scalings(timestep, 0.5, schedule.timestep_scaling)[1] * sigma / alpha)
    expected = (np.array(factors).reshape(-1, 1, 1, 1) * np.array(x, dtype=np.float64)).mean()
    assert mx.grad(mean)(mx.array(0.7)).item() == pytest.approx(expected, rel=1e-4)


# --- samplers


def network(xp):
    """A network of elementary functions, in MLX or torch: (B, H, W, C) or (B, C, H, W) alike."""
    return lambda x, t: xp.tanh(1.3 * x + float(t) / 700) - 0.2 * x


def their_sampling(scheduler, steps: int, seed: int, **options) -> torch.Tensor:
    """The loop of diffusers' pipelines around a scheduler."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn((1, SHAPE[3], *SHAPE[1:3]), generator=generator)
    net = network(torch)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, generator=generator, **options, return_dict=False)[0]
    return x


def our_sampling(sample, jump, schedule, steps: int, seed: int, **options) -> mx.array:
    noise = torch_noise([seed])
    return sample(jump, noise(SHAPE, 0), schedule.lcm_timesteps(steps), schedule, noise=noise, **options)


SCHEDULER_FIELDS = [
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"beta_schedule": "linear"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("fields", [*SCHEDULER_FIELDS, {"timestep_scaling": 0.02}])
def test_lcm_ends_where_the_scheduler_does(fields, steps):
    schedule = DiscreteSchedule(**fields)
    jump = consistency_jump(latent_consistency_function(lambda x, t: network(mx)(x, t.item()), schedule))
    ours = our_sampling(sample_multistep, jump, schedule, steps, seed=steps)
    assert relative_error(ours, their_sampling(LCMScheduler(**fields), steps, seed=steps)) < 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("fields", SCHEDULER_FIELDS)
def test_tcd_ends_where_the_scheduler_does(fields, steps, eta):
    schedule = DiscreteSchedule(**fields)
    jump = trajectory_jump(lambda x, t: network(mx)(x, t.item()), schedule)
    ours = our_sampling(sample_tcd, jump, schedule, steps, seed=steps, eta=eta)
    assert relative_error(ours, their_sampling(TCDScheduler(**fields), steps, seed=steps, eta=eta)) < 1e-4


@pytest.mark.parametrize("steps", [2, 7, 50])
@pytest.mark.parametrize("fields", SCHEDULER_FIELDS)
def test_ddim_ends_where_the_scheduler_does(fields, steps):
    schedule = DiscreteSchedule(**fields)
    jump = trajectory_jump(lambda x, t: network(mx)(x, t.item()), schedule)
    x = torch_noise([steps])(SHAPE, 0)
    ours = sample_trajectory(jump, x, schedule.ddim_timesteps(steps), schedule, noise=None)
    fields = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | fields
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **fields)
    assert relative_error(ours, their_sampling(scheduler, steps, seed=steps)) < 1e-4


@pytest.mark.parametrize(
    ("eta", "landings", "draws"),
    [(0.0, [759, 499, 259, 0], []), (0.3, [531, 349, 181, 0], [1, 2, 3]), (1.0, [0, 0, 0, 0], [1, 2, 3])],
)
def test_tcd_lands_between_the_next_time_and_the_end(eta, landings, draws):
    asked, landed = [], []
    source = torch_noise([0])

    def noise(shape, index):
        asked.append(index)
        return source(shape, index)

    def jump(x, t, s):
        landed.append(s)
        return x

    schedule = DiscreteSchedule()
    sample_tcd(jump, mx.zeros(SHAPE), schedule.lcm_timesteps(4), schedule, eta=eta, noise=noise)
    assert (landed, asked) == (landings, draws)


def test_layouts_of_this_file_agree():
    """The two networks are one function, and torch's draws arrive channels-last."""
    x = torch.randn((1, SHAPE[3], *SHAPE[1:3]), generator=torch.Generator().manual_seed(4))
    assert mx.array_equal(torch_noise([4])(SHAPE, 0), channels_last(x))
    assert relative_error(network(mx)(channels_last(x), 259), network(torch)(x, 259)) < 1e-6
