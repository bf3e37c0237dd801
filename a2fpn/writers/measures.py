"""Size, position and shape of objects, in pixels and in micrometers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from a2fpn.inference.result import Result
from a2fpn.masks.rle import decode_windows

_LENGTHS = ("x", "y", "width", "height", "centroid_x", "centroid_y", "equivalent_diameter")
PIXELS = (*_LENGTHS[:4], "area", *_LENGTHS[4:], "eccentricity")
MICRONS = (*(f"{name}_um" for name in _LENGTHS[:4]), "area_um2", *(f"{name}_um" for name in _LENGTHS[4:]))
"""Names of the measures, in the order of a table's columns."""


def measures(result: Result) -> Iterator[dict[str, float | None]]:
    """Yield the measures of each object.

    ``score``; ``x``, ``y``, ``width`` and ``height`` of its box; ``area``, ``centroid_x``, ``centroid_y``,
    ``equivalent_diameter`` (of the disk of this area) and ``eccentricity`` (of the ellipse with the same second
    moments, 0 for a disk) of its mask, or of its box without masks. Coordinates are those of boxes: the
    center of the first pixel is at 0.5. The same with ``_um`` and ``_um2`` in micrometers, None if the image does not
    state its pixel size. Centroid and eccentricity of an object without pixels are None.

    Example:
        >>> from a2fpn import Category
        >>> result = Result(
        ...     boxes=np.array([[2, 2, 6, 5]], dtype=np.float32), scores=np.array([0.75], dtype=np.float32),
        ...     labels=np.array([0]), size=(8, 10), categories=(Category(7, "cat"),), microns_per_pixel=0.5,
        ... )
        >>> row = next(measures(result))
        >>> row["area"], row["area_um2"], row["centroid_x"], row["centroid_y_um"]
        (12.0, 3.0, 4.0, 1.75)
    """
    scale = result.microns_per_pixel
    boxes = sides(result.boxes)
    shapes: Iterable[tuple[float, ...]] = map(_of_box, boxes) if result.rles is None else _of_masks(result)
    for score, box, (area, center_x, center_y, eccentricity) in zip(
        result.scores.tolist(), boxes.tolist(), shapes, strict=True
    ):
        values = [*box, area, center_x, center_y, 2 * math.sqrt(area / math.pi), eccentricity]
        row: dict[str, float | None] = {"score": round(score, 4)}
        row |= {name: None if math.isnan(x) else round(x, 4) for name, x in zip(PIXELS, values, strict=True)}
        for name, microns in zip(PIXELS, MICRONS, strict=False):  # eccentricity has no unit
            value, factor = row[name], None if scale is None else scale ** (2 if name == "area" else 1)
            row[microns] = None if value is None or factor is None else round(value * factor, 6)
        yield row


def _of_masks(result: Result) -> Iterator[tuple[float, float, float, float]]:
    for window, (left, top, _, _) in decode_windows(result.rles or ()):
        if not window.size:
            yield 0.0, math.nan, math.nan, math.nan
            continue
        columns, rows = window.sum(0, dtype=np.int64), window.sum(1, dtype=np.int64)
        area = int(columns.sum())
        x, y = np.arange(len(columns)) + 0.5, np.arange(len(rows)) + 0.5
        center_x, center_y = float(columns @ x) / area, float(rows @ y) / area
        # Plus the variance of a unit square, since pixels are not points.
        xx = float(columns @ np.square(x - center_x)) / area + 1 / 12
        yy = float(rows @ np.square(y - center_y)) / area + 1 / 12
        xy = float((y - center_y) @ window @ (x - center_x)) / area
        yield float(area), left + center_x, top + center_y, _eccentricity(xx, yy, xy)


def _of_box(box: NDArray[np.float64]) -> tuple[float, float, float, float]:
    x, y, width, height = box.tolist()
    return width * height, x + width / 2, y + height / 2, _eccentricity(width**2 / 12, height**2 / 12, 0.0)


def _eccentricity(xx: float, yy: float, xy: float) -> float:
    spread = math.hypot((xx - yy) / 2, xy)
    longest, shortest = (xx + yy) / 2 + spread, (xx + yy) / 2 - spread
    return math.sqrt(max(0.0, 1 - shortest / longest)) if longest else 0.0


def sides(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Convert boxes xyxy to x, y, width, height."""
    wide = boxes.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=1)
