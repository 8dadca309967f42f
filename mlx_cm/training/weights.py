"""Networks that are called with weights given from outside, so that one module serves student and target."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

Parameters = dict[str, dict[str, mx.array]]  # part ("unet") => name => trained parameter, float32


def master_parameters(modules: Mapping[str, nn.Module]) -> Parameters:
    """The trainable parameters of every part in float32, which keeps the small changes of an optimiser.

    They are arrays of their own: a compiled step refuses one that it is given and meets again in another network, as
    in the teacher that a student begins as.
    """
    return {
        part: {
            name: mx.contiguous(value.astype(mx.float32)) for name, value in tree_flatten(module.trainable_parameters())
        }
        for part, module in modules.items()
    }


class Weighted:
    """The parts of a model with one set of weights.

    Args:
        modules: part => module. What a set of weights does not hold stays as the module has it.
        parameters: the weights.
        dtype: to compute in; a module's `float32_parts` stay float32.
    """

    def __init__(self, modules: Mapping[str, nn.Module], parameters: Parameters, dtype: mx.Dtype = mx.float32):
        self._modules = modules
        self._trees = {part: _cast(modules[part], values, dtype) for part, values in parameters.items()}

    def part(self, name: str) -> nn.Module:
        """The module of a part, with these weights until another set is asked for the same part."""
        module = self._modules[name]
        if name in self._trees:
            module.update(self._trees[name])
        return module

    def unet(self, *arguments: Any, **cond: Any) -> mx.array:
        """One call of the network."""
        return self.part("unet")(*arguments, **cond)


def _cast(module: nn.Module, values: Mapping[str, mx.array], dtype: mx.Dtype) -> Any:
    kept = tuple(f"{part}." for part in module.float32_parts)
    return tree_unflatten(
        [(name, value if name.startswith(kept) else value.astype(dtype)) for name, value in values.items()]
    )
