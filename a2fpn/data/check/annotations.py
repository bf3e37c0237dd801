"""Problems of single annotations: references, ids, boxes, masks, keypoints."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from a2fpn.data.check.reader import CocoDocument, is_whole
from a2fpn.data.check.report import (
    Finding,
    Track,
    count_of,
)
from a2fpn.data.check.table import NO_ID, UNKNOWN, AnnotationTable, Problem, any_column
from a2fpn.masks.rle import Rle
from a2fpn.masks.segmentation import segmentation_to_rle

_LEAST_SIDE = 0.01  # pixels inside the image; the reader leaves out boxes with less
_LARGEST_MASK = 2**31  # pixels; pycocotools counts them in 32 bits
_LARGEST_COORDINATE = 1e6  # the reader's limit for polygons
_EDGE = 1.0  # pixels that a box may reach over the edge by rounding
_MASK_SLACK, _MASK_SLACK_SHARE = 3.0, 0.1  # pixels, and share of the box's longer side


def reference_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Annotations without an image or a category."""
    no_ids = (table.image == NO_ID) | (table.category == NO_ID)
    advice = "Write image_id and category_id as whole numbers, not as text."
    yield Problem("warning", "bad-ids", no_ids, "An image_id or category_id that is no whole number", advice, True)
    advice = "List the image, or remove what belonged to it."
    unknown = (table.image == UNKNOWN) & ~no_ids
    yield Problem("warning", "unknown-image", unknown, "An image_id that the file doesn't list", advice, True)
    advice = "List the category; without a name it can't be learned."
    unknown = (table.category == UNKNOWN) & ~no_ids
    yield Problem("warning", "unknown-category", unknown, "A category_id that the file doesn't list", advice, True)


def id_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Ids of annotations; the reader doesn't need them, other tools do."""
    ids = [raw.get("id") for raw in table.entries]
    whole = [is_whole(value) for value in ids]
    uses = Counter(value for value, good in zip(ids, whole, strict=True) if good)
    zero, duplicate = (
        np.array([good and test(value) for value, good in zip(ids, whole, strict=True)], dtype=np.bool_)
        for test in (lambda value: value == 0, lambda value: uses[value] > 1)
    )
    advice = "Nothing here depends on it, but pycocotools takes an object that matches id 0 for missed; count from 1."
    yield Problem("note", "annotation-id-zero", zero, "The id 0", advice)
    advice = "Nothing here depends on ids, but pycocotools keeps one annotation of each; look for a file merged twice."
    yield Problem("warning", "duplicate-annotation-id", duplicate, "An id that others have too", advice)
    missing = ~np.array(whole, dtype=np.bool_)
    advice = "Nothing here depends on it, but pycocotools needs whole-number ids."
    yield Problem("note", "no-annotation-id", missing, "No whole-number id", advice)


def box_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Boxes that hold nothing, or lie elsewhere."""
    bad = any_column(np.isnan(table.box))
    advice = "A bbox is [x, y, width, height] in pixels."
    yield Problem("warning", "bad-box", bad, "A bbox that is not four finite numbers", advice, True)
    empty = any_column(table.box[:, 2:] < _LEAST_SIDE)
    advice = "Remove them, or compute the box from the mask."
    yield Problem("warning", "empty-box", empty, "A box without width or height", advice, True)
    outside = ~empty & any_column(table.inside < _LEAST_SIDE)
    advice = "Compare with the size of the image: was it cropped, resized or turned after annotating?"
    yield Problem("warning", "box-outside", outside, "A box outside its image", advice, True)
    low, high = table.box[:, :2], table.box[:, :2] + table.box[:, 2:]
    over = ~empty & ~outside & (any_column(low < -_EDGE) | any_column(high > table.limits + _EDGE))
    yield Problem(
        "note", "box-over-edge", over, "A box that reaches over the edge of its image", "It is cut off there."
    )


def box_format(table: AnnotationTable) -> Iterator[Finding]:
    """Boxes that make sense only if they are read in another way."""
    known = ~any_column(np.isnan(table.box)) & ~any_column(np.isnan(table.limits))
    box, limits = table.box[known], table.limits[known]
    if not len(box):
        return
    low, last = box[:, :2], box[:, 2:]
    over = any_column(low + last > limits + _EDGE).mean()
    corners = ((last > low) & (last <= limits + _EDGE)).all(1).mean()
    if over > 1 / 3 and corners > 0.99:
        message = f"{over:.0%} of the boxes reach over the edge, but all fit if they are read as [x0, y0, x1, y1]."
        yield Finding("error", "box-corners", message, "A bbox is [x, y, width, height]: convert them.", len(box))
    if ((box >= 0) & (box <= 1)).all() and (limits > 8).all():
        message = f"All {count_of(len(box), 'box')} lie between 0 and 1: they seem to be shares of the image's sides."
        yield Finding("error", "box-shares", message, "Multiply them by width and height.", len(box), fatal=True)


def mask_problems(table: AnnotationTable, track: Track) -> Iterator[Problem]:
    """Masks that can't be read, are empty, or lie elsewhere than their boxes."""
    if not table.has_masks:
        return
    none, polygon, rle = (np.zeros(len(table), dtype=np.bool_) for _ in range(3))
    extents = np.full((len(table), 4), np.nan)  # xyxy
    points, ends, drawn = array("d"), [0], []
    rles: list[Rle] = []
    encoded: list[int] = []
    known = np.flatnonzero(table.image >= 0).tolist()
    for row in track(known, "checking masks", len(known)):
        segmentation = table.entries[row].get("segmentation")
        if not segmentation:
            none[row] = True
        elif isinstance(segmentation, list):
            try:
                _extend_points(points, segmentation)
            except (TypeError, ValueError, OverflowError):
                del points[ends[-1] :]
                polygon[row] = True
            else:
                ends.append(len(points))
                drawn.append(row)
        else:
            width, height = (int(side) for side in table.limits[row])
            try:
                rles.append(segmentation_to_rle(segmentation, height, width))
                encoded.append(row)
            except (TypeError, ValueError, OverflowError):
                rle[row] = True
    if drawn:
        xy = np.array(points, dtype=np.float64).reshape(-1, 2)
        starts = np.array(ends[:-1]) // 2
        low, high = (reduce.reduceat(xy, starts) for reduce in (np.minimum, np.maximum))
        extents[drawn] = np.concatenate([low, high], axis=1)
        far = np.array(drawn)[any_column(~(np.abs(extents[drawn]) < _LARGEST_COORDINATE))]  # or NaN
        polygon[far] = True
        extents[far] = np.nan
    if encoded:
        boxes = np.asarray(mask_utils.toBbox(rles), dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        extents[encoded] = np.where(table.limits[encoded].prod(1)[:, None] < _LARGEST_MASK, boxes, np.nan)

    advice = "Give every object of a file with masks a mask, or none."
    yield Problem("warning", "no-segmentation", none, "No segmentation", advice, True)
    advice = "A polygon is a list of at least 3 points: x, y, x, y, ... in pixels."
    yield Problem("warning", "bad-polygon", polygon, "A polygon with too few points or bad coordinates", advice, True)
    advice = "The run lengths must fill the image, and size be [height, width]; was the image resized?"
    yield Problem("warning", "bad-mask", rle, "A run-length encoding that can't be read", advice, True)
    empty = any_column(extents[:, 2:] <= extents[:, :2])
    yield Problem("warning", "empty-mask", empty, "A mask without area", "Remove them, or draw them again.")
    low, high = np.maximum(extents[:, :2], 0), np.minimum(extents[:, 2:], table.limits)
    difference = np.abs(np.concatenate([low, high], axis=1) - table.corners).max(1)
    slack = np.maximum(_MASK_SLACK, _MASK_SLACK_SHARE * table.box[:, 2:].max(1))
    apart = (
        ~empty & ~any_column(table.inside < _LEAST_SIDE) & ~any_column(np.isnan(table.inside)) & (difference > slack)
    )
    advice = "Compute the boxes from the masks; were the masks made for another version of the images?"
    yield Problem("warning", "mask-box-mismatch", apart, "A mask that doesn't fill its box", advice)


def keypoint_problems(file: CocoDocument, table: AnnotationTable) -> Iterator[Problem]:
    """Keypoints that are not three numbers for each of those that the file has."""
    lists = [raw.get("keypoints") for raw in table.entries]
    first = next((points for points in lists if isinstance(points, list) and points), None)
    if first is None:
        return
    count = len(first) // 3 if file.num_keypoints is None else file.num_keypoints
    if count:
        bad = np.array([points not in (None, []) and not _are_numbers(points, 3 * count) for points in lists])
        statement = f"Keypoints that are not {count} times x, y, visibility"
        advice = "Every object needs all keypoints of its category; visibility is 0 for those that are not labeled."
        yield Problem("warning", "bad-keypoints", bad, statement, advice, True)


def _are_numbers(values: object, count: int) -> bool:
    """Return whether a JSON value is a list of so many finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    try:
        return bool(np.isfinite(array("d", values)).all())
    except (TypeError, OverflowError):
        return False


def _extend_points(points: array[float], polygons: Sequence[Any]) -> None:
    """Append the coordinates of an object's polygons.

    Raises:
        TypeError: If a coordinate is no number.
        ValueError: If a polygon has fewer than three points.
        OverflowError: If a coordinate is an integer that no float holds.
    """
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError
        points.extend(polygon)
