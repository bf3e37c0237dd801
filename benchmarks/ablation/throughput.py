"""Images per second of one training, and of several at a time on the same device."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.ablation.arms import Arm
from benchmarks.ablation.plan import Plan
from benchmarks.ablation.pool import Job

LOOK = 0.1  # seconds
EVERY = 2  # steps between two log lines, which are what is counted
LONG = (
    "run.max_steps=20000",
    "run.evaluate_every=1000000",
    "run.resume=false",
    f"run.log_every={EVERY}",
)


@dataclass(frozen=True)
class Throughput:
    """Images per second of so many trainings.

    Args:
        jobs: Trainings at a time.
        images_per_second: Of all together.
        each: Of each.
    """

    jobs: int
    images_per_second: float
    each: tuple[float, ...]


def measure_throughput(
    plan: Plan,
    arm: Arm,
    jobs: int,
    environment: Mapping[str, str],
    *,
    warmup: int = 20,
    seconds: float = 30.0,
    patience: float = 240.0,
) -> Throughput:
    """Count the steps of trainings over a fixed time, after all have made some.

    Args:
        plan: Recipe and data.
        arm: What is trained, with another seed by each.
        jobs: Trainings at a time.
        environment: Of the trainings.
        warmup: Steps that each makes before any is counted.
        seconds: How long is counted.
        patience: How long the start and the warm-up may take.

    Raises:
        RuntimeError: If a training ends, or does not get through the warm-up in time.
    """
    runs = [plan.run(Arm(f"throughput{jobs}", arm.settings), seed) for seed in range(jobs)]
    batch = int(plan.config(runs[0])["data"].get("batch_size", 2))
    for run in runs:
        shutil.rmtree(run.folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        started = []
        for run in runs:
            started.append(Job(run, plan.command(run, *LONG), environment))
            stack.callback(started[-1].kill)
        _wait(started, lambda: min(job.progress()[0] for job in started) >= warmup, patience)
        each = _rates(started, seconds)
    for run in runs:
        shutil.rmtree(run.folder, ignore_errors=True)
    return Throughput(jobs, batch * sum(each), tuple(batch * rate for rate in each))


def _rates(jobs: list[Job], seconds: float) -> list[float]:
    """Steps per second of each, from the first log line to the last within the time."""
    seen: list[list[tuple[float, int]]] = [[] for _ in jobs]
    start = time.monotonic()

    def look() -> bool:
        now = time.monotonic()
        for marks, job in zip(seen, jobs, strict=True):
            step = job.progress()[0]
            if not marks or step > marks[-1][1]:
                marks.append((now, step))
        return now - start >= seconds

    _wait(jobs, look, 2 * seconds + 1)
    # The first mark is no moment at which a step ended.
    if any(len(marks) < 3 for marks in seen):
        raise RuntimeError(f"Less than {2 * EVERY} steps in {seconds:.0f} s; measure for longer.")
    return [(marks[-1][1] - marks[1][1]) / (marks[-1][0] - marks[1][0]) for marks in seen]


def _wait(jobs: list[Job], ready: Callable[[], bool], patience: float) -> None:
    limit = time.monotonic() + patience
    while not ready():
        for job in jobs:
            if job.process.poll() is not None:
                lines = job.run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
                raise RuntimeError(f"{job.run} ended with code {job.process.returncode}: {' | '.join(lines)}")
        if time.monotonic() > limit:
            raise RuntimeError(f"Not through the warm-up after {patience:.0f} s: {[job.progress() for job in jobs]}.")
        time.sleep(LOOK)


def as_json(one: Throughput, several: Throughput) -> dict[str, Any]:
    """Return both and their ratio."""
    return {
        "one": vars(one),
        "several": vars(several),
        "ratio": round(several.images_per_second / one.images_per_second, 3),
    }
