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
from mlx_cm.loading import TEXT_ENCODERS, autoencoder_folder, load
from mlx_cm.lora import Adapter, attach_lora, attached_layers
from mlx_cm.model_folder import (
    ModelIndex,
    class_of,
    load_model,
    new_model,
    read_model_index,
    tensor_sources,
    weight_files,
    write_component,
    write_model_index,
    write_schedule,
)
from mlx_cm.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.models.unet2d import UNet2D, UNet2DConfig
from mlx_cm.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mlx_cm.pipelines.latent import SAMPLERS, LatentConsistencyPipeline, LatentSettings
from mlx_cm.pipelines.pixel import PARAMETERIZATIONS, ConsistencyModelPipeline, PixelSettings
from mlx_cm.quantization import quantization_of
from mlx_cm.schedules import DiscreteSchedule, KarrasSchedule
from mlx_cm.sources import Progress, native_folder, save_adapter
from mlx_cm.storage import INDEX_NAME, atomic_folder, read_json, sha256_file
from mlx_cm.tokenizer import FILES as TOKENIZER_FILES
from mlx_cm.tokenizer import CLIPTokenizer
from mlx_cm.training.methods import AUTOENCODER, LATENT, PIXEL
from mlx_cm.training.objectives import EASY, ConsistencySettings
from mlx_cm.training.settings import Settings

Pipeline = ConsistencyModelPipeline | LatentConsistencyPipeline

SIZE_WIDTH = 8  # of the sinusoid of each size that a new network of SDXL's kind is told
GUIDANCE_WIDTH = 256  # of a new guidance embedding, as in the published models
# Layers that begin at zero in a new network: OpenAI's `zero_module`. Blocks that begin as identities let no prompt
# through, and a network that sees much noise takes long to find out that there is one; so those of latents do not.
ZEROED = {
    UNet2D: ("conv2", "to_out.0", "conv_out"),
    UNet2DCondition: ("conv_out",),
    AutoencoderKL: ("conv2", "to_out.0"),
}
# By how much more than MLX draws them these layers begin: pooled text is to be heard beside the time.
LOUDER = {"text_projection": 5.0, "add_embedding.linear_2": 5**0.5}
FIRST_LOGVAR = -6.0  # of a new autoencoder's posterior: with a variance of 1 its decoder would see little but noise
TEXT_WIDTH_SCALE = 0.02  # standard deviation of new token embeddings

CONFIG = "config.json"
# What `[model]` may describe, by the space of the new network: a table of settings, or a reference.
DESCRIBED: dict[str, dict[str, type]] = {
    PIXEL: {"unet": Mapping, "schedule": Mapping},
    LATENT: {"unet": Mapping, "text_encoder": Mapping, "tokenizer": str, "vae": str, "schedule": Mapping},
    AUTOENCODER: {"vae": Mapping},
}
OPTIONAL = ("schedule",)
# What a model of pixels may be for a method that begins with it.
BEGINNINGS = {
    "teacher": ("edm",),
    "cd": ("edm",),
    "ct": ("edm", "consistency"),
    "ict": ("edm", "consistency"),
    "ctm": ("edm",),
}


@dataclass
class Trainee:
    """The networks of a run.

    `modules` are the parts that are trained, by the name of their folder; the pipeline is made around them.
    """

    space: str
    modules: dict[str, nn.Module]
    pipeline: Pipeline | None = None  # None for an autoencoder
    teacher: nn.Module | None = None  # a network of the pipeline's kind that is called and never trained
    copied: dict[str, Path] = field(default_factory=dict)  # folders that are part of the result as they are
    base: dict[str, Any] = field(default_factory=dict)  # what the result says of where it comes from
    has_lora: bool = False

    def release_encoders(self) -> None:
        """Frees what is only needed to encode and to decode; the pipeline makes no pictures any more."""
        if self.space == LATENT:
            self.pipeline.release("text_encoders", "autoencoder")


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
    method, kind = settings.method, settings.kind
    if kind.needs_model and model is None:
        raise UsageError("model", f"{method} needs {kind.needs_model}", "--model REF")
    if model is not None and settings.model:
        raise UsageError("[model]", f"describes a new network, and {model} was given as well", "leave one of them out")
    if method == "lcm-lora" and not settings.lora.rank:
        raise UsageError("lora.rank 0", "lcm-lora trains an adapter", f"mlx-cm train lcd --model {model}")
    mx.random.seed(settings.train.seed)  # MLX's layers draw their first weights from the global generator
    if model is None:
        space = _described_space(settings)
        if settings.lora.rank:
            raise UsageError("lora.rank", "an adapter is trained for a model that exists", "--model REF")
        made = {PIXEL: _new_pixel, LATENT: _new_latent, AUTOENCODER: _new_autoencoder}[space]
        return made(settings, num_classes, progress)
    if kind.space == AUTOENCODER:
        _check_space(settings, AUTOENCODER)
        return _from_autoencoder(model, progress)
    # Frozen weights need no more digits than they are computed with; trained ones do.
    computed = settings.train.dtype
    trained = computed if settings.lora.rank else "float32"
    folder = native_folder(model, dtype=trained, progress=progress)
    given = load(folder, dtype=computed)
    space = PIXEL if isinstance(given, ConsistencyModelPipeline) else LATENT
    _check_space(settings, space)
    if quantization_of(given.backbone) is not None:
        raise UsageError(str(model), "is quantised; training needs all digits", "train the model it was made from")
    network = given.backbone if trained == computed else load_model(folder / "unet", trained)
    begin = _from_pixel if space == PIXEL else _from_latent
    trainee = begin(settings, given, network, str(model))
    trainee.base |= {"base": given.provenance.get("source"), "base_weights": given.provenance.get("weights")}
    if space == LATENT:
        trainee.copied |= _other_parts(folder)
    return trainee


def _described_space(settings: Settings) -> str:
    """The space of the network that `[model]` describes, once it is complete."""
    described, space = settings.model, settings.kind.space
    if space != AUTOENCODER:
        space = LATENT if described.keys() & (DESCRIBED[LATENT].keys() - DESCRIBED[PIXEL].keys()) else PIXEL
        _check_space(settings, space)
    known = DESCRIBED[space]
    first = next(iter(known))
    if first not in described:
        why = f"none given, and [model.{first}] describes no new one"
        raise UsageError("model", why, "--model REF, or --config RECIPE")
    missing = [name for name in known if name not in (*described, *OPTIONAL)]
    unknown = [name for name in described if name not in known]
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise UsageError("[model]", f"{what}; for {space} space it has {', '.join(known)}")
    for name, value in described.items():
        if not isinstance(value, known[name]):
            wanted = "a reference" if known[name] is str else "a table of settings"
            raise UsageError(f"[model] {name}", f"expected {wanted}, got {value!r}")
    return space


def _check_space(settings: Settings, space: str) -> None:
    if settings.kind.space not in (None, space):
        raise UsageError("model", f"is of {space} space, and {settings.method} is for {settings.kind.space} space")
    if settings.lora.rank and space != LATENT:
        raise UsageError("lora.rank", "adapters are for latent models")


# --- pixels


def _new_pixel(settings: Settings, num_classes: int | None, progress: Progress | None) -> Trainee:
    values = {"num_class_embeds": num_classes, **settings.model["unet"]}
    if settings.method == "ctm":
        values["trajectory"] = True
    config = config_from_dict(UNet2DConfig, values, "[model.unet]")
    schedule = config_from_dict(KarrasSchedule, settings.model.get("schedule", {}), "[model.schedule]")
    unet = new_network(config)
    return Trainee(PIXEL, {"unet": unet}, _pixel_pipeline(settings, unet, schedule, PixelSettings()))


def _from_pixel(settings: Settings, given: ConsistencyModelPipeline, network: nn.Module, ref: str) -> Trainee:
    made, wanted = given.settings.parameterization, BEGINNINGS[settings.method]
    if made not in wanted:
        title, titles = PARAMETERIZATIONS[made].title, [PARAMETERIZATIONS[one].title for one in wanted]
        raise UsageError(ref, f"is {title}; {settings.method} begins with {' or '.join(titles)}")
    config = network.config
    if settings.method == "ctm":
        config = dataclasses.replace(config, trajectory=True)
    unet = clone(network, config)
    pipeline = _pixel_pipeline(settings, unet, given.schedule, given.settings)
    teaches = settings.kind.distils or settings.method == "ctm"
    return Trainee(PIXEL, {"unet": unet}, pipeline, given.backbone if teaches else None)


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


def _new_latent(settings: Settings, num_classes: int | None, progress: Progress | None) -> Trainee:
    described = settings.model
    tokenizer_folder = Path(described["tokenizer"]).expanduser()
    tokenizer = CLIPTokenizer.from_folder(tokenizer_folder)
    vae_folder = autoencoder_folder(described["vae"], progress)
    vae = load_model(vae_folder, "float32")
    text_values = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_config = config_from_dict(CLIPTextConfig, {**text_values, **described["text_encoder"]}, "[model.text_encoder]")
    channels = vae.config.latent_channels
    unet_values = {
        "in_channels": channels, "out_channels": channels, "cross_attention_dim": text_config.hidden_size,
    }  # fmt: skip
    if described["unet"].get("addition_embed_type") == "text_time":  # pooled text and six sizes beside the time
        width = described["unet"].get("addition_time_embed_dim", SIZE_WIDTH)
        text_values["architectures"] = ("CLIPTextModelWithProjection",)
        text_config = config_from_dict(
            CLIPTextConfig, {**text_values, **described["text_encoder"]}, "[model.text_encoder]"
        )
        unet_values |= {
            "addition_time_embed_dim": width,
            "projection_class_embeddings_input_dim": text_config.projection_dim + 6 * width,
        }
    unet_config = config_from_dict(UNet2DConditionConfig, {**unet_values, **described["unet"]}, "[model.unet]")
    unet_values |= {"time_cond_proj_dim": None}  # a guidance embedding comes with distillation
    for part, config, values in (("text_encoder", text_config, text_values), ("unet", unet_config, unet_values)):
        for name, value in values.items():
            if getattr(config, name) != value:
                raise UsageError(f"[model.{part}] {name}", f"expected {value}, got {getattr(config, name)}")
    text_encoder, unet = new_network(text_config), new_network(unet_config)
    schedule = config_from_dict(DiscreteSchedule, described.get("schedule", {}), "[model.schedule]")
    sampling = LatentSettings(sampler="ddim", guidance_scale=3.0, steps=50)
    pipeline = LatentConsistencyPipeline(unet, vae, [text_encoder], [tokenizer], schedule, sampling)
    copied = {"vae": vae_folder, "tokenizer": tokenizer_folder}
    return Trainee(LATENT, {"unet": unet, "text_encoder": text_encoder}, pipeline, copied=copied)


def _from_latent(settings: Settings, given: LatentConsistencyPipeline, network: nn.Module, ref: str) -> Trainee:
    sampling, lora = given.settings, settings.lora
    if sampling.sampler == "tcd":
        raise UsageError(ref, "is distilled for TCD, which is not trained here", "train the model it was made from")
    distilled = sampling.sampler == "lcm" or given.has_guidance_embedding
    if settings.method == "lcf" and not distilled:
        raise UsageError(ref, "is no latent consistency model", f"mlx-cm train lcd --model {ref}")
    if settings.method in ("teacher", "lcd") and distilled:
        raise UsageError(ref, "is a consistency model already", f"mlx-cm train lcf --model {ref}")
    if given.is_inpainting:
        raise UsageError(ref, "sees masks, which the data has not")
    # An adapter for a model that is distilled already is fine-tuned on the data alone.
    teacher = given.backbone if settings.kind.distils and not distilled else None
    config = network.config
    if settings.method == "lcd" and not lora.rank:
        config = dataclasses.replace(config, time_cond_proj_dim=GUIDANCE_WIDTH)
    unet = clone(network, config)
    if lora.rank:
        alpha = lora.rank if lora.alpha is None else lora.alpha
        attach_lora(unet, lora.targets, rank=lora.rank, alpha=alpha, key=mx.random.key(settings.train.seed))
    if teacher is not None:
        middle = 1 + (settings.objective.w_min + settings.objective.w_max) / 2
        scale = middle if config.time_cond_proj_dim is not None else 1.0
        sampling = dataclasses.replace(sampling, sampler="lcm", guidance_scale=scale, steps=4)
    elif sampling.sampler is None:  # a base model waits for an adapter; the samples of its training do not
        plain = SAMPLERS["ddim"]
        sampling = dataclasses.replace(sampling, sampler="ddim", guidance_scale=plain.guidance_scale, steps=plain.steps)
    pipeline = LatentConsistencyPipeline(
        unet, given.autoencoder, given.text_encoders, given.tokenizers, given.schedule, sampling
    )
    return Trainee(LATENT, {"unet": unet}, pipeline, teacher, has_lora=lora.rank > 0)


def _other_parts(folder: Path) -> dict[str, Path]:
    """The folders of a latent model beside the U-Net: components and tokenizers."""
    parts = [part for part in read_model_index(folder).components if part not in ("unet", "scheduler")]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in parts if part in TEXT_ENCODERS]
    return {name: folder / name for name in (*parts, *tokenizers)}


def part_files(folder: Path) -> list[Path]:
    """The files that a component or a tokenizer consists of, whatever else lies beside them."""
    if not (folder / CONFIG).is_file():
        return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    index = [folder / INDEX_NAME] if (folder / INDEX_NAME).is_file() else []
    return [folder / CONFIG, *index, *weight_files(folder)]


# --- autoencoders


def _new_autoencoder(settings: Settings, num_classes: int | None, progress: Progress | None) -> Trainee:
    config = config_from_dict(AutoencoderKLConfig, settings.model["vae"], "[model.vae]")
    return Trainee(AUTOENCODER, {"vae": new_network(config)})


def _from_autoencoder(model: str | Path, progress: Progress | None) -> Trainee:
    vae = load_model(autoencoder_folder(model, progress), "float32")
    if not isinstance(vae, AutoencoderKL):
        raise UsageError(str(model), f"is an {type(vae).__name__}, which has no posterior to train")
    return Trainee(AUTOENCODER, {"vae": vae}, base={"base": Path(model).name})


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
    zeroed = tuple(f".{name}" for name in ZEROED.get(type(model), ()))
    for path, module in model.named_modules():
        if f".{path}".endswith(zeroed):
            module.update(tree_map(mx.zeros_like, module.parameters()))
        if path in LOUDER:
            module.weight = LOUDER[path] * module.weight
        if isinstance(module, nn.Embedding):
            module.weight = TEXT_WIDTH_SCALE * mx.random.normal(module.weight.shape)
    if isinstance(model, AutoencoderKL):
        last = model.quant_conv if "quant_conv" in model else model.encoder.conv_out
        is_logvar = mx.arange(2 * config.latent_channels) >= config.latent_channels
        last.bias = mx.where(is_logvar, FIRST_LOGVAR, last.bias)
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
        for part, source in trainee.copied.items():
            (partial / part).mkdir()
            for path in part_files(source):
                shutil.copyfile(path, partial / part / path.name)
            if (source / CONFIG).is_file():
                components[part] = read_json(source / CONFIG)["_class_name"]
                weights |= {f"{part}/{path.name}": sha256_file(path) for path in weight_files(source)}
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
    notes = {key: str(value) for key, value in {**told, "base": trainee.base.get("base")}.items() if value is not None}
    sampling = trainee.pipeline.settings
    adapter = Adapter(folder.name, {"unet": layers}, notes, sampler=sampling.sampler if sampling.distilled else None)
    return save_adapter(adapter, folder)
