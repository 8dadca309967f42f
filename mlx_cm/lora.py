"""Low-rank adapters (LoRA): what they are to a model, and adding them to its weights.

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; for convolutions in the form of LoCon:
a kernel of the module's size down to the rank, a 1x1 kernel up.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_cm import backend
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.models.layers import Conv2d

# What the published LCM-LoRAs adapt (Luo et al., arXiv 2311.05556), as the authors' training scripts list it.
LCM_LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)

ADAPTABLE = (nn.Linear, nn.QuantizedLinear, nn.Conv2d, Conv2d)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one module's weight: alpha / rank * up @ down."""

    path: str  # the module's, "down_blocks.0.attentions.0.proj_in"
    down: mx.array  # (rank, in) or (rank, height, width, in)
    up: mx.array  # (out, rank) or (out, 1, 1, rank)
    alpha: float

    @classmethod
    def from_numpy(cls, path: str, down: np.ndarray, up: np.ndarray, alpha: float) -> "LoraLayer":
        """A layer from arrays in native layout."""
        return cls(path, mx.array(down), mx.array(up), alpha)

    def numpy(self) -> tuple[np.ndarray, np.ndarray]:
        """Down and up as NumPy arrays; bfloat16, which NumPy has not, as float32."""
        return tuple(np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x) for x in (self.down, self.up))

    @property
    def rank(self) -> int:
        """Width between down and up."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that the layer changes.

        Raises:
            ModelError: down and up do not belong together.
        """
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        between = (1,) * (len(down) - 2)
        if len(down) not in (2, 4) or not down[0] or len(up) != len(down) or up[1:] != (*between, down[0]):
            raise ModelError(self.path, f"no LoRA of rank 1 or more has a down of shape {down} and an up of shape {up}")
        return up[0], *down[1:]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of layers for the components of one model."""

    name: str
    layers: Mapping[str, Mapping[str, LoraLayer]]  # component ("unet", "text_encoder") => module path => layer
    metadata: Mapping[str, str] = field(default_factory=dict)  # what the file says of itself
    sampler: str | None = None  # "lcm" or "tcd" where the file names the sampler that it was made for
    sha256: str | None = None  # of the file
    ref: str | None = None  # where anyone finds it again: a Hub id; None for a file of this machine


def parse_lora_ref(text: str) -> tuple[str, float]:
    """Reads "REF" or "REF@SCALE": only a number behind the last @ is a scale, anything else belongs to the reference.

    Raises:
        UsageError: nothing before the @, or a scale that is not finite.
    """
    ref, at, scale = text.rpartition("@")
    if not at or not NUMBER.fullmatch(scale):
        ref, scale = text, "1"
    if not ref:
        raise UsageError(f"lora {text!r}", "expected PATH or OWNER/NAME, and @SCALE behind it where it is not 1")
    return ref, _checked_scale(float(scale))


def _checked_scale(scale: float) -> float:
    if not math.isfinite(scale):
        raise UsageError(f"lora scale {scale}", "expected a finite number")
    return scale


def adaptable_modules(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path => shape of the weight of every linear layer and convolution; of the values where it is quantised."""
    return {path: _weight_shape(module) for path, module in _adaptable(model).items()}


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: module for path, module in leaves if isinstance(module, ADAPTABLE)}


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.QuantizedLinear):
        return shape[0], shape[1] * 32 // module.bits  # packed into 32-bit words
    return shape


def lora_targets(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Paths of the modules that end in one of the names, in the model's order; peft's rule for `target_modules`.

    Raises:
        UsageError: a name that no linear layer or convolution of the model has.
    """
    paths, names = list(_adaptable(model)), list(names)
    found = {name: {path for path in paths if f".{path}".endswith(f".{name}")} for name in names}
    idle = [name for name, matches in found.items() if not matches]
    if idle:
        raise UsageError(f"LoRA targets {', '.join(idle)}", "no linear layer or convolution of this model is called so")
    wanted = set().union(*found.values())
    return [path for path in paths if path in wanted]


class AdaptedLinear(nn.Linear):
    """A linear layer with a LoRA beside its weight, for training: y = W x + b + alpha / rank up (down x)."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + (x @ self.lora_down.T) @ (_strength(self) * self.lora_up).T


class AdaptedConv2d(Conv2d):
    """A convolution with a LoRA beside its weight, for training: a kernel of its size down, a 1x1 kernel up."""

    def __call__(self, x: mx.array, *, upsample: bool = False) -> mx.array:
        if upsample:
            narrow = backend.upsample_conv2d(x, self.lora_down)
        else:
            narrow = backend.conv2d(x, self.lora_down, stride=self.stride, padding=self.padding)
        return super().__call__(x, upsample=upsample) + backend.conv2d(narrow, _strength(self) * self.lora_up)


def _strength(layer: nn.Module) -> float:
    return layer.lora_alpha / layer.lora_down.shape[0]


ADAPTED = {nn.Linear: AdaptedLinear, Conv2d: AdaptedConv2d}


def attach_lora(model: nn.Module, names: Iterable[str], *, rank: int, alpha: float, key: mx.array) -> nn.Module:
    """Freezes a model and gives layers of it trainable adapters, which change nothing at first.

    Down is drawn as peft draws it, uniformly within 1 / sqrt(inputs); up is zero. Both are float32. Parameters of the
    model keep their names.

    Args:
        names: of `lora_targets`.
        key: of the draws.

    Raises:
        UsageError: a name that no layer has, or a rank below 1.
        ModelError: a layer is quantised; its weights cannot be told a gradient through.
    """
    if rank < 1 or not math.isfinite(alpha):
        raise UsageError(f"rank {rank}, alpha {alpha}", "expected a rank of at least 1 and a finite alpha")
    modules = _adaptable(model)
    paths = lora_targets(model, names)
    model.freeze()
    for path, layer_key in zip(paths, mx.random.split(key, len(paths)), strict=True):
        layer = modules[path]
        if type(layer) not in ADAPTED:
            raise ModelError(path, f"is a {type(layer).__name__}, to which no LoRA is trained", "train on float ones")
        out, *inner = layer.weight.shape
        bound = math.prod(inner) ** -0.5
        layer.__class__ = ADAPTED[type(layer)]
        layer.lora_down = mx.random.uniform(-bound, bound, (rank, *inner), key=layer_key)
        layer.lora_up = mx.zeros((out, *([1] * (len(inner) - 1)), rank))
        layer.lora_alpha = alpha
        layer.unfreeze(recurse=False, keys=["lora_down", "lora_up"])
    return model


def attached_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapters that `attach_lora` gave a model, as they are trained by now."""
    return {
        path: LoraLayer(path, module.lora_down, module.lora_up, module.lora_alpha)
        for path, module in _adaptable(model).items()
        if isinstance(module, tuple(ADAPTED.values()))
    }


def delta(layer: LoraLayer, scale: float = 1.0) -> mx.array:
    """What a layer adds to its module's weight, float32: scale * alpha / rank * up @ down.

    A 1x1 kernel behind another kernel is a matrix product over the channels, so convolutions need nothing more.

    Raises:
        ModelError: down and up do not belong together.
    """
    shape = layer.shape
    down = layer.down.reshape(layer.rank, -1).astype(mx.float32)
    up = layer.up.reshape(shape[0], layer.rank).astype(mx.float32) * (scale * layer.alpha / layer.rank)
    return (up @ down).reshape(shape)


def fuse(model: nn.Module, layers: Mapping[str, LoraLayer], scale: float = 1.0) -> None:
    """Adds the layers of one component of one adapter to the model's weights; see `fuse_adapters`."""
    fuse_adapters({"model": model}, [(Adapter("lora", {"model": layers}), scale)])


def fuse_adapters(models: Mapping[str, nn.Module], adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Adds adapters to the weights, after which a step costs what it cost before.

    The changes of a weight are summed in float32, and the sum is rounded to the weight's type once. One module is
    computed at a time, so that the float32 copies do not pile up. A quantised layer is unpacked and packed again with
    its own settings, which keeps of a small change only what the coarser steps can hold: fuse first, then quantise.

    Prompts that were prepared before hold keys and values of the old weights.

    Args:
        models: the components by the names that the adapters use.
        adapters: each with its scale, any finite number; 0 changes nothing.

    Raises:
        UsageError: a scale that is not finite.
        ModelError: a module that a component has not, or a weight of another shape, in which case nothing has been
            changed; or a sum too large for the weight's type, in which case the models have to be loaded again.
    """
    for adapter, scale in adapters:
        _checked_scale(scale)
        for component in adapter.layers:
            if component not in models:
                raise ModelError(adapter.name, f"has layers for {component!r}, which this model has not")
    changes = [change for component, model in models.items() for change in _changes(component, model, adapters)]
    for where, module, weighted in changes:
        _add(where, module, sum((delta(layer, scale) for layer, scale in weighted[1:]), delta(*weighted[0])))


def _changes(
    component: str, model: nn.Module, adapters: Sequence[tuple[Adapter, float]]
) -> list[tuple[str, nn.Module, list[tuple[LoraLayer, float]]]]:
    """(name, module, its layers with their scales) of every module of a component that changes."""
    modules = _adaptable(model)
    weighted: dict[str, list[tuple[LoraLayer, float]]] = {}
    for adapter, scale in adapters:
        for path, layer in adapter.layers.get(component, {}).items():
            where = f"{adapter.name}: {component}.{path}"
            if path not in modules:
                raise ModelError(where, "no linear layer or convolution of this model is called so")
            if layer.shape != _weight_shape(modules[path]):
                expected = _weight_shape(modules[path])
                raise ModelError(where, f"changes a weight of shape {layer.shape}, this model's has {expected}")
            if scale:
                weighted.setdefault(path, []).append((layer, scale))
    return [(f"{component}.{path}", modules[path], layers) for path, layers in weighted.items()]


def _add(where: str, module: nn.Module, change: mx.array) -> None:
    """Adds to a module's weight in float32 and rounds once."""
    if isinstance(module, nn.QuantizedLinear):
        settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        # Affine scales have the type of the layer's inputs; those of the other modes are bytes.
        dtype = module.scales.dtype if mx.issubdtype(module.scales.dtype, mx.floating) else mx.float32
        weight = mx.dequantize(module.weight, module.scales, module.get("biases"), **settings, dtype=mx.float32)
        total = weight + change
        packed = dict(zip(("weight", "scales", "biases"), mx.quantize(total.astype(dtype), **settings), strict=False))
    else:
        dtype = module.weight.dtype
        total = module.weight.astype(mx.float32) + change
        packed = {"weight": total.astype(dtype)}
    largest = mx.maximum(total.max(), -total.min())
    mx.eval(packed, largest)
    if not largest.item() <= mx.finfo(dtype).max:  # nor is NaN
        raise ModelError(
            where, f"with the LoRA added, values go beyond {dtype}", "use a smaller scale, or --dtype bfloat16"
        )
    module.update(packed)
