"""Peak memory of one call of each model, measured in a process of its own: `python measured_peaks.py`.

Prints a JSON list of bytes beside the weights and the inputs, in the order of CASES.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from latent_configs import SD15, SD21, SDXL
from mlx.utils import tree_map

from mlx_cm import backend
from mlx_cm.config import config_from_dict
from mlx_cm.model_folder import MODELS


class Case(NamedTuple):
    name: str
    kind: str
    config: dict[str, Any]
    size: tuple[int, int, int]  # batch, height, width of the input


def _narrow(config: dict, divisor: int, **others) -> dict:
    widths = [width // divisor for width in config["block_out_channels"]]
    return config | {"block_out_channels": widths, "norm_num_groups": 4, "cross_attention_dim": 64} | others


def _vae(*widths: int, **others) -> dict:
    kinds = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    return {name: kind * len(widths) for name, kind in kinds.items()} | {"block_out_channels": widths} | others


_ADDED = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68}
_IMAGENET = {
    "sample_size": 64,
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 2,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 32,
    "norm_num_groups": 16,
    "resnet_time_scale_shift": "scale_shift",
}
_SMALL = {
    "sample_size": 32,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
_PLAIN = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "block_out_channels": [64, 96]}
_TEXT = {"hidden_size": 320, "intermediate_size": 1280, "num_attention_heads": 5, "num_hidden_layers": 4}

CASES = (
    Case("SD1.5, scores dominate", "UNet2DCondition", _narrow(SD15, 8), (1, 24, 24)),
    Case("SD1.5, with guidance", "UNet2DCondition", _narrow(SD15, 8), (2, 12, 20)),
    Case("SD2.1, odd sizes", "UNet2DCondition", _narrow(SD21, 4, attention_head_dim=[1, 2, 4, 4]), (1, 19, 13)),
    Case(
        "SDXL, convolutions dominate",
        "UNet2DCondition",
        _narrow(SDXL, 8, attention_head_dim=[1, 2, 4], transformer_layers_per_block=[1, 1, 2]) | _ADDED,
        (1, 32, 32),
    ),
    Case("autoencoder of four levels", "AutoencoderKL", _vae(32, 64, 128, 128, layers_per_block=2), (1, 9, 9)),
    Case("autoencoder of three levels", "AutoencoderKL", _vae(32, 96, 64, norm_num_groups=8), (1, 20, 28)),
    Case("autoencoder, two images", "AutoencoderKL", _vae(32, 64, norm_num_groups=8), (2, 36, 36)),
    Case("TAESD", "AutoencoderTiny", {}, (1, 8, 12)),
    Case("ImageNet-64", "UNet2D", _IMAGENET, (1, 64, 64)),
    Case("pixels, many heads", "UNet2D", _SMALL, (2, 24, 24)),
    Case("pixels, no attention", "UNet2D", _PLAIN | {"sample_size": 64, "add_attention": False}, (1, 64, 64)),
    Case("text", "CLIPTextModel", _TEXT, (2, 77, 1)),
)


def _built(case: Case) -> tuple[nn.Module, Any]:
    """The model, with zeros for weights: they need no random numbers, and memory does not depend on values."""
    model_class, config_class = MODELS[case.kind]
    config = config_from_dict(config_class, case.config, case.name)
    model = model_class(config)
    model.update(tree_map(mx.zeros_like, model.parameters()))
    mx.eval(model.parameters())
    return model, config


def _evaluated(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    x = mx.ones(shape, dtype)
    mx.eval(x)
    return x


def _condition(model: nn.Module, config: Any, batch: int, height: int, width: int) -> Callable[[], mx.array]:
    added = {}
    if config.addition_embed_type:
        added = {"text_embeds": mx.ones((batch, 20)), "time_ids": mx.ones((batch, 6))}
    context = model.prepare(mx.ones((batch, 77, config.cross_attention_dim)), **added)
    mx.eval(context.arrays())
    x = _evaluated(batch, height, width, config.in_channels)
    return lambda: model(x, 5.0, context)


def _pixel(model: nn.Module, config: Any, batch: int, height: int, width: int) -> Callable[[], mx.array]:
    x = _evaluated(batch, height, width, config.in_channels)
    return lambda: model(x, mx.array(0.5))


def _autoencoder(model: nn.Module, config: Any, batch: int, height: int, width: int) -> Callable[[], mx.array]:
    z = _evaluated(batch, height, width, config.latent_channels)
    return lambda: model.decode_scaled(z)


def _text(model: nn.Module, config: Any, batch: int, tokens: int, _: int) -> Callable[[], mx.array]:
    ids = _evaluated(batch, tokens, dtype=mx.int32)
    return lambda: model(ids).last_hidden_state


CALLS = {
    "UNet2DCondition": _condition,
    "UNet2D": _pixel,
    "AutoencoderKL": _autoencoder,
    "AutoencoderTiny": _autoencoder,
    "CLIPTextModel": _text,
}


def measured(case: Case) -> int:
    """Bytes at the peak of one call."""
    call = CALLS[case.kind](*_built(case), *case.size)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call())
    mx.synchronize()
    return mx.get_peak_memory() - before


if __name__ == "__main__":
    # The small models stand for large ones, whose maps are computed value by value.
    backend.IN_ARITHMETIC = 0
    print(json.dumps([measured(case) for case in CASES]))  # noqa: T201
