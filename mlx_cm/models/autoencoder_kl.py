"""The variational autoencoder of latent diffusion models: diffusers' `AutoencoderKL`, channels-last.

Latents come in two units: *raw* ones are what the encoder's posterior and the decoder are about; *scaled* ones, of
about unit variance, are what backbones are trained on. `AutoencoderKL.to_scaled` and `AutoencoderKL.to_raw` convert.
"""

import itertools
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_cm import backend
from mlx_cm.models.layers import Conv2d, Downsample2D, GroupNorm, ResnetBlock2D, SelfAttention2D, Upsample2D

NORM_EPS = 1e-6  # of every normalisation of this architecture
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Size and layout of an `AutoencoderKL`; fields and defaults of diffusers' class."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)  # width per resolution level
    layers_per_block: int = 1  # residual blocks per level of the encoder; the decoder has one more
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32  # height and width of the training images, pixels
    scaling_factor: float = 0.18215  # scaled = (raw - shift_factor) * scaling_factor
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None  # with latents_std: scaled = (raw - mean) / std * scaling_factor
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True  # whether half precision may overflow in the decoder, so that it is to run in float32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if not levels or not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                f"expected as many block_out_channels ({levels}) as down_block_types ({len(self.down_block_types)}) "
                f"and up_block_types ({len(self.up_block_types)})"
            )
        choices = {
            "down_block_types": (self.down_block_types, "DownEncoderBlock2D"),
            "up_block_types": (self.up_block_types, "UpDecoderBlock2D"),
            "act_fn": ([self.act_fn], "silu"),
        }
        for name, (given, known) in choices.items():
            for value in given:
                if value != known:
                    raise ValueError(f"{name}: {value!r} is not supported, expected {known!r}")
        sizes = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "sample_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide the block width {width}")
        if self.scaling_factor == 0:
            raise ValueError("scaling_factor: 0 leaves nothing of the latents")
        self._check_statistics()

    def _check_statistics(self):
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std: expected both or neither")
        if self.latents_mean is None:
            return
        if self.shift_factor:
            raise ValueError("shift_factor and latents_mean: expected one of the two, both shift the latents")
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"{name}: expected {self.latent_channels} values (latent_channels), got {len(getattr(self, name))}"
                )
        if 0 in self.latents_std:
            raise ValueError("latents_std: 0 cannot be divided by")

    @property
    def pixels_per_latent(self) -> int:
        """Height and width of the pixels that one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        """A residual block with this config's normalisation."""
        return ResnetBlock2D(in_channels, out_channels, None, groups=self.norm_num_groups, eps=NORM_EPS)

    def resnets(self, in_channels: int, out_channels: int, count: int) -> list[ResnetBlock2D]:
        """Residual blocks in a row, the first of which changes the width."""
        return [self.resnet(a, b) for a, b in itertools.pairwise([in_channels, *[out_channels] * count])]


# The autoencoders of Stable Diffusion 1 and 2, and of Stable Diffusion XL.
_SD_LAYOUT = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SD_VAE = AutoencoderKLConfig(**_SD_LAYOUT, sample_size=512)
SDXL_VAE = AutoencoderKLConfig(**_SD_LAYOUT, sample_size=1024, scaling_factor=0.13025)


class DownEncoderBlock2D(nn.Module):
    """One resolution level of the encoder: residual blocks, then halving except on the last level."""

    def __init__(self, config: AutoencoderKLConfig, in_channels: int, out_channels: int, is_last: bool):
        super().__init__()
        self.resnets = config.resnets(in_channels, out_channels, config.layers_per_block)
        if not is_last:
            self.downsamplers = [Downsample2D(out_channels, padding=0)]

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) => (B, H/2, W/2, C')."""
        for layer in [*self.resnets, *self.get("downsamplers", [])]:
            x = layer(x)
        return x


class UpDecoderBlock2D(nn.Module):
    """One resolution level of the decoder: residual blocks, then doubling except on the last level."""

    def __init__(self, config: AutoencoderKLConfig, in_channels: int, out_channels: int, is_last: bool):
        super().__init__()
        self.resnets = config.resnets(in_channels, out_channels, config.layers_per_block + 1)
        if not is_last:
            self.upsamplers = [Upsample2D(out_channels)]

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) => (B, 2H, 2W, C')."""
        for layer in [*self.resnets, *self.get("upsamplers", [])]:
            x = layer(x)
        return x


class MidBlock2D(nn.Module):
    """The lowest level: residual block, attention with a single head, residual block."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = config.resnets(width, width, 2)
        if config.mid_block_add_attention:
            self.attentions = [SelfAttention2D(width, width, groups=config.norm_num_groups, eps=NORM_EPS)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        for attention in self.get("attentions", []):
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images to the moments of the posterior: (B, H, W, in_channels) => (B, H/8, W/8, 2 * latent_channels)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = [
            DownEncoderBlock2D(config, a, b, is_last=level == len(widths) - 1)
            for level, (a, b) in enumerate(itertools.pairwise([widths[0], *widths]))
        ]
        self.mid_block = MidBlock2D(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(backend.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to images: (B, h, w, latent_channels) => (B, 8h, 8w, out_channels)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock2D(config)
        self.up_blocks = [
            UpDecoderBlock2D(config, a, b, is_last=level == len(widths) - 1)
            for level, (a, b) in enumerate(itertools.pairwise([widths[0], *widths]))
        ]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(backend.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder to a normal posterior over raw latents, decoder back to images.

    [LDM] appendix G; the autoencoders of Stable Diffusion 1.x, 2.x and XL, and others by config.
    Images are (B, H, W, C) in [-1, 1], decoded ones not clipped; sizes are multiples of `pixels_per_latent`.
    """

    # Half precision throughout: a rounding of the last layer is far below one level of an 8-bit image.
    float32_parts: tuple[str, ...] = ()

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Moments of the posterior over raw latents.

        Args:
            x: images, (B, H, W, in_channels).

        Returns:
            (mean, log variance within [-30, 20]), each (B, H/8, W/8, latent_channels), float32.
        """
        moments = self.encoder(x.astype(self.encoder.conv_in.weight.dtype))
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        mean, logvar = mx.split(moments.astype(mx.float32), 2, axis=-1)
        return mean, mx.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: mx.array) -> mx.array:
        """Images of raw latents: (B, h, w, latent_channels) => (B, 8h, 8w, out_channels), float32."""
        z = z.astype(self.decoder.conv_in.weight.dtype)
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(mx.float32)

    def encode_scaled(self, x: mx.array, noise: mx.array | None = None) -> mx.array:
        """Scaled latents of images: a draw from the posterior, or its mode where there is no noise.

        Args:
            x: images, (B, H, W, in_channels).
            noise: standard normal, (B, H/8, W/8, latent_channels).
        """
        return self.scaled(self.encode(x), noise)

    def scaled(self, moments: tuple[mx.array, mx.array], noise: mx.array | None = None) -> mx.array:
        """Scaled latents of what `encode` returns: a draw, or the mode where there is no noise."""
        mean, logvar = moments
        return self.to_scaled(mean if noise is None else sample_posterior(mean, logvar, noise))

    def scaled_moments(self, moments: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        """Mean and standard deviation of the scaled latents of what `encode` returns."""
        mean, logvar = moments
        return self.to_scaled(mean), mx.exp(0.5 * logvar) * self._statistics()[1]

    def decode_scaled(self, z: mx.array) -> mx.array:
        """Images of scaled latents: (B, h, w, latent_channels) => (B, 8h, 8w, out_channels), float32."""
        return self.decode(self.to_raw(z))

    def to_scaled(self, raw: mx.array) -> mx.array:
        """Raw latents => scaled latents, float32."""
        shift, factor = self._statistics()
        return (raw.astype(mx.float32) - shift) * factor

    def to_raw(self, scaled: mx.array) -> mx.array:
        """Scaled latents => raw latents, float32."""
        shift, factor = self._statistics()
        return scaled.astype(mx.float32) / factor + shift

    def _statistics(self) -> tuple[mx.array, mx.array]:
        """(shift, factor) of scaled = (raw - shift) * factor: scalars, or one per channel."""
        config = self.config
        if config.latents_mean is None:
            return mx.array(config.shift_factor or 0.0), mx.array(config.scaling_factor)
        return mx.array(config.latents_mean), config.scaling_factor / mx.array(config.latents_std)


def sample_posterior(mean: mx.array, logvar: mx.array, noise: mx.array) -> mx.array:
    """A draw from the posterior: mean + exp(logvar / 2) * noise, all of one shape."""
    return mean + mx.exp(0.5 * logvar) * noise
