"""Layers that more than one backbone is made of. Parameter names are diffusers' names, arrays are channels-last."""

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_cm import backend
from mlx_cm.backend import upsample_nearest


class GroupNorm(nn.Module):
    """Group normalisation with float32 statistics and affine parameters `weight`, `bias` of shape (channels,)."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {groups} groups")
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.groups, self.eps = groups, eps

    def __call__(self, x: mx.array) -> mx.array:
        return backend.group_norm(x, self.weight, self.bias, self.groups, self.eps)


class Conv2d(nn.Module):
    """2-D convolution, zero-padded, in the form the back end computes fastest.

    Parameters: `weight` (out, kernel, kernel, in) and, unless bias is False, `bias` (out,).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        bound = (in_channels * kernel_size**2) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (out_channels, kernel_size, kernel_size, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))
        self.stride, self.padding = stride, padding

    def __call__(self, x: mx.array, *, upsample: bool = False) -> mx.array:
        """(B, H, W, C) => (B, H', W', C').

        Args:
            upsample: the map is doubled in height and width by repetition first; for 3x3 kernels padded by one.
        """
        if upsample:
            return backend.upsample_conv2d(x, self.weight, self.get("bias"))
        return backend.conv2d(x, self.weight, self.get("bias"), stride=self.stride, padding=self.padding)


def sinusoidal_embedding(t: mx.array, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> mx.array:
    """Sinusoids of t at geometrically falling frequencies exp(-ln(10000) i / (width/2 - freq_shift)).

    The diffusers `Timesteps` function; with the defaults the one of OpenAI's U-Nets: cosines first.

    Args:
        t: shape (B,).

    Returns:
        float32, shape (B, width); an odd width ends in a zero.
    """
    half = width // 2
    frequencies = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(10000.0) / (half - freq_shift)))
    angles = t.astype(mx.float32)[:, None] * frequencies
    parts = [mx.cos(angles), mx.sin(angles)] if flip_sin_to_cos else [mx.sin(angles), mx.cos(angles)]
    embedding = mx.concatenate(parts, axis=-1)
    return mx.pad(embedding, [(0, 0), (0, width % 2)])


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: sinusoid (B, in) => embedding (B, width).

    Args:
        cond_channels: width of a second condition, whose projection `cond_proj` is added to the sinusoid by whoever
            has one: it stays the same from step to step while the sinusoid changes.
    """

    def __init__(self, in_channels: int, width: int, cond_channels: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        if cond_channels is not None:
            self.cond_proj = nn.Linear(cond_channels, in_channels, bias=False)
        self.linear_2 = nn.Linear(width, width)

    def __call__(self, sinusoid: mx.array) -> mx.array:
        return self.linear_2(backend.silu(self.linear_1(sinusoid)))


def downsample_mean(x: mx.array) -> mx.array:
    """Halves height and width by 2x2 means, an odd last row or column left out: (B, H, W, C) => (B, H//2, W//2, C)."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


RESAMPLERS = {"up": upsample_nearest, "down": downsample_mean}


def dropout(x: mx.array, rate: float, keys: mx.array) -> mx.array:
    """Zeroes values at random, in a training step, and scales the others by 1 / (1 - rate).

    Args:
        x: (B, ...).
        keys: one for each image, (B, 2), so that what is left of an image does not depend on the batch it is in.
    """
    kept = mx.vmap(lambda key: mx.random.bernoulli(1 - rate, x.shape[1:], key=key))(keys)
    return mx.where(kept, x / (1 - rate), mx.zeros_like(x))


class Condition(NamedTuple):
    """What a residual block is told beside its map."""

    embedding: mx.array  # of noise level and class, already through SiLU, (B, E)
    embedding_s: mx.array | None = None  # of the level a trajectory model jumps to, likewise
    dropout_keys: mx.array | None = None  # one for each image, (B, 2); None: nothing is dropped

    def split(self, count: int) -> list["Condition"]:
        """The same for as many blocks, each with keys of its own."""
        if self.dropout_keys is None:
            return [self] * count
        keys = mx.vmap(lambda key: mx.random.split(key, count))(self.dropout_keys)  # (B, count, 2)
        return [self._replace(dropout_keys=keys[:, index]) for index in range(count)]


class ResnetBlock2D(nn.Module):
    """Residual block conditioned on an embedding of noise level and class.

    [ADM] appendix A; the reference is OpenAI's `ResBlock`, the names are diffusers'. With a second level [CTM]'s, whose
    released code has `emb_layers_s` for what is `time_emb_proj_s` here.

    Args:
        in_channels, out_channels: the 1x1 shortcut exists where they differ.
        embedding_channels: width of the embedding; None for a block without one.
        groups, eps: of both normalisations.
        scale_shift: the embedding scales and shifts the second normalisation instead of being added before it.
        trajectory: there is a second embedding, whose projection is added to the first one's.
        dropout: part of the values before the second convolution that is dropped where keys are given.
        resample: "up" or "down" also doubles or halves height and width, None keeps them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int | None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        scale_shift: bool = False,
        trajectory: bool = False,
        dropout: float = 0.0,
        resample: str | None = None,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if embedding_channels is not None:
            projected_channels = out_channels * (2 if scale_shift else 1)
            self.time_emb_proj = nn.Linear(embedding_channels, projected_channels)
            if trajectory:
                self.time_emb_proj_s = nn.Linear(embedding_channels, projected_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)
        self.scale_shift, self.dropout, self.resample = scale_shift, dropout, resample

    def __call__(
        self,
        x: mx.array,
        embedding: mx.array | None = None,
        embedding_s: mx.array | None = None,
        dropout_keys: mx.array | None = None,
    ) -> mx.array:
        """x (B, H, W, C), the others as in `Condition` => (B, H', W', C')."""
        h = backend.silu(self.norm1(x))
        if self.resample is not None:
            h, x = RESAMPLERS[self.resample](h), RESAMPLERS[self.resample](x)
        h = self.conv1(h)
        if embedding is None:
            h = self.norm2(h)
        else:
            projected = self.time_emb_proj(embedding)
            if embedding_s is not None:
                projected = projected + self.time_emb_proj_s(embedding_s)
            projected = projected[:, None, None, :]
            if self.scale_shift:
                scale, shift = mx.split(projected, 2, axis=-1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + projected)
        h = backend.silu(h)
        if dropout_keys is not None:
            h = dropout(h, self.dropout, dropout_keys)
        h = self.conv2(h)
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + h


class Downsample2D(nn.Module):
    """3x3 convolution with stride 2.

    Args:
        padding: 1 on all sides as in U-Nets; 0 pads right and bottom only, as VAE encoders do.
    """

    def __init__(self, channels: int, *, padding: int = 1):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) => (B, H', W', C), half of either side."""
        if self.padding == 0:
            x = mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
        return self.conv(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour doubling followed by a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array, size: tuple[int, int] | None = None) -> mx.array:
        """(B, H, W, C) => (B, 2H, 2W, C), or (B, *size, C) where a map of odd size had been halved to H, W."""
        if size is None or tuple(size) == (2 * x.shape[1], 2 * x.shape[2]):
            return self.conv(x, upsample=True)
        return self.conv(upsample_nearest(x)[:, : size[0], : size[1]])


class SelfAttention2D(nn.Module):
    """Residual self-attention among the positions of a map.

    [ADM] section 3.1; diffusers' `Attention` with a group norm and a residual connection.

    Args:
        head_channels: channels per head.
        groups: of the normalisation before; None for none.
    """

    def __init__(self, channels: int, head_channels: int, *, groups: int | None, eps: float = 1e-5):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"{channels} channels cannot be split into heads of {head_channels}")
        if groups is not None:
            self.group_norm = GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]
        self.heads = channels // head_channels

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) => (B, H, W, C)."""
        batch, height, width, channels = x.shape
        h = self.group_norm(x) if "group_norm" in self else x
        h = h.reshape(batch, height * width, channels)
        q, k, v = (
            projection(h).reshape(batch, height * width, self.heads, -1).swapaxes(1, 2)  # (B, heads, HW, C/heads)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        h = backend.attention(q, k, v, scale=(channels // self.heads) ** -0.5)
        h = self.to_out[0](h.swapaxes(1, 2).reshape(batch, height * width, channels))
        return x + h.reshape(batch, height, width, channels)
