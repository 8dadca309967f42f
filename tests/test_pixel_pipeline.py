"""Whole runs of the pixel pipeline: diffusers' and OpenAI's pictures from the same noise, and what is refused."""

import itertools
import json
import math
import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from parity import channels_last
from tiny_models import CONDITIONAL, UNCONDITIONAL, make_pipeline, native_unet, save_pipeline, shared_unet
from trajectory_reference import make_trajectory_unet, native_trajectory_unet

import mlx_cm
from mlx_cm.convert import Options, convert
from mlx_cm.errors import ModelError, OutputError, UsageError
from mlx_cm.pipelines.pixel import (
    NO_USE,
    PARAMETERIZATIONS,
    SAMPLERS,
    ConsistencyModelPipeline,
    PixelSettings,
    label_of_seed,
)
from mlx_cm.presets import PRESETS, preset_of_repository
from mlx_cm.rng import replay_noise
from mlx_cm.schedules import KarrasSchedule

LEVEL = 1 / 255
KINDS = ["conditional", "unconditional"]


def pipeline(kind: str, num_scales: int = 40, **settings) -> ConsistencyModelPipeline:
    return ConsistencyModelPipeline(
        native_unet(shared_unet(kind)), KarrasSchedule(num_scales=num_scales), PixelSettings(**settings)
    )


def labels_of(kind: str, count: int) -> list[int] | None:
    return [(3 * k + 1) % 10 for k in range(count)] if kind == "conditional" else None


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int32) for image in images])


def assert_same_pictures(ours, theirs) -> None:
    ours, theirs = pixels(ours), pixels(theirs)
    assert len(np.unique(theirs)) > 50  # a flat picture would agree with anything
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.02  # one level, where a value lies at a rounding's edge


def generators(seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- against diffusers


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_default_spacing_as_diffusers(kind, steps):
    labels = labels_of(kind, 2)
    ours = pipeline(kind).generate(labels=labels, steps=steps, seed=[11, 5], rng="torch")
    reference = make_pipeline(kind)
    theirs = reference(
        batch_size=2, num_inference_steps=steps, class_labels=labels, generator=generators([11, 5])
    ).images
    assert_same_pictures(ours, theirs)


PUBLISHED = {name: preset for name, preset in PRESETS.items() if preset.indices is not None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_as_diffusers(name):
    preset = PUBLISHED[name]
    kind = "conditional" if "imagenet" in name else "unconditional"
    labels = labels_of(kind, 2)
    reference = make_pipeline(kind, preset.num_scales)
    timesteps = sorted(preset.indices[:-1], reverse=True)  # diffusers' form of the list
    theirs = reference(
        batch_size=2, num_inference_steps=None, timesteps=timesteps, class_labels=labels, generator=generators([0, 1])
    ).images
    settings = {"labels": labels, "seed": 0, "rng": "torch", "count": 2}
    by_preset = pipeline(kind, preset.num_scales, preset=name).generate(steps=2, **settings)
    assert_same_pictures(by_preset, theirs)
    plain = pipeline(kind, preset.num_scales)
    by_name = plain.generate(times=name, **settings)
    by_indices = plain.generate(times=f"grid:{','.join(map(str, preset.indices))}", **settings)
    assert [image.tobytes() for image in by_preset] == [image.tobytes() for image in by_name]
    assert [image.tobytes() for image in by_preset] == [image.tobytes() for image in by_indices]


@pytest.mark.parametrize("timesteps", [[22, 0], [30, 22, 10, 0], [0]])
@pytest.mark.parametrize("kind", KINDS)
def test_injected_noise_makes_diffusers_values(kind, timesteps):
    """Not through our copy of torch's generator: torch's own draws for a whole batch are handed in."""
    labels = labels_of(kind, 3)
    reference = make_pipeline(kind)
    theirs = reference(
        batch_size=3,
        num_inference_steps=None,
        timesteps=timesteps,
        class_labels=labels,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images
    generator = torch.Generator().manual_seed(7)
    draws = [channels_last(torch.randn((3, 3, 16, 16), generator=generator)) for _ in timesteps]
    pipe = pipeline(kind)
    request = pipe.resolve(labels=labels, count=3, times=f"grid:{','.join(map(str, reversed(timesteps)))}")
    x0 = np.array(pipe.sample(request, noise=replay_noise(draws)))
    ours = np.clip(x0 / 2 + 0.5, 0, 1)
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() < LEVEL / 4
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-4
    images = pipe.generate(labels=labels, count=3, times=list(request.times), noise=replay_noise(draws))
    assert_same_pictures(images, reference.numpy_to_pil(theirs))


def test_without_clipping_as_diffusers():
    reference = make_pipeline("unconditional")
    reference.scheduler.register_to_config(clip_denoised=False)
    theirs = reference(num_inference_steps=3, generator=generators([2])).images
    assert_same_pictures(pipeline("unconditional", clip_denoised=False).generate(steps=3, seed=2, rng="torch"), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_loads_and_makes_the_same_pictures(kind, tmp_path):
    source = save_pipeline(tmp_path / "tiny", kind, 151)
    labels = labels_of(kind, 2)
    pipe = mlx_cm.load(source, dtype="float32")
    ours = pipe.generate(labels=labels, count=2, steps=2, seed=3, rng="torch")
    theirs = make_pipeline(kind, 151)(
        batch_size=2, num_inference_steps=2, class_labels=labels, generator=generators([3, 4])
    ).images
    assert_same_pictures(ours, theirs)
    digest = next(iter(pipe.provenance["weights"].values()))
    assert pipe.recipe(pipe.resolve())["model_sha256"] == pipe.weights_sha256 == digest


# --- against OpenAI's teachers


def teacher_picture(noise: torch.Tensor, steps: int, labels: list[int] | None, kind: str, order: int) -> np.ndarray:
    """The solver of openai/consistency_models with the denoiser of its diffusion teachers, written with torch."""
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    sigmas = [float((high + i / max(steps - 1, 1) * (low - high)) ** 7) for i in range(steps)] + [0.0]

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        total = sigma**2 + 0.5**2
        output = shared_unet(kind)(
            x / math.sqrt(total),
            torch.tensor(250 * math.log(sigma)),
            None if labels is None else torch.tensor(labels),
        ).sample
        return (0.5**2 / total * x + sigma * 0.5 / math.sqrt(total) * output).clamp(-1, 1)

    x = noise * 80.0
    for sigma, below in itertools.pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        predicted = x + (below - sigma) * slope
        if order == 2 and below > 0:
            slope = (slope + (predicted - denoise(predicted, below)) / below) / 2
        x = x + (below - sigma) * slope
    return (x.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("sampler", "order"), [("heun", 2), ("euler", 1)])
@pytest.mark.parametrize("steps", [1, 5, 18])
@pytest.mark.parametrize("kind", KINDS)
def test_teacher_as_openai(kind, steps, sampler, order):
    labels = labels_of(kind, 2)
    noise = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(4))
    theirs = teacher_picture(noise, steps, labels, kind, order)
    pipe = pipeline(kind, preset="edm", parameterization="edm")
    request = pipe.resolve(labels=labels, count=2, steps=steps, sampler=sampler)
    x0 = np.array(pipe.sample(request, noise=replay_noise([channels_last(noise)])))
    ours = np.clip(x0 / 2 + 0.5, 0, 1)
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() < LEVEL


def test_a_teacher_takes_its_whole_grid_by_default():
    pipe = pipeline("unconditional", 12, preset="edm", parameterization="edm")
    request = pipe.resolve()
    assert request.sampler == "heun"
    assert request.times == tuple(KarrasSchedule(num_scales=12).grid())
    assert len(pipe.resolve(steps=20).times) == 20  # a solver may go finer than the grid


# --- against CTM

TRAJECTORY_UNETS = {
    "conditional": make_trajectory_unet(CONDITIONAL, 3),
    "unconditional": make_trajectory_unet(UNCONDITIONAL, 3),
}


def trajectory_pipeline(kind: str, **settings) -> ConsistencyModelPipeline:
    unet = native_trajectory_unet(TRAJECTORY_UNETS[kind])
    return ConsistencyModelPipeline(unet, KarrasSchedule(), PixelSettings(parameterization="trajectory", **settings))


def ctm_picture(kind: str, draws: list[torch.Tensor], steps: int, labels: list[int] | None, gamma: float) -> np.ndarray:
    """`sample_exact` and `sample_gamma_multistep_` of sony/ctm around its jumps, written with torch, clipped last."""
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    sigmas = [float((high + i / steps * (low - high)) ** 7) for i in range(steps + 1)]

    def conditioning(sigma: float) -> torch.Tensor:
        return torch.full((len(draws[0]),), 1000 * 0.25 * math.log(sigma + 1e-44))

    def jump(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
        total = t**2 + 0.5**2
        given = None if labels is None else torch.tensor(labels)
        output = TRAJECTORY_UNETS[kind].forward_to(x / math.sqrt(total), conditioning(t), conditioning(s), given)
        inner = 0.5**2 / total * x + t * 0.5 / math.sqrt(total) * output
        return s / t * x + (1 - s / t) * inner

    x = draws[0] * 80.0
    for i in range(steps):
        s = math.sqrt(1 - gamma**2) * (sigmas[i + 1] - 0.002) + 0.002
        x = jump(x, sigmas[i], s)
        if i < steps - 1 and gamma:
            x = x + math.sqrt(sigmas[i + 1] ** 2 - s**2) * draws[i + 1]
    return (x.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("eta", [None, 0, 0.3, 1])
@pytest.mark.parametrize("steps", [None, 1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_trajectory_as_ctm(kind, steps, eta):
    labels = labels_of(kind, 2)
    generator = torch.Generator().manual_seed(4)
    draws = [torch.randn((2, 3, 16, 16), generator=generator) for _ in range(steps or 1)]
    theirs = ctm_picture(kind, draws, steps or 1, labels, eta or 0)
    pipe = trajectory_pipeline(kind)
    request = pipe.resolve(labels=labels, count=2, steps=steps, eta=eta)
    assert (request.sampler, len(request.times), request.eta) == ("ctm", steps or 1, eta or 0)
    x0 = np.array(pipe.sample(request, noise=replay_noise([channels_last(draw) for draw in draws])))
    ours = np.clip(x0 / 2 + 0.5, 0, 1)
    assert theirs.std() > 0.05
    assert np.abs(ours - theirs).max() < LEVEL
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"steps": 3, "eta": 0.4}, {"times": "80,2.24", "eta": 1.0}])
def test_a_trajectory_models_recipe_makes_the_picture_again(settings):
    pipe = trajectory_pipeline("conditional")
    request = pipe.resolve(seed=5, **settings)
    recipe = json.loads(json.dumps(pipe.recipe(request)))
    repeated = {"labels": recipe["label"], **{name: recipe[name] for name in ("times", "sampler", "eta", "seed")}}
    assert pipe.resolve(**repeated) == request
    assert picture_bytes(pipe.generate(**repeated)) == picture_bytes(pipe.generate(seed=5, **settings))


def test_noise_put_in_again_changes_the_picture():
    pipe = trajectory_pipeline("unconditional")
    made = [picture_bytes(pipe.generate(steps=2, eta=eta)) for eta in (0, 0.5, 1)]
    assert made[0] != made[1] != made[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "multistep"}, "this model is a trajectory model; expected auto, ctm"),
        ({"eta": -0.1}, "eta -0.1: expected 0 to 1"),
        ({"eta": math.nan}, "eta nan: expected 0 to 1"),
        ({"steps": 0}, "steps 0: expected at least 1"),
    ],
)
def test_refused_of_a_trajectory_model(settings, message):
    with pytest.raises(UsageError, match=message):
        trajectory_pipeline("unconditional").resolve(**settings)


def test_a_network_is_told_as_many_levels_as_its_settings_say():
    network = native_trajectory_unet(TRAJECTORY_UNETS["unconditional"])
    with pytest.raises(ModelError, match="unet: is told the level to jump to, so it is not a consistency model"):
        ConsistencyModelPipeline(network, KarrasSchedule())
    with pytest.raises(ModelError, match="unet: is told no level to jump to, so it is not a trajectory model"):
        pipeline("unconditional", parameterization="trajectory")


# --- determinism


def picture_bytes(images) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("rng", ["mlx", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_request_makes_the_same_bytes(kind, rng):
    pipe = pipeline(kind)
    first = picture_bytes(pipe.generate(seed=5, count=3, steps=2, rng=rng))
    assert first == picture_bytes(pipe.generate(seed=5, count=3, steps=2, rng=rng))
    assert len(set(first)) == 3
    assert first != picture_bytes(pipe.generate(seed=6, count=3, steps=2, rng=rng))


@pytest.mark.parametrize("rng", ["mlx", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_company(kind, rng):
    pipe = pipeline(kind)
    labels = labels_of(kind, 3)
    together = pipe.generate(labels=labels, seed=5, count=3, steps=2, rng=rng)
    for k, image in enumerate(together):
        label = None if labels is None else labels[k]
        alone = pipe.generate(labels=label, seed=5 + k, steps=2, rng=rng)
        assert picture_bytes(alone) == picture_bytes([image])
    batched = pipe.generate(labels=labels, seed=5, count=3, steps=2, rng=rng, batch_size=2)
    assert np.abs(pixels(batched) - pixels(together)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_of_the_models_size(kind):
    (image,) = pipeline(kind).generate()
    assert (image.size, image.mode) == ((16, 16), "RGB")


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1, "seed": 3},
        {"steps": 4, "seed": 3, "labels": 2, "rng": "torch"},
        {"times": "80,0.5,0.002", "seed": [1, 9]},
        {"times": "grid:0,22,39", "count": 2},
        {"times": "grid:39"},
        {"times": "cd-imagenet64-l2", "labels": [1, 2, 3]},
    ],
)
def test_a_recipe_makes_the_picture_again(settings):
    pipe = pipeline("conditional")
    request = pipe.resolve(**settings)
    recipe = json.loads(json.dumps(pipe.recipe(request)))
    repeated = {
        "labels": recipe["label"],
        **{name: recipe[name] for name in ("steps", "times", "sampler", "seed", "rng", "width", "height")},
    }
    assert pipe.resolve(**repeated) == request
    assert picture_bytes(pipe.generate(**repeated)) == picture_bytes(pipe.generate(**settings))


@pytest.mark.parametrize("schedule", [KarrasSchedule(sigma_max=40.0), KarrasSchedule(sigma_max=100.0, rho=3.0)])
@pytest.mark.parametrize("steps", [1, 7, 18])
def test_a_teachers_recipe_stays_within_its_own_range(steps, schedule):
    settings = PixelSettings(parameterization="edm")
    pipe = ConsistencyModelPipeline(native_unet(shared_unet("unconditional")), schedule, settings)
    request = pipe.resolve(steps=steps)
    recipe = json.loads(json.dumps(pipe.recipe(request)))
    assert pipe.resolve(times=recipe["times"], sampler=recipe["sampler"], seed=recipe["seed"]) == request


# --- seeds, labels, counts

COMBINATIONS = [  # settings, seeds, labels
    ({"labels": 3}, (0,), (3,)),
    ({"labels": 3, "count": 2}, (0, 1), (3, 3)),
    ({"labels": [3], "count": 2}, (0, 1), (3, 3)),
    ({"labels": [3, 7]}, (0, 1), (3, 7)),
    ({"labels": [3, 7], "seed": 5}, (5, 6), (3, 7)),
    ({"labels": [3, 7], "seed": [5]}, (5, 6), (3, 7)),
    ({"labels": [3, 7], "seed": [5, 50]}, (5, 50), (3, 7)),
    ({"labels": [3, 7], "count": 2}, (0, 1), (3, 7)),
    ({"labels": [3, 7, 1, 2], "seed": [5, 50], "count": 2}, (5, 6, 50, 51), (3, 7, 1, 2)),
    ({"labels": 3, "seed": [5, 50], "count": 2}, (5, 6, 50, 51), (3, 3, 3, 3)),
    ({"labels": np.int64(3), "seed": np.int64(4)}, (4,), (3,)),
    ({"labels": (0, 9)}, (0, 1), (0, 9)),
    ({"labels": np.array([0, 9])}, (0, 1), (0, 9)),
    ({"labels": range(2)}, (0, 1), (0, 1)),
]


@pytest.mark.parametrize(("settings", "seeds", "labels"), COMBINATIONS, ids=[str(row[0]) for row in COMBINATIONS])
def test_seeds_and_labels(settings, seeds, labels):
    request = pipeline("conditional").resolve(**settings)
    assert (request.seeds, request.labels) == (seeds, labels)


def test_a_label_not_asked_for_comes_from_the_seed():
    pipe = pipeline("conditional")
    request = pipe.resolve(seed=100, count=100)
    assert request.labels == tuple(label_of_seed(seed, 10) for seed in range(100, 200))
    assert request.labels == pipe.resolve(seed=100, count=100).labels
    assert request.labels[7:8] == pipe.resolve(seed=107).labels
    assert set(request.labels) == set(range(10))


def test_labels_change_the_picture():
    pipe = pipeline("conditional")
    assert picture_bytes(pipe.generate(labels=1)) != picture_bytes(pipe.generate(labels=2))


def test_an_unconditional_model_has_no_labels():
    assert pipeline("unconditional").resolve(count=2).labels is None


# --- times

TIMES = [  # times, steps, what they are
    (None, None, (80.0,)),
    ("auto", None, (80.0,)),
    (None, 1, (80.0,)),
    ("auto", 2, (80.0, 2.2404)),
    ("80", None, (80.0,)),
    ("80,1.38", None, (80.0, 1.38)),
    (" 80 , 1.38 ", 2, (80.0, 1.38)),
    ("8e1,1.38", None, (80.0, 1.38)),
    ("grid:0,22", None, (80.0, 1.38237)),
    ("grid:0,22,39", 2, (80.0, 1.38237)),
    ("grid:39", None, (0.002,)),
    ("cd-imagenet64-l2", None, (80.0, 1.38237)),
    ("ct-cat256", None, (80.0, 5.24850)),
    ([80, 1.38], None, (80.0, 1.38)),
    ((80,), 1, (80.0,)),
    (np.array([80.0, 1.38]), None, (80.0, 1.38)),
    (80, None, (80.0,)),
    (2.5, None, (2.5,)),
]


@pytest.mark.parametrize(("times", "steps", "expected"), TIMES, ids=str)
def test_times(times, steps, expected):
    assert pipeline("unconditional").resolve_times(times, steps) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, (80.0,)), (2, (80.0, 1.38237)), (4, (80.0, 16.78, 2.2404, 0.1312)), (None, (80.0,))]
)
def test_the_published_list_serves_its_own_number_of_steps(steps, expected):
    pipe = pipeline("unconditional", preset="cd-imagenet64-l2")
    assert pipe.resolve_times(None, steps) == pytest.approx(expected, rel=1e-3)


def test_presets_by_repository():
    assert preset_of_repository("openai/diffusers-ct_cat256") == "ct-cat256"
    assert preset_of_repository("openai/diffusers-cd_imagenet64_lpips") == "cd-imagenet64-lpips"
    assert preset_of_repository("someone/else") is None
    assert preset_of_repository(None) is None


def test_every_preset_fits_its_grid():
    for preset in PUBLISHED.values():
        assert preset.indices[0] == 0
        assert preset.indices[-1] == preset.num_scales - 1
        assert list(preset.indices) == sorted(preset.indices)


# --- what is refused

REFUSED = [  # kind, settings, message
    *[("conditional", {name: "x"}, f"{name}: {re.escape(why)}.*no effect") for name, why in NO_USE.items()],
    ("conditional", {"width": 64}, "width 64: this model makes pictures of 16 by 16"),
    ("conditional", {"height": 17}, "height 17: this model makes pictures of 16 by 16"),
    ("conditional", {"labels": 10}, "label 10: this model has classes 0 to 9"),
    ("conditional", {"labels": -1}, "label -1: this model has classes 0 to 9"),
    ("conditional", {"labels": [1, 99]}, "label 99"),
    ("conditional", {"labels": []}, "labels: the list is empty"),
    ("conditional", {"labels": True}, "label True"),
    ("conditional", {"labels": 2.5}, "label 2.5: expected a whole number"),
    ("conditional", {"labels": "3"}, "label '3': expected a whole number"),
    ("conditional", {"labels": [1, 2], "count": 3}, "2 labels: expected one, or one for each of the 3"),
    ("conditional", {"labels": [1, 2, 3], "seed": [1, 9]}, "3 labels: expected one, or one for each of the 2"),
    ("unconditional", {"labels": 1}, "labels: this model is unconditional"),
    ("unconditional", {"labels": []}, "labels: this model is unconditional"),
    ("unconditional", {"count": 0}, "count 0"),
    ("unconditional", {"seed": -1}, "seed -1"),
    ("unconditional", {"seed": 2**64}, "seed 18446744073709551616"),
    ("unconditional", {"seed": []}, "seed"),
    ("unconditional", {"seed": [3, 3]}, "same image twice"),
    ("unconditional", {"seed": [3, 4], "count": 2}, "same image twice"),
    ("unconditional", {"steps": 0}, "steps 0: expected at least 1"),
    ("unconditional", {"steps": -2}, "steps -2"),
    ("unconditional", {"steps": 41}, "steps 41: expected 1 to 40"),
    ("unconditional", {"steps": 3, "times": "80,1"}, "steps 3: the times given are 2"),
    ("unconditional", {"times": ""}, "times ''"),
    ("unconditional", {"times": "80,"}, "times '80,'"),
    ("unconditional", {"times": "80;1"}, "times '80;1'"),
    ("unconditional", {"times": "grid:"}, "times 'grid:'"),
    ("unconditional", {"times": "grid:0,40"}, "grid index 40"),
    ("unconditional", {"times": "grid:0,-1"}, "grid index -1"),
    ("unconditional", {"times": "grid:22,0"}, "descend"),
    ("unconditional", {"times": "net:80"}, "times 'net:80'"),
    ("unconditional", {"times": "cd-dogs"}, "times 'cd-dogs': expected auto"),
    ("unconditional", {"times": "cd-cat256-l2"}, "no multistep list was published"),
    ("unconditional", {"times": "1,80"}, "descend"),
    ("unconditional", {"times": "80,80"}, "descend"),
    ("unconditional", {"times": "81"}, "times 81: a noise level of this model lies in"),
    ("unconditional", {"times": "0.001"}, "times 0.001"),
    ("unconditional", {"times": "nan"}, "times nan"),
    ("unconditional", {"times": "inf"}, "times inf"),
    ("unconditional", {"times": []}, "times: the list is empty"),
    ("unconditional", {"rng": "numpy"}, "rng 'numpy': expected one of mlx, torch"),
    ("unconditional", {"sampler": "heun"}, "sampler 'heun': this model is a consistency model"),
    ("unconditional", {"sampler": "lcm"}, "sampler 'lcm'"),
    ("unconditional", {"sampler": "ctm"}, "sampler 'ctm': this model is a consistency model"),
    ("unconditional", {"eta": 0.3}, "eta: the multistep sampler has no such setting"),
    ("unconditional", {"sampler": "onestep", "steps": 2}, "steps 2: the onestep sampler makes 1"),
    ("unconditional", {"batch_size": 0}, "batch_size 0"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED, ids=[f"{row[0][:4]} {row[1]}" for row in REFUSED])
def test_refused(kind, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        pipeline(kind).generate(**settings)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("sampler", ["multistep", "onestep"])
def test_a_teacher_is_not_sampled_as_a_consistency_model(sampler):
    with pytest.raises(UsageError, match="this model is a diffusion teacher; expected auto, heun, euler"):
        pipeline("unconditional", parameterization="edm").resolve(sampler=sampler)


def test_an_unknown_setting_is_a_mistake_of_the_program():
    with pytest.raises(TypeError, match="no setting 'stepz'"):
        pipeline("unconditional").generate(stepz=3)


@pytest.mark.parametrize("name", [*NO_USE, "width", "height"])
def test_settings_left_open_are_no_settings(name):
    assert pipeline("unconditional").resolve(**{name: None}) == pipeline("unconditional").resolve()


def test_the_models_own_size_may_be_named():
    pipeline("unconditional").resolve(width=16, height=16)


@pytest.mark.parametrize("settings", [{"parameterization": "vp"}, {"preset": "cd-dogs"}])
def test_settings_of_a_folder_that_mean_nothing(settings):
    with pytest.raises(ValueError, match="expected one of"):
        PixelSettings(**settings)


@pytest.mark.parametrize("setting", [{"quantize": 4}, {"lora": ["adapter"]}])
def test_what_pixel_models_have_no_use_for_when_loaded(setting, tmp_path):
    convert(save_pipeline(tmp_path / "tiny"), tmp_path / "native", Options())
    with pytest.raises(UsageError, match=next(iter(setting))):
        mlx_cm.load(tmp_path / "native", **setting)


# --- callbacks and output


@pytest.mark.parametrize(("batch_size", "calls"), [(1, 6), (2, 4), (3, 2)])
def test_callback_after_each_step_of_each_batch(batch_size, calls):
    seen = []
    pipeline("unconditional").generate(count=3, steps=2, batch_size=batch_size, callback=seen.append)
    assert [step.index for step in seen] == [0, 1] * (calls // 2)
    assert {step.total for step in seen} == {2}
    assert sum(step.x.shape[0] for step in seen) == 6


def test_an_interruption_ends_the_run():
    seen = []

    def callback(step):
        seen.append(step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline("unconditional").generate(count=3, steps=2, callback=callback)
    assert len(seen) == 1


def test_pictures_come_one_by_one():
    pipe = pipeline("unconditional")
    steps = []
    results = pipe.iterate(pipe.resolve(count=3), callback=steps.append)
    single, image = next(results)
    assert len(steps) == 1  # the others are not made before they are asked for
    assert single == pipe.resolve()
    assert picture_bytes([image]) == picture_bytes(pipe.generate())


@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "NaN or infinite"), (1e6, "blank"), (-1e6, "blank")], ids=str
)
def test_a_picture_that_is_none_is_refused(value, says):
    pipe = pipeline("unconditional")
    pipe.backbone.conv_out.bias = mx.full((3,), value)
    with pytest.raises(OutputError, match=says) as caught:
        pipe.generate()
    assert caught.value.exit_code == 7


def test_every_sampler_serves_a_parameterization():
    assert {sampler.parameterization for sampler in SAMPLERS.values()} == set(PARAMETERIZATIONS)
    for name, row in PARAMETERIZATIONS.items():
        assert SAMPLERS[row.sampler].parameterization == name
