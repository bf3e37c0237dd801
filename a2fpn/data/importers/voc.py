"""Pascal VOC: an XML file with boxes per image, and ``SegmentationObject/`` with masks.

VOC's box coordinates start at 1, and the last pixel is inclusive (the development kit of VOC2012). The value of a pixel
in ``SegmentationObject`` is the number of its object in the XML file; 255 is the void around objects.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.images import open_image
from a2fpn.data.importers.base import FAULTS, Importer, ImportOptions, number_of, register_importer
from a2fpn.data.importers.files import ImageIndex, folders_named, read_text, read_xml
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.shapes import turned
from a2fpn.data.labeled import Box, LabeledImage, LabeledObject, LossLog, split_name
from a2fpn.errors import DataError
from a2fpn.masks.rle import encode_masks

_MASKS = frozenset(("segmentationobject", "segmentationclass"))
_VOID = 255
_PRESENCE = re.compile(r"\s+-?[01]$")  # of a class, behind the stem in lists of classes


@register_importer("voc")
class VocImporter(Importer):
    """Reads ``Annotations/*.xml`` with images in ``JPEGImages/`` or next to them."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        path = next((p for p in folder.of_type(".xml") if re.search(rb"<annotation[\s>]", folder.head(p))), None)
        return "" if path is None else f"{path.name} with <annotation>"

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.paths = list(folder.of_type(".xml"))
        self.total = len(self.paths)
        self.images = ImageIndex(self.root, _MASKS)
        masks = next(iter(folders_named(self.root, "SegmentationObject")), None)
        found = [(masks, path) for path in sorted(masks.rglob("*"))] if masks is not None else []
        self.masks = {_key(path, root): path for root, path in found if path.suffix.lower() == ".png"}
        self.splits = self._split_lists()

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            try:
                image = self._image(path, used)
            except DataError as error:
                self.log.add_error("unreadable-labels", path, error)
                continue
            except FAULTS as error:
                self.skip("unreadable-labels", path, error)
                continue
            if image is not None:
                yield image
        yield from self.unlabeled(used)

    def _split_lists(self) -> dict[str, str]:
        """Split of each stem listed in ``ImageSets/*/{train,val,test}.txt``."""
        splits: dict[str, str] = {}
        for path in sorted(p for lists in folders_named(self.root, "ImageSets") for p in lists.glob("*/*.txt")):
            if path.stem in ("train", "val", "test"):
                for line in read_text(path).splitlines():
                    if stem := _PRESENCE.sub("", line.strip()):
                        splits.setdefault(stem, path.stem)
        return splits

    def _image(self, path: Path, used: set[Path]) -> LabeledImage | None:
        root = read_xml(path)
        if root.tag != "annotation":
            return None
        named = root.findtext("filename") or ""
        folder = next((parent for parent in path.parents if parent.name == "Annotations"), path.parent)
        key = _key(path, folder)
        file = self.images.by_stem(key.split("/"), path.parent)
        file = file or (self.images.find(named, path.parent) if named.strip() else None)
        size = self.claim(file, used, path, named=named or path.stem, own_file=True)
        if file is None or size is None:
            return None
        said = tuple(int(number_of(root.findtext(f"size/{side}") or "0", side)) for side in ("height", "width"))
        agreed = self.agreed_size((said[0], said[1]), size, path, name=file.name)
        if agreed is None:
            return None
        size = agreed
        labels = self._labels(key, size)
        objects = []
        nodes = root.findall("object")
        for number, node in enumerate(nodes, 1):
            try:
                objects.append(self._object(node, number, labels, size))
            except ValueError as error:
                place = f"line {_line_of(path, number)}"
                self.log.add("bad-object", path, f"object {number}: {error}; skipped", place=place)
        if labels is not None:
            others = set(np.unique(labels).tolist()) - {*range(len(nodes) + 1), _VOID}
            if others:
                detail = f"pixels of {', '.join(map(str, sorted(others)[:5]))}, which are no objects of {path.name}"
                self.log.add("unknown-object", self.masks[key], f"{detail}; skipped")
        name, split = self.images.name_and_split(file)
        # VOC's lists have stems; those of other tools may have paths.
        split = self.splits.get(key, "") or self.splits.get(path.stem, "") or split or split_name(path.parent.name)
        return LabeledImage(file, name, *size, objects, split, str(path))

    def _labels(self, key: str, size: tuple[int, int]) -> NDArray[Any] | None:
        path = self.masks.get(key)
        if path is None:
            return None
        try:
            with open_image(path) as image:
                labels = np.asarray(image)
        except (OSError, SyntaxError) as error:
            self.log.add("unreadable-image", path, f"not a readable image ({error}); its masks are lost")
            return None
        if labels.shape != size:
            detail = f"its shape {labels.shape} is not the image's {size}, or it is not a palette image"
            self.log.add("size-mismatch", path, f"{detail}; its masks are lost")
            return None
        return labels

    def _object(
        self, node: ET.Element, number: int, labels: NDArray[Any] | None, size: tuple[int, int]
    ) -> LabeledObject:
        name = self.label(node.findtext("name") or "")
        if not name:
            raise ValueError("it has no name")
        crowd = self.flag(node.findtext("iscrowd"))
        if self.flag(node.findtext("difficult"), "difficult"):
            self.log.note("objects marked difficult, kept like the others")
        place = f"object {number}"
        polygon = node.find("polygon")
        if labels is not None and number != _VOID and (mask := labels == number).any():
            return LabeledObject(name, _box(node, required=False), encode_masks(mask[None])[0], crowd, line=place)
        if labels is not None:
            self.log.note("objects without pixels in SegmentationObject")
        if polygon is not None:  # as written by Roboflow
            return LabeledObject(name, None, [_polygon(polygon)], crowd, line=place)
        rotated = node.find("robndbox")
        if rotated is not None and node.find("bndbox") is None:
            return LabeledObject(name, None, [_rotated(rotated)], crowd, line=place)
        return LabeledObject(name, _box(node), None, crowd, line=place)


def _key(path: Path, folder: Path) -> str:
    """Path of a file below a folder, without suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _box(node: ET.Element, *, required: bool = True) -> Box | None:
    """Convert a box with an inclusive last pixel, counted from 1, to x, y, width, height; a 0 is the first as well."""
    box = node.find("bndbox")
    if box is None:
        if required:
            raise ValueError("it has no bndbox")
        return None
    values = {key: number_of(box.findtext(key), key) for key in ("xmin", "ymin", "xmax", "ymax")}
    left, top = (values[key] - 1 if values[key] else 0.0 for key in ("xmin", "ymin"))
    width, height = values["xmax"] - left, values["ymax"] - top
    if min(width, height) <= 0:
        raise ValueError(
            f"its box from {values['xmin']:g}, {values['ymin']:g} to {values['xmax']:g}, {values['ymax']:g} has no area"
        )
    return tuple(round(v, 4) for v in (left, top, width, height))  # type: ignore[return-value]


def _rotated(node: ET.Element) -> list[float]:
    """Return the corners of a rotated box: center, width, height and angle in radians, as in roLabelImg."""
    x, y, w, h, angle = (number_of(node.findtext(key), key) for key in ("cx", "cy", "w", "h", "angle"))
    corners = [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2), (x - w / 2, y + h / 2)]
    return turned(corners, math.degrees(angle), (x, y))


def _polygon(node: ET.Element) -> list[float]:
    """Parse points ``x1, y1, x2, y2, ...`` in pixels."""
    values = {child.tag: number_of(child.text, child.tag) for child in node}
    count = len(values) // 2
    try:
        return [values[f"{axis}{number}"] for number in range(1, count + 1) for axis in "xy"]
    except KeyError as error:
        raise ValueError(f"its polygon of {len(values)} numbers lacks {error.args[0]}") from None


def _line_of(path: Path, number: int) -> int:
    """Line on which the object with the given number starts."""
    text = path.read_bytes()
    starts = [match.start() for match in re.finditer(rb"<object[\s>]", text)]
    return text.count(b"\n", 0, starts[number - 1]) + 1 if number <= len(starts) else 1
