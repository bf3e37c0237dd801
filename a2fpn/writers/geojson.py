"""GeoJSON for QuPath."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from numpy.typing import NDArray

from a2fpn._atomic import replaced_file
from a2fpn.inference.result import Result
from a2fpn.inference.shapes import PALETTE, Ring, box_ring
from a2fpn.masks.rle import Rle, decode_window, decode_windows
from a2fpn.writers.base import image_format
from a2fpn.writers.measures import measures, sides

_MEASUREMENTS = ("score", "area", "equivalent_diameter", "eccentricity", "area_um2", "equivalent_diameter_um")


@image_format("geojson", suffix=".geojson")
def write_geojson(result: Result, path: Path) -> None:
    """Write a feature for each object, in pixels of the image: a polygon with its holes, class and measurements.

    Objects without pixels are omitted.
    """
    with replaced_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        separator = '{"type": "FeatureCollection", "features": [\n'
        for feature in features(result):
            file.write(separator + json.dumps(feature))
            separator = ",\n"
        file.write("]}\n" if separator == ",\n" else f"{separator}]}}\n")


def features(result: Result) -> Iterator[dict[str, Any]]:
    """Yield GeoJSON features for QuPath.

    Example:
        >>> import numpy as np
        >>> from a2fpn import Category, Result
        >>> result = Result(
        ...     boxes=np.array([[2, 2, 6, 5]], dtype=np.float32), scores=np.array([0.75], dtype=np.float32),
        ...     labels=np.array([0]), size=(8, 10), categories=(Category(7, "cat"),),
        ... )
        >>> [feature["geometry"]["coordinates"] for feature in features(result)]
        [[[[2.0, 2.0], [6.0, 2.0], [6.0, 5.0], [2.0, 5.0], [2.0, 2.0]]]]
    """
    shapes: Iterable[list[list[Ring]]] = ([[box_ring(box)]] for box in sides(result.boxes))
    if result.rles is not None:
        shapes = (_polygons(window, left, top) for window, (left, top, *_) in decode_windows(result.rles))
    rows = zip(result.names, result.labels.tolist(), measures(result), shapes, strict=True)
    for name, label, measured, polygons in rows:
        lists = [[ring.round(2).tolist() for ring in polygon] for polygon in polygons]
        if not lists:
            continue
        one = len(lists) == 1
        color = PALETTE[label % len(PALETTE)].lstrip("#")
        numbers = {key: value for key, value in measured.items() if key in _MEASUREMENTS and value is not None}
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon" if one else "MultiPolygon", "coordinates": lists[0] if one else lists},
            "properties": {
                "objectType": "detection",
                "classification": {"name": name, "color": [int(color[i : i + 2], 16) for i in (0, 2, 4)]},
                "measurements": numbers,
            },
        }


def mask_polygons(rle: Rle) -> list[list[Ring]]:
    """Parts of a mask, each a closed outer ring (P, 2) followed by those of its holes; points are x, y in pixels.

    Lines run midway between pixel centers inside and outside, so that the polygons contain exactly the mask's pixel
    centers.
    """
    window, (left, top, *_) = decode_window(rle)
    return _polygons(window, left, top)


def _polygons(window: NDArray[np.uint8], left: int, top: int) -> list[list[Ring]]:
    if not window.size:
        return []
    inside = np.pad(window, 1).astype(np.float32)
    filled: Any = contourpy.contour_generator(z=inside, fill_type=contourpy.FillType.OuterOffset).filled(0.5, 2.0)
    points, offsets = filled
    return [
        [np.asarray(part[start:stop]) + (left - 0.5, top - 0.5) for start, stop in itertools.pairwise(ends)]
        for part, ends in zip(points, offsets, strict=True)
    ]
