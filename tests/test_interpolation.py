"""Between two pictures: arcs and lines, and whole runs along them."""

import math

import mlx.core as mx
import numpy as np
import pytest
from tiny_latent import PIXELS, native_pipeline, picture

from mlx_cm.errors import UsageError
from mlx_cm.interpolation import lerp, slerp, slerp_noise, slerp_tokens
from mlx_cm.rng import mlx_noise, torch_noise

SHAPE = (2, 9, 7, 4)
PROMPTS, SEEDS = ("a red apple", "two blue bears"), (3, 11)


def draws() -> tuple[mx.array, mx.array]:
    return mlx_noise([1, 2])(SHAPE, 0), mlx_noise([3, 4])(SHAPE, 0)


def lengths(x: mx.array) -> np.ndarray:
    return np.linalg.norm(np.array(x, dtype=np.float64).reshape(len(x), -1), axis=1)


# --- arcs and lines


@pytest.mark.parametrize("between", [lerp, slerp, slerp_tokens])
def test_the_ends_are_the_arrays_themselves(between):
    a, b = draws()
    assert mx.array_equal(between(a, b, 0.0), a)
    assert mx.array_equal(between(a, b, 1.0), b)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_an_arc_is_even_and_keeps_the_length(fraction):
    """Each image by itself: the length goes linearly from one to the other, the angle too."""
    a, b = draws()
    b = b * mx.array([1.0, 2.0])[:, None, None, None]
    point = slerp(a, b, fraction)
    np.testing.assert_allclose(lengths(point), (1 - fraction) * lengths(a) + fraction * lengths(b), rtol=1e-5)

    def angles(x, y):
        products = np.array((x * y).sum(axis=(1, 2, 3)), dtype=np.float64)
        return np.arccos(products / lengths(x) / lengths(y))

    np.testing.assert_allclose(angles(a, point), fraction * angles(a, b), rtol=1e-4)
    np.testing.assert_allclose(angles(point, b), (1 - fraction) * angles(a, b), rtol=1e-4)


def test_an_arc_between_draws_is_a_draw():
    """A straight line passes through noise of half the variance, an arc does not."""
    a, b = (mlx_noise([seed])((1, 200, 200, 1), 0) for seed in (1, 2))
    assert float(slerp(a, b, 0.5).var()) == pytest.approx(1, abs=0.02)
    assert float(lerp(a, b, 0.5).var()) == pytest.approx(0.5, abs=0.02)


def test_an_arc_of_a_right_angle():
    a, b = mx.array([[1.0, 0.0]]), mx.array([[0.0, 3.0]])
    expected = 2 * math.sqrt(0.5)
    np.testing.assert_allclose(np.array(slerp(a, b, 0.5)), [[expected, expected]], rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, 1 + 1e-7])
def test_one_direction_is_a_straight_line(factor):
    a, _ = draws()
    np.testing.assert_allclose(
        np.array(slerp(a, factor * a, 0.3)), np.array(lerp(a, factor * a, 0.3)), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("b", [mx.zeros(SHAPE), -draws()[0]])
def test_what_no_arc_joins_stays_finite(b):
    assert mx.isfinite(slerp(draws()[0], b, 0.5)).all()


def test_tokens_follow_arcs_of_their_own():
    a, b = draws()
    ours = slerp_tokens(a, b, 0.4)
    assert ours.shape == SHAPE
    assert mx.allclose(ours[1, 2, 3], slerp(a[1, 2, 3][None], b[1, 2, 3][None], 0.4)[0], atol=1e-6)
    assert slerp_tokens(a.astype(mx.float16), b.astype(mx.float16), 0.4).dtype == mx.float16


def test_every_draw_follows_the_arc():
    noise = slerp_noise(torch_noise([1]), torch_noise([2]), 0.5)
    first, second = torch_noise([1]), torch_noise([2])
    for index in (0, 1, 2):
        expected = slerp(first((1, 4, 4, 4), index), second((1, 4, 4, 4), index), 0.5)
        assert mx.array_equal(noise((1, 4, 4, 4), index), expected)


# --- whole runs


@pytest.mark.parametrize("path", ["linear", "spherical"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("lcm", {}),
        ("sd", {"sampler": "tcd", "guidance_scale": 1.7, "negative_prompt": "green", "rng": "torch"}),
        ("xl", {"sampler": "lcm", "guidance_scale": 1.7}),
        ("lcm", {"image": picture(), "strength": 0.7, "rng": "torch"}),
    ],
)
def test_the_ends_are_the_pictures_that_generate_makes(family, settings, path):
    pipeline, settings = native_pipeline(family), {"steps": 2} | settings
    frames = list(pipeline.interpolate(PROMPTS, SEEDS, frames=4, path=path, **settings))
    ends = [pipeline.generate(prompt, seed=seed, **settings)[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert [frame.size for frame in frames] == [(PIXELS, PIXELS)] * 4
    assert frames[0].tobytes() == ends[0].tobytes()
    assert frames[-1].tobytes() == ends[1].tobytes()
    assert len({frame.tobytes() for frame in frames}) == 4


def test_a_small_step_is_a_small_change():
    frames = list(native_pipeline("lcm").interpolate(PROMPTS, SEEDS, frames=33, steps=1))
    values = np.stack([np.asarray(frame) for frame in frames]).astype(np.float64)
    steps, whole = np.abs(np.diff(values, axis=0)).mean(axis=(1, 2, 3)), np.abs(values[-1] - values[0]).mean()
    assert steps.max() < whole / 5


def test_one_prompt_and_seed_stay_as_they_are():
    pipeline = native_pipeline("lcm")
    (expected,) = pipeline.generate(PROMPTS[0], seed=3, steps=2)
    for frame in pipeline.interpolate([PROMPTS[0]] * 2, [3, 3], frames=3, steps=2):
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_frames_are_made_one_by_one():
    steps = []
    frames = native_pipeline("lcm").interpolate(PROMPTS, SEEDS, frames=1000, steps=2, callback=steps.append)
    next(frames), next(frames)
    assert len(steps) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frames": 1}, "frames 1: expected at least 2"),
        ({"frames": -3}, "frames -3"),
        ({"prompts": "a red apple"}, "prompts: expected two"),
        ({"prompts": ["a red apple"]}, "prompts: expected two"),
        ({"prompts": ["a", "b", "c"]}, "prompts: expected two"),
        ({"seeds": [1]}, "seeds: expected two"),
        ({"seeds": [1, -1]}, "seed -1"),
        ({"path": "curved"}, "path 'curved': expected one of linear, spherical"),
        ({"count": 2}, "count 2: one picture is made for each frame"),
        ({"steps": 0}, "steps 0"),
        ({"prompts": ["a", "apple " * 90]}, "too long"),
    ],
)
def test_refused_before_any_work(change, says):
    settings = {"prompts": PROMPTS, "seeds": SEEDS, "callback": pytest.fail} | change
    with pytest.raises(UsageError, match=says):
        native_pipeline("lcm").interpolate(**settings)
