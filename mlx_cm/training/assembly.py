"""From settings, networks and data to what the loop works with: an objective, and batches for it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.loading import load_component
from mlx_cm.metrics import Distance
from mlx_cm.models.lpips import LPIPS
from mlx_cm.parameterization import edm_denoiser
from mlx_cm.storage import sha256_file
from mlx_cm.training.data import DataSettings, PictureData, PixelBatches, Progress, make_order
from mlx_cm.training.features import LatentBatches
from mlx_cm.training.loop import Batches
from mlx_cm.training.methods import AUTOENCODER, LATENT, PIXEL
from mlx_cm.training.models import Trainee, part_files
from mlx_cm.training.objectives import (
    Autoencoding,
    Consistency,
    EdmTeacher,
    LatentConsistency,
    LatentModel,
    LatentTeacher,
    Objective,
    PixelModel,
    Randomness,
    Trajectory,
    make_distance,
)
from mlx_cm.training.preparation import Size
from mlx_cm.training.settings import Settings

TEXT_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class Unlabelled:
    """Batches without the labels that the data has and the network has no use for."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def load(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        """Rows [start, stop) of a step's batch."""
        rows = self._batches.load(step, start, stop)
        rows.pop("class_labels", None)
        return rows


def make_batches(settings: Settings, trainee: Trainee, data: PictureData, progress: Progress | None = None) -> Batches:
    """The batches of a run; for latent models, everything is encoded here, once.

    Raises:
        UsageError: the data lacks labels that the network needs, or a size does not suit the network.
        Others as of `PixelBatches` and `LatentBatches`.
    """
    chosen, train = _sized(settings.data, trainee), settings.train
    order = make_order(data, chosen, train.batch_size, train.seed)
    if trainee.space != LATENT:
        config = next(iter(trainee.modules.values())).config
        batches = PixelBatches(data, order, chosen, config.in_channels, train.seed)
        classes = getattr(config, "num_class_embeds", None)
        if classes is None:
            return Unlabelled(batches)
        if data.num_classes is None or data.num_classes > classes:
            why = f"the model knows {classes} classes, the data has {data.num_classes or 'no labels'}"
            raise UsageError(str(data.path), why)
        return batches
    pipeline, is_trained = trainee.pipeline, "text_encoder" in trainee.modules
    return LatentBatches(
        data,
        order,
        chosen,
        train.seed,
        encode_pictures=lambda pixels: _posterior(pipeline.autoencoder, pixels),
        picture_model=_identity(trainee, ["vae"], pipeline.autoencoder),
        encode_prompts=None if is_trained else pipeline.encode_prompt,
        tokenize=(lambda texts: [one.encode(texts) for one in pipeline.tokenizers]) if is_trained else None,
        prompt_model="" if is_trained else _identity(trainee, TEXT_FOLDERS, *pipeline.text_encoders),
        with_time_ids=pipeline.is_xl,
        progress=progress,
    )


def _sized(data: DataSettings, trainee: Trainee) -> DataSettings:
    """The settings with the size of the network's pictures where none is given."""
    unit, own = _own_size(trainee)
    if not data.size and not own:
        raise UsageError("data.size", "is missing, and the model does not say its own", "--set data.size=512")
    chosen = data if data.size else dataclasses.replace(data, size=own)
    if trainee.space == PIXEL and chosen.target != (own, own):
        raise UsageError(f"data.size {chosen.size}", f"this network makes pictures of {own} by {own} pixels")
    if any(side % unit for side in chosen.target) or (chosen.buckets and chosen.bucket_step % unit):
        raise UsageError(f"data.size {chosen.size}", f"sides, and steps of buckets, have to be multiples of {unit}")
    if chosen.buckets and trainee.space != LATENT:
        raise UsageError("data.buckets", "is for latent models; this network has one size")
    return chosen


def _own_size(trainee: Trainee) -> tuple[int, int | Size]:
    """(pixels that sizes are multiples of, size of the network's pictures or 0 where it says none)."""
    if trainee.space != LATENT:
        (module,) = trainee.modules.values()
        return getattr(module.config, "pixels_per_latent", 1), module.config.sample_size
    unit, side = trainee.pipeline.autoencoder.config.pixels_per_latent, trainee.modules["unet"].config.sample_size
    return unit, tuple(unit * one for one in side) if isinstance(side, tuple) else unit * (side or 0)


def _posterior(autoencoder: nn.Module, pixels: mx.array) -> tuple[mx.array, mx.array | None]:
    """Mean and standard deviation of scaled latents; a tiny autoencoder has no deviation."""
    encoded = autoencoder.encode(pixels)
    if isinstance(encoded, tuple):
        return autoencoder.scaled_moments(encoded)
    return autoencoder.scaled(encoded), None


def _identity(trainee: Trainee, folders: Sequence[str], *modules: nn.Module) -> str:
    """What makes the features of frozen networks: their files, and the types that they compute in."""
    files = [
        f"{name}/{path.name} {sha256_file(path)}"
        for name in folders
        if name in trainee.copied
        for path in part_files(trainee.copied[name])
    ]
    types = {str(value.dtype) for module in modules for _, value in tree_flatten(module.parameters())}
    return "\n".join([*files, *sorted(types)])


# --- objectives


def make_objective(settings: Settings, trainee: Trainee, batches: Batches) -> Objective:
    """What a run trains for.

    Raises:
        UsageError: a setting that means nothing in this space, or LPIPS without its network.
    """
    made, random = settings.objective, Randomness(settings.train.seed)
    if trainee.space == AUTOENCODER:
        config = trainee.modules["vae"].config
        return Autoencoding(made, random, _distance(settings), config.pixels_per_latent, config.latent_channels)
    if trainee.space == LATENT:
        return _latent_objective(settings, trainee, batches, random)
    for name in ("empty_prompts", "shift"):
        if getattr(made, name, None) is not None:
            raise UsageError(f"objective.{name}", "is for latent models; this one has no prompts and no timesteps")
    pipeline = trainee.pipeline
    unet = trainee.modules["unet"]
    model = PixelModel(pipeline.schedule, pipeline.settings.noise_scale, unet.config.dropout > 0)
    if settings.method == "teacher":
        return EdmTeacher(made, model, random)
    teacher = None
    if trainee.teacher is not None:
        teacher = edm_denoiser(trainee.teacher, model.schedule, noise_scale=model.noise_scale, clip=False)
    if settings.method == "ctm":
        return Trajectory(made, model, random, _distance(settings), teacher)
    return Consistency(made, model, random, settings.train.steps, _distance(settings), teacher)


def _latent_objective(settings: Settings, trainee: Trainee, batches: Batches, random: Randomness) -> Objective:
    pipeline = trainee.pipeline
    empty = batches.prompt_rows([""])
    if pipeline.settings.force_zeros_for_empty_prompt:
        empty = {name: mx.zeros_like(row) for name, row in empty.items()}
    model = LatentModel(pipeline.schedule, empty, trainee.modules["unet"].config.time_cond_proj_dim, pipeline.is_xl)
    if settings.method == "teacher":
        for name in ("mean", "std"):
            if getattr(settings.objective, name) is not None:
                why = "is for pixel-space models; objective.shift says which timesteps are drawn"
                raise UsageError(f"objective.{name}", why)
        return LatentTeacher(settings.objective, model, random)
    skip, timesteps = settings.objective.skip, pipeline.schedule.num_train_timesteps
    if skip is not None and skip > timesteps:
        raise UsageError(f"objective.skip {skip}", f"the model has {timesteps} timesteps")
    if settings.objective.distance == "lpips":
        raise UsageError("objective.distance lpips", "compares pictures, and this model makes latents")
    return LatentConsistency(settings.objective, model, random, _distance(settings), trainee.teacher)


def _distance(settings: Settings) -> Distance:
    made, network = settings.objective, None
    if made.distance == "lpips" and made.lpips:
        folder = Path(made.lpips).expanduser()
        network = load_component(folder, "float32").freeze()
        if not isinstance(network, LPIPS):
            raise ModelError(str(folder), f"is a {type(network).__name__}, expected LPIPS")
    return make_distance(made.distance, made.distance_c, network)
