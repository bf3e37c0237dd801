"""Tables, counts and progress bars of the commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from a2fpn.evaluation import CocoMetrics


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text with the columns one below the other."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def progress_bar() -> Progress:
    """A progress bar on standard error, so that standard output stays clean."""
    return Progress(console=Console(stderr=True))


def count_of(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def ap_text(metrics: CocoMetrics, kind: str, name: str = "ap") -> str:
    """A number of an evaluation for people; nothing for one that the kind of IoU doesn't have."""
    value = metrics.to_dict(per_class=True).get(f"{kind}/{name}")
    return "" if value is None else "-" if value < 0 else f"{value:.3f}"


def table(label: str, *numbers: str) -> Table:
    """A table with a column of labels and columns of numbers."""
    table = Table(label)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def as_text(value: Any) -> str:
    """A JSON value for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value))
    return str(value)
