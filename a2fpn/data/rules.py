"""Rules for reading annotations: those dropped, those kept without their mask, and the reasons.

The reader (:func:`a2fpn.data.read_coco`) applies the same rules that the checker reports.

Shape shorthand: N annotations, one row each, in the order of the file.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from a2fpn.data.annotation_table import LEAST_SIDE, NO_ID, UNKNOWN, AnnotationTable, Rows, any_column, given

Outcome = Literal["left out", "without mask", "without a part", "without keypoints", "kept"]


@dataclass(frozen=True, eq=False)
class Fault:
    """Annotations with one fault.

    Args:
        code: A stable name, such as ``"box-outside"``.
        rows: (N,) mask of the annotations.
        outcome: The reader's treatment of them.
        reason: Function from a row to a description of its fault.
    """

    code: str
    rows: Rows
    outcome: Outcome
    reason: Callable[[int], str]


def find_faults(table: AnnotationTable) -> list[Fault]:
    """Return the faults found by the reader, in its order of reporting, without empty ones."""
    return [fault for fault in _faults(table) if fault.rows.any()]


def usable_rows(count: int, faults: Iterable[Fault]) -> Rows:
    """Return a mask of the rows that the reader keeps."""
    usable = np.ones(count, dtype=np.bool_)
    for fault in faults:
        if fault.outcome == "left out":
            usable &= ~fault.rows
    return usable


def _faults(table: AnnotationTable) -> Iterator[Fault]:
    yield from _reference_faults(table)
    yield from _box_faults(table)
    if table.num_keypoints:
        yield _keypoint_fault(table)
    yield from _mask_faults(table)
    yield Fault(
        "bad-iscrowd",
        table.odd_crowd,
        "kept",
        lambda row: f"its iscrowd is {table.entries[row]['iscrowd']!r}, neither 0 nor 1; it counts as an object",
    )


def _reference_faults(table: AnnotationTable) -> Iterator[Fault]:
    """Annotations without an image or a category."""
    entries = table.entries
    no_ids = (table.image == NO_ID) | (table.category == NO_ID)
    yield Fault("bad-ids", no_ids, "left out", lambda row: f"{_NEEDED}, with integer ids")
    for code, key, what, column in (
        ("unknown-image", "image_id", "image", table.image),
        ("unknown-category", "category_id", "category", table.category),
    ):
        yield Fault(
            code,
            (column == UNKNOWN) & ~no_ids,
            "left out",
            lambda row, key=key, what=what: f"its {what} {entries[row][key]} is not in the file",  # type: ignore[misc]
        )


_NEEDED = "it needs image_id, category_id and bbox = [x, y, width, height]"


def _box_faults(table: AnnotationTable) -> Iterator[Fault]:
    """Boxes that are malformed, without area, or outside the image."""
    entries = table.entries

    def malformed(row: int) -> str:
        box = entries[row].get("bbox")
        four = isinstance(box, (list, tuple, np.ndarray)) and len(box) == 4
        return f"its box has non-numeric values: {box}" if four else _NEEDED

    def nothing(row: int) -> str:
        width, height = (int(side) if math.isfinite(side) else side for side in table.limits[row].tolist())
        return f"its box {entries[row].get('bbox')} has no area inside the image of {width} x {height} pixels"

    yield Fault("bad-box", any_column(np.isnan(table.box)), "left out", malformed)
    empty = any_column(table.box[:, 2:] < LEAST_SIDE)
    yield Fault("empty-box", empty, "left out", nothing)
    yield Fault("box-outside", ~empty & any_column(table.inside < LEAST_SIDE), "left out", nothing)
    of_mask = any_column(table.box != table.given_box) & ~any_column(np.isnan(table.box))
    yield Fault("box-from-mask", of_mask, "kept", lambda row: "its box is that of its mask")


def _mask_faults(table: AnnotationTable) -> Iterator[Fault]:
    """Invalid or partly invalid masks."""
    found = table.segmentations
    rows = {code: np.zeros(len(table), dtype=np.bool_) for code in ("bad-polygon", "bad-mask", "empty-mask")}
    for row, number in table.broken.items():
        is_list = not isinstance(table.entries[row]["segmentation"], (Mapping, str)) and _is_list(table, row)
        rows["empty-mask" if number not in found.errors else "bad-polygon" if is_list else "bad-mask"][row] = True

    def unusable(row: int) -> str:
        return f"{found.errors[table.broken[row]]}; it is kept without its mask"

    yield Fault("bad-polygon", rows["bad-polygon"], "without mask", unusable)
    yield Fault("bad-mask", rows["bad-mask"], "without mask", unusable)
    reason = "its mask has no pixel inside the image; it is kept without it"
    yield Fault("empty-mask", rows["empty-mask"], "without mask", lambda row: reason)
    parts = np.zeros(len(found) + 1, dtype=np.bool_)
    parts[list(found.fragments)] = True

    def fragments(row: int) -> str:
        faults = found.fragments[int(table.mask[row])]
        return f"{faults[0]}; it is kept without {len(faults)} such part{'s' * (len(faults) > 1)}"

    yield Fault("bad-part", parts[table.mask], "without a part", fragments)
    none = (table.image >= 0) & (table.mask < 0)
    none[list(table.broken)] = False
    if table.has_masks:
        yield Fault("no-segmentation", none, "kept", lambda row: "it has no mask")


def _is_list(table: AnnotationTable, row: int) -> bool:
    return isinstance(table.entries[row]["segmentation"], (list, tuple, np.ndarray))


def _keypoint_fault(table: AnnotationTable) -> Fault:
    """Keypoints that are not three numbers for each keypoint of the file."""
    count = table.num_keypoints

    def reason(row: int) -> str:
        values = table.entries[row]["keypoints"]
        if _length(values) != 3 * count:
            got = type(values).__name__ if _length(values) is None else len(values)
            fault = f"its keypoints must be a list of 3 x {count} numbers as in the rest of the file, got {got}"
        else:
            fault = "its keypoints have non-numeric values"
        return f"{fault}; it is kept without them"

    bad = [given(values) and not _are_numbers(values, 3 * count) for values in map(_points, table.entries)]
    return Fault("bad-keypoints", np.array(bad, dtype=np.bool_), "without keypoints", reason)


def _points(raw: Mapping[str, Any]) -> object:
    return raw.get("keypoints")


def _length(values: object) -> int | None:
    return len(values) if isinstance(values, (list, tuple, np.ndarray)) else None


def _are_numbers(values: object, count: int) -> bool:
    """Return whether a value is a list of ``count`` finite numbers."""
    if _length(values) != count:
        return False
    try:
        return bool(np.isfinite(array("d", cast(Iterable[float], values))).all())
    except (TypeError, OverflowError):
        return False
