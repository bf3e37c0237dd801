"""Annotations as JSON text: box, area and mask of an object as required by the reader."""

from __future__ import annotations

import math
from dataclasses import replace

import orjson
from pycocotools import mask as mask_utils

from a2fpn.data.annotation_table import LEAST_SIDE
from a2fpn.data.labeled import Box, LabeledObject, LossLog, polygon_area, polygon_box
from a2fpn.masks.segmentation import COORDINATE_LIMIT, Polygons, Segmentations, parse_segmentation


def encode(value: object) -> str:
    """Return a value as JSON."""
    return orjson.dumps(value).decode()


def measure(labeled: LabeledObject, height: int, width: int) -> tuple[Box, float]:
    """Compute the box and the area of an object, as required by the reader.

    Raises:
        ValueError: If the reader would drop the object.
    """
    segmentation = labeled.segmentation
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("it has no polygon")
        try:
            for polygon in segmentation:
                if len(polygon) < 6 or len(polygon) % 2:
                    raise ValueError(f"a polygon needs 3 or more points x, y, got {len(polygon)} numbers")
            extent, area = polygon_box(segmentation), polygon_area(segmentation)
        except (TypeError, OverflowError):
            raise ValueError("a polygon has a coordinate that is not a number") from None
        x, y, w, h = extent
        valid = min(x, y) > -COORDINATE_LIMIT and x + w < COORDINATE_LIMIT and y + h < COORDINATE_LIMIT
        # NaN and infinity propagate to the area, even if they escape the minimum and maximum.
        if not (valid and math.isfinite(area)):
            raise ValueError("a polygon has a coordinate that is not a valid pixel position")
        box = _given_box(labeled) or extent
    elif segmentation is not None:
        rle = parse_segmentation(segmentation, height, width)
        left, top, w, h = mask_utils.toBbox(rle).tolist()
        box, area = _given_box(labeled) or (left, top, w, h), float(mask_utils.area(rle))
        if not area:
            raise ValueError("its mask is empty")
    elif labeled.bbox is not None:
        box, area = labeled.bbox, labeled.bbox[2] * labeled.bbox[3]
    elif any(labeled.keypoints[2::3]):
        seen = [(x, y) for x, y, v in zip(*(labeled.keypoints[i::3] for i in range(3)), strict=True) if v]
        xs, ys = zip(*seen, strict=True)
        # The box around points alone has no margin; a pixel each side keeps it from being empty.
        box = (min(xs) - 1, min(ys) - 1, max(xs) - min(xs) + 2, max(ys) - min(ys) + 2)
        area = box[2] * box[3]
    else:
        raise ValueError("it has neither box nor mask")
    x, y, w, h = box
    inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height
    if not (inside or all(map(math.isfinite, box))):
        raise ValueError(f"its box {list(box)} has non-numeric values")
    if w < LEAST_SIDE or h < LEAST_SIDE:
        raise ValueError(f"its box {_rounded(box)} has no area")
    if not inside and min(min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)) < LEAST_SIDE:
        raise ValueError(f"its box {_rounded(box)} lies outside the image of {width} x {height} pixels")
    return (x, y, round(w, 4), round(h, 4)), round(area, 4)


def _given_box(labeled: LabeledObject) -> Box | None:
    """Box given by the source, if it has an area."""
    return labeled.bbox if labeled.bbox and min(labeled.bbox[2:]) >= LEAST_SIDE else None


def _rounded(box: Box) -> list[float]:
    return [round(side, 2) for side in box]


def without_unusable(labeled: LabeledObject, height: int, width: int) -> LabeledObject | None:
    """Return an object without the invalid parts of its mask, or without the mask; None if nothing is left.

    Args:
        labeled: An object that :func:`measure` refuses.
        height: Height of the image, pixels.
        width: Width of the image, pixels.
    """
    if labeled.segmentation is None:
        return None
    found = Segmentations.of([(labeled.segmentation, height, width)])
    if found.errors:
        return None if labeled.bbox is None else replace(labeled, segmentation=None)
    mask = found[0]
    if not found.fragments or not isinstance(mask, Polygons):
        return None  # the fault is not in the mask
    return replace(labeled, segmentation=[points.reshape(-1).tolist() for points in mask.points])


def usable(
    labeled: LabeledObject, height: int, width: int, log: LossLog, file: str
) -> tuple[LabeledObject, Box, float] | None:
    """Return what the reader would keep of an object, with its box and area; None for nothing. Losses are logged."""
    try:
        return labeled, *measure(labeled, height, width)
    except ValueError as error:
        kept = without_unusable(labeled, height, width)
        left = "unusable-object" if kept is None else "unusable-mask"
        outcome = "skipped" if kept is None else "kept without that"
        log.add(left, file, f"{labeled.category}: {error}; {outcome}", place=labeled.line)
        return None if kept is None else usable(kept, height, width, log, file)


def with_keypoints(text: str, length: int) -> str:
    """Pad the keypoints of an annotation to the number of its class, which grows while names are discovered."""
    record = orjson.loads("{" + text)
    missing = length - len(record["keypoints"])
    return encode(record | {"keypoints": record["keypoints"] + [0] * missing})[1:] if missing > 0 else text


def with_box_mask(text: str) -> str:
    """Set the mask of an annotation to its box."""
    record = orjson.loads("{" + text)
    x, y, w, h = record["bbox"]
    return encode(record | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})[1:]
