"""Weights in prompts: the syntax, the mapping to tokens, and the arithmetic."""

import mlx.core as mx
import numpy as np
import pytest
from clip_vocabulary import train
from hypothesis import given
from hypothesis import strategies as st

from mlx_cm.errors import UsageError
from mlx_cm.prompt_weights import Segment, apply_weights, encode_weighted, parse_weights
from mlx_cm.tokenizer import CLIPTokenizer

PARSED = {
    "": [("", 1)],
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "a [faint] word": [("a ", 1), ("faint", 1 / 1.1), (" word", 1)],
    "(red:1.3) cat": [("red", 1.3), (" cat", 1)],
    "(red: 1.3 ) cat": [("red", 1.3), (" cat", 1)],
    "(off:0)(back:-.5)(whole:2.)": [("off", 0), ("back", -0.5), ("whole", 2)],
    "((nested))": [("nested", 1.1**2)],
    "(a (b:2) c)": [("a ", 1.1), ("b", 2.2), (" c", 1.1)],
    "((a:2) b:3)": [("a", 6), (" b", 3)],
    "([a])": [("a", 1)],
    "(two)(parts)": [("twoparts", 1.1)],  # the same weight side by side: one text
    r"\(literal\] \[text\)": [("(literal] [text)", 1)],
    r"(a \(b\):1.5)": [("a (b)", 1.5)],
    r"one \\ two \ three \n": [(r"one \ two \ three \n", 1)],
    "(never closed": [("never closed", 1.1)],
    "a [never (closed": [("a ", 1), ("never ", 1 / 1.1), ("closed", 1)],
    "never opened) at:1.3) all]": [("never opened) at:1.3) all]", 1)],
    "ratio 16:9, (time 12:30)": [("ratio 16:9, ", 1), ("time 12", 30)],  # the syntax cannot tell
    "(a:b)": [("a:b", 1.1)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    "[a:1.3]": [("a:1.3", 1 / 1.1)],  # only round brackets take a number
    "()": [("", 1)],
    "a :( b": [("a :", 1), (" b", 1.1)],
    "line\n(two\nthree:2)": [("line\n", 1), ("two\nthree", 2)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    vocabulary, merges = train()
    return CLIPTokenizer(vocabulary, map(tuple, merges))


@pytest.mark.parametrize("prompt", PARSED)
def test_syntax(prompt):
    segments = parse_weights(prompt)
    assert [segment.text for segment in segments] == [text for text, _ in PARSED[prompt]]
    assert [segment.weight for segment in segments] == pytest.approx([weight for _, weight in PARSED[prompt]])


@given(st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"])))
def test_without_brackets_nothing_happens(text):
    assert parse_weights(text) == [Segment(text, 1.0)]


@given(st.text("ab:1. ()[]\\"))
def test_every_text_has_a_meaning_and_escaping_restores_it(text):
    assert all(np.isfinite(segment.weight) for segment in parse_weights(text))
    escaped = "".join("\\" + character if character in "()[]\\" else character for character in text)
    assert parse_weights(escaped) == [Segment(text, 1.0)]


def test_infinite_weights_are_refused():
    with pytest.raises(UsageError, match="the weight of 'a' is too large"):
        parse_weights(f"((a:{'9' * 300}):{'9' * 300})")


def test_weights_stand_at_their_tokens(tokenizer):
    prompt = "if (return not:1.5), [class] (unbelievable\u00e9:0.5)s"
    ids, weights = encode_weighted(tokenizer, [prompt, "if"])
    expected = [(tokenizer.bos_token_id, 1.0)]
    for text, weight in [("if", 1), ("return not", 1.5), (",", 1), ("class", 1 / 1.1), ("unbelievable\u00e9", 0.5)]:
        expected += [(token.id, weight) for token in tokenizer.tokens(text)]
    expected += [(token.id, 1.0) for token in tokenizer.tokens("s")] + [(tokenizer.eos_token_id, 1.0)]
    assert ids.shape == weights.shape == (2, 77)
    assert len(expected) > 10
    assert ids[0, : len(expected)].tolist() == [id for id, _ in expected]
    assert weights[0, : len(expected)].tolist() == pytest.approx([weight for _, weight in expected])
    assert weights[0, len(expected) :].tolist() == [1.0] * (77 - len(expected))
    assert weights[1].tolist() == [1.0] * 77


@pytest.mark.parametrize("prompt", ["", "if return, not class!", "Unbeliev\u00e9ble 123 don't"])
def test_plain_prompts_have_the_ids_of_the_tokenizer(tokenizer, prompt):
    ids, weights = encode_weighted(tokenizer, [prompt])
    assert mx.array_equal(ids, tokenizer([prompt]))
    assert mx.all(weights == 1)


def test_long_prompts_are_refused_or_truncated(tokenizer):
    prompt = "(if:2) " * 80
    with pytest.raises(UsageError, match="5 tokens too long"):
        encode_weighted(tokenizer, [prompt])
    ids, weights = encode_weighted(tokenizer, [prompt], truncate=True)
    assert mx.array_equal(ids, tokenizer.encode(["if " * 80], truncate=True))
    assert weights[0].tolist() == [1.0, *[2.0] * 75, 1.0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_states_are_weighted_and_keep_their_mean(dtype):
    generator = np.random.default_rng(0)
    states = generator.normal(0.1, 1, (2, 7, 12)).astype(np.float32)
    weights = generator.uniform(0.5, 1.5, (2, 7)).astype(np.float32)
    out = apply_weights(mx.array(states).astype(dtype), mx.array(weights))
    assert out.dtype == dtype
    exact = states.astype(np.float64) * weights[..., None]
    exact *= (states.astype(np.float64).mean((1, 2)) / exact.mean((1, 2)))[:, None, None]
    tolerance = 1e-5 if dtype == mx.float32 else 5e-3
    assert np.linalg.norm(np.array(out.astype(mx.float32)) - exact) <= tolerance * np.linalg.norm(exact)


def test_weights_of_one_change_nothing():
    states = mx.random.normal((2, 77, 33), key=mx.random.key(1))
    assert mx.array_equal(apply_weights(states, mx.ones((2, 77))), states)


def test_a_prompt_does_not_depend_on_its_batch():
    states = mx.random.normal((2, 7, 12), key=mx.random.key(1)) + 0.2
    weights = mx.array([[1.0, 1.3] + [1.0] * 5, [1.0] * 6 + [0.2]])
    together = apply_weights(states, weights)
    assert mx.array_equal(together[:1], apply_weights(states[:1], weights[:1]))


def test_weights_of_zero_are_zero():
    assert mx.array_equal(apply_weights(mx.ones((1, 3, 4)), mx.zeros((1, 3))), mx.zeros((1, 3, 4)))
