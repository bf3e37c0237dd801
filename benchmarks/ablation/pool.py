"""Several trainings at a time, stopped in time and without loss."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from benchmarks import _measure as measure
from benchmarks.ablation.plan import Run

LEAST = 45.0  # seconds that must be left for a run to be started
POLL = 0.5  # seconds
_PR_SET_PDEATHSIG = 1
_ASKED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # what a training that was asked to stop ends with
_LENGTH = re.compile(rb"([\d,]+) steps? in ")
_STEP = re.compile(rb"step (\d+)")


@dataclass
class Job:
    """A training process, whose output goes behind what its log holds.

    Args:
        run: What it trains.
        command: How it is started.
        environment: Its environment.
    """

    run: Run
    command: Sequence[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.run.log.stat().st_size if self.run.log.exists() else 0
        with self.run.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(self.environment),
                start_new_session=True,  # Ctrl-C is for the runner, which passes it on
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        """End it and its loader processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def progress(self) -> tuple[int, int]:
        """Steps that are done, as far as its log says, and steps of the whole run; zeros before it says."""
        with self.run.log.open("rb") as log:
            log.seek(self._start)
            text = log.read()
        length, steps = _LENGTH.findall(text), _STEP.findall(text)
        return (int(steps[-1]) if steps else 0), (int(length[-1].replace(b",", b"")) if length else 0)


def _end_with_parent() -> None:
    """Have the kernel stop a training whose runner was killed, which could no longer stop it (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Pool:
    """Runs trainings, some at a time.

    Args:
        jobs: How many at a time.
        environment: Of every training.
        seconds: Time limit of all; infinite without one.
        grace: Seconds before the limit at which trainings are asked to stop.
        every: Seconds between two lines of progress.
    """

    jobs: int
    environment: Mapping[str, str]
    seconds: float = float("inf")
    grace: float = 60.0
    every: float = 10.0
    _signal: int = field(default=0, init=False)

    def work(
        self, runs: Sequence[Run], command: Callable[[Run], list[str]], ended: Callable[[Run, bool], None]
    ) -> list[Run]:
        """Train in the given order; return the runs that were not finished for lack of time or after a signal.

        Args:
            runs: What to train.
            command: Gives the command of a run.
            ended: Called with a run that ended by itself, and whether it succeeded.
        """
        start = time.monotonic()
        stop_at = start + self.seconds - self.grace
        waiting, running, said = list(runs), list[Job](), start
        stopped = list[Run]()
        done = failures = 0
        with _noting_signals(self._note):
            while (waiting or running) and time.monotonic() < stop_at and not self._signal:
                while waiting and len(running) < self.jobs and stop_at - time.monotonic() > LEAST:
                    run = waiting.pop(0)
                    running.append(Job(run, command(run), self.environment))
                if not running:
                    break
                time.sleep(POLL)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    if job.process.returncode in _ASKED:  # by someone else; its checkpoint is there
                        stopped.append(job.run)
                        continue
                    success = job.process.returncode == 0
                    done, failures = done + success, failures + (not success)
                    ended(job.run, success)
                if time.monotonic() - said >= self.every:
                    said = time.monotonic()
                    self._say(running, len(waiting), done, failures, said - start)
            return [*stopped, *self._stop(running, ended), *waiting]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _stop(self, running: Sequence[Job], ended: Callable[[Run, bool], None]) -> list[Run]:
        """Stop what runs, and return what was not finished."""
        for job in running:
            job.stop()
        limit = time.monotonic() + 0.9 * self.grace
        for job in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(max(0.1, limit - time.monotonic()))
        unfinished = []
        for job in running:
            late = job.process.poll() is None
            if late:
                job.kill()
            if late or job.process.returncode in _ASKED:
                unfinished.append(job.run)
            else:
                ended(job.run, job.process.returncode == 0)
        return unfinished

    def _say(self, running: Sequence[Job], waiting: int, done: int, failures: int, elapsed: float) -> None:
        states = [(job, *job.progress()) for job in running]
        shares = sum(step / total for _, step, total in states if total)
        left = waiting + len(running) - shares
        here = "  ".join(f"{job.run} {step}/{total or '?'}" for job, step, total in states)
        # What resumed runs had done before counts as well, so the first estimates are too short.
        eta = f"{elapsed * left / (done + shares) / 60:.0f} min left" if done + shares else "no estimate yet"
        failed = f", {failures} failed" if failures else ""
        measure.console().print(
            f"{elapsed / 60:5.1f} min: {done} done{failed}, {waiting} waiting, {eta}; {here}", soft_wrap=True
        )


@contextlib.contextmanager
def _noting_signals(note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a training: ours, with so many threads, and the folder of the code to import."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **limits, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def multi_process_service(environment: Mapping[str, str], *, wanted: bool) -> Iterator[dict[str, str]]:
    """Start NVIDIA's multi-process service for this user, and yield the environment of its clients.

    Kernels of several processes then run side by side instead of in turns. Where it can't be started, or a program
    can't use the GPU through it, a line says so and the environment is the one given.

    Args:
        environment: Of the clients.
        wanted: Whether to start it.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if wanted and "CUDA_MPS_PIPE_DIRECTORY" in environment:  # someone's own service, for other programs too
        yield dict(environment)
        return
    if not wanted or control is None:
        if wanted:
            measure.console().print("--mps: there is no nvidia-cuda-mps-control; processes take turns on the GPU.")
        yield dict(environment)
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:  # a private one; its path must be short
        own = {**environment, "CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        started = _succeeds([control, "-d"], own)
        probe = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').add(1).item()"]
        works = started and _succeeds(probe, own)
        try:
            if not works:
                measure.console().print("--mps: the service does not work here; processes take turns on the GPU.")
            yield own if works else dict(environment)
        finally:
            if started:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run([control], input=b"quit\n", env=own, capture_output=True, timeout=20, check=False)


def _succeeds(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    try:
        answer = subprocess.run(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=90,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0
