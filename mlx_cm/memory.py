"""How much memory a picture takes, known from configs and sizes before anything is loaded.

Weights are counted from their shapes. Activations are the largest set alive at once: what is kept for later, such as
the states that a U-Net's way up takes in, and the buffers of the layer at work. How many buffers a layer takes was
measured on MLX's CPU back end, which schedules some operations ahead of the one that runs; estimates of whole models
are within 15 % there. A GPU is assumed to take as many, but for what its kernels are known to do otherwise: that was
not measured.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_cm.backend import FUSED_HEAD_SIZES, fused_head_size, on_gpu, shifting_pays
from mlx_cm.errors import MemoryBudgetError, UsageError
from mlx_cm.model_folder import MODELS, class_of, resolve_dtype
from mlx_cm.models.autoencoder_kl import AutoencoderKLConfig
from mlx_cm.models.autoencoder_tiny import AutoencoderTinyConfig
from mlx_cm.models.clip_text import CLIPTextConfig
from mlx_cm.models.unet2d import DOWN_BLOCKS, UP_BLOCKS, BlockKind, UNet2DConfig
from mlx_cm.models.unet2d_condition import UNet2DConditionConfig
from mlx_cm.pipelines.latent import TILE, WHOLE_UP_TO
from mlx_cm.quantization import FLOAT_LAYERS, plan_quantization, replace_linear_layers

TEXT_TOKENS = 77

# Maps alive while a layer works, as multiples of the width per position.
RESNET_IN, RESNET_OUT = 2, 8  # of the widths going in and coming out
UPSAMPLE = 8.6  # of the doubled map, the normalisation behind it included
JOINED = 3  # of a map joined with a skip, and its normalisation
TRANSFORMER = 23  # feed-forward, 13, with the attentions and the residual around it
SELF_ATTENTION = 12  # normalisation, q, k, v and their copies
TINY_BLOCK = 9.1  # the doubling before it included
TINY_AHEAD = 9  # convolutions scheduled at once where they are unfolded: little stands between them
TEXT_LAYER = 12  # beside four times the width inside the MLP
UNFOLDED = 10  # of a 3x3 convolution's input where it is padded and unfolded, not shifted
BATCHED = 1.5  # more of doubled maps above one image: shifted rows of several maps have to be copied

GB = 10**9
GPU_MEMORY_KEYS = ("max_recommended_working_set_size", "total_memory", "memory_size")
# What makes a stage need less, by the stages that it helps.
REMEDIES = {
    "--low-ram": ("encode text", "denoise", "decode"),
    "--tiled": ("decode",),
    "--vae tiny": ("decode",),
    "a smaller --width and --height": ("denoise", "decode"),
}
PIXEL_REMEDY = "a smaller --batch"
STAGES = {
    CLIPTextConfig: "encode text",
    UNet2DConfig: "denoise",
    UNet2DConditionConfig: "denoise",
    AutoencoderKLConfig: "decode",
    AutoencoderTinyConfig: "decode",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes that generating takes."""

    weights: dict[str, int]  # by part
    stages: dict[str, int]  # peak of each stage, the weights in memory then included

    @property
    def peak(self) -> int:
        """Of all stages."""
        return max(self.stages.values(), default=0)


class Map(NamedTuple):
    """Size of the maps that a layer works on, without their width in channels."""

    batch: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        """Of all maps of the batch."""
        return self.batch * self.height * self.width

    def doubled(self) -> "Map":
        """Twice as high and wide."""
        return Map(self.batch, 2 * self.height, 2 * self.width)

    def halved(self) -> "Map":
        """Half as high and wide, odd sizes rounded up."""
        return Map(self.batch, -(-self.height // 2), -(-self.width // 2))


class Step(NamedTuple):
    """A layer at work, in values."""

    work: float  # alive while it works, beside what is kept
    keeps: float = 0  # change of what is kept, after it


class Level(NamedTuple):
    """One resolution level of a U-Net."""

    width: int
    blocks: int
    heads: int = 0  # 0: no attention
    by_resnet: bool = False  # whether a residual block doubles the map, in place of a convolution


def estimate(
    parts: Mapping[str, Any],
    *,
    dtype: str | None = None,
    quantize: int | Mapping[str, int] | None = None,
    width: int | None = None,
    height: int | None = None,
    batch: int = 1,
    guidance_batch: int = 1,
    vae: str = "full",
    tiled: bool | None = None,
    low_ram: bool = False,
) -> Estimate:
    """Estimates the memory for generating.

    An autoencoder whose config says that it overflows in float16 is counted in float32, in which it is loaded.

    Args:
        parts: name => config of every component: the U-Net, and with a latent one text encoders and autoencoder. What
            makes no pictures takes no stage.
        dtype: computed in; None: float16 on a GPU, float32 on a CPU.
        quantize: bits of the linear layers, of all parts or by part. On a CPU they are unpacked to be computed with,
            and save nothing.
        width, height: pixels; None: what the U-Net was trained on.
        batch: images at once.
        guidance_batch: 2 where each step calls the U-Net with and without the prompt.
        vae: "tiny": TAESD stands in for the autoencoder among the parts.
        tiled: whether the autoencoder works tile by tile; None: where the pipeline does so of itself.
        low_ram: each part is read at its first use and released after its last.

    Raises:
        UsageError: an unknown dtype, or bits other than 4 and 8.
    """
    if vae == "tiny":
        parts = {
            name: AutoencoderTinyConfig() if isinstance(config, AutoencoderKLConfig) else config
            for name, config in parts.items()
        }
    bits = quantize if isinstance(quantize, Mapping) else dict.fromkeys(parts, quantize)
    itemsizes = {name: _itemsize(config, resolve_dtype(dtype)) for name, config in parts.items()}
    weights = {name: weight_bytes(config, itemsizes[name], bits.get(name)) for name, config in parts.items()}
    unit = max((getattr(config, "pixels_per_latent", 1) for config in parts.values()), default=1)
    size = _latent_size(parts.values(), batch, width, height, unit)
    if tiled is None:
        tiled = max(size.height, size.width) > WHOLE_UP_TO
    inputs = {
        "encode text": Map(batch * guidance_batch, TEXT_TOKENS, 1),
        "denoise": Map(batch * guidance_batch, size.height, size.width),
        "decode": Map(batch, min(size.height, TILE), min(size.width, TILE)) if tiled else size,
    }
    stages = {}
    for stage, given in inputs.items():
        at_work = [name for name, config in parts.items() if STAGES.get(type(config)) == stage]
        if not at_work:
            continue
        resident = sum(weights[name] for name in (at_work if low_ram else parts))
        activations = max(peak_values(parts[name], given) * itemsizes[name] for name in at_work)
        if stage == "decode" and tiled:
            activations += 2 * 3 * 4 * size.positions * unit**2  # the picture before and after a tile, in float32
        stages[stage] = round(resident + activations)
    return Estimate(weights, stages)


def _itemsize(config: Any, dtype: mx.Dtype) -> int:
    overflows = dtype == mx.float16 and getattr(config, "force_upcast", False)
    return mx.float32.size if overflows else dtype.size


def _latent_size(configs: Iterable[Any], batch: int, width: int | None, height: int | None, unit: int) -> Map:
    """What the U-Net works on: latents, or pixels where unit is 1."""
    trained = next((config.sample_size for config in configs if STAGES.get(type(config)) == "denoise"), None) or TILE
    rows, columns = (trained, trained) if isinstance(trained, int) else trained
    return Map(batch, height // unit if height else rows, width // unit if width else columns)


def available_memory() -> int | None:
    """Bytes that computing may take on the device; None where nobody says.

    A GPU: what Metal recommends as the largest working set, or the memory of a CUDA device. A CPU: what Linux calls
    available, elsewhere all the machine has.
    """
    if on_gpu():
        info = mx.device_info()
        return next((int(info[key]) for key in GPU_MEMORY_KEYS if info.get(key)), None)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])  # from kB
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def check_budget(needed: Estimate, max_memory: float | None = None) -> None:
    """Refuses work that does not fit.

    Args:
        max_memory: allowed, in GB (10^9 bytes); None: what the device has, where that is known.

    Raises:
        UsageError: max_memory is no amount.
        MemoryBudgetError: a stage needs more.
    """
    if max_memory is not None and not 0 < max_memory < math.inf:  # false for NaN too
        raise UsageError(f"max_memory {max_memory:g}", "expected gigabytes, more than 0")
    allowed = available_memory() if max_memory is None else max_memory * GB
    if allowed is None:
        return
    beyond = [stage for stage, peak in needed.stages.items() if peak > allowed]
    if not beyond:
        return
    stages = ", ".join(f"{peak / GB:.2f} GB to {stage}" for stage, peak in needed.stages.items())
    weights = ", ".join(f"{name} {size / GB:.2f} GB" for name, size in needed.weights.items())
    limit = "available" if max_memory is None else "allowed"
    remedies = [remedy for remedy, helps in REMEDIES.items() if any(stage in helps for stage in beyond)]
    if on_gpu():
        remedies.insert(0, "--quantize 8")  # a CPU unpacks what is quantised
    if set(needed.stages) == {"denoise"}:
        remedies = [PIXEL_REMEDY]
    raise MemoryBudgetError(
        "memory",
        f"needs an estimated {stages} (of which weights: {weights}); {limit}: {allowed / GB:.2f} GB",
        ", ".join(remedies),
    )


def weight_bytes(config: Any, itemsize: int, quantize: int | None = None) -> int:
    """Bytes of a component's weights in memory; from shapes, nothing is computed.

    Args:
        itemsize: bytes of a value, of parts that are not kept in float32.
    """
    model = MODELS[class_of(config)][0](config)
    if quantize is not None and type(model) in FLOAT_LAYERS and on_gpu():
        replace_linear_layers(model, plan_quantization(model, quantize))
    kept = tuple(f"{part}." for part in model.float32_parts)
    return sum(
        value.size * (4 if value.dtype == mx.uint32 or name.startswith(kept) else itemsize)
        for name, value in tree_flatten(model.parameters())
    )


def peak_values(config: Any, size: Map) -> float:
    """Values alive at once when a component is called.

    Args:
        size: of its input: tokens, latents or pixels.
    """
    kept = peak = 0.0
    for step in STEPS[type(config)](config, size):
        peak = max(peak, kept + step.work)
        kept += step.keeps
    return peak


def _unfolded(size: Map, channels: int) -> float:
    """Values of a 3x3 convolution's unfolded input, where it is computed so."""
    if on_gpu() or shifting_pays((size.batch, size.height, size.width, channels)):
        return 0
    return UNFOLDED * channels * size.positions


def _resnet(size: Map, channels: int, out_channels: int) -> float:
    """Values of a residual block at work."""
    unfolded = _unfolded(size, channels) + _unfolded(size, out_channels)
    return (RESNET_IN * channels + RESNET_OUT * out_channels) * size.positions + unfolded


def _upsample_resnet(size: Map, widths: tuple[int, int, int], by_resnet: bool = False, lingering: float = 0) -> float:
    """Doubling to this size, and the residual block behind it, which begins before the former's buffers are free.

    Args:
        widths: of what is doubled; of what goes into the block, a skip included; of what comes out.
        by_resnet: whether a residual block doubles, in place of a convolution.
        lingering: buffers that are not yet free when the doubling begins.
    """
    channels, joined, _ = widths
    entering = JOINED * joined * size.positions if joined > channels else 0
    unfolded, following = _unfolded(size, channels), _resnet(size, *widths[1:])
    if by_resnet:
        return max(_resnet(size, channels, channels) + 2 * channels * size.positions + entering, following)
    if unfolded:
        return lingering + unfolded + following
    doubling = (UPSAMPLE + BATCHED * (size.batch > 1)) * channels * size.positions
    return max(doubling + max(lingering, entering), following)


def _scores(size: Map, level: Level) -> float:
    """Values of attention scores among all positions, where the kernel stores them."""
    if not level.heads or (on_gpu() and fused_head_size(level.width // level.heads) in FUSED_HEAD_SIZES):
        return 0
    return level.heads * size.batch * (size.height * size.width) ** 2


def _transformer(size: Map, level: Level) -> float:
    """Values of a transformer at work; none on a level without attention."""
    if not level.heads:
        return 0
    text_scores = 0 if on_gpu() else level.heads * TEXT_TOKENS
    return (TRANSFORMER * level.width + text_scores) * size.positions + _scores(size, level)


def _self_attention(size: Map, level: Level) -> float:
    """Values of an attention without feed-forward at work; none on a level without attention."""
    return SELF_ATTENTION * level.width * size.positions + _scores(size, level) if level.heads else 0


def _unet_steps(
    down: list[Level], mid: list[Level], up: list[Level], attention: Callable[[Map, Level], float], size: Map
) -> Iterator[Step]:
    """The way down, which keeps its states; the middle; the way up, which takes them."""
    skips = [(down[0].width, size)]
    yield Step(0, down[0].width * size.positions)
    for index, level in enumerate(down):
        for _ in range(level.blocks):
            work = max(_resnet(size, skips[-1][0], level.width), attention(size, level))
            yield Step(work, level.width * size.positions)
            skips.append((level.width, size))
        if index < len(down) - 1:
            size = size.halved()
            yield Step(UNFOLDED * level.width * size.positions, level.width * size.positions)
            skips.append((level.width, size))
    channels = down[-1].width
    for level in mid:
        yield Step(max(_resnet(size, channels, channels), attention(size, level)))
    lingering = 0.0
    for index, level in enumerate(up):
        for block in range(level.blocks):
            width, size = skips.pop()
            if index and not block:
                widths = (channels, channels + width, level.width)
                work = max(_upsample_resnet(size, widths, up[index - 1].by_resnet, lingering), attention(size, level))
            else:
                work = max(_resnet(size, channels + width, level.width), attention(size, level))
            yield Step(work, -width * size.positions)
            channels = level.width
        # Behind a transformer's attention comes its feed-forward, in whose time the scores are freed.
        lingering = _scores(size, level) if attention is _self_attention else 0.0


def _condition_steps(config: UNet2DConditionConfig, size: Map) -> Iterator[Step]:
    down, mid, up = (
        [Level(level.width, len(level.depths), level.heads * level.attention) for level in levels]
        for levels in (config.down_levels, config.mid_levels, config.up_levels)
    )
    return _unet_steps(down, mid, up, _transformer, size)


def _pixel_steps(config: UNet2DConfig, size: Map) -> Iterator[Step]:
    def level(kind: BlockKind, width: int, blocks: int) -> Level:
        heads = width // (config.attention_head_dim or width) if kind.attention else 0
        return Level(width, blocks, heads, (kind.resample or config.upsample_type) == "resnet")

    widths, blocks = config.block_out_channels, config.layers_per_block
    down = [level(DOWN_BLOCKS[name], *row) for name, *row in _rows(config.down_block_types, widths, blocks)]
    up = [level(UP_BLOCKS[name], *row) for name, *row in _rows(config.up_block_types, widths[::-1], blocks + 1)]
    return _unet_steps(down, [level(BlockKind(config.add_attention), widths[-1], 2)], up, _self_attention, size)


def _rows(names: tuple[str, ...], widths: tuple[int, ...], blocks: int) -> Iterator[tuple[str, int, int]]:
    return ((name, width, blocks) for name, width in zip(names, widths, strict=True))


def _decoder_steps(config: AutoencoderKLConfig, size: Map) -> Iterator[Step]:
    widths = config.block_out_channels[::-1]
    channels = widths[0]
    mid = Level(channels, 2, heads=int(config.mid_block_add_attention))
    yield Step(max(_resnet(size, channels, channels), _self_attention(size, mid)))
    for index, width in enumerate(widths):
        if index:
            size = size.doubled()
            yield Step(_upsample_resnet(size, (channels, channels, width)))
        yield Step(_resnet(size, channels, width))
        channels = width


def _tiny_steps(config: AutoencoderTinyConfig, size: Map) -> Iterator[Step]:
    width = config.decoder_block_out_channels[0]
    maps = TINY_BLOCK + BATCHED * (size.batch > 1)
    for _ in config.num_decoder_blocks:
        yield Step(maps * width * size.positions + TINY_AHEAD * _unfolded(size, width))
        size = size.doubled()


def _text_steps(config: CLIPTextConfig, size: Map) -> Iterator[Step]:
    """One layer: all are alike."""
    scores = config.num_attention_heads * size.batch * size.height**2
    yield Step((TEXT_LAYER * config.hidden_size + 4 * config.intermediate_size) * size.positions + scores)


STEPS = {
    UNet2DConditionConfig: _condition_steps,
    UNet2DConfig: _pixel_steps,
    AutoencoderKLConfig: _decoder_steps,
    AutoencoderTinyConfig: _tiny_steps,
    CLIPTextConfig: _text_steps,
}
