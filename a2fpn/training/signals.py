"""Signals that reach a run: requests to stop (SIGTERM, SIGUSR1, Ctrl-C), and the death of a loader process."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest(Exception):  # noqa: N818  # nothing went wrong
    """The run was asked to stop, and has written a checkpoint.

    Args:
        signum: The signal.
        message: What happened and how to continue.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Signals:
    """Notes signals while it is entered, so that a step can end before anything is done about them.

    SIGUSR1 is what schedulers can be told to send before a time limit. The second Ctrl-C raises.

    Attributes:
        received: The signal that asked to stop, or 0.
        dead_worker: What torch says of a loader process that died, or None.
    """

    names = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self) -> None:
        self.received = 0
        self.dead_worker: RuntimeError | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for name in self.names if _in_main_thread() else ():
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch_workers(self) -> None:
        """Keeps the death of a loader process from interrupting a step; to be called when there are loader processes.

        Torch raises it from a handler of SIGCHLD, wherever the program is at that moment.
        """
        number = getattr(signal, "SIGCHLD", None)
        if number is None or number in self._before or not _in_main_thread():
            return
        raising = signal.getsignal(number)
        if callable(raising):
            self._before[number] = signal.signal(number, functools.partial(self._note_death, raising))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def _note_death(self, raising: Callable[..., Any], number: int, frame: FrameType | None) -> None:
        try:
            raising(number, frame)
        except RuntimeError as error:
            self.dead_worker = error


def _in_main_thread() -> bool:
    """Python allows handlers of signals nowhere else."""
    return threading.current_thread() is threading.main_thread()
