"""labelme: a JSON file per image, shapes in pixels.

Polygons, rectangles, circles and masks are objects; shapes of one ``group_id`` and label are one object, as in
labelme's own COCO export. Points are keypoints of the group's object.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from a2fpn.data.images import open_image, suffix_of
from a2fpn.data.importers.base import FAULTS, Importer, ImportOptions, group_of, read_categories, register_importer
from a2fpn.data.importers.files import image_size, read_json
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.shapes import ellipse
from a2fpn.data.labeled import LabeledImage, LabeledObject, LossLog, grouped
from a2fpn.errors import DataError
from a2fpn.masks.rle import Rle, encode_window

_SKIPPED = ("line", "linestrip")
_ROTATED = ("oriented_rectangle", "rotation", "quadrilateral")  # of labelme and X-AnyLabeling, which give the corners
_IGNORED = ("__ignore__", "_background_")  # labelme's own names for what is no object

_Points = dict[object, dict[str, tuple[str, tuple[float, float, float]]]]  # place and point by group and name


@register_importer("labelme")
class LabelmeImporter(Importer):
    """Reads JSON files with ``shapes`` and ``imagePath``, next to their images or elsewhere in the folder."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        for path in folder.of_type(".json"):
            head = folder.head(path)
            if b'"shapes"' in head or b'"imagePath"' in head or (b'"imageData"' in head and b'"version"' in head):
                return f"{path.name} with shapes"
        return ""

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.paths = list(folder.of_type(".json"))
        self.total = len(self.paths)
        labels = self.root / "labels.txt"
        if not self.categories and labels.is_file():
            self.categories = read_categories(labels)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            try:
                data = read_json(path)
            except DataError as error:
                self.log.add_error("unreadable-labels", path, error)
                continue
            if not isinstance(data, Mapping) or not isinstance(data.get("shapes"), list):
                self.log.add("unreadable-labels", path, "not a labelme file; expected an object with the list shapes")
                continue
            image = self._image(path, data, used)
            if image is not None:
                yield image
        yield from self.unlabeled(used)

    def _image(self, path: Path, data: Mapping[str, Any], used: set[Path]) -> LabeledImage | None:
        named = str(data.get("imagePath") or "")
        file = (self.images.find(named, path.parent) if named else None) or self.images.by_stem(
            [path.stem], path.parent
        )
        content: bytes | None = None
        if file is None and data.get("imageData"):
            size, content = self._embedded(path, data["imageData"])
            self.begin_image()
        else:
            size = self.claim(file, used, path, named=named or path.stem, own_file=True)
        said = (data.get("imageHeight"), data.get("imageWidth"))
        size = size and self.agreed_size(said, size, path, name=named)
        if size is None:
            return None
        shapes: list[tuple[object, LabeledObject]] = []
        points: _Points = {}
        for number, shape in enumerate(data["shapes"]):
            place = f"shapes[{number}]"
            try:
                group, found = self._shape(shape, size, place, points)
            except FAULTS as error:
                self.skip("bad-shape", path, error, place)
                continue
            if found is not None and found.category in _IGNORED:
                self.log.note(f"shapes labeled {found.category}, skipped")
            elif found is not None:
                shapes.append((group, found))
        objects = list(grouped(self._add_points(path, shapes, points) if points else shapes))
        # An image embedded in a file is named like the file: its own name may be a path of another machine.
        name, split = self.images.name_and_split(file or path.with_suffix(suffix_of(content or b"")))
        return LabeledImage(file, name, *size, objects, split, str(path), content=content)

    def _embedded(self, path: Path, data: object) -> tuple[tuple[int, int] | None, bytes]:
        """Return the size and the content of an image embedded in a file; no size, with a logged loss, for no image."""
        try:
            content = base64.b64decode(str(data))
            return image_size(content), content
        except Exception as error:  # PIL raises almost anything on a corrupt file
            self.log.add("unreadable-image", path, f"imageData is not a readable image ({error}); skipped")
            return None, b""

    def _shape(
        self, shape: Any, size: tuple[int, int], place: str, points_of: _Points
    ) -> tuple[object, LabeledObject | None]:
        if not isinstance(shape, Mapping):
            raise ValueError("a shape must be an object")
        label = shape.get("label")
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"it has no label, got {label!r}")
        label = self.label(label)
        kind = shape.get("shape_type") or "polygon"
        flags = shape.get("flags") or {}
        crowd = isinstance(flags, Mapping) and self.flag(flags.get("iscrowd"))
        group = group_of(shape.get("group_id"))
        points = shape.get("points")
        flat = _flat(points)
        count = len(flat) // 2
        if kind == "polygon" or kind in _ROTATED:
            if count < 3:
                raise ValueError(f"a {kind} needs 3 points, got {count}")
            return group, LabeledObject(label, None, [flat], crowd, line=place)
        if kind == "rectangle" and count in (2, 4):
            xs, ys = sorted(flat[::2]), sorted(flat[1::2])
            return group, LabeledObject(label, (xs[0], ys[0], xs[-1] - xs[0], ys[-1] - ys[0]), None, crowd, line=place)
        if kind == "circle" and count == 2:
            radius = math.dist(flat[:2], flat[2:])
            outline = ellipse((flat[0], flat[1]), (radius, radius))
            return group, LabeledObject(label, None, [outline], crowd, line=place)
        if kind == "mask" and count == 2:
            mask = _mask(shape.get("mask"), flat, size)
            return group, LabeledObject(label, None, mask, crowd, line=place)
        if kind == "point" and count == 1:
            if group is None:
                raise ValueError("a point without group_id belongs to no object")
            named = points_of.setdefault(group, {})
            if label in named:
                raise ValueError(f"the group {group!r} has another point {label!r}")
            seen = 1.0 if isinstance(flags, Mapping) and self.flag(flags.get("hidden"), "hidden") else 2.0
            named[label] = place, (flat[0], flat[1], seen)
            return group, None
        reason = "lines have no area" if kind in _SKIPPED else f"got {count} points"
        raise ValueError(f"a {kind} is not supported ({reason})")

    def _add_points(
        self, path: Path, shapes: list[tuple[object, LabeledObject]], points: _Points
    ) -> list[tuple[object, LabeledObject]]:
        """Attach keypoints to the first shape of each group, and their names to the classes."""
        result = []
        for group, shape in shapes:
            found = points.pop(group, None)
            if found is not None:
                if len(list(grouped([pair for pair in shapes if pair[0] == group]))) > 1:
                    detail = f"the group {group!r} has several objects; its points are those of the first"
                    self.log.add("ambiguous-points", path, detail, place=shape.line)
                known = self.keypoint_names(shape.category)
                names = [*known, *sorted(set(found) - set(known))]
                if len(names) > len(known):
                    self.declare_keypoints(shape.category, names)
                absent = ("", (0.0, 0.0, 0.0))
                flat = tuple(value for name in names for value in found.get(name, absent)[1])
                shape = dataclasses.replace(shape, keypoints=flat)
            result.append((group, shape))
        for group, found in points.items():
            for place, _ in found.values():
                self.log.add("bad-shape", path, f"the group {group!r} of the point has no object; skipped", place=place)
        return result


def _flat(points: Any) -> list[float]:
    """Flatten pairs of numbers.

    Raises:
        ValueError: If they are not pairs of numbers.
    """
    try:
        flat = [side for x, y in points for side in (x, y)]
        try:
            math.fsum(flat)  # raises for anything but numbers, faster than a test of each
        except TypeError:
            flat = [float(side) if isinstance(side, str) else side for side in flat]
            math.fsum(flat)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("its points must be pairs of numbers") from None
    return flat


def _mask(encoded: Any, corners: list[float], size: tuple[int, int]) -> Rle:
    """Decode the mask of a PNG between two corners, both inclusive."""
    if not isinstance(encoded, str):
        raise ValueError("a mask needs its PNG as base64 text")
    try:
        with open_image(io.BytesIO(base64.b64decode(encoded))) as image:
            window = np.asarray(image.convert("L")) > 0
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"its mask is not a PNG ({error})") from None
    left, top = (round(value) for value in corners[:2])
    height, width = window.shape
    if left < 0 or top < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"its mask of {width} x {height} at {left}, {top} extends beyond the image")
    return encode_window(window, top, left, size)
