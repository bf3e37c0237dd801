"""COCO: a list of results, a line of results for each image, or a data set whose annotations have scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from a2fpn._atomic import replaced_file, write_text
from a2fpn.config import Category
from a2fpn.writers.base import ImageResult, run_format
from a2fpn.writers.measures import measures

STREAM = "predictions.jsonl"


@run_format("coco", file="predictions.json")
def write_coco(images: Iterable[ImageResult], categories: Sequence[Category], path: Path) -> None:
    """Write a list of COCO results for pycocotools' ``loadRes``, with the file name added."""
    with replaced_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        separator = "["
        for image in images:
            for record in image.result.to_coco(image.image_id):
                file.write(separator + json.dumps({**record, "file_name": image.name}))
                separator = ",\n"
        file.write("[]" if separator == "[" else "]")


@run_format("jsonl", file=STREAM)
def write_lines(images: Iterable[ImageResult], categories: Sequence[Category], path: Path) -> None:
    """Write a line of JSON for each image: its id, name and size, and its COCO results."""
    with replaced_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(to_line(image) + "\n" for image in images)


def to_line(image: ImageResult) -> str:
    """Return an image's line of JSON."""
    height, width = image.result.size
    record = {
        "image_id": image.image_id,
        "file_name": image.name,
        "stem": image.stem,
        "height": height,
        "width": width,
        "microns_per_pixel": image.result.microns_per_pixel,
        "results": image.result.to_coco(image.image_id),
    }
    return json.dumps(record)


@run_format("coco-dataset", file="coco.json")
def write_dataset(images: Iterable[ImageResult], categories: Sequence[Category], path: Path) -> None:
    """Write a COCO data set: images, categories, and the objects as annotations with scores."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in images:
        height, width = image.result.size
        entries.append({"id": image.image_id, "file_name": image.name, "height": height, "width": width})
        for record, measured in zip(image.result.to_coco(image.image_id), measures(image.result), strict=True):
            area = measured["area"]
            annotations.append({"id": len(annotations) + 1, **record, "area": area, "iscrowd": 0})
    classes = [{"id": category.id, "name": category.name} for category in categories]
    write_text(path, json.dumps({"images": entries, "categories": classes, "annotations": annotations}))
