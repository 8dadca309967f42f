"""Latent consistency models: from a prompt to pictures, through text encoders, a U-Net and an autoencoder."""

import functools
import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from PIL import Image, ImageOps

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.guidance import classifier_free_guidance, guidance_embedding, w_from_guidance_scale
from mlx_cm.images import from_pil, picture_digest, to_pil
from mlx_cm.interpolation import FEATURE_PATHS, slerp_noise
from mlx_cm.model_folder import weights_digest
from mlx_cm.models.clip_text import CLIPTextOutput
from mlx_cm.models.unet2d_condition import PromptContext
from mlx_cm.parameterization import Network, latent_consistency_function
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
from mlx_cm.prompt_weights import apply_weights, encode_weighted
from mlx_cm.rng import IMAGE_POSTERIOR, MASKED_POSTERIOR, NOISE_SOURCES, Noise, expand_seeds
from mlx_cm.samplers import (
    Callback,
    Constraint,
    Jump,
    consistency_jump,
    sample_multistep,
    sample_tcd,
    sample_trajectory,
    trajectory_jump,
)
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.tiling import decode_tiled, encode_tiled
from mlx_cm.tokenizer import CLIPTokenizer

log = logging.getLogger("mlx_cm")

TCD_ETA = 0.3  # [TCD] section 5 and its released code
STRENGTHS = {"image": 0.5, "mask": 1.0}  # by the task, where none is given
TILE = 64  # latents; the size the autoencoders of this family were trained on
WHOLE_UP_TO = 128  # latents a side, SDXL's own size; above it the autoencoder works tile by tile

NO_USE = {"labels": "this model is told by a prompt what to show"}


@dataclass(frozen=True)
class Sampler:
    """A named way to use a model."""

    jump: Callable[[Network, DiscreteSchedule], Jump]
    sample: Callable[..., mx.array]
    distilled: bool = True  # whether it is for what was distilled for it; else for any model, without guidance baked in
    steps: int = 4  # the defaults of a model that was not made for it
    guidance_scale: float = 1.0
    eta: float | None = None  # the default; None: there is no such setting


def _lcm_jump(net: Network, schedule: DiscreteSchedule) -> Jump:
    return consistency_jump(latent_consistency_function(net, schedule))


SAMPLERS = {
    "lcm": Sampler(_lcm_jump, sample_multistep),
    "tcd": Sampler(trajectory_jump, sample_tcd, eta=TCD_ETA),
    "ddim": Sampler(trajectory_jump, sample_trajectory, distilled=False, steps=50, guidance_scale=7.5),
}


@dataclass(frozen=True)
class LatentSettings:
    """How a checkpoint is to be used; the `sampler` section of its model index."""

    sampler: str | None = None  # of SAMPLERS; None: a base model, which waits for an adapter that distils it
    guidance_scale: float = 1.0  # the default of this sampler, or with such an adapter; 1 is no guidance
    steps: int = 4  # the default, likewise
    force_zeros_for_empty_prompt: bool = False  # SDXL: without a negative prompt its features are zeros

    def __post_init__(self):
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}, expected one of {list(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}, expected at least 1")

    @property
    def distilled(self) -> bool:
        """Whether the defaults are those of few steps."""
        return self.sampler is None or SAMPLERS[self.sampler].distilled

    def defaults(self, sampler: str) -> tuple[int, float]:
        """(steps, guidance_scale) where none are given: the model's own, if this is the kind of sampler it is for."""
        row = SAMPLERS[sampler]
        own = self.distilled == row.distilled
        return (self.steps, self.guidance_scale) if own else (row.steps, row.guidance_scale)

    def adapted(self, sampler: str | None) -> "LatentSettings":
        """The settings of the model with an adapter that distils it for this sampler; None: without."""
        if sampler is None or sampler == self.sampler:
            return self
        steps, guidance_scale = self.defaults(sampler)
        return replace(self, sampler=sampler, steps=steps, guidance_scale=guidance_scale)


class PromptFeatures(NamedTuple):
    """What the text encoders make of prompts."""

    states: mx.array  # (B, tokens, D)
    pooled: mx.array | None  # (B, P), for SDXL


def features_of(output: CLIPTextOutput, is_xl: bool) -> PromptFeatures:
    """What a family takes of a text encoder: its last state; SDXL the one before its last layer, and the pooled one."""
    if is_xl:
        return PromptFeatures(output.hidden_states[-2], output.text_embeds)
    return PromptFeatures(output.last_hidden_state, None)


EncodePrompt = Callable[[str], PromptFeatures]
Encoded = mx.array | tuple[mx.array, mx.array]  # what an autoencoder's `encode` returns: latents, or a posterior


class PictureContext(NamedTuple):
    """What the pictures given with a request contribute to every image."""

    known: Encoded | None  # the picture; None where all of it is made anew
    masked: Encoded | None  # the part that stays, for a network that sees it
    mask: mx.array | None  # (1, H / 8, W / 8, 1), 1 where made anew


@dataclass(frozen=True)
class LatentRequest:
    """A checked request: nothing is left to defaults."""

    seeds: tuple[int, ...]  # one per image
    prompts: tuple[str, ...]  # one per image
    negative_prompt: str | None
    guidance_scale: float
    times: tuple[int, ...]
    sampler: str
    eta: float | None
    width: int  # pixels
    height: int
    image: Image.Image | None
    mask: Image.Image | None  # white: to be made anew
    strength: float | None
    prompt_weights: bool
    tiled: bool  # whether the autoencoder works tile by tile
    rng: str


PER_IMAGE = ("seeds", "prompts")
# Red, green and blue in [-1, 1] that a unit of each of the four latent channels stands for, about; for SDXL or not.
PREVIEW_FACTORS = {
    False: ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)),
    True: ((0.392, 0.410, 0.456), (-0.264, -0.025, 0.103), (0.057, 0.167, 0.163), (-0.294, -0.228, -0.228)),
}


class LatentConsistencyPipeline:
    """A latent model ready to generate.

    Args:
        backbone: the U-Net.
        autoencoder: images to latents and back.
        text_encoders, tokenizers: one of each, or two of each for SDXL.
        schedule: its noise levels.
        settings: how it is used.
        provenance: what `model_index.json` says of where it comes from.

    Raises:
        ModelError: the U-Net sees other channels than latents, or latents, mask and masked picture.
    """

    def __init__(
        self,
        backbone: nn.Module,
        autoencoder: nn.Module,
        text_encoders: Sequence[nn.Module],
        tokenizers: Sequence[CLIPTokenizer],
        schedule: DiscreteSchedule,
        settings: LatentSettings,
        provenance: dict[str, Any] | None = None,
    ):
        self.backbone, self.autoencoder = backbone, autoencoder
        self.text_encoders, self.tokenizers = list(text_encoders), list(tokenizers)
        self.schedule, self.settings = schedule, settings
        self.provenance = provenance or {}
        self.dtype = backbone.conv_in.weight.dtype  # of the backbone
        channels = backbone.config.in_channels
        if channels != self.latent_channels and not self.is_inpainting:
            raise ModelError(
                "unet",
                f"takes {channels} channels, expected {self.latent_channels} (latents) or "
                f"{2 * self.latent_channels + 1} (latents, mask and masked picture)",
            )

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether the strength of guidance is baked into the network, [LCM] section 4.2."""
        return self.backbone.config.time_cond_proj_dim is not None

    @property
    def is_xl(self) -> bool:
        """Whether the network is told pooled text and image sizes, as SDXL's."""
        return self.backbone.config.addition_embed_type == "text_time"

    @property
    def is_inpainting(self) -> bool:
        """Whether the network sees mask and masked picture beside the latents."""
        return self.backbone.config.in_channels == 2 * self.latent_channels + 1

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.autoencoder.config.latent_channels

    @property
    def weights_sha256(self) -> str | None:
        """Identifies the weights: the digest of the one weights file, or a digest of those of all."""
        return weights_digest(self.provenance.get("weights", {}))

    # --- requests

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        noise: Noise | None = None,
        callback: Callback | None = None,
        batch_size: int = 1,
        low_ram: bool = False,
        **settings: Any,
    ) -> list[Image.Image]:
        """Makes pictures.

        Image k of a seed s has seed s + k, and is the same whatever else is made with it.

        Args:
            prompt: what to show; several make `count` pictures for each seed of each.
            noise, callback, batch_size, low_ram: see `iterate`.
            settings: see `resolve`.

        Returns:
            The pictures, those of the first prompt first.

        Raises:
            UsageError: a setting is wrong or of no use to this model.
            OutputError: a picture is not finite, or blank.
        """
        request = self.resolve(prompt, **settings)
        results = self.iterate(request, noise=noise, callback=callback, batch_size=batch_size, low_ram=low_ram)
        return [image for _, image in results]

    def resolve(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        times: str | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | None = None,
        sampler: str = "auto",
        eta: float | None = None,
        original_steps: int | None = None,
        prompt_weights: bool = False,
        tiled: bool = False,
        rng: str = "mlx",
        **others: Any,
    ) -> LatentRequest:
        """Checks the settings of `generate` and fills in what was left open.

        Args:
            prompt: one or several; the empty prompt is valid.
            negative_prompt: what not to show; works through guidance above 1 only.
            steps: network calls; None: the model's default. With ddim those of the way from noise alone, of which a
                start from a picture leaves the `strength` part.
            times: timesteps instead, descending; or text: "auto", "999,499".
            guidance_scale: how strongly the prompt pulls; None: the model's default; 1 is none.
            width, height: pixels, multiples of 8; None: the picture's, or the size the model was trained on.
            seed, count: each seed s makes `count` pictures, with seeds s, s + 1, ...
            image: a picture to start from.
            strength: how much of it is made anew, (0, 1]; None: where the times given start, else 0.5, and 1 with a
                mask.
            mask: white where the picture is to be made anew, black where it stays; of the picture's size.
            sampler: "auto", "lcm", "tcd" or, for models that have no guidance baked in, "ddim".
            eta: of TCD, how much noise is put in again, [0, 1]; None: 0.3.
            original_steps: of the distillation; None: what the checkpoint says.
            prompt_weights: read `(word:1.3)` and `[word]` in prompts as weights.
            tiled: let the autoencoder work tile by tile, in less memory, also where pictures are not large. Colours
                may differ a little between the tiles.
            rng: "mlx", or "torch" for the draws of PyTorch's CPU generator.

        Raises:
            UsageError: a setting is wrong or of no use to this model.
        """
        refuse_settings(others, NO_USE)
        check_rng(rng)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not prompts or not all(isinstance(one, str) for one in prompts):
            raise UsageError("prompt", "expected text, or a list of texts")
        if not isinstance(negative_prompt, str | None):
            raise UsageError("negative_prompt", "expected one text")
        image, mask = (None if one is None else ImageOps.exif_transpose(one) for one in (image, mask))
        seeds = expand_seeds(seed, count)
        sampler = self._resolve_sampler(sampler)
        eta = check_eta(sampler, eta, SAMPLERS[sampler].eta)
        guidance_scale = self._resolve_guidance(guidance_scale, negative_prompt, sampler)
        width, height = self._resolve_size(width, height, image)
        listed = self._listed_times(times)
        strength = self._resolve_strength(strength, image, mask, listed)
        times = self._resolve_times(listed, steps, strength, original_steps, sampler)
        self._check_start(times[0])
        for tokenizer in self.tokenizers:  # over-long prompts are known before the work begins
            encode = (lambda texts, t=tokenizer: encode_weighted(t, texts)) if prompt_weights else tokenizer.encode
            encode([*prompts, negative_prompt or ""])
        return LatentRequest(
            seeds=tuple(seeds * len(prompts)),
            prompts=tuple(one for one in prompts for _ in seeds),
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            times=times,
            sampler=sampler,
            eta=eta,
            width=width,
            height=height,
            image=image,
            mask=mask,
            strength=strength,
            prompt_weights=prompt_weights,
            tiled=tiled or max(width, height) > WHOLE_UP_TO * self.autoencoder.config.pixels_per_latent,
            rng=rng,
        )

    def _resolve_guidance(self, scale: float | None, negative_prompt: str | None, sampler: str) -> float:
        scale = self.settings.defaults(sampler)[1] if scale is None else float(scale)
        if not math.isfinite(scale) or scale < 0:
            raise UsageError(f"guidance_scale {scale}", "expected a number of 0 or more")
        if 0 < scale < 1 and not self.has_guidance_embedding:
            raise UsageError(
                f"guidance_scale {scale:g}",
                "expected 1 (no guidance) or more; less would have no effect",
                "--guidance 1",
            )
        if negative_prompt is not None and not self._is_guided(scale):
            if self.has_guidance_embedding:
                raise UsageError(
                    "negative_prompt", "this model has its guidance baked in, so the setting would have no effect"
                )
            raise UsageError(
                "negative_prompt",
                f"guidance_scale is {scale:g}, so the setting would have no effect",
                "--guidance 1.5, which takes twice the time",
            )
        return scale

    def _is_guided(self, scale: float) -> bool:
        """Whether each step calls the network with and without the prompt."""
        return scale > 1 and not self.has_guidance_embedding

    def _resolve_size(self, width: int | None, height: int | None, image: Image.Image | None) -> tuple[int, int]:
        unit = self.autoencoder.config.pixels_per_latent
        if image is not None:
            default = tuple(max(side // unit, 1) * unit for side in image.size)
        else:
            trained = self.backbone.config.sample_size or TILE
            trained = (trained, trained) if isinstance(trained, int) else trained
            default = (trained[1] * unit, trained[0] * unit)
        size = (width or default[0], height or default[1])
        for name, given, side in zip(("width", "height"), (width, height), size, strict=True):
            if given is not None and (given < unit or given % unit):
                nearest = max(round(side / unit), 1) * unit
                raise UsageError(f"{name} {given}", f"expected a multiple of {unit}", f"--{name} {nearest}")
        return size

    def _resolve_strength(
        self,
        strength: float | None,
        image: Image.Image | None,
        mask: Image.Image | None,
        listed: tuple[int, ...] | None,
    ) -> float | None:
        if image is None:
            for name, value in (("mask", mask), ("strength", strength)):
                if value is not None:
                    raise UsageError(name, "needs a picture to start from", "--image PATH")
            if self.is_inpainting:
                raise UsageError("image", "this model fills in a part of a picture", "--image PATH --mask PATH")
            return None
        if mask is None and self.is_inpainting:
            raise UsageError("mask", "this model fills in a part of a picture", "--mask PATH")
        if mask is not None:
            _check_mask(mask, image.size)
        available = self.schedule.num_train_timesteps
        if strength is None:
            default = STRENGTHS["image" if mask is None else "mask"]
            strength = default if listed is None else (listed[0] + 1) / available
        if not 0 < strength <= 1:  # false for NaN too
            raise UsageError(f"strength {strength}", "expected above 0 (the picture stays), at most 1 (all new)")
        if listed is not None and listed[0] >= strength * available:
            raise UsageError(
                f"strength {strength:g}",
                f"starts below timestep {strength * available:g}, the times given start at {listed[0]}; "
                "leave one of the two out",
            )
        return strength

    def _resolve_sampler(self, sampler: str) -> str:
        own = self.settings.sampler
        if sampler == "auto":
            if own is None:
                raise UsageError(
                    "sampler auto",
                    "this is a base model, which few steps do not suffice for: it needs an adapter that distils it; "
                    "if one of those given does, say which kind it is",
                    "--lora latent-consistency/lcm-lora-sdv1-5 --sampler lcm, or --sampler ddim with many steps",
                )
            sampler = own
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler {sampler!r}", f"expected auto, {', '.join(SAMPLERS)}")
        if not SAMPLERS[sampler].distilled:
            if self.has_guidance_embedding:
                raise UsageError(f"sampler {sampler!r}", "this model was distilled with its guidance baked in")
        elif own not in (None, sampler) and SAMPLERS[own].distilled:
            raise UsageError(f"sampler {sampler!r}", f"this model was distilled for {own}; another one gives grain")
        return sampler

    def _listed_times(self, times: str | Sequence[int] | None) -> tuple[int, ...] | None:
        """The timesteps given; None where they are to be chosen."""
        if times is None or times == "auto":
            return None
        try:
            listed = [float(part) for part in (times.split(",") if isinstance(times, str) else times)]
        except (TypeError, ValueError):
            raise UsageError(f"times {times!r}", "expected auto, or timesteps as 999,499") from None
        return self.schedule.check_times(listed)

    def _resolve_times(
        self,
        listed: tuple[int, ...] | None,
        steps: int | None,
        strength: float | None,
        original: int | None,
        sampler: str,
    ) -> tuple[int, ...]:
        if listed is None:
            steps, strength = self.settings.defaults(sampler)[0] if steps is None else steps, strength or 1.0
            if SAMPLERS[sampler].distilled:
                return self.schedule.lcm_timesteps(steps, strength=strength, original_inference_steps=original)
            if original is not None:
                raise UsageError("original_steps", f"the {sampler} sampler has no such setting")
            return self.schedule.ddim_timesteps(steps, strength=strength)
        if steps is not None and steps != len(listed):
            raise UsageError(f"steps {steps}", f"the times given are {len(listed)}; leave one of the two out")
        if original is not None:
            raise UsageError("original_steps", "the times are given, so the setting would have no effect")
        return listed

    def _check_start(self, t: int) -> None:
        """Refuses a start from which nothing can be told of the picture: all is noise, and the network gives noise."""
        if self.schedule.prediction_type == "epsilon" and self.schedule.marginal(t)[0] == 0:
            raise UsageError(
                f"times {t}",
                "this model's last timestep holds no signal, and it predicts noise; start below",
                f"--times {t - self.schedule.solver_spacing}",
            )

    def recipe(self, request: LatentRequest) -> dict[str, Any]:
        """Everything that makes the pictures of a request again but the pictures given with it, in JSON's types.

        Args:
            request: as `resolve` returns it, or for one picture as `iterate` yields it.
        """
        return {
            "task": "generate",
            **told_of_model(self.provenance, self.weights_sha256),
            **{name: self.provenance.get(name) for name in ("lora", "lora_partial", "vae", "quantize")},
            "prompt": alone(tuple(dict.fromkeys(request.prompts))),
            "negative_prompt": request.negative_prompt,
            "prompt_weights": request.prompt_weights or None,
            "tiled": request.tiled or None,
            "guidance_scale": request.guidance_scale,
            "steps": len(request.times),
            "times": list(request.times),
            "sampler": request.sampler,
            "eta": request.eta,
            "seed": alone(tuple(dict.fromkeys(request.seeds))),
            "rng": request.rng,
            "strength": request.strength,
            "image_sha256": None if request.image is None else picture_digest(request.image),
            "mask_sha256": None if request.mask is None else picture_digest(request.mask),
            "width": request.width,
            "height": request.height,
            **told_of_machine(self.dtype),
        }

    # --- text

    def encode_prompt(self, prompts: Sequence[str], *, weighted: bool = False) -> PromptFeatures:
        """Features of prompts.

        SD 1.x and 2.x: the encoder's last state. SDXL: the states before the last layer of both encoders side by side,
        and the second one's projected end-of-text state.

        Args:
            weighted: read `(word:1.3)` and `[word]` as weights.

        Raises:
            UsageError: a prompt is too long.
        """
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids, weights = encode_weighted(tokenizer, prompts) if weighted else (tokenizer.encode(prompts), None)
            state, pooled = features_of(encoder(ids), self.is_xl)
            states.append(state if weights is None else apply_weights(state, weights))
        return PromptFeatures(mx.concatenate(states, axis=-1), pooled)

    def _remembering(self, request: LatentRequest, size: int | None = None) -> EncodePrompt:
        """`encode_prompt` of one prompt, as the request wants it; the last `size` prompts are kept, None: all."""
        return functools.lru_cache(size)(lambda text: self.encode_prompt([text], weighted=request.prompt_weights))

    def prepare(self, request: LatentRequest, encode: EncodePrompt | None = None) -> PromptContext:
        """What the prompts of a request contribute to every step, computed once.

        Args:
            encode: gives the features of a prompt; None: the text encoders.
        """
        encode = self._remembering(request) if encode is None else encode
        one_for_all = len(set(request.prompts)) == 1
        rows = [encode(prompt) for prompt in (request.prompts[:1] if one_for_all else request.prompts)]
        return self.context(_joined(rows), request, encode)

    def context(self, features: PromptFeatures, request: LatentRequest, encode: EncodePrompt) -> PromptContext:
        """The backbone's part of `prepare`, from features of one prompt or of one per image.

        Args:
            encode: gives the features of the negative prompt, where there is guidance.
        """
        if self._is_guided(request.guidance_scale):
            count = len(request.seeds)
            if request.negative_prompt is None and self.settings.force_zeros_for_empty_prompt:
                negative = PromptFeatures(*(None if x is None else mx.zeros_like(x) for x in features))
            else:
                negative = encode(request.negative_prompt or "")
            features = _joined([_repeated_features(negative, count), _repeated_features(features, count)])
        conditions: dict[str, mx.array] = {}
        if self.has_guidance_embedding:
            w = mx.array([w_from_guidance_scale(request.guidance_scale)])
            conditions["timestep_cond"] = guidance_embedding(w, self.backbone.config.time_cond_proj_dim)
        if self.is_xl:
            size = (request.height, request.width)
            time_ids = mx.array([[*size, 0, 0, *size]], dtype=mx.float32)  # original size, crop, target size
            conditions["text_embeds"] = features.pooled
            conditions["time_ids"] = _repeated(time_ids, len(features.states))
        return self.backbone.prepare(features.states, **conditions)

    # --- pictures

    def iterate(
        self,
        request: LatentRequest,
        *,
        noise: Noise | None = None,
        callback: Callback | None = None,
        batch_size: int = 1,
        low_ram: bool = False,
    ) -> Iterator[tuple[LatentRequest, Image.Image]]:
        """Makes the pictures of a request one batch after the other.

        Args:
            noise: a source of all draws instead of the seeds, for one batch of all images.
            callback: called after each step of each batch.
            batch_size: images computed at once: above 1 faster on a GPU, equal up to rounding only.
            low_ram: release the text encoders once all prompts are encoded, the backbone once all latents are made; the
                pipeline can be used once.

        Yields:
            Each picture with the request that makes it alone.
        """
        batches = split_request(request, PER_IMAGE, batch_size if noise is None else len(request.seeds))
        # Prompts come in order, and beside those of a batch there is the negative one.
        encode = self._remembering(request, None if low_ram else batch_size + 1)

        def sampled() -> Iterator[mx.array]:
            shown, prompts = self.prepare_pictures(request), None
            for batch in batches:
                if batch.prompts != prompts:
                    context, prompts = self.prepare(batch, encode), batch.prompts
                yield self.sample(batch, context=context, shown=shown, noise=noise, callback=callback)

        latents: Iterable[mx.array] = sampled()
        if low_ram:
            negative = [request.negative_prompt or ""] if self._is_guided(request.guidance_scale) else []
            for prompt in [*request.prompts, *negative]:
                mx.eval([x for x in encode(prompt) if x is not None])
            self.release("text_encoders")
            latents = list(latents)
            self.release("backbone")
        return pictures(batches, PER_IMAGE, (self.decode(x, tiled=request.tiled) for x in latents))

    def release(self, *parts: str) -> None:
        """Gives the memory of parts back; the pipeline cannot use them any more.

        Args:
            parts: "text_encoders", "backbone", "autoencoder".
        """
        for name in parts:
            part = getattr(self, name)
            setattr(self, name, [_Released(one) for one in part] if isinstance(part, list) else _Released(part))
        gc.collect()
        mx.clear_cache()

    def interpolate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        frames: int = 8,
        path: str = "linear",
        callback: Callback | None = None,
        **settings: Any,
    ) -> Iterator[Image.Image]:
        """Makes pictures on the way from one prompt and seed to another.

        The first and the last are exactly those that `generate` makes of their prompt and seed; in between, features
        lie between the prompts' features and every draw of noise between the seeds' draws.

        Args:
            prompts, seeds: of the first and of the last picture; two equal ones stay as they are.
            frames: pictures in all.
            path: "linear" or "spherical", of the features; noise always follows the arc.
            settings: see `resolve`.

        Yields:
            The pictures in order.

        Raises:
            UsageError: no two prompts and seeds, fewer than two frames, or a setting as for `generate`.
            OutputError: a picture is not finite, or blank.
        """
        for name, given in {"prompts": prompts, "seeds": seeds}.items():
            if isinstance(given, str) or len(given) != 2:
                raise UsageError(name, "expected two, of the first picture and of the last")
        if frames < 2:
            raise UsageError(f"frames {frames}", "expected at least 2, the first picture and the last")
        if path not in FEATURE_PATHS:
            raise UsageError(f"path {path!r}", f"expected one of {', '.join(FEATURE_PATHS)}")
        if settings.get("count", 1) != 1:
            raise UsageError(f"count {settings['count']}", "one picture is made for each frame")
        first, last = (self.resolve(prompt, seed=seed, **settings) for prompt, seed in zip(prompts, seeds, strict=True))
        encode = self._remembering(first)

        def made() -> Iterator[mx.array]:
            shown = self.prepare_pictures(first)
            for fraction in (frame / (frames - 1) for frame in range(frames)):
                parts = zip(*map(encode, prompts), strict=True)
                between = (None if a is None else FEATURE_PATHS[path](a, b, fraction) for a, b in parts)
                context = self.context(PromptFeatures(*between), first, encode)
                noise = slerp_noise(*(NOISE_SOURCES[one.rng](one.seeds) for one in (first, last)), fraction)
                latents = self.sample(first, context=context, shown=shown, noise=noise, callback=callback)
                yield self.decode(latents, tiled=first.tiled)

        return (image for _, image in pictures([first] * frames, PER_IMAGE, made()))

    def prepare_pictures(self, request: LatentRequest) -> PictureContext | None:
        """What the pictures of a request contribute to every image, computed once; None where there are none."""
        if request.image is None:
            return None
        size, unit = (request.width, request.height), self.autoencoder.config.pixels_per_latent
        pixels = from_pil(request.image, size=size)
        mask = None if request.mask is None else _binary_mask(request.mask, size)
        sees_masked = self.is_inpainting and mask is not None
        shown = PictureContext(
            known=None if sees_masked and _is_all_new(request) else self.encode(pixels, tiled=request.tiled),
            masked=self.encode(pixels * (1 - mask), tiled=request.tiled) if sees_masked else None,
            mask=None if mask is None else mask[:, ::unit, ::unit],
        )
        mx.eval([x for x in shown if x is not None])
        return shown

    def sample(
        self,
        request: LatentRequest,
        *,
        context: PromptContext | None = None,
        shown: PictureContext | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> mx.array:
        """Makes the latents of a request as one batch.

        Args:
            context: what `prepare` made of the request's prompts; None: made here.
            shown: what `prepare_pictures` made of its pictures; None: made here.
            noise: a source of all draws instead of the request's seeds.

        Returns:
            Scaled latents, float32, shape (B, height / 8, width / 8, latent_channels).
        """
        context = self.prepare(request) if context is None else context
        shown = self.prepare_pictures(request) if shown is None else shown
        noise = noise or NOISE_SOURCES[request.rng](request.seeds)
        start, extra, constrain = self._start(request, shown, noise)
        net = self._network(context, request.guidance_scale, extra)
        sampler = SAMPLERS[request.sampler]
        options = {} if request.eta is None else {"eta": request.eta}
        jump = sampler.jump(net, self.schedule)
        return sampler.sample(
            jump, start, request.times, self.schedule, noise=noise, callback=callback, constrain=constrain, **options
        )

    def _start(
        self, request: LatentRequest, shown: PictureContext | None, noise: Noise
    ) -> tuple[mx.array, mx.array | None, Constraint | None]:
        """Where sampling starts; what the network sees beside the latents; what keeps the unmasked part.

        Draws are made in the order in which diffusers' pipelines make them.
        """
        unit = self.autoencoder.config.pixels_per_latent
        shape = (len(request.seeds), request.height // unit, request.width // unit, self.latent_channels)
        if shown is None:
            return noise(shape, 0), None, None

        def latents(encoded: Encoded, index: int) -> mx.array:
            drawn = noise(shape, index) if isinstance(encoded, tuple) else None  # a posterior is drawn from
            return _repeated(self.autoencoder.scaled(encoded, drawn), shape[0])

        known = None if shown.known is None else latents(shown.known, IMAGE_POSTERIOR)
        initial = noise(shape, 0)
        alpha, sigma = self.schedule.marginal(request.times[0])
        start = initial if _is_all_new(request) else alpha * known + sigma * initial
        if shown.mask is None:
            return start, None, None
        if shown.masked is not None:
            masked = latents(shown.masked, MASKED_POSTERIOR)
            return start, mx.concatenate([_repeated(shown.mask, shape[0]), masked], axis=-1), None
        if isinstance(shown.known, tuple):  # diffusers draws for every U-Net, and its stream goes on behind it
            noise(shape, MASKED_POSTERIOR)

        def constrain(x: mx.array, t: int) -> mx.array:
            alpha, sigma = self.schedule.marginal(t)
            return shown.mask * x + (1 - shown.mask) * (alpha * known + sigma * initial)

        return start, None, constrain

    def _network(self, context: PromptContext, guidance_scale: float, extra: mx.array | None) -> Network:
        """F(x, t) with the prompt put in; guided where guidance is not baked in."""

        def call(x: mx.array, t: mx.array) -> mx.array:
            if extra is not None:
                x = mx.concatenate([x, extra], axis=-1)
            return self.backbone(x, t, context)

        def guided(x: mx.array, t: mx.array) -> mx.array:
            if extra is not None:
                x = mx.concatenate([x, extra], axis=-1)
            uncond, cond = mx.split(self.backbone(mx.concatenate([x, x]), t, context), 2)
            return classifier_free_guidance(cond, uncond, guidance_scale)

        return guided if self._is_guided(guidance_scale) else call

    def encode(self, pixels: mx.array, *, tiled: bool = False) -> Encoded:
        """What the autoencoder's `encode` makes of pictures in [-1, 1], whole or tile by tile."""
        if not tiled:
            return self.autoencoder.encode(pixels)
        unit = self.autoencoder.config.pixels_per_latent
        return encode_tiled(self.autoencoder.encode, pixels, tile=TILE * unit, scale=unit)

    def preview(self, latents: mx.array) -> list[Image.Image]:
        """Small pictures of the state in the middle of sampling, without the autoencoder: a matrix product a pixel.

        Latents of other widths than 4 channels show their first channels.
        """
        factors = mx.array(PREVIEW_FACTORS[self.is_xl])
        if self.latent_channels != len(factors):
            factors = mx.eye(self.latent_channels, 3) / 3
        return to_pil(mx.clip(latents @ factors, -1, 1))

    def decode(self, latents: mx.array, *, tiled: bool = False) -> mx.array:
        """Pictures of scaled latents, decoded whole or tile by tile.

        Half precision overflows in some autoencoders. A result that is not finite is computed again in float32.

        Returns:
            float32, (B, H, W, C), in [-1, 1] but for what the decoder oversteps.
        """
        images = self._decode(latents, tiled)
        if not bool(mx.isfinite(images).all()) and _is_half(self.autoencoder):
            log.warning("the autoencoder overflows in half precision; decoding again in float32")
            self.autoencoder.update(tree_map(lambda x: x.astype(mx.float32), self.autoencoder.parameters()))
            images = self._decode(latents, tiled)
        return images

    def _decode(self, latents: mx.array, tiled: bool) -> mx.array:
        decode = self.autoencoder.decode_scaled
        if not tiled:
            return decode(latents)
        return decode_tiled(decode, latents, tile=TILE, scale=self.autoencoder.config.pixels_per_latent)


class _Released:
    """Stands where a part was that has been released: its config is still asked for, and whoever calls is told."""

    def __init__(self, part: Any):
        self.config = part.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("low_ram", "this pipeline has released its parts after use", "load the model again")

    prepare = encode = decode_scaled = __call__


def _is_half(model: nn.Module) -> bool:
    return any(weight.dtype in (mx.float16, mx.bfloat16) for _, weight in tree_flatten(model.parameters()))


def _is_all_new(request: LatentRequest) -> bool:
    """Whether the masked part starts from noise alone."""
    return request.mask is not None and request.strength == 1.0


def _repeated(x: mx.array, count: int) -> mx.array:
    """One row for all as `count` rows; as many rows stay as they are."""
    return x if len(x) == count else mx.broadcast_to(x, (count, *x.shape[1:]))


def _repeated_features(features: PromptFeatures, count: int) -> PromptFeatures:
    return PromptFeatures(*(None if x is None else _repeated(x, count) for x in features))


def _joined(rows: Sequence[PromptFeatures]) -> PromptFeatures:
    """Features of several prompts as one batch."""
    return PromptFeatures(*(None if parts[0] is None else mx.concatenate(parts) for parts in zip(*rows, strict=True)))


def _check_mask(mask: Image.Image, size: tuple[int, int]) -> None:
    if mask.size != size:
        raise UsageError("mask", f"is {mask.size[0]}x{mask.size[1]}, the picture {size[0]}x{size[1]}")
    if mask.has_transparency_data and mask.convert("RGBA").getextrema()[3][0] < 255:
        raise UsageError("mask", "is transparent in places; expected white where to make anew and black where to keep")


def _binary_mask(mask: Image.Image, size: tuple[int, int]) -> mx.array:
    """(1, H, W, 1): 1 where the mask is at least half white."""
    (upright,) = to_pil(from_pil(mask))  # with 8 bits
    return (from_pil(upright.convert("L"), size=size)[..., :1] >= 0).astype(mx.float32)
