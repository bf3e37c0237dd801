"""Datumaro: one JSON file per subset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.labeled import Box, CategoryInfo, LabeledImage, LabeledObject, LossLog


@register_exporter("datumaro")
class DatumaroExporter(Exporter):
    """Writes boxes, polygons, masks and points; parts of one object share a group."""

    stems = False

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        super().__init__(output, categories, log, options)
        self.items: dict[str, list[dict[str, Any]]] = {}

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        subset = self.split_of(image) or "default"
        self.place(image, "images", subset)
        annotations: list[dict[str, Any]] = []
        for number, labeled in enumerate(image.objects, 1):
            parts = _parts(labeled, self.own_box(labeled, image))
            group = number if len(parts) > 1 else 0
            attributes: dict[str, Any] = {"is_crowd": labeled.iscrowd}
            if labeled.score is not None:
                attributes["score"] = labeled.score
            common = {"label_id": self.index[labeled.category], "group": group, "attributes": attributes}
            annotations += ({"id": len(annotations) + i, **common, **part} for i, part in enumerate(parts))
        self.items.setdefault(subset, []).append(
            {
                "id": Path(image.name).with_suffix("").as_posix(),
                "annotations": annotations,
                "image": {"path": image.name, "size": [image.height, image.width]},
            }
        )

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        labels = [{"name": c.name, "parent": c.supercategory, "attributes": []} for c in self.categories]
        points = [
            {"label_id": number, "labels": list(c.keypoints), "joints": [list(pair) for pair in c.skeleton]}
            for number, c in enumerate(self.categories)
            if c.keypoints
        ]
        categories: dict[str, Any] = {"label": {"labels": labels, "attributes": []}}
        if points:
            categories["points"] = {"items": points}
        for subset, items in self.items.items():
            record = {"info": {}, "categories": categories, "items": items}
            self.save(self.output / "annotations" / f"{subset}.json", json.dumps(record, ensure_ascii=False))


def _parts(labeled: LabeledObject, box: Box | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if isinstance(labeled.segmentation, list):
        parts = [{"type": "polygon", "points": polygon, "z_order": 0} for polygon in labeled.segmentation]
    elif labeled.segmentation is not None:
        parts = [{"type": "mask", "rle": dict(labeled.segmentation), "z_order": 0}]
    else:
        box = labeled.bbox
    if box is not None:
        parts.append({"type": "bbox", "bbox": list(box), "z_order": 0})
    if labeled.keypoints:
        values = labeled.keypoints
        flat = [value for pair in zip(values[::3], values[1::3], strict=True) for value in pair]
        parts.append({"type": "points", "points": flat, "visibility": [int(v) for v in values[2::3]], "z_order": 0})
    return parts
