"""Words of messages: numbers with their nouns."""

from __future__ import annotations

from collections.abc import Sequence


def count_of(number: int, noun: str) -> str:
    """Format a number with its noun, in the plural unless it is 1.

    Example:
        >>> count_of(1, "class"), count_of(2, "class"), count_of(0, "batch"), count_of(1200, "epoch")
        ('1 class', '2 classes', '0 batches', '1,200 epochs')
    """
    plural = noun if number == 1 else f"{noun}es" if noun.endswith(("s", "tch")) else f"{noun}s"
    return f"{number:,} {plural}"


def name_some(names: Sequence[str], most: int = 3) -> str:
    """List names, and count those beyond the first.

    Example:
        >>> name_some(["a", "b"]), name_some(["a", "b", "c", "d"])
        ('a, b', 'a, b, c and 1 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def shorten(text: str, length: int) -> str:
    """Truncate a text to ``length`` characters.

    Example:
        >>> shorten("astrocyte", 9), shorten("astrocytes", 9)
        ('astrocyte', 'astrocyt…')
    """
    return text if len(text) <= length else f"{text[: length - 1]}…"
