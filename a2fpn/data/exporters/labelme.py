"""labelme: a JSON file next to each image."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image

from a2fpn.data.exporters.base import Exporter, register_exporter
from a2fpn.data.exporters.rings import window_of
from a2fpn.data.importers.folder import OWN_FILES
from a2fpn.data.labeled import LabeledImage, LabeledObject

_VERSION = "5.5.0"  # the first version whose format has masks and descriptions


@register_exporter("labelme")
class LabelmeExporter(Exporter):
    """Writes polygons, rectangles, masks (with holes) and points; parts of one object share a group.

    Crowds carry the flag ``iscrowd``, predictions their score in the description.
    """

    reserved = frozenset(name.removesuffix(".json") for name in OWN_FILES)

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        path = self.place(image, self.split_of(image))
        shapes: list[dict[str, Any]] = []
        for number, labeled in enumerate(image.objects, 1):
            shapes += self._shapes(labeled, number, image)
        named = path.name if self.options.images is not None or image.path is None else str(image.path)
        record: dict[str, Any] = {
            "version": _VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": named,
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
        }
        self.save(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False, indent=1) + "\n")

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        names = ["__ignore__", "_background_", *(category.name for category in self.categories)]
        self.save(self.output / "labels.txt", "\n".join(names) + "\n")

    def _shapes(self, labeled: LabeledObject, number: int, image: LabeledImage) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        segmentation = labeled.segmentation
        if isinstance(segmentation, list):
            parts = [{"points": _pairs(p), "shape_type": "polygon"} for p in segmentation]
        elif segmentation is not None:
            window, (left, top, right, bottom) = window_of(segmentation, image.height, image.width)
            corners = [[float(left), float(top)], [right - 1.0, bottom - 1.0]]
            file = io.BytesIO()
            Image.fromarray(window * 255).convert("1").save(file, "png")
            parts = [
                {"points": corners, "shape_type": "mask", "mask": base64.b64encode(file.getvalue()).decode("ascii")}
            ]
        box = labeled.bbox if segmentation is None else self.own_box(labeled, image)
        if box is not None:
            x, y, w, h = box
            parts += [{"points": [[x, y], [x + w, y + h]], "shape_type": "rectangle"}]
        labels = self._keypoints(labeled)
        grouped = number if len(parts) + len(labels) > 1 else None
        flags = {"iscrowd": True} if labeled.iscrowd else {}
        description = "" if labeled.score is None else f"score {labeled.score:.3f}"
        common = {"label": labeled.category, "group_id": grouped, "description": description}
        return [
            *({**common, "flags": flags, **part} for part in parts),
            *({**common, "group_id": number, **point} for point in labels),
        ]

    def _keypoints(self, labeled: LabeledObject) -> list[dict[str, Any]]:
        names = next((info.keypoints for info in self.categories if info.name == labeled.category), ())
        values = labeled.keypoints
        return [
            {
                "label": names[i] if i < len(names) else f"point {i + 1}",
                "points": [[x, y]],
                "shape_type": "point",
                "flags": {"hidden": True} if seen == 1 else {},
            }
            for i, (x, y, seen) in enumerate(zip(values[::3], values[1::3], values[2::3], strict=True))
            if seen
        ]


def _pairs(polygon: list[float]) -> list[list[float]]:
    return [[x, y] for x, y in zip(polygon[::2], polygon[1::2], strict=True)]
