"""Image files in the folders of written data sets: linked or copied."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from a2fpn.errors import DataError

Placing = Literal["link", "copy"]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check that a folder may be written to.

    Raises:
        DataError: If it holds something and ``overwrite`` is off, or is a file.
    """
    if output.is_file():
        raise DataError(f"{output} is a file; expected a folder to write to.")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise DataError(f"{output} is not empty; choose another folder, or overwrite it (--overwrite).")


def place(source: Path, target: str | Path, placing: Placing) -> None:
    """Link or copy a file; copies where the file system has no links."""
    try:
        _link_or_copy(source, target, placing)
    except FileExistsError:
        os.remove(target)
        _link_or_copy(source, target, placing)


def _link_or_copy(source: Path, target: str | Path, placing: Placing) -> None:
    if placing == "link":
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
