"""Renders Google's Noto Color Emoji into a folder of small captioned pictures: the data of the bundled emoji model.

    apt-get install fonts-noto-color-emoji    # or pass --font; the font is under the SIL Open Font License 1.1
    pip install 'mlx-cm[train]'
    python recipes/emoji/render.py emoji

Every emoji is drawn once for each of its names as it is, and some more times a little smaller and shifted, most of
those on a pastel background that the caption names. The captions are in `metadata.jsonl`, one line for each picture.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from mlx_cm.errors import MlxCmError, ModelError, UsageError
from mlx_cm.storage import atomic_folder
from recipes.emoji.captions import (
    FRAMES,
    captions,
    content,
    emoji_characters,
    held_out_captions,
    on_background,
    with_article,
)

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # pixels per em of the bitmaps in the font, the only size it has
UNASSIGNED = "\U0010fffd"  # private use: drawn as the glyph for what a font lacks
CELL = 136  # side of the square that holds a glyph, pixels
MARGIN = 4  # around it, in the same pixels

WHITE = (255, 255, 255)
TINTS = {
    "light blue": (198, 224, 250),
    "light green": (205, 240, 205),
    "light yellow": (253, 246, 190),
    "pink": (252, 210, 224),
    "lavender": (224, 212, 247),
    "peach": (254, 220, 190),
    "light grey": (222, 222, 222),
    "turquoise": (186, 236, 230),
}
SMALLEST = 0.9  # scale of an augmented picture
SHIFT = 3 / 64  # of an augmented picture to either side, as a part of its side
TINTED = 0.75  # part of the augmented pictures that have a background


@dataclass(frozen=True)
class Placement:
    """How a glyph lies in a picture."""

    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)  # right and down, as a part of the side
    background: tuple[int, int, int] = WHITE


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Opens a font of bitmaps in colour.

    Raises:
        ModelError: there is none, or it has no bitmaps of `FONT_SIZE`.
    """
    try:
        return ImageFont.truetype(str(path), FONT_SIZE)
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error}); is fonts-noto-color-emoji installed?") from None


def draw_glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """Draws an emoji on a transparent square with its visible part in the middle.

    Returns:
        RGBA, `CELL` pixels wide and high; None where nothing is drawn, or more than one glyph: fonts lay the parts of
        a sequence that they do not know side by side.
    """
    canvas = Image.new("RGBA", (3 * CELL, 3 * CELL))
    ImageDraw.Draw(canvas).text((CELL, CELL), text, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None or max(font.getlength(text), box[2] - box[0], box[3] - box[1]) > CELL:
        return None
    left, top = ((box[axis] + box[axis + 2] - CELL) // 2 for axis in (0, 1))
    cell = canvas.crop((left, top, left + CELL, top + CELL))
    # What Pillow blends into nothing is multiplied by its opacity; taken for plain colours, edges would darken.
    return Image.frombytes("RGBa", cell.size, cell.tobytes()).convert("RGBA")


def draw_emoji(font: ImageFont.FreeTypeFont, characters: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
    """Draws what the font has of some emoji; of several that look the same, the first."""
    missing = draw_glyph(font, UNASSIGNED)
    seen = set() if missing is None else {_digest(missing)}
    for character in characters:
        glyph = draw_glyph(font, character)
        if glyph is not None and _digest(glyph) not in seen:
            seen.add(_digest(glyph))
            yield character, glyph


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def compose(glyph: Image.Image, size: int, placement: Placement) -> Image.Image:
    """Lays a glyph on its background and brings it to its size.

    Returns:
        RGB, `size` pixels wide and high.
    """
    side = round((CELL + 2 * MARGIN) / placement.scale)
    room = (side - CELL) // 2
    left, top = (room + int(np.clip(round(shift * side), -room, room)) for shift in placement.shift)
    canvas = Image.new("RGB", (side, side), placement.background)
    canvas.paste(glyph, (left, top), glyph)
    return canvas.resize((size, size), Image.Resampling.HAMMING)  # sharp, and no halo on a flat background


def augmented(names: Sequence[str], tints: Sequence[str], generator: np.random.Generator) -> tuple[Placement, str]:
    """Draws a placement, and the caption that says what is seen in it.

    Args:
        names: of the emoji, the main one first.
        tints: the backgrounds it may have.
    """
    scale = generator.uniform(SMALLEST, 1)
    shift = tuple(generator.uniform(-SHIFT, SHIFT, 2))
    name, frame = (choices[generator.integers(len(choices))] for choices in (names, FRAMES))
    caption = frame.format(name=name, phrase=with_article(names[0]))
    if generator.random() >= TINTED:
        return Placement(scale, shift), caption
    tint = tints[generator.integers(len(tints))]
    return Placement(scale, shift, TINTS[tint]), on_background(caption, tint)


def allowed_tints(names: Sequence[str], held_out: Set[frozenset[str]]) -> list[str]:
    """The backgrounds of an emoji, less those that a held-out caption puts it on under any of its names."""
    return [tint for tint in TINTS if not any(content(on_background(name, tint)) in held_out for name in names)]


def file_stem(character: str) -> str:
    """The code points of an emoji: `1f34e`, or `1f468-200d-1f373`."""
    return "-".join(f"{ord(part):x}" for part in character)


def render(folder: Path, font: Path, *, size: int, augment: int, seed: int, sequences: bool) -> tuple[int, int]:
    """Writes the pictures of all emoji and their `metadata.jsonl` into a folder.

    Args:
        size: width and height, pixels.
        augment: augmented pictures of each emoji beside the plain ones.
        seed: of the augmentation, which for an emoji does not depend on the others.
        sequences: whether emoji of several code points are rendered too.

    Returns:
        (emoji, pictures): how many of each.

    Raises:
        ModelError: the font cannot be read, or has no emoji.
    """
    glyphs = dict(draw_emoji(open_font(font), emoji_characters(sequences)))
    if not glyphs:
        raise ModelError(str(font), "has no emoji that can be drawn")
    held_out = {content(caption) for caption in held_out_captions()}
    lines = []
    for character, names in captions(glyphs).items():
        tints = allowed_tints(names, held_out)
        generators = [np.random.default_rng([seed, index, *map(ord, character)]) for index in range(augment)]
        pictures = [(Placement(), name) for name in names]
        pictures += [augmented(names, tints, generator) for generator in generators]
        for index, (placement, caption) in enumerate(pictures):
            name = f"{file_stem(character)}_{index}.png"
            compose(glyphs[character], size, placement).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(glyphs), len(lines)


def main() -> None:
    """Renders the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--size", type=int, default=64, help="width and height of the pictures, pixels")
    parser.add_argument("--augment", type=int, default=2, help="augmented pictures of each emoji")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentation")
    parser.add_argument("--sequences", action="store_true", help="also skin tones, families, professions and the like")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.sequences and not features.check("raqm"):
            raise UsageError("--sequences", "Pillow was built without Raqm, which joins code points into one glyph")
        with atomic_folder(arguments.out, overwrite=arguments.overwrite) as folder:
            emoji, pictures = render(
                folder,
                arguments.font,
                size=arguments.size,
                augment=arguments.augment,
                seed=arguments.seed,
                sequences=arguments.sequences,
            )
    except MlxCmError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(f"{arguments.out}: {emoji} emoji, {pictures} pictures")


if __name__ == "__main__":
    main()
