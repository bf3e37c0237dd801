"""Label images: each pixel is the number of its object."""

from __future__ import annotations

import numpy as np
from PIL import Image

from a2fpn.data.exporters.base import Exporter, register_exporter
from a2fpn.data.importers.files import LABEL_FOLDERS
from a2fpn.data.labeled import LabeledImage, folder_name

_MOST = 65_535  # maximum number of objects in 16 bits


@register_exporter("labels")
class LabelImageExporter(Exporter):
    """Writes a 16-bit PNG per image, or a 32-bit TIFF for more than 65,535 objects; several classes in folders."""

    reserved = LABEL_FOLDERS

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        split = self.split_of(image)
        self.place(image, "images", split)
        several = len(self.categories) > 1
        by_class: dict[str, list[int]] = {}
        for position, labeled in enumerate(image.objects):
            if labeled.keypoints:
                self.lose("keypoints", image, labeled, "a label image has no keypoints")
            if labeled.segmentation is None:
                self.lose("box", image, labeled, "an object without a mask; skipped")
            elif labeled.iscrowd:
                self.lose("crowd", image, labeled, "the format has no crowds; skipped")
            else:
                self.lose_box(labeled, image)
                by_class.setdefault(labeled.category, []).append(position)
        if not by_class:
            # A background, which without a label image would count as unlabeled.
            by_class[self.categories[0].name if self.categories else ""] = []
        for category, positions in by_class.items():
            labels = self.paint(image, [(n, image.objects[position]) for n, position in enumerate(positions, 1)])
            folder = folder_name(category) if several else ""
            path = self.output.joinpath("labels", split, folder, image.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if len(positions) > _MOST:
                Image.fromarray(labels).save(path.with_suffix(".tif"), compression="tiff_deflate")
            else:
                Image.fromarray(labels.astype(np.uint16)).save(path.with_suffix(".png"))

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        (self.output / "labels").mkdir(parents=True, exist_ok=True)
