"""Pictures that show how far a run has come: of the same noise every time, a sheet for each number of steps."""

import functools
from collections.abc import Callable

import mlx.core as mx
from PIL import Image

from mlx_cm.images import to_pil
from mlx_cm.training.data import PictureData
from mlx_cm.training.loop import Batches
from mlx_cm.training.methods import AUTOENCODER, LATENT
from mlx_cm.training.models import Trainee
from mlx_cm.training.settings import Settings

Sheet = Callable[[], list[Image.Image]]


def preview_sheets(settings: Settings, trainee: Trainee, data: PictureData, batches: Batches) -> dict[str, Sheet]:
    """The sheets of a run by what they add to a file's name; each is made anew, of the weights of the moment.

    Blank pictures are shown too: early in a run they are.

    Raises:
        UsageError: what the settings ask for cannot be made with this model.
    """
    chosen = settings.samples
    if not settings.train.sample_every:
        return {}
    if trainee.space == AUTOENCODER:
        count = min(chosen.count, settings.train.batch_size)
        return {"": functools.partial(_reconstructed, trainee, batches, count)}
    generated = _of_prompts if trainee.space == LATENT else _of_pixels
    return {f"_{steps}": generated(settings, trainee, data, steps) for steps in chosen.steps}


def _reconstructed(trainee: Trainee, batches: Batches, count: int) -> list[Image.Image]:
    """Pictures of the first batch, each beside what the autoencoder makes of it."""
    rows, vae = batches.load(0, 0, count)["x0"], trainee.modules["vae"]
    decoded = mx.clip(vae.decode(vae.encode(rows)[0]), -1, 1)
    return [picture for pair in zip(to_pil(rows), to_pil(decoded), strict=True) for picture in pair]


def _of_pixels(settings: Settings, trainee: Trainee, data: PictureData, steps: int) -> Sheet:
    chosen, pipeline = settings.samples, trainee.pipeline
    request = pipeline.resolve(seed=chosen.seed, count=chosen.count, steps=steps)
    return lambda: to_pil(mx.clip(pipeline.sample(request), -1, 1))


def _of_prompts(settings: Settings, trainee: Trainee, data: PictureData, steps: int) -> Sheet:
    chosen, pipeline = settings.samples, trainee.pipeline
    captions = list(dict.fromkeys(caption or "" for caption in data.captions))
    prompts = chosen.prompts or captions[:: max(1, len(captions) // chosen.count)]
    requests = [
        pipeline.resolve(
            prompts[k % len(prompts)], seed=chosen.seed + k, steps=steps, guidance_scale=chosen.guidance_scale
        )
        for k in range(chosen.count)
    ]

    def made() -> list[Image.Image]:
        latents = (pipeline.sample(request) for request in requests)
        return [picture for x in latents for picture in to_pil(mx.clip(pipeline.decode(x), -1, 1))]

    return made
