"""Files that stay in an output folder when it is written to again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

State = tuple[int, int, int]
"""Inode, and times of the last change of the file and of its content, nanoseconds."""


def file_states(folder: Path) -> dict[Path, State]:
    """Return the states of all files below a folder, links as such; none if the folder does not exist."""
    states = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            found = path.lstat()
            states[path] = (found.st_ino, found.st_ctime_ns, found.st_mtime_ns)
    return states


def untouched(folder: Path, before: Mapping[Path, State]) -> list[Path]:
    """Return the files below a folder that have not been written since.

    Args:
        folder: The folder.
        before: What :func:`file_states` returned.
    """
    return sorted(path for path, state in file_states(folder).items() if before.get(path) == state)
