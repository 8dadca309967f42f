"""The text-conditioned U-Net of the Stable Diffusion family, with the names of diffusers' `UNet2DConditionModel`.

Rombach et al.: High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752; Podell et al.: SDXL,
arXiv 2307.01952. [LCM] adds one projection to it, for the strength of guidance.
"""

import itertools
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cm import backend
from mlx_cm.models.layers import (
    Conv2d,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    sinusoidal_embedding,
)

# Published block names, and whether transformers follow the block's residual blocks.
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True, None: False}

# The published config also has settings of which this family of models uses one value, whatever its spelling.
FIXED_SETTINGS = {
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1.0,),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}

LAYER_NORM_EPS = 1e-5  # of the transformers, whatever the config's norm_eps
ENTRY_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Level:
    """One resolution level, or the middle, with every setting of the config resolved."""

    attention: bool
    width: int
    depths: tuple[int, ...]  # layers of the transformer behind each residual block
    heads: int
    context_width: int  # of the text states
    only_cross_attention: bool  # whether the self-attentions attend to the text as well


@dataclass(frozen=True)
class UNet2DConditionConfig:
    """Size and layout of a `UNet2DCondition`: the fields and the defaults of diffusers' `UNet2DConditionModel`.

    A setting that differs per level is a tuple in the order of `down_block_types`.
    """

    sample_size: int | tuple[int, ...] | None = None  # height and width of the latents the model was trained on
    in_channels: int = 4  # 9 for inpainting: latents, mask, latents of the masked image
    out_channels: int = 4
    center_input_sample: bool = False  # whether inputs are mapped from [0, 1] to [-1, 1] first
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # None: no middle block
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width per resolution level
    layers_per_block: int | tuple[int, ...] = 2  # residual blocks on the way down; one more on the way up
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0  # of the training run; generation does not use it
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280  # width of the text states
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1  # nested: one per residual block
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None  # on the way up, in its order
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads, its published name notwithstanding
    num_attention_heads: int | tuple[int, ...] | None = None  # the same under its proper name; wins where given
    dual_cross_attention: bool = False
    use_linear_projection: bool = (
        False  # whether transformers are entered and left by linear layers or 1x1 convolutions
    )
    class_embed_type: str | None = None
    addition_embed_type: str | None = None  # "text_time": pooled text and image sizes are added to the time embedding
    addition_time_embed_dim: int | None = None  # width of the sinusoid of each size
    num_class_embeds: int | None = None
    upcast_attention: bool = False  # softmax is in float32 either way
    resnet_time_scale_shift: str = "default"  # the embedding is added; "scale_shift": it scales and shifts
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None  # width of the guidance embedding of a distilled model; None: has none
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None  # pooled text and sinusoids together
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64  # of embedding types other than "text_time"

    def __post_init__(self):
        self._check_choices()
        self._check_lengths()
        for name in ("in_channels", "out_channels", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"{name}: expected an odd number, got {getattr(self, name)}")
        if self.addition_embed_type == "text_time":
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is missing: addition_embed_type 'text_time' needs it")
        for level in (*self.down_levels, *self.mid_levels, *self.up_levels):
            if level.width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide the block width {level.width}"
                )
            if level.attention and (level.heads < 1 or level.width % level.heads):
                raise ValueError(
                    f"attention_head_dim: {level.heads} heads do not divide the block width {level.width} "
                    "(in this family the field holds the number of heads)"
                )

    def _check_choices(self):
        choices = {
            "down_block_types": (self.down_block_types, DOWN_BLOCKS),
            "up_block_types": (self.up_block_types, UP_BLOCKS),
            "mid_block_type": ([self.mid_block_type], MID_BLOCKS),
            "addition_embed_type": ([self.addition_embed_type], (None, "text_time")),
            "resnet_time_scale_shift": ([self.resnet_time_scale_shift], ("default", "scale_shift")),
            **{name: ([getattr(self, name)], values) for name, values in FIXED_SETTINGS.items()},
        }
        for name, (given, known) in choices.items():
            for value in given:
                if value not in known:
                    raise ValueError(f"{name}: {value!r} is not supported, expected one of {list(known)}")

    def _check_lengths(self):
        levels = len(self.down_block_types)
        if not levels:
            raise ValueError("down_block_types: expected at least one block")
        for name in (
            "up_block_types",
            "block_out_channels",
            "only_cross_attention",
            "layers_per_block",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
            "attention_head_dim",
            "num_attention_heads",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name}: expected {levels} values, one per down block, got {len(value)}")
        nested = any(isinstance(depth, tuple) for depth in self._per_level("transformer_layers_per_block"))
        if nested and self.reverse_transformer_layers_per_block is None:
            raise ValueError(
                "reverse_transformer_layers_per_block is needed where transformer_layers_per_block is nested"
            )

    def _per_level(self, name: str) -> tuple:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.down_block_types)

    @property
    def down_levels(self) -> tuple[Level, ...]:
        """The levels of the way down, from the widest map to the narrowest."""
        heads = "attention_head_dim" if self.num_attention_heads is None else "num_attention_heads"
        rows = zip(
            self.down_block_types,
            self.block_out_channels,
            self._per_level("layers_per_block"),
            self._per_level("transformer_layers_per_block"),
            self._per_level(heads),
            self._per_level("cross_attention_dim"),
            self._per_level("only_cross_attention"),
            strict=True,
        )
        return tuple(
            Level(DOWN_BLOCKS[kind], width, _depths(depth, layers, "transformer_layers_per_block"), *rest)
            for kind, width, layers, depth, *rest in rows
        )

    @property
    def mid_levels(self) -> tuple[Level, ...]:
        """The middle as a level of its own; none without a middle block."""
        if self.mid_block_type is None:
            return ()
        depth = self._per_level("transformer_layers_per_block")[-1]
        return (
            replace(
                self.down_levels[-1],
                attention=MID_BLOCKS[self.mid_block_type],
                depths=depth[:1] if isinstance(depth, tuple) else (depth,),
                only_cross_attention=False,
            ),
        )

    @property
    def up_levels(self) -> tuple[Level, ...]:
        """The levels of the way up, from the narrowest map to the widest."""
        name = "reverse_transformer_layers_per_block"
        depths = getattr(self, name) or reversed(self._per_level("transformer_layers_per_block"))
        rows = zip(self.up_block_types, depths, reversed(self.down_levels), strict=True)
        return tuple(
            replace(down, attention=UP_BLOCKS[kind], depths=_depths(depth, len(down.depths) + 1, name))
            for kind, depth, down in rows
        )

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding of the timestep."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        """A residual block with this config's normalisation and conditioning."""
        return ResnetBlock2D(
            in_channels,
            out_channels,
            self.embedding_channels,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
        )

    def transformers(self, level: Level) -> list["Transformer2D"]:
        """The transformers of a level, one per residual block; none on a level without attention."""
        return [Transformer2D(self, level, depth) for depth in level.depths if level.attention]


def _depths(depth: int | tuple[int, ...], layers: int, name: str) -> tuple[int, ...]:
    """Transformer layers behind each of a level's residual blocks, from one number or from one each."""
    depths = depth if isinstance(depth, tuple) else (depth,) * layers
    if len(depths) != layers:
        raise ValueError(f"{name}: expected {layers} values, one per residual block of its level, got {len(depths)}")
    return depths


KeysValues = tuple[mx.array, mx.array]  # each (B, heads, tokens, head size)


@dataclass(frozen=True)
class PromptContext:
    """What a prompt and its settings contribute to every step, computed once: see `UNet2DCondition.prepare`.

    Keys and values are nested as the network is: level, transformer, layer, attention. An entry is None for an
    attention among the positions of the map itself.
    """

    down: list  # of lists of lists of [KeysValues | None, KeysValues]
    mid: list
    up: list
    guidance: mx.array | None = None  # projected guidance embedding, (B, block_out_channels[0]), float32
    added: mx.array | None = None  # embedding of pooled text and sizes, (B, embedding_channels), float32

    def arrays(self) -> list[mx.array]:
        """All arrays, for whoever wants them computed before the weights behind them are released."""
        tree = [self.down, self.mid, self.up, self.guidance, self.added]
        return [leaf for _, leaf in tree_flatten(tree) if leaf is not None]


class Attention(nn.Module):
    """Multi-head attention of tokens to states, by default to themselves.

    Args:
        width: of the tokens.
        states_width: of what they attend to.
    """

    def __init__(self, width: int, heads: int, states_width: int):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(states_width, width, bias=False)
        self.to_v = nn.Linear(states_width, width, bias=False)
        self.to_out = [nn.Linear(width, width)]
        self.heads = heads

    def split_heads(self, x: mx.array) -> mx.array:
        """(B, T, C) => (B, heads, T, C/heads)."""
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def prepare(self, states: mx.array) -> KeysValues:
        """Keys and values of states (B, T, D)."""
        return self.split_heads(self.to_k(states)), self.split_heads(self.to_v(states))

    def __call__(self, x: mx.array, context: KeysValues | None = None) -> mx.array:
        """Tokens x (B, N, C) attend to prepared states, or to themselves => (B, N, C)."""
        q = self.split_heads(self.to_q(x))
        # One prompt serves all images of a batch.
        k, v = (mx.broadcast_to(y, (len(x), *y.shape[1:])) for y in context or self.prepare(x))
        h = backend.attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.to_out[0](h.swapaxes(1, 2).reshape(x.shape))


class GEGLU(nn.Module):
    """Values times the GELU of gates, both from one linear layer. Shazeer: GLU Variants, arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def __call__(self, x: mx.array) -> mx.array:
        values, gates = mx.split(self.proj(x), 2, axis=-1)
        return values * backend.gelu(gates)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, width: int):
        super().__init__()
        # The entry in the middle is the reference's dropout: it has no weights, but counts in the names.
        self.net = [GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """One layer: attention among positions, attention to the text, feed-forward, each normalised before, residual."""

    def __init__(self, level: Level):
        super().__init__()
        width, heads, states = level.width, level.heads, level.context_width
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn1 = Attention(width, heads, states if level.only_cross_attention else width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn2 = Attention(width, heads, states)
        self.norm3 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ff = FeedForward(width)
        self.only_cross_attention = level.only_cross_attention

    def prepare(self, states: mx.array) -> list[KeysValues | None]:
        """Keys and values of the text states for the first attention, where it sees them, and the second."""
        return [self.attn1.prepare(states) if self.only_cross_attention else None, self.attn2.prepare(states)]

    def __call__(self, x: mx.array, context: list[KeysValues | None]) -> mx.array:
        """(B, HW, C) => (B, HW, C)."""
        x = x + self.attn1(self.norm1(x), context[0])
        x = x + self.attn2(self.norm2(x), context[1])
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Residual transformer over the positions of a map.

    Args:
        depth: number of layers.
    """

    def __init__(self, config: UNet2DConditionConfig, level: Level, depth: int):
        super().__init__()
        width = level.width
        self.norm = GroupNorm(config.norm_num_groups, width, ENTRY_NORM_EPS)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if config.use_linear_projection else Conv2d(width, width, 1) for _ in range(2)
        )
        self.transformer_blocks = [BasicTransformerBlock(level) for _ in range(depth)]

    def prepare(self, states: mx.array) -> list[list[KeysValues | None]]:
        """Keys and values of the text states for every layer."""
        return [block.prepare(states) for block in self.transformer_blocks]

    def __call__(self, x: mx.array, context: list[list[KeysValues | None]]) -> mx.array:
        """(B, H, W, C) => (B, H, W, C)."""
        h = self.proj_in(self.norm(x))
        h = h.reshape(x.shape[0], -1, x.shape[-1])  # (B, HW, C)
        for block, prepared in zip(self.transformer_blocks, context, strict=True):
            h = block(h, prepared)
        return x + self.proj_out(h.reshape(x.shape))


def _prepare(block: nn.Module, states: mx.array) -> list:
    """Keys and values of the text states for every transformer of a block."""
    return [transformer.prepare(states) for transformer in block.get("attentions", [])]


class DownBlock2D(nn.Module):
    """One resolution level on the way down: residual blocks, a transformer behind each where it has them, halving."""

    def __init__(self, config: UNet2DConditionConfig, level: Level, in_channels: int, is_last: bool):
        super().__init__()
        widths = [in_channels, *[level.width] * len(level.depths)]
        self.resnets = [config.resnet(a, b) for a, b in itertools.pairwise(widths)]
        if level.attention:
            self.attentions = config.transformers(level)
        if not is_last:
            self.downsamplers = [Downsample2D(level.width)]

    def __call__(self, x: mx.array, embedding: mx.array, context: list) -> tuple[mx.array, list[mx.array]]:
        """(B, H, W, C) => ((B, H/2, W/2, C'), the states that the way up takes in); odd sizes are rounded up."""
        states = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if "attentions" in self:
                x = self.attentions[i](x, context[i])
            states.append(x)
        for downsampler in self.get("downsamplers", []):
            x = downsampler(x)
            states.append(x)
        return x, states


class MidBlock2D(nn.Module):
    """The lowest level: residual block, transformer, residual block; or a single residual block."""

    def __init__(self, config: UNet2DConditionConfig, level: Level):
        super().__init__()
        self.resnets = [config.resnet(level.width, level.width) for _ in range(1 + level.attention)]
        if level.attention:
            self.attentions = config.transformers(level)

    def __call__(self, x: mx.array, embedding: mx.array, context: list) -> mx.array:
        x = self.resnets[0](x, embedding)
        for transformer, prepared, resnet in zip(self.get("attentions", []), context, self.resnets[1:], strict=True):
            x = resnet(transformer(x, prepared), embedding)
        return x


class UpBlock2D(nn.Module):
    """One resolution level on the way up: residual blocks that take in the states of the way down, doubling.

    Args:
        skip_channels: widths of those states in the order they are taken.
    """

    def __init__(
        self,
        config: UNet2DConditionConfig,
        level: Level,
        in_channels: int,
        skip_channels: list[int],
        is_last: bool,
    ):
        super().__init__()
        widths = [in_channels, *[level.width] * (len(skip_channels) - 1)]
        self.resnets = [config.resnet(a + skip, level.width) for a, skip in zip(widths, skip_channels, strict=True)]
        if level.attention:
            self.attentions = config.transformers(level)
        if not is_last:
            self.upsamplers = [Upsample2D(level.width)]

    def __call__(self, x: mx.array, states: list[mx.array], embedding: mx.array, context: list) -> mx.array:
        """Takes its states from the end of the list: (B, H, W, C) => (B, 2H, 2W, C'), or the size of the next state."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(mx.concatenate([x, states.pop()], axis=-1), embedding)
            if "attentions" in self:
                x = self.attentions[i](x, context[i])
        for upsampler in self.get("upsamplers", []):
            x = upsampler(x, size=states[-1].shape[1:3])
        return x


class UNet2DCondition(nn.Module):
    """F(x, t, text): the network of Stable Diffusion 1 and 2, SDXL, and of the consistency models made from them."""

    # Half-precision checkpoints keep these in float32: the embeddings decide the picture, the head writes it.
    float32_parts = ("time_embedding", "add_embedding", "conv_norm_out", "conv_out")

    def __init__(self, config: UNet2DConditionConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], config.conv_in_kernel, padding=config.conv_in_kernel // 2)
        self.time_embedding = TimestepEmbedding(widths[0], config.embedding_channels, config.time_cond_proj_dim)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, config.embedding_channels
            )

        last = len(widths) - 1
        self.down_blocks, skips, width = [], [widths[0]], widths[0]
        for i, level in enumerate(config.down_levels):
            self.down_blocks.append(DownBlock2D(config, level, width, is_last=i == last))
            skips += [level.width] * (len(level.depths) + (i < last))
            width = level.width
        for level in config.mid_levels:
            self.mid_block = MidBlock2D(config, level)
        self.up_blocks = []
        for i, level in enumerate(config.up_levels):
            taken = [skips.pop() for _ in level.depths]
            self.up_blocks.append(UpBlock2D(config, level, width, taken, is_last=i == last))
            width = level.width

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(
            widths[0], config.out_channels, config.conv_out_kernel, padding=config.conv_out_kernel // 2
        )

    def prepare(
        self,
        encoder_hidden_states: mx.array,
        *,
        timestep_cond: mx.array | None = None,
        text_embeds: mx.array | None = None,
        time_ids: mx.array | None = None,
    ) -> PromptContext:
        """Everything about a prompt that stays the same from step to step.

        A batch of one serves a batch of any size.

        Args:
            encoder_hidden_states: the text states, shape (B, tokens, cross_attention_dim).
            timestep_cond: `guidance_embedding` of a model with `time_cond_proj_dim`, shape (B, time_cond_proj_dim).
            text_embeds: pooled text of an SDXL model, shape (B, D).
            time_ids: the sizes an SDXL model is told, pixels, shape (B, 6): original height and width, top and left of
                the crop, target height and width.

        Raises:
            ValueError: a condition is missing, given to a model that has no use for it, or of another width.
        """
        needs_guidance, needs_added = "cond_proj" in self.time_embedding, "add_embedding" in self
        for name, value, needed in (
            ("timestep_cond", timestep_cond, needs_guidance),
            ("text_embeds", text_embeds, needs_added),
            ("time_ids", time_ids, needs_added),
        ):
            if (value is not None) != needed:
                raise ValueError(f"{name} is needed by this model" if needed else f"this model has no use for {name}")
        states = encoder_hidden_states.astype(self.conv_in.weight.dtype)
        return PromptContext(
            down=[_prepare(block, states) for block in self.down_blocks],
            mid=_prepare(self.mid_block, states) if "mid_block" in self else [],
            up=[_prepare(block, states) for block in self.up_blocks],
            guidance=self.time_embedding.cond_proj(timestep_cond.astype(mx.float32)) if needs_guidance else None,
            added=self._embed_added(text_embeds, time_ids) if needs_added else None,
        )

    def _embed_added(self, text_embeds: mx.array, time_ids: mx.array) -> mx.array:
        """Pooled text and sizes => (B, embedding_channels). SDXL, section 2.2."""
        sizes = self._sinusoid(time_ids.reshape(-1), self.config.addition_time_embed_dim)
        joined = mx.concatenate([text_embeds.astype(mx.float32), sizes.reshape(len(time_ids), -1)], axis=-1)
        expected = self.config.projection_class_embeddings_input_dim
        if joined.shape[-1] != expected:
            raise ValueError(
                f"text_embeds of width {text_embeds.shape[-1]} and {time_ids.shape[-1]} time_ids make "
                f"{joined.shape[-1]} values, this model expects {expected}"
            )
        return self.add_embedding(joined)

    def _sinusoid(self, t: mx.array, width: int) -> mx.array:
        return sinusoidal_embedding(
            t, width, flip_sin_to_cos=self.config.flip_sin_to_cos, freq_shift=self.config.freq_shift
        )

    def embed(self, timestep: mx.array, context: PromptContext) -> mx.array:
        """Embedding of the timestep and the prompt's settings, float32 in, shape (B, embedding_channels).

        [LCM] section 4.2: the guidance enters beside the timestep, through one projection.
        """
        sinusoid = self._sinusoid(timestep, self.config.block_out_channels[0])
        if context.guidance is not None:
            sinusoid = sinusoid + context.guidance
        embedding = self.time_embedding(sinusoid)
        return embedding if context.added is None else embedding + context.added

    def __call__(
        self,
        x: mx.array,
        timestep: mx.array | float,
        encoder_hidden_states: mx.array | PromptContext,
        *,
        timestep_cond: mx.array | None = None,
        text_embeds: mx.array | None = None,
        time_ids: mx.array | None = None,
    ) -> mx.array:
        """One evaluation of the network.

        Args:
            x: noisy latents, shape (B, H, W, in_channels), any H and W.
            timestep: 0..999, shape (B,), or one for all.
            encoder_hidden_states: what `prepare` returned; or the text states, and with them the keyword arguments
                of `prepare`.

        Returns:
            F, shape (B, H, W, out_channels), float32: noise, velocity or data, whichever the model was trained for.

        Raises:
            ValueError: as `prepare`; or settings are given beside a prepared prompt, which has them already.
        """
        settings = {"timestep_cond": timestep_cond, "text_embeds": text_embeds, "time_ids": time_ids}
        context = encoder_hidden_states
        if not isinstance(context, PromptContext):
            context = self.prepare(context, **settings)
        elif any(value is not None for value in settings.values()):
            raise ValueError(f"a prepared prompt holds {', '.join(settings)} already")
        embedding = self.embed(mx.broadcast_to(timestep, (len(x),)), context)
        dtype = self.conv_in.weight.dtype
        x, embedding = x.astype(dtype), backend.silu(embedding).astype(dtype)
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        states = [x]
        for block, prepared in zip(self.down_blocks, context.down, strict=True):
            x, new_states = block(x, embedding, prepared)
            states += new_states
        if "mid_block" in self:
            x = self.mid_block(x, embedding, context.mid)
        for block, prepared in zip(self.up_blocks, context.up, strict=True):
            x = block(x, states, embedding, prepared)
        x = backend.silu(self.conv_norm_out(x.astype(mx.float32)))
        return self.conv_out(x)
