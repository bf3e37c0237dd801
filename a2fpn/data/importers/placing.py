"""Placement of image files in the folder of a data set: links or copies."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal

from a2fpn.data.check.report import Track
from a2fpn.errors import DataError

Placing = Literal["link", "copy"]
_Job = tuple[Path | bytes, str]  # a file or its content, and its name
# Threads and files of one task. Threads that add links to one folder only wait for each other in the kernel.
_POOLS = {"link": (1, 512), "copy": (4, 4)}


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check that a folder may be written to.

    Raises:
        DataError: If it is not empty and ``overwrite`` is off, or is a file.
    """
    if output.is_file():
        raise DataError(f"{output} is a file; expected a folder to write to.")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise DataError(f"{output} is not empty; choose another folder, or overwrite it (--overwrite).")


def place(source: Path | bytes, target: str | Path, placing: Placing) -> None:
    """Link or copy a file, or write its content; copies if the file system has no links.

    A target that is the file itself stays.
    """
    if _is_file_itself(source, target):
        return
    try:
        _link_or_copy(source, target, placing)
    except FileExistsError:
        os.remove(target)
        _link_or_copy(source, target, placing)


class ImagePlacer:
    """Places images in a folder, in the background while labels are read.

    The folder gets them once all are placed, and none of them after an error.

    Args:
        folder: The folder; created if necessary.
        placing: Whether images are linked or copied.
    """

    def __init__(self, folder: Path, placing: Placing) -> None:
        self.folder = folder
        self.placing: Placing = placing
        self._partial = folder.with_name(f"{folder.name}.partial")
        self._new = not folder.parent.exists()
        self._folders: set[str] = set()
        self._waiting: list[_Job] = []
        self._tasks: list[Future[list[tuple[Path | None, str]]]] = []
        self._total = 0
        threads, self._chunk = _POOLS[placing]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="place")

    def __enter__(self) -> ImagePlacer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        if kind is not None and self._new and self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def add(self, source: Path | bytes, name: str) -> None:
        """Place a file, or a file's content, under a name: a path in the folder."""
        if not self._total:
            shutil.rmtree(self._partial, ignore_errors=True)  # of an import that was killed
        self._total += 1
        self._waiting.append((source, name))
        if len(self._waiting) == self._chunk or isinstance(source, bytes):  # contents should not fill the memory
            self._start()

    def close(self, track: Track) -> None:
        """Wait for all files, and move them into the folder.

        Args:
            track: Shows the progress.

        Raises:
            OSError: If a file can't be placed.
        """
        if not self._total:
            return
        self._start()
        jobs = (job for task in self._tasks for job in task.result())
        placed = list(track(jobs, "placing images", self._total))
        if not self.folder.exists():
            self._partial.rename(self.folder)
            return
        _make_folders(self.folder, self._folders)
        for source, name in placed:
            if not _is_file_itself(source, self.folder / name):
                os.replace(self._partial / name, self.folder / name)

    def _start(self) -> None:
        """Hand the waiting files to the pool."""
        jobs, self._waiting = self._waiting, []
        parents = {os.path.dirname(name) for _, name in jobs} - self._folders
        _make_folders(self._partial, parents)
        self._folders |= parents
        self._tasks.append(self._pool.submit(self._place, jobs))

    def _place(self, jobs: list[_Job]) -> list[tuple[Path | None, str]]:
        """Place files; return their paths, None for contents, which would fill the memory, and their names."""
        left = _link_at_once(jobs, self._partial) if self.placing == "link" else jobs
        for source, name in left:
            _link_or_copy(source, os.path.join(self._partial, name), self.placing)
        return [(None if isinstance(source, bytes) else source, name) for source, name in jobs]


def _link_at_once(jobs: Iterable[_Job], root: Path) -> list[_Job]:
    """Link the files that keep their names by the program ``ln``, and return the others.

    A thread that creates links one by one would compete for the interpreter's lock with the one that reads labels.
    """
    program = shutil.which("ln")
    left: list[_Job] = []
    folders: dict[str, list[_Job]] = {}
    for source, name in jobs:
        folder, base = os.path.split(name)
        alike = program is not None and isinstance(source, Path) and source.name == base
        (folders.setdefault(folder, []) if alike else left).append((source, name))
    for folder, members in folders.items():
        sources = [os.path.abspath(source) for source, _ in members]
        command = [str(program), "-s", "--", *sources, os.path.join(root, folder, "")]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        except OSError:  # the command is too long
            left += members
            continue
        if done.returncode:
            left += [(source, name) for source, name in members if not os.path.islink(root / name)]
    return left


def _make_folders(root: Path, names: Iterable[str]) -> None:
    for name in names:
        os.makedirs(root / name, exist_ok=True)


def _is_file_itself(source: Path | bytes | None, target: str | Path) -> bool:
    """Return whether a target is the file that would replace it, such as in a folder that is a link to the source."""
    if not isinstance(source, Path) or os.path.islink(target) or not os.path.exists(target):
        return False
    return os.path.samefile(source, target)


def _link_or_copy(source: Path | bytes, target: str | Path, placing: Placing) -> None:
    if isinstance(source, bytes):
        if os.path.islink(target):
            os.remove(target)
        Path(target).write_bytes(source)
    elif placing == "link":
        try:
            os.symlink(os.path.abspath(source), target)
        except FileExistsError:
            raise
        except (NotImplementedError, OSError):
            shutil.copyfile(source, target)
    else:
        if os.path.islink(target):
            os.remove(target)
        shutil.copyfile(source, target)
