"""Atomic writes: a file is complete, or as it was before."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file replaces ``path`` when the block ends without an error.

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
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file in UTF-8; symbolic links are not followed."""
    flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(path, "a", encoding="utf-8", opener=lambda name, _: os.open(name, flags)) as file:
        file.write(line + "\n")


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk (fsync)."""
    if os.name == "nt" and path.is_dir():  # Windows can't open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
