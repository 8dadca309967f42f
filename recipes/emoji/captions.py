"""What the emoji are called, as a person would type it, and which captions are kept from training.

The main caption of an emoji is its short name in Unicode's common locale data (CLDR): "red apple". Further ones are an
everyday word where the short name is none, its name in the Unicode standard and the shortcodes of chat programs, as
far as they are words and say nothing that the picture contradicts.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import emoji

SKIN_TONE = re.compile(r" (\S+ skin tone)")
VARIATION_SELECTOR = "\ufe0f"  # asks for the coloured form of a character that also has a plain one
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # pairs of them spell a country's flag
TAGS = range(0xE0020, 0xE0080)  # spell the flag of a part of a country
LETTERLIKE = frozenset("©®™")  # characters of running text

# emoji without variation selectors => its short name (`en`) and shortcodes (`alias`)
ENTRIES: Mapping[str, Mapping] = {
    text.replace(VARIATION_SELECTOR, ""): entry
    for text, entry in emoji.EMOJI_DATA.items()
    if entry["status"] == emoji.STATUS["fully_qualified"]
}

# emoji => a word that neither its short name nor its shortcodes have
EVERYDAY = {
    "⚡": "lightning bolt",
    "✈": "plane",
    "🌍": "planet earth",
    "🌕": "moon",
    "🌧": "rain",
    "🌨": "snow",
    "🌳": "tree",
    "🌼": "flower",
    "🍔": "burger",
    "🍜": "noodles",
    "🍦": "ice cream cone",
    "🍩": "donut",
    "🍲": "soup",
    "🎁": "present",
    "🎃": "pumpkin",
    "🏍": "motorbike",
    "🐇": "bunny",
    "🐚": "seashell",
    "🐞": "ladybug",
    "🐱": "kitten",
    "🐶": "puppy",
    "👟": "sneaker",
    "📺": "tv set",
    "🔒": "padlock",
    "🕒": "clock",
    "🚒": "fire truck",
    "🛸": "ufo",
    "🤠": "cowboy",
    "🤡": "clown",
    "🥗": "salad",
    "🥩": "steak",
    "🦖": "dinosaur",
    "🧙": "wizard",
    "🧜": "mermaid",
}

# Words that the names of the Unicode standard use for shapes of type and positions, not for what is seen: its "heavy
# black heart" is red. A name with one of them is kept only if the short name has it too.
TYPOGRAPHIC = frozenset(
    {"black", "white", "heavy", "negative", "squared", "circled", "ideograph", "katakana", "latin", "lower"}
)
# Shortcodes that are rude, name something else than what is seen, or are no words.
REFUSED = frozenset(
    {"bangbang", "city sunrise", "feet", "flags", "flipper", "fu", "hankey", "harambe", "heartpulse", "hocho", "koko"}
    | {"mag", "mag right", "metal", "shit", "stars", "tada"}
    | {"up-pointing small red triangle", "down-pointing small red triangle"}
)
MAX_WORDS = 8  # of further captions; longer ones describe another font's drawing
MAX_CAPTIONS = 4

# Captions of augmented pictures: any name alone, or the main one in a phrase.
FRAMES = ("{name}", "{phrase}", "picture of {phrase}", "emoji of {phrase}")
FRAMING = frozenset({"a", "an", "the", "of", "picture", "emoji"})  # words that do not change what is seen

PLURALS = frozenset({"children", "feet", "men", "people", "teeth", "women"})
SINGULAR_ENDINGS = ("ss", "us", "is", "oceros")  # a dress, a cactus, tennis; other words in -s are plurals
AFTER_NOUN = re.compile(r" (?:with|without|of|in|on|at|for|from|holding|lifting|showing)\b")
# Sounds that the first letter does not tell: "an hourglass", "an x-ray"; "a unicorn", "a one-piece", "a ewe".
AN = re.compile(r"(?!one\b|uni|us|eu|ew)[aeiou]|hour|x-")

HELD_OUT = Path(__file__).parent / "held_out.txt"


def emoji_characters(sequences: bool = False) -> list[str]:
    """The emoji of the standard without variation selectors: single code points first, then longer and longer ones.

    Skin tones and hair by themselves, flags of countries, and characters of running text are no emoji here.

    Args:
        sequences: whether to list also what takes several code points: skin tones, families, professions, keycaps.
    """
    wanted = (text for text in ENTRIES if _is_wanted(text) and (sequences or len(text) == 1))
    return sorted(wanted, key=lambda text: (len(text), text))


def _is_wanted(text: str) -> bool:
    is_flag = any(ord(character) in REGIONAL_INDICATORS or ord(character) in TAGS for character in text)
    return not is_flag and text not in LETTERLIKE


def normalise(name: str) -> str:
    """A name as it is typed: `:man’s_shoe:` => `man's shoe`, `:ear_dark_skin_tone:` => `ear with dark skin tone`."""
    name = unicodedata.normalize("NFC", name).lower().replace("’", "'").replace("_", " ")
    name = " ".join(re.sub("[“”:,()]", "", name).split())
    return SKIN_TONE.sub(r" with \1", name, count=1)


def captions(characters: Iterable[str]) -> dict[str, list[str]]:
    """The captions of each emoji, the main one first; no caption belongs to two of them.

    Returns:
        emoji => 1 to `MAX_CAPTIONS` captions.
    """
    names = {character: _names(character) for character in characters}
    owners: dict[str, str] = {}
    for rank in range(max(map(len, names.values()), default=0)):
        for character, ranked in names.items():
            for name in ranked[rank : rank + 1]:
                owners.setdefault(name, character)
    return {
        character: _distinct(name for name in ranked if owners[name] == character)
        for character, ranked in names.items()
    }


def _names(character: str) -> list[str]:
    """What an emoji may be called, the best name first."""
    entry = ENTRIES[character]
    main = normalise(entry["en"])
    standard = [unicodedata.name(character, "")] if len(character) == 1 else []
    further = [normalise(name) for name in [*standard, *entry.get("alias", [])]]
    everyday = [EVERYDAY[character]] if character in EVERYDAY else []
    return [main, *everyday, *(name for name in further if _agrees(name, main))]


def _agrees(name: str, main: str) -> bool:
    """Whether a name consists of words, and of none that the main name would have if they were true."""
    words = re.findall(r"[a-z]+", name)
    is_words = max(map(len, words), default=0) > 2 and not re.search(r"\d", name) and name not in REFUSED
    return is_words and len(words) <= MAX_WORDS and not TYPOGRAPHIC & set(words) - set(re.findall(r"[a-z]+", main))


def _distinct(names: Iterable[str]) -> list[str]:
    """The first few names that differ in more than hyphens and apostrophes."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(re.sub(r"[-' ]", "", name), name)
    return list(found.values())[:MAX_CAPTIONS]


def with_article(name: str) -> str:
    """A name as a noun phrase: "an apple", and "grapes" as they are."""
    noun = AFTER_NOUN.split(name)[0].split()[-1]
    if noun in PLURALS or (noun.endswith("s") and not noun.endswith(SINGULAR_ENDINGS)):
        return name
    return f"{'an' if AN.match(name) else 'a'} {name}"


def on_background(caption: str, tint: str) -> str:
    """The caption of a picture that is not on white."""
    return f"{caption} on {with_article(tint)} background"


def content(caption: str) -> frozenset[str]:
    """The words of a caption that tell what is seen; "a red apple" and "emoji of a red apple" have the same."""
    return frozenset(caption.split()) - FRAMING


def held_out_captions() -> list[str]:
    """Captions to judge a trained model by, none of which it was trained on in any frame.

    They say in other words what the data has, give things other colours, put emoji on backgrounds that they never
    had, and combine things that never were together; in this order.
    """
    return HELD_OUT.read_text(encoding="utf-8").splitlines()
