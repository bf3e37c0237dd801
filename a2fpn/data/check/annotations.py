"""Problems of single annotations: those that the reader's rules find, and others that it tolerates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from a2fpn._text import count_of
from a2fpn.data.annotation_table import LEAST_SIDE, AnnotationTable, Rows, any_column, given
from a2fpn.data.check.problem import Problem
from a2fpn.data.check.report import Finding, Severity, few
from a2fpn.data.document import is_whole
from a2fpn.data.rules import Fault, Outcome

_EDGE = 1.0  # pixels that a box may extend over the edge by rounding
_MASK_SLACK, _MASK_SLACK_SHARE = 3.0, 0.1  # pixels, and share of the box's longer side
_AREA_FACTOR, _AREA_SLACK = 2.0, 10.0  # tolerated factor from the mask's area, and tolerance in pixels
_LEAST_FILL = 0.01  # minimum share of its box for the area of an object without a mask

_FAULTS: dict[str, tuple[Severity, str, str]] = {
    "bad-ids": (
        "warning",
        "An image_id or category_id that is not an integer",
        "Write image_id and category_id as integers, not as strings.",
    ),
    "unknown-image": (
        "warning",
        "An image_id that the file doesn't list",
        "Add the image, or remove its annotations.",
    ),
    "unknown-category": (
        "warning",
        "A category_id that the file doesn't list",
        "Add the category with its name.",
    ),
    "bad-box": (
        "warning",
        "A bbox that is not four finite numbers",
        "A bbox is [x, y, width, height] in pixels.",
    ),
    "empty-box": ("warning", "A box without width or height", "Remove them, or compute the box from the mask."),
    "box-outside": (
        "warning",
        "A box outside its image",
        "Compare with the size of the image: was it cropped, resized or rotated after annotating?",
    ),
    "box-from-mask": (
        "note",
        "No box, or an empty one,",
        "It is computed from the mask; --fix writes it into the file.",
    ),
    "bad-keypoints": (
        "warning",
        "Keypoints that are not as many times x, y, visibility as in the rest of the file",
        "Every object needs all keypoints of its category; visibility is 0 for those that are not labeled.",
    ),
    "no-segmentation": (
        "warning",
        "No segmentation",
        "They are used for boxes only, in training and evaluation. Add masks if needed.",
    ),
    "bad-polygon": (
        "warning",
        "A polygon with too few points or bad coordinates",
        "A polygon is a list of at least 3 points: x, y, x, y, ... in pixels.",
    ),
    "bad-part": (
        "warning",
        "A polygon with too few points or bad coordinates among others",
        "A polygon is a list of at least 3 points: x, y, x, y, ... in pixels.",
    ),
    "bad-mask": (
        "warning",
        "A run-length encoding that can't be read",
        "The run lengths must fill the image, and size be [height, width]; was the image resized?",
    ),
    "empty-mask": ("warning", "A mask without area", "Remove them, or draw them again."),
    "bad-iscrowd": ("warning", "An iscrowd that is neither 0 nor 1", "Write 0 or 1; they count as objects."),
}
"""Severity, statement and advice for each of the reader's faults."""

_LOST: dict[Outcome, str] = {
    "left out": " The reader skips them.",
    "without mask": " The reader keeps the boxes without a mask.",
    "without a part": " The reader keeps the other parts.",
    "without keypoints": " The reader keeps the objects without keypoints.",
    "kept": "",
}


def fault_problems(table: AnnotationTable, faults: Iterable[Fault]) -> Iterator[Problem]:
    """Yield the faults found by the reader's rules."""
    for fault in faults:
        severity, statement, advice = _FAULTS[fault.code]
        yield Problem(
            severity, fault.code, fault.rows, statement, advice + _LOST[fault.outcome], _unknown_ids(table, fault)
        )


def _unknown_ids(table: AnnotationTable, fault: Fault) -> str:
    """List the ids that are not in the file."""
    key = {"unknown-image": "image_id", "unknown-category": "category_id"}.get(fault.code)
    if key is None:
        return ""
    uses = Counter(table.entries[row][key] for row in np.flatnonzero(fault.rows).tolist())
    return f" ({key} {few((unknown for unknown, _ in uses.most_common()), len(uses))})"


def id_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Yield problems of annotation ids, which other tools need, though not the reader."""
    ids = [raw.get("id") for raw in table.entries]
    whole = [is_whole(value) for value in ids]
    uses = Counter(value for value, good in zip(ids, whole, strict=True) if good)
    zero, duplicate = (
        np.array([good and test(value) for value, good in zip(ids, whole, strict=True)], dtype=np.bool_)
        for test in (lambda value: value == 0, lambda value: uses[value] > 1)
    )
    advice = "a2fpn does not use it, but pycocotools counts an object matched to id 0 as missed; start at 1."
    yield Problem("note", "annotation-id-zero", zero, "The id 0", advice)
    advice = "a2fpn does not use ids, but pycocotools keeps one annotation per id; was a file merged twice?"
    yield Problem("warning", "duplicate-annotation-id", duplicate, "A duplicate id", advice)
    missing = ~np.array(whole, dtype=np.bool_)
    advice = "a2fpn does not use it, but pycocotools needs integer ids."
    yield Problem("note", "no-annotation-id", missing, "No integer id", advice)


def box_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Yield problems of boxes that extend over the edge, or do not match their mask."""
    over = over_edge(table)
    far = over & (table.inside.prod(1) < table.box[:, 2:].prod(1) / 2)
    advice = "It is clipped to the image."
    yield Problem("note", "box-over-edge", over & ~far, "A box that extends beyond its image", advice)
    advice += " Were the labels drawn on a larger version of the image?"
    yield Problem("warning", "box-far-over-edge", far, "A box with less than half of its area in its image", advice)
    advice = "Compute the boxes from the masks; were the masks made for another version of the images?"
    yield Problem("warning", "mask-box-mismatch", apart(table), "A mask that doesn't fill its box", advice)


def over_edge(table: AnnotationTable) -> Rows:
    """Boxes that extend over the edge of their image by more than rounding, and are not outside."""
    low, high = table.box[:, :2], table.box[:, :2] + table.box[:, 2:]
    reaching = any_column(low < -_EDGE) | any_column(high > table.limits + _EDGE)
    return reaching & (table.inside >= LEAST_SIDE).all(1)


def apart(table: AnnotationTable) -> Rows:
    """Boxes that differ from the bounding boxes of their masks."""
    extents = table.of_masks(table.segmentations.extents)
    low, high = np.maximum(extents[:, :2], 0), np.minimum(extents[:, 2:], table.limits)
    difference = np.abs(np.concatenate([low, high], axis=1) - table.corners).max(1)
    slack = np.maximum(_MASK_SLACK, _MASK_SLACK_SHARE * table.box[:, 2:].max(1))
    rows: Rows = (table.inside >= LEAST_SIDE).all(1) & (difference > slack)
    return rows


def area_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Yield problems of areas, with which evaluation would misjudge the size of objects or drop them."""
    stated = np.array([given(raw.get("area")) for raw in table.entries], dtype=np.bool_)
    advice = "It decides which objects are small or large; a2fpn computes it, other tools read it. --fix writes it."
    bad = stated & ~((table.area > 0) & np.isfinite(table.area))
    yield Problem("warning", "bad-area", bad, "An area that is not above 0", advice)
    advice = "It decides which objects are small or large, and scales OKS. Compute it; --fix does."
    statement = "An area that the mask or the box contradicts"
    yield Problem("warning", "area-mismatch", contradicted_areas(table), statement, advice)


def contradicted_areas(table: AnnotationTable) -> Rows:
    """Positive areas that are far from that of the mask or, without one, don't match the box."""
    area, own = table.area, table.of_masks(table.segmentations.areas)
    boxed = table.box[:, 2:].prod(1)
    usual = (area > 0) & np.isfinite(area) & (table.inside >= LEAST_SIDE).all(1)
    far = (area > _AREA_FACTOR * own + _AREA_SLACK) | (own > _AREA_FACTOR * area + _AREA_SLACK)
    unfit = (area > _AREA_FACTOR * boxed + _AREA_SLACK) | (area < _LEAST_FILL * boxed - _AREA_SLACK)
    return usual & np.where(table.mask >= 0, far, unfit)


def box_format(table: AnnotationTable) -> Iterator[Finding]:
    """Report boxes that make sense only in another format."""
    own = (table.given_box == table.box).all(1)  # not NaN, nor computed from a mask
    known = own & ~any_column(np.isnan(table.limits))
    box, limits = table.given_box[known], table.limits[known]
    if not len(box):
        return
    low, last = box[:, :2], box[:, 2:]
    over = any_column(low + last > limits + _EDGE).mean()
    corners = ((last > low) & (last <= limits + _EDGE)).all(1).mean()
    if over > 1 / 3 and corners > 0.99:
        message = f"{over:.0%} of the boxes extend beyond the image, but all fit if they are read as [x0, y0, x1, y1]."
        yield Finding("error", "box-corners", message, "A bbox is [x, y, width, height]: convert them.", len(box))
    if ((box >= 0) & (box <= 1)).all() and (limits > 8).all():
        message = f"All {count_of(len(box), 'box')} lie between 0 and 1: they seem to be relative to the image size."
        yield Finding("error", "box-shares", message, "Multiply them by width and height.", len(box), fatal=True)
