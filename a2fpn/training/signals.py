"""Signals that ask a run to stop: SIGTERM, SIGUSR1 and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
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
    """

    names = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        # Python allows handlers of signals in no other thread.
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
    """Keep a loader process from failing when the signals of :class:`Signals` go to the whole group of processes.

    It ignores them, and leaves with exit code 0 on SIGTERM, by which Python ends it too: torch raises in the middle of
    a step of the run for any other code.
    """
    for name in Signals.names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
