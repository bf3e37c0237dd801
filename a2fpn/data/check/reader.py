"""Lenient reading of a COCO file: whatever can be used, and findings about the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from a2fpn.config import Category
from a2fpn.data.check.report import (
    PICTURED,
    Finding,
    Track,
    few,
    shorten,
)
from a2fpn.data.coco import CocoImage
from a2fpn.errors import DataError

Source = str | Path | Mapping[str, Any]
_LARGEST_SIDE = 10**6  # pixels


@dataclass(frozen=True)
class CocoDocument:
    """The parts of a COCO file that can be used.

    Args:
        name: For messages.
        images: Valid entries.
        index: Position in ``images`` by id, the first of each id.
        categories: Name by id, sorted by id.
        entries: The annotations as they are.
        num_keypoints: Keypoints that the first category with such names has; None if none has.
    """

    name: str
    images: Sequence[CocoImage]
    index: Mapping[int, int]
    categories: Mapping[int, str]
    entries: Sequence[Any]
    num_keypoints: int | None


def source_name(source: Source) -> str:
    """Name of a COCO file in messages."""
    return "the given mapping" if isinstance(source, Mapping) else str(source)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a JSON value can be an id or a side: a whole number of 64 bits, and not true or false."""
    return type(value) is int and -(2**63) <= value < 2**63


def read_document(source: Source, track: Track) -> tuple[CocoDocument | None, list[Finding]]:
    """Read the usable part of a COCO file, and report faults of its images and categories.

    Raises:
        DataError: If there is no such file.
    """
    name = source_name(source)
    data: Any = source
    if not isinstance(source, Mapping):
        for path in track([Path(source)], "reading JSON", 1):
            try:
                data = json.loads(path.read_bytes())
            except OSError as error:
                raise DataError(f"{path}: the file can't be read ({error.strerror}).") from None
            except (ValueError, RecursionError) as error:
                return None, [_no_coco(name, f"is no readable JSON ({shorten(str(error), 100)})")]
    if not isinstance(data, Mapping):
        return None, [_no_coco(name, f"holds a {type(data).__name__}, no object")]
    lacking = [key for key in ("images", "annotations", "categories") if not isinstance(data.get(key), list)]
    if lacking:
        return None, [_no_coco(name, f"has no list {', '.join(lacking)}")]
    images = [_parse_image(raw) for raw in data["images"]]
    categories = [_parse_category(raw) for raw in data["categories"]]
    valid = [entry for entry in images if entry is not None]
    findings = [
        *_entry_findings(name, "image", images, "a whole-number id, a file_name, and height and width in pixels"),
        *_entry_findings(name, "category", categories, "a whole-number id and a name"),
        *_duplicate_files(name, valid),
    ]
    if not images:
        findings.append(Finding("error", "no-images", f"{name} lists no image.", "Look at the export.", 0, fatal=True))
    index = {entry.id: position for position, entry in reversed([*enumerate(valid)])}
    names = {entry.id: entry.name for entry in reversed(categories) if entry is not None}
    keypoints = (raw.get("keypoints") for raw in data["categories"] if isinstance(raw, Mapping))
    num_keypoints = next((len(points) for points in keypoints if isinstance(points, list)), None)
    ordered = dict(sorted(names.items()))
    return CocoDocument(name, valid, index, ordered, data["annotations"], num_keypoints), findings


def _no_coco(name: str, what: str) -> Finding:
    advice = "A COCO file is a JSON object with the lists images, annotations and categories."
    return Finding("error", "no-coco", f"{name} {what}.", advice, 1, fatal=True)


def _parse_image(raw: Any) -> CocoImage | None:
    match raw:
        case {"id": image_id, "file_name": str(file_name), "height": height, "width": width}:
            if is_whole(image_id) and all(is_whole(side) and 0 < side <= _LARGEST_SIDE for side in (height, width)):
                return CocoImage(image_id, file_name, height, width)
    return None


def _parse_category(raw: Any) -> Category | None:
    match raw:
        case {"id": category_id, "name": str(name)} if is_whole(category_id):
            return Category(category_id, name)
    return None


def _entry_findings(
    name: str, kind: str, entries: Sequence[CocoImage | Category | None], needed: str
) -> Iterator[Finding]:
    """Images or categories for which the reader refuses the whole file."""
    bad = [position for position, entry in enumerate(entries) if entry is None]
    if bad:
        message = f"{name}: {len(bad)} of {len(entries)} entries are no {kind}, at position {few(bad, len(bad))}."
        advice = f"An entry needs {needed}; the reader refuses the file."
        yield Finding("error", f"bad-{kind}", message, advice, len(bad), fatal=True)
    uses = Counter(entry.id for entry in entries if entry is not None)
    twice = [entry_id for entry_id, count in uses.items() if count > 1]
    if twice:
        message = f"{name}: several entries have the same {kind} id: {few(twice, len(twice))}."
        advice = "Give each entry an id of its own; the reader refuses the file."
        pictured = tuple(twice[:PICTURED]) if kind == "image" else ()
        yield Finding("error", f"duplicate-{kind}-id", message, advice, len(twice), pictured, fatal=True)


def _duplicate_files(name: str, images: Sequence[CocoImage]) -> Iterator[Finding]:
    uses = Counter(entry.file_name for entry in images)
    twice = [file_name for file_name, count in uses.items() if count > 1]
    if twice:
        shown = few((shorten(repr(file_name), 60) for file_name in twice), len(twice))
        message = f"{name}: several images have the same file: {shown}."
        advice = "Merge them into one: for each of them the objects of the others are background."
        pictured = [entry.id for entry in images if uses[entry.file_name] > 1][:PICTURED]
        yield Finding("warning", "duplicate-file-name", message, advice, len(twice), tuple(pictured))
