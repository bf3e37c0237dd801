"""Lock of a run's folder: only one process at a time writes to it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from a2fpn.errors import ConfigError, RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)  # only the main process has a lock

LOCK_FILE = "run.lock"
BEAT = 5.0
"""Seconds between two heartbeats of an owner."""
PATIENCE = 6
"""Missed heartbeats after which an owner on another machine counts as dead."""
_NO_LOCKS = {getattr(errno, name, None) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL")}


class FolderTakenError(RunError):
    """Another process has taken over the run's folder."""


class RunLock:
    """Ownership of a folder, from construction until :meth:`release` or the end of the process.

    It is an operating system lock, which ends with the process however it dies. It works on one machine, and on network
    disks that support it. Otherwise, for an owner on another machine or on a disk without locks, heartbeats that the
    owner writes to the file decide: the file is watched for changes, and no clocks are compared.

    Args:
        folder: Created if it does not exist.
        beat: Seconds between two heartbeats.
        option: Name of the option that sets the folder, for messages.
        keep: Whether to keep the file, emptied, on release.

    Raises:
        ConfigError: If another process owns the folder; the message names it.
        OSError: If the folder can't be written to.
    """

    _file: int | None = None

    def __init__(self, folder: Path, *, beat: float = BEAT, option: str = "run.output", keep: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._option, self._keep = folder, option, keep
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        self._stop, self._guard = threading.Event(), threading.Lock()
        self._taken_by: str | None = None
        self._file = os.open(folder / LOCK_FILE, flags, 0o644)
        try:
            self._acquire(self._file, beat)
        except BaseException:
            _close(self)
            raise
        if hasattr(os, "register_at_fork"):  # a loader process that outlives a killed run must not hold its lock
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _close(reference()))
        threading.Thread(target=_keep_beating, args=(weakref.ref(self), self._stop, beat), daemon=True).start()

    def check(self) -> None:
        """Check before a write that this run still owns the folder.

        Raises:
            FolderTakenError: If another process took it, which can happen to a run that was suspended for long.
        """
        if self._file is not None and not self._taken_by:
            self._beat()
        if self._taken_by:
            raise FolderTakenError(
                f"{self._folder} was taken over by {self._taken_by} while this run was halted; nothing was written."
            )

    def release(self) -> None:
        """Release the folder; idempotent."""
        self._stop.set()
        if self._file is not None:
            if not self._taken_by:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, 0)
                    if not self._keep:
                        (self._folder / LOCK_FILE).unlink()
            _close(self)

    def __del__(self) -> None:
        _close(self)

    def _acquire(self, file: int, beat: float) -> None:
        kernel = _kernel()
        guarded = _lock(file)
        if guarded is False:
            raise self._taken(_read(file))
        owner = _parsed(_read(file))
        if owner and not (guarded and owner.get("kernel") == kernel):
            self._watch(file, beat)
        self._owner: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "kernel": kernel,
            "since": datetime.now().isoformat(timespec="seconds"),
            "beat": 0,
        }
        try:
            _write(file, self._owner)
        except OSError as error:  # it lacks the file name
            raise OSError(error.errno, error.strerror, str(self._folder / LOCK_FILE)) from error

    def _watch(self, file: int, beat: float) -> None:
        """Watch for heartbeats of an owner that may be on another machine.

        Raises:
            ConfigError: If it is alive.
        """
        before = _read(file)
        logger.info(
            "%s was last written to by %s; waiting up to %.0f s to check whether it is still running.",
            self._folder,
            _named(before),
            beat * PATIENCE,
        )
        end = time.monotonic() + beat * PATIENCE
        while time.monotonic() < end:
            time.sleep(beat / 4)
            if (now := _read(file)) != before:
                raise self._taken(now)

    def _taken(self, content: bytes) -> ConfigError:
        return ConfigError(
            f"{self._folder} is being written to by {_named(content)}; wait for it, stop it, or choose another "
            f"{self._option}."
        )

    def _beat(self) -> None:
        """Write a heartbeat, or detect that another process did."""
        with self._guard, contextlib.suppress(OSError):  # a full disk must not stop a run that still owns its folder
            file = self._file
            if file is None:
                return
            found = _parsed(_read(file))
            if found and found.get("id") != self._owner["id"]:
                self._taken_by = _named(_read(file))
                return
            self._owner["beat"] += 1
            _write(file, self._owner)


def _keep_beating(reference: weakref.ref[RunLock], stop: threading.Event, beat: float) -> None:
    while not stop.wait(beat):
        lock = reference()
        if lock is None:
            return
        lock._beat()
        del lock


def _close(lock: RunLock | None) -> None:
    if lock is not None and lock._file is not None:
        with contextlib.suppress(OSError):
            os.close(lock._file)
        lock._file = None


def _lock(file: int) -> bool | None:
    """Lock an open file; return whether it worked, None without lock support."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _kernel() -> str:
    """Id of the running kernel; containers share it, and a reboot changes it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def _read(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, 4096)


def _write(file: int, owner: dict[str, Any]) -> None:
    content = json.dumps(owner).encode()
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, content)
    os.ftruncate(file, len(content))
    os.fsync(file)


def _parsed(content: bytes) -> dict[str, Any]:
    """Parse the owner in a lock file; invalid JSON is an unknown owner."""
    if not content.strip():
        return {}
    try:
        owner = json.loads(content)
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {"id": None}


def _named(content: bytes) -> str:
    owner = _parsed(content)
    if "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')} (since {owner.get('since')})"
