"""Tiled decoding and encoding: weights, seams, sizes, memory."""

import functools
import itertools
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map_with_path

from mlx_cm.backend import upsample_nearest
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_cm.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from mlx_cm.tiling import blend_weights, decode_tiled, encode_tiled, tile_spans

SMALL_VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 16, 32),
    norm_num_groups=8,
)


@functools.cache
def small_vae() -> AutoencoderKL:
    """Random weights whose convolutions keep the size of what passes, as trained ones do."""
    mx.random.seed(0)
    model = AutoencoderKL(SMALL_VAE)
    model.update(tree_map_with_path(lambda name, leaf: 3**0.5 * leaf if leaf.ndim > 1 else leaf, model.parameters()))
    return model


def smooth_map(height: int, width: int, channels: int) -> mx.array:
    """Waves longer than a tile: what differs from tile to tile is what a picture's colours are."""
    y, x = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    waves = [np.sin(2 * np.pi * ((c + 1) * y / 2 + (c % 2 + 1) * x) + c) for c in range(channels)]
    return mx.array(np.stack(waves, axis=-1)[None].astype(np.float32))


@st.composite
def axes(draw):
    tile = draw(st.integers(2, 40))
    return draw(st.integers(1, 150)), tile, draw(st.integers(1, tile - 1))


@given(axes())
@settings(max_examples=300, deadline=None)
def test_tiles_cover_an_axis_and_weights_sum_to_one(axis):
    size, tile, overlap = axis
    spans = tile_spans(size, tile, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == size
    assert len({stop - start for start, stop in spans}) == 1 and spans[0][1] <= tile
    for (start, stop), (next_start, _) in itertools.pairwise(spans):
        assert start < next_start and stop - next_start >= overlap
    total = np.zeros(size)
    for weights, (start, stop) in zip(blend_weights(spans), spans, strict=True):
        assert weights.shape == (stop - start,) and (weights >= 0).all()
        total[start:stop] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_tiles_are_as_few_and_as_small_as_the_overlap_allows():
    assert tile_spans(64, 64, 16) == [(0, 64)]
    assert tile_spans(65, 64, 16) == [(0, 41), (24, 65)]
    assert tile_spans(128, 64, 16) == [(0, 54), (37, 91), (74, 128)]


def test_weights_fade_without_a_kink():
    spans = tile_spans(128, 64, 16)
    fade = blend_weights([(start * 8, stop * 8) for start, stop in spans])[1]
    assert fade[0] < 1e-3 and fade[-1] < 1e-3 and fade.max() == 1
    assert np.abs(np.diff(fade, n=2)).max() < 2 / (16 * 8) ** 2 * np.pi**2 / 2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 16), st.integers(1, 15), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_decoder_that_looks_at_single_positions_is_reproduced(height, width, tile, overlap, batch):
    """Whatever the sizes, every tile lands where it belongs."""
    z = mx.random.normal((batch, height, width, 3), key=mx.random.key(height * 41 + width))
    decode = lambda z: upsample_nearest(mx.sin(z))  # noqa: E731
    y = decode_tiled(decode, z, tile=tile, overlap=min(overlap, tile - 1), scale=2)
    np.testing.assert_allclose(y, decode(z), atol=1e-6)
    x = decode(z)
    encode = lambda x: (x[:, ::2, ::2], mx.cos(x[:, 1::2, 1::2, :2]))  # noqa: E731
    for part, expected in zip(
        encode_tiled(encode, x, tile=2 * tile, overlap=2 * min(overlap, tile - 1), scale=2), encode(x), strict=True
    ):
        np.testing.assert_allclose(part, expected, atol=1e-6)


def test_one_tile_is_the_whole_image():
    model = small_vae()
    z = mx.random.normal((2, 12, 9, 4))
    assert mx.array_equal(decode_tiled(model.decode_scaled, z, tile=12, scale=4), model.decode_scaled(z))
    x = mx.random.uniform(-1, 1, (1, 50, 43, 3))  # no multiples of 4: nothing is split
    whole = model.encode(x)
    tiled = encode_tiled(model.encode, x, tile=52, scale=4)
    assert isinstance(tiled, tuple) and all(mx.array_equal(a, b) for a, b in zip(tiled, whole, strict=True))


def test_constant_latents_give_no_trace_of_tiles():
    """Away from the borders of a tile a constant decodes to a constant, and borders have no weight."""
    mx.random.seed(0)
    model = AutoencoderTiny(AutoencoderTinyConfig(num_decoder_blocks=(0, 0, 0, 0), num_encoder_blocks=(0, 0, 0, 0)))
    z = mx.broadcast_to(mx.array([0.5, -1.0, 0.2, 1.5]), (1, 70, 70, 4))
    y = np.array(decode_tiled(model.decode_scaled, z, tile=32))[0, 40:-40, 40:-40]
    assert np.ptp(y, axis=(0, 1)).max() < 0.02 * np.abs(y).max()


def jumps_at_tiles(image: np.ndarray, borders: list[int]) -> float:
    """Mean step between neighbouring columns where a tile begins or ends, relative to the mean step elsewhere."""
    steps = np.abs(np.diff(image[0], axis=1)).mean(axis=(0, 2))
    at = np.isin(np.arange(1, len(steps) + 1), borders)
    return steps[at].mean() / steps[~at].mean()


def test_no_seam_where_tiles_differ():
    """A decoder that subtracts a tile's own mean, as normalisation does at heart, would show every border."""
    z = smooth_map(40, 200, 3)

    def decode(tile):
        return upsample_nearest(upsample_nearest(upsample_nearest(tile - tile.mean(axis=(1, 2), keepdims=True))))

    borders = [8 * edge for span in tile_spans(200, 64, 16) for edge in span if 0 < edge < 200]
    y = np.array(decode_tiled(decode, z, tile=64, overlap=16))
    assert jumps_at_tiles(y, borders) < 1.1 * jumps_at_tiles(np.array(decode(z)), borders)
    spans = [(0, 64), (64, 128), (128, 192)]
    cut = np.concatenate([decode(z[:, :, a:b]) for a, b in spans], axis=2)
    assert jumps_at_tiles(cut, [512, 1024]) > 1.5 * jumps_at_tiles(np.array(decode(z)), [512, 1024])


def test_no_seam_from_an_autoencoder_and_a_result_near_the_whole():
    """The wider the tiles, the nearer their statistics are to those of the image."""
    model = small_vae()
    z = 0.3 * smooth_map(36, 96, 4) + mx.random.normal((1, 36, 96, 4), key=mx.random.key(1))
    whole = np.array(model.decode_scaled(z))
    differences = []
    for tile in (16, 32):
        y = np.array(decode_tiled(model.decode_scaled, z, tile=tile, scale=4))
        borders = [4 * edge for span in tile_spans(96, tile, tile // 4) for edge in span if 0 < edge < 96]
        assert jumps_at_tiles(y, borders) < 1.1 * jumps_at_tiles(whole, borders)
        differences.append(np.linalg.norm(y - whole) / np.linalg.norm(whole - whole.mean(axis=(0, 1, 2))))
    assert 0 < differences[1] < differences[0] < 0.3 and differences[1] < 0.2


def test_every_tile_is_reported_and_can_be_the_last():
    z, seen = mx.zeros((1, 20, 33, 4)), []
    decode_tiled(
        upsample_nearest, z, tile=16, overlap=4, scale=2, callback=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 6) for done in range(1, 7)]
    calls = []

    def decode(tile):
        calls.append(tile.shape)
        return upsample_nearest(tile)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_tiled(decode, z, tile=16, overlap=4, scale=2, callback=stop)
    assert len(calls) == 2
    seen.clear()
    decode_tiled(upsample_nearest, z, tile=64, scale=2, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


REFUSED = [
    (decode_tiled, {"tile": 1}, "tile 1: expected a multiple of 1, at least 2"),
    (decode_tiled, {"tile": 16, "overlap": 16}, "overlap 16: .* less than tile 16"),
    (decode_tiled, {"tile": 16, "overlap": 0}, "overlap 0: .* more than 0"),
    (encode_tiled, {"tile": 20}, "tile 20: expected a multiple of 8, at least 16"),
    (encode_tiled, {"tile": 32, "overlap": 12}, "overlap 12: expected a multiple of 8"),
    (encode_tiled, {"tile": 32}, "width 52: expected a multiple of 8"),
]


@pytest.mark.parametrize(("function", "options", "message"), REFUSED)
def test_refused(function, options, message):
    with pytest.raises(UsageError, match=message):
        function(lambda x: x, mx.zeros((1, 24, 52, 3)), **options)


def test_a_wrong_scale_is_named():
    with pytest.raises(ModelError, match="a tile of 10x10 became 20x20, expected 80x80"):
        decode_tiled(upsample_nearest, mx.zeros((1, 10, 19, 4)), tile=11, overlap=1)


MEASURE = """
import dataclasses, json
from mlx_cm.models.autoencoder_kl import SD_VAE, AutoencoderKL
from mlx_cm.tiling import decode_tiled
import mlx.core as mx
config = dataclasses.replace(
    SD_VAE, block_out_channels=(16,) * 4, norm_num_groups=8, layers_per_block=1, mid_block_add_attention=False
)
model = AutoencoderKL(config)
z = mx.random.normal((1, 64, 64, 4))
mx.eval(model.parameters(), z)
peaks = []
for decode in (lambda z: decode_tiled(model.decode_scaled, z, tile=24), model.decode_scaled):
    mx.clear_cache()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    mx.eval(decode(z))
    peaks.append(mx.get_peak_memory() - start)
print(json.dumps(peaks))
"""


def test_memory_is_that_of_one_tile():
    """512 x 512 pixels in tiles of 192 x 192: a seventh of the area."""
    process = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    tiled, whole = json.loads(process.stdout)
    assert tiled < whole / 4
