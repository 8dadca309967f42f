"""A CLIP tokenizer to test with: a byte-level BPE in CLIP's format, trained on Python's own library."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 3000
WORLD = [
    "Ein schöner großer Bär läuft über die Straße, déjà vu à la crème brûlée, niño pequeño en el jardín",
    "Красивая девушка с жемчужной серёжкой, зимний лес на закате, высокое качество",
    "美しい夕焼けの風景、最高品質、傑作 猫が寝ている 一只可爱的小猫坐在窗台上 서울의 야경 고양이",
    "קטע עברית עם ניקוד שָׁלוֹם مرحبا بالعالم صورة جميلة हिन्दी में नमस्ते ภาษาไทย สวัสดี",
    "masterpiece, best quality, 8k, ultra-detailed, don't, it's, they're, I'd, she'll, I'm !!! ... ((())) 😀🎨🐈‍⬛",
] * 8


def corpus() -> list[str]:
    """Some sources of the standard library, always the same ones of an interpreter, and lines of other scripts."""
    library = Path(json.__file__).parent.parent
    names = ("argparse", "ast", "decimal", "inspect", "os", "subprocess", "typing", "turtle", "shutil", "tarfile")
    texts = [(library / f"{name}.py").read_text(encoding="utf-8", errors="ignore") for name in names]
    return [*texts, *WORLD]


def train() -> tuple[dict[str, int], list[list[str]]]:
    """(vocabulary, merges) laid out like CLIP's: bytes, bytes that end a word, merges, start, end."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda character: (ord(character) > 255, character))
    trainer = BpeTrainer(
        vocab_size=512 + MERGES, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    merges = [list(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *map("".join, merges), START, END]
    return {token: id for id, token in enumerate(dict.fromkeys(tokens))}, merges


def write_vocabulary(folder: Path) -> Path:
    """Writes `vocab.json` and `merges.txt`."""
    vocabulary, merges = train()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
