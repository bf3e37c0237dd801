"""Datumaro: one JSON file per subset in ``annotations/``, images in ``images/``.

Annotations of one ``group`` and label are one object: box, polygons or mask, and points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from a2fpn.data.importers.base import FAULTS, JsonImporter, group_of, list_of, register_importer
from a2fpn.data.importers.files import read_json
from a2fpn.data.importers.folder import Folder
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, grouped, split_name
from a2fpn.errors import DataError
from a2fpn.masks.segmentation import parse_segmentation

_SHAPES = frozenset(("bbox", "polygon", "mask", "points"))


@register_importer("datumaro")
class DatumaroImporter(JsonImporter):
    """Reads JSON files with ``items`` and ``categories``."""

    sign = "items"

    @classmethod
    def owns(cls, folder: Folder, path: Path) -> bool:
        """See :meth:`JsonImporter.owns`."""
        head = folder.head(path)
        return b'"items"' in head or (b'"label"' in head and b'"labels"' in head and b'"categories"' in head)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            data = read_json(path)
            if not isinstance(data, Mapping) or not isinstance(data.get("items"), list):
                raise DataError(f"{path}: not a Datumaro file; expected an object with items and categories.")
            names = self._declare(path, data)
            subset = split_name(path.stem) or ("" if path.stem == "default" else path.stem)
            yield from self.each(self._image, path, "items", data["items"], names, subset, used)
        yield from self.unlabeled(used)

    def _declare(self, path: Path, data: Mapping[str, Any]) -> list[str]:
        try:
            labels = data["categories"]["label"]["labels"]
            names = [label["name"] for label in labels]
            if not all(isinstance(name, str) for name in names):
                raise TypeError
        except FAULTS:
            raise DataError(
                f"{path}: no list of classes; expected categories.label.labels, each with a name."
            ) from None
        given = {info.name for info in self.categories}
        self.categories += [
            CategoryInfo(name, supercategory=str(label.get("parent") or ""))
            for name, label in zip(names, labels, strict=True)
            if name not in given
        ]
        try:
            for item in (data["categories"].get("points") or {}).get("items", []):
                index = item.get("label_id", -1)
                if 0 <= index < len(names) and not self.keypoint_names(names[index]):
                    self.declare_keypoints(names[index], list(map(str, item.get("labels", []))))
        except FAULTS as error:
            self.skip("bad-categories", path, error, "categories.points")
        return names

    def _image(
        self, path: Path, item: Any, place: str, names: Sequence[str], subset: str, used: set[Path]
    ) -> LabeledImage | None:
        if not isinstance(item, Mapping):
            self.log.add("bad-item", path, "it is not an object; skipped", place=place)
            return None
        said = item.get("image") if isinstance(item.get("image"), Mapping) else {}
        named = str(said.get("path") or item.get("id") or "")  # type: ignore[union-attr]
        near = self.root / "images" / path.stem
        file = self.images.find(named, near if near.is_dir() else None)
        size = self.claim(file, used, path, named=named, place=place)
        wanted = said.get("size")  # type: ignore[union-attr]
        stated = (wanted[0], wanted[1]) if isinstance(wanted, list) and len(wanted) == 2 else (None, None)
        size = size and self.agreed_size(stated, size, path, name=named, place=place)
        if file is None or size is None:
            return None
        shapes = []
        for index, raw in enumerate(list_of(item.get("annotations"), "annotations")):
            where = f"{place}.annotations[{index}]"
            try:
                if raw.get("type") not in _SHAPES:
                    detail = f"a {raw.get('type')} is not supported by COCO"
                    self.log.add("unsupported-shape", path, detail, place=where)
                    continue
                crowd = self.flag((raw.get("attributes") or {}).get("is_crowd"), "is_crowd")
                shapes.append((group_of(raw.get("group") or None), _shape(raw, names, size, where, crowd=crowd)))
            except FAULTS as error:
                self.skip("bad-shape", path, error, where)
        name, split = self.images.name_and_split(file)
        return LabeledImage(file, name, *size, list(grouped(shapes)), subset or split, str(path))


def _shape(
    raw: Mapping[str, Any], names: Sequence[str], size: tuple[int, int], place: str, *, crowd: bool
) -> LabeledObject:
    label = raw.get("label_id")
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise ValueError(f"label_id is {label!r}, the file lists 0 to {len(names) - 1}")
    kind, name = raw["type"], names[label]
    if kind == "bbox":
        box = raw.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"bbox must be [x, y, width, height], got {box!r}")
        x, y, w, h = map(float, box)
        return LabeledObject(name, (x, y, w, h), None, crowd, line=place)
    if kind == "mask":
        rle = parse_segmentation(raw.get("rle"), *size)
        if not isinstance(rle, dict):
            raise ValueError("rle must be an object with counts and size")
        return LabeledObject(name, None, rle, crowd, line=place)
    points = raw.get("points")
    if not isinstance(points, list) or len(points) % 2:
        count = len(points) if isinstance(points, list) else type(points).__name__
        raise ValueError(f"points must be pairs x, y, got {count} numbers")
    flat = [float(value) for value in points]
    if kind == "polygon":
        if len(flat) < 6:
            raise ValueError(f"a polygon needs 3 points, got {len(flat) // 2}")
        return LabeledObject(name, None, [flat], crowd, line=place)
    # Datumaro: 0 absent, 1 hidden, 2 visible, as in COCO.
    seen = raw.get("visibility") or [2] * (len(flat) // 2)
    keypoints = tuple(v for x, y, s in zip(flat[::2], flat[1::2], seen, strict=True) for v in (x, y, float(s)))
    return LabeledObject(name, None, None, crowd, keypoints, line=place)
