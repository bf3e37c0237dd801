"""CVAT for images 1.1: one XML file with all images, shapes in pixels.

Shapes of one ``group_id`` and label are one object, as in CVAT's own COCO export; skeletons become keypoints. The runs
of a mask are row-major in its window and start with background (CVAT's format description).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from a2fpn.data.importers.base import FAULTS, Importer, ImportOptions, number_of, register_importer
from a2fpn.data.importers.files import read_bytes, xml_bytes
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.shapes import ellipse, turned
from a2fpn.data.labeled import LabeledImage, LabeledObject, LossLog, grouped, split_name
from a2fpn.masks.rle import Rle, encode_window

_SHAPES = frozenset(("box", "polygon", "mask", "ellipse", "skeleton"))


@register_importer("cvat")
class CvatImporter(Importer):
    """Reads ``annotations.xml`` of an export for images, with the images in the folder."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        path = next((p for p in folder.of_type(".xml") if re.search(rb"<annotations[\s>]", folder.head(p))), None)
        return "" if path is None else f"{path.name} with <annotations>"

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.paths = [path for path in folder.of_type(".xml") if b"<annotations" in folder.head(path)]
        if folder.file is not None:
            self.paths = [folder.file]
        self.total = sum(len(re.findall(rb"<image\s", read_bytes(path))) for path in self.paths)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            xml_bytes(path)  # refuses entities
            try:
                yield from self._file(path, used)
            except ET.ParseError as error:
                detail = "the file is empty" if not read_bytes(path).strip() else f"invalid XML ({error})"
                self.log.add(
                    "unreadable-labels", path, f"{detail}; the rest is lost", place=f"line {error.position[0]}"
                )
        yield from self.unlabeled(used)

    def _file(self, path: Path, used: set[Path]) -> Iterator[LabeledImage]:
        root: ET.Element | None = None
        # Node by node: an export of 10,000 images is hundreds of MB as a tree.
        for event, node in ET.iterparse(path, events=("start", "end")):
            if event == "start":
                root = node if root is None else root
            elif node.tag == "labels":
                self._declare(node)
            elif node.tag == "track":
                detail = "video tracks are not supported; export the task as 'CVAT for images'"
                self.log.add("unsupported-shape", path, detail, place=f"track {node.get('id', '')}")
                node.clear()
            elif node.tag == "image":
                image = self._image(path, node, used)
                if image is not None:
                    yield image
                node.clear()
                if root is not None:
                    root.clear()

    def _declare(self, labels: ET.Element) -> None:
        nodes = labels.findall("label")
        self.declare([node.findtext("name", "") for node in nodes if node.find("parent") is None])
        for node in nodes:
            parent = node.findtext("parent")
            if parent:
                known = self.keypoint_names(parent)
                name = node.findtext("name", "")
                if name not in known:
                    self.declare_keypoints(parent, [*known, name])

    def _image(self, path: Path, node: ET.Element, used: set[Path]) -> LabeledImage | None:
        named = node.get("name", "")
        place = f"image {named!r}"
        file = self.images.find(named, path.parent)
        size = self.claim(file, used, path, named=named, place=place)
        try:
            said = int(node.get("height", "0")), int(node.get("width", "0"))
        except ValueError:
            said = (0, 0)
        size = size and self.agreed_size(said, size, path, name=named, place=place)
        if file is None or size is None:
            return None
        shapes: list[tuple[object, LabeledObject]] = []
        for number, shape in enumerate(node):
            where = f"{place}, {shape.tag} {number + 1}"
            if shape.tag not in _SHAPES:
                self.log.add("unsupported-shape", path, f"a {shape.tag} is not supported by COCO", place=where)
                continue
            try:
                group = shape.get("group_id")
                shapes.append((None if group in (None, "0", "") else group, self._shape(shape, size, where)))
            except FAULTS as error:
                self.skip("bad-shape", path, error, where)
        name, split = self.images.name_and_split(file)
        subset = node.get("subset", "")
        split = split_name(subset) or ("" if subset == "default" else subset) or split
        return LabeledImage(file, name, *size, list(grouped(shapes)), split, str(path))

    def _shape(self, shape: ET.Element, size: tuple[int, int], place: str) -> LabeledObject:
        label = shape.get("label", "")
        if not label:
            raise ValueError("it has no label")
        crowd = any(a.get("name") == "iscrowd" and self.flag(a.text) for a in shape.findall("attribute"))
        if shape.tag == "box":
            x0, y0, x1, y1 = (number_of(shape.get(key), key) for key in ("xtl", "ytl", "xbr", "ybr"))
            angle = number_of(shape.get("rotation", "0"), "rotation")
            if angle:
                corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
                points = turned(corners, angle, ((x0 + x1) / 2, (y0 + y1) / 2))
                return LabeledObject(label, None, [points], crowd, line=place)
            box = (x0, y0, round(x1 - x0, 6), round(y1 - y0, 6))
            return LabeledObject(label, box, None, crowd, line=place)
        if shape.tag == "polygon":
            return LabeledObject(label, None, [_points(shape.get("points", ""))], crowd, line=place)
        if shape.tag == "ellipse":
            cx, cy, rx, ry = (number_of(shape.get(key), key) for key in ("cx", "cy", "rx", "ry"))
            points = ellipse((cx, cy), (rx, ry), number_of(shape.get("rotation", "0"), "rotation"))
            return LabeledObject(label, None, [points], crowd, line=place)
        if shape.tag == "mask":
            return LabeledObject(label, None, _mask(shape, size), crowd, line=place)
        return LabeledObject(label, None, None, crowd, self._keypoints(shape, label), line=place)

    def _keypoints(self, skeleton: ET.Element, label: str) -> tuple[float, ...]:
        found = {}
        for node in skeleton.findall("points"):
            x, y = _points(node.get("points", ""), least=1)[:2]
            seen = 1.0 if self.flag(node.get("occluded"), "occluded") else 2.0
            name = node.get("label", "")
            if name in found:
                raise ValueError(f"it has two points {name!r}")
            found[name] = (0.0, 0.0, 0.0) if self.flag(node.get("outside"), "outside") else (x, y, seen)
        known = self.keypoint_names(label)
        names = [*known, *(name for name in found if name not in known)]
        if len(names) > len(known):
            self.declare_keypoints(label, names)
        return tuple(value for name in names for value in found.get(name, (0.0, 0.0, 0.0)))


def _points(text: str, least: int = 3) -> list[float]:
    """Parse ``x,y;x,y;...``."""
    try:
        points = [float(value) for pair in text.split(";") for value in pair.split(",")]
    except ValueError:
        raise ValueError(f"its points must be numbers x,y;x,y, got {text[:40]!r}") from None
    if len(points) % 2 or len(points) < 2 * least:
        raise ValueError(f"it has {len(points)} coordinates, expected {least} or more pairs")
    return points


def _mask(shape: ET.Element, size: tuple[int, int]) -> Rle:
    left, top, width, height = (int(number_of(shape.get(key), key)) for key in ("left", "top", "width", "height"))
    try:
        runs = [int(run) for run in shape.get("rle", "").split(",")]
    except ValueError:
        raise ValueError("its rle has non-integer values") from None
    if min(left, top, width, height, *runs) < 0 or left + width > size[1] or top + height > size[0]:
        raise ValueError(f"its window of {width} x {height} at {left}, {top} does not fit the image")
    total = sum(runs)  # of Python's integers, which don't overflow
    if total > width * height:
        raise ValueError(f"its runs add up to {total} pixels, its window has {width * height}")
    window = np.zeros(width * height, dtype=np.bool_)
    window[:total] = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return encode_window(window.reshape(height, width), top, left, size)
