"""Files in the folder of ``a2fpn predict`` that a run has written, or was free to write when it began."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Stamps = dict[str, list[int]]
"""Size in bytes and time of change in ns of a file, or of each file of a folder, by its name in the output folder."""


class OwnFiles:
    """Names that belong to a run, with the stamps of what it wrote.

    Args:
        folder: The output folder.
        known: ``files`` of the manifest: an empty mapping for what was not written to the end.
    """

    def __init__(self, folder: Path, known: Mapping[str, Stamps] | None = None) -> None:
        self._folder = folder
        self._stamps = dict(known or {})
        self._written: set[str] = set()

    def claim(self, names: Iterable[str]) -> None:
        """Take names that nobody has."""
        for name in names:
            self._stamps.setdefault(name, {})

    def note(self, name: str) -> None:
        """Remember that a file or folder was just written."""
        self._written.add(name)

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Return the names that are there and not the run's."""
        return [name for name in names if name not in self._stamps and self._there(name)]

    def unfinished(self, names: Iterable[str]) -> list[str]:
        """Return the names that are there although the run has not written them to the end."""
        return [name for name in names if not self._stamps.get(name) and self._there(name)]

    def changed(self, names: Iterable[str]) -> list[str]:
        """Return the names of what somebody changed since the run wrote it."""
        found = ((name, self._stamps.get(name)) for name in names)
        return [name for name, stamps in found if stamps and self._there(name) and self._look(name) != stamps]

    def to_json(self) -> dict[str, Any]:
        """Return ``files`` of the manifest, with the stamps of what this process wrote, or found without any."""
        for name in self._stamps:
            if (name in self._written or not self._stamps[name]) and self._there(name):
                self._stamps[name] = self._look(name)
        return dict(self._stamps)

    def _there(self, name: str) -> bool:
        return os.path.lexists(self._folder / name)

    def _look(self, name: str) -> Stamps:
        path = self._folder / name
        is_folder = path.is_dir() and not path.is_symlink()
        files = sorted(found for found in path.rglob("*") if not found.is_dir()) if is_folder else [path]
        stats = {file.relative_to(self._folder).as_posix(): file.lstat() for file in files}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}
