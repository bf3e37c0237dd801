"""Monitoring of a run: progress, text log, trackers, pictures of predictions, and the plot of metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import MultiProcessAdapter
from PIL import Image
from torch import Tensor


class MainProcessLogger(MultiProcessAdapter):  # type: ignore[misc]
    """Accelerate's logger, which logs on the main process only, without the rank before each line."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """See ``logging.LoggerAdapter.process``."""
        return logging.LoggerAdapter.process(self, msg, kwargs)


def get_logger(name: str) -> MainProcessLogger:
    """Return the logger of a module."""
    return MainProcessLogger(logging.getLogger(name), {})


logger = get_logger(__name__)


@dataclass(frozen=True)
class Throughput:
    """Images per second, time spent waiting for data, and memory.

    Args:
        images_per_second: Images per second of all processes.
        waiting: Share of the time spent waiting for data, in [0, 1].
        memory: Bytes used by this process: peak memory on a GPU, current resident size elsewhere.
    """

    images_per_second: float
    waiting: float
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.images_per_second:.1f} images/s, {self.waiting:.0%} waiting for data, {self.memory / 2**30:.1f} GiB"
        )


class HostCopy:
    """An asynchronous copy of a tensor to the host, independent of later work on the device.

    Args:
        x: The tensor.
    """

    def __init__(self, x: Tensor) -> None:
        self._copy, self._event = x.detach(), None
        if x.device.type == "cuda":
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> Tensor:
        """Wait for the copy and return it."""
        if self._event:
            self._event.synchronize()
        return self._copy


_READ_AT_ONCE = 64
"""Batches whose losses accumulate on the device before they are read."""


class LossWindow:
    """Means of the losses and throughput since the last reading, over all processes.

    Args:
        accelerator: The accelerator of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, float] = {}
        self._pending: list[dict[str, Tensor]] = []
        self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    def add(self, losses: Mapping[str, Tensor], *, images: int, waited: float = 0.0) -> None:
        """Add the scalar losses of a batch, its number of images, and the seconds spent waiting for it."""
        # Reading a loss synchronizes with the device, so many are read at once.
        self._pending.append(dict(losses))
        if len(self._pending) == _READ_AT_ONCE:
            self._read_pending()
        self._images += images
        self._waited += waited

    def _read_pending(self) -> None:
        flat = [loss for losses in self._pending for loss in losses.values()]
        values = iter(torch.stack(flat).tolist() if flat else [])
        for losses in self._pending:
            for name, value in {"batches": 1.0, **{name: next(values) for name in losses}}.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._pending.clear()

    def totals(self) -> dict[str, float]:
        """Sums over all processes, including ``batches``; every process has to call it."""
        self._read_pending()
        accelerator = self._accelerator
        if accelerator.num_processes == 1 or not self._sums:
            return dict(self._sums)
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=accelerator.device)
        return dict(zip(self._sums, accelerator.reduce(sums, reduction="sum").tolist(), strict=True))

    def restore(self, totals: Mapping[str, float]) -> None:
        """Restore the result of :meth:`totals`."""
        self._sums = dict(totals) if self._accelerator.is_main_process else dict.fromkeys(totals, 0.0)

    def read(self) -> tuple[dict[str, float], Throughput]:
        """Return the means and the throughput, and reset; every process has to call it."""
        totals = self.totals()
        batches = totals.pop("batches", 0.0)  # none if every step was skipped
        elapsed = time.perf_counter() - self._start
        speed = self._images * self._accelerator.num_processes / elapsed
        throughput = Throughput(speed, self._waited / elapsed, _memory(self._accelerator.device))
        self._restart()
        return {name: value / batches for name, value in totals.items()}, throughput


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class _LogFile(logging.FileHandler):
    """A log file that tolerates a full disk, since log lines are also on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Drop the line."""


@contextmanager
def text_log(path: Path, *, enabled: bool) -> Iterator[None]:
    """Append log lines of the run to a plain text file, if enabled."""
    if not enabled:
        yield
        return
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("a2fpn")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def grid(pictures: Sequence[Image.Image], *, columns: int = 3, width: int = 420) -> Image.Image:
    """Arrange pictures of any sizes in a grid.

    Args:
        pictures: At least one.
        columns: Pictures per row.
        width: Width of each in pixels; the aspect ratio is kept.
    """
    scaled = [
        picture.convert("RGB").resize((width, max(1, picture.height * width // picture.width))) for picture in pictures
    ]
    rows = [scaled[at : at + columns] for at in range(0, len(scaled), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    page = Image.new("RGB", (width * min(columns, len(scaled)), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            page.paste(picture, (column * width, sum(heights[:number])))
    return page


def track_picture(accelerator: Accelerator, name: str, page: Image.Image, path: Path, step: int) -> None:
    """Log a picture to the trackers that support it."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(str(path))}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: np.asarray(page)[None]}, step=step, dataformats="NHWC")


def plot_metrics(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses and the average precision of a run over its steps.

    Args:
        records: The lines of ``metrics.jsonl``.
        path: The picture to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2))
    # Fixed margins: computing the layout takes as long as drawing, which is repeated after every evaluation.
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.12, top=0.92, wspace=0.12)
    losses, precision = figure.subplots(1, 2)
    steps = [record["step"] for record in records]
    for prefix, style in (("train/", "-"), ("val/", "--")):
        names = sorted({name for record in records for name in record if name.startswith(f"{prefix}loss")})
        for color, name in enumerate(names):
            values = [record.get(name, float("nan")) for record in records]
            width = 2.2 if name == f"{prefix}loss" else 1.0
            losses.plot(steps, values, style, marker=".", lw=width, color=f"C{color}", label=name)
    for color, name in enumerate(("bbox/ap", "bbox/ap50", "segm/ap", "segm/ap50", "keypoints/ap")):
        points = [(record["step"], record[name]) for record in records if record.get(name, -1) >= 0]
        if points:
            precision.plot(*zip(*points, strict=True), marker=".", color=f"C{color}", label=name)
    losses.set(title="Losses", xlabel="step", ylim=(0, None))
    precision.set(title="Average precision on the validation images", xlabel="step", ylim=(0, 1))
    for axes in (losses, precision):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
