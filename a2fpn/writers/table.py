"""CSV with a row for each object."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from pycocotools import mask as mask_utils

from a2fpn._atomic import replaced_file
from a2fpn.config import Category
from a2fpn.writers.base import ImageResult, run_format, sides


@run_format("csv", file="objects.csv")
def write_csv(images: Iterable[ImageResult], categories: Sequence[Category], path: Path) -> None:
    """Write image, number, class, score, box (x, y, width, height) and area of each object, in pixels."""
    with replaced_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "object", "class", "score", "x", "y", "width", "height", "area"])
        for image in images:
            result, boxes = image.result, sides(image.result.boxes)
            areas = (boxes[:, 2] * boxes[:, 3]).round(2).tolist()
            if result.rles is not None:
                areas = [float(mask_utils.area(rle)) for rle in result.rles]
            rows = zip(result.names, result.scores.tolist(), boxes.round(2).tolist(), areas, strict=True)
            for number, (label, score, box, area) in enumerate(rows, start=1):
                writer.writerow([image.name, number, label, f"{score:.4f}", *box, area])
