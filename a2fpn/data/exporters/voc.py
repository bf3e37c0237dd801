"""Pascal VOC: an XML file per image; masks as pictures in ``SegmentationObject`` and ``SegmentationClass``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog

_MOST = 254  # maximum number of objects in 8 bits; 255 is void


@register_exporter("voc")
class VocExporter(Exporter):
    """Writes boxes, and up to 254 masks per image without their overlaps."""

    split_folders = False
    xml = True

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        super().__init__(output, categories, log, options)
        self.lists: dict[str, list[str]] = {}

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        key = Path(image.name).with_suffix("").as_posix()
        self.lists.setdefault(image.split or "train", []).append(key)
        self.place(image, "JPEGImages")
        masked = [(n, o) for n, o in enumerate(image.objects, 1) if o.segmentation is not None]
        for number, labeled in masked:
            if number > _MOST:
                self.lose(
                    "mask",
                    image,
                    labeled,
                    f"object {number} exceeds the {_MOST} masks of an 8-bit image; its box is kept",
                )
        masked = [(number, labeled) for number, labeled in masked if number <= _MOST]
        if masked:
            labels = self.paint(image, masked)
            classes = np.zeros(len(image.objects) + 1, dtype=np.uint8)
            classes[1:] = [min(self.index[labeled.category] + 1, _MOST) for labeled in image.objects]
            for folder, pixels in (("SegmentationObject", labels), ("SegmentationClass", classes[labels])):
                path = self.output.joinpath(folder, f"{key}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.putpalette(_palette())
                picture.save(path)
        objects = "".join(self._object(labeled, image) for labeled in image.objects)
        self.save(
            self.output / "Annotations" / f"{key}.xml",
            f"<annotation>\n<folder>JPEGImages</folder>\n<filename>{escape(image.name)}</filename>\n"
            f"<size><width>{image.width}</width><height>{image.height}</height><depth>3</depth></size>\n"
            f"<segmented>{int(bool(masked))}</segmented>\n{objects}</annotation>\n",
        )

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        for split, keys in self.lists.items():
            self.save(self.output / "ImageSets" / "Main" / f"{split}.txt", "\n".join(keys) + "\n")

    def _object(self, labeled: LabeledObject, image: LabeledImage) -> str:
        if labeled.keypoints:
            self.lose("keypoints", image, labeled, "the format has no keypoints")
        x, y, w, h = labeled.bbox or (0, 0, 0, 0)
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
        box = "".join(f"<{key}>{f'{value:.4f}'.rstrip('0').rstrip('.')}</{key}>" for key, value in corners.items())
        crowd = "<iscrowd>1</iscrowd>" if labeled.iscrowd else ""
        return (
            f"<object><name>{escape(labeled.category)}</name><pose>Unspecified</pose><truncated>0</truncated>"
            f"<difficult>0</difficult>{crowd}<bndbox>{box}</bndbox></object>\n"
        )


def _palette() -> list[int]:
    """Palette of VOC's development kit: bits of the number distributed over red, green and blue."""
    palette = []
    for number in range(256):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= ((number >> (3 * bit + channel)) & 1) << (7 - bit)
        palette += color
    return palette
