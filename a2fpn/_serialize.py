"""Frozen dataclasses <-> JSON-serializable built-ins, with every key and type checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from a2fpn._registry import did_you_mean
from a2fpn.errors import ConfigError, ConfigTypeError

ConfigT = TypeVar("ConfigT")

COUNT = (1, math.inf)
NOT_NEGATIVE = (0, math.inf)
POSITIVE = (math.nextafter(0, 1), math.inf)
SHARE = (0, 1)
"""Bounds for :func:`check_fields`."""

RENAMED = {
    "centre_radius": "center_radius",
    "code_licence": "code_license",
    "colour_jitter": "color_jitter",
    "data_licence": "data_license",
    "licence": "license",
}
"""Keys of checkpoints and recipes as they were spelled before 0.2.0; they are still read."""


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to JSON-serializable built-ins.

    Example:
        >>> from a2fpn.config import Category
        >>> to_dict(Category(7, "cat"))
        {'id': 7, 'name': 'cat'}
    """
    return typing.cast("dict[str, Any]", plain(dataclasses.asdict(config)))


def plain(value: Any) -> Any:
    """Convert mappings to dicts and tuples to lists, recursively."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def migrate_keys(data: Any) -> Any:
    """Rename keys of older checkpoints and recipes, at any depth; if both names occur, the current one wins.

    Args:
        data: Parsed JSON or YAML; not changed.

    Example:
        >>> migrate_keys({"heads": {"centre_radius": 1.5}})
        {'heads': {'center_radius': 1.5}}
    """
    if isinstance(data, Mapping):
        renamed = {RENAMED[key]: migrate_keys(value) for key, value in data.items() if key in RENAMED}
        return renamed | {key: migrate_keys(value) for key, value in data.items() if key not in RENAMED}
    if isinstance(data, list):
        return [migrate_keys(item) for item in data]
    return data


def from_dict(cls: type[ConfigT], data: Any, *, where: str = "config") -> ConfigT:
    """Build a configuration dataclass from built-ins, checking every key and every type.

    Args:
        cls: The dataclass to build. A class method ``field_types(data)`` gives types that depend on the data.
        data: A mapping, usually parsed from JSON.
        where: Name of the place in messages.

    Raises:
        ValueError: For an unknown or missing key, or a value that is not one of the choices.
        TypeError: For a value of the wrong type.

    Example:
        >>> from a2fpn.config import Category
        >>> from_dict(Category, {"id": 7, "name": "cat"})
        Category(id=7, name='cat')
        >>> from_dict(Category, {"id": 7, "nme": "cat"})
        Traceback (most recent call last):
        ...
        a2fpn.errors.ConfigError: config: unknown key 'nme' for Category. Did you mean 'name'?
    """
    if not isinstance(data, Mapping):
        raise ConfigTypeError(
            f"{where}: expected an object with the fields of {cls.__name__}, got {type(data).__name__}."
        )
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r} for {cls.__name__}. {did_you_mean(str(key), fields)}")
    hints = typing.get_type_hints(cls)
    depends = getattr(cls, "field_types", None)
    if depends is not None:
        hints |= depends(data)
    values = {key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in data.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where}: the key {name!r} of {cls.__name__} is missing.")
    return cls(**values)


def check_fields(config: Any, where: str, **bounds: tuple[float, float]) -> None:
    """Validate a frozen dataclass in its ``__post_init__``; lists become tuples, integers floats.

    Args:
        config: The dataclass.
        where: Name of the place in messages.
        bounds: Minimum and maximum per field, for tuples of each item; None is always valid.

    Raises:
        ConfigError: For a number out of bounds, or a value that is not one of the choices.
        ConfigTypeError: For a value of the wrong type.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = _convert(hint, getattr(config, name), f"{where}.{name}".lstrip("."))
        object.__setattr__(config, name, value)
    for name, (least, largest) in bounds.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not least <= number <= largest:  # NaN is out of bounds too
                low = f"at least {least}" if least != POSITIVE[0] else "more than 0"
                high = "" if largest == math.inf else f" and at most {largest}"
                raise ConfigError(f"{where}.{name} must be {low}{high}, got {number}.")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check a JSON value against a type hint and convert it to the dataclass's types."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return (
            value
            if isinstance(value, typing.cast(type, hint))
            else from_dict(typing.cast(type, hint), value, where=where)
        )
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(repr, args))}, got {value!r}.")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        *others, last = [arg for arg in args if arg is not type(None)]
        return value if type(value) in others else _convert(last, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigTypeError(f"{where}: expected a list, got {value!r}.")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(value) != len(kinds):
            raise ConfigError(f"{where}: expected a list of {len(kinds)}, got {value!r}.")
        items = zip(kinds, value, strict=True)
        return tuple(_convert(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigTypeError(f"{where}: expected an object, got {value!r}.")
        return {str(key): item for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigTypeError(f"{where}: expected {hint.__name__}, got {value!r}.")
    return value
