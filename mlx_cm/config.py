"""Configurations: frozen dataclasses read strictly from JSON, so that a misread setting is an error, not a picture."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from mlx_cm.errors import ModelError

ConfigT = TypeVar("ConfigT")

LARGEST = 2**31  # sizes of MLX arrays are 32-bit


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """Builds a config dataclass from JSON values; JSON lists become tuples.

    Keys that begin with an underscore are notes of the writing program and are passed over.

    Args:
        cls: the dataclass.
        values: the JSON object.
        where: the file's name, for messages.

    Raises:
        ModelError: a key the config does not know, a value of another type, or one the config itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    unknown = sorted(set(given) - fields)
    if unknown:
        raise ModelError(where, f"{cls.__name__} does not know {', '.join(unknown[:10])}")
    try:
        return cls(**{key: _coerce(value, hints[key], key) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise ModelError(where, str(error)) from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config, every field written out."""
    return dataclasses.asdict(config)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _coerce(value, option, key)
            except TypeError:
                continue
        raise TypeError(f"{key}: expected {hint}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{key}: expected a list, got {value!r}")
        return tuple(_coerce(item, arguments[0], key) for item in value)
    if hint is type(None):
        expected = value is None
    elif hint is float:
        expected = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif hint is int:
        expected = isinstance(value, int) and not isinstance(value, bool)
    else:
        expected = isinstance(value, origin or hint)
    if not expected:
        raise TypeError(f"{key}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    if hint is int and abs(value) >= LARGEST:
        raise TypeError(f"{key}: expected a number below 2^31, got {value}")
    return float(value) if hint is float else value
