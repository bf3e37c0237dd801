"""Placement of labels so that they cover neither objects nor each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from a2fpn.inference.canvas import text_width

_MAX_COVERED = 0.2  # maximum share of any object's box that a label covers


def box_areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N,) areas of boxes."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def place_labels(
    texts: Sequence[str], boxes: NDArray[np.float32], picture: tuple[int, int], size: float
) -> list[NDArray[np.float64] | None]:
    """Place labels above the box, in its corner or below it, or omit them.

    Args:
        texts: N texts, the most important first.
        boxes: In pixels of the picture.
        picture: Width and height.
        size: Height of the letters in pixels.

    Returns:
        The label's rectangle xyxy or None for each text; no rectangle overlaps another, leaves the picture, or
        covers more than a fifth of any box.
    """
    taken = np.empty((0, 4))
    places: list[NDArray[np.float64] | None] = []
    room = _MAX_COVERED * box_areas(boxes)
    for text, (x0, y0, _, y1) in zip(texts, boxes.tolist(), strict=True):
        width, height = text_width(text, size) + 0.5 * size, 1.35 * size
        x0 = min(max(x0, 0), picture[0] - width)
        candidates = [np.array([x0, top, x0 + width, top + height]) for top in (y0 - height, y0, y1)]
        place = next(
            (
                rect
                for rect in candidates
                if rect[0] >= 0
                and rect[1] >= 0
                and rect[3] <= picture[1]
                and not _overlap(rect, taken).any()
                and (_overlap(rect, boxes) <= room).all()
            ),
            None,
        )
        places.append(place)
        if place is not None:
            taken = np.vstack([taken, place])
    return places


def _overlap(rect: NDArray[np.float64], boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    """(N,) intersection areas of a rectangle with boxes."""
    sides = np.minimum(rect[2:], boxes[:, 2:]) - np.maximum(rect[:2], boxes[:, :2])
    areas: NDArray[np.floating] = sides.clip(0).prod(1)
    return areas
