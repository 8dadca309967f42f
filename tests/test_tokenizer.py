"""The CLIP tokenizer against transformers': the same ids, whatever the text and however its files say it."""

import json
import random
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import transformers
from clip_vocabulary import END, START, WORLD, corpus, write_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.tokenizer import CLIPTokenizer


def flagged(content: str, **flags: bool) -> dict:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | flags


def typed(content: str) -> dict:
    return {"__type": "AddedToken"} | flagged(content)


SD15_CONFIG = {
    "add_prefix_space": False,
    "bos_token": typed(START),
    "do_lower_case": True,
    "eos_token": typed(END),
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": END,
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": typed(END),
}
SD15_MAP = {"bos_token": flagged(START), "eos_token": flagged(END), "pad_token": END, "unk_token": flagged(END)}
DECODER = {
    "0": flagged("!", normalized=False, special=True),
    "{start}": flagged(START, special=True),
    "{end}": flagged(END, special=False),
}
# Files beside the vocabulary; {start}, {end}, {new}, {new+1} stand for ids.
FOLDERS = {
    "bare": {"tokenizer_config.json": {"model_max_length": 77}},
    "SD 1.5": {"tokenizer_config.json": SD15_CONFIG, "special_tokens_map.json": SD15_MAP},
    "SD 2.1": {
        "tokenizer_config.json": SD15_CONFIG | {"pad_token": END},
        "special_tokens_map.json": SD15_MAP | {"pad_token": "!"},
    },
    "SDXL, second": {
        "tokenizer_config.json": SD15_CONFIG | {"pad_token": "!"},
        "special_tokens_map.json": SD15_MAP | {"pad_token": "!"},
    },
    "padding said as an object": {
        "tokenizer_config.json": SD15_CONFIG,
        "special_tokens_map.json": SD15_MAP | {"pad_token": flagged("!", lstrip=True, normalized=False)},
    },
    "padding said without flags, beyond the vocabulary": {
        "tokenizer_config.json": SD15_CONFIG,
        "special_tokens_map.json": SD15_MAP | {"pad_token": {"content": "PAD"}},
    },
    "the list of added tokens wins over the map": {
        "tokenizer_config.json": SD15_CONFIG | {"pad_token": "!", "added_tokens_decoder": DECODER},
        "special_tokens_map.json": SD15_MAP | {"pad_token": "?"},
    },
    "learned words in a file": {
        "tokenizer_config.json": SD15_CONFIG,
        "special_tokens_map.json": SD15_MAP,
        "added_tokens.json": {"<cat-toy>": "{new}", "Midjourney-Style": "{new+1}"},
    },
    "learned words in the config": {
        "tokenizer_config.json": SD15_CONFIG
        | {"added_tokens_decoder": DECODER | {"{new}": flagged("<cat-toy>"), "{new+1}": flagged("s1*", special=True)}},
    },
    "special tokens without a role": {
        "tokenizer_config.json": SD15_CONFIG | {"additional_special_tokens": ["<cat-toy>", "<b>"]},
    },
    "shorter": {"tokenizer_config.json": SD15_CONFIG | {"model_max_length": 12}},
}

STRINGS = [
    "",
    " ",
    "\t\n\r \u00a0\u2003\u3000",
    "a photo of an astronaut riding a horse on mars",
    "A PHOTO of An AstroNAUT, ÀÉÎÕÜ İstanbul ẞ ǅ ΣΑΣ",
    "I don't; you're, we've: it's. I'd she'll I'm 'tis rock'n'roll 'S 'T DON'T o'clock ''s",
    "don’t it’s “quoted” „so“ «and» ‚so‘",
    "!",
    "!!!",
    "hello!",
    "hello ! world!?",
    "wow!!!1 #hashtag @someone $5.00 50% a&b a+b=c ~ ` ^ | \\ / <tag> {x} [y] (z:1.2)",
    "... ..... ,,,, ;;; --- ___ *** ((())) [[[]]] -- – — …",
    "0 12 345 6789 1,000.50 1e-5 ½ Ⅷ ² ٣٤٥ 三",
    "&amp; &lt;b&gt; &#39; &nbsp; &eacute;",
    f"{START}",
    f"a {END} b",
    f"{START}a cat{END}{END}",
    "<|ENDOFTEXT|> <|StartOfText|> <| endoftext |>",
    "PAD pad Pad xPADx",
    "<cat-toy> on the <CAT-TOY> like x<cat-toy>y midjourney-style Midjourney-Style s1* <b>",
    "e\u0301 é n\u0303 a\u0308\u0301 Å Å ﬁ ① ㎏ ｆｕｌｌ ｗｉｄｔｈ",
    "Z̷̢̛͓a̴͉l̸g̵o̶ t̷e̵x̶t̴",
    "😀 🐈‍⬛ 👨‍👩‍👧‍👦 🏳️‍🌈 ✌🏽 ❤️ ☺ 🇫🇷 1️⃣",
    "美しい夕焼け、最高品質。一只可爱的猫坐在窗台上！고양이 ㄱㄴ ｶﾀｶﾅ",
    "שָׁלוֹם مرحبا بالعالم ‮reversed‬ हिन्दी नमस्ते ภาษาไทย தமிழ்",
    "zero\u200bwidth\u200cjoin\u200ders \ufeffbom soft\u00adhyphen word\u2060joiner",
    "nul\x00bell\x07esc\x1b[0m del\x7f c1\x85\x9b form\x0cfeed vertical\x0btab",
    "line\u2028separator paragraph\u2029separator",
    "private \ue000 unassigned \u0378 plane16 \U0010fffd nonchar \ufffe replacement \ufffd",
    "a" * 300,
    "cat " * 200,
    "😀" * 100,
    "é" * 150,
    ", ".join(["masterpiece"] * 60),
]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ABC",
    "abc123 ,.!?'\"-()[]<>|&;:#@\t\n",
    "".join(WORLD),
    "\u0301\u0308\u200d\u200b\ufe0f\u00a0 aeé😀👩ßİſK'’",
    f"{START}{END} !",
]


def random_strings(count: int) -> list[str]:
    """Words of the corpus in any order, random characters of a few alphabets, and any code points at all."""
    generator = random.Random(7)
    words = sorted(set(re.findall(r"\S+", " ".join(corpus()))))
    makers = [lambda: " ".join(generator.choices(words, k=generator.randrange(1, 40)))]
    makers += [
        lambda alphabet=alphabet: "".join(generator.choices(alphabet, k=generator.randrange(1, 60)))
        for alphabet in ALPHABETS
    ]
    makers += [
        lambda: "".join(
            chr(code)
            for code in (generator.randrange(generator.choice([256, 0x3000, 0x10000, 0x110000])) for _ in range(20))
            if not 0xD800 <= code < 0xE000
        )
    ]
    return [makers[index % len(makers)]() for index in range(count)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("clip") / "tokenizer")


def make_folder(vocabulary: Path, target: Path, files: dict[str, dict]) -> Path:
    shutil.copytree(vocabulary, target)
    ids = json.loads((vocabulary / "vocab.json").read_text())
    known = {"{start}": ids[START], "{end}": ids[END], "{new}": len(ids), "{new+1}": len(ids) + 1}
    for name, values in files.items():
        text = json.dumps(values)
        for placeholder, id in known.items():
            text = re.sub(rf'"{re.escape(placeholder)}"(?=:)', f'"{id}"', text)  # as a key it stays a string
            text = text.replace(f'"{placeholder}"', str(id))
        (target / name).write_text(text, encoding="utf-8")
    return target


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, vocabulary, tmp_path_factory) -> Path:
    return make_folder(vocabulary, tmp_path_factory.mktemp("tokenizers") / "tokenizer", FOLDERS[request.param])


@pytest.fixture(scope="module")
def sd15(vocabulary, tmp_path_factory) -> Path:
    return make_folder(vocabulary, tmp_path_factory.mktemp("sd15") / "tokenizer", FOLDERS["SD 1.5"])


def reference_ids(reference, prompts: list[str]) -> np.ndarray:
    """As diffusers calls it."""
    length = reference.model_max_length
    return np.array(reference(prompts, padding="max_length", max_length=length, truncation=True).input_ids)


def assert_same_ids(ours: CLIPTokenizer, reference, prompts: list[str]):
    rows, expected = np.array(ours.encode(prompts, truncate=True)), reference_ids(reference, prompts)
    assert rows.shape == expected.shape == (len(prompts), ours.model_max_length)
    different = [prompt for prompt, row, other in zip(prompts, rows, expected, strict=True) if (row != other).any()]
    assert not different, f"{len(different)} differ, {different[0]!r} among them"


def test_ids_are_those_of_transformers(folder):
    ours, reference = CLIPTokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    assert ours.model_max_length == reference.model_max_length
    assert ours.vocab_size == len(reference)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, role) == getattr(reference, role)
    assert_same_ids(ours, reference, STRINGS + random_strings(700))


def test_ids_of_thousands_of_strings(sd15):
    ours, reference = CLIPTokenizer.from_folder(sd15), transformers.CLIPTokenizer.from_pretrained(sd15)
    assert_same_ids(ours, reference, random_strings(6000))


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL, second", "learned words in a file"])
def test_a_tokenizer_saved_again_as_one_file_has_the_same_ids(name, vocabulary, tmp_path):
    reference = transformers.CLIPTokenizer.from_pretrained(make_folder(vocabulary, tmp_path / "a", FOLDERS[name]))
    reference.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").exists()
    assert not (tmp_path / "b" / "vocab.json").exists()
    ours = CLIPTokenizer.from_folder(tmp_path / "b")
    assert_same_ids(ours, reference, STRINGS)
    assert_same_ids(ours, transformers.CLIPTokenizer.from_pretrained(tmp_path / "b"), STRINGS)


def test_merges_written_as_strings_and_with_windows_line_ends(sd15, tmp_path):
    """Older tokenizer.json files write a pair as one string; a checkout may have changed the line ends."""
    expected = CLIPTokenizer.from_folder(sd15).encode(STRINGS, truncate=True)
    merges = (sd15 / "merges.txt").read_text(encoding="utf-8").split("\n")
    windows = shutil.copytree(sd15, tmp_path / "windows")
    (windows / "merges.txt").write_bytes("\r\n".join(merges).encode())
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": json.loads((sd15 / "vocab.json").read_text())}
    single = shutil.copytree(sd15, tmp_path / "single", ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    (single / "tokenizer.json").write_text(json.dumps({"model": model | {"merges": merges[1:-1]}}), encoding="utf-8")
    for place in (windows, single):
        assert mx.array_equal(CLIPTokenizer.from_folder(place).encode(STRINGS, truncate=True), expected)


@pytest.fixture(scope="module")
def tokenizers(sd15) -> tuple[CLIPTokenizer, transformers.CLIPTokenizer]:
    return CLIPTokenizer.from_folder(sd15), transformers.CLIPTokenizer.from_pretrained(sd15)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=120))
def test_any_text_has_the_ids_of_transformers(tokenizers, text):
    ours, reference = tokenizers
    assert_same_ids(ours, reference, [text])
    assert ours.count(text) == len(reference(text).input_ids)


def test_rows(tokenizers):
    tokenizer, _ = tokenizers
    rows = tokenizer(["", "if return"])
    assert rows.dtype == mx.int32
    assert rows.shape == (2, 77)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert rows[0].tolist() == [start] + [end] * 76
    words = [token.id for token in tokenizer.tokens("if return")]
    assert len(words) == 2
    assert rows[1, :5].tolist() == [start, *words, end, end]
    assert tokenizer([]).shape[0] == 0
    assert tokenizer.count("if return") == 4


def test_tokens_name_their_part_of_the_prompt(tokenizers):
    tokenizer, _ = tokenizers
    tokens = tokenizer.tokens("The  Return,\u3000IF\n8🐧")
    assert [token.text for token in tokens[:5]] == ["The", "Return", ",", "IF", "8"]
    assert {token.text for token in tokens[5:]} == {"🐧"}
    assert len(tokens) > 6  # bytes of one character


def test_padding_with_an_exclamation_mark_starts_behind_the_end(vocabulary, tmp_path):
    tokenizer = CLIPTokenizer.from_folder(make_folder(vocabulary, tmp_path / "t", FOLDERS["SD 2.1"]))
    row = tokenizer(["return"])[0].tolist()
    assert tokenizer.tokens("return!")[-1].id == 0  # a special token in the prompt too, as in transformers
    assert tokenizer.pad_token_id == 0
    assert row[2:] == [tokenizer.eos_token_id] + [0] * 74


@pytest.mark.parametrize(("words", "excess"), [(75, 0), (76, 1), (100, 25)])
def test_long_prompts_are_refused_or_truncated(tokenizers, words, excess):
    tokenizer, _ = tokenizers
    prompt = "if " * (words - 1) + "return"
    assert tokenizer.count(prompt) == words + 2
    if not excess:
        assert tokenizer([prompt])[0, -2:].tolist() == [tokenizer.tokens("return")[0].id, tokenizer.eos_token_id]
        return
    with pytest.raises(UsageError) as error:
        tokenizer(["fine", prompt])
    first = "return" if excess == 1 else "if"
    assert f"{excess} token{'s' * (excess > 1)} too long, it has {words} and" in str(error.value)
    assert f"takes 75: '{first}' after 'if if if if' does not fit" in str(error.value)
    assert tokenizer.encode([prompt], truncate=True)[0, -1].item() == tokenizer.eos_token_id


def test_bytes_that_are_no_text_are_refused(tokenizers):
    with pytest.raises(UsageError, match="prompt: contains bytes that are not valid UTF-8"):
        tokenizers[0](["caf\udce9"])  # how Python passes on an argument in another encoding


def test_one_string_is_not_a_list_of_prompts(tokenizers):
    with pytest.raises(TypeError, match="list of prompts"):
        tokenizers[0]("a cat")


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def changed(name: str, **values):
    def change(folder: Path):
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(old | values), encoding="utf-8")

    return change


MALFORMED = {
    "no vocabulary": (lambda folder: (folder / "vocab.json").unlink(), "vocab.json: file is missing"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "merges.txt: file is missing"),
    "merges of another vocabulary": (written("merges.txt", "#version: 0.2\nqqq zzz\n"), "`qqq` out of vocabulary"),
    "merges are no pairs": (written("merges.txt", "#version: 0.2\na b\na b c\n"), "line 3: expected two tokens"),
    "merges are a web page": (
        written("merges.txt", "<!DOCTYPE html>\n<p>\n"),
        "line 2: expected two tokens, got '<p>'",
    ),
    "merges are bytes": (lambda folder: (folder / "merges.txt").write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
    "merges are a folder": (
        lambda folder: ((folder / "merges.txt").unlink(), (folder / "merges.txt").mkdir()),
        "merges.txt: cannot be read",
    ),
    "vocabulary is a list": (written("vocab.json", "[]"), "vocab.json: expected a JSON object"),
    "vocabulary is a pointer": (
        written("vocab.json", "version https://git-lfs.github.com/spec/v1\n"),
        "is a git-lfs pointer",
    ),
    "an id is text": (changed("vocab.json", a="1"), "token 'a' has the id '1'"),
    "an id is negative": (changed("vocab.json", a=-1), "token 'a' has the id -1"),
    "an id is taken": (changed("vocab.json", qqq=5), "two tokens of the vocabulary have the same id"),
    "another class": (changed("tokenizer_config.json", tokenizer_class="T5Tokenizer"), "got 'T5Tokenizer'"),
    "length is text": (changed("tokenizer_config.json", model_max_length="77"), "is not a CLIP tokenizer"),
    "length is too small": (changed("tokenizer_config.json", model_max_length=2), "expected at least 3, got 2"),
    "a role is a number": (changed("tokenizer_config.json", unk_token=3), "is not a CLIP tokenizer"),
    "a role without content": (changed("special_tokens_map.json", eos_token={}), "is not a CLIP tokenizer"),
    "an added token far away": (written("added_tokens.json", '{"<x>": 99999}'), "has id 99999"),
    "an added token in the way": (written("added_tokens.json", '{"<x>": 4}'), "has id 4"),
    "one file, no model": (written("tokenizer.json", "{}"), "tokenizer.json: expected a BPE model"),
    "one file, another model": (written("tokenizer.json", '{"model": {"type": "Unigram"}}'), "expected a BPE model"),
    "one file, GPT's": (
        written("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        "end_of_word_suffix: expected '</w>', got None",
    ),
    "one file, no merges": (
        written("tokenizer.json", '{"model": {"end_of_word_suffix": "</w>", "vocab": {}}}'),
        "is not a CLIP tokenizer ('merges')",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case, sd15, tmp_path):
    spoil, message = MALFORMED[case]
    broken = shutil.copytree(sd15, tmp_path / "tokenizer")
    spoil(broken)
    with pytest.raises(ModelError) as error:
        CLIPTokenizer.from_folder(broken)
    assert message in str(error.value)
    assert "tokenizer" in error.value.what
