"""Exact conversion of masks to polygons, with holes, as one ring if necessary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.data.labeled import Segmentation
from a2fpn.masks.rle import Rle, decode_window
from a2fpn.masks.segmentation import Polygons, parse_segmentation

Ring = NDArray[np.float64]


def trace(window: NDArray[np.uint8]) -> list[Ring]:
    """Trace the pixel edges around a mask.

    Filled by the even-odd rule, the rings reproduce the same pixels; holes are rings like the others.

    Args:
        window: (h, w) in {0, 1}.

    Returns:
        Rings (K, 2) of corners x, y.

    Example:
        >>> [ring.astype(int).tolist() for ring in trace(np.ones((1, 2), np.uint8))]
        [[[0, 0], [2, 0], [2, 1], [0, 1]]]
    """
    mask = np.pad(window.astype(np.int8), 1)
    corners = mask[:-1, :-1] ^ mask[:-1, 1:] ^ mask[1:, :-1] ^ mask[1:, 1:]
    # Corners at which two pixels touch diagonally belong to two rings.
    crossings = (mask[:-1, :-1] == mask[1:, 1:]) & (mask[:-1, 1:] == mask[1:, :-1]) & (mask[:-1, :-1] != mask[1:, :-1])
    rows, columns = np.nonzero(corners + 2 * crossings.astype(np.int8))
    twice = 1 + crossings[rows, columns]
    rows, columns = rows.repeat(twice), columns.repeat(twice)
    along_row, along_column = (_partners(np.lexsort(keys)) for keys in ((columns, rows), (rows, columns)))
    points = np.stack([columns, rows], axis=1).astype(np.float64)
    seen = np.zeros(len(points), dtype=np.bool_)
    rings = []
    for start in range(len(points)):
        if seen[start]:
            continue
        order, index = [], start
        while not seen[index]:
            other = along_row[index]
            seen[index] = seen[other] = True
            order += [index, other]
            index = along_column[other]
        rings.append(points[order])
    return rings


def _partners(order: NDArray[np.int64]) -> list[int]:
    """Pair consecutive corners in the order along a line, each with its partner."""
    partners = np.empty(len(order), dtype=np.int64)
    partners[order[::2]], partners[order[1::2]] = order[1::2], order[::2]
    result: list[int] = partners.tolist()
    return result


def to_rings(segmentation: Segmentation, height: int, width: int) -> tuple[list[Ring], bool]:
    """Return the outlines of an object.

    Args:
        segmentation: Segmentation of the object.
        height: Height of the image, pixels.
        width: Width of the image, pixels.

    Returns:
        Rings (K, 2), and whether the even-odd rule is needed because holes are among them.
    """
    mask = parse_segmentation(segmentation, height, width)
    if isinstance(mask, Polygons):
        return list(mask.points), False
    window, (left, top, *_) = decode_window(mask)
    rings = [ring + (left, top) for ring in trace(window)]
    return rings, len(rings) > 1


def to_one_ring(segmentation: Segmentation, height: int, width: int) -> Ring | None:
    """Return an object as one ring, its parts and holes joined by zero-width bridges.

    The even-odd rule reproduces the same pixels, since each bridge is traversed twice. Overlapping parts, which the
    rule would exclude, are retraced from the pixels.

    Returns:
        (K, 2) x, y; None for an object without pixels.
    """
    rings, _ = to_rings(segmentation, height, width)
    ring = bridge(rings)
    if len(rings) > 1 and isinstance(segmentation, list):
        union = rle_of(segmentation, height, width)
        (joined,) = mask_utils.frPyObjects([ring.ravel().tolist()], height, width)
        if mask_utils.area(joined) != mask_utils.area(union):
            return to_one_ring(union, height, width)
    return ring if len(ring) >= 3 else None


def bridge(rings: Sequence[Ring]) -> Ring:
    """Join rings at their nearest corners."""
    if not rings:
        return np.empty((0, 2))
    ordered = sorted(rings, key=len, reverse=True)
    joined = ordered[0]
    for ring in ordered[1:]:
        distances = ((joined[:, None] - ring[None]) ** 2).sum(-1)
        here, there = divmod(int(distances.argmin()), len(ring))
        joined = np.concatenate([joined[: here + 1], ring[there:], ring[: there + 1], joined[here:]])
    return joined


def rle_of(segmentation: Segmentation, height: int, width: int) -> Rle:
    """Return an object's RLE."""
    mask = parse_segmentation(segmentation, height, width)
    return mask.to_rle() if isinstance(mask, Polygons) else mask


def window_of(
    segmentation: Segmentation, height: int, width: int
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Return an object's pixels in its tight window, and the window's left, top, right and bottom."""
    return decode_window(rle_of(segmentation, height, width))
