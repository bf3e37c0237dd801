"""Outlines of objects and embedded images, for pages and figures.

Shape shorthand: N objects. Points are x, y in image pixels.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from a2fpn.data import Rle
from a2fpn.inference.shapes import PALETTE, Ring, box_ring, mask_rings, neighbor_colors, smooth_points


def rings_of(boxes: NDArray[np.floating], rles: tuple[Rle, ...] | None, row: int) -> list[Ring]:
    """Outline of an object: of its mask, or of its box without masks."""
    return [box_ring(boxes[row])] if rles is None else mask_rings(rles[row])


def svg_path(rings: list[Ring]) -> str:
    """Return the ``d`` of an SVG path, slightly smoothed and without collinear points."""
    parts = []
    for ring in rings:
        points = smooth_points(ring)
        before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
        bends = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-6
        kept = points[bends] if bends.sum() > 2 else points
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in kept.tolist()) + "Z")
    return "".join(parts)


def object_colors(boxes: NDArray[np.floating]) -> list[str]:
    """Color of each box x, y, width, height, different from those of the nearest preceding boxes."""
    return [PALETTE[number] for number in neighbor_colors(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]))]


def data_uri(image: NDArray[np.uint8], *, longest: int = 800) -> str:
    """Encode an image as a JPEG data URI, shrunk to ``longest`` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest))
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
