"""The data of the emoji model: names, pictures drawn with a small colour font, held-out captions, vocabulary."""

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import emoji
import numpy as np
import pytest
import transformers
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, features

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.tokenizer import CLIPTokenizer
from mlx_cm.training.data import open_data
from recipes.emoji import render, train_tokenizer
from recipes.emoji.captions import (
    EVERYDAY,
    FRAMES,
    MAX_CAPTIONS,
    REFUSED,
    captions,
    content,
    emoji_characters,
    held_out_captions,
    normalise,
    on_background,
    with_article,
)

RENDER, TRAIN = (Path(module.__file__) for module in (render, train_tokenizer))
NAMES = captions(emoji_characters())
ALL_NAMES = captions(emoji_characters(sequences=True))
HELD_OUT = {content(caption) for caption in held_out_captions()}

# The glyphs of the test's font: colour and box (left, bottom, right, top) in units, of which an em has 1000.
RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
GLYPHS = {
    ".notdef": (GREY, (100, 0, 700, 700)),
    "\U0001f34e": (RED, (0, 0, 1000, 800)),  # red apple
    "\U0001f49a": (GREEN, (500, 400, 900, 800)),  # green heart, in a corner of its cell
    "\U0001f6d1": (RED, (0, 0, 1000, 800)),  # stop sign, which looks like the apple
    "\U0001f468": (BLUE, (200, 0, 600, 800)),  # man
    "\U0001f4bb": (BLUE, (0, 0, 900, 500)),  # laptop
    "☁": (GREY, None),  # cloud, of which nothing is seen
}
DRAWN = {"\U0001f34e", "\U0001f49a", "\U0001f468", "\U0001f4bb"}
MAN_WITH_LAPTOP = "\U0001f468\u200d\U0001f4bb"


def outline(box: tuple[int, int, int, int] | None):
    """A rectangle as a TrueType glyph."""
    pen = TTGlyphPen(None)
    if box is not None:
        left, bottom, right, top = box
        pen.moveTo((left, bottom))
        for point in ((left, top), (right, top), (right, bottom)):
            pen.lineTo(point)
        pen.closePath()
    return pen.glyph()


@pytest.fixture(scope="module")
def font(tmp_path_factory) -> Path:
    """A font of rectangles in colour."""
    names = [".notdef", *(f"u{ord(character):X}" for character in list(GLYPHS)[1:])]
    layers = {name: f"{name}.layer" for name in names}
    palette = sorted({colour for colour, _ in GLYPHS.values()})
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([*names, *layers.values()])
    builder.setupCharacterMap(dict(zip(map(ord, list(GLYPHS)[1:]), names[1:], strict=True)))
    glyphs = {name: outline(box) for name, (_, box) in zip(names, GLYPHS.values(), strict=True)}
    builder.setupGlyf(glyphs | {layers[name]: glyph for name, glyph in glyphs.items()})
    builder.setupHorizontalMetrics(dict.fromkeys(builder.font.getGlyphOrder(), (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Rectangles", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.setupCPAL([[(*(part / 255 for part in colour), 1.0) for colour in palette]])
    colours = [palette.index(colour) for colour, _ in GLYPHS.values()]
    builder.setupCOLR({name: [(layers[name], colour)] for name, colour in zip(names, colours, strict=True)})
    path = tmp_path_factory.mktemp("font") / "rectangles.ttf"
    builder.save(path)
    return path


def lines_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def run_main(module, monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a recipe's command."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    try:
        module.main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


# --- names


@pytest.mark.parametrize(
    ("character", "expected"),
    [
        ("🍎", ["red apple", "apple"]),
        ("🐈", ["cat"]),
        ("🐱", ["cat face", "kitten"]),  # its shortcode `cat` is the name of another
        ("🍕", ["pizza", "slice of pizza"]),
        ("❤", ["red heart", "heart"]),  # the standard says "heavy black heart"
        ("🔼", ["upwards button", "arrow up small"]),  # the standard's triangle is red, the button's is not
        ("🚗", ["automobile", "car", "red car"]),
        ("🥇", ["1st place medal", "first place medal"]),
        ("👞", ["man's shoe", "shoe"]),
        ("🌕", ["full moon", "moon", "full moon symbol"]),
        ("🪅", ["piñata", "pinata"]),
    ],
)
def test_names(character, expected):
    assert NAMES[character] == expected


@pytest.mark.parametrize("names", [NAMES, ALL_NAMES], ids=["single", "sequences"])
def test_each_emoji_has_names_of_its_own(names):
    everything = [name for own in names.values() for name in own]
    assert not [name for name, count in Counter(everything).items() if count > 1]
    assert all(1 <= len(own) <= MAX_CAPTIONS for own in names.values())
    assert not [name for name in everything if name != name.lower() or re.search(r"[:_“”’(),]|\s\s|^\s|\s$", name)]
    assert not REFUSED & set(everything)
    assert not {"shit", "fu"} & {word for name in everything for word in name.split()}
    for character, own in names.items():
        short_name = emoji.demojize(character, delimiters=("", "")).replace("_", " ").lower().replace("’", "'")
        assert [part for part in re.findall(r"[\w!-]+", short_name) if part not in own[0]] == []


def test_which_characters_are_emoji():
    singles, all_of_them = set(emoji_characters()), set(emoji_characters(sequences=True))
    assert len(singles) == len(NAMES) > 1300
    assert all(len(character) == 1 and unicodedata.category(character) != "Sk" for character in singles)
    assert not singles & set("©®™#*0123456789\U0001f3fb\U0001f9b0")
    assert singles < all_of_them
    assert {MAN_WITH_LAPTOP, "\U0001f44b\U0001f3ff"} <= all_of_them
    assert not [text for text in all_of_them if {"\U0001f1e9", "\U000e007f", "\ufe0f"} & set(text)]


def test_everyday_names_are_needed_and_given():
    for character, name in EVERYDAY.items():
        assert NAMES[character][1] == name
        assert name not in {normalise(alias) for alias in emoji.EMOJI_DATA[character].get("alias", [])}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (":red_apple:", "red apple"),
        (":man’s_shoe:", "man's shoe"),
        ("A_button_(blood_type)", "a button blood type"),
        ("Mrs._Claus", "mrs. claus"),
        ("PIN\u0303ATA", "piñata"),
        (":ear_medium-dark_skin_tone:", "ear with medium-dark skin tone"),
        (":kiss_dark_skin_tone_light_skin_tone:", "kiss with dark skin tone light skin tone"),
    ],
)
def test_names_as_they_are_typed(name, expected):
    assert normalise(name) == expected


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("apple", "an apple"),
        ("red apple", "a red apple"),
        ("unicorn", "a unicorn"),
        ("euro banknote", "a euro banknote"),
        ("ewe", "a ewe"),
        ("one o'clock", "a one o'clock"),
        ("onion", "an onion"),
        ("umbrella", "an umbrella"),
        ("hourglass done", "an hourglass done"),
        ("horse", "a horse"),
        ("x-ray", "an x-ray"),
        ("grapes", "grapes"),
        ("cactus", "a cactus"),
        ("dress", "a dress"),
        ("rhinoceros", "a rhinoceros"),
        ("men holding hands", "men holding hands"),
        ("smiling face with sunglasses", "a smiling face with sunglasses"),
        ("busts in silhouette", "busts in silhouette"),
        ("open hands with dark skin tone", "open hands with dark skin tone"),
        ("skull and crossbones", "skull and crossbones"),
    ],
)
def test_articles(name, phrase):
    assert with_article(name) == phrase


# --- held-out captions


def test_held_out_captions_are_many_and_distinct():
    lines = held_out_captions()
    assert len(lines) == len(HELD_OUT) == 60
    assert all(line == normalise(line) for line in lines)


@pytest.mark.parametrize("names", [NAMES, ALL_NAMES], ids=["single", "sequences"])
def test_no_held_out_caption_is_ever_trained_on(names):
    """Whatever the seed: of all captions that can be drawn, none says what a held-out one says."""
    for own in names.values():
        tints = render.allowed_tints(own, HELD_OUT)
        framed = [frame.format(name=name, phrase=with_article(own[0])) for frame in FRAMES for name in own]
        drawn = [*framed, *(on_background(caption, tint) for caption in framed for tint in tints)]
        assert not [caption for caption in drawn if content(caption) in HELD_OUT]


def test_a_held_out_background_is_withheld_under_every_name():
    assert set(render.TINTS) - set(render.allowed_tints(NAMES["🍎"], HELD_OUT)) == {"light blue"}
    assert set(render.TINTS) - set(render.allowed_tints(NAMES["💚"], HELD_OUT)) == {"pink"}
    assert render.allowed_tints(NAMES["🍏"], HELD_OUT) == list(render.TINTS)
    withheld = [own for own in NAMES.values() if render.allowed_tints(own, HELD_OUT) != list(render.TINTS)]
    assert len(withheld) == sum("background" in caption for caption in held_out_captions())


# --- drawing


def test_what_the_font_has_is_drawn_once(font):
    """Neither what it lacks, nor what is blank, nor a second emoji that looks the same."""
    drawn = dict(render.draw_emoji(render.open_font(font), [*emoji_characters(), MAN_WITH_LAPTOP]))
    assert set(drawn) == DRAWN
    for character, glyph in drawn.items():
        colour, (left, bottom, right, top) = GLYPHS[character]
        pixels = np.asarray(glyph)
        assert pixels.shape == (render.CELL, render.CELL, 4)
        visible = pixels[..., 3] > 127
        assert (pixels[visible][:, :3] == colour).all()
        height, width = np.ptp(np.nonzero(visible), axis=1) + 1
        expected = np.array([right - left, top - bottom]) * render.FONT_SIZE / 1000
        assert (width, height) == pytest.approx(expected, abs=1.5)
        assert np.mean(np.nonzero(visible), axis=1) == pytest.approx([(render.CELL - 1) / 2] * 2, abs=1)


def test_a_glyph_larger_than_its_cell_is_refused(font):
    large = render.ImageFont.truetype(str(font), 2 * render.FONT_SIZE)
    assert render.draw_glyph(large, "\U0001f34e") is None


def extent(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last (row, column) that a red glyph covers by half or more."""
    rows, columns = np.nonzero(picture[..., 1] < 128)
    return np.array([rows.min(), columns.min()]), np.array([rows.max(), columns.max()])


FULL = Image.new("RGBA", (render.CELL, render.CELL), (*RED, 255))


@pytest.mark.parametrize("size", [64, 97, 128])
def test_a_plain_picture_is_centred_on_white(size):
    picture = np.asarray(render.compose(FULL, size, render.Placement()))
    assert picture.shape == (size, size, 3)
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert (picture[size // 2, size // 2] == RED).all()
    assert (picture == picture[::-1]).all()
    assert (picture == picture[:, ::-1]).all()
    first, last = extent(picture)
    assert last - first + 1 == pytest.approx([size * render.CELL / (render.CELL + 2 * render.MARGIN)] * 2, abs=1)


def test_half_transparent_pixels_take_the_background():
    glyph = Image.new("RGBA", (render.CELL, render.CELL), (*RED, 128))
    picture = np.asarray(render.compose(glyph, 64, render.Placement(background=(0, 100, 200))))
    assert picture[32, 32] == pytest.approx([128, 50, 100], abs=1)
    assert (picture[0, 0] == (0, 100, 200)).all()


def test_augmented_pictures_show_the_whole_emoji_where_it_was_placed():
    generator = np.random.default_rng(0)
    for _ in range(100):
        placement, _ = render.augmented(["red apple"], list(render.TINTS), generator)
        first, last = extent(np.asarray(render.compose(FULL, 64, placement)))
        side = (render.CELL + 2 * render.MARGIN) / placement.scale
        room = (side - render.CELL) / 2 * 64 / side
        assert last - first + 1 == pytest.approx([64 * render.CELL / side] * 2, abs=1.5)
        shift = np.clip(np.array(placement.shift[::-1]) * 64, -room, room)
        assert (first + last) / 2 - 31.5 == pytest.approx(shift, abs=1)


def test_augmented_captions_say_what_is_seen():
    names, tints = ["red apple", "apple"], list(render.TINTS)[:5]
    generator = np.random.default_rng(1)
    draws = [render.augmented(names, tints, generator) for _ in range(2000)]
    backgrounds = Counter()
    for placement, caption in draws:
        assert render.SMALLEST <= placement.scale <= 1
        assert max(map(abs, placement.shift)) <= render.SHIFT
        seen, _, tint = caption.removesuffix(" background").partition(" on a ")
        assert seen in {"red apple", "apple", "a red apple", "picture of a red apple", "emoji of a red apple"}
        assert placement.background == (render.TINTS[tint] if tint else render.WHITE)
        assert caption.endswith("background") == bool(tint)
        backgrounds[tint] += 1
    assert set(backgrounds) == {"", *tints}
    assert 1 - backgrounds[""] / len(draws) == pytest.approx(render.TINTED, abs=0.05)
    assert min(backgrounds.values()) > 0.8 * len(draws) * render.TINTED / len(tints)
    assert len(set(render.TINTS.values()) | {render.WHITE}) == len(render.TINTS) + 1


# --- the folder


def folder_of(tmp_path: Path, font: Path, **settings) -> dict[str, bytes]:
    """What `render` writes: file name => content."""
    tmp_path.mkdir()
    render.render(tmp_path, font, **{"size": 32, "augment": 3, "seed": 0, "sequences": False} | settings)
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_script_writes_pictures_and_captions(font, tmp_path):
    out = tmp_path / "emoji"
    command = [sys.executable, RENDER, out, "--font", font, "--size", "48", "--augment", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    texts = {line["file_name"]: line["text"] for line in lines_of(out)}
    assert len(texts) == len(lines_of(out))  # a line for each picture
    assert {path.name for path in out.iterdir()} == {*texts, "metadata.jsonl"}
    expected = set()
    for character, own in captions(DRAWN).items():
        stem = f"{ord(character):x}"
        assert [texts[f"{stem}_{index}.png"] for index in range(len(own))] == own
        assert len({(out / f"{stem}_{index}.png").read_bytes() for index in range(len(own))}) == 1
        for index in range(len(own), len(own) + 2):
            assert any(name in texts[f"{stem}_{index}.png"] for name in own)
        expected |= {f"{stem}_{index}.png" for index in range(len(own) + 2)}
    assert set(texts) == expected
    assert done.stdout.strip() == f"{out}: 4 emoji, {len(texts)} pictures"
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((48, 48), "RGB")


def test_training_reads_the_folder(font, tmp_path):
    folder_of(tmp_path / "emoji", font)
    data = open_data(tmp_path / "emoji")
    assert sorted(data.captions) == sorted(line["text"] for line in lines_of(tmp_path / "emoji"))
    assert not data.skipped


def test_the_folder_is_a_function_of_the_seed(font, tmp_path):
    first = folder_of(tmp_path / "a", font)
    assert folder_of(tmp_path / "b", font) == first
    other = folder_of(tmp_path / "c", font, seed=1)
    plain = {
        f"{ord(character):x}_{index}.png" for character, own in captions(DRAWN).items() for index in range(len(own))
    }
    assert {name for name in first if other[name] == first[name]} == plain
    fewer = folder_of(tmp_path / "d", font, augment=1)
    assert len(fewer) == 1 + len(plain) + len(DRAWN)
    assert all(first[name] == picture for name, picture in fewer.items() if name != "metadata.jsonl")


def test_sequences_that_the_font_does_not_join_are_left_out(font, tmp_path):
    assert set(folder_of(tmp_path / "a", font, sequences=True)) == set(folder_of(tmp_path / "b", font))


def test_file_names_are_code_points():
    assert render.file_stem(MAN_WITH_LAPTOP) == "1f468-200d-1f4bb"


def test_fonts_that_do_not_serve_are_refused(font, tmp_path, monkeypatch, capsys):
    out = tmp_path / "emoji"
    code, _, errors = run_main(render, monkeypatch, capsys, out, "--font", tmp_path / "missing.ttf")
    assert code == ModelError.exit_code
    assert "missing.ttf" in errors
    assert "fonts-noto-color-emoji" in errors
    cut = tmp_path / "cut.ttf"
    cut.write_bytes(font.read_bytes()[:200])
    for unusable in (cut, Path(features.__file__)):
        code, _, errors = run_main(render, monkeypatch, capsys, out, "--font", unusable)
        assert code == ModelError.exit_code
        assert str(unusable) in errors
    with monkeypatch.context() as patch:
        patch.setattr(render, "emoji_characters", lambda sequences: ["☁", "\U0001f355"])  # blank, and missing
        code, _, errors = run_main(render, monkeypatch, capsys, out, "--font", font)
    assert code == ModelError.exit_code
    assert "no emoji" in errors
    assert list(tmp_path.iterdir()) == [cut]


def test_sequences_need_a_layout_engine(font, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "check", lambda name: name != "raqm")
    code, _, errors = run_main(render, monkeypatch, capsys, tmp_path / "emoji", "--font", font, "--sequences")
    assert code == UsageError.exit_code
    assert "Raqm" in errors
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_on_request_only(font, tmp_path, monkeypatch, capsys):
    out = tmp_path / "emoji"
    out.mkdir()
    (out / "mine").touch()
    assert run_main(render, monkeypatch, capsys, out, "--font", font)[0] != 0
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert run_main(render, monkeypatch, capsys, out, "--font", font, "--overwrite")[0] == 0
    assert len(lines_of(out)) > 0
    assert not (out / "mine").exists()


# --- the vocabulary

CAPTIONS = [name for own in NAMES.values() for name in own]
CAPTIONS += [on_background(with_article(own[0]), tint) for own in list(NAMES.values())[::9] for tint in render.TINTS]
OTHER_TEXTS = [
    "",
    "An  APPLE\tthat's   Red!!",
    "Ein schöner großer Bär, déjà vu; 美しい夕焼け 🍦 שלום \u0301",
    "a<|endoftext|>b <|startoftext|>",
    "7 1234 x2 t-shirt o'clock we're",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder as render.py writes it, without its pictures."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False) for caption in CAPTIONS]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "trained"
    subprocess.run([sys.executable, TRAIN, data, out], capture_output=True, text=True, check=True)
    return out


def ids_of_transformers(folder: Path, texts: list[str]) -> list[list[int]]:
    oracle = transformers.CLIPTokenizer.from_pretrained(folder)
    return oracle(texts, padding="max_length", truncation=True)["input_ids"]


def test_the_tokenizer_gives_the_ids_of_transformers(tokenizer_folder):
    tokenizer = CLIPTokenizer.from_folder(tokenizer_folder)
    texts = [*CAPTIONS, *held_out_captions(), *OTHER_TEXTS]
    assert tokenizer.encode(texts, truncate=True).tolist() == ids_of_transformers(tokenizer_folder, texts)


def test_every_caption_fits(tokenizer_folder):
    tokenizer = CLIPTokenizer.from_folder(tokenizer_folder)
    assert tokenizer.model_max_length == 24
    assert max(map(tokenizer.count, [*CAPTIONS, *held_out_captions()])) <= tokenizer.model_max_length


def test_common_words_are_single_tokens(tokenizer_folder):
    tokenizer = CLIPTokenizer.from_folder(tokenizer_folder)
    texts = [token.text for token in tokenizer.tokens("a grinning face with a red heart on a light blue background")]
    assert texts == ["a", "grinning", "face", "with", "a", "red", "heart", "on", "a", "light", "blue", "background"]


def test_the_vocabulary_is_laid_out_like_clips(tokenizer_folder):
    vocabulary = json.loads((tokenizer_folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = list(vocabulary)
    assert list(vocabulary.values()) == list(range(len(tokens)))
    assert len(tokens) == 2048
    assert all(len(token) == 1 for token in tokens[:256])
    assert tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[:2] + tokens[-2:] == ["!", '"', "<|startoftext|>", "<|endoftext|>"]
    version, *merges = (tokenizer_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert version.startswith("#version")
    assert [merge.replace(" ", "") for merge in merges] == tokens[512:-2]


@pytest.mark.parametrize("size", [514, 515, 777])
def test_smaller_vocabularies_encode_any_text_too(size, tmp_path):
    vocabulary, merges = train_tokenizer.train_vocabulary(CAPTIONS, size)
    assert len(vocabulary) == size
    assert len(merges) == size - 514
    train_tokenizer.write_tokenizer(tmp_path, vocabulary, merges, 300)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    texts = [*CAPTIONS[::20], *OTHER_TEXTS]
    assert tokenizer.encode(texts).tolist() == ids_of_transformers(tmp_path, texts)
    (ids,) = tokenizer.encode(["snow"]).tolist()
    assert size > 514 or [list(vocabulary)[id] for id in ids[1:5]] == ["s", "n", "o", "w</w>"]


def test_training_a_vocabulary_twice_gives_the_same(data, tokenizer_folder, tmp_path, monkeypatch, capsys):
    again = tmp_path / "again"
    code, output, _ = run_main(train_tokenizer, monkeypatch, capsys, data, again)
    assert code == 0
    assert "2048 tokens" in output
    for path in tokenizer_folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--vocab-size", "513"], UsageError.exit_code, "514"),
        (["--length", "8"], UsageError.exit_code, "tokens"),
    ],
)
def test_a_vocabulary_that_does_not_serve_is_refused(data, tmp_path, monkeypatch, capsys, options, code, message):
    result, _, errors = run_main(train_tokenizer, monkeypatch, capsys, data, tmp_path / "out", *options)
    assert result == code
    assert options[0] in errors
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_data_without_captions_is_refused(tmp_path, monkeypatch, capsys):
    code, _, errors = run_main(train_tokenizer, monkeypatch, capsys, tmp_path, tmp_path / "out")
    assert code == ModelError.exit_code
    assert "metadata.jsonl" in errors
    assert not list(tmp_path.iterdir())
