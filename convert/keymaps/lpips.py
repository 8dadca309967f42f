"""LPIPS as it is published: whole by the `lpips` package, or the network by torchvision and the heads by themselves.

The references are richzhang/PerceptualSimilarity `lpips/lpips.py`, pytorch/vision `torchvision/models/vgg.py` and
photosynthesis-team/piq `piq/perceptual.py`.
"""

from collections.abc import Mapping

from mlx_cm.convert.keymaps.rules import Drop, Move, Rule, RuleLike
from mlx_cm.errors import ModelError
from mlx_cm.models.lpips import COLOURS, STAGES
from mlx_cm.storage import TensorSource

Tensors = Mapping[str, TensorSource]

# The package's network is torchvision's, cut into slices that keep its numbers.
SLICES = {number: f"net.slice{stage}.{number}" for stage, numbers in enumerate(STAGES, 1) for number in numbers}
FEATURES = {number: f"features.{number}" for number in SLICES}
# How the heads are called. The package has each of them twice, as an attribute and in a list, after a dropout or
# without; `piq` publishes a plain list of tensors.
HEADS = (
    "lin{}.model.1.weight",
    "lin{}.model.0.weight",
    "lins.{}.model.1.weight",
    "lins.{}.model.0.weight",
    "{}",
)
SCALING = "scaling_layer."
NOT_NEEDED = (
    Drop("", "shift and scale of the colours, constants", prefix=SCALING),
    # Of torchvision and of timm.
    *(Drop("", "names what is in a picture", prefix=prefix) for prefix in ("classifier.", "pre_logits.", "head.")),
)


def has_network(tensors: Tensors) -> bool:
    """Whether the names of VGG16's convolutions are among the tensors'."""
    return any(all(f"{name}.weight" in tensors for name in names.values()) for names in (FEATURES, SLICES))


def has_heads(tensors: Tensors) -> bool:
    """Whether heads are among the tensors: for each stage weights of one output, (1, C, 1, 1)."""
    return bool(_spellings(tensors))


def lpips_rules(tensors: Tensors) -> list[RuleLike]:
    """The name table for these tensors, which hold network and heads."""
    spelling, *others = _spellings(tensors)
    stages = range(len(STAGES))
    rules: list[RuleLike] = [*NOT_NEEDED]
    rules += [Move(name, FEATURES[number]) for number, name in SLICES.items()]
    rules += [Rule(spelling.format(stage), (f"lins.{stage}.weight",)) for stage in stages]
    for other in others:
        names = [other.format(stage) for stage in stages]
        rules += [Drop(name, "the same heads once more", prefix=name) for name in names]
    return rules


def lpips_config(tensors: Tensors) -> dict[str, object]:
    """Reads the widths off the network; how it is used leaves no trace in the tensors.

    Returns:
        Fields of an `LPIPSConfig`.

    Raises:
        ModelError: the first convolution does not take colours.
    """
    names = FEATURES if f"{FEATURES[0]}.weight" in tensors else SLICES
    first = tensors[f"{names[0]}.weight"]
    if len(first.shape) != 4 or first.shape[1] != COLOURS:
        raise ModelError("checkpoint", f"{first.name}: expected (out, {COLOURS}, 3, 3), got {first.shape}")
    return {"block_out_channels": tuple(tensors[f"{names[numbers[0]]}.weight"].shape[0] for numbers in STAGES)}


def _spellings(tensors: Tensors) -> list[str]:
    """The names under which there is a head for every stage."""
    return [
        spelling
        for spelling in HEADS
        if all(_is_head(tensors.get(spelling.format(stage))) for stage in range(len(STAGES)))
    ]


def _is_head(tensor: TensorSource | None) -> bool:
    return tensor is not None and len(tensor.shape) == 4 and (tensor.shape[0], *tensor.shape[2:]) == (1, 1, 1)
