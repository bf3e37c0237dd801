"""VGG Image Annotator (VIA) 1 and 2: one JSON file with all images, as saved or as exported.

Rectangles, polygons, circles and ellipses are objects. Users name the attributes themselves: the class is the one with
a usual name, else a choice among options, else the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from a2fpn.data.importers.base import FAULTS, JsonImporter, number_of, register_importer
from a2fpn.data.importers.files import read_json
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.shapes import ellipse
from a2fpn.data.labeled import LabeledImage, LabeledObject
from a2fpn.errors import DataError

_CLASS_NAMES = ("class", "label", "category", "name", "type", "object")
_CHOICES = ("dropdown", "radio", "checkbox")


@register_importer("via")
class ViaImporter(JsonImporter):
    """Reads projects (``_via_img_metadata``) and exported annotations."""

    sign = "regions"

    @classmethod
    def owns(cls, folder: Folder, path: Path) -> bool:
        """See :meth:`JsonImporter.owns`."""
        head = folder.head(path)
        return b'"_via_' in head or (b'"regions"' in head and b'"filename"' in head)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            data = read_json(path)
            entries = data.get("_via_img_metadata", data) if isinstance(data, Mapping) else None
            if not isinstance(entries, Mapping):
                raise DataError(f"{path}: not a VIA file; expected an object of images with their regions.")
            declared = _declared(data)
            attribute = self._class_attribute(path, entries, declared)
            options = _options(declared.get(attribute))
            self.declare([self.label(name) for name in options.values() if name.strip()])
            for key, entry in entries.items():
                try:
                    image = self._image(path, key, entry, attribute, options, used)
                except FAULTS as error:
                    self.skip("bad-item", path, error, key)
                    continue
                if image is not None:
                    yield image
        yield from self.unlabeled(used)

    def _class_attribute(self, path: Path, entries: Mapping[str, Any], declared: Mapping[str, Any]) -> str:
        """Return the attribute that holds the class: one with a usual name, a choice, or the first; empty for none."""
        attributes = (
            attributes
            for entry in entries.values()
            for _, region in _regions(entry)
            if isinstance(region, Mapping) and isinstance(attributes := region.get("region_attributes"), Mapping)
        )
        found = list(dict.fromkeys(name for given in attributes for name, value in given.items() if _chosen(value)))
        usual = [name for wanted in _CLASS_NAMES for name in found if name.strip().lower() == wanted]
        choices = [name for name in found if _type_of(declared.get(name)) in _CHOICES]
        chosen = next(iter([*usual, *choices, *found]), "")
        if len(found) > 1:
            others = ", ".join(name for name in found if name != chosen)
            self.log.note(f"{path.name}: classes are read from the attribute {chosen!r}; not read: {others}")
        return chosen

    def _image(
        self, path: Path, key: str, entry: Any, attribute: str, options: Mapping[str, str], used: set[Path]
    ) -> LabeledImage | None:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("filename"), str):
            raise ValueError("it has no filename")
        named = entry["filename"]
        regions = list(_regions(entry))
        if not regions:
            return None  # a project lists images before they are annotated
        file = self.images.find(named, path.parent)
        size = self.claim(file, used, path, named=named, place=key)
        if file is None or size is None:
            return None
        objects = []
        for number, region in regions:
            place = f"{named}, regions[{number}]"
            try:
                label = self._label(region.get("region_attributes") or {}, attribute, options)
                objects.append(_shape(region["shape_attributes"], label, place))
            except FAULTS as error:
                self.skip("bad-shape", path, error, place)
        name, split = self.images.name_and_split(file)
        return LabeledImage(file, name, *size, objects, split, str(path))

    def _label(self, attributes: Mapping[str, Any], attribute: str, options: Mapping[str, str]) -> str:
        if not attribute:
            return self.class_of("")
        chosen = _chosen(attributes.get(attribute))
        if len(chosen) != 1:
            raise ValueError(f"its attribute {attribute!r} has {len(chosen)} values, expected one class")
        return self.label(options.get(chosen[0], chosen[0]))


def _declared(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes of regions that a project declares, by name."""
    attributes = data.get("_via_attributes")
    regions = attributes.get("region") if isinstance(attributes, Mapping) else None
    return regions if isinstance(regions, Mapping) else {}


def _type_of(attribute: Any) -> object:
    return attribute.get("type") if isinstance(attribute, Mapping) else None


def _options(attribute: Any) -> Mapping[str, str]:
    """Return the names of classes by the value of a choice: its description, which VIA shows, if there is one."""
    options = attribute.get("options") if isinstance(attribute, Mapping) else None
    if not isinstance(options, Mapping):
        return {}
    return {value: text if isinstance(text, str) and text.strip() else value for value, text in options.items()}


def _regions(entry: Any) -> Iterable[tuple[object, Any]]:
    """Return the regions of an image with their keys: a list in VIA 2, an object in VIA 1."""
    regions = entry.get("regions") if isinstance(entry, Mapping) else None
    if isinstance(regions, Mapping):
        return regions.items()
    return enumerate(regions) if isinstance(regions, list) else ()


def _chosen(value: Any) -> list[str]:
    """Return the values of an attribute: one, or the marked ones of a checkbox."""
    if isinstance(value, list):
        return [str(one) for one in value]
    if isinstance(value, Mapping):
        return [name for name, marked in value.items() if marked]
    return [] if value is None or not str(value).strip() else [str(value)]


def _shape(shape: Mapping[str, Any], label: str, place: str) -> LabeledObject:
    kind = shape.get("name")
    if kind == "rect":
        x, y, width, height = _numbers(shape, "x", "y", "width", "height")
        return LabeledObject(label, (x, y, width, height), line=place)
    if kind == "polygon":
        xs, ys = shape["all_points_x"], shape["all_points_y"]
        if len(xs) != len(ys) or len(xs) < 3:
            raise ValueError(f"a polygon needs 3 or more points, got {len(xs)} x and {len(ys)} y")
        ring = [float(side) for point in zip(xs, ys, strict=True) for side in point]
        return LabeledObject(label, None, [ring], line=place)
    if kind == "circle":
        x, y, radius = _numbers(shape, "cx", "cy", "r")
        return LabeledObject(label, None, [ellipse((x, y), (radius, radius))], line=place)
    if kind == "ellipse":
        x, y, rx, ry = _numbers(shape, "cx", "cy", "rx", "ry")
        angle = math.degrees(float(shape.get("theta") or 0))
        return LabeledObject(label, None, [ellipse((x, y), (rx, ry), angle)], line=place)
    raise ValueError(f"a {kind} is not supported by COCO")


def _numbers(shape: Mapping[str, Any], *keys: str) -> list[float]:
    return [number_of(str(shape[key]), key) for key in keys]
