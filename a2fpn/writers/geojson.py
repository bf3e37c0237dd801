"""GeoJSON as QuPath reads it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from numpy.typing import NDArray

from a2fpn._atomic import write_text
from a2fpn.inference.shapes import PALETTE, box_ring
from a2fpn.inference.result import Result
from a2fpn.masks.rle import Rle, decode_window
from a2fpn.writers.base import image_format, sides


@image_format("geojson", suffix=".geojson")
def write_geojson(result: Result, path: Path) -> None:
    """Write a feature for each object, in pixels of the image."""
    write_text(path, to_geojson(result))


def to_geojson(result: Result) -> str:
    """GeoJSON in pixels of the image, as QuPath reads it: a polygon with its holes, class, score and area per object.

    An object without a pixel is left out.

    Example:
        >>> import numpy as np
        >>> from a2fpn import Category, Result
        >>> result = Result(
        ...     boxes=np.array([[2, 2, 6, 5]], dtype=np.float32), scores=np.array([0.75], dtype=np.float32),
        ...     labels=np.array([0]), size=(8, 10), categories=(Category(7, "cat"),),
        ... )
        >>> json.loads(to_geojson(result))["features"][0]["geometry"]["coordinates"]
        [[[2.0, 2.0], [6.0, 2.0], [6.0, 5.0], [2.0, 5.0], [2.0, 2.0]]]
    """
    features = []
    rows = zip(result.names, result.labels.tolist(), result.scores.tolist(), sides(result.boxes), strict=True)
    for row, (name, label, score, box) in enumerate(rows):
        if result.rles is None:
            polygons, area = [[box_ring(box)]], box[2] * box[3]
        else:
            polygons, area = mask_polygons(result.rles[row])
        lists = [[ring.round(2).tolist() for ring in polygon] for polygon in polygons]
        if not lists:
            continue
        one = len(lists) == 1
        color = PALETTE[label % len(PALETTE)].lstrip("#")
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon" if one else "MultiPolygon",
                    "coordinates": lists[0] if one else lists,
                },
                "properties": {
                    "objectType": "detection",
                    "classification": {"name": name, "color": [int(color[i : i + 2], 16) for i in (0, 2, 4)]},
                    "measurements": {"score": round(score, 4), "area": float(area)},
                },
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features})


def mask_polygons(rle: Rle) -> tuple[list[list[NDArray[np.float64]]], int]:
    """Parts of a mask, each a closed outer ring (P, 2) followed by those of its holes, and its pixels.

    Points are x, y in pixels. Lines run midway between pixel centers inside and outside, so that the centers inside
    the polygons are those of the mask.
    """
    window, (left, top, *_) = decode_window(rle)
    if not window.size:
        return [], 0
    inside = np.pad(window, 1).astype(np.float32)
    filled: Any = contourpy.contour_generator(z=inside, fill_type=contourpy.FillType.OuterOffset).filled(0.5, 2.0)
    points, offsets = filled
    parts = [
        [np.asarray(part[start:stop]) + (left - 0.5, top - 0.5) for start, stop in itertools.pairwise(ends)]
        for part, ends in zip(points, offsets, strict=True)
    ]
    return parts, int(window.sum())
