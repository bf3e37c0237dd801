"""Outlines of shapes that are not plain polygons: ellipses, rotated boxes, polygons with holes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as mask_utils

from a2fpn.data.labeled import Segmentation
from a2fpn.masks.outlines import fill
from a2fpn.masks.rle import as_text, decode_window, encode_window
from a2fpn.masks.segmentation import Polygons, parse_segmentation

_ELLIPSE_POINTS = 64


def ellipse(center: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0) -> list[float]:
    """Return an ellipse as a polygon of 64 points.

    Args:
        center: x and y, pixels.
        radii: Horizontal and vertical radius before the rotation, pixels.
        degrees: Clockwise rotation.

    Returns:
        ``[x, y, x, y, ...]``.

    Raises:
        ValueError: If a radius is not positive.

    Example:
        >>> ellipse((5, 5), (4, 2))[:2], ellipse((5, 5), (4, 2), 90)[:2]
        ([9.0, 5.0], [5.0, 9.0])
    """
    if not min(radii) > 0:
        raise ValueError(f"the radii of a circle or an ellipse must be positive, got {radii[0]:g} and {radii[1]:g}")
    angles = np.linspace(0, 2 * math.pi, _ELLIPSE_POINTS, endpoint=False)
    ring = np.stack([radii[0] * np.cos(angles), radii[1] * np.sin(angles)], 1) + center
    return turned(ring, degrees, center)


def turned(points: ArrayLike, degrees: float, center: ArrayLike) -> list[float]:
    """Rotate points clockwise, as seen on the screen, and round them to a thousandth of a pixel.

    Args:
        points: (K, 2) x, y.
        degrees: Angle.
        center: x and y of the fixed point.

    Returns:
        ``[x, y, x, y, ...]``.

    Example:
        >>> turned([(3, 1), (1, 2)], 90, (1, 1))
        [1.0, 3.0, 0.0, 1.0]
    """
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle = np.asarray(center, dtype=np.float64)
    result: list[float] = ((np.asarray(points) - middle) @ turn + middle).round(3).ravel().tolist()
    return result


def with_holes(polygons: Sequence[Sequence[list[float]]], height: int, width: int) -> Segmentation:
    """Return polygons with holes as a segmentation: the polygons themselves if there are no holes, else an RLE.

    Args:
        polygons: Parts of an object, each an outer ring ``[x, y, x, y, ...]`` followed by those of its holes.
        height: Height of the image, pixels.
        width: Width of the image, pixels.

    Raises:
        ValueError: If a ring of an object with holes is no polygon.

    Example:
        >>> outer, hole = [0.0, 0, 3, 0, 3, 3, 0, 3], [1.0, 1, 2, 1, 2, 2, 1, 2]
        >>> with_holes([[outer]], 3, 3) == [outer], int(mask_utils.area(with_holes([[outer, hole]], 3, 3)))
        (True, 8)
    """
    if all(len(rings) == 1 for rings in polygons):
        return [rings[0] for rings in polygons]
    parts = []
    for outer, *holes in polygons:
        window, (left, top, right, bottom) = _filled(outer, height, width)
        for hole in holes:
            inner, (x0, y0, x1, y1) = _filled(hole, height, width)
            cut = slice(max(y0, top) - y0, min(y1, bottom) - y0), slice(max(x0, left) - x0, min(x1, right) - x0)
            window[max(y0, top) - top : y1 - top, max(x0, left) - left : x1 - left] &= ~inner[cut]
        parts.append(encode_window(window, top, left, (height, width)))
    return as_text([mask_utils.merge(parts)])[0]


def _filled(ring: list[float], height: int, width: int) -> tuple[NDArray[np.bool_], tuple[int, int, int, int]]:
    polygons = parse_segmentation([ring], height, width)
    window, edges = fill(polygons.points, height, width) if isinstance(polygons, Polygons) else decode_window(polygons)
    return window.astype(np.bool_), edges
