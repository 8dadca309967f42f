"""Configs written by transformers: beside the model's own fields they carry the bookkeeping of that library."""

from collections.abc import Mapping
from typing import Any, TypeVar

from mlx_cm.config import config_from_dict
from mlx_cm.errors import ModelError

ConfigT = TypeVar("ConfigT")

# Fields of every transformers config that say nothing about what an encoder computes: provenance, the form of the
# return value, labels of classifiers, and the settings of text generation, which older versions wrote into all of them.
WITHOUT_EFFECT = frozenset(
    {
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    }
)
# Fields of every transformers config that would change the network, and the value under which they do not.
# A model whose own config has the field decides for itself.
NEUTRAL_VALUES = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
}


def config_from_transformers(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Builds a native config from the `config.json` of a transformers model, whatever version wrote it.

    Args:
        cls: the native config, which has the published field names.
        values: the JSON object.
        where: the file's name, for messages.

    Raises:
        ModelError: a field that neither the config nor the bookkeeping knows, or a value that is not supported.
    """
    own = cls.__dataclass_fields__
    for name, neutral in NEUTRAL_VALUES.items():
        if name not in own and values.get(name, neutral) != neutral:
            raise ModelError(where, f"{name}: expected {neutral!r}, got {values[name]!r}, which is not supported")
    bookkeeping = (WITHOUT_EFFECT | NEUTRAL_VALUES.keys()) - own.keys()
    return config_from_dict(cls, {key: value for key, value in values.items() if key not in bookkeeping}, where)
