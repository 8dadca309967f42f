"""Pixel-space consistency models and their diffusion teachers: from labels and seeds to pictures."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.images import to_pil
from mlx_cm.model_folder import weights_digest
from mlx_cm.parameterization import (
    Denoiser,
    Network,
    Trajectory,
    consistency_function,
    edm_denoiser,
    trajectory_function,
)
from mlx_cm.pipelines.request import (
    alone,
    check_eta,
    check_rng,
    pictures,
    refuse_settings,
    split_request,
    told_of_machine,
    told_of_model,
)
from mlx_cm.presets import PRESETS
from mlx_cm.rng import NOISE_SOURCES, Noise, expand_seeds
from mlx_cm.samplers import (
    Callback,
    Jump,
    consistency_jump,
    euler_jump,
    heun_jump,
    sample_ctm,
    sample_multistep,
    sample_trajectory,
)
from mlx_cm.schedules import KarrasSchedule, karras_sigmas


@dataclass(frozen=True)
class PixelSettings:
    """How a checkpoint is to be used; the `sampler` section of its model index."""

    parameterization: str = "consistency"  # or another of PARAMETERIZATIONS
    noise_scale: float = 250.0  # of the conditioning on ln(sigma)
    clip_denoised: bool = True  # clip every x0 to [-1, 1]; where a trajectory model lands is none, and stays
    preset: str | None = None  # of mlx_cm.presets

    def __post_init__(self):
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization {self.parameterization!r}, expected one of {list(PARAMETERIZATIONS)}")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r}, expected one of {list(PRESETS)}")


@dataclass(frozen=True)
class Parameterization:
    """What a network is the inside of."""

    title: str
    make: Callable[..., Denoiser | Trajectory]  # (net, schedule, noise_scale=...)
    sampler: str  # the default
    clips: bool = True  # whether `make` takes `clip`


@dataclass(frozen=True)
class Sampler:
    """A named way to use a model."""

    jump: Callable[..., Jump]
    sample: Callable[..., mx.array]
    parameterization: str
    calls_per_step: int = 1  # of the network
    max_steps: int | None = None
    eta: float | None = None  # the default; None: there is no such setting


PARAMETERIZATIONS = {
    "consistency": Parameterization("a consistency model", consistency_function, "multistep"),
    "edm": Parameterization("a diffusion teacher", edm_denoiser, "heun"),
    "trajectory": Parameterization("a trajectory model", trajectory_function, "ctm", clips=False),
}
SAMPLERS = {
    "onestep": Sampler(consistency_jump, sample_multistep, "consistency", max_steps=1),
    "multistep": Sampler(consistency_jump, sample_multistep, "consistency"),
    "heun": Sampler(heun_jump, sample_trajectory, "edm", calls_per_step=2),
    "euler": Sampler(euler_jump, sample_trajectory, "edm"),
    "ctm": Sampler(functools.partial, sample_ctm, "trajectory", eta=0.0),
}

# Settings of other pipelines, and why this one has no use for them.
NO_USE = {
    "prompt": "this model has no text encoder",
    "negative_prompt": "this model has no text encoder",
    "guidance_scale": "this model was trained without guidance",
    "image": "this model starts from noise",
    "strength": "this model starts from noise",
    "mask": "this model starts from noise",
    "original_steps": "this model's steps are levels of its own grid",
    "prompt_weights": "this model has no text encoder",
    "tiled": "this model has no autoencoder",
}


PER_IMAGE = ("seeds", "labels")


@dataclass(frozen=True)
class Request:
    """A checked request: nothing is left to defaults."""

    seeds: tuple[int, ...]  # one per image
    labels: tuple[int, ...] | None  # one per image; None for an unconditional model
    times: tuple[float, ...]
    sampler: str
    eta: float | None
    rng: str


class ConsistencyModelPipeline:
    """A pixel-space model ready to generate.

    Args:
        backbone: the network F, with a `config` that gives sample_size, in_channels and num_class_embeds.
        schedule: its noise levels.
        settings: how it is used.
        provenance: what `model_index.json` says of where it comes from.

    Raises:
        ModelError: the network is told another number of levels than the settings say.
    """

    def __init__(
        self,
        backbone: nn.Module | Network,
        schedule: KarrasSchedule,
        settings: PixelSettings | None = None,
        provenance: dict[str, Any] | None = None,
    ):
        self.backbone, self.schedule = backbone, schedule
        self.settings = settings or PixelSettings()
        self.provenance = provenance or {}
        check_levels(backbone.config.trajectory, self.settings)

    @property
    def function(self) -> Denoiser | Trajectory:
        """What the network is the inside of.

        f(x, t, class_labels=...) -> x0, the consistency function or the teacher's denoiser; or of a trajectory model
        G(x, t, s, class_labels=...) -> x_s.
        """
        row = PARAMETERIZATIONS[self.settings.parameterization]
        options = {"clip": self.settings.clip_denoised} if row.clips else {}
        return row.make(self.backbone, self.schedule, noise_scale=self.settings.noise_scale, **options)

    def generate(
        self,
        *,
        labels: int | Sequence[int] | None = None,
        steps: int | None = None,
        times: str | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        sampler: str = "auto",
        eta: float | None = None,
        rng: str = "mlx",
        noise: Noise | None = None,
        callback: Callback | None = None,
        batch_size: int = 1,
        **others: Any,
    ) -> list[Image.Image]:
        """Makes pictures.

        Image k of a seed s has seed s + k, and is the same whatever else is made with it.

        Args:
            labels: class of each image, or one for all; None draws each image's class from its seed.
            steps: 1, 2, 4 or more; the published list of this length is used where the checkpoint has one.
            times: noise levels instead, descending, or one; or text as on the command line (`resolve_times`).
            seed: one, or several; each makes `count` images.
            count: images per seed.
            sampler: "auto", or one of SAMPLERS.
            eta: of the ctm sampler, how much noise is put in again, [0, 1]; None: 0.
            rng: "mlx", or "torch" for the draws of PyTorch's CPU generator.
            noise: a source of all draws instead, for a batch of all images.
            callback: called after each step of each batch.
            batch_size: images computed at once: above 1 faster on a GPU, equal up to rounding only.

        Returns:
            The pictures in the order of the seeds.

        Raises:
            UsageError: a setting is wrong or of no use to this model.
            OutputError: a picture is not finite, or blank.
        """
        request = self.resolve(
            labels=labels, steps=steps, times=times, seed=seed, count=count, sampler=sampler, eta=eta, rng=rng, **others
        )
        if noise is None:
            results = self.iterate(request, callback=callback, batch_size=batch_size)
        else:
            results = pictures([request], PER_IMAGE, [self.sample(request, noise=noise, callback=callback)])
        return [image for _, image in results]

    def iterate(
        self, request: Request, *, callback: Callback | None = None, batch_size: int = 1, low_ram: bool = False
    ) -> Iterator[tuple[Request, Image.Image]]:
        """Makes the pictures of a request one batch after the other.

        Yields:
            Each picture with the request that makes it alone.

        Raises:
            UsageError: low_ram, which is for models of several parts; or batch_size below 1.
        """
        if low_ram:
            raise UsageError("low_ram", "this model has one part, which is needed to the end")
        batches = split_request(request, PER_IMAGE, batch_size)
        return pictures(batches, PER_IMAGE, (self.sample(batch, callback=callback) for batch in batches))

    def preview(self, x: mx.array) -> list[Image.Image]:
        """Pictures of the state in the middle of sampling: it is an estimate of the image."""
        return to_pil(mx.clip(x, -1, 1))

    @property
    def weights_sha256(self) -> str | None:
        """Identifies the weights: the digest of the one weights file, or a digest of those of all."""
        return weights_digest(self.provenance.get("weights", {}))

    def recipe(self, request: Request) -> dict[str, Any]:
        """Everything that makes the pictures of a request again, in JSON's types; one seed or label stands alone."""
        config = self.backbone.config
        return {
            "task": "generate",
            **told_of_model(self.provenance, self.weights_sha256),
            "label": alone(request.labels),
            "steps": len(request.times),
            "times": list(request.times),
            "sampler": request.sampler,
            "eta": request.eta,
            "seed": alone(request.seeds),
            "rng": request.rng,
            "width": config.sample_size,
            "height": config.sample_size,
            **told_of_machine(self.backbone.conv_in.weight.dtype),
        }

    def sample(self, request: Request, *, noise: Noise | None = None, callback: Callback | None = None) -> mx.array:
        """Makes the images of a request as one batch.

        Args:
            noise: a source of all draws instead of the request's seeds.

        Returns:
            x0, float32, shape (B, H, W, C), in [-1, 1] but for what the network oversteps.
        """
        config = self.backbone.config
        noise = noise or NOISE_SOURCES[request.rng](request.seeds)
        sampler = SAMPLERS[request.sampler]
        cond = {} if request.labels is None else {"class_labels": mx.array(request.labels)}
        shape = (len(request.seeds), config.sample_size, config.sample_size, config.in_channels)
        x = request.times[0] * noise(shape, 0)
        jump = sampler.jump(self.function, **cond)
        options = {} if request.eta is None else {"eta": request.eta}
        return sampler.sample(jump, x, request.times, self.schedule, noise=noise, callback=callback, **options)

    def resolve(
        self,
        *,
        labels: int | Sequence[int] | None = None,
        steps: int | None = None,
        times: str | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        sampler: str = "auto",
        eta: float | None = None,
        rng: str = "mlx",
        **others: Any,
    ) -> Request:
        """Checks the settings of `generate` and fills in what was left open.

        Raises:
            UsageError: a setting is wrong or of no use to this model.
        """
        size = self.backbone.config.sample_size
        for name in ("width", "height"):
            value = others.pop(name, None)
            if value not in (None, size):
                raise UsageError(f"{name} {value}", f"this model makes pictures of {size} by {size} pixels only")
        refuse_settings(others, NO_USE)
        check_rng(rng)
        seeds, labels = self._seeds_and_labels(seed, count, labels)
        sampler = self._resolve_sampler(sampler)
        eta = check_eta(sampler, eta, SAMPLERS[sampler].eta)
        times = self.resolve_times(times, steps)
        limit = SAMPLERS[sampler].max_steps
        if limit is not None and len(times) > limit:
            raise UsageError(f"steps {len(times)}", f"the {sampler} sampler makes {limit}", "--sampler multistep")
        return Request(seeds, labels, times, sampler, eta, rng)

    def resolve_times(self, times: str | float | Sequence[float] | None, steps: int | None) -> tuple[float, ...]:
        """The noise levels to visit.

        Args:
            times: levels; or text: "auto", "80,1.38" (levels), "grid:0,22" (indices of the model's grid), or the name
                of a preset; None is "auto".
            steps: how many; None: what `times` says, for "auto" the whole grid for a teacher and else one.

        Raises:
            UsageError: not understood, outside the model's range, or not as many as `steps`.
        """
        if steps is not None and steps < 1:
            raise UsageError(f"steps {steps}", "expected at least 1")
        found = self._listed_times(times)
        if found is None:
            return self._times_of_steps(steps)
        found = self.schedule.check_times(found)
        if steps is not None and steps != len(found):
            raise UsageError(f"steps {steps}", f"the times given are {len(found)}; leave one of the two out")
        return found

    def _listed_times(self, times: str | float | Sequence[float] | None) -> Sequence[float] | None:
        if not isinstance(times, str | None):
            return [times] if isinstance(times, (int, float)) else times
        if times in (None, "auto"):
            return None
        if times in PRESETS:
            preset = PRESETS[times]
            if preset.indices is None:
                raise UsageError(f"times {times}", "no multistep list was published for it", "--times auto")
            return replace(self.schedule, num_scales=preset.num_scales).times_at(preset.indices)
        kind, _, text = times.rpartition(":")
        try:
            if kind == "grid":
                return self.schedule.times_at([int(part) for part in text.split(",")])
            if kind == "":
                return [float(part) for part in text.split(",")]
        except ValueError:
            pass
        raise UsageError(
            f"times {times!r}",
            f"expected auto, noise levels as 80,1.38, grid indices as grid:0,22, or one of {', '.join(PRESETS)}",
        )

    def _times_of_steps(self, steps: int | None) -> tuple[float, ...]:
        schedule = self.schedule

        def spread(count: int) -> tuple[float, ...]:
            levels = karras_sigmas(count, schedule.sigma_min, schedule.sigma_max, schedule.rho)
            return tuple(float(level) for level in levels)

        # A grid as fine as the steps that are made; one step has no interval to be spread over.
        if self.settings.parameterization == "edm":
            return spread(steps or schedule.num_scales)
        if self.settings.parameterization == "trajectory":
            return spread((steps or 1) + 1)[:-1]  # the last level is where the last jump lands
        preset = PRESETS.get(self.settings.preset)
        if preset is not None and preset.indices is not None:
            published = schedule.times_at(preset.indices)
            if steps == len(published):
                return published
        return schedule.spaced_times(steps or 1)

    def _resolve_sampler(self, sampler: str) -> str:
        parameterization = self.settings.parameterization
        if sampler == "auto":
            return PARAMETERIZATIONS[parameterization].sampler
        fitting = [name for name, row in SAMPLERS.items() if row.parameterization == parameterization]
        if sampler not in fitting:
            title = PARAMETERIZATIONS[parameterization].title
            raise UsageError(f"sampler {sampler!r}", f"this model is {title}; expected auto, {', '.join(fitting)}")
        return sampler

    def _seeds_and_labels(self, seed, count: int, labels) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        classes = self.backbone.config.num_class_embeds
        if labels is None:
            seeds = tuple(expand_seeds(seed, count))
            return seeds, None if classes is None else tuple(label_of_seed(each, classes) for each in seeds)
        if classes is None:
            raise UsageError("labels", "this model is unconditional: it has no classes")
        labels = _checked_labels(labels, classes)
        if count == 1 and (not isinstance(seed, Sequence) or len(seed) == 1):
            count = len(labels)  # one image per label
        seeds = tuple(expand_seeds(seed, count))
        if len(labels) == 1:
            labels = labels * len(seeds)
        if len(labels) != len(seeds):
            raise UsageError(f"{len(labels)} labels", f"expected one, or one for each of the {len(seeds)} images")
        return seeds, tuple(labels)


def check_levels(trajectory: bool, settings: PixelSettings) -> None:
    """Refuses a network that is told another number of levels than how it is to be used needs.

    Args:
        trajectory: whether it is told two.

    Raises:
        ModelError: it does not fit.
    """
    if trajectory != (settings.parameterization == "trajectory"):
        title = PARAMETERIZATIONS[settings.parameterization].title
        told = "the level to jump to" if trajectory else "no level to jump to"
        raise ModelError("unet", f"is told {told}, so it is not {title}")


def _checked_labels(labels: int | Iterable[int], classes: int) -> list[int]:
    given = list(labels) if isinstance(labels, Iterable) else [labels]
    why = f"this model has classes 0 to {classes - 1}"
    if not given:
        raise UsageError("labels", f"the list is empty; {why}")
    checked = []
    for label in given:
        try:
            number = operator.index(label)
        except TypeError:
            raise UsageError(f"label {label!r}", f"expected a whole number; {why}") from None
        if isinstance(label, bool) or not 0 <= number < classes:
            raise UsageError(f"label {label}", why)
        checked.append(number)
    return checked


def label_of_seed(seed: int, classes: int) -> int:
    """The class of an image for which none was asked, a pure function of its seed."""
    return int(np.random.default_rng([seed, classes]).integers(classes))
