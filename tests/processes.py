"""Processes forked from one that has imported torch and this package: a fresh interpreter takes seconds for that.

They are for what needs a process of its own: exit codes and signals, what is written where, crashes, and modules that
nothing has imported yet.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

_PRELOADED = [
    *("tests.training", "a2fpn.cli", "a2fpn.inference", "a2fpn.pretrained.load", "a2fpn.training.cli"),
    *("a2fpn.training.trainer", "a2fpn.inference.draw", "hotcoco", "matplotlib.backends.backend_agg"),
    *("matplotlib.figure", "torch.utils.tensorboard"),
]
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()  # Windows spawns
_CONTEXT = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
if _FORKS:
    _CONTEXT.set_forkserver_preload(_PRELOADED)


def start_server() -> None:
    """Starts the process that others are forked from, and does not wait for it."""
    if _FORKS:
        from multiprocessing import forkserver

        forkserver.ensure_running()


class Process:
    """A call in a process of its own.

    Args:
        call: What it does; what can't be pickled won't do.
        arguments: Of the call.
        output: A file that takes what it writes.
        errors: A file for its errors instead; None writes them into the same.
    """

    def __init__(
        self, call: Callable[..., object], arguments: tuple[Any, ...], output: Path, errors: Path | None = None
    ) -> None:
        self._process = _CONTEXT.Process(target=_redirected, args=(call, arguments, output, errors))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float | None = 120) -> int | None:
        """Its exit code, negative for a signal that killed it, or None if it is still running after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def _redirected(call: Callable[..., object], arguments: tuple[Any, ...], output: Path, errors: Path | None) -> None:
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (output, errors or output)]
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    multiprocessing.set_start_method(None, force=True)  # loader processes as in a program of its own
    import torch

    torch.set_num_threads(1)
    call(*arguments)


class Done(NamedTuple):
    """End of a process, and all it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_python(code: str, *arguments: object, cwd: Path | None = None, path: Iterable[Path] = ()) -> Done:
    """Runs code as ``python -c`` does.

    Args:
        code: The program.
        *arguments: Its ``sys.argv`` from 1 on.
        cwd: The working directory; None leaves it.
        path: Folders of modules, before the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        process = Process(run_code, (code, [str(x) for x in arguments], cwd, [str(x) for x in path]), *files)
        status = process.wait(300)
        if status is None:
            process.kill()
        assert status is not None, f"still running: {code}"
        return Done(status, *(file.read_text(encoding="utf-8", errors="backslashreplace") for file in files))


def run_a2fpn(*arguments: object, cwd: Path | None = None, path: Iterable[Path] = ()) -> Done:
    """Runs the command line as ``python -m a2fpn`` does; see :func:`run_python`."""
    return run_python("from a2fpn.cli import main; main()", *arguments, cwd=cwd, path=path)


def run_code(code: str, arguments: list[str], cwd: Path | None = None, path: Iterable[str] = ()) -> None:
    """Run code in this process as ``python -c`` does."""
    sys.argv = ["-c", *arguments]
    sys.path[:0] = path
    importlib.invalidate_caches()
    if cwd is not None:
        os.chdir(cwd)
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})
