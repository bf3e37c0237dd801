"""Folders for annotation tools, to correct detections; ``a2fpn data import`` reads them back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from a2fpn.config import Category
from a2fpn.data.exporters import ExportOptions, export_images
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, Segmentation
from a2fpn.masks.rle import Rle
from a2fpn.writers.base import FORMATS, ImageResult, RunFormat
from a2fpn.writers.geojson import mask_polygons
from a2fpn.writers.measures import sides

PROGRAMS = ("cvat", "datumaro", "labelme", "labelstudio", "voc", "yolo")
"""Formats of :mod:`a2fpn.data.exporters` for results, each written to a folder of its name."""


def labeled_images(images: Iterable[ImageResult]) -> Iterator[LabeledImage]:
    """Convert results to labels: masks without holes become polygons, which tools can edit, others are kept."""
    for image in images:
        result = image.result
        height, width = result.size
        masks = result.rles or (None,) * len(result)
        points: list[list[float]] = [[]] * len(result)
        if result.keypoints is not None:
            points = (result.keypoints * (1, 1, 2)).reshape(len(result), -1).tolist()  # COCO's 2 is visible
        path = Path(image.name)
        objects = []
        for row, (name, score, box, rle) in enumerate(
            zip(result.names, result.scores.tolist(), sides(result.boxes).tolist(), masks, strict=True)
        ):
            segmentation = None if rle is None else _editable(rle)
            if segmentation == []:
                continue  # no pixels
            bbox = (box[0], box[1], box[2], box[3]) if rle is None else None
            objects.append(LabeledObject(name, bbox, segmentation, False, tuple(points[row]), score))
        yield LabeledImage(path, f"{image.stem}{path.suffix}", height, width, objects)


def _editable(rle: Rle) -> Segmentation:
    parts = mask_polygons(rle)
    if any(len(part) > 1 for part in parts):
        return rle
    return [ring[:-1].round(2).ravel().tolist() for ring, *_ in parts]


def _writer(program: str) -> RunFormat:
    def write(images: Iterable[ImageResult], categories: Sequence[Category], path: Path) -> None:
        rest = iter(images)
        first = list(itertools.islice(rest, 1))
        names = first[0].result.keypoint_names if first else ()
        infos = [CategoryInfo(category.name, category.id, keypoints=names) for category in categories]
        export_images(
            labeled_images(itertools.chain(first, rest)),
            path,
            format=program,
            categories=infos,
            options=ExportOptions(predictions=True),
            overwrite=True,
        )

    return RunFormat(program, write)


for _program in PROGRAMS:
    FORMATS.register(_program)(_writer(_program))
