"""Tables, counts and progress bars of the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from a2fpn.evaluation import CocoMetrics


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text with the columns one below the other."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


class _Rate(ProgressColumn):
    """Items in a second, or seconds for one of slow ones."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


def progress_bar(*, quiet: bool = False, transient: bool = False) -> Progress:
    """A progress bar with rate and remaining time on standard error, so that standard output stays clean.

    Args:
        quiet: Whether it stays away.
        transient: Whether it goes when it is done, and stays away where there is no terminal.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(elapsed_when_finished=True))
    return Progress(
        "{task.description}",
        *columns,
        console=console,
        transient=transient,
        disable=quiet or (transient and not console.is_terminal),
    )


def say(text: object, *, quiet: bool = False) -> None:
    """Write a line to standard output, unless it is to be quiet."""
    if not quiet:
        typer.echo(text)


def write_json(value: Any, path: Path | None) -> None:
    """Write JSON for machines.

    Args:
        value: What :mod:`json` writes.
        path: The file; ``-`` is standard output, None writes nothing.
    """
    if path is None:
        return
    text = json.dumps(value, indent=2) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")


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
