"""Outlines of objects and their colors, for pictures of every format.

Shape shorthand: N objects. Points are x, y in image pixels.
"""

from __future__ import annotations

import base64
import io
import math

import contourpy
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_utils

from a2fpn.data import Rle, decode_rle

Ring = NDArray[np.float64]

# Okabe and Ito's colors, which people with color blindness tell apart, then others in between.
PALETTE = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2"),
    *("#AADD55", "#AA4499", "#44DDCC", "#BB5566", "#7788FF"),
)


def mask_rings(rle: Rle) -> list[Ring]:
    """Border lines of a mask, holes and separate parts included, each (P, 2) and closed.

    Example:
        >>> import torch
        >>> from a2fpn.data import encode_masks
        >>> (rle,) = encode_masks(torch.ones(1, 2, 3))
        >>> [(ring.min(0).tolist(), ring.max(0).tolist()) for ring in mask_rings(rle)]
        [([0.0, 0.0], [3.0, 2.0])]
    """
    x, y, width, height = (int(value) for value in mask_utils.toBbox(rle))
    if not width:
        return []
    inside = np.pad(decode_rle([rle])[0, y : y + height, x : x + width], 1).astype(np.float32)
    lines = contourpy.contour_generator(z=inside, line_type=contourpy.LineType.Separate).lines(0.5)
    return [np.asarray(line) + (x - 0.5, y - 0.5) for line in lines]


def box_ring(box: NDArray[np.floating]) -> Ring:
    """Border of a box x, y, width, height, (5, 2), closed."""
    x, y, width, height = (float(side) for side in box)
    return np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)])


def rings_of(boxes: NDArray[np.floating], rles: tuple[Rle, ...] | None, row: int) -> list[Ring]:
    """Border of an object: of its mask, or of its box where there are no masks."""
    return [box_ring(boxes[row])] if rles is None else mask_rings(rles[row])


def svg_path(rings: list[Ring]) -> str:
    """The ``d`` of an SVG path, its steps smoothed a little and points on a line left out."""
    parts = []
    for ring in rings:
        points = ring[:-1]
        if len(points) > 4:
            points = (np.roll(points, 1, axis=0) + 2 * points + np.roll(points, -1, axis=0)) / 4
        before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
        bends = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-6
        kept = points[bends] if bends.sum() > 2 else points
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in kept.tolist()) + "Z")
    return "".join(parts)


def object_colors(centers: NDArray[np.floating]) -> list[str]:
    """A color for each object, of the center x, y, that none of the nearest objects before it has.

    Among more than 256 objects the nearest are sought in a grid, so that those of a slide take seconds.
    """
    spread = np.ptp(centers, axis=0).max(initial=0) if len(centers) else 0
    side = max(1.0, float(spread) / max(1.0, math.sqrt(len(centers)) / 16))
    places = np.floor(centers / side).astype(np.int64).tolist()
    squares: dict[tuple[int, int], list[int]] = {}
    chosen = np.zeros(len(centers), dtype=np.int64)
    uses = np.zeros(len(PALETTE), dtype=np.int64)
    for row, (column, line) in enumerate(places):
        around = [
            other
            for x in range(column - 1, column + 2)
            for y in range(line - 1, line + 2)
            for other in squares.get((x, y), ())
        ]
        near = np.array(around, dtype=np.int64)
        nearest = near[np.argsort(np.square(centers[near] - centers[row]).sum(1), kind="stable")][: len(PALETTE) - 1]
        penalties = uses.copy()
        penalties[chosen[nearest]] += len(centers)
        chosen[row] = penalties.argmin()
        uses[chosen[row]] += 1
        squares.setdefault((column, line), []).append(row)
    return [PALETTE[color] for color in chosen.tolist()]


def data_uri(image: NDArray[np.uint8], *, longest: int = 800) -> str:
    """An image as a JPEG inside a page, shrunk to ``longest`` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest))
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
