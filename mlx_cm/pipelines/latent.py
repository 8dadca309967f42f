"""Latent consistency models: from a prompt to pictures, through text encoders, a U-Net and an autoencoder."""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from PIL import Image

from mlx_cm.errors import UsageError
from mlx_cm.guidance import classifier_free_guidance, guidance_embedding, w_from_guidance_scale
from mlx_cm.images import from_pil, to_pil
from mlx_cm.model_folder import weights_digest
from mlx_cm.models.unet2d_condition import PromptContext
from mlx_cm.parameterization import Network, latent_consistency_function
from mlx_cm.pipelines.request import alone, check_rng, pictures, refuse_settings, split_request
from mlx_cm.prompt_weights import apply_weights, encode_weighted
from mlx_cm.rng import IMAGE_POSTERIOR, MASKED_POSTERIOR, NOISE_SOURCES, Noise, expand_seeds
from mlx_cm.samplers import (
    Callback,
    Constraint,
    Jump,
    consistency_jump,
    sample_multistep,
    sample_tcd,
    trajectory_jump,
)
from mlx_cm.schedules import DiscreteSchedule
from mlx_cm.tiling import decode_tiled, encode_tiled
from mlx_cm.tokenizer import CLIPTokenizer

log = logging.getLogger("mlx_cm")

TCD_ETA = 0.3  # [TCD] section 5 and its released code
STRENGTHS = {"image": 0.5, "mask": 1.0}  # by the task, where none is given
TILE = 64  # latents; the size the autoencoders of this family were trained on
WHOLE_UP_TO = 96  # latents a side; above it the autoencoder works tile by tile

NO_USE = {"labels": "this model is told by a prompt what to show"}


@dataclass(frozen=True)
class Sampler:
    """A named way to use a model."""

    jump: Callable[[Network, DiscreteSchedule], Jump]
    sample: Callable[..., mx.array]
    takes_eta: bool = False


def _lcm_jump(net: Network, schedule: DiscreteSchedule) -> Jump:
    return consistency_jump(latent_consistency_function(net, schedule))


SAMPLERS = {
    "lcm": Sampler(_lcm_jump, sample_multistep),
    "tcd": Sampler(trajectory_jump, sample_tcd, takes_eta=True),
}


@dataclass(frozen=True)
class LatentSettings:
    """How a checkpoint is to be used; the `sampler` section of its model index."""

    sampler: str | None = None  # of SAMPLERS; None: a base model, which needs an adapter that distils it
    guidance_scale: float = 1.0  # the default; 1 is no guidance
    steps: int = 4  # the default
    force_zeros_for_empty_prompt: bool = False  # SDXL: without a negative prompt its features are zeros

    def __post_init__(self):
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}, expected one of {list(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}, expected at least 1")


class PromptFeatures(NamedTuple):
    """What the text encoders make of prompts."""

    states: mx.array  # (B, tokens, D)
    pooled: mx.array | None  # (B, P), for SDXL


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
            noise: a source of all draws instead of the seeds, for a batch of all images.
            callback: called after each step of each batch.
            batch_size: images computed at once: above 1 faster on a GPU, equal up to rounding only.
            low_ram: release each part after its last use; the pipeline can be used once.
            settings: see `resolve`.

        Returns:
            The pictures, those of the first prompt first.

        Raises:
            UsageError: a setting is wrong or of no use to this model.
            OutputError: a picture is not finite, or blank.
        """
        request = self.resolve(prompt, **settings)
        if noise is None:
            results = self.iterate(request, callback=callback, batch_size=batch_size, low_ram=low_ram)
        else:
            made = self.decode(self.sample(request, noise=noise, callback=callback))
            results = pictures([request], PER_IMAGE, [made])
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
        rng: str = "mlx",
        **others: Any,
    ) -> LatentRequest:
        """Checks the settings of `generate` and fills in what was left open.

        Args:
            prompt: one or several; the empty prompt is valid.
            negative_prompt: what not to show; works through guidance above 1 only.
            steps: network calls; None: the model's default.
            times: timesteps instead, descending; or text: "auto", "999,499".
            guidance_scale: how strongly the prompt pulls; None: the model's default; 1 is none.
            width, height: pixels, multiples of 8; None: the picture's, or the size the model was trained on.
            seed, count: each seed s makes `count` pictures, with seeds s, s + 1, ...
            image: a picture to start from.
            strength: how much of it is made anew, (0, 1]; None: 0.5, and 1 with a mask.
            mask: white where the picture is to be made anew; of the picture's size.
            sampler: "auto", "lcm" or "tcd".
            eta: of TCD, how much noise is put in again, [0, 1]; None: 0.3.
            original_steps: of the distillation; None: what the checkpoint says.
            prompt_weights: read `(word:1.3)` and `[word]` in prompts as weights.
            rng: "mlx", or "torch" for the draws of PyTorch's CPU generator.

        Raises:
            UsageError: a setting is wrong or of no use to this model.
        """
        refuse_settings(others, NO_USE)
        check_rng(rng)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(one, str) for one in prompts):
            raise UsageError("prompt", "expected text, or a list of texts")
        seeds = expand_seeds(seed, count)
        guidance_scale = self._resolve_guidance(guidance_scale, negative_prompt)
        width, height = self._resolve_size(width, height, image)
        strength = self._resolve_strength(strength, image, mask)
        sampler, eta = self._resolve_sampler(sampler, eta)
        times = self._resolve_times(times, steps, strength, original_steps)
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
            rng=rng,
        )

    def _resolve_guidance(self, scale: float | None, negative_prompt: str | None) -> float:
        scale = self.settings.guidance_scale if scale is None else float(scale)
        if not math.isfinite(scale) or scale < 0:
            raise UsageError(f"guidance_scale {scale}", "expected a number of 0 or more")
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
        self, strength: float | None, image: Image.Image | None, mask: Image.Image | None
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
        if mask is not None and mask.size != image.size:
            raise UsageError("mask", f"is {mask.size[0]}x{mask.size[1]}, the picture {image.size[0]}x{image.size[1]}")
        strength = STRENGTHS["image" if mask is None else "mask"] if strength is None else strength
        if not 0 < strength <= 1:  # false for NaN too
            raise UsageError(f"strength {strength}", "expected above 0 (the picture stays), at most 1 (all new)")
        return strength

    def _resolve_sampler(self, sampler: str, eta: float | None) -> tuple[str, float | None]:
        own = self.settings.sampler
        if sampler == "auto":
            if own is None:
                raise UsageError(
                    "sampler auto",
                    "this is a base model, which few steps do not suffice for: it needs an adapter that distils it; "
                    "if one of those given does, say which kind it is",
                    "--lora latent-consistency/lcm-lora-sdv1-5 --sampler lcm",
                )
            sampler = own
        if sampler not in SAMPLERS:
            raise UsageError(f"sampler {sampler!r}", f"expected auto, {', '.join(SAMPLERS)}")
        if own is not None and sampler != own:
            raise UsageError(f"sampler {sampler!r}", f"this model was distilled for {own}; another one gives grain")
        if not SAMPLERS[sampler].takes_eta:
            if eta is not None:
                raise UsageError("eta", f"the {sampler} sampler has no such setting")
            return sampler, None
        eta = TCD_ETA if eta is None else float(eta)
        if not 0 <= eta <= 1:
            raise UsageError(f"eta {eta}", "expected 0 to 1")
        return sampler, eta

    def _resolve_times(
        self, times: str | Sequence[int] | None, steps: int | None, strength: float | None, original: int | None
    ) -> tuple[int, ...]:
        if times is None or times == "auto":
            steps = self.settings.steps if steps is None else steps
            return self.schedule.lcm_timesteps(steps, strength=strength or 1.0, original_inference_steps=original)
        try:
            listed = [float(part) for part in times.split(",")] if isinstance(times, str) else times
        except ValueError:
            raise UsageError(f"times {times!r}", "expected auto, or timesteps as 999,499") from None
        found = self.schedule.check_times(listed)
        if steps is not None and steps != len(found):
            raise UsageError(f"steps {steps}", f"the times given are {len(found)}; leave one of the two out")
        return found

    def recipe(self, request: LatentRequest) -> dict[str, Any]:
        """Everything that makes the pictures of a request again but the pictures given with it, in JSON's types."""
        source, revision = self.provenance.get("source"), self.provenance.get("revision")
        return {
            "task": "generate",
            "model": source,
            "model_ref": f"{source}@{revision}" if revision else None,
            "model_sha256": self.weights_sha256,
            "lora": self.provenance.get("lora"),
            "quantize": self.provenance.get("quantize"),
            "prompt": alone(request.prompts),
            "negative_prompt": request.negative_prompt,
            "prompt_weights": request.prompt_weights or None,
            "guidance_scale": request.guidance_scale,
            "steps": len(request.times),
            "times": list(request.times),
            "sampler": request.sampler,
            "eta": request.eta,
            "seed": alone(request.seeds),
            "rng": request.rng,
            "strength": request.strength,
            "width": request.width,
            "height": request.height,
            "dtype": str(self.backbone.conv_in.weight.dtype).removeprefix("mlx.core."),
            "mlx": mx.__version__,
            "device": mx.default_device().type.name,
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
            output = encoder(ids)
            state = output.hidden_states[-2] if self.is_xl else output.last_hidden_state
            states.append(state if weights is None else apply_weights(state, weights))
            pooled = output.text_embeds if self.is_xl else None
        return PromptFeatures(mx.concatenate(states, axis=-1), pooled)

    def _negative_features(self, request: LatentRequest, like: PromptFeatures) -> PromptFeatures:
        if request.negative_prompt is None and self.settings.force_zeros_for_empty_prompt:
            return PromptFeatures(mx.zeros_like(like.states), mx.zeros_like(like.pooled))
        return self.encode_prompt([request.negative_prompt or ""], weighted=request.prompt_weights)

    def prepare(self, request: LatentRequest) -> PromptContext:
        """What the prompts of a request contribute to every step, computed once."""
        distinct = list(dict.fromkeys(request.prompts))
        if len(distinct) == 1:  # a batch of one serves all
            features = self.encode_prompt(distinct, weighted=request.prompt_weights)
        else:
            features = self.encode_prompt(request.prompts, weighted=request.prompt_weights)
        return self.context(features, request)

    def context(self, features: PromptFeatures, request: LatentRequest) -> PromptContext:
        """The backbone's part of `prepare`, from features of one prompt or of one per image."""
        if self._is_guided(request.guidance_scale):
            negative = self._negative_features(request, features)
            count = len(request.seeds)
            features = PromptFeatures(
                *(
                    None if cond is None else mx.concatenate([_repeated(uncond, count), _repeated(cond, count)])
                    for uncond, cond in zip(negative, features, strict=True)
                )
            )
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
        callback: Callback | None = None,
        batch_size: int = 1,
        low_ram: bool = False,
    ) -> Iterator[tuple[LatentRequest, Image.Image]]:
        """Makes the pictures of a request one batch after the other.

        Args:
            low_ram: release the text encoders once all prompts are encoded, the backbone once all latents are made.

        Yields:
            Each picture with the request that makes it alone.
        """
        batches = split_request(request, PER_IMAGE, batch_size)
        if low_ram:
            return self._iterate_releasing(batches, callback)
        contexts: dict[tuple[str, ...], PromptContext] = {}

        def make(batch: LatentRequest) -> mx.array:
            if batch.prompts not in contexts:
                contexts.clear()  # prompts come in order: the last one is enough
                contexts[batch.prompts] = self.prepare(batch)
            return self.decode(self.sample(batch, context=contexts[batch.prompts], callback=callback))

        return pictures(batches, PER_IMAGE, map(make, batches))

    def _iterate_releasing(
        self, batches: list[LatentRequest], callback: Callback | None
    ) -> Iterator[tuple[LatentRequest, Image.Image]]:
        if self.text_encoders is None:
            raise UsageError("low_ram", "this pipeline has released its parts", "load the model again")
        distinct = {batch.prompts: batch for batch in batches}
        contexts = {prompts: self.prepare(batch) for prompts, batch in distinct.items()}
        for context in contexts.values():
            mx.eval(context.arrays())
        self.text_encoders = None
        _release()
        latents = [self.sample(batch, context=contexts[batch.prompts], callback=callback) for batch in batches]
        del contexts, context
        self.backbone = _Released(self.backbone.config)
        _release()
        return pictures(batches, PER_IMAGE, map(self.decode, latents))

    def sample(
        self,
        request: LatentRequest,
        *,
        context: PromptContext | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> mx.array:
        """Makes the latents of a request as one batch.

        Args:
            context: what `prepare` made of the request's prompts; None: made here.
            noise: a source of all draws instead of the request's seeds.

        Returns:
            Scaled latents, float32, shape (B, height / 8, width / 8, latent_channels).
        """
        context = self.prepare(request) if context is None else context
        noise = noise or NOISE_SOURCES[request.rng](request.seeds)
        start, extra, constrain = self._start(request, noise)
        net = self._network(context, request.guidance_scale, extra)
        sampler = SAMPLERS[request.sampler]
        options = {"eta": request.eta} if sampler.takes_eta else {}
        jump = sampler.jump(net, self.schedule)
        return sampler.sample(
            jump, start, request.times, self.schedule, noise=noise, callback=callback, constrain=constrain, **options
        )

    def _start(self, request: LatentRequest, noise: Noise) -> tuple[mx.array, mx.array | None, Constraint | None]:
        """Where sampling starts; what the network sees beside the latents; what keeps the unmasked part.

        Draws are made in the order in which diffusers' pipelines make them.
        """
        unit = self.autoencoder.config.pixels_per_latent
        shape = (len(request.seeds), request.height // unit, request.width // unit, self.latent_channels)
        if request.image is None:
            return noise(shape, 0), None, None
        pixels = from_pil(request.image, size=(request.width, request.height))
        all_new = request.mask is not None and request.strength == 1.0
        known = None
        if not (self.is_inpainting and all_new):
            known = self.encode(pixels, noise(shape, IMAGE_POSTERIOR))
        initial = noise(shape, 0)
        alpha, sigma = self.schedule.marginal(request.times[0])
        start = initial if all_new else alpha * known + sigma * initial
        if request.mask is None:
            return start, None, None
        mask = _binary_mask(request.mask, (request.width, request.height))  # (1, H, W, 1), 1 where made anew
        small = mask[:, ::unit, ::unit]
        drawn = noise(shape, MASKED_POSTERIOR)  # diffusers draws it for every U-Net, and its stream goes on behind it
        if self.is_inpainting:
            masked = self.encode(pixels * (1 - mask), drawn)
            return start, mx.concatenate([_repeated(small, len(masked)), masked], axis=-1), None

        def constrain(x: mx.array, t: int) -> mx.array:
            alpha, sigma = self.schedule.marginal(t)
            return small * x + (1 - small) * (alpha * known + sigma * initial)

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

    def encode(self, pixels: mx.array, noise: mx.array) -> mx.array:
        """Scaled latents of pictures in [-1, 1]; tile by tile where they are large."""
        unit = self.autoencoder.config.pixels_per_latent

        if max(pixels.shape[1:3]) <= WHOLE_UP_TO * unit:
            return self.autoencoder.encode_scaled(pixels, noise)
        encoded = encode_tiled(self.autoencoder.encode, pixels, tile=TILE * unit, scale=unit)
        return self.autoencoder.scaled(encoded, noise)

    def preview(self, latents: mx.array) -> list[Image.Image]:
        """Small pictures of the state in the middle of sampling, without the autoencoder: a matrix product a pixel.

        Latents of other widths than 4 channels show their first channels.
        """
        factors = mx.array(PREVIEW_FACTORS[self.is_xl])
        if self.latent_channels != len(factors):
            factors = mx.eye(self.latent_channels, 3) / 3
        return to_pil(mx.clip(latents @ factors, -1, 1))

    def decode(self, latents: mx.array) -> mx.array:
        """Pictures of scaled latents; tile by tile where they are large.

        Half precision overflows in some autoencoders. A result that is not finite is computed again in float32.

        Returns:
            float32, (B, H, W, C), in [-1, 1] but for what the decoder oversteps.
        """
        images = self._decode(latents)
        if not bool(mx.isfinite(images).all()) and _is_half(self.autoencoder):
            log.warning("the autoencoder overflows in half precision; decoding again in float32")
            self.autoencoder.update(tree_map(lambda x: x.astype(mx.float32), self.autoencoder.parameters()))
            images = self._decode(latents)
        return images

    def _decode(self, latents: mx.array) -> mx.array:
        decode = self.autoencoder.decode_scaled
        if max(latents.shape[1:3]) <= WHOLE_UP_TO:
            return decode(latents)
        unit = self.autoencoder.config.pixels_per_latent
        return decode_tiled(decode, latents, tile=TILE, scale=unit)


class _Released:
    """Stands where a part was that `low_ram` has released; its config is still asked for."""

    def __init__(self, config: Any):
        self.config = config


def _release() -> None:
    gc.collect()
    mx.clear_cache()


def _is_half(model: nn.Module) -> bool:
    return model.decoder.conv_out.weight.dtype != mx.float32


def _repeated(x: mx.array, count: int) -> mx.array:
    """One row for all as `count` rows; as many rows stay as they are."""
    return x if len(x) == count else mx.broadcast_to(x, (count, *x.shape[1:]))


def _binary_mask(mask: Image.Image, size: tuple[int, int]) -> mx.array:
    """(1, H, W, 1): 1 where the mask is at least half white."""
    values = from_pil(mask.convert("L").convert("RGB"), size=size)[..., :1]
    return (values >= 0).astype(mx.float32)
