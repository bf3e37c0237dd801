"""Folder listings for format detection, and the names of this package's own files in them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from a2fpn.data.images import SUFFIXES
from a2fpn.data.importers.files import walk
from a2fpn.errors import DataError

_HEAD = 4096  # bytes read to identify a file

CATEGORIES_FILE = "categories.json"
"""Extra file for any format: ``categories`` as in a COCO file, which preserve ids, keypoints and skeletons."""

REPORT_FILE = "import_report.json"
"""Report of an import or a conversion in its output."""

IDS_FILE = "image_ids.json"
"""Extra file for any format: image ids of the COCO file it was converted from, by name."""

OWN_FILES = frozenset((CATEGORIES_FILE, IDS_FILE, REPORT_FILE))


@dataclass(frozen=True)
class Folder:
    """Folder listing for format detection.

    Args:
        root: The given folder, or the folder of the given file.
        file: The given file, if any.
    """

    root: Path
    file: Path | None = None
    _heads: dict[Path, bytes] = field(default_factory=dict)
    _paths: dict[str, tuple[Path, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path) -> Folder:
        """Build from a folder, or from a file of a format.

        Raises:
            DataError: If it does not exist.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path)
        if path.is_file():
            return cls(path.parent, path)
        raise DataError(f"{path}: no such file or folder.")

    @cached_property
    def by_suffix(self) -> Mapping[str, Sequence[str]]:
        """Files below the folder by lower-case suffix, sorted by name."""
        found = [str(self.file)] if self.file is not None else sorted(self._found())
        groups: dict[str, list[str]] = {}
        for path in found:
            groups.setdefault(os.path.splitext(path)[1].lower(), []).append(path)
        return groups

    def _found(self) -> Iterator[str]:
        for folder, _, names in walk(self.root):
            for name in names:
                if not name.startswith(".") and name not in OWN_FILES:
                    yield os.path.join(folder, name)

    def of_type(self, suffix: str) -> tuple[Path, ...]:
        """Return the files with a suffix."""
        if suffix not in self._paths:
            self._paths[suffix] = tuple(map(Path, self.by_suffix.get(suffix, ())))
        return self._paths[suffix]

    def head(self, path: Path) -> bytes:
        """Return the first 4 KB of a file, without the zeros of UTF-16; empty if it can't be read."""
        head = self._heads.get(path)
        if head is None:
            try:
                with path.open("rb") as file:
                    head = file.read(_HEAD).replace(b"\0", b"")
            except OSError:
                head = b""
            self._heads[path] = head
        return head

    def has_images(self) -> bool:
        """Return whether the folder has any image."""
        return any(suffix in SUFFIXES for suffix in self.by_suffix)
