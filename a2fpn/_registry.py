"""Named components: register by decorator, look up with a helpful error."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from a2fpn._plugins import load_plugins
from a2fpn.errors import ConfigError

T = TypeVar("T")
_NO_WORDS: Mapping[str, str] = MappingProxyType({})


def did_you_mean(name: str, known: Iterable[str], words: Mapping[str, str] = _NO_WORDS) -> str:
    """Return a sentence with the closest known names, or the first twenty of all when nothing is close.

    Args:
        name: What the user wrote.
        known: The names that would have been accepted.
        words: Our names for words of other libraries, see :mod:`a2fpn._words`, looked up by the name or its part
            after the last dot; preferred to names of similar spelling.

    Example:
        >>> did_you_mean("a2fnp", ["fpn", "a2fpn"])
        "Did you mean 'a2fpn'?"
        >>> did_you_mean("pth", ["path", "path"])
        "Did you mean 'path'?"
        >>> did_you_mean("conf", ["config", "score_threshold"], {"conf": "score_threshold"})
        "Did you mean 'score_threshold'?"
        >>> did_you_mean("SOLVER.BASE_LR", ["optim.lr"], {"base_lr": "optim.lr"})
        "Did you mean 'optim.lr'?"
    """
    known = sorted(set(known))
    word = name.lower().replace("-", "_")
    meant = words.get(word) or words.get(word.rpartition(".")[2])
    if meant is not None:
        return meant if " " in meant else f"Did you mean {meant!r}?"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"Known: {', '.join(known[:20])}{more}."


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key under which ``r18`` comes before ``r101``.

    Example:
        >>> sorted(["r101", "r18"], key=natural_key)
        ['r18', 'r101']
    """
    text, *rest = re.split(r"(\d+)", name)
    key = [(0, text)]
    for digits, text in zip(rest[::2], rest[1::2], strict=True):
        # Numbers as text: a name may have more digits than int() accepts.
        number = digits.lstrip("0")
        key += [(len(number), number), (0, text)]
    return key


class Registry(Generic[T]):
    """Maps names to components of one kind.

    Args:
        kind: What the registry holds, for messages ("neck", "detector").

    Example:
        >>> shapes: Registry[type] = Registry("shape")
        >>> @shapes.register("circle")
        ... class Circle: ...
        >>> shapes["circle"].__name__
        'Circle'
        >>> shapes["circel"]
        Traceback (most recent call last):
        ...
        a2fpn.errors.ConfigError: Unknown shape 'circel'. Did you mean 'circle'?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a component under ``name``.

        Raises:
            ValueError: If the name is taken.
        """

        def decorator(item: T) -> T:
            if name in self._items:
                raise ConfigError(
                    f"The {self.kind} name {name!r} is already registered by {self._items[name]!r}; choose another "
                    "name."
                )
            self._items[name] = item
            return item

        return decorator

    def __getitem__(self, name: str) -> T:
        if name not in self._items and not (load_plugins() and name in self._items):
            raise ConfigError(f"Unknown {self.kind} {name!r}. {did_you_mean(name, self._items)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self, pattern: str = "") -> list[str]:
        """Registered names in natural order, filtered by a wildcard pattern or a substring."""
        return match_names(self._items, pattern)


def match_names(names: Iterable[str], pattern: str = "") -> list[str]:
    """Names that match a wildcard pattern; a pattern without wildcards matches as a substring.

    Example:
        >>> match_names(["maskrcnn_fpn_r18", "fasterrcnn_fpn_r18"], "mask*")
        ['maskrcnn_fpn_r18']
        >>> match_names(["a2fpn", "fpn", "pafpn"], "a")
        ['a2fpn', 'pafpn']
    """
    if not any(character in pattern for character in "*?["):
        pattern = f"*{pattern}*"
    return sorted((name for name in names if fnmatch.fnmatchcase(name, pattern)), key=natural_key)
