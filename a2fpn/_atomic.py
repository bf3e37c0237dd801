"""Files and folders that are there whole, or as they were before."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file takes the place of ``path`` when the block ends without an error.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with replaced_file(target) as partial:
        ...     written = partial.write_text("1 2 3")
        >>> target.read_text()
        '1 2 3'
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # several processes may write it at once
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that is there whole, or as it was before."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file in UTF-8; never to what a link leads to."""
    flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(path, "a", encoding="utf-8", opener=lambda name, _: os.open(name, flags)) as file:
        file.write(line + "\n")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder`` when the block ends without an error.

    Files that are already in the temporary folder are kept and move along. Between the two renames there is no
    ``folder``, but a whole one beside it, which :func:`recover_folder` finds.
    """
    partial, previous = partial_path(folder), _previous(folder)
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Put right what a kill in the middle of :func:`replaced_folder` left."""
    if not folder.exists() and _previous(folder).exists():
        _previous(folder).rename(folder)
    for leftover in (partial_path(folder), _previous(folder)):
        shutil.rmtree(leftover, ignore_errors=True)


def partial_path(folder: Path) -> Path:
    """Name under which a folder is written before it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _sync(path: Path) -> None:
    """Make the system write a file's content, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows can't open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
