"""Common parts of the GPU benchmarks: rows written as they are measured, and timing on an asynchronous device."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import a2fpn
from benchmarks import _measure as measure

PRECISIONS = ("bf16", "tf32", "fp32")

Call = Callable[[], Any]


class Record:
    """The rows of a part, in a JSON file that is whole after every row.

    Args:
        folder: Where the file lies.
        part: The part; names the file.
        device: What is measured.
        seconds: Budget; nothing new is started after it.
        quick: Whether sizes are tiny: does it run at all?
    """

    def __init__(self, folder: Path, part: str, *, device: torch.device, seconds: float, quick: bool) -> None:
        self.path = folder / f"gpu_{part}.json"
        self.device, self.quick = device, quick
        self._stop = time.perf_counter() + seconds
        self._document: dict[str, Any] = {"part": part, "quick": quick, **circumstances(device), "rows": []}
        self._write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        rows: list[dict[str, Any]] = self._document["rows"]
        return rows

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._stop - time.perf_counter()

    def add(self, **row: Any) -> None:
        """Add a row and write the file."""
        self.rows.append(row)
        self._write()

    def note(self, name: str, value: Any) -> None:
        """Set a field beside the rows and write the file."""
        self._document[name] = value
        self._write()

    @contextmanager
    def attempt(self, **row: Any) -> Iterator[None]:
        """Turn an error into a row: what follows is measured all the same."""
        try:
            yield
        except Exception as error:  # whatever it is, the machine is at hand now
            last = traceback.format_exc().strip().splitlines()[-6:]
            self.add(**row, error=f"{type(error).__name__}: {error}"[:600], trace=last)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def circumstances(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    versions = {"a2fpn": a2fpn.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "torchvision", "timm", "triton", "accelerate"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": name, "cores": os.cpu_count(), "versions": versions, "commit": commit()}


def commit() -> str | None:
    """The commit of the code: what ``A2FPN_COMMIT`` says, for a copy without its history, or else git."""
    if given := os.environ.get("A2FPN_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_sides(calls: Mapping[str, Call], *, device: torch.device, rounds: int = 5, least: float = 0.25) -> Any:
    """Seconds per call of every side, taken in turns.

    Args:
        calls: The sides.
        device: What they run on.
        rounds: How often every side has its turn.
        least: Seconds of a turn, which holds as many calls as it takes.

    Returns:
        :class:`benchmarks._measure.Timings`.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        synchronize(device)
        once = _seconds(call, 1, device)
        repeats[name] = max(1, min(50, round(least / once)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in reversed(list(calls)) if turn % 2 else list(calls):
            seconds[name].append(_seconds(calls[name], repeats[name], device))
    return measure.Timings(seconds)


def _seconds(call: Call, repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most memory of the device that was allocated during a call, weights included; None elsewhere than on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def kernel_use(call: Call, device: torch.device, *, repeats: int = 3) -> dict[str, float] | None:
    """Profile a call on the device: seconds of its kernels, their number, and waits of the host.

    Kernels that overlap count once. Waits are the runtime's synchronizations and copies to the host.
    """
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
    kernels, waits, copies = [], 0, 0
    for event in profile.events():
        if event.is_user_annotation:  # spans of the optimizer, not work of the device
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            copies += "memcpy dtoh" in event.name.lower()
            kernels.append((event.time_range.start, event.time_range.end))
        else:
            waits += event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    return {
        "busy_seconds": _union(kernels) / 1e6 / repeats,
        "kernels": len(kernels) / repeats,
        "host_waits": (waits - 1) / repeats,  # one is the profile's own
        "copies_to_host": copies / repeats,
    }


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[Callable[[], Any]]:
    """Set the arithmetic of float32; give the autocast under which a plain model runs."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    try:
        yield functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=name == "bf16")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def median(values: Sequence[float]) -> float:
    """The median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")
