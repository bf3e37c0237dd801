"""Common parts of the benchmarks: interleaved timing, peak memory in a process of its own, tables of ratios.

Absolute figures belong to the machine and the moment. Ratios travel: both sides take turns in one run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

Call = Callable[[], Any]

Rounds = Annotated[int, typer.Option(help="Rounds; in each, every side runs once.", min=1)]
Quick = Annotated[bool, typer.Option(help="Tiny sizes and one round: does it run at all? Its ratios mean nothing.")]
Threads = Annotated[int, typer.Option(help="Threads of torch; 0 leaves the choice to torch.", min=0)]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Ratio:
    """A ratio with its lowest and highest value over the rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        spread = f" ({self.low:.2f}–{self.high:.2f})" if self.low < self.high else ""
        return f"{self.value:.2f}{spread}"


@dataclass(frozen=True)
class Timings:
    """Seconds of every call in every round.

    Args:
        seconds: Per name one figure per round.
    """

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Median over the rounds, seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Ratio:
        """Median of the rounds' ratios: a disturbance that lasts longer than a round cancels out."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def time_interleaved(calls: Mapping[str, Call], *, rounds: int, warmup: int = 1, title: str = "") -> Timings:
    """Time calls in turns, in reversed order every other round, with a progress bar on stderr.

    Args:
        calls: What to time, by name.
        rounds: How often.
        warmup: Rounds run first and not counted.
        title: Shown beside the bar.

    Returns:
        The timings.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with progress() as bar:
        task = bar.add_task(title, total=len(calls) * (warmup + rounds))
        for turn in range(-warmup, rounds):
            for name in reversed(list(calls)) if turn % 2 else calls:
                bar.update(task, description=f"{title}: {name}")
                start = time.perf_counter()
                calls[name]()
                elapsed = time.perf_counter() - start
                if turn >= 0:
                    seconds[name].append(elapsed)
                bar.advance(task)
    return Timings(seconds)


def progress() -> Progress:
    """A progress bar on stderr, so that the tables alone go into a file."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    return Progress(
        *columns,
        TextColumn("{task.description}"),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    )


def peak_memory(prepare: Callable[..., Call], *args: object) -> float:
    """Peak of the resident memory during a call, beyond what the process held before it.

    The process is a fresh one for each measurement. The call runs once before, so that what libraries allocate
    once and keep counts for neither side.

    Args:
        prepare: A function of a module that makes inputs and weights and returns the call.
        *args: Its arguments; they travel to the other process.

    Returns:
        Bytes; NaN where there is no ``/proc`` (Linux has it).

    Raises:
        RuntimeError: If the other process failed; with its error.
    """
    # A server that has imported the libraries, and run nothing, is forked for each measurement.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "a2fpn.inference"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, prepare, args, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        peak: float | str = receiver.recv()
    except EOFError:
        peak = "it was killed"
    finally:
        process.join()
    if isinstance(peak, str):
        raise RuntimeError(f"The process that measures {prepare.__qualname__}{args} failed: {peak}.")
    return peak


def peak_memories(
    prepare: Callable[..., Call], sides: Iterable[str], *args: object, quick: bool = False
) -> dict[str, float]:
    """Peaks of all sides; if ``quick`` of the first alone, NaN for the others."""
    return {
        side: math.nan if quick and place else peak_memory(prepare, side, *args) for place, side in enumerate(sides)
    }


def _send_peak(sender: Connection, prepare: Callable[..., Call], args: tuple[object, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send(_peak_of(prepare(*args)))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _peak_of(call: Call) -> float:
    if not _CLEAR_REFS.exists():
        return math.nan
    call()
    gc.collect()
    with contextlib.suppress(AttributeError):  # other C libraries than glibc have no such function
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # sets the high-water mark to the present
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024.0 * int(line.split()[1])


def time_parts(
    sides: Mapping[str, tuple[Mapping[str, Iterable[nn.Module]], Call]], *, rounds: int, title: str = ""
) -> dict[str, dict[str, float]]:
    """Seconds of a call by part, each without the parts inside it; medians of interleaved rounds.

    Args:
        sides: Per side its parts, each one or several modules whose ``forward`` the call runs, and the call.
        rounds: How often.
        title: Shown beside the progress bar.

    Returns:
        Per side and part the seconds.
    """
    records: dict[str, list[dict[str, float]]] = {name: [] for name in sides}

    def recorded(name: str) -> Call:
        parts, call = sides[name]

        def run() -> None:
            with _exclusive_seconds(parts) as seconds:
                call()
            records[name].append(seconds)

        return run

    time_interleaved({name: recorded(name) for name in sides}, rounds=rounds, title=title)
    return {
        name: {part: statistics.median(record[part] for record in records[name][-rounds:]) for part in sides[name][0]}
        for name in sides
    }


@contextlib.contextmanager
def _exclusive_seconds(parts: Mapping[str, Iterable[nn.Module]]) -> Iterator[dict[str, float]]:
    seconds = dict.fromkeys(parts, 0.0)
    starts: list[float] = []
    inner = [0.0]

    def enter(*_: object) -> None:
        starts.append(time.perf_counter())
        inner.append(0.0)

    def leave(name: str, *_: object) -> None:
        elapsed = time.perf_counter() - starts.pop()
        seconds[name] += elapsed - inner.pop()
        inner[-1] += elapsed

    with contextlib.ExitStack() as hooks:
        for name, modules in parts.items():
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(functools.partial(leave, name)).remove)
        yield seconds


def start(threads: int, rounds: int) -> None:
    """Set the number of threads and print under which circumstances the run takes place."""
    if threads:
        torch.set_num_threads(threads)
    packages = ("a2fpn", "torch", "torchvision", "timm")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    console().print(
        f"{versions}, Python {platform.python_version()}; CPU with {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads; load before the start {_load()}.\n"
        f"Times are medians of {rounds} interleaved rounds, ratios medians of the rounds' ratios (lowest–highest); "
        "memory is the peak during the call beyond what was held before it."
    )


def _load() -> str:
    """Processes that wanted to run in the last minute: what else the machine was doing."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def console() -> Console:
    """A console on stdout, wide enough for the tables when it is no terminal."""
    here = Console(highlight=False)
    return here if here.is_terminal else Console(highlight=False, width=140)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def milliseconds(seconds: float) -> str:
    """``0.0123`` -> ``"12.3 ms"``."""
    return f"{1000 * seconds:.1f} ms"


def mebibytes(size: float) -> str:
    """``1048576`` -> ``"1 MiB"``."""
    return f"{size / 2**20:.0f} MiB"


def against(value: float, target: float | None) -> str:
    """A target beside what was reached: ``"<= 0.10 met"``; empty without a target."""
    return "" if target is None else f"<= {target:.2f} {'met' if value <= target else 'missed'}"
