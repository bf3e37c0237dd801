"""Label Studio: one JSON file of tasks, shapes in percent of the image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.exporters.rings import window_of
from a2fpn.data.importers.label_studio import pack_runs
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog


@register_exporter("labelstudio")
class LabelStudioExporter(Exporter):
    """Writes rectangles, polygons and brushes (with holes); parts of one object share ``meta.group``."""

    stems = False

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        super().__init__(output, categories, log, options)
        self.tasks: list[dict[str, Any]] = []

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        split = self.split_of(image)
        path = self.place(image, "images", split)
        results: list[dict[str, Any]] = []
        for number, labeled in enumerate(image.objects, 1):
            if labeled.keypoints:
                self.lose("keypoints", image, labeled, "regions do not support keypoints")
            regions = self._regions(labeled, image)
            for kind, value in regions:
                region = f"{number}-{len(results)}"
                common = {
                    "id": region,
                    "from_name": "label",
                    "to_name": "image",
                    "original_width": image.width,
                    "original_height": image.height,
                    "image_rotation": 0,
                }
                results.append({**common, "type": kind, "value": {**value, kind: [labeled.category]}})
                if len(regions) > 1:
                    results[-1]["meta"] = {"group": number}
                if labeled.score is not None:
                    results[-1]["score"] = labeled.score
                if labeled.iscrowd:
                    results.append(
                        {**common, "from_name": "kind", "type": "choices", "value": {"choices": ["iscrowd"]}}
                    )
        data = {"image": path.relative_to(self.output).as_posix()} | ({"split": split} if split else {})
        self.tasks.append({"id": len(self.tasks) + 1, "data": data, "annotations": [{"result": results}]})

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        self.save(self.output / "tasks.json", json.dumps(self.tasks, ensure_ascii=False))

    def _regions(self, labeled: LabeledObject, image: LabeledImage) -> list[tuple[str, dict[str, Any]]]:
        width, height = image.width, image.height
        regions: list[tuple[str, dict[str, Any]]] = []
        box = self.own_box(labeled, image)
        if isinstance(labeled.segmentation, list):
            for polygon in labeled.segmentation:
                points = np.array(polygon).reshape(-1, 2) * (100 / width, 100 / height)
                regions.append(("polygonlabels", {"points": points.tolist(), "closed": True}))
        elif labeled.segmentation is not None:
            window, (left, top, right, bottom) = window_of(labeled.segmentation, height, width)
            full = np.zeros((height, width), dtype=np.uint8)
            full[top:bottom, left:right] = window * 255
            regions = [("brushlabels", {"format": "rle", "rle": pack_runs(full.ravel(), repeats=4)})]
        else:
            box = labeled.bbox
        if box is not None:
            x, y, w, h = box
            shares = {"x": x / width, "y": y / height, "width": w / width, "height": h / height}
            regions.append(("rectanglelabels", {key: 100 * value for key, value in shares.items()} | {"rotation": 0}))
        return regions
