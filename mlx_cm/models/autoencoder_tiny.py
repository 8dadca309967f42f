"""TAESD, a distilled autoencoder of 2.4 M parameters for previews and low memory: diffusers' `AutoencoderTiny`.

Its latents approximate the *scaled* latents of the model whose autoencoder it was distilled from (Stable Diffusion 1
and 2, or XL: the same architecture with other weights), so there is nothing to convert between raw and scaled ones.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_cm import backend
from mlx_cm.models.layers import Conv2d

# The published config also has settings of which this family of models uses one value.
FIXED_SETTINGS = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}


@dataclass(frozen=True)
class AutoencoderTinyConfig:
    """Size and layout of an `AutoencoderTiny`; fields and defaults of diffusers' class."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # width per level; one width in all of them
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # residual blocks per level
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3  # latents of [-3, 3] map to [0, 1] for storage as images
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0  # scaled = (raw - shift_factor) * scaling_factor, as of the other autoencoders
    shift_factor: float = 0.0
    block_out_channels: tuple[int, ...] | None = None  # diffusers writes the decoder's here once more

    def __post_init__(self):
        for name, value in FIXED_SETTINGS.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not supported, expected {value!r}")
        for part in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{part}_block_out_channels"), getattr(self, f"num_{part}_blocks")
            if not widths or len(widths) != len(blocks):
                raise ValueError(
                    f"expected as many {part}_block_out_channels ({len(widths)}) as num_{part}_blocks ({len(blocks)})"
                )
            if len(set(widths)) > 1 or widths[0] < 1:
                raise ValueError(f"{part}_block_out_channels: expected one width in all levels, got {list(widths)}")
            if min(blocks) < 0:
                raise ValueError(f"num_{part}_blocks: expected at least 0, got {min(blocks)}")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError(
                f"expected as many num_encoder_blocks ({len(self.num_encoder_blocks)}) "
                f"as num_decoder_blocks ({len(self.num_decoder_blocks)})"
            )
        if self.block_out_channels not in (None, self.decoder_block_out_channels):
            raise ValueError(
                f"block_out_channels: expected {list(self.decoder_block_out_channels)} "
                f"(decoder_block_out_channels), got {list(self.block_out_channels)}"
            )
        for name in ("in_channels", "out_channels", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("scaling_factor", "latent_magnitude"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: 0 leaves nothing of the latents")

    @property
    def pixels_per_latent(self) -> int:
        """Height and width of the pixels that one latent stands for."""
        return 2 ** (len(self.num_decoder_blocks) - 1)


class ReLU(nn.Module):
    """max(x, 0), a place in a list of layers."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.maximum(x, 0)


class UpsampleConv2d(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution without bias: (B, H, W, C) => (B, 2H, 2W, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = Conv2d(channels, channels, 3, padding=1).weight

    def __call__(self, x: mx.array) -> mx.array:
        return backend.upsample_conv2d(x, self.weight)


class AutoencoderTinyBlock(nn.Module):
    """Residual block of three 3x3 convolutions with ReLU between and behind."""

    def __init__(self, channels: int):
        super().__init__()
        convolutions = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = [convolutions[0], ReLU(), convolutions[1], ReLU(), convolutions[2]]

    def __call__(self, x: mx.array) -> mx.array:
        h = x
        for layer in self.conv:
            h = layer(h)
        return mx.maximum(h + x, 0)


class Encoder(nn.Module):
    """Images in [-1, 1] to latents: (B, H, W, in_channels) => (B, H/8, W/8, latent_channels)."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        width = config.encoder_block_out_channels[0]
        self.layers = [Conv2d(config.in_channels, width, 3, padding=1)]
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level > 0:
                self.layers.append(Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            self.layers += [AutoencoderTinyBlock(width) for _ in range(blocks)]
        self.layers.append(Conv2d(width, config.latent_channels, 3, padding=1))

    def __call__(self, x: mx.array) -> mx.array:
        x = (x + 1) / 2  # [-1, 1] => [0, 1]
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Latents to images in [-1, 1]: (B, h, w, latent_channels) => (B, 8h, 8w, out_channels)."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        width = config.decoder_block_out_channels[0]
        self.layers = [Conv2d(config.latent_channels, width, 3, padding=1), ReLU()]
        for level, blocks in enumerate(config.num_decoder_blocks):
            self.layers += [AutoencoderTinyBlock(width) for _ in range(blocks)]
            if level < len(config.num_decoder_blocks) - 1:
                # The published list counts the doubling as a layer of its own.
                self.layers += [nn.Identity(), UpsampleConv2d(width)]
        self.layers.append(Conv2d(width, config.out_channels, 3, padding=1))

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.tanh(x / 3) * 3  # a smooth limit: far-off latents do not burn out
        for layer in self.layers:
            x = layer(x)
        return 2 * x - 1  # [0, 1] => [-1, 1]


class AutoencoderTiny(nn.Module):
    """Encoder and decoder without attention, normalisation or posterior.

    Images are (B, H, W, C) in [-1, 1], decoded ones not clipped; sizes are multiples of `pixels_per_latent`.
    """

    float32_parts: tuple[str, ...] = ()  # a rounding of the last layer is far below one level of an 8-bit image

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, x: mx.array) -> mx.array:
        """Latents of images: (B, H, W, in_channels) => (B, H/8, W/8, latent_channels), float32."""
        return self.encoder(x.astype(self.encoder.layers[0].weight.dtype)).astype(mx.float32)

    def decode(self, z: mx.array) -> mx.array:
        """Images of latents: (B, h, w, latent_channels) => (B, 8h, 8w, out_channels), float32."""
        return self.decoder(z.astype(self.decoder.layers[0].weight.dtype)).astype(mx.float32)

    def encode_scaled(self, x: mx.array, noise: mx.array | None = None) -> mx.array:
        """Scaled latents of images, float32.

        Args:
            x: images, (B, H, W, in_channels).
            noise: has no effect: this encoder has no posterior to draw from.
        """
        return self.scaled(self.encode(x))

    def scaled(self, latents: mx.array, noise: mx.array | None = None) -> mx.array:
        """Scaled latents of what `encode` returns; noise has no effect."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def decode_scaled(self, z: mx.array) -> mx.array:
        """Images of scaled latents: (B, h, w, latent_channels) => (B, 8h, 8w, out_channels), float32."""
        return self.decode(z.astype(mx.float32) / self.config.scaling_factor + self.config.shift_factor)

    def scale_latents(self, latents: mx.array) -> mx.array:
        """Latents => [0, 1], clipped, for storage as an image."""
        return mx.clip(latents / (2 * self.config.latent_magnitude) + self.config.latent_shift, 0, 1)

    def unscale_latents(self, stored: mx.array) -> mx.array:
        """[0, 1] => latents."""
        return (stored - self.config.latent_shift) * (2 * self.config.latent_magnitude)
