"""Settings as text: YAML, dotted names, and the merging of recipes and command-line arguments."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from a2fpn._serialize import migrate_keys
from a2fpn._words import SETTINGS
from a2fpn.errors import ConfigError, ConfigTypeError
from a2fpn.training.config import TrainConfig


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 with 1e-3 as a float, as in YAML 1.2, and dates as text."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Dumper that quotes strings which :class:`_Loader` would read as another type."""


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in _kind.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str, where: str) -> Any:
    """Read YAML.

    Raises:
        ConfigError: If it is invalid; the message begins with ``where``.

    Example:
        >>> load_yaml("{lr: 1e-3, date: 2026-01-01}", "recipe")
        {'lr': 0.001, 'date': '2026-01-01'}
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: invalid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """Write YAML that :func:`load_yaml` reads back as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names.

    Example:
        >>> flat({"optim": {"lr": 1.0, "name": "sgd"}})
        {'optim.lr': 1.0, 'optim.name': 'sgd'}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def setting_names(section: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting.

    Example:
        >>> "optim.lr" in setting_names()
        True
    """
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            yield from setting_names(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def type_of(name: str) -> Any:
    """Type of a setting or section; Any for keys of a free-form one such as ``model.overrides``.

    Raises:
        ConfigError: If there is no such setting, with the closest one.

    Example:
        >>> type_of("optim.lr"), type_of("model.overrides.neck_args.out_channels")
        (<class 'float'>, typing.Any)
        >>> type_of("optim.lrr")
        Traceback (most recent call last):
        ...
        a2fpn.errors.ConfigError: unknown setting 'optim.lrr'. Did you mean 'optim.lr'?
    """
    hint: Any = TrainConfig
    for part in name.split("."):
        if get_origin(hint) is dict:
            return Any
        hints = get_type_hints(hint) if is_dataclass(hint) else {}
        if part not in hints:
            known = list(setting_names())
            by_last_part = {setting.rpartition(".")[2]: setting for setting in known}
            meant = SETTINGS.get(name.lower()) or SETTINGS.get(name.lower().rpartition(".")[2])
            if meant is not None:
                raise ConfigError(
                    f"unknown setting {name!r}. {f'Did you mean {meant!r}?' if ' ' not in meant else meant}"
                )
            close = difflib.get_close_matches(name, known, n=1) or [
                by_last_part[last] for last in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=1)
            ]
            advice = f"Did you mean '{close[0]}'?" if close else "See --help for all settings."
            raise ConfigError(f"unknown setting {name!r}. {advice}")
        hint = hints[part]
    return hint


def read_value(name: str, text: str) -> Any:
    """Parse a setting from the command line as YAML, or as plain text for settings of that type.

    Example:
        >>> read_value("data.root", "2026"), read_value("run.seed", "2026"), read_value("run.resume", "true")
        ('2026', 2026, True)
    """
    hint = type_of(name)
    accepted = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if str not in accepted and get_origin(hint) is not Literal:
        return load_yaml(text, name)
    if len(accepted) > 1:
        value = load_yaml(text, name) if text.lower() in ("", "~", "null", "true", "false") else text
        return value if type(value) in accepted else text
    return text


def assign(settings: Mapping[str, Any], name: str, value: Any, *, merge: bool = True) -> dict[str, Any]:
    """Return nested settings with one changed.

    Args:
        settings: Nested dictionaries.
        name: Dotted name; other settings are kept.
        value: Its new value.
        merge: Whether to merge a dictionary into the old one instead of replacing it.

    Example:
        >>> assign({"a": {"x": 1, "y": 2}}, "a.y", 3)
        {'a': {'x': 1, 'y': 3}}
        >>> assign({"a": {"x": 1}}, "a", {"y": 3}), assign({"a": {"x": 1}}, "a", {"y": 3}, merge=False)
        ({'a': {'x': 1, 'y': 3}}, {'a': {'y': 3}})
    """
    first, _, rest = name.partition(".")
    old = settings.get(first)
    known = old if isinstance(old, Mapping) else {}
    if rest:
        value = assign(known, rest, value, merge=merge)
    elif merge and isinstance(value, Mapping):
        for key, item in value.items():
            known = assign(known, str(key), item)
        value = known
    return {**settings, first: value}


def read_file(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file; keys of older versions are renamed.

    Raises:
        ConfigError: If it contains anything but known settings.
    """
    try:
        settings = migrate_keys(load_yaml(path.read_text(encoding="utf-8"), str(path)))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text.") from None
    if not isinstance(settings or {}, dict):
        raise ConfigTypeError(f"{path}: expected settings by section, got {settings!r}.")
    for name in flat(settings or {}):
        type_of(name)
    return typing.cast("dict[str, Any]", settings or {})


def read_arguments(arguments: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Parse ``section.key=value``, ``--section.key=value`` and ``--section.key value``.

    Raises:
        ConfigError: For an unknown setting, a missing value, or any other argument.
    """
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals and not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}; expected section.key=value.")
        type_of(name)
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise ConfigError(f"--{name} needs a value: {name}=VALUE.")
        yield name, read_value(name, text)
