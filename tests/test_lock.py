"""A run's folder has one owner, and a dead one does not keep it."""

import errno
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest

from a2fpn.errors import ConfigError
from a2fpn.training import lock
from a2fpn.training.lock import LOCK_FILE, FolderTakenError, RunLock

needs_locks = pytest.mark.skipif(lock.fcntl is None, reason="needs locks of the operating system")


def own(folder: Path, ready, *, child: bool) -> None:
    """Owns a folder, in a process of its own, until it is killed."""
    held = RunLock(folder)
    if child:  # as a loader process does, which outlives its parent for a while
        here, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(there, b".")
            time.sleep(60)
            os._exit(0)
        os.read(here, 1)  # it runs, and has let go of the lock
        ready.send(pid)
    ready.send(os.getpid())
    time.sleep(60)
    held.release()


def owner(folder: Path, *, child: bool = False):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=own, args=(folder, sender), kwargs={"child": child})
    process.start()
    return process, [receiver.recv() for _ in range(1 + child)]


@needs_locks
def test_the_second_owner_is_refused_and_told_the_first_and_a_dead_one_keeps_nothing(tmp_path):
    process, _ = owner(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigError, match=rf"being written to by process {process.pid} on \S+ \(since 2"):
            RunLock(folder)
    process.kill()
    process.join()
    start = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - start < 1


@needs_locks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_loader_process_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path):
    process, (child, _) = owner(tmp_path, child=True)
    process.kill()
    process.join()
    os.kill(child, 0)  # it lives
    RunLock(tmp_path).release()
    os.kill(child, signal.SIGKILL)


@needs_locks
def test_one_process_cannot_own_a_folder_twice_and_gives_it_back(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        RunLock(tmp_path)
    first.check()
    first.release()
    first.release()
    again = RunLock(tmp_path)
    del again  # never released
    RunLock(tmp_path).release()
    assert (tmp_path / LOCK_FILE).read_bytes() == b""


def elsewhere(folder: Path, beat: int = 0) -> None:
    content = {"id": "x", "pid": 7, "host": "far", "kernel": "another", "since": "2026-01-01T00:00:00", "beat": beat}
    (folder / LOCK_FILE).write_text(json.dumps(content))


def test_an_owner_on_another_machine_that_shows_no_life_is_followed(tmp_path):
    elsewhere(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (2**33, 2**33))  # no clock is looked at
    start = time.monotonic()
    held = RunLock(tmp_path, beat=0.05)
    assert 0.3 <= time.monotonic() - start < 2
    held.release()


def test_an_owner_on_another_machine_that_lives_is_respected(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    original = time.sleep

    def beat(seconds):
        original(seconds)
        elsewhere(tmp_path, beat=1)

    monkeypatch.setattr(lock.time, "sleep", beat)
    with pytest.raises(ConfigError, match=r"being written to by process 7 on far \(since 2026-01-01T00:00:00\)"):
        RunLock(tmp_path, beat=0.05)


@needs_locks
def test_where_a_disk_has_no_locks_the_signs_of_life_decide(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    first = RunLock(tmp_path, beat=0.05)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        RunLock(tmp_path, beat=0.05)
    first.release()
    RunLock(tmp_path, beat=0.05).release()


def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path):
    held = RunLock(tmp_path)
    elsewhere(tmp_path)
    with pytest.raises(FolderTakenError, match=r"taken over by process 7 on far .* nothing was written"):
        held.check()
    held.release()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == 7


@pytest.mark.parametrize("content", [b"{", b"\x00\xff", b"[1]", b'"text"'])
def test_a_lock_file_that_nobody_can_read_is_followed_after_a_while(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    RunLock(tmp_path, beat=0.02).release()


def test_a_lock_file_is_never_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ELOOP))):
        RunLock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "text"
