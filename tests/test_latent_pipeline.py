"""Latent pipelines: whole runs against diffusers', seeds included; then what is refused, counted, kept and released.

Pictures are held to half a level of 255 but for rounding: diffusers' are compared before they become whole numbers.
"""

import gc
import inspect
import json
import math

import mlx.core as mx
import numpy as np
import pytest
import tiny_latent
import torch
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from mlx.utils import tree_map
from PIL import ExifTags, Image, ImageOps
from tiny_latent import LATENTS, PIXELS, native_autoencoder, native_pipeline, reference_pipeline

from mlx_cm.errors import ModelError, OutputError, UsageError
from mlx_cm.images import to_pil
from mlx_cm.loading import adapted_settings
from mlx_cm.lora import Adapter
from mlx_cm.metadata import new_recipe
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.pipelines import latent
from mlx_cm.pipelines.latent import LatentConsistencyPipeline, LatentSettings
from mlx_cm.rng import IMAGE_POSTERIOR, MASKED_POSTERIOR, replay_noise, torch_noise
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.tiling import decode_tiled

PROMPT = "a red (apple) on Straße 7!"
TOLERANCE = 0.6  # levels of 255
PICTURE, MASK = tiny_latent.picture(), tiny_latent.mask()

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers', on schedulers without steps_offset


@pytest.fixture(scope="module", autouse=True)
def small_models():
    """Layers this small are slower on several threads, and the libraries behind the oracles are much to look through
    for the collector that releases memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def difference(images: list[Image.Image], others) -> float:
    """Largest difference in levels of 255; the others are pictures, or arrays in [0, 1]."""
    ours = np.stack([np.asarray(image) for image in images]).astype(np.float64)
    if isinstance(others, np.ndarray):
        theirs = others * 255.0
    else:
        theirs = np.stack([np.asarray(image) for image in others]).astype(np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def as_bytes(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


# --- whole runs against diffusers, from the seed alone


def stable_diffusions_ddim(**schedule) -> DDIMScheduler:
    """As Stable Diffusion's own config has it."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | schedule
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **schedule)


T2I, I2I, INPAINT = StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
LCM_T2I, LCM_I2I, SDXL = (
    LatentConsistencyModelPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
CFG = {"guidance_scale": 1.7}
NO_CFG = {"guidance_scale": 1.0}
SIZE = {"width": 40, "height": 56}  # odd in latents, and not square
STEPS = {"num_inference_steps": 4}
# diffusers' pipelines of Stable Diffusion cut the list of timesteps, so that of 8 steps half the strength leaves 4.
HALF = {"num_inference_steps": 8, "strength": 0.5}

# family, diffusers' pipeline, its scheduler, its arguments, ours where they differ
RUNS = {
    "LCM": ("lcm", LCM_T2I, LCMScheduler, STEPS, {}),
    "LCM, one step": ("lcm", LCM_T2I, LCMScheduler, {"num_inference_steps": 1}, {"steps": 1}),
    "LCM, eight steps": ("lcm", LCM_T2I, LCMScheduler, {"num_inference_steps": 8}, {"steps": 8}),
    "LCM, other guidance": ("lcm", LCM_T2I, LCMScheduler, STEPS | {"guidance_scale": 3.5}, {"guidance_scale": 3.5}),
    "LCM, other size": ("lcm", LCM_T2I, LCMScheduler, STEPS | SIZE, SIZE),
    "LCM, original steps": (
        "lcm",
        LCM_T2I,
        LCMScheduler,
        STEPS | {"original_inference_steps": 30},
        {"original_steps": 30},
    ),
    "LCM, own timesteps": ("lcm", LCM_T2I, LCMScheduler, {"timesteps": [999, 700, 100]}, {"times": "999,700,100"}),
    "LCM, tiny autoencoder": ("lcm", LCM_T2I, LCMScheduler, STEPS, {}),
    "LCM in SD's pipeline": ("lcm", T2I, LCMScheduler, STEPS | {"guidance_scale": 8.5}, {}),
    **{
        f"LCM image to image, strength {strength}": (
            "lcm",
            LCM_I2I,
            LCMScheduler,
            {"num_inference_steps": 3, "strength": strength, "image": PICTURE},
            {"steps": 3, "strength": strength, "image": PICTURE},
        )
        for strength in (0.1, 0.58, 0.8, 1.0)
    },
    "LCM image to image, other size": (
        "lcm",
        LCM_I2I,
        LCMScheduler,
        STEPS | {"strength": 0.6, "image": tiny_latent.picture(**SIZE)},
        {"strength": 0.6, "image": tiny_latent.picture(**SIZE)},
    ),
    "LCM image to image, tiny autoencoder": (
        "lcm",
        LCM_I2I,
        LCMScheduler,
        STEPS | {"strength": 0.6, "image": PICTURE},
        {"strength": 0.6, "image": PICTURE},
    ),
    "SD": ("sd", T2I, LCMScheduler, STEPS | NO_CFG, {}),
    "SD, guidance 0 is none": ("sd", T2I, LCMScheduler, STEPS | {"guidance_scale": 0.0}, {"guidance_scale": 0}),
    "SD, guided": ("sd", T2I, LCMScheduler, STEPS | CFG, CFG),
    "SD, negative prompt": (
        "sd",
        T2I,
        LCMScheduler,
        STEPS | CFG | {"negative_prompt": "blue"},
        CFG | {"negative_prompt": "blue"},
    ),
    "SD, guided, other size": ("sd", T2I, LCMScheduler, STEPS | CFG | SIZE, CFG | SIZE),
    "SD2": ("sd2", T2I, LCMScheduler, STEPS | NO_CFG, {}),
    "SD2, negative prompt": (
        "sd2",
        T2I,
        LCMScheduler,
        STEPS | CFG | {"negative_prompt": "blue!"},
        CFG | {"negative_prompt": "blue!"},
    ),
    "TCD": ("sd", T2I, TCDScheduler, STEPS | NO_CFG | {"eta": 0.3}, {}),
    "TCD, eta 0": ("sd", T2I, TCDScheduler, STEPS | NO_CFG | {"eta": 0.0}, {"eta": 0}),
    "TCD, eta 1, guided": ("sd", T2I, TCDScheduler, STEPS | CFG | {"eta": 1.0}, CFG | {"eta": 1}),
    "TCD, SD2": ("sd2", T2I, TCDScheduler, STEPS | CFG | {"eta": 0.3}, CFG),
    "SDXL": ("xl", SDXL, LCMScheduler, STEPS | NO_CFG, {}),
    "SDXL, guided by zeros": ("xl", SDXL, LCMScheduler, STEPS | CFG, CFG),
    "SDXL, guided by the empty prompt": (
        "xl",
        SDXL,
        LCMScheduler,
        STEPS | CFG | {"negative_prompt": ""},
        CFG | {"negative_prompt": ""},
    ),
    "SDXL, negative prompt, other size": (
        "xl",
        SDXL,
        LCMScheduler,
        STEPS | CFG | SIZE | {"negative_prompt": "blue"},
        CFG | SIZE | {"negative_prompt": "blue"},
    ),
    "SDXL without zeros, guided": ("xl with empty prompts", SDXL, LCMScheduler, STEPS | CFG, CFG),
    "SDXL, TCD": ("xl", SDXL, TCDScheduler, STEPS | CFG | {"eta": 0.3}, CFG),
    "LCM-SDXL": ("xl lcm", SDXL, LCMScheduler, STEPS | {"guidance_scale": 8.0}, {}),
    "LCM-SDXL, other guidance": (
        "xl lcm",
        SDXL,
        LCMScheduler,
        STEPS | SIZE | {"guidance_scale": 2.0},
        SIZE | {"guidance_scale": 2.0},
    ),
    "SD image to image": (
        "sd",
        I2I,
        LCMScheduler,
        HALF | NO_CFG | {"image": PICTURE},
        {"image": PICTURE},
    ),
    **{
        f"{family} inpainting, {kind}": (
            family,
            INPAINT,
            LCMScheduler,
            {"image": PICTURE, "mask_image": MASK, "height": PIXELS, "width": PIXELS} | theirs,
            {"image": PICTURE, "mask": MASK} | ours,
        )
        for family in ("sd", "inpainting")
        for kind, theirs, ours in (
            ("all new", STEPS | NO_CFG | {"strength": 1.0}, {}),
            ("half strength", HALF | NO_CFG, {"strength": 0.5}),
            ("guided", STEPS | CFG | {"strength": 1.0, "negative_prompt": "blue"}, CFG | {"negative_prompt": "blue"}),
            ("half strength, guided", HALF | CFG, CFG | {"strength": 0.5}),
            ("tiny autoencoder", HALF | NO_CFG, {"strength": 0.5}),
        )
    },
    "TCD inpainting": (
        "sd",
        INPAINT,
        TCDScheduler,
        HALF | NO_CFG | {"eta": 0.3, "image": PICTURE, "mask_image": MASK, "height": PIXELS, "width": PIXELS},
        {"strength": 0.5, "image": PICTURE, "mask": MASK},
    ),
    "DDIM": ("sd", T2I, stable_diffusions_ddim, {}, {}),
    "DDIM, two steps": (
        "sd",
        T2I,
        stable_diffusions_ddim,
        {"num_inference_steps": 2} | NO_CFG,
        {"steps": 2} | NO_CFG,
    ),
    "DDIM, guided, other size": (
        "sd",
        T2I,
        stable_diffusions_ddim,
        {"num_inference_steps": 7, "negative_prompt": "blue"} | CFG | SIZE,
        {"steps": 7, "negative_prompt": "blue"} | CFG | SIZE,
    ),
    "DDIM, SD2": ("sd2", T2I, stable_diffusions_ddim, {"num_inference_steps": 6}, {"steps": 6}),
    "DDIM, SDXL": (
        "xl",
        SDXL,
        stable_diffusions_ddim,
        {"num_inference_steps": 5, "guidance_scale": 7.5},
        {"steps": 5},
    ),
    **{
        f"DDIM image to image, strength {strength}": (
            "sd",
            I2I,
            stable_diffusions_ddim,
            {"num_inference_steps": 9, "strength": strength, "image": PICTURE} | CFG,
            {"steps": 9, "strength": strength, "image": PICTURE} | CFG,
        )
        for strength in (0.2, 0.58, 1.0)
    },
    **{
        f"DDIM inpainting, {family}": (
            family,
            INPAINT,
            stable_diffusions_ddim,
            {"num_inference_steps": 6, "strength": 0.7, "height": PIXELS, "width": PIXELS}
            | CFG
            | {"image": PICTURE, "mask_image": MASK},
            {"steps": 6, "strength": 0.7, "image": PICTURE, "mask": MASK} | CFG,
        )
        for family in ("sd", "inpainting")
    },
    "inpainting, other size": (
        "inpainting",
        INPAINT,
        LCMScheduler,
        HALF | NO_CFG | SIZE | {"image": tiny_latent.picture(64, 64), "mask_image": tiny_latent.mask(64, 64)},
        SIZE | {"strength": 0.5, "image": tiny_latent.picture(64, 64), "mask": tiny_latent.mask(64, 64)},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_seed_makes_the_picture_of_diffusers(name):
    family, pipeline, scheduler, theirs, ours = RUNS[name]
    vae = "tiny" if name.endswith("tiny autoencoder") else "kl"
    reference = reference_pipeline(family, pipeline, scheduler, vae=vae)
    expected = reference(PROMPT, generator=torch.Generator().manual_seed(3), output_type="np", **theirs).images
    sampler = {LCMScheduler: "lcm", TCDScheduler: "tcd", stable_diffusions_ddim: "ddim"}[scheduler]
    made = native_pipeline(family, vae=vae).generate(PROMPT, seed=3, rng="torch", sampler=sampler, **ours)
    assert expected.std() > 0.05  # not a blank or clipped picture that anything would match
    assert difference(made, expected) < TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["lcm", "sd", "xl"])
def test_several_seeds_and_prompts(family, batch_size):
    """diffusers takes one generator per picture; here two prompts make two pictures each."""
    pipeline = {"lcm": LCM_T2I, "sd": T2I, "xl": SDXL}[family]
    options = {"guidance_scale": 8.5 if family == "lcm" else 1.7}
    expected = reference_pipeline(family, pipeline, LCMScheduler)(
        ["a red apple", "two blue bears"],
        num_images_per_prompt=2,
        num_inference_steps=3,
        generator=generators(5, 6, 5, 6),
        output_type="np",
        **SIZE,
        **options,
    ).images
    made = native_pipeline(family).generate(
        ["a red apple", "two blue bears"],
        seed=5,
        count=2,
        steps=3,
        rng="torch",
        sampler="lcm",
        batch_size=batch_size,
        **SIZE,
        **options,
    )
    assert difference(made, expected) < TOLERANCE


def test_several_pictures_from_a_picture():
    expected = reference_pipeline("lcm", LCM_I2I, LCMScheduler)(
        PROMPT,
        image=PICTURE,
        strength=0.5,
        num_images_per_prompt=2,
        num_inference_steps=2,
        generator=generators(1, 8),
        output_type="np",
    ).images
    options = {"image": PICTURE, "strength": 0.5, "steps": 2, "seed": [1, 8], "rng": "torch"}
    for batch_size in (1, 2):
        assert (
            difference(native_pipeline("lcm").generate(PROMPT, batch_size=batch_size, **options), expected) < TOLERANCE
        )


def test_every_setting_changes_the_picture():
    """What the comparisons above would miss, were it ignored on both sides."""
    pipeline = native_pipeline("sd")
    settings = {"prompt": PROMPT, "sampler": "lcm", "seed": 3, "negative_prompt": "blue", "rng": "torch"} | CFG
    plain = pipeline.generate(**settings)
    for change in (
        {"prompt": "two blue bears"},
        {"negative_prompt": "green"},
        {"guidance_scale": 2.5},
        {"seed": 4},
        {"steps": 3},
        {"sampler": "tcd"},
        {"rng": "mlx"},
        {"image": PICTURE},
        {"image": PICTURE, "mask": MASK},
        {"original_steps": 10},
    ):
        assert difference(pipeline.generate(**settings | change), plain) > 3, change


# --- replayed noise


def test_replayed_noise_makes_the_picture_of_diffusers():
    generator = torch.Generator().manual_seed(9)
    start, *draws = (torch.randn((1, 4, LATENTS, LATENTS), generator=generator) for _ in range(4))
    start = 0.9 * start  # no generator's
    generator = torch.Generator().manual_seed(9)
    torch.randn((1, 4, LATENTS, LATENTS), generator=generator)
    expected = reference_pipeline("lcm", LCM_T2I, LCMScheduler)(
        PROMPT, num_inference_steps=4, latents=start, generator=generator, output_type="np"
    ).images
    noise = replay_noise([draw.numpy().transpose(0, 2, 3, 1) for draw in (start, *draws)])
    assert difference(native_pipeline("lcm").generate(PROMPT, noise=noise), expected) < TOLERANCE


REPLAYED = [
    ("lcm", {}, {0, 1, 2, 3}),
    ("lcm", {"image": PICTURE}, {IMAGE_POSTERIOR, 0, 1, 2, 3}),
    ("sd", {"image": PICTURE, "mask": MASK, "sampler": "lcm"}, {IMAGE_POSTERIOR, MASKED_POSTERIOR, 0, 1, 2, 3}),
    ("inpainting", {"image": PICTURE, "mask": MASK, "sampler": "lcm"}, {MASKED_POSTERIOR, 0, 1, 2, 3}),
    ("sd", {"sampler": "tcd", "eta": 0}, {0}),
]


@pytest.mark.parametrize(("family", "settings", "indices"), REPLAYED)
def test_recorded_draws_make_the_same_bytes(family, settings, indices):
    pipeline, recorded = native_pipeline(family), {}
    source = torch_noise([4, 5])

    def recording(shape, index):
        recorded[index] = source(shape, index)
        return recorded[index]

    made = pipeline.generate(PROMPT, seed=[4, 5], noise=recording, **settings)
    assert set(recorded) == indices
    assert as_bytes(pipeline.generate(PROMPT, seed=[4, 5], noise=replay_noise(recorded), **settings)) == as_bytes(made)
    from_seeds = pipeline.generate(PROMPT, seed=[4, 5], rng="torch", batch_size=2, **settings)
    assert as_bytes(from_seeds) == as_bytes(made)


def test_an_autoencoder_without_posterior_draws_nothing():
    noise = replay_noise({0: np.zeros((1, LATENTS, LATENTS, 4)), 1: np.ones((1, LATENTS, LATENTS, 4))})
    made = native_pipeline("lcm", vae="tiny").generate(PROMPT, image=PICTURE, steps=2, noise=noise)
    assert len(made) == 1


# --- the same picture again


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("lcm", {"rng": "mlx"}),
        ("sd", CFG | {"negative_prompt": "blue", "sampler": "tcd", "rng": "torch"}),
        ("xl", CFG | {"sampler": "lcm", "rng": "mlx"}),
        ("inpainting", {"image": PICTURE, "mask": MASK, "sampler": "lcm", "rng": "torch"}),
    ],
)
def test_a_picture_is_the_same_whatever_is_made_with_it(family, settings):
    settings = settings | {"steps": 2}
    pipeline = native_pipeline(family)
    together = pipeline.generate([PROMPT, "two bears"], seed=7, count=3, **settings)
    assert len({image.tobytes() for image in together}) == 6
    assert as_bytes(pipeline.generate([PROMPT, "two bears"], seed=7, count=3, **settings)) == as_bytes(together)
    alone = [
        pipeline.generate(prompt, seed=seed, **settings)[0] for prompt in (PROMPT, "two bears") for seed in (7, 8, 9)
    ]
    assert as_bytes(alone) == as_bytes(together)
    for batch_size in (4, 6):  # equal but for roundings of float32, which move a value over a level's edge
        batched = pipeline.generate([PROMPT, "two bears"], seed=7, count=3, batch_size=batch_size, **settings)
        assert difference(batched, together) <= 1


def test_requests_of_single_pictures_make_them_again():
    pipeline = native_pipeline("sd")
    request = pipeline.resolve([PROMPT, "two bears"], seed=[7, 20], steps=2, sampler="lcm")
    results = list(pipeline.iterate(request))
    assert [(single.prompts, single.seeds) for single, _ in results] == [
        ((PROMPT,), (7,)),
        ((PROMPT,), (20,)),
        (("two bears",), (7,)),
        (("two bears",), (20,)),
    ]
    for single, image in results:
        ((_, again),) = pipeline.iterate(single)
        assert again.tobytes() == image.tobytes()


@pytest.mark.parametrize("vae", ["kl", "tiny"])
@pytest.mark.parametrize("family", ["sd", "inpainting"])
def test_pictures_from_a_picture_can_be_made_at_once(family, vae):
    """Whether or not the autoencoder draws for each of them."""
    pipeline = native_pipeline(family, vae=vae)
    settings = CFG | {"count": 2, "steps": 2, "sampler": "lcm", "image": PICTURE, "mask": MASK, "strength": 0.7}
    one_by_one = pipeline.generate(PROMPT, **settings)
    assert difference(pipeline.generate(PROMPT, batch_size=2, **settings), one_by_one) <= 1


# --- what is computed, and how often


class Watched:
    """A part of a pipeline that remembers what it was called with."""

    def __init__(self, part):
        self.part, self.calls, self.prepared = part, [], 0

    def __call__(self, first, *others, **named):
        self.calls.append(first.shape)
        return self.part(first, *others, **named)

    def prepare(self, *args, **named):
        self.prepared += 1
        return self.part.prepare(*args, **named)

    def __getattr__(self, name):
        return getattr(self.part, name)


def watched_pipeline(family: str, **parts):
    made = native_pipeline(family)
    return native_pipeline(
        family, backbone=Watched(made.backbone), text_encoders=[Watched(one) for one in made.text_encoders], **parts
    )


@pytest.mark.parametrize(
    ("family", "settings", "encoded", "batch"),
    [
        ("lcm", {}, 2, 1),
        ("sd", {"sampler": "lcm"}, 2, 1),
        ("sd", {"sampler": "lcm", "guidance_scale": 0}, 2, 1),
        ("sd", CFG | {"sampler": "lcm"}, 3, 2),
        ("sd", CFG | {"sampler": "tcd", "negative_prompt": "blue"}, 3, 2),
        ("xl", CFG | {"sampler": "lcm"}, 2, 2),  # zeros for the empty prompt
        ("xl", CFG | {"sampler": "lcm", "negative_prompt": "blue"}, 3, 2),
        ("xl lcm", {"guidance_scale": 4.0}, 2, 1),
    ],
)
def test_a_prompt_is_encoded_once(family, settings, encoded, batch):
    pipeline = watched_pipeline(family)
    pipeline.generate([PROMPT, "two bears"], count=3, steps=2, **settings)
    for encoder in pipeline.text_encoders:
        assert encoder.calls == [(1, 77)] * encoded
    assert pipeline.backbone.prepared == 2
    assert pipeline.backbone.calls == [(batch, LATENTS, LATENTS, 4)] * (2 * 3 * 2)


@pytest.mark.parametrize(("settings", "batches"), [({}, [2, 2, 2]), (CFG, [4, 4, 4])])
def test_a_prompt_is_encoded_once_for_all_batches(settings, batches):
    """Batches that cut across the prompts."""
    pipeline = watched_pipeline("sd")
    pipeline.generate([PROMPT, "two bears"], count=3, steps=1, sampler="lcm", batch_size=2, **settings)
    assert [shape[0] for shape in pipeline.backbone.calls] == batches
    assert len(pipeline.text_encoders[0].calls) == 2 + bool(settings)


def test_a_picture_is_encoded_once(monkeypatch):
    vae = native_autoencoder("kl")
    encoded, encode = [], type(vae).encode
    monkeypatch.setattr(type(vae), "encode", lambda self, x: encoded.append(x.shape) or encode(self, x))
    whole = (1, PIXELS, PIXELS, 3)
    for family, strength, times in (("sd", 1.0, 1), ("inpainting", 1.0, 1), ("inpainting", 0.5, 2)):
        pipeline = native_pipeline(family, autoencoder=vae)
        settings = {"image": PICTURE, "mask": MASK, "strength": strength}
        pipeline.generate(PROMPT, count=3, steps=1, sampler="lcm", **settings)
        assert encoded == [whole] * times, (family, strength)
        encoded.clear()


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("low_ram", [False, True])
def test_an_interrupt_ends_the_work_at_its_step(stop, low_ram):
    pipeline = watched_pipeline("lcm")

    def callback(step):
        if step.index == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate(PROMPT, count=2, callback=callback, low_ram=low_ram)
    assert len(pipeline.backbone.calls) == stop + 1


def test_callback_sees_every_step_of_every_batch():
    steps = []
    pipeline = native_pipeline("lcm")
    pipeline.generate(PROMPT, count=3, steps=2, batch_size=2, callback=steps.append)
    assert [(step.index, step.total, step.t, step.x.shape) for step in steps] == [
        (0, 2, 999, (2, LATENTS, LATENTS, 4)),
        (1, 2, 499, (2, LATENTS, LATENTS, 4)),
        (0, 2, 999, (1, LATENTS, LATENTS, 4)),
        (1, 2, 499, (1, LATENTS, LATENTS, 4)),
    ]
    (preview,) = pipeline.preview(steps[-1].x)
    assert preview.size == (LATENTS, LATENTS)


def test_latents_of_the_last_step_are_what_is_decoded():
    pipeline, steps = native_pipeline("lcm"), []
    (made,) = pipeline.generate(PROMPT, callback=steps.append)
    assert to_pil(pipeline.decode(steps[-1].x))[0].tobytes() == made.tobytes()


# --- memory


LOW_RAM = [
    ("lcm", {}),
    ("sd", CFG | {"sampler": "lcm", "negative_prompt": "blue"}),
    ("xl", CFG | {"sampler": "tcd"}),
    ("inpainting", {"sampler": "lcm", "image": PICTURE, "mask": MASK}),
]


@pytest.mark.parametrize(("family", "settings"), LOW_RAM)
def test_low_ram_makes_the_same_bytes(family, settings):
    settings = {"prompt": [PROMPT, "two bears"], "seed": 4, "count": 2, "steps": 2} | settings
    expected = native_pipeline(family).generate(**settings)
    assert as_bytes(native_pipeline(family).generate(low_ram=True, **settings)) == as_bytes(expected)


def test_low_ram_takes_replayed_noise():
    expected = native_pipeline("lcm").generate(PROMPT, seed=[1, 2], noise=torch_noise([1, 2]))
    made = native_pipeline("lcm").generate(PROMPT, seed=[1, 2], noise=torch_noise([1, 2]), low_ram=True)
    assert as_bytes(made) == as_bytes(expected)


def test_low_ram_encodes_before_and_releases_each_part():
    seen = []
    pipeline = watched_pipeline("xl")
    encoders = pipeline.text_encoders

    def callback(step):
        seen.append((pipeline.text_encoders[0] is encoders[0], len(encoders[0].calls)))

    pipeline.generate(
        [PROMPT, "two bears"],
        count=2,
        steps=1,
        sampler="lcm",
        low_ram=True,
        callback=callback,
        negative_prompt="blue",
        **CFG,
    )
    assert seen == [(False, 3)] * 4  # two prompts and the negative one, before the first step
    assert not isinstance(pipeline.backbone, Watched)


def test_a_released_pipeline_says_so():
    pipeline = native_pipeline("sd")
    request = pipeline.resolve(PROMPT, steps=1, sampler="lcm")
    ((single, _),) = pipeline.iterate(request, low_ram=True)
    assert pipeline.recipe(single)["dtype"] == "float32"  # a recipe is written after the work
    context = native_pipeline("sd").prepare(request)
    for use in (
        lambda: pipeline.generate(PROMPT, steps=1, sampler="lcm"),
        lambda: pipeline.generate(PROMPT, steps=1, sampler="lcm", low_ram=True),
        lambda: list(pipeline.iterate(request)),
        lambda: list(pipeline.interpolate([PROMPT, PROMPT], [1, 2], steps=1, sampler="lcm")),
        lambda: pipeline.prepare(request),
        lambda: pipeline.encode_prompt([PROMPT]),
        lambda: pipeline.sample(request),
        lambda: pipeline.sample(request, context=context),
    ):
        with pytest.raises(UsageError, match="released") as caught:
            use()
        assert caught.value.hint == "load the model again"


def test_large_pictures_are_decoded_and_encoded_in_tiles(monkeypatch):
    monkeypatch.setattr(latent, "WHOLE_UP_TO", 6)
    monkeypatch.setattr(latent, "TILE", 4)
    vae = native_autoencoder("kl")
    sides = {"encode": [], "decode": []}
    for name in sides:
        method = getattr(type(vae), name)

        def watched(self, x, name=name, method=method):
            sides[name].append(max(x.shape[1:3]))
            return method(self, x)

        monkeypatch.setattr(type(vae), name, watched)
    pipeline = native_pipeline("lcm", autoencoder=vae)
    settings = {"image": tiny_latent.picture(72, 40), "steps": 1, "rng": "torch"}
    (made,) = pipeline.generate(PROMPT, **settings)
    assert made.size == (72, 40)
    assert set(sides["encode"]) == {32}
    assert set(sides["decode"]) == {4}
    z = pipeline.sample(pipeline.resolve(PROMPT, **settings))
    (expected,) = to_pil(decode_tiled(vae.decode_scaled, z, tile=4, scale=8))
    assert made.tobytes() == expected.tobytes()
    for name in sides:
        sides[name].clear()
    pipeline.generate(PROMPT, width=48, height=48, steps=1, image=PICTURE)
    assert sides == {"encode": [48], "decode": [6]}  # whole up to the limit
    for name in sides:
        sides[name].clear()
    pipeline.generate(PROMPT, width=48, height=48, steps=1, image=PICTURE, tiled=True)
    assert (set(sides["encode"]), set(sides["decode"])) == ({32}, {4})  # below it on request


# --- half precision


def half(module):
    module.update(tree_map(lambda x: x.astype(mx.float16), module.parameters()))
    return module


def overflowing(kind: str):
    """An autoencoder in half precision whose weights are in its range, and the values before the last layer are not."""
    module = native_autoencoder(kind)
    if kind == "kl":
        module.decoder.conv_norm_out.weight = module.decoder.conv_norm_out.weight * 5e4
        last = module.decoder.conv_out
    else:
        *_, block, last = module.decoder.layers
        block.conv[2].bias = block.conv[2].bias + 100
        block.conv[4].weight = block.conv[4].weight * 3e4
    last.weight = last.weight * 1e-5
    return half(module)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_what_overflows_is_decoded_again_in_float32(kind, caplog):
    pipeline = native_pipeline("lcm", autoencoder=overflowing(kind))
    z = mx.random.normal((1, LATENTS, LATENTS, 4), key=mx.random.key(0))
    assert not mx.isfinite(pipeline.autoencoder.decode_scaled(z)).all()
    images = pipeline.decode(z)
    assert mx.isfinite(images).all()
    assert "float32" in caplog.text
    assert mx.array_equal(pipeline.decode(z), images)
    assert caplog.text.count("float32") == 1  # the decoder stays in float32


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("is_half", [False, True])
def test_what_stays_without_numbers_is_an_error(kind, is_half):
    vae = native_autoencoder(kind)
    last = vae.decoder.conv_out if kind == "kl" else vae.decoder.layers[-1]
    last.bias = last.bias + mx.array([0, math.nan, 0])
    pipeline = native_pipeline("lcm", autoencoder=half(vae) if is_half else vae)
    with pytest.raises(OutputError, match="NaN or infinite") as caught:
        pipeline.generate(PROMPT, steps=1)
    assert caught.value.exit_code == 7


def test_a_blank_picture_is_an_error():
    vae = native_autoencoder("tiny")
    vae.decoder.layers[-1].weight = mx.zeros_like(vae.decoder.layers[-1].weight)
    vae.decoder.layers[-1].bias = mx.zeros(3)
    with pytest.raises(OutputError, match="blank"):
        native_pipeline("lcm", autoencoder=vae).generate(PROMPT, steps=1)


def test_a_float32_decoder_is_left_alone():
    vae = native_autoencoder("kl")
    pipeline = native_pipeline("lcm", autoencoder=vae)
    assert not mx.isfinite(pipeline.decode(mx.full((1, 2, 2, 4), math.nan))).any()


# --- prompts


def test_brackets_are_text_unless_weights_are_asked_for():
    pipeline = native_pipeline("sd")
    settings = {"sampler": "lcm", "steps": 2}

    def made(prompt, **others):
        return pipeline.generate(prompt, **settings, **others)[0]

    assert difference([made("a (red:1.6) apple")], [made("a (red:1.6) apple", prompt_weights=True)]) > 0
    assert difference([made("a red apple", prompt_weights=True)], [made("a (red:1.6) apple", prompt_weights=True)]) > 0
    assert made("a red apple").tobytes() == made("a red apple", prompt_weights=True).tobytes()
    assert made("a red apple").tobytes() == made("a (red:1.0) apple", prompt_weights=True).tobytes()


def test_weights_count_in_negative_prompts_and_in_both_encoders():
    pipeline = native_pipeline("xl")
    settings = CFG | {"sampler": "lcm", "steps": 2, "prompt_weights": True}
    plain = pipeline.generate(PROMPT, negative_prompt="a blue bear", **settings)
    assert difference(pipeline.generate(PROMPT, negative_prompt="a (blue:2) bear", **settings), plain) > 0
    plain, weighted = (pipeline.encode_prompt([text], weighted=True).states for text in ("a bear", "a (bear:2)"))
    for part in (slice(None, 32), slice(32, None)):
        assert not mx.allclose(plain[..., part], weighted[..., part], rtol=1e-2)


@pytest.mark.parametrize("prompt", ["", " ", "\t\n"])
@pytest.mark.parametrize("settings", [{}, CFG])
def test_an_empty_prompt_is_valid(prompt, settings):
    for family in ("sd", "xl"):
        options = {"generator": generators(0)[0], "output_type": "np", "num_inference_steps": 2}
        pipeline = {"sd": T2I, "xl": SDXL}[family]
        expected = reference_pipeline(family, pipeline, LCMScheduler)(
            prompt, **options, **{**NO_CFG, **settings}
        ).images
        made = native_pipeline(family).generate(prompt, steps=2, rng="torch", sampler="lcm", **settings)
        assert difference(made, expected) < TOLERANCE


LONG = "apple " * 80


@pytest.mark.parametrize("low_ram", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": LONG},
        {"prompt": ["short", LONG]},
        {"prompt": "short", "negative_prompt": LONG},
        {"prompt": LONG, "prompt_weights": True},
        {"prompt": "short", "negative_prompt": f"({LONG}:1.2)", "prompt_weights": True},
    ],
)
def test_a_long_prompt_is_refused_before_any_work(settings, low_ram):
    pipeline = watched_pipeline("sd")
    with pytest.raises(UsageError, match="too long"):
        pipeline.generate(sampler="lcm", low_ram=low_ram, **CFG, **settings)
    assert pipeline.text_encoders[0].calls == []
    assert pipeline.backbone.calls == []


# --- pictures given


def test_a_picture_lies_as_its_orientation_says():
    turned = tiny_latent.picture(64, 32)
    turned.getexif()[ExifTags.Base.Orientation] = 6
    pipeline = native_pipeline("lcm")
    (made,) = pipeline.generate(PROMPT, image=turned, steps=1)
    (expected,) = pipeline.generate(PROMPT, image=ImageOps.exif_transpose(turned), steps=1)
    assert made.size == (32, 64)
    assert made.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("given", "made"), [((70, 47), (64, 40)), ((8, 8), (8, 8)), ((5, 30), (8, 24))])
def test_size_comes_from_the_picture(given, made):
    request = native_pipeline("lcm").resolve(PROMPT, image=Image.new("RGB", given))
    assert (request.width, request.height) == made


def test_size_comes_from_the_model():
    request = native_pipeline("lcm").resolve(PROMPT)
    assert (request.width, request.height) == (PIXELS, PIXELS)
    request = native_pipeline("lcm").resolve(PROMPT, image=PICTURE, width=64)
    assert (request.width, request.height) == (64, PIXELS)


def mask_variants() -> dict[str, Image.Image]:
    grey = np.asarray(MASK)
    palette = MASK.convert("RGB").quantize(256)
    return {
        "L": MASK,
        "RGB": MASK.convert("RGB"),
        "opaque RGBA": MASK.convert("RGBA"),
        "palette": palette if np.array_equal(np.asarray(palette.convert("L")), grey) else MASK.convert("P"),
        "black and white": MASK.point(lambda v: 255 * (v >= 128)).convert("1"),
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
    }


@pytest.mark.parametrize("kind", mask_variants())
def test_a_mask_means_the_same_in_every_mode(kind):
    pipeline = native_pipeline("sd")
    settings = {"image": PICTURE, "steps": 1, "sampler": "lcm"}
    (made,) = pipeline.generate(PROMPT, mask=mask_variants()[kind], **settings)
    (expected,) = pipeline.generate(PROMPT, mask=MASK, **settings)
    assert made.tobytes() == expected.tobytes()


def test_the_kept_part_is_kept():
    """With a mask of no white at all the latents are those of the picture."""
    pipeline = native_pipeline("sd", vae="tiny")
    settings = {"image": PICTURE, "steps": 2, "sampler": "lcm"}
    black, white = (Image.new("L", PICTURE.size, level) for level in (0, 255))
    kept = pipeline.sample(pipeline.resolve(PROMPT, mask=black, **settings))
    shown = pipeline.prepare_pictures(pipeline.resolve(PROMPT, mask=black, **settings))
    assert mx.allclose(kept, shown.known, atol=1e-6)
    anew = pipeline.generate(PROMPT, mask=white, **settings)
    assert as_bytes(anew) == as_bytes(pipeline.generate(PROMPT, steps=2, sampler="lcm"))


# --- what is refused

BAD_MASK = Image.new("L", (PIXELS, PIXELS + 1), 255)
SEE_THROUGH = Image.new("RGBA", PICTURE.size, (255, 255, 255, 0))
REFUSALS = [
    # family, settings, what the message says, the hint
    ("lcm", {"negative_prompt": "blue"}, "negative_prompt: .*baked in", None),
    ("xl lcm", {"negative_prompt": ""}, "negative_prompt: .*baked in", None),
    ("sd", {"negative_prompt": "blue"}, "guidance_scale is 1, so .* no effect", "--guidance 1.5"),
    ("sd", {"negative_prompt": "blue", "guidance_scale": 0}, "guidance_scale is 0", "--guidance 1.5"),
    *(
        (family, {"guidance_scale": scale}, "guidance_scale .*: expected a number of 0 or more", None)
        for family in ("lcm", "sd")
        for scale in (math.nan, math.inf, -0.1, -math.inf)
    ),
    ("sd", {"guidance_scale": 0.5}, "would have no effect", "--guidance 1"),
    ("sd", {"width": 44}, "width 44: expected a multiple of 8", "--width 48"),
    ("sd", {"height": 41}, "height 41: expected a multiple of 8", "--height 40"),
    ("sd", {"width": 3}, "width 3", "--width 8"),
    ("sd", {"width": 0}, "width 0: expected a multiple of 8", f"--width {PIXELS}"),
    ("sd", {"height": -8}, "height -8: expected a multiple of 8", "--height 8"),
    ("sd", {"steps": 0}, "steps 0: expected 1 to 50", None),
    ("sd", {"steps": -1}, "steps -1", None),
    ("sd", {"steps": 51}, "steps 51: expected 1 to 50", None),
    ("sd", {"steps": 11, "original_steps": 10}, "steps 11: expected 1 to 10", None),
    ("sd", {"steps": 26, "image": PICTURE, "strength": 0.5}, "strength 0.5 leaves 25", None),
    ("sd", {"original_steps": 0}, "original steps 0", None),
    ("sd", {"original_steps": 1001}, "original steps 1001", None),
    *(
        ("sd", {"image": PICTURE, "strength": strength}, "strength .*: expected above 0", None)
        for strength in (0, 0.0, -0.5, 1.5, math.nan, math.inf)
    ),
    ("sd", {"strength": 0.5}, "strength: needs a picture", "--image PATH"),
    ("sd", {"mask": MASK}, "mask: needs a picture", "--image PATH"),
    ("sd", {"image": PICTURE, "mask": BAD_MASK}, "mask: is 32x33, the picture 32x32", None),
    ("sd", {"image": PICTURE, "mask": SEE_THROUGH}, "mask: is transparent in places", None),
    ("inpainting", {}, "image: this model fills in a part", "--image PATH --mask PATH"),
    ("inpainting", {"image": PICTURE}, "mask: this model fills in a part", "--mask PATH"),
    ("inpainting", {"mask": MASK}, "mask: needs a picture", "--image PATH"),
    ("sd", {"sampler": "euler"}, "sampler 'euler': expected auto, lcm, tcd", None),
    ("sd", {"sampler": "auto"}, "sampler auto: this is a base model", "--lora"),
    ("lcm", {"sampler": "tcd"}, "sampler 'tcd': this model was distilled for lcm", None),
    ("lcm", {"sampler": "ddim"}, "sampler 'ddim': this model was distilled with its guidance baked in", None),
    ("sd", {"sampler": "auto"}, "sampler auto: this is a base model", "--sampler ddim"),
    ("sd", {"sampler": "ddim", "eta": 0.3}, "eta: the ddim sampler has no such setting", None),
    ("sd", {"sampler": "ddim", "original_steps": 20}, "original_steps: the ddim sampler has no such setting", None),
    *(("sd", {"sampler": "ddim", "steps": steps}, f"steps {steps}: expected 2 to 999", None) for steps in (0, 1, 1000)),
    (
        "sd",
        {"sampler": "ddim", "steps": 9, "image": PICTURE, "strength": 0.1},
        "strength 0.1: leaves none of 9 steps",
        None,
    ),
    ("lcm", {"eta": 0.3}, "eta: the lcm sampler has no such setting", None),
    *(
        ("sd", {"sampler": "tcd", "eta": eta}, "eta .*: expected 0 to 1", None)
        for eta in (-0.1, 1.1, math.nan, math.inf)
    ),
    ("sd", {"labels": [1]}, "labels: this model is told by a prompt .* no effect", None),
    *(("sd", {"times": times}, "times .*: expected auto", None) for times in ("", "a", "999,", "999;499", 999, [None])),
    ("sd", {"times": []}, "times: the list is empty", "--times 999"),
    ("sd", {"times": "499,999"}, "times 499, 999: timesteps must descend", None),
    ("sd", {"times": "999,999"}, "must descend", None),
    ("sd", {"times": "1000"}, "times 1000: .* lies in 0 to 999", None),
    ("sd", {"times": "-1"}, "times -1: .* lies in 0 to 999", None),
    ("sd", {"times": "99.5"}, "whole number", None),
    ("sd", {"times": "nan"}, "whole number", None),
    ("sd", {"times": "999,499", "steps": 3}, "steps 3: the times given are 2", None),
    ("sd", {"times": "999,499", "original_steps": 20}, "original_steps: the times are given", None),
    ("sd", {"times": "999", "image": PICTURE, "strength": 0.5}, "strength 0.5: starts below timestep 500", None),
    ("sd", {"seed": -1}, "seed -1", None),
    ("sd", {"seed": [3, 3]}, "same image twice", None),
    ("sd", {"count": 0}, "count 0", None),
    ("sd", {"batch_size": 0}, "batch_size 0", None),
    ("sd", {"rng": "numpy"}, "rng 'numpy': expected one of mlx, torch", None),
    ("sd", {"prompt": []}, "prompt: expected text", None),
    ("sd", {"prompt": [3]}, "prompt: expected text", None),
    ("sd", {"prompt": None}, "prompt: expected text", None),
    ("sd", {"negative_prompt": 3, "guidance_scale": 2}, "negative_prompt: expected one text", None),
]


@pytest.mark.parametrize(("family", "settings", "says", "hint"), REFUSALS)
def test_refused_before_any_work(family, settings, says, hint):
    pipeline = watched_pipeline(family)
    sampler = {} if FAMILY_SAMPLERS.get(family) else {"sampler": "lcm"}
    with pytest.raises(UsageError, match=says) as caught:
        pipeline.generate(**{"prompt": PROMPT} | sampler | settings)
    assert caught.value.exit_code == 2
    if hint is not None:
        assert hint in caught.value.hint
    assert pipeline.text_encoders[0].calls == pipeline.backbone.calls == []


FAMILY_SAMPLERS = {name: family.settings.get("sampler") for name, family in tiny_latent.FAMILIES.items()}


def test_an_unknown_setting_is_a_mistake_of_the_program():
    with pytest.raises(TypeError, match="no setting 'stepz'"):
        native_pipeline("lcm").generate(PROMPT, stepz=3)


def test_a_network_without_signal_at_the_start_is_refused():
    schedule = DiscreteSchedule(rescale_betas_zero_snr=True)
    pipeline = native_pipeline("lcm", schedule=schedule)
    with pytest.raises(UsageError, match="holds no signal") as caught:
        pipeline.generate(PROMPT)
    assert caught.value.hint == "--times 979"
    assert len(pipeline.generate(PROMPT, times="979")) == 1
    schedule = DiscreteSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert len(native_pipeline("lcm", schedule=schedule).generate(PROMPT)) == 1


@pytest.mark.parametrize("channels", [3, 5, 8])
def test_a_network_of_another_task_is_refused(channels):
    config = UNet2DConditionConfig(
        **tiny_latent.BASE | {"in_channels": channels, "attention_head_dim": 4, "block_out_channels": (16, 24)}
    )
    with pytest.raises(ModelError, match=f"unet: takes {channels} channels, expected 4 .* or 9"):
        native_pipeline("sd", backbone=UNet2DCondition(config))


@pytest.mark.parametrize(
    ("fields", "says"), [({"sampler": "euler"}, "sampler"), ({"steps": 0}, "steps"), ({"sampler": "auto"}, "sampler")]
)
def test_settings_of_a_model_are_checked(fields, says):
    with pytest.raises(ValueError, match=says):
        LatentSettings(**fields)


# --- what is left open, and the recipe


def test_what_is_left_open_is_filled_in():
    request = native_pipeline("lcm").resolve(PROMPT)
    assert request.times == (999, 759, 499, 259)
    assert (request.sampler, request.eta, request.guidance_scale, request.strength) == ("lcm", None, 8.5, None)
    request = native_pipeline("sd", settings=LatentSettings("tcd", 1.3, steps=2)).resolve(PROMPT, image=PICTURE)
    assert request.times == (499, 259)
    assert (request.sampler, request.eta, request.guidance_scale, request.strength) == ("tcd", 0.3, 1.3, 0.5)
    assert native_pipeline("sd").resolve(PROMPT, image=PICTURE, mask=MASK, sampler="lcm").strength == 1.0


BASE, TEACHER, DISTILLED = LatentSettings(), LatentSettings("ddim", 3.0, 20), LatentSettings("tcd", 1.3, 2)


@pytest.mark.parametrize(
    ("settings", "sampler", "resolved", "steps", "guidance_scale"),
    [
        (BASE, "lcm", "lcm", 4, 1.0),
        (BASE, "ddim", "ddim", 50, 7.5),
        (TEACHER, "auto", "ddim", 20, 3.0),
        (TEACHER, "lcm", "lcm", 4, 1.0),
        (DISTILLED, "auto", "tcd", 2, 1.3),
        (DISTILLED, "ddim", "ddim", 50, 7.5),
    ],
)
def test_each_kind_of_sampler_has_its_own_defaults(settings, sampler, resolved, steps, guidance_scale):
    request = native_pipeline("sd", settings=settings).resolve(PROMPT, sampler=sampler)
    assert (request.sampler, len(request.times), request.guidance_scale) == (resolved, steps, guidance_scale)


@pytest.mark.parametrize(
    ("settings", "samplers", "expected"),
    [
        (BASE, [], BASE),
        (BASE, [None], BASE),
        (BASE, ["lcm", None], LatentSettings("lcm")),
        (TEACHER, [], TEACHER),
        (TEACHER, ["lcm", "lcm"], LatentSettings("lcm")),  # with the defaults of few steps
        (DISTILLED, ["tcd"], DISTILLED),
    ],
)
def test_an_adapter_says_how_a_model_that_is_not_distilled_is_used(settings, samplers, expected):
    adapters = [(Adapter("a", {}, sampler=sampler), 0.5) for sampler in samplers]
    assert adapted_settings(settings, [*adapters, (Adapter("off", {}, sampler="tcd"), 0.0)]) == expected


@pytest.mark.parametrize(
    ("settings", "samplers"), [(BASE, ["lcm", "tcd"]), (TEACHER, ["lcm", "tcd"]), (DISTILLED, ["lcm"])]
)
def test_adapters_that_contradict(settings, samplers):
    with pytest.raises(UsageError, match="lora: distilled for lcm"):
        adapted_settings(settings, [(Adapter("a", {}, sampler=sampler), 1.0) for sampler in samplers])


@pytest.mark.parametrize(("times", "strength"), [("999,499", 1.0), ("499", 0.5), ("19", 0.02)])
@pytest.mark.parametrize("mask", [None, MASK])
def test_times_say_how_much_is_made_anew(times, strength, mask):
    request = native_pipeline("sd").resolve(PROMPT, image=PICTURE, mask=mask, times=times, sampler="lcm")
    assert request.strength == strength


RECIPES = [
    ("lcm", {}),
    ("lcm", {"seed": 12, "rng": "torch", "guidance_scale": 4, "steps": 2, "width": 40}),
    ("sd", CFG | {"sampler": "tcd", "eta": 0, "negative_prompt": "blue", "prompt_weights": True}),
    ("sd", {"sampler": "lcm", "times": [999, 500, 3]}),
    ("xl", CFG | {"sampler": "lcm", "negative_prompt": ""}),
    ("sd", {"sampler": "ddim", "negative_prompt": "blue"}),
    *(
        ("sd", CFG | {"sampler": "ddim", "steps": steps, "image": PICTURE, "strength": strength})
        for strength in (0.11, 0.58, 1.0)
        for steps in (10, 30, 501, 999)
    ),
    *(
        ("sd", {"sampler": "lcm", "image": PICTURE, "strength": strength, "original_steps": original, "steps": 1})
        for strength in (0.11, 0.3, 0.57, 0.58, 0.99, 1.0)
        for original in (10, 30, 50)
    ),
    ("inpainting", {"sampler": "lcm", "image": PICTURE, "mask": MASK, "strength": 0.55}),
    ("sd", {"sampler": "lcm", "image": PICTURE, "mask": MASK, "times": "499,99"}),
    ("lcm", {"seed": 3, "count": 3}),
    ("lcm", {"prompt": ["one", "two"], "seed": [3, 9]}),
]
SETTINGS = inspect.signature(LatentConsistencyPipeline.resolve).parameters


@pytest.mark.parametrize(("family", "settings"), RECIPES)
def test_a_recipe_resolves_to_its_request(family, settings):
    provenance = {"source": "someone/model", "revision": "abc", "weights": {"unet": "1" * 64, "vae": "2" * 64}}
    pipeline = native_pipeline(family, provenance=provenance)
    request = pipeline.resolve(**{"prompt": PROMPT} | settings)
    recipe = pipeline.recipe(request)
    assert json.loads(json.dumps(new_recipe(recipe)))["prompt"] == recipe["prompt"]
    assert json.loads(json.dumps(recipe)) == recipe  # no tuples, no types of other libraries
    assert (recipe["model"], recipe["model_ref"], len(recipe["model_sha256"])) == (
        "someone/model",
        "someone/model@abc",
        64,
    )
    assert (recipe["dtype"], recipe["steps"]) == ("float32", len(request.times))
    again = {name: value for name, value in recipe.items() if name in SETTINGS and value is not None}
    pictures = {name: settings[name] for name in ("image", "mask") if name in settings}
    assert pipeline.resolve(**again, **pictures) == request


def test_a_recipe_leaves_open_only_what_does_not_apply():
    pipeline = native_pipeline("lcm")
    recipe = pipeline.recipe(pipeline.resolve(PROMPT))
    left_open = {name for name, value in recipe.items() if name in SETTINGS and value is None}
    assert left_open == {"negative_prompt", "prompt_weights", "tiled", "eta", "strength"}
    not_said = SETTINGS.keys() - recipe.keys()  # pictures are given again; times and seeds say the rest
    assert not_said == {"self", "image", "mask", "count", "original_steps", "others"}
