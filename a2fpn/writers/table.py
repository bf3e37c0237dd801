"""CSV with a row for each object."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from a2fpn._atomic import replaced_file
from a2fpn.config import Category
from a2fpn.writers.base import ImageResult, run_format
from a2fpn.writers.measures import MICRONS, PIXELS, measures

_COLUMNS = ("score", *PIXELS, *MICRONS)


@run_format("csv", file="objects.csv")
def write_csv(images: Iterable[ImageResult], categories: Sequence[Category], path: Path) -> None:
    """Write image, number, class, score and :func:`~a2fpn.writers.measures.measures` of each object.

    Unknown values are empty cells, such as micrometers if the image does not state its pixel size.
    """
    with replaced_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "object", "class", *_COLUMNS])
        for image in images:
            for number, (label, row) in enumerate(zip(image.result.names, measures(image.result), strict=True), 1):
                writer.writerow([image.name, number, label, *(row[column] for column in _COLUMNS)])
