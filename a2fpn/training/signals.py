"""Signals that ask a run to stop: SIGTERM, SIGUSR1 and Ctrl-C."""

from __future__ import annotations

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


def ignore_stop_signals(worker: int) -> None:
    """Ignore the signals of :class:`Signals` in a loader process: sent to a whole group, they are for the run."""
    for name in Signals.names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
