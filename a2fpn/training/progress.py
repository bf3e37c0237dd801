"""Progress of a run: a live table on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from a2fpn.training.monitor import Throughput, get_logger

logger = get_logger(__name__)

_SHOWN_EPOCHS = 8
_MOST_LOSSES = 6  # losses with their own column
_METRICS = {"bbox/ap": "box AP", "segm/ap": "mask AP", "keypoints/ap": "keypoint AP"}


def duration(seconds: float) -> str:
    """Format a duration.

    Example:
        >>> duration(7), duration(754), duration(7500)
        ('7 s', '12 min 34 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


LineT = TypeVar("LineT", bound="ProgressLine")


class ProgressLine:
    """A progress bar on a terminal, nothing elsewhere.

    Args:
        title: Title of the bar.
        total: Number of steps.
        shown: Whether to show it, on the main process only.
        done: Steps already done.
    """

    def __init__(self, title: str, total: int, *, shown: bool, done: int = 0) -> None:
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._live: Live | None = None
        if shown and console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}"))
            self._bar = Progress("{task.description}", *columns, console=console)
            self._task = self._bar.add_task(title, total=total, completed=done, info="")
            self._live = Live(self._bar, console=console, transient=True)

    def __enter__(self: LineT) -> LineT:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def advance(self) -> None:
        """Count one step."""
        if self._bar:
            self._bar.advance(self._task)


class RunBoard:
    """Table of a run: losses and average precision per epoch, the best epoch, and the remaining time.

    Args:
        shown: Whether to show it, on the main process only.
        total_steps: Steps of the run.
        place: Steps already done.
    """

    def __init__(self, shown: bool, *, total_steps: int, place: int = 0) -> None:
        self.shown = shown
        self._total_steps = total_steps
        self._began, self._first_place = time.perf_counter(), place
        self._records: list[tuple[Mapping[str, Any], bool]] = []

    def training(self, epoch: int, epochs: int, total: int, *, done: int = 0) -> EpochLine:
        """Show the training of an epoch.

        Args:
            epoch: Its index.
            epochs: Number of epochs.
            total: Number of its steps.
            done: Steps of it already done.
        """
        return EpochLine(f"Epoch {epoch + 1}/{epochs}", total, self, done=done)

    def add(self, record: Mapping[str, Any], *, best: bool) -> None:
        """Add the record of a finished epoch.

        Args:
            record: A line of ``metrics.jsonl``.
            best: Whether it is the best one so far.
        """
        if best:
            self._records = [(old, False) for old, _ in self._records]
        self._records.append((record, best))

    def remaining(self, place: int) -> float | None:
        """Estimate the remaining seconds, including evaluations, from this process so far; None at first."""
        done = place - self._first_place
        if done < 1:
            return None
        return (time.perf_counter() - self._began) / done * (self._total_steps - place)

    def table(self, current: Mapping[str, Any] | None = None) -> Table:
        """Build the table of the last epochs and the current one.

        Args:
            current: Means so far of the current epoch, named as in a record.
        """
        rows = [*self._records[-_SHOWN_EPOCHS:], *([(current, False)] if current else [])]
        names = {name: None for record, _ in rows for name in record if name.startswith("train/")}
        losses = [name for name in names if name != "train/loss"]
        shown = ["train/loss", *(losses if len(losses) <= _MOST_LOSSES else [])]
        metrics = {name: title for name, title in _METRICS.items() if any(name in record for record, _ in rows)}
        table = Table(box=None, pad_edge=False)
        titles = [name.removeprefix("train/").removeprefix("loss_") for name in shown]
        for title in ("epoch", *titles, *metrics.values(), "images/s", ""):
            table.add_column(title, justify="left" if title == "" else "right")
        for record, best in rows:
            values = [f"{record[name]:.4f}" if name in record else "" for name in (*shown, *metrics)]
            speed = f"{record['images_per_second']:.1f}" if "images_per_second" in record else ""
            table.add_row(str(record["epoch"]), *values, speed, "best" if best else "", style="bold" if best else "")
        return table


class EpochLine(ProgressLine):
    """The board of a run above the progress bar of the current epoch; log lines without a terminal.

    Args:
        title: Title of the epoch.
        total: Number of its steps.
        board: Board of the run.
        done: Steps already done.
    """

    def __init__(self, title: str, total: int, board: RunBoard, *, done: int = 0) -> None:
        super().__init__(title, total, shown=board.shown, done=done)
        self._title, self._board = title, board
        self._epoch = int(title.split()[1].partition("/")[0])
        self._draw(None)

    def show(self, step: int, place: int, losses: Mapping[str, float], lr: float, throughput: Throughput) -> None:
        """Show the state of the training.

        Args:
            step: Optimizer step.
            place: Steps of the run already done.
            losses: Means since the last call.
            lr: Learning rate.
            throughput: Throughput since the last call.
        """
        left = self._board.remaining(place)
        rest = f"  {duration(left)} left" if left else ""
        info = f"lr {lr:.2e}  {throughput}{rest}"
        logger.log(
            logging.DEBUG if self._bar else logging.INFO,  # to the log file only, since the table shows it
            "%s  step %d  loss %.4f  %s",
            self._title,
            step,
            losses.get("loss", math.nan),
            info,
        )
        if self._bar:
            self._bar.update(self._task, info=info)
        named = {f"train/{name}": value for name, value in losses.items()}
        self._draw({"epoch": self._epoch, **named, "images_per_second": throughput.images_per_second})

    def _draw(self, current: Mapping[str, Any] | None) -> None:
        if self._live and self._bar:
            table = self._board.table(current)
            self._live.update(Group(table, self._bar) if table.row_count else self._bar)
