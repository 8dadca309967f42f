"""Finds the weights in what a pickle holds: a flat state dict, one inside a training checkpoint, or a nested one."""

import logging
from typing import Any

from mlx_cm.convert.readers.pickle_data import Opaque, Symbol
from mlx_cm.convert.readers.torch_tensors import Tensor
from mlx_cm.errors import ModelError

logger = logging.getLogger("mlx_cm")

# Where training programs keep the weights, in order of preference: Lightning, then averaged weights before raw ones,
# since averaged weights are what one samples with.
WRAPPERS = (
    "state_dict",
    "ema",
    "ema_state_dict",
    "params_ema",
    "model_state_dict",
    "model",
    "params",
)

DEEPEST = 32
MOST_VISITS = 250_000
MOST_TENSORS = 100_000
LONGEST_NAME = 512


def find_state_dict(value: Any, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Flattens the weights in `value` to dotted names.

    Returns:
        The tensors by name, and what was passed over: name => what it was.

    Raises:
        ModelError: no tensors, two of one name, or a structure without end.
    """
    if isinstance(value, Opaque):
        why = f"holds a {value.what}, where a dictionary of tensors is expected"
        raise ModelError(where, why, "save the model's state_dict() with torch.save")
    if isinstance(value, dict):
        wrapped = {key: _flatten(value[key], where) for key in WRAPPERS if isinstance(value.get(key), dict)}
        holding = [key for key, (tensors, _) in wrapped.items() if tensors]
        if holding:
            chosen, *others = holding
            if others:
                logger.warning("%s: reads the weights under %r, not those under %s", where, chosen, others)
            tensors, skipped = wrapped[chosen]
            beside = {_join("", key): _describe(entry) for key, entry in value.items() if key != chosen}
            return tensors, beside | skipped
    tensors, skipped = _flatten(value, where)
    if not tensors:
        raise ModelError(where, f"holds no named tensors ({_describe(value)})")
    return tensors, skipped


def _flatten(value: Any, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    visits = 0

    def walk(value: Any, name: str, depth: int) -> dict[str, str]:
        """Adds the tensors below `value` and returns what is none; a container without tensors counts as one."""
        nonlocal visits
        visits += 1
        if depth > DEEPEST or visits > MOST_VISITS or len(tensors) > MOST_TENSORS:
            raise ModelError(where, "its pickle holds a structure too deep or too large for a checkpoint")
        if isinstance(value, Tensor) and name:
            if len(name) > LONGEST_NAME or not name.isprintable():
                raise ModelError(where, f"has a tensor with an impossible name ({name[:80]!r})")
            if name in tensors:
                raise ModelError(where, f"has two tensors named {name!r}")
            tensors[name] = value
            return {}
        if not isinstance(value, (dict, list, tuple)):
            return {name: _describe(value)}
        before, skipped = len(tensors), {}
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) or type(key) is int:
                skipped |= walk(entry, _join(name, key), depth + 1)
            else:
                skipped[_join(name, _describe(key))] = _describe(entry)
        return skipped if len(tensors) > before else {name: _describe(value)}

    return tensors, walk(value, "", 0)


def _join(name: str, key: Any) -> str:
    """The dotted name, cut where it is too long for a tensor: keys may be shared and of any length."""
    return f"{name}.{str(key)[:LONGEST_NAME]}"[: LONGEST_NAME + 1] if name else str(key)[: LONGEST_NAME + 1]


def _describe(value: Any) -> str:
    if isinstance(value, Opaque):
        return value.what
    if isinstance(value, Symbol):
        return f"the name {value.path}"
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, (dict, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return "None" if value is None else type(value).__name__
