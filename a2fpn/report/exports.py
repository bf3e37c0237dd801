"""Results as files that other programs open: COCO, GeoJSON, CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import contourpy
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.data import Rle, decode_rle
from a2fpn.inference.shapes import PALETTE
from a2fpn.report.outlines import box_ring

if TYPE_CHECKING:
    from a2fpn import Result


def to_coco(results: Sequence[Result], names: Sequence[str]) -> str:
    """COCO JSON with images, categories, and objects with their scores, images numbered from 1.

    Args:
        results: One for each image, at least one.
        names: File names of the images.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (result, name) in enumerate(zip(results, names, strict=True), start=1):
        images.append({"id": image_id, "file_name": name, "height": result.size[0], "width": result.size[1]})
        for record, area in zip(result.to_coco(image_id), _areas(result).tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, **record, "area": area, "iscrowd": 0})
    categories = [{"id": category.id, "name": category.name} for category in results[0].categories]
    return json.dumps({"images": images, "categories": categories, "annotations": annotations})


def to_geojson(result: Result) -> str:
    """GeoJSON in pixels of the image, as QuPath reads it: a polygon with its holes, class, score and area per object.

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
    rows = zip(result.names, result.labels.tolist(), result.scores.tolist(), _areas(result).tolist(), strict=True)
    for row, (name, label, score, area) in enumerate(rows):
        box = _sides(result.boxes[row : row + 1])[0]
        polygons = [[box_ring(box)]] if result.rles is None else mask_polygons(result.rles[row])
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
                    "measurements": {"score": round(score, 4), "area": area},
                },
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features})


def to_csv(results: Sequence[Result], names: Sequence[str]) -> str:
    """CSV with a row for each object: image, number, class, score, box (x, y, width, height) and area in pixels."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", "object", "class", "score", "x", "y", "width", "height", "area"])
    for result, name in zip(results, names, strict=True):
        boxes = _sides(result.boxes).round(2).tolist()
        rows = zip(result.names, result.scores.tolist(), boxes, _areas(result).tolist(), strict=True)
        for number, (label, score, box, area) in enumerate(rows, start=1):
            writer.writerow([name, number, label, f"{score:.4f}", *box, round(area, 2)])
    return file.getvalue()


def mask_polygons(rle: Rle) -> list[list[NDArray[np.float64]]]:
    """Parts of a mask, each a closed outer ring (P, 2) followed by those of its holes; x, y in pixels."""
    x, y, width, height = (int(value) for value in mask_utils.toBbox(rle))
    if not width:
        return []
    inside = np.pad(decode_rle([rle])[0, y : y + height, x : x + width], 1).astype(np.float32)
    filled: Any = contourpy.contour_generator(z=inside, fill_type=contourpy.FillType.OuterOffset).filled(0.5, 2.0)
    points, offsets = filled
    return [
        [np.asarray(part[start:stop]) + (x - 0.5, y - 0.5) for start, stop in itertools.pairwise(ends)]
        for part, ends in zip(points, offsets, strict=True)
    ]


def _sides(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Boxes xyxy as x, y, width, height."""
    wide = boxes.astype(np.float64)
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=1)


def _areas(result: Result) -> NDArray[np.float64]:
    """Pixels of each object: of its mask, or of its box."""
    if result.rles is None:
        boxes = _sides(result.boxes)
        return boxes[:, 2] * boxes[:, 3]
    return np.array([mask_utils.area(rle) for rle in result.rles], dtype=np.float64)
