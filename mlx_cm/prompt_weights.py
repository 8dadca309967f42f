"""Weights in prompts: "a (red:1.3) cat" makes the encoder's output count more, or less, where those words stand.

The syntax and the arithmetic are those of AUTOMATIC1111's web UI, whose prompts people share. Weighting is asked for,
never assumed: brackets in an ordinary prompt are ordinary text.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_cm.errors import UsageError
from mlx_cm.tokenizer import CLIPTokenizer

BRACKET_WEIGHTS = {"(": 1.1, "[": 1 / 1.1}
CLOSING = {")": "(", "]": "["}
PIECES = re.compile(
    r"""\\(?P<escaped>[\\()\[\]])                                    # \( stands for (
    | :\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)            # the end of (word:1.3)
    | (?P<open>[(\[])
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+ | .)""",
    re.VERBOSE | re.DOTALL,
)


class Segment(NamedTuple):
    """A part of a prompt whose words have the same weight."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[Segment]:
    r"""Splits a prompt by weight.

    `(word)` weighs 1.1, `[word]` 1/1.1, `(word:1.3)` 1.3, and brackets inside brackets multiply. A bracket that is
    never closed reaches to the end; one that was never opened is text, and so is `\(`, `\)`, `\[`, `\]` or `\\`
    without its backslash.

    Returns:
        The segments in order; neighbours of the same weight are one, and a prompt without brackets is one of weight 1.

    Raises:
        UsageError: a weight is beyond every number.
    """
    segments: list[Segment] = []
    opened: dict[str, list[int]] = {bracket: [] for bracket in BRACKET_WEIGHTS}  # where the open ones begin

    def weigh(start: int, factor: float) -> None:
        segments[start:] = [Segment(text, weight * factor) for text, weight in segments[start:]]

    for piece in PIECES.finditer(prompt):
        bracket = CLOSING.get(piece["close"])
        if piece["open"]:
            opened[piece["open"]].append(len(segments))
        elif piece["weight"] and opened["("]:
            weigh(opened["("].pop(), float(piece["weight"]))
        elif bracket and opened[bracket]:
            weigh(opened[bracket].pop(), BRACKET_WEIGHTS[bracket])
        else:
            segments.append(Segment(piece["escaped"] or piece[0], 1.0))
    for bracket, starts in opened.items():
        for start in starts:
            weigh(start, BRACKET_WEIGHTS[bracket])
    for segment in segments:
        if not math.isfinite(segment.weight):
            raise UsageError("prompt", f"the weight of {segment.text!r} is too large")
    return _merge(segments)


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    merged = [Segment("", 1.0)] if not segments else []
    for segment in segments:
        if merged and merged[-1].weight == segment.weight:
            segment = Segment(merged.pop().text + segment.text, segment.weight)
        merged.append(segment)
    return merged


def encode_weighted(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], *, truncate: bool = False
) -> tuple[mx.array, mx.array]:
    """Rows of token ids and the weight of each token.

    A segment is split into tokens by itself, so that every token has one weight: "(cat:1.2)s" is "cat" and "s". A
    prompt without brackets has the ids of `tokenizer.encode`.

    Args:
        truncate: whether what does not fit is cut off; otherwise a long prompt is an error.

    Returns:
        ids, int32, and weights, float32, both (B, model_max_length); start, end and padding weigh 1.

    Raises:
        UsageError: a prompt is too long, or not valid Unicode.
    """
    ids, weights = [], []
    for prompt in prompts:
        weighted = [(token, weight) for text, weight in parse_weights(prompt) for token in tokenizer.tokens(text)]
        ids.append(tokenizer.row([token for token, _ in weighted], truncate=truncate))
        inner = [weight for _, weight in weighted][: tokenizer.model_max_length - 2]
        weights.append([1.0, *inner, *[1.0] * (tokenizer.model_max_length - 1 - len(inner))])
    return mx.array(ids, dtype=mx.int32), mx.array(weights, dtype=mx.float32)


def apply_weights(embeds: mx.array, weights: mx.array) -> mx.array:
    """Multiplies each token's state by its weight, then brings each prompt's mean back to what it was.

    Weights of 1 change nothing, not even the last bit. The mean is taken per prompt, so that a picture does not depend
    on the others in its batch.

    Args:
        embeds: the text encoder's states, (B, L, C).
        weights: of each token, (B, L).

    Returns:
        The shape and type of `embeds`.
    """
    states = embeds.astype(mx.float32)
    weighted = states * weights[..., None].astype(mx.float32)
    before, after = (_prompt_mean(array) for array in (states, weighted))
    scale = mx.where(after == 0, 1.0, before / after)  # nothing to bring back where every weight is 0
    return (weighted * scale).astype(embeds.dtype)


def _prompt_mean(states: mx.array) -> mx.array:
    """(B, L, C) => (B, 1, 1), over one axis after the other: short sums keep their digits."""
    return states.mean(axis=1, keepdims=True).mean(axis=2, keepdims=True)
