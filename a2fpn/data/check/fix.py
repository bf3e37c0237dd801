"""Repair of a COCO file, with a list of all changes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a2fpn.data.annotation_table import AnnotationTable, given
from a2fpn.data.check.annotations import apart, contradicted_areas, over_edge
from a2fpn.data.check.problem import annotation_name
from a2fpn.data.document import CocoDocument, Source, is_whole
from a2fpn.data.images import image_path
from a2fpn.data.importers.files import ImageIndex
from a2fpn.data.rules import find_faults, usable_rows
from a2fpn.data.text_files import has_byte_order_mark
from a2fpn.errors import DataError, ImageError
from a2fpn.masks.segmentation import Polygons

_DECIMALS = 4


@dataclass(frozen=True)
class Change:
    """One change.

    Args:
        kind: ``"encoding"``, ``"path"``, ``"id"``, ``"iscrowd"``, ``"mask"``, ``"box"`` or ``"area"``.
        place: The image or annotation.
        old: The old value.
        new: The new value.
        reason: The reason.
    """

    kind: str
    place: str
    old: object
    new: object
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {_shown(self.old)} -> {_shown(self.new)} ({self.reason})"


@dataclass(frozen=True)
class FixedData:
    """A repaired COCO file.

    Args:
        content: The repaired content.
        changes: In the order of the file: encoding, images, annotations.
    """

    content: dict[str, Any]
    changes: tuple[Change, ...]


def fix_data(annotations: Source, images: str | Path | None = None) -> FixedData:
    """Repair unambiguous faults of a COCO file; ambiguous ones are kept and reported by ``check_data``.

    - A byte order mark is removed.
    - Image paths get slashes, and point into ``images`` if exactly one file below it has the name.
    - Annotations get a unique id if it is missing, 0 or repeated, and ``iscrowd`` becomes 0 or 1.
    - Invalid masks, and invalid parts of others, are removed.
    - Boxes that are missing, without area or differ from their mask are computed from the mask; those that extend over
      the edge are clipped.
    - Areas that are missing, not positive or contradict the mask or box are computed.

    Args:
        annotations: The JSON file or its content, which is not modified.
        images: The image folder; None changes only the backslashes of paths.

    Raises:
        DataError: If it is not a COCO file, or the folder is missing.

    Example:
        >>> fixed = fix_data({
        ...     "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 5, "category_id": 7, "bbox": [10, 10, 20, 20], "area": -1}],
        ... })
        >>> print(*fixed.changes)
        area: annotation 1: -1 -> 400.0 (not above 0)
    """
    root = None if images is None else Path(images)
    if root is not None and not root.is_dir():
        raise DataError(f"{root}: no such folder of images.")
    file = CocoDocument.read(annotations)
    changes: list[Change] = []
    if isinstance(annotations, (str, Path)) and has_byte_order_mark(Path(annotations)):
        changes.append(Change("encoding", "the file", "a byte order mark", "none", "JSON must not have one"))
    entries = [_fixed_image(raw, root, changes) for raw in _tracked_index(file.content["images"], root)]
    content = {**file.content, "images": entries, "annotations": _fixed_annotations(file, changes)}
    return FixedData(content, tuple(changes))


def _tracked_index(raws: Sequence[Any], root: Path | None) -> Iterator[tuple[Any, ImageIndex | None]]:
    """Yield entries with the index of the folder, which is built only when a file is not at its path."""
    index: ImageIndex | None = None
    for raw in raws:
        if root is not None and index is None and not _lies_in(root, raw):
            index = ImageIndex(root)
        yield raw, index


def _lies_in(root: Path, raw: Any) -> bool:
    name = raw.get("file_name") if isinstance(raw, Mapping) else None
    if not isinstance(name, str):
        return True
    try:
        return os.path.isfile(image_path(root, name)) and not os.path.isabs(name)
    except ImageError:
        return False


def _fixed_image(entry: tuple[Any, ImageIndex | None], root: Path | None, changes: list[Change]) -> Any:
    raw, index = entry
    name = raw.get("file_name") if isinstance(raw, Mapping) else None
    if not isinstance(name, str):
        return raw
    new = name.replace("\\", "/")
    if root is not None:
        new = name if index is None or _lies_in(root, raw) else _found(root, new, index) or name
    if new == name:
        return raw
    changes.append(Change("path", f"image {raw.get('id')}", name, new, "slashes, and inside the folder"))
    return {**raw, "file_name": new}


def _found(root: Path, name: str, index: ImageIndex) -> str:
    """Return an image's path below the folder; empty if there is none, or several."""
    try:
        path: Path | None = image_path(root, name)
    except ImageError:
        path = None
    if path is None or not path.is_file():
        path = index.find(name)
    same = path is not None and path.name.lower() == posixpath.basename(name).lower()
    return path.relative_to(root).as_posix() if path is not None and same else ""


def _fixed_annotations(file: CocoDocument, changes: list[Change]) -> list[Any]:
    table = AnnotationTable.of(file.entries, file.images, file.index, file.categories, num_keypoints=file.num_keypoints)
    fixes = _Fixes(table, changes)
    return [fixes.apply(row, raw) if isinstance(raw, Mapping) else raw for row, raw in enumerate(file.entries)]


class _Fixes:
    """Changes to annotations, by row."""

    def __init__(self, table: AnnotationTable, changes: list[Change]) -> None:
        self.table = table
        self.changes = changes
        self.usable = usable_rows(len(table), find_faults(table))
        extents = table.of_masks(table.segmentations.extents)
        self.of_mask = np.concatenate([extents[:, :2], extents[:, 2:] - extents[:, :2]], axis=1)
        self.from_mask = (table.box != table.given_box).any(1) & ~np.isnan(table.box).any(1)
        self.over = over_edge(table)
        box = np.where(self.over[:, None], np.concatenate([table.corners[:, :2], table.inside], axis=1), table.box)
        cut = dataclasses.replace(table, box=box)  # otherwise the copy would have new faults
        self.apart = apart(cut)
        self.contradicted = contradicted_areas(cut)
        ids = [raw.get("id") for raw in table.entries]
        self.seen: set[int] = set()
        self.fresh = itertools.count(1 + max([0, *(int(value) for value in ids if is_whole(value))]))

    def apply(self, row: int, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the repaired annotation."""
        entry = dict(raw)
        name = annotation_name(raw, row)
        place = name.replace("the one", "the annotation") if name.startswith("the one") else f"annotation {name}"
        for kind, key, value, reason in itertools.chain(self._ids(raw), self._values(row, raw)):
            self.changes.append(Change(kind, place, raw.get(key), value, reason))
            entry[key] = value
        return entry

    def _ids(self, raw: Mapping[str, Any]) -> Iterator[tuple[str, str, object, str]]:
        annotation_id = raw.get("id")
        if not is_whole(annotation_id) or annotation_id == 0:
            yield "id", "id", next(self.fresh), "not an integer above 0"
        elif annotation_id in self.seen:
            yield "id", "id", next(self.fresh), "another annotation has it"
        else:
            self.seen.add(annotation_id)

    def _values(self, row: int, raw: Mapping[str, Any]) -> Iterator[tuple[str, str, object, str]]:
        table = self.table
        crowd = raw.get("iscrowd")
        if "iscrowd" in raw and not (type(crowd) is int and crowd in (0, 1)):
            odd = bool(table.odd_crowd[row])
            yield "iscrowd", "iscrowd", int(table.crowd[row]), "neither 0 nor 1" if odd else "0 or 1"
        if row in table.broken:
            error = table.segmentations.errors.get(table.broken[row], "no pixel inside the image")
            yield "mask", "segmentation", [], error
        mask = int(table.mask[row])
        if mask in table.segmentations.fragments:
            polygons = table.segmentations[mask]
            kept = [points.reshape(-1).tolist() for points in polygons.points] if isinstance(polygons, Polygons) else []
            yield "mask", "segmentation", kept, table.segmentations.fragments[mask][0]
        if not self.usable[row]:
            return
        box = table.box[row]
        if self.from_mask[row] or self.apart[row]:
            box = self.of_mask[row]
            reason = (
                "it is empty; taken from the mask"
                if self.from_mask[row]
                else "it does not match the mask; taken from the mask"
            )
            yield "box", "bbox", _rounded(self._cut(row, box)), reason
        elif self.over[row]:
            box = self._cut(row, box)
            yield "box", "bbox", _rounded(box), "clipped to the image"
        yield from self._area(row, raw, box)

    def _cut(self, row: int, box: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        low = np.maximum(box[:2], 0)
        return np.concatenate([low, np.minimum(box[:2] + box[2:], self.table.limits[row]) - low])

    def _area(self, row: int, raw: Mapping[str, Any], box: Any) -> Iterator[tuple[str, str, object, str]]:
        number, area = int(self.table.mask[row]), float(self.table.area[row])
        if area > 0 and np.isfinite(area) and not self.contradicted[row]:
            return
        reason = "missing" if not given(raw.get("area")) else "not above 0"
        if area > 0 and np.isfinite(area):
            reason = "the mask contradicts it" if number >= 0 else "the box contradicts it"
        own = float(self.table.segmentations.areas[number]) if number >= 0 else 0.0
        yield "area", "area", round(own or float(box[2] * box[3]), _DECIMALS), reason


def _rounded(box: Any) -> list[float]:
    return [round(float(side), _DECIMALS) for side in box]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
