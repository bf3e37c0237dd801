"""Handling of signals that request a run to stop: SIGTERM, SIGUSR1 and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequest(Exception):  # noqa: N818  # nothing went wrong
    """Raised after a stop signal, when a checkpoint has been written.

    Args:
        signum: The signal.
        message: What happened and how to continue.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Signals:
    """Context manager that records signals, so that the current step can finish first.

    Schedulers can be configured to send SIGUSR1 before a time limit. The second Ctrl-C raises.

    Attributes:
        received: The received signal, or 0.
    """

    names = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python allows signal handlers in the main thread only.
        for name in self.names if threading.current_thread() is threading.main_thread() else ():
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def leave_stopping_to_the_run(worker: int) -> None:
    """Initialize a loader process so that signals to the whole process group do not make it fail.

    It ignores the signals of :class:`Signals`, except that it exits with code 0 on SIGTERM, which Python also uses to
    terminate it: torch raises in the middle of a training step for any other code.
    """
    for name in Signals.names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
