"""Outlines and colors of objects, for all picture formats.

Shape shorthand: N objects. Points are x, y in image pixels.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import contourpy
import numpy as np
from numpy.typing import NDArray

from a2fpn.masks.rle import decode_window

if TYPE_CHECKING:
    from a2fpn.masks.rle import Rle

Ring = NDArray[np.float64]

# Okabe and Ito's colors, safe for color blindness, then others in between.
PALETTE = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2"),
    *("#AADD55", "#AA4499", "#44DDCC", "#BB5566", "#7788FF"),
)


def mask_rings(rle: Rle) -> list[Ring]:
    """Contours of a mask, including holes and separate parts, each (P, 2) and closed.

    Example:
        >>> from a2fpn.masks.rle import encode_masks
        >>> (rle,) = encode_masks(np.ones((1, 2, 3)))
        >>> [(ring.min(0).tolist(), ring.max(0).tolist()) for ring in mask_rings(rle)]
        [([0.0, 0.0], [3.0, 2.0])]
    """
    window, (left, top, _, _) = decode_window(rle)
    inside = np.pad(window, 1).astype(np.float32)
    lines = contourpy.contour_generator(z=inside, line_type=contourpy.LineType.Separate).lines(0.5)
    # From pixel centers of the padded window to image coordinates.
    return [np.asarray(line) + (left - 0.5, top - 0.5) for line in lines]


def smooth_points(ring: Ring) -> Ring:
    """Points of a closed ring without the last one, slightly smoothed.

    A single pixel is not smoothed, since it would shrink visibly.
    """
    points = ring[:-1]
    return points if len(points) <= 4 else (np.roll(points, 1, axis=0) + 2 * points + np.roll(points, -1, axis=0)) / 4


def box_ring(box: NDArray[np.floating]) -> Ring:
    """Closed ring (5, 2) of a box x, y, width, height."""
    x, y, width, height = (float(side) for side in box)
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)])


def neighbor_colors(boxes: NDArray[np.floating]) -> list[int]:
    """Palette index for each box xyxy, (N, 4), different from those of the nearest preceding boxes.

    With more than 256 boxes, neighbors are searched in a grid, so that those of a slide take seconds.
    """
    count = len(boxes)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    spread = float(np.ptp(centers, axis=0).max()) if count else 0.0
    places = np.floor(centers / max(1.0, 16 * spread / max(16.0, math.sqrt(count)))).astype(np.int64).tolist()
    squares: dict[tuple[int, int], list[int]] = {}
    chosen = np.zeros(count, dtype=np.int64)
    uses = np.zeros(len(PALETTE), dtype=np.int64)
    for row, (column, line) in enumerate(places):
        around = itertools.product(range(column - 1, column + 2), range(line - 1, line + 2))
        near = np.array([other for place in around for other in squares.get(place, ())], dtype=np.int64)
        nearest = near[np.square(centers[near] - centers[row]).sum(1).argsort(kind="stable")[: len(PALETTE) - 1]]
        penalties = uses.copy()
        penalties[chosen[nearest]] += count
        chosen[row] = penalties.argmin()
        uses[chosen[row]] += 1
        squares.setdefault((column, line), []).append(row)
    numbers: list[int] = chosen.tolist()
    return numbers
