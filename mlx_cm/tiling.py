"""Decoding and encoding tile by tile: images of any size in the memory of one tile.

Tiles overlap, and where they do one fades into the next along half a period of a cosine, so that neither the picture
nor its slope jumps. A tile is normalised by its own statistics and attends to itself only: the result is near that of
the whole image, not equal to it, unless the image is a single tile.
"""

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_cm.errors import ModelError, UsageError

Spans = list[tuple[int, int]]  # (start, stop) per tile
TileCallback = Callable[[int, int], None]  # (tiles done, tiles in all)


def decode_tiled(
    decode: Callable[[mx.array], mx.array],
    latents: mx.array,
    *,
    tile: int = 64,
    overlap: int | None = None,
    scale: int = 8,
    callback: TileCallback | None = None,
) -> mx.array:
    """Images of latents, one tile evaluated after the other.

    Args:
        decode: (B, h, w, C) => (B, scale * h, scale * w, C'), as `AutoencoderKL.decode_scaled`.
        latents: (B, H, W, C).
        tile: greatest height and width of a tile, latents.
        overlap: of neighbouring tiles, latents; None: a quarter of the tile.
        scale: pixels per latent.
        callback: called after each tile; may raise to stop.

    Returns:
        (B, scale * H, scale * W, C'), float32 where there is more than one tile.

    Raises:
        UsageError: a tile or overlap that tiles nothing.
        ModelError: decode returns another size.
    """
    rows, columns = _grid(latents, tile, overlap, 1)
    (images,) = _blend(lambda x: (decode(x),), latents, rows, columns, (scale, 1), callback)
    return images


def encode_tiled(
    encode: Callable[[mx.array], mx.array | tuple[mx.array, ...]],
    images: mx.array,
    *,
    tile: int = 512,
    overlap: int | None = None,
    scale: int = 8,
    callback: TileCallback | None = None,
) -> mx.array | tuple[mx.array, ...]:
    """Latents of images, one tile evaluated after the other.

    Args:
        encode: (B, h, w, C) => (B, h / scale, w / scale, C'), or a tuple of such arrays, as `AutoencoderKL.encode`.
        images: (B, H, W, C).
        tile: greatest height and width of a tile, pixels.
        overlap: of neighbouring tiles, pixels; None: a quarter of the tile.
        scale: pixels per latent.
        callback: called after each tile; may raise to stop.

    Returns:
        What encode returns, of the whole image, float32 where there is more than one tile.

    Raises:
        UsageError: a tile or overlap that tiles nothing, or sizes that are no multiples of scale.
        ModelError: encode returns another size.
    """
    returns_tuple = False

    def encode_parts(x: mx.array) -> tuple[mx.array, ...]:
        nonlocal returns_tuple
        parts = encode(x)
        returns_tuple = isinstance(parts, tuple)
        return parts if returns_tuple else (parts,)

    rows, columns = _grid(images, tile, overlap, scale)
    parts = _blend(encode_parts, images, rows, columns, (1, scale), callback)
    return parts if returns_tuple else parts[0]


def tile_spans(size: int, tile: int, overlap: int) -> Spans:
    """Where the tiles along one axis begin and end: equal in size, evenly spread, as few as will do.

    Args:
        size: of the axis.
        tile: greatest size of a tile.
        overlap: least number of positions that neighbours share, more than 0 and less than tile.
    """
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    length = -(-(size + (count - 1) * overlap) // count)  # of tiles that overlap no more than asked
    starts = [index * (size - length) // (count - 1) for index in range(count)]
    return [(start, start + length) for start in starts]


def blend_weights(spans: Spans) -> list[np.ndarray]:
    """Weight of each tile at each of its positions, float32; over all tiles they sum to one everywhere.

    A tile fades in by (1 - cos(pi u)) / 2 over what it shares with the one before, which fades out by the rest.
    """
    size = spans[-1][1]
    fades = [np.ones(size)]
    for (_, previous_stop), (start, _) in itertools.pairwise(spans):
        u = (np.arange(size) + 0.5 - start) / (previous_stop - start)
        fades.append(0.5 - 0.5 * np.cos(np.pi * np.clip(u, 0, 1)))
    weights, left = [], np.ones(size)
    for fade, (start, stop) in zip(reversed(fades), reversed(spans), strict=True):  # later tiles lie on earlier ones
        weights.append((left * fade)[start:stop].astype(np.float32))
        left = left * (1 - fade)
    return weights[::-1]


def _grid(x: mx.array, tile: int, overlap: int | None, unit: int) -> tuple[Spans, Spans]:
    """Spans of the rows and the columns of tiles, all multiples of unit."""
    if tile < 2 * unit or tile % unit:
        raise UsageError(f"tile {tile}", f"expected a multiple of {unit}, at least {2 * unit}")
    if overlap is None:
        overlap = max(tile // 4 // unit, 1) * unit
    if not 0 < overlap < tile or overlap % unit:
        raise UsageError(f"overlap {overlap}", f"expected a multiple of {unit}, more than 0 and less than tile {tile}")
    spans = []
    for name, size in zip(("height", "width"), x.shape[1:3], strict=True):
        if size > tile and size % unit:
            raise UsageError(f"{name} {size}", f"expected a multiple of {unit} to be split into tiles")
        if size <= tile:
            spans.append([(0, size)])
        else:
            of_units = tile_spans(size // unit, tile // unit, overlap // unit)
            spans.append([(start * unit, stop * unit) for start, stop in of_units])
    return spans[0], spans[1]


def _blend(
    apply: Callable[[mx.array], tuple[mx.array, ...]],
    x: mx.array,
    rows: Spans,
    columns: Spans,
    ratio: tuple[int, int],
    callback: TileCallback | None,
) -> tuple[mx.array, ...]:
    """The weighted sum of what `apply` makes of each tile.

    Args:
        ratio: (a, b): a positions of the output for b of x.
    """
    tiles = [(row, column) for row in range(len(rows)) for column in range(len(columns))]
    report = callback or (lambda done, total: None)
    if len(tiles) == 1:
        parts = apply(x)
        mx.eval(parts)
        report(1, 1)
        return parts

    up, down = ratio
    rows_out, columns_out = ([(a * up // down, b * up // down) for a, b in spans] for spans in (rows, columns))
    weigh_row, weigh_column = blend_weights(rows_out), blend_weights(columns_out)
    totals: list[mx.array] = []
    for done, (row, column) in enumerate(tiles, start=1):
        (top, bottom), (left, right) = rows[row], columns[column]
        parts = apply(x[:, top:bottom, left:right])
        weights = mx.array(np.outer(weigh_row[row], weigh_column[column])[None, :, :, None])
        _check_size(parts, weights.shape[1:3], (bottom - top, right - left))
        if not totals:
            size = (rows_out[-1][1], columns_out[-1][1])
            totals = [mx.zeros((part.shape[0], *size, part.shape[3])) for part in parts]
        (top, bottom), (left, right) = rows_out[row], columns_out[column]
        for total, part in zip(totals, parts, strict=True):
            total[:, top:bottom, left:right] += weights * part
        del parts
        mx.eval(totals)  # bounds the memory to one tile, and lets an interrupt in
        report(done, len(tiles))
    return tuple(totals)


def _check_size(parts: tuple[mx.array, ...], expected: tuple[int, ...], given: tuple[int, int]) -> None:
    for part in parts:
        if tuple(part.shape[1:3]) != tuple(expected):
            raise ModelError(
                "tiling",
                f"a tile of {given[0]}x{given[1]} became {part.shape[1]}x{part.shape[2]}, "
                f"expected {expected[0]}x{expected[1]}",
                "give the model's own number of pixels per latent as scale",
            )
