"""Annotations as columns, and problems as rows of them.

Shape shorthand: N annotations, one row each, in the order of the file. Boxes are float64, in pixels.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.check.reader import CocoDocument, is_whole
from a2fpn.data.check.report import (
    PICTURED,
    SHOWN,
    Finding,
    Severity,
    Track,
    count_of,
    few,
)

Rows = NDArray[np.bool_]
UNKNOWN, NO_ID = -1, -2  # in the place of an index: an id that the file lacks; no whole number
_NO_BOX = (np.nan,) * 4


@dataclass(frozen=True, eq=False)
class AnnotationTable:
    """The annotations as columns.

    Args:
        entries: As in the file; empty in the place of what is no object.
        image: (N,) index of the image, ``UNKNOWN`` or ``NO_ID``.
        category: (N,) index of the category, ``UNKNOWN`` or ``NO_ID``.
        crowd: (N,).
        box: (N, 4) x, y, width, height; NaN where these are not four finite numbers.
        limits: (N, 2) width and height of the image; NaN where it is unknown.
        has_masks: Whether any annotation has a segmentation, so that all need one.
    """

    entries: Sequence[Mapping[str, Any]]
    image: NDArray[np.int64]
    category: NDArray[np.int64]
    crowd: Rows
    box: NDArray[np.float64]
    limits: NDArray[np.float64]
    has_masks: bool

    @classmethod
    def of(cls, file: CocoDocument, track: Track) -> AnnotationTable:
        """Make the table of a file."""
        categories = {category_id: index for index, category_id in enumerate(file.categories)}
        entries = [raw if isinstance(raw, Mapping) else {} for raw in file.entries]
        boxes = array("d")
        image: list[int] = []
        category: list[int] = []
        for raw in track(entries, "reading annotations", len(entries)):
            image_id, category_id, box = raw.get("image_id"), raw.get("category_id"), raw.get("bbox")
            image.append(file.index.get(image_id, UNKNOWN) if is_whole(image_id) else NO_ID)
            category.append(categories.get(category_id, UNKNOWN) if is_whole(category_id) else NO_ID)
            end = len(boxes)
            try:
                boxes.extend(box if isinstance(box, list) and len(box) == 4 else _NO_BOX)
            except (TypeError, OverflowError):  # no numbers, or an integer that no float holds
                del boxes[end:]
                boxes.extend(_NO_BOX)
        box = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        box[~np.isfinite(box).all(1)] = np.nan
        sides = np.array([*((entry.width, entry.height) for entry in file.images), (np.nan, np.nan)])
        index = np.array(image, dtype=np.int64)
        return cls(
            entries,
            index,
            np.array(category, dtype=np.int64),
            np.array([bool(raw.get("iscrowd", 0)) for raw in entries], dtype=np.bool_),
            box,
            sides[np.where(index >= 0, index, -1)],
            any(raw.get("segmentation") for raw in entries),
        )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def corners(self) -> NDArray[np.float64]:
        """(N, 4) boxes as xyxy, cut off at the image's border."""
        low, sides = self.box[:, :2], self.box[:, 2:]
        return np.concatenate([np.maximum(low, 0), np.minimum(low + sides, self.limits)], axis=1)

    @property
    def inside(self) -> NDArray[np.float64]:
        """(N, 2) width and height of the boxes inside the image; negative outside."""
        corners = self.corners
        inside: NDArray[np.float64] = corners[:, 2:] - corners[:, :2]
        return inside

    def used(self, file: CocoDocument) -> frozenset[int]:
        """Ids of the file's categories that annotations have."""
        ids = list(file.categories)
        return frozenset(ids[index] for index in np.unique(self.category[self.category >= 0]).tolist())


@dataclass(frozen=True, eq=False)
class Problem:
    """The annotations that have one problem.

    Args:
        severity: As in :class:`Finding`.
        code: As in :class:`Finding`.
        rows: (N,) which annotations.
        statement: What is the matter, to be followed by "in 3 of 100 annotations".
        advice: As in :class:`Finding`.
        left_out: Whether the reader leaves such annotations out.
    """

    severity: Severity
    code: str
    rows: Rows
    statement: str
    advice: str
    left_out: bool = False

    def finding(self, file: CocoDocument, table: AnnotationTable) -> Finding:
        """The problem as people see it."""
        rows = np.flatnonzero(self.rows).tolist()
        names = [_annotation_name(table.entries[row], row) for row in rows[:SHOWN]]
        images = dict.fromkeys(file.images[index].id for index in table.image[self.rows].tolist() if index >= 0)
        total = count_of(len(table), "annotation")
        message = f"{self.statement} in {len(rows):,} of {total}: {few(names, len(rows))}."
        lost = " The reader leaves them out." if self.left_out else ""
        return Finding(
            self.severity, self.code, message, self.advice + lost, len(rows), tuple(itertools.islice(images, PICTURED))
        )


def any_column(cells: NDArray[np.bool_]) -> Rows:
    """Return which rows of (N, C) hold a true value."""
    rows: Rows = np.logical_or.reduce(cells, axis=1)
    return rows


def _annotation_name(raw: Mapping[str, Any], row: int) -> str:
    """The id of an annotation, or its position where it has none."""
    annotation_id = raw.get("id")
    return str(annotation_id) if is_whole(annotation_id) else f"the one at position {row}"
