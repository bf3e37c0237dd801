"""YOLO: boxes, polygons or keypoints in normalized coordinates, and ``data.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.exporters.rings import to_one_ring
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog

_DIGITS = 8  # of normalized coordinates: a thousandth of a pixel on a side of 100,000 pixels


@register_exporter("yolo")
class YoloExporter(Exporter):
    """Writes polygons for objects with masks, keypoints for classes with keypoints, else boxes.

    Parts and holes of an object are joined into one polygon by zero-width bridges. There are no crowds.
    """

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        super().__init__(output, categories, log, options)
        self.num_keypoints = max((len(category.keypoints) for category in categories), default=0)
        self.splits: dict[str, None] = {}

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        split = self.split_of(image)
        self.splits[split] = None
        self.place(image, "images", split)
        lines = [line for labeled in image.objects if (line := self._line(labeled, image))]
        path = self.output.joinpath("labels", split, image.name).with_suffix(".txt")
        self.save(path, "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        data: dict[str, object] = {split or "train": f"images/{split}".rstrip("/") for split in self.splits}
        data["names"] = {number: category.name for number, category in enumerate(self.categories)}
        if self.num_keypoints:
            data["kpt_shape"] = [self.num_keypoints, 3]
            data["kpt_names"] = {number: list(info.keypoints) for number, info in enumerate(self.categories)}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None)
        self.save(self.output / "data.yaml", text)

    def _line(self, labeled: LabeledObject, image: LabeledImage) -> str:
        if labeled.iscrowd:
            self.lose("crowd", image, labeled, "the format has no crowds; skipped")
            return ""
        sides = np.array([image.width, image.height], dtype=np.float64)
        index = self.index[labeled.category]
        if self.num_keypoints:
            points = np.zeros((self.num_keypoints, 3))
            given = np.array(labeled.keypoints).reshape(-1, 3)
            points[: len(given)] = given
            points[:, :2] /= sides
            if labeled.segmentation is not None:
                self.lose("mask", image, labeled, "a pose has a box and keypoints, no mask")
            return f"{index} {_text(_center(labeled, sides, image))} {_text(points.ravel())}"
        if labeled.segmentation is None:
            return f"{index} {_text(_center(labeled, sides, image))}"
        ring = to_one_ring(labeled.segmentation, image.height, image.width)
        if ring is None:
            self.lose("unusable-object", image, labeled, "its mask is empty; skipped")
            return ""
        return f"{index} {_text((ring / sides).clip(0, 1).ravel())}"


def _center(labeled: LabeledObject, sides: np.ndarray, image: LabeledImage) -> np.ndarray:
    """Normalized center and size."""
    if labeled.bbox is not None:
        box = np.array(labeled.bbox)
    else:
        ring = to_one_ring(labeled.segmentation or [], image.height, image.width)
        low, high = (np.zeros(2), np.zeros(2)) if ring is None else (ring.min(0), ring.max(0))
        box = np.concatenate([low, high - low])
    low = (box[:2] / sides).clip(0, 1)
    high = ((box[:2] + box[2:]) / sides).clip(0, 1)
    return np.concatenate([(low + high) / 2, high - low])


def _text(values: np.ndarray) -> str:
    return " ".join(f"{value:.{_DIGITS}f}".rstrip("0").rstrip(".") for value in values.tolist())
