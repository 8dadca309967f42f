"""Linear layers in 4 or 8 bits: each weight an integer, each group of adjacent inputs with a scale and a bias.

Convolutions have no such form in MLX. So the U-Net of SDXL, nearly all linear, shrinks to 0.38 of its float16 size in
4 bits, that of Stable Diffusion 1 to 0.8. Quantisation saves memory, not time.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_cm.backend import on_gpu
from mlx_cm.errors import ModelError, UsageError
from mlx_cm.models.clip_text import CLIPTextModel
from mlx_cm.models.unet2d_condition import UNet2DCondition

BITS = (4, 8)
GROUP_SIZES = (
    64,
    32,
)  # inputs that share a scale; the first that divides the width. 320, the narrowest of SD, takes 64
STAYS_FLOAT = 0  # in place of a group size

# What is quantised => the names of its linear layers that are not, beside those in its `float32_parts`. They make one
# vector of the timestep or the whole prompt that acts on all positions alike, so their errors cannot average out over a
# map; and they hold one to three hundredths of the weights.
FLOAT_LAYERS = {UNet2DCondition: ("time_emb_proj",), CLIPTextModel: ("text_projection",)}


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of one component are stored: affine, weight = integer * scale + bias."""

    bits: int
    group_size: int = GROUP_SIZES[0]
    exceptions: dict[str, int] = field(default_factory=dict)  # path of a layer => its group size; 0: it stays float

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits: expected one of {list(BITS)}, got {self.bits}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected one of {list(GROUP_SIZES)}, got {self.group_size}")
        for path, size in self.exceptions.items():
            if isinstance(size, bool) or size not in (*GROUP_SIZES, STAYS_FLOAT):
                known = [*GROUP_SIZES, STAYS_FLOAT]
                raise ValueError(f"exceptions: {path}: expected a group size of {known}, got {size!r}")

    def group_size_of(self, path: str) -> int:
        """Group size of a linear layer; 0 where it stays float."""
        return self.exceptions.get(path, self.group_size)


def plan_quantization(model: nn.Module, bits: int) -> Quantization:
    """Which linear layers of a model get which groups, from names and shapes alone.

    Raises:
        UsageError: other bits than 4 and 8, or a model whose layers are not quantised.
        ModelError: the model is quantised already.
    """
    if bits not in BITS:
        raise UsageError(f"quantize {bits}", f"expected one of {', '.join(map(str, BITS))} bits")
    kind = type(model).__name__
    if type(model) not in FLOAT_LAYERS:
        known = ", ".join(one.__name__ for one in FLOAT_LAYERS)
        raise UsageError(f"quantize {bits}", f"{kind} has too few linear layers to gain by it; quantised are {known}")
    stored = quantization_of(model)
    if stored is not None:
        raise ModelError(kind, f"is quantised to {stored.bits} bits already", "quantize the model it was made from")
    sizes = {path: _group_size(model, path, layer.weight.shape[1]) for path, layer in _linear_layers(model).items()}
    return Quantization(bits, exceptions={path: size for path, size in sizes.items() if size != GROUP_SIZES[0]})


def _group_size(model: nn.Module, path: str, width: int) -> int:
    kept = path.startswith(tuple(f"{part}." for part in model.float32_parts))
    if kept or path.rpartition(".")[2] in FLOAT_LAYERS[type(model)]:
        return STAYS_FLOAT
    return next((size for size in GROUP_SIZES if width % size == 0), STAYS_FLOAT)


def quantization_of(model: nn.Module) -> Quantization | None:
    """What a model's weights were rounded to, also where they have been unpacked since; None: they are as trained."""
    return getattr(model, "quantization", None)


def quantize_model(model: nn.Module, bits: int) -> nn.Module:
    """Quantises the linear layers of a model in place; see `plan_quantization` for which.

    A weight in float leaves memory as soon as it is packed. To compute with the model, see `in_device_form`.

    Raises:
        UsageError: other bits than 4 and 8, or a model whose layers are not quantised.
        ModelError: the model is quantised already.
    """
    replace_linear_layers(model, plan_quantization(model, bits))
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear):
            mx.eval(module.parameters())
    return model


def replace_linear_layers(model: nn.Module, quantization: Quantization) -> nn.Module:
    """Puts quantised layers in the place of linear ones, not yet computed.

    Raises:
        ModelError: an exception names no linear layer, or a width cannot be split into its groups.
    """
    layers = _linear_layers(model)
    kind = type(model).__name__
    for path in quantization.exceptions:
        if path not in layers:
            raise ModelError(f"quantization of {path}", f"{kind} has no linear layer of this name")
    for path, layer in layers.items():
        size, width = quantization.group_size_of(path), layer.weight.shape[1]
        if size != STAYS_FLOAT and width % size:
            raise ModelError(f"quantization of {path}", f"{width} inputs cannot be split into groups of {size}")

    def settings(path: str, module: nn.Module) -> bool | dict:
        size = quantization.group_size_of(path) if path in layers else STAYS_FLOAT
        return size != STAYS_FLOAT and {"group_size": size, "bits": quantization.bits, "mode": "affine"}

    nn.quantize(model, class_predicate=settings)
    model.quantization = quantization
    return model


def dequantize_model(model: nn.Module) -> nn.Module:
    """Puts linear layers in the place of quantised ones: the same values, in the type of the scales."""

    def unpack(module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.QuantizedLinear):
            return module
        layer = nn.Linear(1, 1, bias="bias" in module)
        layer.weight = mx.dequantize(
            module.weight,
            module.scales,
            module.biases,
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
        if "bias" in module:
            layer.bias = module.bias
        return layer

    leaves = tree_map_with_path(lambda _, module: unpack(module), model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(leaves)
    return model


def in_device_form(model: nn.Module) -> nn.Module:
    """The form to compute in: quantised on a GPU; on a CPU, where quantised products take 50-200 times longer, float.

    The values are the quantised ones on both.
    """
    return model if on_gpu() else dequantize_model(model)


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
