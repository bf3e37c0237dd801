"""Outlines of objects and their colors, for pictures of every format.

Shape shorthand: N objects. Points are x, y in image pixels.
"""

from __future__ import annotations

import base64
import io

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


def object_colors(boxes: NDArray[np.floating]) -> list[str]:
    """A color for each box x, y, width, height that none of the nearest boxes before it has."""
    centers = boxes[:, :2] + boxes[:, 2:] / 2
    chosen = np.zeros(len(boxes), dtype=np.int64)
    for row in range(len(boxes)):
        nearest = np.argsort(np.square(centers[:row] - centers[row]).sum(1))[: len(PALETTE) - 1]
        uses = np.bincount(chosen[:row], minlength=len(PALETTE))
        uses[chosen[nearest]] += len(boxes)
        chosen[row] = uses.argmin()
    return [PALETTE[color] for color in chosen.tolist()]


def data_uri(image: NDArray[np.uint8], *, longest: int = 800) -> str:
    """An image as a JPEG inside a page, shrunk to ``longest`` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest))
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
