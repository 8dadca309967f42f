"""CLIP's text encoder as OpenAI and OpenCLIP trained it; parameter names are those of the published checkpoints."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_cm import backend

ACTIVATIONS = {"quick_gelu": backend.quick_gelu, "gelu": backend.gelu}
# What a checkpoint calls itself => whether the pooled state is projected.
ARCHITECTURES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
# The end-of-text id in configs that were written before the field meant anything; see `end_of_text`.
LEGACY_EOS_TOKEN_ID = 2


@dataclass(frozen=True)
class CLIPTextConfig:
    """Size and layout of a `CLIPTextModel`; fields and defaults of transformers' config."""

    architectures: tuple[str, ...] = ("CLIPTextModel",)  # or ("CLIPTextModelWithProjection",)
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048  # width inside the MLPs
    projection_dim: int | None = 512  # width of `text_embeds`; without a projection it means nothing
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # longest prompt, tokens
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406  # of the tokenizer; the model does not use it
    eos_token_id: int = 49407  # see `end_of_text`
    pad_token_id: int | None = 1  # wrong in most published configs; the tokenizer's files decide
    attention_dropout: float = 0.0  # of the training run; generation does not use it
    dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self):
        if len(self.architectures) != 1 or self.architectures[0] not in ARCHITECTURES:
            raise ValueError(f"architectures: expected one of {list(ARCHITECTURES)}, got {list(self.architectures)}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act: {self.hidden_act!r} is not supported, expected one of {list(ACTIVATIONS)}")
        sizes = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            *(["projection_dim"] if self.with_projection else []),
        ]
        for name in sizes:
            size = getattr(self, name)
            if size is None or size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} cannot be split into {self.num_attention_heads} heads")

    @property
    def with_projection(self) -> bool:
        """Whether the model ends in a projection of the pooled state."""
        return ARCHITECTURES[self.architectures[0]]


class CLIPTextOutput(NamedTuple):
    """What the encoder knows about a prompt; MLX is lazy, so only what is used gets computed.

    Families differ in what they condition on: SD 1.x and 2.x take `last_hidden_state`, SDXL `hidden_states[-2]` of both
    encoders and `text_embeds` of the second.
    """

    last_hidden_state: mx.array  # (B, L, C), after the final norm
    hidden_states: tuple[mx.array, ...]  # the embeddings, then each layer's output, all before the final norm
    pooled: mx.array  # (B, C), `last_hidden_state` at the end-of-text token
    text_embeds: mx.array | None  # (B, projection_dim), or None without a projection


def end_of_text(ids: mx.array, eos_token_id: int) -> mx.array:
    """Position of the end-of-text token, shape (B,): the first one, because it may be the padding as well.

    Configs that say 2 carry a mistake of early transformers versions; there the end of text is the highest id, as in
    OpenAI's code. Without an end-of-text token it is position 0, as in transformers.
    """
    scores = ids if eos_token_id == LEGACY_EOS_TOKEN_ID else (ids == eos_token_id).astype(mx.int32)
    return mx.argmax(scores, axis=-1)


class CLIPAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.heads = config.num_attention_heads

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, width = x.shape
        q, k, v = (
            projection(x).reshape(batch, length, self.heads, -1).swapaxes(1, 2)  # (B, heads, L, C/heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = backend.attention(q, k, v, scale=(width // self.heads) ** -0.5, mask="causal")
        return self.out_proj(h.swapaxes(1, 2).reshape(batch, length, width))


class CLIPMLP(nn.Module):
    """Two linear layers with the config's activation between."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Attention, then MLP, each residual behind its normalisation."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEmbeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        length, limit = ids.shape[1], self.position_embedding.weight.shape[0]
        if length > limit:
            raise ValueError(f"{length} tokens, but the model has positions for {limit}")
        return self.token_embedding(ids) + self.position_embedding(mx.arange(length))


class CLIPEncoder(nn.Module):
    """The stack of layers; the call returns its input and every layer's output."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = [CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> tuple[mx.array, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPTextTransformer(nn.Module):
    """Embeddings, encoder and final norm; the `text_model` of the published parameter names."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, ids: mx.array) -> tuple[mx.array, tuple[mx.array, ...]]:
        states = self.encoder(self.embeddings(ids))
        return self.final_layer_norm(states[-1]), states


class CLIPTextModel(nn.Module):
    """CLIP's text encoder, with or without the projection into the space shared with images.

    The reference is transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`: OpenAI's ViT-L/14 (SD 1.x, SDXL),
    OpenCLIP's ViT-H/14 without its last layer (SD 2.x) and ViT-bigG/14 (SDXL).
    """

    float32_parts: tuple[str, ...] = ()  # norms keep float32 statistics in any case

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, ids: mx.array) -> CLIPTextOutput:
        """Encodes prompts.

        Padding is not masked: the encoders were trained to see it, and behind the end of text no real token sees it.

        Args:
            ids: token ids as the tokenizer makes them, integers of shape (B, L), L <= max_position_embeddings.
        """
        last, states = self.text_model(ids)
        position = end_of_text(ids, self.config.eos_token_id)[:, None, None]
        pooled = mx.take_along_axis(last, position, axis=1).squeeze(1)
        text_embeds = self.text_projection(pooled) if self.config.with_projection else None
        return CLIPTextOutput(last, states, pooled, text_embeds)
