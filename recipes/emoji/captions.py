"""What the emoji are called: names from Unicode and its common locale data (CLDR), as a person would type them.

A picture has one main caption, its CLDR short name ("red apple"), and further ones: the name in the Unicode standard
and the shortcodes of chat programs, as far as they are words and say nothing that the picture contradicts.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping

import emoji

VARIATION_SELECTOR = "\ufe0f"  # asks for the coloured form of a character that also has a plain one
JOINER = "\u200d"
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)  # pairs of them spell a country's flag
TAGS = range(0xE0020, 0xE0080)  # spell the flag of a part of a country
LETTERLIKE = frozenset("©®™")  # characters of running text

# Words that the names of the Unicode standard use for shapes of type, not for what is seen: its "heavy black heart"
# is red. A name with one of them is kept only if the CLDR name has it too.
TYPOGRAPHIC = frozenset(
    {"black", "white", "red", "heavy", "negative", "squared", "circled", "ideograph", "katakana", "latin"}
)
RUDE = frozenset({"fu", "middle finger", "reversed hand with middle finger extended", "shit"})
MAX_WORDS = 8  # of further captions; longer ones describe the drawing of a font that may not be this one
MAX_CAPTIONS = 4

# emoji without variation selectors => its names
ENTRIES: Mapping[str, Mapping] = {
    text.replace(VARIATION_SELECTOR, ""): entry
    for text, entry in emoji.EMOJI_DATA.items()
    if entry["status"] == emoji.STATUS["fully_qualified"]
}


def emoji_characters(sequences: bool = False) -> list[str]:
    """The emoji of the standard, in the order of their code points and without variation selectors.

    Skin tone swatches and hair alone, national flags, and characters of running text are no emoji here.

    Args:
        sequences: whether to list also what takes several code points: skin tones, families, professions, keycaps.
    """
    return sorted(text for text in ENTRIES if _is_wanted(text) and (sequences or len(text) == 1))


def _is_wanted(text: str) -> bool:
    is_flag = any(ord(character) in REGIONAL_INDICATORS or ord(character) in TAGS for character in text)
    return not is_flag and text not in LETTERLIKE


def normalise(name: str) -> str:
    """A name as it is typed: `:man’s_shoe:` => `man's shoe`."""
    name = unicodedata.normalize("NFC", name).lower().replace("’", "'").translate(dict.fromkeys(map(ord, "“”:,()")))
    return " ".join(name.replace("_", " ").split())


def captions(characters: Iterable[str]) -> dict[str, list[str]]:
    """The captions of each emoji, the main one first; no caption belongs to two of them.

    Returns:
        emoji => captions, 1 to `MAX_CAPTIONS` of them.
    """
    characters = list(characters)
    main = {character: normalise(ENTRIES[character]["en"]) for character in characters}
    owners = {name: character for character, name in main.items()}
    further = {character: _further_names(character, main[character]) for character in characters}
    for character, names in further.items():
        for name in names:
            owners.setdefault(name, character)
    return {
        character: _distinct([main[character], *(name for name in further[character] if owners[name] == character)])
        for character in characters
    }


def _further_names(character: str, main: str) -> list[str]:
    """The standard's name and the shortcodes that are words and agree with the main name."""
    standard = [unicodedata.name(character, "")] if len(character) == 1 else []
    names = [normalise(name) for name in [*standard, *ENTRIES[character].get("alias", [])]]
    return [name for name in names if _agrees(name, main)]


def _agrees(name: str, main: str) -> bool:
    words = re.findall(r"[a-z]+", name)
    is_words = bool(words) and max(map(len, words)) > 2 and not re.search(r"\d", name) and name not in RUDE
    return is_words and len(words) <= MAX_WORDS and not TYPOGRAPHIC & set(words) - set(re.findall(r"[a-z]+", main))


def _distinct(names: Iterable[str]) -> list[str]:
    """The first few names that differ in more than hyphens and apostrophes."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(re.sub(r"[-' ]", "", name), name)
    return list(found.values())[:MAX_CAPTIONS]


def with_article(name: str) -> str:
    """A name as a noun phrase: "an apple", and "grapes" as they are."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
