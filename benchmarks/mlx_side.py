"""What our side of the comparisons shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cm.models.unet2d_condition import PromptContext


def load_component(model: nn.Module, path: Path) -> nn.Module:
    """Fills a model from a file that `checkpoints.write_component` wrote, laid out as a native folder's would be."""
    model.load_weights([(name, _channels_last(value)) for name, value in mx.load(str(path)).items()])
    mx.eval(model.parameters())
    mx.clear_cache()  # of the kernels in the other layout
    return model


def _channels_last(value: mx.array) -> mx.array:
    return mx.contiguous(value.transpose(0, 2, 3, 1)) if value.ndim == 4 else value


def load_inputs(path: Path) -> dict[str, mx.array]:
    """Inputs that both sides get, images and latents channels-last."""
    with np.load(path) as arrays:
        return {name: _channels_last(mx.array(array)) for name, array in arrays.items()}


def evaluate(*values: Any) -> None:
    """Computes the arrays among the values."""
    mx.eval(
        [
            value.arrays() if isinstance(value, PromptContext) else value
            for value in values
            if isinstance(value, mx.array | PromptContext)
        ]
    )


def computed(make: Callable[[], mx.array]) -> Callable[[], mx.array]:
    """A stage that returns when its array is computed."""

    def stage() -> mx.array:
        result = make()
        evaluate(result)
        return result

    return stage


def watched(pipeline: Any, parts: dict[str, int], generate: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """A stage that generates with the time of each call of the pipeline's parts taken.

    Args:
        parts: attributes of the pipeline, and how often each is to be called.
    """

    def stage() -> dict[str, Any]:
        own = dict(vars(pipeline))
        timed = {name: harness.Timed(getattr(pipeline, name), evaluate) for name in parts}
        vars(pipeline).update(timed)
        try:
            generate()
        finally:
            vars(pipeline).clear()
            vars(pipeline).update(own)
        calls = {name: part.calls for name, part in timed.items()}
        if calls != parts:
            raise harness.BenchmarkError(f"expected calls {parts}, got {calls}")
        return {"inside": sum(part.seconds for part in timed.values())}

    return stage
