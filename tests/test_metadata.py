import json
import random
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_cm import __version__, metadata
from mlx_cm.errors import DiskError, ModelError, UsageError
from mlx_cm.images import FORMATS, encode_image, save_image
from mlx_cm.metadata import format_parameters, new_recipe, read_parameters, read_recipe, write_sidecar

SETTINGS = {
    "prompt": "a cat 🐈 in the rain, שלום\nsecond line \u202e\x00 end",
    "negative_prompt": "blur, noise",
    "steps": 4,
    "times": [999, 499.5],
    "sampler": "lcm",
    "guidance_scale": 8.5,
    "seed": 2**64 - 1,
    "width": 512,
    "height": 768,
    "model": "lcm: dreamshaper, v7",
    "model_sha256": "0123456789abcdef" * 4,
    "loras": [{"name": "pixel", "scale": 0.8, "sha256": "ab" * 32}],
    "tiled": False,
    "image": None,
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8))

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


# --- round trips


@pytest.mark.parametrize("format", FORMATS)
def test_recipe_and_parameters_come_back(tmp_path, format):
    recipe = new_recipe(SETTINGS)
    parameters = format_parameters(recipe)
    path = save_image(PICTURE, tmp_path / "x", format=format, recipe=recipe, parameters=parameters)
    assert read_recipe(path) == recipe
    assert list(read_recipe(path)) == list(recipe)
    assert read_parameters(path) == parameters


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(value=PLAIN, text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60))
def test_any_plain_value_and_text_comes_back(tmp_path_factory, format, value, text):
    path = tmp_path_factory.getbasetemp() / f"plain.{format}"
    recipe = new_recipe({"value": value})
    save_image(PICTURE, path, recipe=recipe, parameters=text)
    assert read_recipe(path) == recipe
    assert read_parameters(path) == text


def test_a_sidecar_comes_back_and_is_readable(tmp_path):
    recipe = new_recipe(SETTINGS)
    write_sidecar(recipe, tmp_path / "x.JSON")
    assert read_recipe(tmp_path / "x.JSON") == recipe
    assert "🐈" in (tmp_path / "x.JSON").read_text(encoding="utf-8")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        write_sidecar(recipe, tmp_path / "file" / "x.json")


def test_png_chunks_are_the_ones_promised():
    recipe = new_recipe({"prompt": "plain"})
    chunks = png_chunks(encode_image(PICTURE, "png", recipe=recipe, parameters="plain\nSteps: 4"))
    kinds = [kind for kind, _ in chunks]
    assert kinds == [b"IHDR", b"iTXt", b"tEXt", b"IDAT", b"IEND"]
    assert dict(chunks)[b"tEXt"] == b"parameters\0plain\nSteps: 4"
    keyword, rest = dict(chunks)[b"iTXt"].split(b"\0", 1)
    assert keyword == b"mlx-cm"
    assert json.loads(rest.split(b"\0", 4)[-1]) == recipe


def test_jpeg_comment_has_the_layout_of_the_web_ui(tmp_path):
    path = save_image(PICTURE, tmp_path / "x.jpg", parameters="kö 🐈")
    with Image.open(path) as image:
        assert image.getexif().get_ifd(0x8769)[0x9286] == b"UNICODE\0" + "kö 🐈".encode("utf-16-be")


def test_a_picture_without_metadata_carries_none():
    assert [kind for kind, _ in png_chunks(encode_image(PICTURE, "png"))] == [b"IHDR", b"IDAT", b"IEND"]
    for format in ("jpeg", "webp"):
        assert b"Exif" not in encode_image(PICTURE, format)
        assert b"EXIF" not in encode_image(PICTURE, format)


def png_chunks(data):
    position, chunks = 8, []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    return chunks


def join_chunks(chunks):
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_text_behind_the_pixels_is_found(tmp_path):
    recipe = new_recipe({"seed": 5})
    chunks = png_chunks(encode_image(PICTURE, "png", recipe=recipe, parameters="text"))
    header, recipe_chunk, text_chunk, pixels, end = chunks
    (tmp_path / "x.png").write_bytes(join_chunks([header, pixels, text_chunk, recipe_chunk, end]))
    assert read_recipe(tmp_path / "x.png") == recipe
    assert read_parameters(tmp_path / "x.png") == "text"


# --- the parameters text


def test_parameters_follow_the_web_uis_layout():
    assert format_parameters(new_recipe(SETTINGS | {"prompt": "a cat", "strength": 0.5, "rng": "torch"})) == (
        "a cat\n"
        "Negative prompt: blur, noise\n"
        "Steps: 4, Sampler: LCM, CFG scale: 8.5, Seed: 18446744073709551615, Size: 512x768, Model hash: 0123456789, "
        'Model: "lcm: dreamshaper, v7", Denoising strength: 0.5, RNG: CPU, '
        f"Version: mlx-cm {__version__}"
    )


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"label": 207, "steps": 1}, "class 207\nSteps: 1"),
        ({"label": 0, "steps": 2, "sampler": "onestep"}, "class 0\nSteps: 2, Sampler: onestep"),
        ({"steps": 1, "rng": "mlx", "label": None}, "Steps: 1"),
        ({"prompt": "", "negative_prompt": "", "seed": 0}, "Seed: 0"),
        ({}, ""),
    ],
)
def test_parameters_of_pixel_models(recipe, expected):
    assert format_parameters(recipe) == expected


def test_the_web_ui_reads_the_values_back():
    """The grammar by which the web UI takes such a line apart."""
    setting = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    recipe = new_recipe(SETTINGS | {"model": 'we"ird, na:me\n\\ü'})
    last = format_parameters(recipe).split("\n")[-1]
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in setting.findall(last)}
    assert values["Model"] == recipe["model"]
    assert values["Size"] == "512x768"
    assert float(values["CFG scale"]) == 8.5
    assert values["Version"] == f"mlx-cm {__version__}"


def test_parameters_of_a_recipe_with_odd_types_are_text():
    assert format_parameters({"prompt": 5, "sampler": ["a"], "model_sha256": 12, "rng": {}, "width": "a"})


# --- what is not written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": float("nan")}, "recipe.x is nan"),
        ({"x": [1, {"y": float("inf")}]}, r"recipe.x.1.y is inf"),
        ({"x": np.float32(1)}, "recipe.x is a float32"),
        ({"x": np.zeros(2)}, "recipe.x is a ndarray"),
        ({"x": {1: 2}}, "has the key 1"),
        ({"x": b"bytes"}, "recipe.x is a bytes"),
        ({"x": "\udcff"}, "not valid Unicode"),
        ({"\udcff": 1}, "has the key"),
        ({"x": "a" * (1 << 20)}, "at most 1048576"),
    ],
)
def test_values_that_would_not_come_back_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        new_recipe(settings)


def test_nesting_is_limited():
    value = 0
    for _ in range(metadata.MAX_DEPTH - 2):
        value = [value]
    new_recipe({"x": value})
    with pytest.raises(UsageError, match="nested deeper than 32"):
        new_recipe({"x": [value]})
    endless = []
    endless.append(endless)
    with pytest.raises(UsageError, match="nested deeper than 32"):
        new_recipe({"x": endless})


def test_the_header_is_ours():
    recipe = new_recipe({"program": "other", "schema": 9, "version": "0.0.1", "seed": 1})
    assert recipe == {"program": "mlx-cm", "schema": 1, "version": __version__, "seed": 1}


@pytest.mark.parametrize("recipe", [{}, {"program": "mlx-cm"}, {"program": "mlx-cm", "schema": True}])
def test_a_recipe_without_header_is_not_written(tmp_path, recipe):
    with pytest.raises(UsageError, match="recipe"):
        save_image(PICTURE, tmp_path / "x.png", recipe=recipe)
    with pytest.raises(UsageError, match="recipe"):
        write_sidecar(recipe, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_unicode_is_not_written(tmp_path):
    with pytest.raises(UsageError, match="not valid Unicode"):
        save_image(PICTURE, tmp_path / "x.png", parameters="\udcff")


def test_what_a_jpeg_cannot_hold_goes_into_a_png(tmp_path):
    recipe = new_recipe({"prompt": "x" * 70_000})
    with pytest.raises(UsageError, match="a JPEG file holds 65533") as caught:
        save_image(PICTURE, tmp_path / "x.jpg", recipe=recipe)
    assert "png" in caught.value.hint
    for name in ("x.png", "x.webp"):
        assert read_recipe(save_image(PICTURE, tmp_path / name, recipe=recipe)) == recipe


# --- what is not believed


def png_with(tmp_path, text, key="mlx-cm"):
    info = PngInfo()
    info.add_itxt(key, text)
    PICTURE.save(tmp_path / "x.png", pnginfo=info)
    return tmp_path / "x.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"program": "mlx-cm"', "not valid JSON"),
        ("[1]", "carries no mlx-cm recipe"),
        ('"mlx-cm"', "carries no mlx-cm recipe"),
        ("null", "carries no mlx-cm recipe"),
        ('{"program": "other", "schema": 1}', "carries no mlx-cm recipe"),
        ('{"program": ["mlx-cm"], "schema": 1}', "carries no mlx-cm recipe"),
        ('{"program": "mlx-cm"}', "schema is None"),
        ('{"program": "mlx-cm", "schema": "1"}', "schema is '1'"),
        ('{"program": "mlx-cm", "schema": true}', "schema is True"),
        ('{"program": "mlx-cm", "schema": 1.0}', "schema is 1.0"),
        ('{"program": "mlx-cm", "schema": 0}', "schema is 0"),
        ('{"program": "mlx-cm", "schema": 2}', "update mlx-cm"),
        ('{"program": "mlx-cm", "schema": 1, "x": NaN}', "recipe.x is nan"),
        ('{"program": "mlx-cm", "schema": 1, "x": [-Infinity]}', "recipe.x.0 is -inf"),
        ('{"program": "mlx-cm", "schema": 1, "x": 1e999}', "recipe.x is inf"),
        ('{"program": "mlx-cm", "schema": 1, "x": "\\udc00"}', "not valid Unicode"),
        ('{"program": "mlx-cm", "schema": 1, "x": ' + "9" * 9000 + "}", "not valid JSON"),
        ('{"program": "mlx-cm", "schema": 1, "x": ' + "[" * 40 + "]" * 40 + "}", "nested deeper"),
        ("[" * 500_000, "not valid JSON"),
        ('{"program": "mlx-cm", "schema": 1, "x": ' + '{"a":' * 100_000, "not valid JSON"),
        ('{"program": "mlx-cm", "schema": 1, "x": "' + "a" * (1 << 20) + '"}', "too much for one"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_malformed_recipes_are_refused(tmp_path, text, message):
    path = png_with(tmp_path, text)
    with pytest.raises(ModelError, match=message) as caught:
        read_recipe(path)
    assert caught.value.what == str(path)
    assert len(str(caught.value)) < 500 + len(str(path))
    if text:
        (tmp_path / "x.json").write_text(text)
        if len(text) < metadata.MAX_RECIPE_BYTES:
            with pytest.raises(ModelError):
                read_recipe(tmp_path / "x.json")


def test_a_huge_sidecar_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(metadata.MAX_SIDECAR_BYTES + 1)
    with pytest.raises(ModelError, match="too much for a recipe"):
        read_recipe(tmp_path / "x.json")


@pytest.mark.parametrize("compressed", [b"zTXt", b"iTXt"])
def test_a_text_bomb_is_refused(tmp_path, compressed):
    packed = zlib.compress(b" " * (200 << 20), 9)
    data = b"mlx-cm\0" + (b"\0" if compressed == b"zTXt" else b"\1\0\0\0") + packed
    header, *rest = png_chunks(encode_image(PICTURE, "png"))
    (tmp_path / "x.png").write_bytes(join_chunks([header, (compressed, data), *rest]))
    with pytest.raises(ModelError):
        read_recipe(tmp_path / "x.png")


@pytest.mark.parametrize("format", [*FORMATS, "gif", "bmp", "tiff"])
def test_foreign_images_carry_no_recipe(tmp_path, format):
    path = tmp_path / f"x.{format}"
    exif = Image.Exif()
    exif[0x010E] = "My holiday"
    PICTURE.save(path, **({} if format in ("gif", "bmp") else {"exif": exif}))
    with pytest.raises(ModelError, match="carries no mlx-cm recipe"):
        read_recipe(path)
    with pytest.raises(ModelError, match="carries no parameters text"):
        read_parameters(path)


def test_settings_of_other_programs_are_read(tmp_path):
    assert read_parameters(png_with(tmp_path, "a dog\nSteps: 20", key="parameters")) == "a dog\nSteps: 20"
    exif = Image.Exif()
    exif[0x8769] = {0x9286: b"ASCII\0\0\0a dog\nSteps: 20"}
    exif[0x010E] = '{"prompt": "of another program"}'
    PICTURE.save(tmp_path / "x.jpg", exif=exif)
    assert read_parameters(tmp_path / "x.jpg") == "a dog\nSteps: 20"
    with pytest.raises(ModelError, match="carries no mlx-cm recipe"):
        read_recipe(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    "comment", [b"", b"UNICODE\0", b"UNICODE\0\xd8\x00\xd8\x00", b"UNICODE\0abc", b"JIS\0\0\0\0\0x", b"ASCII\0\0\0\xff"]
)
def test_broken_comments_are_no_parameters(tmp_path, comment):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    PICTURE.save(tmp_path / "x.jpg", exif=exif)
    with pytest.raises(ModelError):
        read_parameters(tmp_path / "x.jpg")


def test_missing_files_are_named(tmp_path):
    for name in ("none.png", "none.json"):
        with pytest.raises(ModelError, match="file is missing"):
            read_recipe(tmp_path / name)


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_files_raise_model_errors_or_nothing(tmp_path, format):
    recipe = new_recipe(SETTINGS)
    whole = encode_image(PICTURE, format, recipe=recipe, parameters=format_parameters(recipe))
    generator, path = random.Random(5), tmp_path / "x"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        path.write_bytes(mutated(whole, format, generator))
        for read in (read_recipe, read_parameters):
            try:
                read(path)
                outcomes["read"] += 1
            except ModelError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def mutated(whole, format, generator):
    """Flipped, cut and spliced bytes; in half the PNGs the checksums are made right again, so that chunks are read."""
    data = bytearray(whole)
    for _ in range(generator.randint(1, 4)):
        position = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                data[position] ^= 1 << generator.randrange(8)
            case 1:
                data[position] = generator.randrange(256)
            case 2:
                data[position:position] = generator.randbytes(generator.randint(1, 8))
            case 3 if generator.random() < 0.3:
                del data[position:]
                data += b"\0"
    if format == "png" and generator.random() < 0.5:
        chunks = png_chunks(whole)
        index = generator.randrange(len(chunks))
        kind, content = chunks[index]
        content = bytearray(content or b"\0")
        content[generator.randrange(len(content))] = generator.randrange(256)
        chunks[index] = kind, bytes(content)
        return join_chunks(chunks)
    return bytes(data)
