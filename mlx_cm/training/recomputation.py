"""Gradient checkpointing: blocks keep their inputs only and are computed again when their gradient is due.

Chen et al.: Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_cm.models.layers import ResnetBlock2D, SelfAttention2D
from mlx_cm.models.unet2d_condition import BasicTransformerBlock

BLOCKS = (ResnetBlock2D, SelfAttention2D, BasicTransformerBlock)


def recompute_blocks(model: nn.Module) -> nn.Module:
    """Makes residual blocks, attentions and transformer layers of a model forget what lies between their ends.

    The result of every call and of every gradient stays the same, one more forward pass is paid, and names of
    parameters do not change.
    """
    for module in model.modules():
        if type(module) in BLOCKS:
            module.__class__ = _recomputed(type(module))
    return model


@functools.cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks whose call is a checkpoint; only instances made so are concerned."""

    def call(self: nn.Module, *arguments, **settings) -> mx.array:
        # Frozen parameters too: a function to be computed again may only depend on what it is given.
        held = self.parameters()

        def compute(parameters: dict, *arguments, **settings) -> mx.array:
            self.update(parameters)
            try:
                return kind.__call__(self, *tree_map(_constant_keys, arguments), **tree_map(_constant_keys, settings))
            finally:
                self.update(held)  # what is traced here means nothing outside

        return mx.checkpoint(compute)(held, *arguments, **settings)

    return type(f"Recomputed{kind.__name__}", (kind,), {"__call__": call})


def _constant_keys(x: Any) -> Any:
    """Keys of dropout are integers, of which no gradient is asked; random bits have none."""
    is_key = isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.integer)
    return mx.stop_gradient(x) if is_key else x
