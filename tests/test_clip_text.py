"""The CLIP text encoders against transformers: small models with every parameter random, and full-size ones."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten, tree_map
from parity import TOLERANCE, channels_last, parameter_count, randomise, relative_error

from mlx_cm.config import config_from_dict, config_to_dict
from mlx_cm.convert.transformers_config import NEUTRAL_VALUES, WITHOUT_EFFECT, config_from_transformers
from mlx_cm.errors import ModelError
from mlx_cm.models.clip_text import CLIPTextConfig, CLIPTextModel, end_of_text

PUBLISHED_CLIP_L = {  # text_encoder/config.json of SD 1.5
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
OPENCLIP_H = PUBLISHED_CLIP_L | {  # SD 2.1
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
OPENCLIP_BIGG = PUBLISHED_CLIP_L | {  # text_encoder_2 of SDXL
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
FULL_SIZE = {"L": (PUBLISHED_CLIP_L, 123_060_480), "H": (OPENCLIP_H, 340_387_840), "bigG": (OPENCLIP_BIGG, 694_659_840)}

START, END = 97, 98  # the two highest ids of the small vocabulary, as in the real one
SMALL_SIZES = {
    "vocab_size": 99,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "max_position_embeddings": 11,
    "projection_dim": 20,
}
SMALL = {
    "L": PUBLISHED_CLIP_L | SMALL_SIZES,
    "H": OPENCLIP_H | SMALL_SIZES | {"num_hidden_layers": 4},
    "bigG": OPENCLIP_BIGG | SMALL_SIZES | {"layer_norm_eps": 1e-3},
    "end of text by id": OPENCLIP_BIGG | SMALL_SIZES | {"eos_token_id": END},
    "end of text is not the highest id": OPENCLIP_BIGG | SMALL_SIZES | {"eos_token_id": 5},
    "L with projection": OPENCLIP_BIGG | SMALL_SIZES | {"hidden_act": "quick_gelu"},
}


def reference_model(values: dict) -> torch.nn.Module:
    known = {key: value for key, value in values.items() if key not in {"torch_dtype", "transformers_version"}}
    return getattr(transformers, values["architectures"][0])(transformers.CLIPTextConfig(**known))


def published_weights(reference: torch.nn.Module) -> list[tuple[str, mx.array]]:
    """The state under the names of the published files, which all have the prefix that newer versions drop."""
    prefixed = {key if key.startswith("text_") else f"text_model.{key}": v for key, v in reference.state_dict().items()}
    return [(key, channels_last(value)) for key, value in prefixed.items()]


def native(values: dict) -> CLIPTextModel:
    return CLIPTextModel(config_from_transformers(CLIPTextConfig, values, "config.json"))


def pair(values: dict, seed: int = 0) -> tuple[CLIPTextModel, torch.nn.Module]:
    reference = randomise(reference_model(values), seed)
    model = native(values)
    model.load_weights(published_weights(reference), strict=True)
    return model, reference


def prompts(pad: int, end: int = END, length: int = 11) -> np.ndarray:
    """Prompts of different lengths, one of them full, padded like a tokenizer does."""
    rows = [[START, 7, 9, 8, end], [START, *range(20, 20 + length - 2), end], [START, end]]
    return np.array([row + [pad] * (length - len(row)) for row in rows])


def assert_same(ours, theirs, projection: bool):
    assert relative_error(ours.last_hidden_state, theirs.last_hidden_state) <= TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for index in range(len(theirs.hidden_states)):
        assert relative_error(ours.hidden_states[index], theirs.hidden_states[index]) <= TOLERANCE
    if projection:
        assert relative_error(ours.text_embeds, theirs.text_embeds) <= TOLERANCE
    else:
        assert ours.text_embeds is None
        assert relative_error(ours.pooled, theirs.pooler_output) <= TOLERANCE


@pytest.mark.parametrize("pad", [END, 0], ids=["pad is the end of text", "pad is 0"])
@pytest.mark.parametrize("kind", SMALL)
def test_parity(kind, pad):
    values = SMALL[kind]
    model, reference = pair(values)
    end = values["eos_token_id"] if values["eos_token_id"] != 2 else END
    ids = prompts(pad, end)
    ours = model(mx.array(ids))
    theirs = reference(torch.tensor(ids), output_hidden_states=True)
    assert_same(ours, theirs, projection=model.config.with_projection)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_short_input_needs_no_padding(length):
    model, reference = pair(SMALL["bigG"], seed=1)
    ids = prompts(0)[:, :length]
    assert_same(model(mx.array(ids)), reference(torch.tensor(ids), output_hidden_states=True), projection=True)


def test_full_clip_l():
    model, reference = pair(PUBLISHED_CLIP_L)
    ids = np.full((1, 77), 49407)
    ids[0, :9] = [49406, 320, 1125, 539, 320, 2368, 12, 48000, 3]
    ours, theirs = model(mx.array(ids)), reference(torch.tensor(ids), output_hidden_states=True)
    assert_same(ours, theirs, projection=False)


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_full_size_has_the_parameters_of_the_published_model(kind):
    values, count = FULL_SIZE[kind]
    with torch.device("meta"):
        reference = reference_model(values)
    expected = {(key if key.startswith("text_") else f"text_model.{key}"): v for key, v in reference.named_parameters()}
    model = native(values)  # lazy: no memory is taken
    shapes = {key: value.shape for key, value in tree_flatten(model.parameters())}
    assert shapes == {key: tuple(value.shape) for key, value in expected.items()}
    assert parameter_count(model) == (count, len(expected))


def test_a_prompt_does_not_depend_on_its_batch_or_on_the_padding_behind_it():
    model, _ = pair(SMALL["bigG"])
    together = model(mx.array(prompts(0)))
    alone = model(mx.array(prompts(7)[:1]))
    assert np.allclose(together.text_embeds[0], alone.text_embeds[0], atol=1e-6)
    assert np.allclose(together.hidden_states[-2][0, :5], alone.hidden_states[-2][0, :5], atol=1e-6)
    assert not np.allclose(together.hidden_states[-2][0, 5:], alone.hidden_states[-2][0, 5:], atol=1e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["L", "bigG"])
def test_half_precision_stays_close_even_with_large_activations(kind, dtype):
    model, _ = pair(SMALL[kind])
    scaled = model.text_model.embeddings.token_embedding
    scaled.weight = scaled.weight * 300  # squares of these are beyond float16
    exact = model(mx.array(prompts(0)))
    model.update(tree_map(lambda parameter: parameter.astype(dtype), model.parameters()))
    half = model(mx.array(prompts(0)))
    assert half.last_hidden_state.dtype == dtype
    difference = np.array(half.last_hidden_state.astype(mx.float32)) - np.array(exact.last_hidden_state)
    tolerance = {mx.float16: 5e-3, mx.bfloat16: 3e-2}[dtype]
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(np.array(exact.last_hidden_state))


@pytest.mark.parametrize(
    ("row", "eos_token_id", "position"),
    [
        ([97, 4, 98, 98, 98], 2, 2),  # the first of the highest
        ([97, 4, 98, 0, 0], 2, 2),
        ([97, 2, 98, 0, 0], 2, 2),  # not the token whose id is 2
        ([97, 4, 98, 98, 0], 98, 2),
        ([97, 4, 5, 98, 5], 5, 2),  # not the highest
        ([97, 4, 1, 1, 1], 98, 0),  # none at all
    ],
)
def test_end_of_text(row, eos_token_id, position):
    assert end_of_text(mx.array([row, row]), eos_token_id).tolist() == [position] * 2


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="12 tokens, but the model has positions for 11"):
        native(SMALL["L"])(mx.zeros((1, 12), dtype=mx.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"hidden_size": 770}, "770 cannot be split into 12 heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, got 0"),
        ({"architectures": ["CLIPModel"]}, "architectures: expected one of"),
        ({"architectures": ["CLIPTextModelWithProjection"], "projection_dim": None}, "projection_dim: expected"),
        ({"eos_token_id": [2, 3]}, "eos_token_id: expected int"),
        ({"rope_theta": 1.0}, "does not know rope_theta"),
        ({"is_decoder": True}, "is_decoder: expected False, got True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: expected {}"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ModelError) as error:
        config_from_transformers(CLIPTextConfig, PUBLISHED_CLIP_L | change, "text_encoder/config.json")
    assert message in str(error.value)
    assert error.value.what == "text_encoder/config.json"


@pytest.mark.parametrize("values", [PUBLISHED_CLIP_L, OPENCLIP_H, OPENCLIP_BIGG], ids=["L", "H", "bigG"])
def test_config_survives_the_native_folder(values):
    config = config_from_transformers(CLIPTextConfig, values, "config.json")
    written = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(CLIPTextConfig, written, "config.json") == config


def test_bookkeeping_of_the_installed_transformers_is_known():
    written = transformers.CLIPTextConfig().to_dict() | {"architectures": ["CLIPTextModel"]}
    config = config_from_transformers(CLIPTextConfig, json.loads(json.dumps(written)), "config.json")
    assert config == CLIPTextConfig()  # the same defaults as well


def test_a_models_own_field_is_never_taken_for_bookkeeping():
    assert not CLIPTextConfig.__dataclass_fields__.keys() & (WITHOUT_EFFECT | NEUTRAL_VALUES.keys())
