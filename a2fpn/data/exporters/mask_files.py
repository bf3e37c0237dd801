"""One mask file per object: the layout of the 2018 Data Science Bowl."""

from __future__ import annotations

import glob
from pathlib import Path

import numpy as np
from PIL import Image

from a2fpn.data.exporters.base import Exporter, register_exporter
from a2fpn.data.exporters.rings import window_of
from a2fpn.data.importers.placing import place
from a2fpn.data.labeled import LabeledImage, folder_name


@register_exporter("mask_files")
class MaskFileExporter(Exporter):
    """Writes a folder per image with ``images/`` and ``masks/``; several classes become folders below ``masks/``."""

    stems = False

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        name = Path(image.name)
        split = self.split_of(image)
        unit = self.output.joinpath(split, self.unique(name.with_suffix("").as_posix(), f"units/{split}"))
        for part in ("images", "masks"):
            (unit / part).mkdir(parents=True, exist_ok=True)
        for mask in (unit / "masks").rglob(f"{glob.escape(name.stem)}_{'[0-9]' * 5}.png"):
            mask.unlink()  # of an earlier conversion
        if image.file is not None:
            place(image.file, unit / "images" / name.name, self.options.images or "link")
        for number, labeled in enumerate(image.objects, 1):
            if labeled.keypoints:
                self.lose("keypoints", image, labeled, "the format has no keypoints")
            if labeled.segmentation is None or labeled.iscrowd:
                kind = "crowd" if labeled.iscrowd else "box"
                self.lose(kind, image, labeled, "the format holds masks of single objects; skipped")
                continue
            window, (left, top, right, bottom) = window_of(labeled.segmentation, image.height, image.width)
            if not window.size:
                self.lose("mask", image, labeled, "its mask covers no pixel; skipped")
                continue
            self.lose_box(labeled, image)
            pixels = np.zeros((image.height, image.width), dtype=np.uint8)
            pixels[top:bottom, left:right] = window * 255
            folder = unit / "masks" / (folder_name(labeled.category) if len(self.categories) > 1 else "")
            folder.mkdir(exist_ok=True)
            # The importer expects a name other than the image's.
            Image.fromarray(pixels).save(folder / f"{name.stem}_{number:05d}.png")
