"""Trains the vocabulary of the bundled text-to-image model: CLIP's kind of tokenizer, with merges learnt from captions.

    python recipes/emoji/train_tokenizer.py emoji emoji-tokenizer

Every byte is a token, so that any text can be encoded; the captions of the data and the held-out ones decide which
bytes are joined.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from mlx_cm.errors import MlxCmError, ModelError, UsageError
from mlx_cm.storage import atomic_folder, write_json
from mlx_cm.tokenizer import END_OF_WORD, ROLES, WORDS, CLIPTokenizer
from recipes.emoji.captions import held_out_captions

METADATA = "metadata.jsonl"
MERGES_VERSION = "#version: 0.2"
BYTES = 256


def read_captions(data: Path) -> list[str]:
    """The captions of a rendered folder.

    Raises:
        ModelError: it has no `metadata.jsonl`.
    """
    path = data / METADATA
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror}); render.py writes it") from None
    return [json.loads(line)["text"] for line in lines]


def train_vocabulary(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding of CLIP's words, in the order of CLIP's vocabulary.

    Args:
        texts: what the merges are learnt from.
        size: tokens at most, special tokens included.

    Returns:
        (token => id, merges): bytes, bytes that end a word, merges, start and end.

    Raises:
        UsageError: `size` leaves no room for the bytes.
    """
    specials = [ROLES["bos_token"], ROLES["eos_token"]]
    least = 2 * BYTES + len(specials)
    if size < least:
        raise UsageError("--vocab-size", f"expected at least {least}, the bytes and special tokens, got {size}")
    tokenizer = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [byte + END_OF_WORD for byte in alphabet]
    trainer = BpeTrainer(
        vocab_size=size - len(specials),
        special_tokens=ends,  # numbered in this order; as they come up, they would make merges of equal rank random
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *ends, *map("".join, merges), *specials])
    return {token: id for id, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], length: int) -> None:
    """Writes the files that CLIP's tokenizer is published as."""
    write_json(folder / "vocab.json", vocabulary)
    lines = [MERGES_VERSION, *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    roles = {role: token for role, token in ROLES.items() if token is not None}
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "add_prefix_space": False, **roles},
    )


def main() -> None:
    """Trains and writes the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder that render.py wrote")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens at most")
    parser.add_argument("--length", type=int, default=24, help="tokens of a row, start and end included")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    try:
        texts = [*read_captions(arguments.data), *held_out_captions()]
        with atomic_folder(arguments.out, overwrite=arguments.overwrite) as folder:
            write_tokenizer(folder, *train_vocabulary(texts, arguments.vocab_size), arguments.length)
            tokenizer = CLIPTokenizer.from_folder(folder)
            longest = max(texts, key=tokenizer.count)
            if tokenizer.count(longest) > arguments.length:
                raise UsageError("--length", f"{longest!r} takes {tokenizer.count(longest)} tokens")
    except MlxCmError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(f"{arguments.out}: {tokenizer.vocab_size} tokens; at most {tokenizer.count(longest)} in {longest!r}")


if __name__ == "__main__":
    main()
