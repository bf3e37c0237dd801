"""YOLO: boxes, polygons or keypoints in normalized coordinates, and ``data.yaml``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.exporters.rings import Ring, rle_of, to_one_ring
from a2fpn.data.importers.yolo_files import label_stem
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
        target = self.place(image, "images", split)
        lines = [line for labeled in image.objects if (line := self._line(labeled, image))]
        # The name of the image may have a folder "images" too.
        self.save(Path(f"{label_stem(os.fspath(target))}.txt"), "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        data: dict[str, object] = {split or "train": f"images/{split}".rstrip("/") for split in self.splits}
        data["names"] = {number: category.name for number, category in enumerate(self.categories)}
        if self.num_keypoints:
            data["kpt_shape"] = [self.num_keypoints, 3]
            data["kpt_names"] = {number: list(info.keypoints) for number, info in enumerate(self.categories)}
        names = [name for info in self.categories for name in (info.name, *info.keypoints)]
        # Unquoted, or in single quotes, some line breaks would turn into spaces.
        style = '"' if any(len(name.splitlines()) > 1 for name in names) else None
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, default_style=style)
        self.save(self.output / "data.yaml", text)

    def _line(self, labeled: LabeledObject, image: LabeledImage) -> str:
        if labeled.iscrowd:
            self.lose("crowd", image, labeled, "the format has no crowds; skipped")
            return ""
        index = self.index[labeled.category]
        sides = np.array([image.width, image.height], dtype=np.float64)
        low, size = np.array(labeled.bbox or (0, 0, 0, 0)).reshape(2, 2) / sides
        low, high = low.clip(0, 1), (low + size).clip(0, 1)
        box = f"{index} {_text(np.concatenate([(low + high) / 2, high - low]))}"
        points = self._points(labeled, image)
        if self.num_keypoints:
            if labeled.segmentation is not None:
                self.lose("mask", image, labeled, "a pose has a box and keypoints, no mask")
            return f"{box} {_text((points / (*sides, 1)).ravel())}"
        if labeled.segmentation is None:
            return box
        ring = to_one_ring(labeled.segmentation, image.height, image.width)
        clipped = None if ring is None else clip_ring(ring, image.height, image.width)
        if clipped is None:
            self.lose("mask", image, labeled, "its mask covers no pixel of the image; written as a box")
            return box
        self.lose_box(labeled, image)
        return f"{index} {_text((clipped / sides).ravel())}"

    def _points(self, labeled: LabeledObject, image: LabeledImage) -> NDArray[np.float64]:
        """Keypoints of an object, (K, 3); zeros for those that are not labeled or lost."""
        points = np.zeros((self.num_keypoints, 3))
        given = np.array(labeled.keypoints).reshape(-1, 3)
        named = len(self.categories[self.index[labeled.category]].keypoints)
        kept = given[:named]
        inside = ((kept[:, :2] >= 0) & (kept[:, :2] <= (image.width, image.height))).all(1)
        points[: len(kept)] = kept * (inside & (kept[:, 2] > 0))[:, None]
        lost = int((given[:, 2] > 0).sum() - (points[:, 2] > 0).sum())
        if lost:
            detail = f"{lost} keypoints are outside the image, or not among the {named} that the class names; skipped"
            self.lose("keypoints", image, labeled, detail)
        return points


def clip_ring(ring: Ring, height: int, width: int) -> Ring | None:
    """Clip a ring to the image, by the algorithm of Sutherland and Hodgman.

    Returns:
        The ring, whose parts may be joined along the edges of the image; None if it has no pixel.

    Example:
        >>> clip_ring(np.array([[0.0, 0], [8, 3], [0, 3]]), 3, 4).tolist()
        [[0.0, 0.0], [4.0, 1.5], [4.0, 3.0], [0.0, 3.0]]
    """
    if ring.min() >= 0 and (ring <= (width, height)).all():
        return ring
    for axis, sign, edge in ((0, 1, 0), (0, -1, width), (1, 1, 0), (1, -1, height)):
        depths = sign * (ring[:, axis] - edge)
        following, next_depths = np.roll(ring, -1, axis=0), np.roll(depths, -1)
        inside = depths >= 0
        crossing = inside != (next_depths >= 0)
        shares = depths / np.where(crossing, depths - next_depths, 1)
        cuts = ring + shares[:, None] * (following - ring)
        ring = np.stack([ring, cuts], 1)[np.stack([inside, crossing], 1)]
    ring = ring.clip(0, (width, height))  # rounding
    return ring if len(ring) >= 3 and mask_utils.area(rle_of([ring.ravel().tolist()], height, width)) else None


def _text(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.{_DIGITS}f}".rstrip("0").rstrip(".") for value in values.tolist())
