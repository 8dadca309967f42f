"""The pixel-space U-Net of consistency models: [ADM]'s architecture with the names of diffusers' `UNet2DModel`."""

import itertools
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_cm import backend
from mlx_cm.models.layers import (
    Condition,
    Conv2d,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    SelfAttention2D,
    TimestepEmbedding,
    Upsample2D,
    sinusoidal_embedding,
)


@dataclass(frozen=True)
class BlockKind:
    """What a published block name stands for."""

    attention: bool
    resample: str | None = None  # "conv" or "resnet"; None: the config's downsample_type or upsample_type


DOWN_BLOCKS = {
    "DownBlock2D": BlockKind(attention=False, resample="conv"),
    "ResnetDownsampleBlock2D": BlockKind(attention=False, resample="resnet"),
    "AttnDownBlock2D": BlockKind(attention=True),
}
UP_BLOCKS = {
    "UpBlock2D": BlockKind(attention=False, resample="conv"),
    "ResnetUpsampleBlock2D": BlockKind(attention=False, resample="resnet"),
    "AttnUpBlock2D": BlockKind(attention=True),
}
# The published config also has settings of which this family of models uses one value.
FIXED_SETTINGS = {
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "act_fn": "silu",
    "class_embed_type": None,
    "mid_block_scale_factor": 1.0,
}
# Settings that are at least 1 where they are given.
COUNTS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "layers_per_block",
    "norm_num_groups",
    "num_class_embeds",
    "time_embedding_dim",
)


@dataclass(frozen=True)
class UNet2DConfig:
    """Size and layout of a `UNet2D`; fields and defaults of diffusers' `UNet2DModel`."""

    sample_size: int = 64  # height and width of the images, pixels
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)  # width per resolution level
    layers_per_block: int = 2  # residual blocks per level on the way down; one more on the way up
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    downsample_type: str = "conv"  # of the attention blocks: "resnet" or "conv"
    upsample_type: str = "conv"
    downsample_padding: int = 1
    attention_head_dim: int | None = 8  # channels per head; None: one head
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    attn_norm_num_groups: int | None = None  # of the middle attention; None: see `mid_attention_groups`
    add_attention: bool = True  # whether the middle block has attention
    resnet_time_scale_shift: str = "default"  # the embedding is added; "scale_shift": it scales and shifts
    num_class_embeds: int | None = None  # None: unconditional
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    center_input_sample: bool = False  # whether inputs are mapped from [0, 1] to [-1, 1] first
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    dropout: float = 0.0  # in residual blocks, of calls that give a key: in training
    num_train_timesteps: int | None = None
    time_embedding_type: str = "positional"
    mid_block_type: str | None = "UNetMidBlock2D"
    act_fn: str = "silu"
    class_embed_type: str | None = None
    mid_block_scale_factor: float = 1.0
    trajectory: bool = False  # [CTM]'s network, told a second level; a field of this program alone

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if not levels or not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                f"expected as many block_out_channels ({levels}) as down_block_types ({len(self.down_block_types)}) "
                f"and up_block_types ({len(self.up_block_types)})"
            )
        choices = {
            "down_block_types": (self.down_block_types, DOWN_BLOCKS),
            "up_block_types": (self.up_block_types, UP_BLOCKS),
            "downsample_type": ([self.downsample_type], ("conv", "resnet")),
            "upsample_type": ([self.upsample_type], ("conv", "resnet")),
            "downsample_padding": ([self.downsample_padding], (0, 1)),
            "resnet_time_scale_shift": ([self.resnet_time_scale_shift], ("default", "scale_shift")),
            **{name: ([getattr(self, name)], (value,)) for name, value in FIXED_SETTINGS.items()},
        }
        for name, (given, known) in choices.items():
            for value in given:
                if value not in known:
                    raise ValueError(f"{name}: {value!r} is not supported, expected one of {list(known)}")
        for name in COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= self.norm_eps < 1:  # false for NaN too
            raise ValueError(f"norm_eps: expected at least 0 and below 1, got {self.norm_eps}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and below 1, got {self.dropout}")
        if self.sample_size % 2 ** (levels - 1):
            raise ValueError(f"sample_size {self.sample_size} cannot be halved {levels - 1} times")
        for width in self.block_out_channels:
            if width < 1:
                raise ValueError(f"block_out_channels: expected widths of at least 1, got {width}")
            for name in ("norm_num_groups", "attention_head_dim"):
                self._check_divides(name, width)
        self._check_divides("attn_norm_num_groups", self.block_out_channels[-1])
        if not 0 <= self.freq_shift < self.block_out_channels[0] // 2:
            raise ValueError(f"freq_shift: expected at least 0 and below half the first width, got {self.freq_shift}")

    def _check_divides(self, name: str, width: int) -> None:
        divisor = getattr(self, name)
        if divisor is not None and (divisor < 1 or width % divisor):
            raise ValueError(f"{name} {divisor} does not divide the block width {width}")

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding of noise level and class."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def scale_shift(self) -> bool:
        """Whether the embedding scales and shifts the second normalisation of a residual block."""
        return self.resnet_time_scale_shift == "scale_shift"

    @property
    def mid_attention_groups(self) -> int | None:
        """Groups of the middle attention's normalisation; as in diffusers, scale_shift without a number has none."""
        if self.attn_norm_num_groups is None and self.scale_shift:
            return None
        return self.attn_norm_num_groups or self.norm_num_groups

    def resnet(self, in_channels: int, out_channels: int, resample: str | None = None) -> ResnetBlock2D:
        """A residual block with this config's normalisation and conditioning."""
        return ResnetBlock2D(
            in_channels,
            out_channels,
            self.embedding_channels,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            scale_shift=self.scale_shift,
            trajectory=self.trajectory,
            dropout=self.dropout,
            resample=resample,
        )

    def attention(self, channels: int, groups: int | None) -> SelfAttention2D:
        """Self-attention with this config's head size."""
        return SelfAttention2D(channels, self.attention_head_dim or channels, groups=groups, eps=self.norm_eps)


# The two sizes of the published consistency models and their teachers.
IMAGENET_64 = UNet2DConfig(
    sample_size=64,
    block_out_channels=(192, 384, 576, 768),
    layers_per_block=3,
    down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
    up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    attention_head_dim=64,
    attn_norm_num_groups=32,
    resnet_time_scale_shift="scale_shift",
    num_class_embeds=1000,
)
LSUN_256 = UNet2DConfig(
    sample_size=256,
    block_out_channels=(256, 256, 512, 512, 1024, 1024),
    layers_per_block=2,
    down_block_types=(*["ResnetDownsampleBlock2D"] * 3, *["AttnDownBlock2D"] * 3),
    up_block_types=(*["AttnUpBlock2D"] * 3, *["ResnetUpsampleBlock2D"] * 3),
    downsample_type="resnet",
    upsample_type="resnet",
    attention_head_dim=64,
)


def _sections(condition: Condition, levels: int) -> tuple[list[Condition], Condition, list[Condition]]:
    """For the levels on the way down, the middle, and the levels on the way up."""
    conditions = condition.split(2 * levels + 1)
    return conditions[:levels], conditions[levels], conditions[levels + 1 :]


def _resampled(resampler: ResnetBlock2D | Downsample2D | Upsample2D, x: mx.array, condition: Condition) -> mx.array:
    """Convolutions that halve or double are told nothing."""
    return resampler(x, *condition) if isinstance(resampler, ResnetBlock2D) else resampler(x)


class DownBlock2D(nn.Module):
    """One resolution level on the way down: residual blocks, attention behind each where the kind has it, halving."""

    def __init__(self, config: UNet2DConfig, kind: BlockKind, in_channels: int, out_channels: int, is_last: bool):
        super().__init__()
        widths = [in_channels, *[out_channels] * config.layers_per_block]
        self.resnets = [config.resnet(a, b) for a, b in itertools.pairwise(widths)]
        if kind.attention:
            self.attentions = [config.attention(out_channels, config.norm_num_groups) for _ in self.resnets]
        if not is_last:
            by_resnet = (kind.resample or config.downsample_type) == "resnet"
            self.downsamplers = [
                config.resnet(out_channels, out_channels, resample="down")
                if by_resnet
                else Downsample2D(out_channels, padding=config.downsample_padding)
            ]

    def __call__(self, x: mx.array, condition: Condition) -> tuple[mx.array, list[mx.array]]:
        """(B, H, W, C) => ((B, H/2, W/2, C'), the states that the way up takes in)."""
        states = []
        *conditions, last = condition.split(len(self.resnets) + 1)
        attentions = self.get("attentions", [None] * len(self.resnets))
        for resnet, attention, told in zip(self.resnets, attentions, conditions, strict=True):
            x = resnet(x, *told)
            if attention is not None:
                x = attention(x)
            states.append(x)
        for downsampler in self.get("downsamplers", []):
            x = _resampled(downsampler, x, last)
            states.append(x)
        return x, states


class MidBlock2D(nn.Module):
    """The lowest level: residual block, attention, residual block."""

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = [config.resnet(width, width) for _ in range(2)]
        if config.add_attention:
            self.attentions = [config.attention(width, config.mid_attention_groups)]

    def __call__(self, x: mx.array, condition: Condition) -> mx.array:
        """(B, H, W, C) => (B, H, W, C)."""
        first, second = condition.split(2)
        x = self.resnets[0](x, *first)
        for attention in self.get("attentions", []):
            x = attention(x)
        return self.resnets[1](x, *second)


class UpBlock2D(nn.Module):
    """One resolution level on the way up: residual blocks that take in the states of the way down, doubling.

    Args:
        skip_channels: widths of those states in the order they are taken.
    """

    def __init__(
        self,
        config: UNet2DConfig,
        kind: BlockKind,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        is_last: bool,
    ):
        super().__init__()
        widths = [in_channels, *[out_channels] * (len(skip_channels) - 1)]
        self.resnets = [config.resnet(a + skip, out_channels) for a, skip in zip(widths, skip_channels, strict=True)]
        if kind.attention:
            self.attentions = [config.attention(out_channels, config.norm_num_groups) for _ in self.resnets]
        if not is_last:
            by_resnet = (kind.resample or config.upsample_type) == "resnet"
            self.upsamplers = [
                config.resnet(out_channels, out_channels, resample="up") if by_resnet else Upsample2D(out_channels)
            ]

    def __call__(self, x: mx.array, states: list[mx.array], condition: Condition) -> mx.array:
        """Takes its states from the end of the list: (B, H, W, C) => (B, 2H, 2W, C')."""
        *conditions, last = condition.split(len(self.resnets) + 1)
        attentions = self.get("attentions", [None] * len(self.resnets))
        for resnet, attention, told in zip(self.resnets, attentions, conditions, strict=True):
            x = resnet(mx.concatenate([x, states.pop()], axis=-1), *told)
            if attention is not None:
                x = attention(x)
        for upsampler in self.get("upsamplers", []):
            x = _resampled(upsampler, x, last)
        return x


class UNet2D(nn.Module):
    """F(x, t): the network inside a pixel-space consistency model or its diffusion teacher; F(x, t, s) of [CTM]'s.

    [ADM] section 3; checkpoints of [CM] and [CTM]. Sizes from thousands of parameters to 526 M by config.
    """

    # Half-precision checkpoints keep these in float32: the embedding decides the picture, the head writes it.
    float32_parts = ("time_embedding", "time_embedding_s", "class_embedding", "conv_norm_out", "conv_out")

    def __init__(self, config: UNet2DConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.embedding_channels)
        if config.trajectory:
            self.time_embedding_s = TimestepEmbedding(widths[0], config.embedding_channels)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.embedding_channels)

        self.down_blocks, skips, width = [], [widths[0]], widths[0]
        for level, (name, out) in enumerate(zip(config.down_block_types, widths, strict=True)):
            is_last = level == len(widths) - 1
            self.down_blocks.append(DownBlock2D(config, DOWN_BLOCKS[name], width, out, is_last))
            skips += [out] * (config.layers_per_block + (not is_last))
            width = out
        self.mid_block = MidBlock2D(config)
        self.up_blocks = []
        for level, (name, out) in enumerate(zip(config.up_block_types, reversed(widths), strict=True)):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            is_last = level == len(widths) - 1
            self.up_blocks.append(UpBlock2D(config, UP_BLOCKS[name], width, taken, out, is_last))
            width = out

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def __call__(
        self,
        x: mx.array,
        t: mx.array,
        class_labels: mx.array | None = None,
        s: mx.array | None = None,
        dropout_key: mx.array | None = None,
    ) -> mx.array:
        """One evaluation of the network.

        Args:
            x: scaled input, shape (B, H, W, in_channels).
            t: conditioning value of the noise level (`log_sigma_conditioning`), shape (B,), or one for all.
            class_labels: integers, shape (B,); needed by a class-conditional model.
            s: conditioning value of the level to jump to, like t; needed by a trajectory model.
            dropout_key: drops values at random, equal ones for equal keys; one key, or one for each image, (B, 2), with
                which an image's do not depend on the batch it is in. None: nothing is dropped.

        Returns:
            F, shape (B, H, W, out_channels), float32.

        Raises:
            ValueError: class labels or s are missing, or given to a model that has no use for them.
        """
        dtype = self.conv_in.weight.dtype
        levels = (None if level is None else mx.broadcast_to(level, (x.shape[0],)) for level in (t, s))
        embeddings = (None if e is None else backend.silu(e).astype(dtype) for e in self.embed(*levels, class_labels))
        keys = dropout_key if self.config.dropout else None
        if keys is not None and keys.ndim == 1:
            keys = mx.random.split(keys, x.shape[0])
        down, mid, up = _sections(Condition(*embeddings, keys), len(self.down_blocks))
        x = x.astype(dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        states = [x]
        for block, condition in zip(self.down_blocks, down, strict=True):
            x, new_states = block(x, condition)
            states += new_states
        x = self.mid_block(x, mid)
        for block, condition in zip(self.up_blocks, up, strict=True):
            x = block(x, states, condition)
        x = backend.silu(self.conv_norm_out(x.astype(mx.float32)))
        return self.conv_out(x)

    def embed(self, t: mx.array, s: mx.array | None, class_labels: mx.array | None) -> tuple[mx.array, mx.array | None]:
        """Embedding of noise level and class, and that of s where there is one; (B, embedding_channels), float32 in."""
        for name, given, part, kind in (
            ("class_labels", class_labels, "class_embedding", "class-conditional"),
            ("s", s, "time_embedding_s", "trajectory"),
        ):
            if (given is None) == (part in self):
                raise ValueError(
                    f"{name}: needed by this {kind} model" if given is None else f"{name}: this is no {kind} model"
                )
        embedding = self.time_embedding(self._sinusoid(t))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels)
        return embedding, None if s is None else self.time_embedding_s(self._sinusoid(s))

    def _sinusoid(self, level: mx.array) -> mx.array:
        return sinusoidal_embedding(
            level,
            self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
