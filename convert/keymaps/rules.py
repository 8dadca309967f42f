"""Applying a name table to a checkpoint: every tensor is used or dropped with a reason, every parameter is filled."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_cm.errors import ModelError
from mlx_cm.storage import TensorSource

SHOWN = 10  # names listed per kind of fault


@dataclass(frozen=True)
class Rule:
    """One tensor of the source fills one parameter, or several in equal parts along the first axis."""

    source: str
    targets: tuple[str, ...]
    transposed: bool = False  # a matrix that the source stores as (in, out)


@dataclass(frozen=True)
class Move:
    """A module has another place; whatever is inside keeps its names."""

    source: str
    target: str


@dataclass(frozen=True)
class Drop:
    """Tensors whose name ends and begins so are not needed, and why."""

    suffix: str
    reason: str
    prefix: str = ""


RuleLike = Rule | Move | Drop


def rename(source: str, target: str, leaves: Mapping[str, str | tuple[str, ...]] | None = None) -> list[Rule]:
    """Rules for weight and bias of a module, or of each leaf of a block.

    Args:
        source, target: module paths.
        leaves: source leaf => target leaf or leaves; None for a module that is itself a leaf.
    """
    pairs = (
        [(source, (target,))]
        if leaves is None
        else [
            (f"{source}.{leaf}", tuple(f"{target}.{name}" for name in ([names] if isinstance(names, str) else names)))
            for leaf, names in leaves.items()
        ]
    )
    return [
        Rule(f"{module}.{parameter}", tuple(f"{name}.{parameter}" for name in names))
        for module, names in pairs
        for parameter in ("weight", "bias")
    ]


def apply_rules(
    source: Mapping[str, TensorSource],
    rules: Iterable[RuleLike],
    target_shapes: Mapping[str, tuple[int, ...]],
    prefix: str = "",
) -> dict[str, TensorSource]:
    """Maps a PyTorch checkpoint onto a model's parameters.

    A name on which both sides agree needs no rule. A rule for what neither side has is idle: one table serves every
    size of a family. Of rules that apply to a name, a `Drop` comes first, then a `Rule`, then the `Move` of the
    innermost module. Layouts follow from the shapes (`to_channels_last`). Nothing is read from the file.

    Args:
        source: the checkpoint's tensors by name.
        rules: the family's name table.
        target_shapes: shape of every parameter of the model, channels-last.
        prefix: what the names have before them in the file, for messages.

    Returns:
        For every parameter its tensor, in the order of `target_shapes`.

    Raises:
        ModelError: tensors unexplained, parameters unfilled or filled twice, shapes that differ; the first ten of each
            are named.
    """
    rules = list(rules)
    drops = [rule for rule in rules if isinstance(rule, Drop)]
    by_source = {rule.source: rule for rule in rules if isinstance(rule, Rule)}
    moves = {rule.source: rule.target for rule in rules if isinstance(rule, Move)}
    filled: dict[str, TensorSource] = {}
    extra, twice, misshaped = [], [], {}
    for name, tensor in source.items():
        if any(name.endswith(drop.suffix) and name.startswith(drop.prefix) for drop in drops):
            continue
        rule = by_source.get(name) or Rule(name, (_moved(name, moves),))
        if any(target not in target_shapes for target in rule.targets):
            extra.append(prefix + name)
            continue
        try:
            parts = _parts(transposed(tensor) if rule.transposed else tensor, len(rule.targets))
        except ValueError as error:
            misshaped |= dict.fromkeys(rule.targets, f"{prefix}{name}: {error}")
            continue
        for target, part in zip(rule.targets, parts, strict=True):
            if target in filled:
                twice.append(target)
            try:
                filled[target] = replace(to_channels_last(part, target_shapes[target]), name=target)
            except ValueError as error:
                misshaped[target] = f"{prefix}{name}: {error}"
    missing = [name for name in target_shapes if name not in filled and name not in misshaped]
    faults = {
        "missing": missing,
        "not known to this model": extra,
        "filled twice": twice,
        "of another shape": list(dict.fromkeys(misshaped.values())),
    }
    found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in faults.items() if names]
    if found:
        raise ModelError("checkpoint", "does not fit the model; tensors " + "; ".join(found))
    return {name: filled[name] for name in target_shapes}


def transposed(tensor: TensorSource) -> TensorSource:
    """A matrix with its axes exchanged."""
    return _view(tensor, tensor.shape[::-1], lambda array: array.T)


def to_channels_last(tensor: TensorSource, shape: tuple[int, ...]) -> TensorSource:
    """Brings a PyTorch tensor to the layout of a parameter.

    Kernels go from (out, in, height, width) to (out, height, width, in); 1x1 kernels lose their two unit axes where
    the parameter is a matrix. Everything else is laid out alike.

    Raises:
        ValueError: no layout gives the expected shape.
    """
    given = tensor.shape
    if len(given) == len(shape) == 4:
        result = _view(tensor, (given[0], given[2], given[3], given[1]), lambda array: array.transpose(0, 2, 3, 1))
    elif len(shape) == 2 and len(given) in (3, 4) and set(given[2:]) == {1}:
        result = _view(tensor, given[:2], lambda array: array.reshape(given[:2]))
    else:
        result = tensor
    if result.shape != tuple(shape):
        raise ValueError(f"expected {tuple(shape)}, got {result.shape}")
    return result


def to_channels_first(tensor: TensorSource) -> TensorSource:
    """The way back for names that agree: kernels (out, height, width, in) => (out, in, height, width)."""
    if len(tensor.shape) != 4:
        return tensor
    o, h, w, i = tensor.shape
    return _view(tensor, (o, i, h, w), lambda array: array.transpose(0, 3, 1, 2))


def _moved(name: str, moves: Mapping[str, str]) -> str:
    """The name after the move of the innermost module that moves."""
    module = name
    while moves and "." in module:
        module = module.rpartition(".")[0]
        if module in moves:
            return moves[module] + name[len(module) :]
    return name


def _parts(tensor: TensorSource, count: int) -> list[TensorSource]:
    if count == 1:
        return [tensor]
    if not tensor.shape or tensor.shape[0] % count:
        raise ValueError(f"expected {count} equal parts along the first axis, got {tensor.shape}")
    size = tensor.shape[0] // count
    return [
        _view(tensor, (size, *tensor.shape[1:]), lambda array, at=at: array[at : at + size])
        for at in range(0, tensor.shape[0], size)
    ]


def _view(tensor: TensorSource, shape: tuple[int, ...], change: Any) -> TensorSource:
    read = tensor.read

    def changed() -> np.ndarray:
        return change(read())

    return replace(tensor, shape=tuple(shape), read=changed)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
