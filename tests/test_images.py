import errno
import io
import os
import shutil
import struct
import threading
import zlib

import mlx.core as mx
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from failing_disk import FAILURES, Failing
from PIL import Image, ImageCms

from mlx_cm import images, metadata
from mlx_cm.errors import DiskError, ModelError, OutputError, UsageError
from mlx_cm.images import (
    check_output,
    contact_sheet,
    encode_image,
    from_pil,
    image_format,
    open_image,
    save_image,
    to_pil,
)


def noisy(width=17, height=11, mode="RGB", seed=0):
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bare_png(width, height):
    """A PNG that announces a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


# --- arrays => pictures


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_pixels_are_those_of_diffusers(dtype):
    x = (mx.random.normal((2, 9, 7, 3), key=mx.random.key(1)) * 0.8).astype(dtype)
    processor = VaeImageProcessor()
    unit = np.clip(np.array(x.astype(mx.float32)) / 2 + 0.5, 0, 1)
    for ours, theirs in zip(to_pil(x), processor.numpy_to_pil(unit), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_every_level_survives_the_way_there_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([levels, levels.T, levels[::-1]], axis=-1))
    array = from_pil(picture)
    assert array.shape == (1, 16, 16, 3)
    assert array.dtype == mx.float32
    assert (float(array.min()), float(array.max())) == (-1.0, 1.0)
    assert np.array_equal(np.asarray(to_pil(array)[0]), np.asarray(picture))


def test_values_out_of_range_are_clamped_and_one_channel_is_grey():
    (picture,) = to_pil(mx.array([-7.0, -1.0, 0.0, 1.0, 1e30]).reshape(1, 1, 5, 1))
    assert picture.mode == "L"
    assert list(np.asarray(picture)[0]) == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_output_names_the_image(value):
    x = np.zeros((3, 4, 4, 3), dtype=np.float32)
    x[1, 2, 3, 0] = value
    with pytest.raises(OutputError, match=r"image 2 of 3: 1 of 48 values") as caught:
        to_pil(mx.array(x))
    assert caught.value.exit_code == 7
    assert "--dtype float32" in caught.value.hint


@pytest.mark.parametrize("shape", [(4, 4, 3), (1, 4, 4, 4), (1, 4, 4, 2)])
def test_arrays_that_are_no_images_are_refused(shape):
    with pytest.raises(UsageError, match="expected shape"):
        to_pil(mx.zeros(shape))


@pytest.mark.parametrize("picture", [Image.new("RGB", (8, 8), (1, 2, 3)), Image.new("L", (8, 8), 0)])
def test_blank_output_names_the_image(picture):
    with pytest.raises(OutputError, match="image 2 of 2: is blank") as caught:
        check_output([noisy(mode=picture.mode), picture])
    assert caught.value.hint


def test_output_with_one_odd_pixel_or_one_pixel_is_not_blank():
    nearly = Image.new("RGB", (8, 8), (9, 9, 9))
    nearly.putpixel((3, 3), (9, 10, 9))
    check_output([nearly, Image.new("RGB", (1, 1)), noisy()])


# --- pictures => arrays


def as_array(image, **kwargs):
    return np.array(from_pil(image, **kwargs))[0]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (2, 2), 51), (51, 51, 51)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 255)), (0, 0, 0)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("RGB", (2, 2), (10, 20, 30)).quantize(4), (10, 20, 30)),
        (Image.fromarray(np.full((2, 2), 257 * 77, np.uint16)), (77, 77, 77)),
        (Image.fromarray(np.full((2, 2), 65535, np.int32)), (255, 255, 255)),
        (Image.new("YCbCr", (2, 2), (128, 128, 128)), (128, 128, 128)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(image, expected):
    array = as_array(image)
    assert array.shape == (2, 2, 3)
    np.testing.assert_allclose((array + 1) * 127.5, np.broadcast_to(expected, (2, 2, 3)), atol=1e-4)


def test_a_palette_with_transparency_shows_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "p.png", transparency=0)
    assert as_array(open_image(tmp_path / "p.png")).tolist() == [[[1, 1, 1], [-1, -1, 1]]]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("F", (2, 2), 0.5),
        Image.fromarray(np.full((2, 2), 70_000, np.int32)),
        Image.fromarray(np.full((2, 2), -1, np.int32)),
        Image.new("LAB", (2, 2)),
    ],
    ids=["float", "beyond 16 bits", "negative", "lab"],
)
def test_pixels_without_a_known_range_are_refused(image):
    with pytest.raises(ModelError):
        from_pil(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    """The EXIF standard numbers the corners where row 0 and column 0 of the stored pixels are seen."""
    upright = np.asarray(noisy(5, 3))
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.swapaxes(0, 1),  # left, top
        6: upright[:, ::-1].swapaxes(0, 1),  # right, top
        7: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: upright[::-1].swapaxes(0, 1),  # left, bottom
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    picture.save(tmp_path / "x.png", exif=exif)
    expected = upright / np.float32(127.5) - 1
    with Image.open(tmp_path / "x.png") as raw:
        np.testing.assert_array_equal(as_array(raw), expected.astype(np.float32))
    np.testing.assert_array_equal(as_array(open_image(tmp_path / "x.png")), expected.astype(np.float32))


def test_size_is_width_and_height():
    assert from_pil(noisy(10, 20), size=(7, 5)).shape == (1, 5, 7, 3)
    assert np.array_equal(as_array(noisy(10, 20), size=(10, 20)), as_array(noisy(10, 20)))
    with pytest.raises(UsageError, match="at least 1"):
        from_pil(noisy(), size=(0, 5))


# --- reading files


def test_opened_pictures_keep_pixels_only(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    noisy().save(tmp_path / "x.jpg", exif=exif, comment="secret", icc_profile=profile)
    picture = open_image(tmp_path / "x.jpg")
    assert picture.info == {}
    save_image(picture, tmp_path / "y.jpg")
    content = (tmp_path / "y.jpg").read_bytes()
    assert b"secret" not in content
    assert b"home" not in content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no image of a known format"),
        (b"hello", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
        (bare_png(60_000, 2_000), "64 million pixels"),
        (bare_png(2**31 - 1, 2**31 - 1), "64 million pixels"),
        (bare_png(64, 64), "truncated or corrupt"),
    ],
    ids=["empty", "text", "postscript", "bomb", "huge bomb", "too few pixels"],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        open_image(path)
    assert caught.value.what == str(path)


@pytest.mark.parametrize("format", images.FORMATS)
def test_truncated_files_are_refused_at_any_length(tmp_path, format):
    data = encode_image(noisy(40, 40), format)
    path = tmp_path / "x"
    for length in range(0, len(data) - 16, len(data) // 40):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            open_image(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(ModelError, match="file is missing"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ModelError, match="cannot be read"):
        open_image(tmp_path)


# --- contact sheets


def test_a_sheet_holds_every_picture_in_its_cell():
    pictures = [noisy(6, 4, seed=seed) for seed in range(5)]
    sheet = contact_sheet(pictures, padding=2)
    assert sheet.size == (3 * 8 + 2, 2 * 6 + 2)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, 3)
        left, top = 2 + column * 8, 2 + row * 6
        assert np.array_equal(np.asarray(sheet.crop((left, top, left + 6, top + 4))), np.asarray(picture))
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
    assert sheet.crop((18, 8, 26, 14)).getextrema() == ((255, 255),) * 3


def test_a_sheet_centres_smaller_pictures_and_keeps_grey():
    sheet = contact_sheet([Image.new("L", (6, 6), 0), Image.new("L", (2, 4), 0)], columns=9, padding=0)
    assert (sheet.mode, sheet.size) == ("L", (12, 6))
    expected = np.full((6, 6), 255)
    expected[1:5, 2:4] = 0
    assert np.array_equal(np.asarray(sheet)[:, 6:], expected)
    assert contact_sheet([Image.new("L", (1, 1)), noisy()], columns=1).mode == "RGB"


@pytest.mark.parametrize("kwargs", [{"images": []}, {"columns": 0}, {"padding": -1}])
def test_sheets_that_cannot_be_are_refused(kwargs):
    with pytest.raises(UsageError, match="contact sheet"):
        contact_sheet(**{"images": [noisy()], **kwargs})


# --- writing files


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("x.png", None, "png"),
        ("x.JPG", None, "jpeg"),
        ("x.jpeg", "jpeg", "jpeg"),
        ("x.webp", None, "webp"),
        ("x", "webp", "webp"),
        ("cat_0.5", "png", "png"),
    ],
)
def test_format_comes_from_argument_or_extension(name, format, expected):
    assert image_format(name, format) == expected


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("x.png", "jpeg", "the extension says png"),
        ("x.gif", None, "names no image format"),
        ("x", None, "names no image format"),
        ("x.png", "tiff", "format 'tiff'"),
    ],
)
def test_formats_that_do_not_fit_are_refused(tmp_path, name, format, message):
    with pytest.raises(UsageError, match=message):
        save_image(noisy(), tmp_path / name, format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["x.png", "x.webp"])
def test_png_and_webp_are_exact(tmp_path, name, mode):
    picture = noisy(33, 21, mode)
    assert save_image(picture, tmp_path / name) == tmp_path / name
    assert np.array_equal(np.asarray(open_image(tmp_path / name).convert(mode)), np.asarray(picture))


def test_jpeg_keeps_full_colour_resolution(tmp_path):
    save_image(noisy(32, 32), tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as picture:
        assert [component[1:3] for component in picture.layer] == [(1, 1)] * 3
        assert picture.quantization[0][0] <= 2


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_is_heeded(format):
    picture = noisy(64, 64)
    small, large = (len(encode_image(picture, format, quality=quality)) for quality in (10, 90))
    assert small < large / 2


@pytest.mark.parametrize(
    ("format", "image", "kwargs", "message"),
    [
        ("png", noisy(), {"quality": 90}, "lossless"),
        ("jpeg", noisy(), {"quality": 0}, "1 to 100"),
        ("webp", noisy(), {"quality": 101}, "1 to 100"),
        ("webp", Image.new("L", (16_384, 1)), {}, "16383 pixels a side"),
        ("jpeg", Image.new("L", (1, 65_501)), {}, "65500 pixels a side"),
        ("jpeg", Image.new("RGBA", (2, 2)), {}, "mode RGBA"),
    ],
)
def test_what_a_format_cannot_do_is_refused(format, image, kwargs, message):
    with pytest.raises(UsageError, match=message):
        encode_image(image, format, **kwargs)


@pytest.mark.parametrize("format", images.FORMATS)
def test_equal_inputs_give_equal_bytes_and_one_encode(format, monkeypatch):
    recipe = metadata.new_recipe({"prompt": "a cat 🐈", "seed": 3})
    encodes = []
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda *args, **kwargs: (encodes.append(1), save(*args, **kwargs)))
    first, second = (encode_image(noisy(), format, recipe=recipe, parameters="a cat 🐈\nSteps: 4") for _ in range(2))
    assert first == second
    assert len(encodes) == 2
    plain = encode_image(noisy(), format)
    decoded = [np.asarray(Image.open(io.BytesIO(data))) for data in (first, plain)]
    assert np.array_equal(*decoded)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_image(noisy(seed=1), path)
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_cm.storage.os.fsync", full_disk)
    for overwrite in (True, False):
        with pytest.raises(DiskError, match="no space left"):
            save_image(noisy(seed=2), path, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.png"]
    assert path.read_bytes() == before


def test_a_file_or_folder_in_the_way_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DiskError):
        save_image(noisy(), tmp_path / "file" / "x.png")
    with pytest.raises(DiskError):
        save_image(noisy(), tmp_path / "file" / "x.png", overwrite=False)
    with pytest.raises(DiskError):
        save_image(noisy(), tmp_path / "folder.png")


@pytest.fixture(params=[None, errno.EPERM, errno.ENOTSUP], ids=["links", "Linux's FAT", "macOS's exFAT"])
def linking(request, monkeypatch):
    """A file system, and those that cannot give a file two names."""

    def refuse(*_):
        raise OSError(request.param, "no links here")

    if request.param:
        monkeypatch.setattr("mlx_cm.storage.os.link", refuse)


def test_the_next_free_name_counts_up(tmp_path, linking):
    path, taken = tmp_path / "x.y.png", tmp_path / "x.y_1.png"
    assert save_image(noisy(seed=1), path, overwrite=False) == path
    taken.symlink_to("nowhere")
    (tmp_path / "x.y_2.png").mkdir()
    before = path.read_bytes()
    last = save_image(noisy(seed=2), path, overwrite=False)
    assert last == tmp_path / "x.y_3.png"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, taken.name, "x.y_2.png", last.name}
    assert (path.read_bytes(), taken.is_symlink()) == (before, True)
    assert np.array_equal(np.asarray(open_image(last)), np.asarray(noisy(seed=2)))


# Without links, what comes right after an empty file has taken the name leaves that: `storage._take_name`.
@pytest.mark.parametrize(
    ("linking", "failure"),
    [*((None, failure) for failure in FAILURES), (errno.EPERM, "disk full"), (errno.EPERM, "interrupted before")],
    indirect=["linking"],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_failure_at_any_point_leaves_a_whole_picture_or_none(tmp_path, linking, overwrite, failure):
    path, (error, late) = tmp_path / "new" / "x.png", FAILURES[failure]

    def attempt(at: int) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, at, error, late)
            save_image(noisy(), path, overwrite=overwrite)
        return failing.done

    steps = attempt(-1)
    assert {"mkdir", "open", "write", "fsync"} < set(steps)
    whole = path.read_bytes()
    for at, name in enumerate(steps):
        shutil.rmtree(path.parent, ignore_errors=True)
        with pytest.raises(DiskError if isinstance(error, OSError) else KeyboardInterrupt):
            attempt(at)
        is_named = ("replace" if "replace" in steps else "link") in steps[: at + late]
        assert [entry.read_bytes() for entry in path.parent.glob("*")] == [whole] * is_named, (at, name)


def test_a_name_appears_with_the_whole_picture(tmp_path, monkeypatch):
    """So that a kill while it is flushed, which takes longest, leaves no other file in its place."""
    seen, flush = [], os.fsync

    def watched(descriptor):
        seen.append({entry.suffix for entry in tmp_path.iterdir()})
        flush(descriptor)

    monkeypatch.setattr("mlx_cm.storage.os.fsync", watched)
    save_image(noisy(), tmp_path / "x.png", overwrite=False)
    assert seen[0] == {".partial"}


def test_savers_at_once_take_different_names(tmp_path, linking):
    path, written, lock = tmp_path / "new" / "x.png", [], threading.Lock()

    def work(seed):
        result = save_image(noisy(seed=seed), path, overwrite=False)
        with lock:
            written.append((seed, result))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {result for _, result in written} == set(path.parent.iterdir())
    assert len({result for _, result in written}) == 8
    for seed, result in written:
        assert np.array_equal(np.asarray(open_image(result)), np.asarray(noisy(seed=seed)))
