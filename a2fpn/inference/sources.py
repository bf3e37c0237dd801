"""Image sources: files, folders and patterns."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from a2fpn.data.images import SUFFIXES, is_image
from a2fpn.errors import ConfigError, ImageError

ImagePath = str | os.PathLike[str]


def list_images(source: ImagePath) -> list[Path]:
    """List the image files of a folder or pattern sorted by name, without subfolders.

    Raises:
        ValueError: If there are none.
        OSError: If there is no such folder.
    """
    pattern = is_pattern(source)
    found = map(Path, glob.glob(os.fspath(source), recursive=True)) if pattern else Path(source).iterdir()
    paths = sorted(path for path in found if is_image(path.name) and not path.is_dir())
    if not paths:
        raise ConfigError(
            (f"No image matches {os.fspath(source)}" if pattern else f"No images in the folder {os.fspath(source)}")
            + f"; expected names that end in {', '.join(SUFFIXES)}"
            + ("." if pattern else " (sub-folders are not searched).")
        )
    return paths


def is_pattern(source: ImagePath) -> bool:
    """Return whether a path is a pattern such as ``photos/*.jpg`` and not the name of an existing file."""
    return any(character in os.fspath(source) for character in "*?[") and not os.path.exists(source)


_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def check_source(source: ImagePath) -> None:
    """Refuse URLs and videos.

    Raises:
        ValueError: With advice.
    """
    text = os.fspath(source)
    scheme = re.match(r"(https?|s3|gs|ftp|rtsp|data):", text, flags=re.IGNORECASE)
    if scheme:
        raise ImageError(
            f"{text[:200]}: URLs are not supported; download the image first (curl -LO URL) and give its path."
        )
    if Path(text).suffix.lower() in _VIDEOS:
        raise ImageError(
            f"{text}: videos are not supported; write the frames to a folder (ffmpeg -i VIDEO frames/%06d.png) and "
            "give "
            "that."
        )
