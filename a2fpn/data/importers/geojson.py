"""GeoJSON as exported by QuPath: a file per image, named after it, polygons in pixels of the full resolution.

Annotations, detections and cells are objects; a cell is its outline, without the nucleus.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from a2fpn.data.importers.base import FAULTS, Importer, ImportOptions, list_of, register_importer
from a2fpn.data.importers.files import read_json
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.shapes import with_holes
from a2fpn.data.labeled import LabeledImage, LabeledObject, LossLog
from a2fpn.errors import DataError

_CLASS_KEYS = ("class", "label", "category")  # of other programs
_OBJECTS = ("annotation", "detection", "cell")


@register_importer("geojson")
class GeoJsonImporter(Importer):
    """Reads files of a ``FeatureCollection``, a list of features, or one feature."""

    @classmethod
    def detect(cls, folder: Folder) -> str:
        """See :meth:`Importer.detect`."""
        path = next(_paths(folder), None)
        return "" if path is None else f"{path.name} with features"

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.paths = [folder.file] if folder.file else list(_paths(folder))
        self.total = len(self.paths)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            try:
                features = _features(read_json(path))
            except DataError as error:
                self.log.add_error("unreadable-labels", path, error)
                continue
            except ValueError as error:
                self.log.add("unreadable-labels", path, f"{error}; skipped")
                continue
            # QuPath drops both suffixes of a.ome.tif.
            file = self.images.find(path.stem, path.parent) or self.images.find(f"{path.stem}.ome", path.parent)
            size = self.claim(file, used, path, named=path.stem, own_file=True)
            if file is None or size is None:
                continue
            found = [self._object(path, raw, f"features[{number}]", size) for number, raw in enumerate(features)]
            self._note_kinds(features)
            name, split = self.images.name_and_split(file)
            objects = [labeled for labeled in found if labeled is not None]
            yield LabeledImage(file, name, *size, objects, split, str(path))
        yield from self.unlabeled(used)

    def _object(self, path: Path, raw: Any, place: str, size: tuple[int, int]) -> LabeledObject | None:
        try:
            properties = raw.get("properties") or {}
            kind = properties.get("objectType", "annotation")
            if kind not in _OBJECTS:
                self.log.add("unsupported-shape", path, f"a {kind} is not an object; skipped", place=place)
                return None
            geometry = raw["geometry"]
            if not isinstance(geometry, Mapping):
                raise ValueError("it has no geometry")
            plane = geometry.get("plane") or {}
            if plane.get("z") or plane.get("t"):
                detail = f"it is on plane z = {plane.get('z', 0)}, t = {plane.get('t', 0)}; only the first is read"
                self.log.add("other-plane", path, f"{detail}; skipped", place=place)
                return None
            if geometry["type"] not in ("Polygon", "MultiPolygon"):
                detail = f"a {geometry['type']} is not supported by COCO; skipped"
                self.log.add("unsupported-shape", path, detail, place=place)
                return None
            polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
            rings = [[_ring(ring) for ring in list_of(part, "coordinates")] for part in polygons]
            if not rings or not all(rings):
                raise ValueError("its geometry has no coordinates")
            name = self._class(properties)
            if name.endswith("*"):
                self.log.note(f"objects of the class {name}, which QuPath ignores, skipped")
                return None
            return LabeledObject(name, None, with_holes(rings, *size), line=place)
        except FAULTS as error:
            self.skip("bad-shape", path, error, place)
            return None

    def _class(self, properties: Mapping[str, Any]) -> str:
        """Return the class of an object; derived ones are joined as QuPath displays them."""
        given: Any = properties.get("classification") or next(filter(None, map(properties.get, _CLASS_KEYS)), {})
        if not isinstance(given, (str, Mapping)):
            raise ValueError(f"its classification must be an object with a name, got {str(given)[:40]}")
        names = given if isinstance(given, str) else given.get("name") or given.get("names") or ""
        if not isinstance(names, str):
            names = ": ".join(names)
        return self.label(names) or self.class_of("")

    def _note_kinds(self, features: list[Any]) -> None:
        """Note files in which annotations may be regions around detections."""
        kinds = [raw["properties"].get("objectType") for raw in features if _has_properties(raw)]
        if "annotation" in kinds and ("detection" in kinds or "cell" in kinds):
            self.log.note("files with annotations beside detections or cells; all became objects, also regions")


def _paths(folder: Folder) -> Iterator[Path]:
    yield from folder.of_type(".geojson")
    for path in folder.of_type(".json"):
        head = folder.head(path)
        if b'"FeatureCollection"' in head or (b'"Feature"' in head and b'"geometry"' in head):
            yield path


def _features(data: Any) -> list[Any]:
    """Return the features of a file.

    Raises:
        ValueError: If it has none, or coordinates of a map.
    """
    if isinstance(data, Mapping) and data.get("crs") is not None:
        raise ValueError("its coordinates have a reference system (crs), expected pixels of the image")
    if isinstance(data, Mapping):
        data = [data] if data.get("type") == "Feature" else data.get("features")
    if not isinstance(data, list):
        raise ValueError("not GeoJSON; expected an object with the list features, or a list of them")
    return data


def _has_properties(raw: Any) -> bool:
    return isinstance(raw, Mapping) and isinstance(raw.get("properties"), Mapping)


def _ring(points: Any) -> list[float]:
    """Flatten a ring of positions x, y, or x, y, z, without its closing point."""
    try:
        pairs = [(float(x), float(y)) for x, y, *_ in points]
    except (TypeError, ValueError):
        raise ValueError("its coordinates must be rings of positions x, y") from None
    if len(pairs) > 1 and pairs[0] == pairs[-1]:
        pairs.pop()
    if len(pairs) < 3:
        raise ValueError(f"a ring needs 3 points, got {len(pairs)}")
    return [side for pair in pairs for side in pair]
