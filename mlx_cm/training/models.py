"""What a run trains: the networks, made anew or taken from a model, and the model folder that comes of them.

The `[model]` section describes networks that are made anew:

    [model.unet]          fields of UNet2DConfig (pixels) or UNet2DConditionConfig (latents)
    [model.schedule]      fields of KarrasSchedule or DiscreteSchedule
    [model.text_encoder]  latents: fields of CLIPTextConfig; trained with the U-Net
    [model]               latents: tokenizer = FOLDER, vae = REF of a trained autoencoder
    [model.vae]           `autoencoder`: fields of AutoencoderKLConfig

Without it the model given with --model goes on, or teaches.
"""

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import mlx_cm
from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.errors import OutputError, UsageError
from mlx_cm.loading import load, load_component
from mlx_cm.lora import Adapter, attach_lora, attached_layers
from mlx_cm.model_folder import (
    ModelIndex,
    class_of,
    new_model,
    tensor_sources,
    weight_files,
    write_component,
    write_model_index,
    write_schedule,
)
from mlx_cm.models.autoencoder_kl import AutoencoderKLConfig
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.models.unet2d import UNet2DConfig
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.pipelines.latent import LatentConsistencyPipeline, LatentSettings
from mlx_cm.pipelines.pixel import ConsistencyModelPipeline, PixelSettings
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule
from mlx_cm.sources import Progress, component_folder, native_folder, save_adapter
from mlx_cm.storage import atomic_folder, read_json, sha256_file
from mlx_cm.tokenizer import CLIPTokenizer
from mlx_cm.training.methods import AUTOENCODER, LATENT, PIXEL
from mlx_cm.training.objectives import EASY, ConsistencySettings
from mlx_cm.training.settings import Settings

Pipeline = ConsistencyModelPipeline | LatentConsistencyPipeline

GUIDANCE_WIDTH = 256  # of a new guidance embedding, as in the published models
# Layers that begin at zero in a new network, so that its blocks begin as identities: OpenAI's `zero_module`.
ZEROED = ("conv2", "conv_out", "to_out.0", "proj_out", "ff.net.2", "out_proj", "fc2")
TEXT_WIDTH_SCALE = 0.02  # standard deviation of new token embeddings


@dataclass
class Trainee:
    """The networks of a run.

    `modules` are the parts that are trained, by the name of their folder; the pipeline is made around them.
    """

    space: str
    modules: dict[str, nn.Module]
    pipeline: Pipeline | None = None  # None for an autoencoder
    teacher: Pipeline | None = None  # whose network is called and never trained
    copied: dict[str, Path] = field(default_factory=dict)  # folders that are part of the result as they are
    base: dict[str, Any] = field(default_factory=dict)  # what the result says of where it comes from
    has_lora: bool = False


def build_trainee(
    settings: Settings, model: str | Path | None, *, num_classes: int | None, progress: Progress | None = None
) -> Trainee:
    """The networks that a run's settings ask for.

    New networks are drawn from the settings' seed.

    Args:
        model: --model; a reference as for `mlx_cm.load`.
        num_classes: of the data; a new pixel network learns them.

    Raises:
        UsageError: no model, or one that the method has no use for; settings that do not fit together.
        ModelError: a config that describes no possible network, or a model that cannot be loaded.
    """
    kind = settings.kind
    if kind.needs_model and model is None:
        raise UsageError("model", f"{settings.method} needs {kind.needs_model}", "--model REF")
    mx.random.seed(settings.train.seed)  # MLX's layers draw their first weights from the global generator
    if kind.space == AUTOENCODER:
        return _autoencoder(settings, model)
    if model is None:
        if "unet" not in settings.model:
            raise UsageError(
                "model", "none given, and [model.unet] describes no new one", "--model REF, or --config RECIPE"
            )
        is_latent = any(name in settings.model for name in ("vae", "text_encoder", "tokenizer"))
        _check_space(settings, LATENT if is_latent else PIXEL)
        return _new_latent(settings, progress) if is_latent else _new_pixel(settings, num_classes)
    if "unet" in settings.model:
        raise UsageError("model", "[model.unet] describes a new network, and one was given as well", "leave one out")
    # Frozen weights need no more digits than they are computed with; trained ones do.
    half = settings.train.dtype if settings.lora.rank else "float32"
    pipeline = load(model, dtype=half, progress=progress)
    folder = native_folder(model, dtype=half, progress=progress)
    base = {"base": pipeline.provenance.get("source"), "base_weights": pipeline.provenance.get("weights")}
    if isinstance(pipeline, ConsistencyModelPipeline):
        _check_space(settings, PIXEL)
        return _from_pixel(settings, pipeline, base, str(model))
    _check_space(settings, LATENT)
    return _from_latent(settings, pipeline, folder, base, str(model))


def _check_space(settings: Settings, space: str) -> None:
    if settings.kind.space not in (None, space):
        raise UsageError("model", f"is of {space} space, and {settings.method} is for {settings.kind.space} space")


# --- pixels


def _new_pixel(settings: Settings, num_classes: int | None) -> Trainee:
    values = {"num_class_embeds": num_classes} | dict(settings.model["unet"])
    if settings.method == "ctm":
        values["trajectory"] = True
    config = config_from_dict(UNet2DConfig, _tuples(values), "[model.unet]")
    schedule = config_from_dict(KarrasSchedule, settings.model.get("schedule", {}), "[model.schedule]")
    unet = new_network(config)
    return Trainee(PIXEL, {"unet": unet}, _pixel_pipeline(settings, unet, schedule, PixelSettings()))


def _from_pixel(settings: Settings, given: ConsistencyModelPipeline, base: dict[str, Any], ref: str) -> Trainee:
    made = given.settings.parameterization
    teaches = settings.kind.distils or settings.method == "ctm"
    if teaches and made != "edm":
        raise UsageError(ref, f"is no diffusion teacher but a {made} model", "convert the teacher with --preset edm")
    if settings.method == "teacher" and made != "edm":
        raise UsageError(ref, f"is a {made} model already; a teacher is trained from a teacher, or from nothing")
    config = given.backbone.config
    if settings.method == "ctm":
        config = dataclasses.replace(config, trajectory=True)
    unet = clone(given.backbone, config)
    pipeline = _pixel_pipeline(settings, unet, given.schedule, given.settings)
    return Trainee(PIXEL, {"unet": unet}, pipeline, given if teaches else None, base=base)


def _pixel_pipeline(
    settings: Settings, unet: nn.Module, schedule: KarrasSchedule, sampling: PixelSettings
) -> ConsistencyModelPipeline:
    parameterization = {"teacher": "edm", "ctm": "trajectory"}.get(settings.method, "consistency")
    schedule = dataclasses.replace(schedule, num_scales=_final_scales(settings, schedule))
    sampling = dataclasses.replace(sampling, parameterization=parameterization, preset=None)
    return ConsistencyModelPipeline(unet, schedule, sampling)


def _final_scales(settings: Settings, schedule: KarrasSchedule) -> int:
    """N of the grid that training ends with."""
    made = settings.objective
    if not isinstance(made, ConsistencySettings):
        return getattr(made, "num_scales", schedule.num_scales)
    if made.curriculum == EASY:
        return schedule.num_scales
    return made.end_scales if made.curriculum == "fixed" else made.end_scales + 1


# --- latents


def _new_latent(settings: Settings, progress: Progress | None) -> Trainee:
    described = settings.model
    for name in ("unet", "text_encoder", "tokenizer", "vae"):
        if name not in described:
            raise UsageError(
                "[model]", f"{name} is missing; a new latent model needs unet, text_encoder, tokenizer and vae"
            )
    tokenizer_folder = Path(described["tokenizer"]).expanduser()
    tokenizer = CLIPTokenizer.from_folder(tokenizer_folder)
    vae_folder = component_folder(described["vae"], progress, part="vae")
    vae = load_component(vae_folder, "float32")
    text_values = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | dict(described["text_encoder"])
    text_encoder = new_network(config_from_dict(CLIPTextConfig, _tuples(text_values), "[model.text_encoder]"))
    channels = vae.config.latent_channels
    unet_values = {
        "in_channels": channels, "out_channels": channels, "cross_attention_dim": text_encoder.config.hidden_size,
    } | dict(described["unet"])  # fmt: skip
    unet = new_network(config_from_dict(UNet2DConditionConfig, _tuples(unet_values), "[model.unet]"))
    schedule = config_from_dict(DiscreteSchedule, described.get("schedule", {}), "[model.schedule]")
    pipeline = LatentConsistencyPipeline(
        unet, vae, [text_encoder], [tokenizer], schedule, LatentSettings(sampler="ddim", guidance_scale=3.0, steps=50)
    )
    copied = {"vae": vae_folder, "tokenizer": tokenizer_folder}
    return Trainee(LATENT, {"unet": unet, "text_encoder": text_encoder}, pipeline, copied=copied)


def _from_latent(
    settings: Settings, given: LatentConsistencyPipeline, folder: Path, base: dict[str, Any], ref: str
) -> Trainee:
    distilled = given.settings.sampler == "lcm" or given.has_guidance_embedding
    if settings.method == "lcf" and not distilled:
        raise UsageError(ref, "is no latent consistency model", f"mlx-cm train lcd --model {ref}")
    if settings.method in ("teacher", "lcd") and distilled:
        raise UsageError(ref, "is a consistency model already", f"mlx-cm train lcf --model {ref}")
    if given.is_inpainting:
        raise UsageError(ref, "sees masks, which the data has not")
    config = given.backbone.config
    if settings.method == "lcd" and not settings.lora.rank:
        config = dataclasses.replace(config, time_cond_proj_dim=GUIDANCE_WIDTH)
    unet = clone(given.backbone, config)
    if settings.lora.rank:
        alpha = settings.lora.rank if settings.lora.alpha is None else settings.lora.alpha
        key = mx.random.key(settings.train.seed)
        attach_lora(unet, settings.lora.targets, rank=settings.lora.rank, alpha=alpha, key=key)
    sampling = given.settings
    if settings.kind.distils and not distilled:
        middle = 1 + (settings.objective.w_min + settings.objective.w_max) / 2
        scale = middle if config.time_cond_proj_dim is not None else 1.0
        sampling = dataclasses.replace(sampling, sampler="lcm", guidance_scale=scale, steps=4)
    pipeline = LatentConsistencyPipeline(
        unet, given.autoencoder, given.text_encoders, given.tokenizers, given.schedule, sampling
    )
    copied = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in ("unet", "scheduler")
    }
    # An adapter for a model that is distilled already is fine-tuned on the data alone.
    teacher = given if settings.kind.distils and not distilled else None
    return Trainee(LATENT, {"unet": unet}, pipeline, teacher, copied, base, has_lora=settings.lora.rank > 0)


# --- autoencoders


def _autoencoder(settings: Settings, model: str | Path | None) -> Trainee:
    if model is not None:
        return Trainee(AUTOENCODER, {"vae": load_component(model, "float32").train()}, base={"base": Path(model).name})
    if "vae" not in settings.model:
        raise UsageError("model", "none given, and [model.vae] describes no new one", "--model REF, or --config RECIPE")
    config = config_from_dict(AutoencoderKLConfig, _tuples(settings.model["vae"]), "[model.vae]")
    return Trainee(AUTOENCODER, {"vae": new_network(config)})


def measure_scaling(autoencoder: nn.Module, pictures: Iterable[mx.array]) -> float:
    """The factor that gives an autoencoder's latents unit variance: 1 / their standard deviation.

    [LDM] appendix G. Its config gets the factor.

    Args:
        pictures: batches of what it was trained on, (B, H, W, C).

    Raises:
        OutputError: all latents are the same.
    """
    total, count = mx.zeros(2), 0
    for x in pictures:
        mean, logvar = autoencoder.encode(x)
        total = total + mx.stack([mean.sum(), (mx.square(mean) + mx.exp(logvar)).sum()])
        count += mean.size
        mx.eval(total)
    first, second = (value / count for value in total.tolist())
    variance = second - first**2
    if not variance > 0:
        raise OutputError("autoencoder", f"its latents have the variance {variance}", "train it longer")
    autoencoder.config = dataclasses.replace(autoencoder.config, scaling_factor=variance**-0.5)
    return autoencoder.config.scaling_factor


# --- networks


def new_network(config: Any) -> nn.Module:
    """A network with new weights: as MLX's layers draw them, but for those that begin at zero.

    Raises:
        ModelError: no array can have these sizes.
    """
    model = new_model(config, class_of(config))
    for path, module in model.named_modules():
        if f".{path}".endswith(tuple(f".{name}" for name in ZEROED)) and "weight" in module:
            module.weight = mx.zeros_like(module.weight)
        if isinstance(module, nn.Embedding):
            module.weight = TEXT_WIDTH_SCALE * mx.random.normal(module.weight.shape)
    mx.eval(model.parameters())
    return model


def clone(model: nn.Module, config: Any) -> nn.Module:
    """A network of another config with a network's weights, which both share until one of them is changed.

    What the other config adds begins at zero, so that at first it changes nothing.
    """
    made = new_model(config, class_of(config))
    made.update(tree_map(mx.zeros_like, made.parameters()))
    made.update(model.parameters())
    return made


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


# --- results


def write_model(folder: Path, trainee: Trainee, told: Mapping[str, Any]) -> Path:
    """Writes the trainee, with the weights that its modules hold, as a native model folder in the place of an old one.

    Args:
        folder: the folder to make; it appears under its name when it is complete.
        told: what the model index says of the training.

    Raises:
        DiskError: there is no space; nothing half-written stays behind.
    """
    with atomic_folder(folder, overwrite=True) as partial:
        weights, components = {}, {}
        for part, module in trainee.modules.items():
            digests = write_component(partial / part, module.config, tensor_sources(module))
            components[part] = class_of(module.config)
            weights |= {f"{part}/{name}": digest for name, digest in digests.items()}
        for name, source in trainee.copied.items():
            shutil.copytree(source, partial / name)
            if (source / "config.json").is_file():
                components[name] = read_json(source / "config.json")["_class_name"]
                weights |= {f"{name}/{path.name}": sha256_file(path) for path in weight_files(source)}
        sampler = {}
        if trainee.pipeline is not None:
            write_schedule(partial / "scheduler", trainee.pipeline.schedule)
            components["scheduler"] = type(trainee.pipeline.schedule).__name__
            sampler = config_to_dict(trainee.pipeline.settings)
        pipeline = next(iter(components.values())) if trainee.pipeline is None else type(trainee.pipeline).__name__
        provenance = {"source": None, "converter": f"mlx-cm {mlx_cm.__version__}", "training": {**told, **trainee.base}}
        write_model_index(partial, ModelIndex(pipeline, components, sampler, provenance, weights))
    return folder


def write_adapter(folder: Path, trainee: Trainee, told: Mapping[str, Any]) -> Path:
    """Writes the trained LoRA of a trainee in the two spellings that other programs load.

    Args:
        folder: gets `pytorch_lora_weights.safetensors`, in kohya's keys, and a folder `peft`.
        told: what the files say of the training.

    Raises:
        DiskError: there is no space; nothing half-written stays behind.
    """
    layers = attached_layers(trainee.modules["unet"])
    notes = {key: str(value) for key, value in told.items()}
    adapter = Adapter(folder.name, {"unet": layers}, notes, sampler=trainee.pipeline.settings.sampler)
    return save_adapter(adapter, folder)
