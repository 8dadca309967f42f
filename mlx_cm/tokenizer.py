"""CLIP's tokenizer: a prompt becomes the row of token ids that a text encoder was trained on."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mlx_cm.errors import ModelError, UsageError
from mlx_cm.storage import read_json

# The files a tokenizer folder can hold: the vocabulary as one file or as two, and what is said beside it.
TOKENIZER_JSON = "tokenizer.json"
VOCABULARY_FILES = ("vocab.json", "merges.txt")
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
FILES = (TOKENIZER_JSON, *VOCABULARY_FILES, CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")

MODEL_MAX_LENGTH = 77  # positions of CLIP's text encoders, for folders that do not say
UNLIMITED = 10**9  # transformers writes a huge number where nobody said
END_OF_WORD = "</w>"
# OpenAI's pattern: special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Special tokens by role, in the order they are registered; None: a role that CLIP leaves empty.
ROLES: dict[str, str | None] = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "sep_token": None,
    "pad_token": "<|endoftext|>",
    "cls_token": None,
    "mask_token": None,
}
EXTRA_ROLES = ("additional_special_tokens", "extra_special_tokens")
WORDS_SHOWN = 4  # of the part that fits, in the message about a long prompt
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Token(NamedTuple):
    """A token of a prompt."""

    id: int
    text: str  # the part of the prompt it stands for; several tokens can share a character


class CLIPTokenizer:
    """Byte-level BPE over lower-cased words; the ids are those of transformers' `CLIPTokenizer`.

    Text is brought into Unicode form NFC, runs of white space become one space, and letters become lower-case. Special
    tokens are found anywhere in a prompt, as in transformers: "<|endoftext|>", but also the "!" that SD 2.x and SDXL
    pad with.

    Args:
        vocabulary: token => id.
        merges: pairs of tokens, in the order they are merged.
        roles: special tokens that differ from `ROLES`.
        added_tokens: tokens beside the vocabulary by id, and vocabulary entries to be found as special tokens are.
        extra_tokens: special tokens without a role.
        model_max_length: length of the rows, tokens.

    Raises:
        ValueError: vocabulary, merges and tokens do not fit together.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        *,
        roles: Mapping[str, str | AddedToken] | None = None,
        added_tokens: Mapping[int, AddedToken] | None = None,
        extra_tokens: Sequence[str | AddedToken] = (),
        model_max_length: int = MODEL_MAX_LENGTH,
    ):
        if model_max_length < 3:
            raise ValueError(f"model_max_length: expected at least 3, got {model_max_length}")
        if len(set(vocabulary.values())) != len(vocabulary):
            raise ValueError("two tokens of the vocabulary have the same id")
        roles = ROLES | dict(roles or {})
        self.model_max_length = model_max_length
        self._tokenizer = _clip_backend(vocabulary, merges, _text_of(roles["unk_token"]))
        _register(self._tokenizer, roles, added_tokens or {}, extra_tokens)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self._tokenizer.token_to_id(_text_of(roles[role])) for role in ("bos_token", "eos_token", "pad_token")
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "CLIPTokenizer":
        """Reads a tokenizer folder as published.

        `special_tokens_map.json` wins over `tokenizer_config.json`, which names another padding in SD 2.1, unless the
        latter lists its added tokens with their ids, as newer files do.

        Raises:
            ModelError: a file is missing or malformed, or the folder holds another kind of tokenizer.
        """
        folder = Path(folder)
        config = _read_optional(folder / CONFIG)
        kind = config.get("tokenizer_class") or CLASSES[0]
        if kind not in CLASSES:
            raise ModelError(str(folder / CONFIG), f"tokenizer_class: expected one of {list(CLASSES)}, got {kind!r}")
        has_json = (folder / TOKENIZER_JSON).exists()
        try:
            vocabulary, merges, added = _read_tokenizer_json(folder) if has_json else _read_vocabulary_files(folder)
            return cls(vocabulary, merges, **_read_tokens(folder, config, added), model_max_length=_max_length(config))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(str(folder), f"is not a CLIP tokenizer ({error})", "download the files again") from None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a text encoder needs as many embeddings."""
        return self._tokenizer.get_vocab_size()

    def tokens(self, prompt: str) -> list[Token]:
        """The tokens of a text, without start, end and padding.

        Raises:
            UsageError: the text is not valid Unicode.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError("prompt", "contains bytes that are not valid UTF-8") from None
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        return [Token(id, prompt[slice(*span)]) for id, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def count(self, prompt: str) -> int:
        """How many of the `model_max_length` tokens a prompt takes, start and end included; it may be more."""
        return len(self.tokens(prompt)) + 2

    def encode(self, prompts: Sequence[str], *, truncate: bool = False) -> mx.array:
        """The rows of ids for prompts: start, the prompt's tokens, end, padding.

        Args:
            truncate: whether what does not fit is cut off; otherwise a long prompt is an error.

        Returns:
            int32, shape (B, model_max_length).

        Raises:
            UsageError: a prompt is too long, or not valid Unicode.
        """
        if isinstance(prompts, str):
            raise TypeError("expected a list of prompts, got one string")
        return mx.array([self.row(self.tokens(prompt), truncate=truncate) for prompt in prompts], dtype=mx.int32)

    __call__ = encode

    def row(self, tokens: Sequence[Token], *, truncate: bool = False) -> list[int]:
        """The ids of one prompt: start, tokens, end, padding; arguments and errors as in `encode`."""
        limit = self.model_max_length - 2
        if len(tokens) > limit and not truncate:
            excess = len(tokens) - limit
            before = " ".join(token.text for token in tokens[max(0, limit - WORDS_SHOWN) : limit])
            raise UsageError(
                "prompt",
                f"is {excess} token{'s' * (excess > 1)} too long, it has {len(tokens)} and the text encoder takes "
                f"{limit}: {tokens[limit].text!r} after {before!r} does not fit",
                "shorten the prompt",
            )
        ids = [self.bos_token_id, *(token.id for token in tokens[:limit]), self.eos_token_id]
        return ids + [self.pad_token_id] * (self.model_max_length - len(ids))


def _clip_backend(vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], unk_token: str) -> Tokenizer:
    """CLIP's fixed pipeline around a vocabulary.

    Raises:
        ValueError: the merges make tokens that the vocabulary lacks.
    """
    try:
        model = BPE(vocab=dict(vocabulary), merges=list(merges), unk_token=unk_token, end_of_word_suffix=END_OF_WORD)
    except Exception as error:  # the library has no narrower class
        raise ValueError(str(error).partition("\n")[0]) from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _register(
    tokenizer: Tokenizer,
    roles: Mapping[str, str | AddedToken | None],
    added_tokens: Mapping[int, AddedToken],
    extra_tokens: Sequence[str | AddedToken],
) -> None:
    """Adds the tokens that are found in a text before it is split into words, in the order of transformers.

    Raises:
        ValueError: a token does not get the id it was declared with.
    """
    declared = {token.content: token for token in added_tokens.values()}
    wanted = [added_tokens[id] for id in sorted(added_tokens)]
    wanted += [declared.get(_text_of(token), token) for token in (*roles.values(), *extra_tokens) if token is not None]
    for token in wanted:
        tokenizer.add_tokens([AddedToken(token, special=True) if isinstance(token, str) else token])
    for id, token in added_tokens.items():
        if tokenizer.token_to_id(token.content) != id:
            raise ValueError(f"added token {token.content!r} has id {id}, which is not where the vocabulary ends")


def _text_of(token: str | AddedToken) -> str:
    """The text of a token."""
    return token if isinstance(token, str) else token.content


def _added_token(value: Any, **flags: bool) -> str | AddedToken:
    """A token as the files write it: its text, or an object with text and flags."""
    if isinstance(value, str):
        return value
    return AddedToken(value["content"], **{name: value[name] for name in TOKEN_FLAGS if name in value} | flags)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(str(path), "file is missing") from None
    except UnicodeDecodeError as error:
        raise ModelError(str(path), f"is not UTF-8 text ({error})") from None
    except OSError as error:
        raise ModelError(str(path), f"cannot be read ({error.strerror})") from None


def _check_vocabulary(path: Path, vocabulary: Any) -> dict[str, int]:
    wrong = f"expected an object of token => id, got {type(vocabulary).__name__}"
    if isinstance(vocabulary, dict):
        pairs = (pair for pair in vocabulary.items() if type(pair[1]) is not int or not 0 <= pair[1] < UNLIMITED)
        bad = next(pairs, None)
        wrong = bad and f"token {bad[0]!r} has the id {bad[1]!r}"
    if wrong:
        raise ModelError(str(path), wrong)
    return vocabulary


Vocabulary = tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]  # tokens, merges, added tokens


def _read_vocabulary_files(folder: Path) -> Vocabulary:
    """`vocab.json`, and `merges.txt` with a pair per line below the line that names its version."""
    vocabulary_path, merges_path = (folder / name for name in VOCABULARY_FILES)
    vocabulary = _check_vocabulary(vocabulary_path, read_json(vocabulary_path))
    merges = []
    # Not splitlines(), which also splits at characters that are no line ends here.
    for number, line in enumerate(_read_text(merges_path).split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise ModelError(str(merges_path), f"line {number}: expected two tokens, got {line[:80]!r}")
        merges.append(pair)
    return vocabulary, merges, {}


def _read_tokenizer_json(folder: Path) -> Vocabulary:
    """`tokenizer.json`; of its pipeline only the vocabulary is taken, the rest is the same for every CLIP."""
    path = folder / TOKENIZER_JSON
    values = read_json(path)
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ModelError(str(path), "expected a BPE model")
    if model.get("end_of_word_suffix") != END_OF_WORD:
        raise ModelError(
            str(path), f"end_of_word_suffix: expected {END_OF_WORD!r}, got {model.get('end_of_word_suffix')!r}"
        )
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    added = {token["id"]: _added_token(token) for token in values.get("added_tokens", [])}
    return _check_vocabulary(path, model["vocab"]), merges, added


def _read_tokens(folder: Path, config: Mapping[str, Any], added: Mapping[int, AddedToken]) -> dict[str, Any]:
    """The special and added tokens, as arguments of `CLIPTokenizer`."""
    declared = config.get("added_tokens_decoder")
    said = _read_optional(folder / SPECIAL_TOKENS_MAP) if declared is None else {}
    roles = {role: _added_token(config[role]) for role in ROLES if config.get(role) is not None}
    roles |= {role: _added_token(said[role], special=True) for role in ROLES if said.get(role) is not None}
    extra = [_added_token(value) for role in EXTRA_ROLES for value in (said.get(role) or config.get(role) or [])]
    if declared is None:
        special = {_text_of(token) for token in [*roles.values(), *extra]}
        older = {
            id: AddedToken(text, normalized=text not in special, special=text in special)
            for text, id in _read_optional(folder / ADDED_TOKENS).items()
        }
        added = older | dict(added)
    else:
        added = {int(id): _added_token(value) for id, value in declared.items()}
    return {"roles": roles, "added_tokens": added, "extra_tokens": extra}


def _max_length(config: Mapping[str, Any]) -> int:
    length = config.get("model_max_length") or MODEL_MAX_LENGTH
    return MODEL_MAX_LENGTH if length >= UNLIMITED else length
