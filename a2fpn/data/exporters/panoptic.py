"""COCO panoptic: a JSON file of segments and a folder of maps per split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LossLog


@register_exporter("panoptic")
class PanopticExporter(Exporter):
    """Writes masks without their overlaps; boxes without masks are lost."""

    split_folders = False

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        super().__init__(output, categories, log, options)
        self.entries: dict[str, tuple[list[Any], list[Any]]] = {}
        self.ids = [number if c.id is None else c.id for number, c in enumerate(self.categories, 1)]

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        split = image.split or "train"
        self.place(image, "images")
        images, annotations = self.entries.setdefault(split, ([], []))
        image_id = image.id if image.id is not None else self.written + 1
        images.append({"id": image_id, "file_name": image.name, "height": image.height, "width": image.width})
        masked = []
        for number, labeled in enumerate(image.objects, 1):
            if labeled.keypoints:
                self.lose("keypoints", image, labeled, "the format has no keypoints")
            if labeled.segmentation is None:
                self.lose("box", image, labeled, "an object without a mask; skipped")
            else:
                self.lose_box(labeled, image)
                masked.append((number, labeled))
        labels = self.paint(image, masked)
        rows, columns = np.nonzero(labels)
        place = np.stack([columns, rows], axis=1)
        numbers = labels[rows, columns]
        low = np.full((len(image.objects) + 1, 2), max(labels.shape))
        high = np.full_like(low, -1)
        np.minimum.at(low, numbers, place)
        np.maximum.at(high, numbers, place)
        areas = np.bincount(numbers, minlength=len(low)).tolist()
        segments = [
            {
                "id": number,
                "category_id": self.ids[self.index[labeled.category]],
                "area": areas[number],
                "bbox": [*low[number].tolist(), *(high[number] - low[number] + 1).tolist()],
                "iscrowd": int(labeled.iscrowd),
            }
            for number, labeled in masked
            if areas[number]
        ]
        file_name = Path(image.name).with_suffix(".png").as_posix()
        path = self.output / "annotations" / f"panoptic_{split}" / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        colors = np.stack([labels % 256, labels // 256 % 256, labels // 256**2], axis=2).astype(np.uint8)
        Image.fromarray(colors).save(path)
        annotations.append({"image_id": image_id, "file_name": file_name, "segments_info": segments})

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        categories = [c.to_coco(i) | {"isthing": 1} for i, c in zip(self.ids, self.categories, strict=True)]
        for split, (images, entries) in self.entries.items():
            record = {"images": images, "annotations": entries, "categories": categories}
            path = self.output / "annotations" / f"panoptic_{split}.json"
            self.save(path, json.dumps(record, ensure_ascii=False))
