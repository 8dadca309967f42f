"""Between arrays and pictures: (B, H, W, C) in [-1, 1] on one side, Pillow images and files on the other."""

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from mlx_cm import metadata
from mlx_cm.errors import ModelError, OutputError, UsageError
from mlx_cm.storage import atomic_file, write_under_free_name

_MODES = {1: "L", 3: "RGB"}  # channels => Pillow's mode
_BACKGROUND = "white"


# --- arrays => pictures


def to_pil(x: mx.array) -> list[Image.Image]:
    """Turns model output into pictures: (x / 2 + 1/2) * 255, clamped and rounded to the nearest, in float32.

    Args:
        x: (B, H, W, C) in [-1, 1]; C = 1 gives greyscale, C = 3 RGB.

    Raises:
        OutputError: an image holds NaN or infinity.
        UsageError: another shape.
    """
    if x.ndim != 4 or x.shape[-1] not in _MODES:
        raise UsageError("image array", f"expected shape (B, H, W, 1) or (B, H, W, 3), got {x.shape}")
    values = np.array(x.astype(mx.float32))
    for number, image in enumerate(values, start=1):
        bad = image.size - np.count_nonzero(np.isfinite(image))
        if bad:
            raise OutputError(
                f"image {number} of {len(values)}",
                f"{bad} of {image.size} values are NaN or infinite",
                "compute in float32 (--dtype float32); some autoencoders overflow in float16",
            )
    pixels = (np.clip(values / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def check_output(images: Sequence[Image.Image]) -> None:
    """Refuses blank pictures: those whose pixels all have one colour.

    Raises:
        OutputError: names the first such image.
    """
    for number, image in enumerate(images, start=1):
        extremes = np.array(image.getextrema()).reshape(-1, 2)
        if image.width * image.height > 1 and (extremes[:, 0] == extremes[:, 1]).all():
            colour = ", ".join(str(value) for value in extremes[:, 0])
            raise OutputError(
                f"image {number} of {len(images)}",
                f"is blank, every pixel is ({colour})",
                "compute in float32 (--dtype float32), or try another seed or the model's default settings",
            )


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None, padding: int = 8) -> Image.Image:
    """Lays pictures out in rows on a white sheet, each centred in a cell of the largest one's size.

    Args:
        columns: pictures per row; by default as many as make the sheet about square.
        padding: pixels between pictures and around the sheet.

    Raises:
        UsageError: no pictures, fewer than one column, or a negative padding.
    """
    if not images or (columns is not None and columns < 1) or padding < 0:
        raise UsageError(
            "contact sheet",
            "expected at least one image, at least one column and a padding of 0 or more, "
            f"got {len(images)} images, {columns} columns and padding {padding}",
        )
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    size = (columns * (width + padding) + padding, rows * (height + padding) + padding)
    sheet = Image.new("L" if all(image.mode == "L" for image in images) else "RGB", size, _BACKGROUND)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left = padding + column * (width + padding) + (width - image.width) // 2
        top = padding + row * (height + padding) + (height - image.height) // 2
        sheet.paste(image, (left, top))
    return sheet


# --- pictures => arrays


def open_image(path: Path, file: BinaryIO | None = None) -> Image.Image:
    """Reads and decodes an image file, upright as its EXIF orientation says; of an animation, the first frame.

    Nothing but pixels and transparency is taken over: metadata of a source does not travel on into what is made of it.

    Args:
        file: the image's bytes, where they lie inside another file; `path` then only names it.

    Raises:
        ModelError: missing, corrupt, truncated, of an unknown format, or of more than 64 million pixels.
    """
    with metadata.opened_image(path, file) as image:
        upright = ImageOps.exif_transpose(image)
        upright.info = {key: value for key, value in upright.info.items() if key == "transparency"}
        return upright


def from_pil(image: Image.Image, *, size: tuple[int, int] | None = None) -> mx.array:
    """Turns a picture into model input: upright as its EXIF orientation says, RGB, in [-1, 1].

    Transparency shows white behind it, 16-bit greyscale keeps its full range, and colour profiles are not applied.

    Args:
        size: (width, height) to resize to, with a Lanczos filter and without regard to the aspect ratio.

    Returns:
        float32, shape (1, H, W, 3).

    Raises:
        ModelError: pixels without a known range (floating point, or whole numbers beyond 16 bits).
        UsageError: a size below one pixel.
    """
    if size is not None and min(size) < 1:
        raise UsageError(f"size {size}", "expected a width and a height of at least 1")
    image = to_rgb(image)
    if size is not None and image.size != tuple(size):
        image = image.resize(size, Image.Resampling.LANCZOS)
    return mx.array(np.asarray(image, dtype=np.float32)[None] / 127.5 - 1)


def picture_digest(image: Image.Image) -> str:
    """SHA-256 of what `from_pil` makes of a picture, by which it is known again in another file or format."""
    pixels = to_rgb(image)
    return hashlib.sha256(f"{pixels.width}x{pixels.height} ".encode() + pixels.tobytes()).hexdigest()


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as models see it: upright, RGB, white behind what is transparent, 16-bit greyscale in its full range.

    Raises:
        ModelError: pixels without a known range (floating point, or whole numbers beyond 16 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "LAB"):
        raise ModelError("image", f"has pixels of type {image.mode}, which cannot be read as RGB", "save it as RGB")
    if image.mode.startswith("I"):  # Pillow itself would cut 16-bit values off at 255
        image = Image.fromarray(_from_16_bit(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image)
    return image.convert("RGB")


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise ModelError(
            "image",
            f"has values from {values.min()} to {values.max()}, expected 0 to {0xFFFF}",
            "save it with 8 or 16 bits per channel",
        )
    return (values / 257).round().astype(np.uint8)


# --- pictures => files


@dataclass(frozen=True)
class ImageFormat:
    """A file format that pictures are written in."""

    name: str  # Pillow's
    extensions: tuple[str, ...]
    max_side: int  # pixels
    best: Mapping[str, Any]  # save options without a quality setting
    lossy: Mapping[str, Any] | None  # save options beside a quality setting; None where there is no such setting


# WebP is exact unless a quality is asked for; JPEG keeps its colours at full resolution.
FORMATS = {
    "png": ImageFormat("PNG", (".png",), 2**31 - 1, {}, None),
    "jpeg": ImageFormat("JPEG", (".jpg", ".jpeg"), 65_500, {"quality": 95, "subsampling": 0}, {"subsampling": 0}),
    "webp": ImageFormat("WEBP", (".webp",), 16_383, {"lossless": True, "exact": True}, {}),
}
_BY_EXTENSION = {extension: name for name, format in FORMATS.items() for extension in format.extensions}


def image_format(path: Path, format: str | None = None) -> str:
    """The format to write a file in: `format` where given, else what the file's extension says.

    Raises:
        UsageError: unknown, not given at all, or another one than the extension says.
    """
    extension = Path(path).suffix.lower()
    known = ", ".join(FORMATS)
    if format is not None and format not in FORMATS:
        raise UsageError(f"format {format!r}", f"expected one of {known}")
    implied = _BY_EXTENSION.get(extension)
    if format is None and implied is None:
        raise UsageError(str(path), f"the extension {extension!r} names no image format; expected one of {known}")
    if format is not None and implied not in (None, format):
        raise UsageError(str(path), f"the extension says {implied}, but the format asked for is {format}")
    return format or implied


def encode_image(
    image: Image.Image,
    format: str,
    *,
    recipe: Mapping[str, Any] | None = None,
    parameters: str | None = None,
    quality: int | None = None,
) -> bytes:
    """A picture as the bytes of a file; identical arguments give identical bytes.

    Args:
        format: `png`, `jpeg` or `webp`.
        recipe: embedded for `metadata.read_recipe`.
        parameters: embedded for `metadata.read_parameters` and the tools that read such text.
        quality: 1 ... 100 for JPEG (95 by default) and WebP (lossless by default).

    Raises:
        UsageError: a setting the format has no use for, or a picture or metadata beyond its limits.
    """
    image_format(Path(), format)
    kind = FORMATS[format]
    if image.mode not in _MODES.values():
        raise UsageError("image", f"has mode {image.mode}, expected one of {', '.join(_MODES.values())}")
    if max(image.size) > kind.max_side:
        raise UsageError("image", f"{format} holds {kind.max_side} pixels a side, this is {image.width}x{image.height}")
    if quality is not None and kind.lossy is None:
        raise UsageError(f"quality {quality}", f"{format} is lossless and has no quality setting")
    if quality is not None and not 1 <= quality <= 100:
        raise UsageError(f"quality {quality}", "expected 1 to 100")
    settings = kind.best if quality is None else {**kind.lossy, "quality": quality}
    buffer = io.BytesIO()
    image.save(buffer, kind.name, **settings, **metadata.save_options(format, recipe, parameters))
    return buffer.getvalue()


def save_image(
    image: Image.Image,
    path: Path,
    *,
    format: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    parameters: str | None = None,
    quality: int | None = None,
    overwrite: bool = True,
) -> Path:
    """Writes a picture and its metadata, encoded once, so that the file is whole or not there.

    Args:
        format: `png`, `jpeg` or `webp`; by default what the extension says.
        overwrite: whether to replace an existing file; otherwise the next free name is taken, and two programs that
            do so at once take two.
        recipe, parameters, quality: see `encode_image`.

    Returns:
        The path written.

    Raises:
        UsageError: see `image_format` and `encode_image`.
        DiskError: writing fails; nothing half-written is left behind.
    """
    path = Path(path)
    data = encode_image(image, image_format(path, format), recipe=recipe, parameters=parameters, quality=quality)
    if not overwrite:
        return write_under_free_name(path, data)
    with atomic_file(path) as partial:
        partial.write_bytes(data)
    return path
