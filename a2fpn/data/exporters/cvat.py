"""CVAT for images 1.1: one XML file and the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from a2fpn.data.exporters.base import Exporter, ExportOptions, register_exporter
from a2fpn.data.exporters.rings import window_of
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog


@register_exporter("cvat")
class CvatExporter(Exporter):
    """Writes boxes, polygons, masks (with holes) and skeletons; parts of one object share a group.

    Crowds carry the attribute ``iscrowd``, predictions the attribute ``score``.
    """

    stems = False
    xml = True

    def __init__(
        self, output: Path, categories: Sequence[CategoryInfo], log: LossLog, options: ExportOptions | None = None
    ) -> None:
        super().__init__(output, categories, log, options)
        output.mkdir(parents=True, exist_ok=True)
        self.file = (output / "annotations.xml").open("w", encoding="utf-8")
        self.file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task>')
        self.file.write(f"<labels>{''.join(map(_label, categories))}</labels></task></meta>\n")

    def write(self, image: LabeledImage) -> None:
        """See :meth:`Exporter.write`."""
        split = self.split_of(image)
        self.place(image, "images", split)
        name = f"{split}/{image.name}" if split else image.name
        subset = f" subset={quoteattr(split)}" if split else ""
        self.file.write(
            f'<image id="{self.written}" name={quoteattr(name)}{subset} '
            f'width="{image.width}" height="{image.height}">\n'
        )
        for number, labeled in enumerate(image.objects, 1):
            self._shapes(labeled, number, image)
        self.file.write("</image>\n")

    def close(self) -> None:
        """See :meth:`Exporter.close`."""
        super().close()
        self.file.write("</annotations>\n")
        self.file.close()

    def _shapes(self, labeled: LabeledObject, number: int, image: LabeledImage) -> None:
        parts: list[tuple[str, str]] = []
        segmentation = labeled.segmentation
        if isinstance(segmentation, list):
            parts = [("polygon", f'points="{_points(polygon)}"') for polygon in segmentation]
        elif segmentation is not None:
            window, (left, top, right, bottom) = window_of(segmentation, image.height, image.width)
            flat = window.ravel()
            edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=np.int8(0)))
            runs = np.diff(edges, prepend=0, append=flat.size)
            rle = ", ".join(map(str, runs.tolist()))
            place = f'left="{left}" top="{top}" width="{right - left}" height="{bottom - top}"'
            parts = [("mask", f'rle="{rle}" {place}')]
        box = labeled.bbox if segmentation is None else self.own_box(labeled, image)
        if box is not None:
            x, y, w, h = box
            parts += [("box", f'xtl="{_n(x)}" ytl="{_n(y)}" xbr="{_n(x + w)}" ybr="{_n(y + h)}"')]
        skeleton = self._skeleton(labeled)
        group = f' group_id="{number}"' if len(parts) + bool(skeleton) > 1 else ""
        head = f'label={quoteattr(labeled.category)} source="manual" occluded="0"{group} z_order="0"'
        attributes = f'<attribute name="iscrowd">{"true" if labeled.iscrowd else "false"}</attribute>'
        if labeled.score is not None:
            attributes += f'<attribute name="score">{labeled.score:.4f}</attribute>'
        for tag, values in parts:
            self.file.write(f"<{tag} {head} {values}>{attributes}</{tag}>\n")
        if skeleton:
            self.file.write(f"<skeleton {head}>{attributes}{skeleton}</skeleton>\n")

    def _skeleton(self, labeled: LabeledObject) -> str:
        names = next((info.keypoints for info in self.categories if info.name == labeled.category), ())
        values = labeled.keypoints
        return "".join(
            f'<points label={quoteattr(names[i] if i < len(names) else f"point {i + 1}")} source="manual" '
            f'outside="{int(seen == 0)}" occluded="{int(seen == 1)}" points="{_n(x)},{_n(y)}"></points>'
            for i, (x, y, seen) in enumerate(zip(values[::3], values[1::3], values[2::3], strict=True))
        )


def _label(category: CategoryInfo) -> str:
    attributes = "".join(
        f"<attribute><name>{name}</name><mutable>False</mutable><input_type>{kind}</input_type>"
        f"<default_value>{default}</default_value><values>{values}</values></attribute>"
        for name, kind, default, values in (
            ("iscrowd", "checkbox", "false", "false"),
            ("score", "text", "", ""),
        )
    )
    kind = "skeleton" if category.keypoints else "any"
    head = (
        f"<label><name>{escape(category.name)}</name><type>{kind}</type><attributes>{attributes}</attributes></label>"
    )
    points = "".join(
        f"<label><name>{escape(name)}</name><type>points</type><parent>{escape(category.name)}</parent></label>"
        for name in category.keypoints
    )
    return head + points


def _n(value: float) -> str:
    """Format a number briefly, to a ten-thousandth."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _points(polygon: list[float]) -> str:
    return ";".join(f"{_n(x)},{_n(y)}" for x, y in zip(polygon[::2], polygon[1::2], strict=True))
