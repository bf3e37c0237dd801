"""COCO panoptic: a JSON file of segments and a folder of PNGs whose colors are segment ids.

The id of a pixel is R + 256 G + 256² B (Kirillov et al., Panoptic Segmentation, CVPR 2019; COCO's data format).
Segments of stuff classes (``isthing: 0``) are not objects and are only counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.images import open_image
from a2fpn.data.importers.base import FAULTS, ImportOptions, JsonImporter, list_of, register_importer
from a2fpn.data.importers.coco import is_panoptic
from a2fpn.data.importers.files import ImageIndex, folders_named, read_json
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.label_images import encode_labels
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog, split_in
from a2fpn.errors import DataError


@register_importer("panoptic")
class PanopticImporter(JsonImporter):
    """Reads JSON files with ``segments_info``, and the PNGs in the folder of the same name."""

    sign = "segments_info"

    @classmethod
    def owns(cls, folder: Folder, path: Path) -> bool:
        """See :meth:`JsonImporter.owns`."""
        return b'"shapes"' not in folder.head(path) and is_panoptic(path)  # else every labelme file is read whole

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        self.maps = {path: _map_folder(self.root, path) for path in self.paths}
        self.images = ImageIndex(self.root, frozenset(found.name.lower() for found in self.maps.values()))
        self.total = len(self.images.files)

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            data = read_json(path)
            try:
                infos = {raw["id"]: CategoryInfo.from_coco(raw) for raw in data["categories"]}
                things = {raw["id"] for raw in data["categories"] if self.flag(raw.get("isthing", 1), "isthing")}
                images = {raw["id"]: raw for raw in data["images"]}
                entries = list(data["annotations"])
            except FAULTS as error:
                raise DataError(
                    f"{path}: not a panoptic file; expected images, annotations and categories ({error!r})."
                ) from None
            if len(infos) < len(data["categories"]):
                raise DataError(f"{path}: two categories have the same id.")
            known = {info.name for info in self.categories}
            self.categories += [info for key, info in infos.items() if key in things and info.name not in known]
            yield from self.each(self._image, path, "annotations", entries, images, infos, things, used)
        yield from self.unlabeled(used)

    def _image(
        self,
        path: Path,
        entry: Any,
        place: str,
        images: Mapping[Any, Any],
        infos: Mapping[int, CategoryInfo],
        things: set[int],
        used: set[Path],
    ) -> LabeledImage | None:
        raw = images.get(entry.get("image_id")) if isinstance(entry, Mapping) else None
        if raw is None:
            self.log.add("unknown-image", path, "its image is not in the file; skipped", place=place)
            return None
        named = str(raw.get("file_name", ""))
        file = self.images.find(named, self.root / "images")
        size = self.claim(file, used, path, named=named, place=place)
        if file is None or size is None:
            return None
        map_path = self.maps[path] / str(entry.get("file_name", ""))
        try:
            ids = read_ids(map_path)
        except (OSError, SyntaxError, ValueError) as error:
            self.log.add("unreadable-image", map_path, f"not a segment map ({error}); {named} is skipped")
            return None
        if ids.shape != size:
            detail = f"{ids.shape[1]} x {ids.shape[0]} pixels, {named} has {size[1]} x {size[0]}; skipped"
            self.log.add("size-mismatch", map_path, detail)
            return None
        rles = encode_labels(ids)
        left = set(rles)
        objects = []
        for number, segment in enumerate(list_of(entry.get("segments_info"), "segments_info")):
            where = f"{place}.segments_info[{number}]"
            try:
                category, segment_id = segment["category_id"], segment["id"]
                left.discard(segment_id)
                if category not in infos:
                    raise ValueError(f"segment {segment_id}: category {category} is not in the file")
                if category not in things:
                    self.log.note("segments of stuff, skipped")
                    continue
                if segment_id not in rles:
                    raise ValueError(f"segment {segment_id}: it has no pixel in the map")
                crowd = self.flag(segment.get("iscrowd"))
            except FAULTS as error:
                self.skip("bad-segment", path, error, where)
                continue
            category_name = infos[category].name
            objects.append(LabeledObject(category_name, None, rles[segment_id], crowd, line=f"segment {segment_id}"))
        if left:
            detail = f"pixels of {', '.join(map(str, sorted(left)[:5]))}, which are no segments of {path.name}"
            self.log.add("unknown-object", map_path, f"{detail}; skipped")
        split = split_in(path.stem)
        image_id = raw["id"] if isinstance(raw["id"], int) else None
        return LabeledImage(file, named.replace("\\", "/"), *size, objects, split, str(path), image_id)


def read_ids(path: Path) -> NDArray[np.int64]:
    """Read the ids of a map's pixels.

    Raises:
        OSError: If there is no such image.
        ValueError: If it is not a color image.
    """
    with open_image(path) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"expected RGB, got mode {image.mode}")
        pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    return pixels[..., 0] + 256 * pixels[..., 1] + 256**2 * pixels[..., 2]


def _map_folder(root: Path, path: Path) -> Path:
    """Find the folder of a file's maps, with the same name, next to it or elsewhere."""
    beside = path.with_suffix("")
    if beside.is_dir():
        return beside
    return next(iter(folders_named(root, path.stem)), beside)
