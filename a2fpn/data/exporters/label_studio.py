"""Label Studio: one JSON file of tasks, shapes in percent of the image, and the labeling interface they need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.exporters.rings import window_of
from a2fpn.data.importers.label_studio import SERVED, pack_runs
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog

_CONTROLS = {"rectanglelabels": "RectangleLabels", "polygonlabels": "PolygonLabels", "brushlabels": "BrushLabels"}


@register_exporter("labelstudio")
class LabelStudioExporter(Exporter):
    """Writes rectangles, polygons and brushes (with holes); parts of one object share ``meta.group``.

    Predictions are pre-annotations: the tool shows them, and counts a task as done only once a person submits it.
    """

    stems = False
    xml = True

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        super().__init__(output, categories, log, options)
        self.tasks: list[dict[str, Any]] = []
        self._kinds: set[str] = set()

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
                    "from_name": kind,
                    "to_name": "image",
                    "original_width": image.width,
                    "original_height": image.height,
                    "image_rotation": 0,
                }
                self._kinds.add(kind)
                results.append({**common, "type": kind, "value": {**value, kind: [labeled.category]}})
                if len(regions) > 1:
                    results[-1]["meta"] = {"group": number}
                if labeled.score is not None:
                    results[-1]["score"] = labeled.score
                if labeled.iscrowd:
                    results.append(
                        {**common, "from_name": "kind", "type": "choices", "value": {"choices": ["iscrowd"]}}
                    )
        url = f"{SERVED}{quote(path.relative_to(self.output).as_posix())}"
        data = {"image": url} | ({"split": split} if split else {})
        task = {"id": len(self.tasks) + 1, "data": data}
        if self.options.predictions:
            scores = [labeled.score for labeled in image.objects if labeled.score is not None]
            mean = {"score": sum(scores) / len(scores)} if scores else {}
            task["predictions"] = [{"model_version": "a2fpn", "result": results, **mean}]
        else:
            task["annotations"] = [{"result": results}]
        self.tasks.append(task)

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        self.save(self.output / "tasks.json", json.dumps(self.tasks, ensure_ascii=False))
        self.save(self.output / "labeling_config.xml", self._interface())

    def _interface(self) -> str:
        """Labeling interface with a control for each kind of shape, under the names that the regions refer to."""
        labels = "".join(f"    <Label value={quoteattr(category.name)}/>\n" for category in self.categories)
        controls = [
            f'  <{tag} name="{kind}" toName="image">\n{labels}  </{tag}>\n'
            for kind, tag in _CONTROLS.items()
            if kind in self._kinds or not self._kinds
        ]
        crowds = (
            '  <Choices name="kind" toName="image" perRegion="true">\n    <Choice value="iscrowd"/>\n  </Choices>\n'
        )
        return f'<View>\n  <Image name="image" value="$image"/>\n{"".join(controls)}{crowds}</View>\n'

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
