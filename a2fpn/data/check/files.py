"""Checks of image files: existence, readability and size."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from a2fpn._text import count_of, shorten
from a2fpn.config import MAX_PIXELS
from a2fpn.data.check.report import PICTURED, Finding, Severity, Track, few
from a2fpn.data.document import CocoImage
from a2fpn.data.images import image_path, open_image, orientation, read_image, shown_size, stored_size
from a2fpn.errors import ImageError

_FOLDERS_SEARCHED = 1000


def file_findings(root: Path, images: Sequence[CocoImage], track: Track, *, decode: bool) -> Iterator[Finding]:
    """Report files that are missing, unreadable, or don't match the JSON."""
    problems: dict[str, list[tuple[CocoImage, str]]] = {}
    with ThreadPool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's warnings; files with real problems are reported below
        inspected = pool.imap(lambda entry: _inspect(root, entry, decode=decode), images, 16)
        for entry, (code, detail) in zip(images, track(inspected, "opening images", len(images)), strict=True):
            if code:
                problems.setdefault(code, []).append((entry, detail))
    lost = sum(len(found) for code, found in problems.items() if _FILES[code][0] == "error")
    for code, found in problems.items():
        severity, statement, advice = _FILES[code]
        names = (f"{_name(entry)}{f': {detail}' if detail else ''}" for entry, detail in found)
        message = f"{statement} in {len(found):,} of {count_of(len(images), 'opened image')}: {few(names, len(found))}."
        if code == "missing-file" and len(found) == len(images):
            advice += _elsewhere(root, images[0].file_name)
        pictured = tuple(entry.id for entry, _ in found[:PICTURED])
        fatal = severity == "error" and lost == len(images)
        yield Finding(severity, code, message, advice, len(found), pictured, fatal=fatal)


_FILES: Mapping[str, tuple[Severity, str, str]] = {
    "missing-file": ("error", "No file", "Check the folder and the spelling of the names."),
    "outside-folder": (
        "error",
        "A path outside the image folder",
        "It is not read: move the images into the folder, or use a parent folder; --fix writes paths inside it.",
    ),
    "too-large": (
        "error",
        f"More than {MAX_PIXELS:,} pixels",
        "Training skips them: cut them into tiles. Prediction reads them with --tile and --max-pixels.",
    ),
    "unreadable-file": ("error", "A file that is not a readable image", "Fetch the file again, or convert it to PNG."),
    "size-mismatch": (
        "error",
        "A size that differs from the JSON",
        "The boxes belong to another version of the image: restore it, or scale the annotations.",
    ),
    "exif-turned": (
        "note",
        "An EXIF tag that rotates the image to the size in the JSON",
        "The reader applies the tag; other tools may not.",
    ),
    "exif-ignored": (
        "error",
        "An EXIF tag that rotates the image away from the size in the JSON",
        "Remove the tag (`exiftool -Orientation= FILE`) if the boxes fit the pixels as stored.",
    ),
    "exif-ambiguous": (
        "warning",
        "An EXIF tag that rotates or flips the image without changing its size",
        "The reader applies the tag. If boxes are misplaced (see a plot), remove it from the files.",
    ),
}
"""Severity, statement and advice for the keys of :func:`_inspect`."""


def _name(entry: CocoImage) -> str:
    return f"{entry.id} ({shorten(repr(entry.file_name), 60)})"


def _inspect(root: Path, entry: CocoImage, *, decode: bool) -> tuple[str, str]:
    """Return a key of ``_FILES`` and a detail for a file's problem; both empty without one."""
    size = (entry.height, entry.width)
    try:
        path = image_path(root, entry.file_name)
    except ImageError:
        outside = "\\" not in entry.file_name or ".." in entry.file_name or os.path.isabs(entry.file_name)
        return "outside-folder" if outside else "missing-file", ""
    try:
        if not path.is_file():
            return "missing-file", ""
        with open_image(path, max_pixels=None) as image:
            stored, shown, tag = stored_size(image), shown_size(image), orientation(image)
            if math.prod(stored) > MAX_PIXELS:
                return "too-large", f"{image.width} x {image.height}"
    except Exception as error:  # PIL raises almost anything on a corrupt file
        return "unreadable-file", shorten(repr(str(error) or type(error).__name__), 80)
    if size not in (stored, shown):
        got, wanted = (f"{width} x {height}" for height, width in (stored, size))
        return "size-mismatch", f"{got} instead of {wanted}"
    if size != shown:
        return "exif-ignored", ""
    if decode:
        try:
            read_image(path, size=size)
        except ImageError as error:
            return "unreadable-file", shorten(repr(str(error).removeprefix(f"{path}: ")), 80)
    if tag == 1:
        return "", ""
    return ("exif-ambiguous", f"orientation {tag}") if stored == shown else ("exif-turned", "")


def _elsewhere(root: Path, file_name: str) -> str:
    """Return a hint if the file is elsewhere below the folder."""
    wanted = os.path.basename(file_name)
    for folder, _, names in itertools.islice(os.walk(root), _FOLDERS_SEARCHED):
        if wanted in names:
            return f" {wanted!r} lies in {folder}."
    return ""
