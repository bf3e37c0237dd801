"""COCO in other folder layouts: Roboflow's, FiftyOne's, or one file with the images of all splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from a2fpn.data.document import is_whole
from a2fpn.data.images import image_path
from a2fpn.data.importers.base import FAULTS, ImportOptions, JsonImporter, register_importer
from a2fpn.data.importers.files import read_json
from a2fpn.data.importers.folder import Folder
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject, LossLog, split_in, split_name
from a2fpn.errors import DataError, ImageError

_SIGNS = (
    (b'"file_name"', b'"images"'),
    (b'"annotations"', b'"category_id"'),
    (b'"categories"', b'"supercategory"'),
    (b'"categories"', b'"images"'),
)
"""Keys that identify a COCO file if both are in its head."""
_WITHOUT_OBJECTS = frozenset(("captions", "image_info"))
"""First part of the names of COCO's own files that have no boxes."""
_SAME_IMAGES = frozenset(("person_keypoints", "stuff"))
"""First part of the names of those with other labels of the images of ``instances_*``."""


@register_importer("coco")
class CocoImporter(JsonImporter):
    """Reads JSON files with ``images``, ``annotations`` and ``categories``; ids are kept.

    Of COCO's own files in a folder, captions and lists of images are left out, and keypoints and stuff where
    ``instances_*`` has the same images.
    """

    sign = "images and annotations"

    @classmethod
    def owns(cls, folder: Folder, path: Path) -> bool:
        """See :meth:`JsonImporter.owns`; lists may be in any order, and the first may exceed the part that is read."""
        head = folder.head(path)
        if b'"segments_info"' in head or b'"shapes"' in head or b'"items"' in head:
            return False
        fits = any(all(sign in head for sign in pair) for pair in _SIGNS)
        return fits and not is_panoptic(path)

    def __init__(self, folder: Folder, log: LossLog, options: ImportOptions) -> None:
        super().__init__(folder, log, options)
        if folder.file is None:
            kept = _with_objects(self.paths) or self.paths
            if len(kept) < len(self.paths):
                what = "captions and image lists of COCO, keypoints and stuff beside instances (import one by its path)"
                self.log.note(f"files left out: {what}", len(self.paths) - len(kept))
            self.paths = sorted(kept, key=lambda path: not split_in(path.stem))  # an image of two files keeps its split
        self._bad: Counter[str] = Counter()  # unreadable annotations by image

    def read(self) -> Iterator[LabeledImage]:
        """See :meth:`Importer.read`."""
        used: set[Path] = set()
        for path in self.paths:
            data = read_json(path)
            if not isinstance(data, Mapping) or not all(
                isinstance(data.get(key), list) for key in ("images", "annotations", "categories")
            ):
                raise DataError(f"{path}: not a COCO file; expected the lists images, annotations and categories.")
            yield from self._file(path, data, used)
        yield from self.unlabeled(used)

    def _file(self, path: Path, data: Mapping[str, Any], used: set[Path]) -> Iterator[LabeledImage]:
        infos: dict[int, CategoryInfo] = {}
        for raw in data["categories"]:
            try:
                info = CategoryInfo.from_coco({**raw, "id": _whole(raw["id"])})
            except FAULTS:
                info = CategoryInfo("")
            if not info.name or not is_whole(info.id):
                raise DataError(
                    f"{path}: a category needs an integer id, a name and a skeleton of pairs, got {str(raw)[:80]}."
                )
            if info.id in infos:
                raise DataError(f"{path}: category {info.id} is listed twice; ids must be unique.")
            infos[info.id] = info
        known = {info.name for info in self.categories}  # of other files
        self.categories += [info for info in infos.values() if info.name not in known]
        objects: dict[Any, list[LabeledObject]] = {}
        self._bad.clear()
        for number, raw in enumerate(data["annotations"]):
            place = f"annotation {raw.get('id', number) if isinstance(raw, Mapping) else number}"
            try:
                labeled = self._object(raw, infos, place)
                objects.setdefault(_whole(raw["image_id"]), []).append(labeled)
            except FAULTS as error:
                self.skip("bad-annotation", path, error, place)
                if isinstance(raw, Mapping):
                    self._bad[str(raw.get("image_id"))] += 1
        self._check_ids(path, data["images"])
        split = split_in(path.stem) or split_name(path.parent.name)
        near = path.parent if path.parent != self.root and path.parent.name != "annotations" else None
        for raw in data["images"]:
            image = self._image(path, raw, objects, split, used, near)
            if image is not None:
                yield image
        for image_id, left in objects.items():
            detail = f"{len(left)} annotations of the image {image_id}, which the file doesn't list"
            self.log.add("unknown-image", path, detail)

    def _check_ids(self, path: Path, images: Sequence[Any]) -> None:
        """Check that no two images have one id, which would give all objects to the first.

        Raises:
            DataError: If two have.
        """
        names: dict[Any, Any] = {}
        for raw in images:
            if not isinstance(raw, Mapping) or isinstance(raw.get("id"), (list, dict, type(None))):
                continue
            other = names.setdefault(_whole(raw["id"]), raw.get("file_name"))
            if other != raw.get("file_name"):
                raise DataError(
                    f"{path}: the images {other} and {raw.get('file_name')} have the same id {raw['id']}; ids must be "
                    "unique, else it is unknown whose objects are whose."
                )

    def _image(
        self,
        path: Path,
        raw: Any,
        objects: dict[Any, list[LabeledObject]],
        split: str,
        used: set[Path],
        near: Path | None,
    ) -> LabeledImage | None:
        try:
            image_id, named = _whole(raw["id"]), str(raw["file_name"])
            size = int(raw.get("height") or 0), int(raw.get("width") or 0)
            found = objects.pop(image_id, [])
        except FAULTS:
            detail = f"an image needs id and file_name, got {str(raw)[:80]}"
            self.log.add("bad-image", path, detail)
            return None
        try:
            file: Path | None = image_path(self.root / "images", named)
        except ImageError:
            file = None
        if file is None or not file.is_file():
            file = self.images.find(named, near or self.root / (split or "images"), split=split)
        if file is None:
            detail = f"{named} {self.images.reason(named)}; skipped with {len(found)} objects"
            self.log.add("missing-image", path, detail)
            return None
        if file in used:
            self.log.add("duplicate-image", path, f"{named} is listed twice; the first is kept")
            return None
        if min(size) < 1:  # not filled in, as by some tools
            stored = self.images.size(file, self.log)
            if stored is None:
                return None
            size = stored
        used.add(file)
        self.begin_image(lost=self._bad[str(raw["id"])])
        name = named.replace("\\", "/")
        if name.startswith("/") or ".." in name.split("/") or "://" in name:
            name, _ = self.images.name_and_split(file)
        return LabeledImage(file, name, *size, found, split, str(path), image_id if is_whole(image_id) else None)

    def _object(self, raw: Any, infos: Mapping[int, CategoryInfo], place: str) -> LabeledObject:
        for key in ("image_id", "category_id"):
            if isinstance(raw[key], (list, dict)):
                raise ValueError(f"its {key} must be an integer, got {raw[key]}")
        category = _whole(raw["category_id"])
        if category not in infos:
            raise ValueError(f"its category {category} is not in the file")
        box = _numbers(raw, "bbox")
        if len(box) not in (0, 4):
            raise ValueError(f"its bbox needs x, y, width and height, got {len(box)} numbers")
        segmentation = raw.get("segmentation") or None
        if isinstance(segmentation, list) and isinstance(segmentation[0], (int, float)):
            segmentation = [segmentation]  # a single polygon without its list
        score = raw.get("score")
        return LabeledObject(
            infos[category].name,
            (box[0], box[1], box[2], box[3]) if box else None,
            segmentation,
            self.flag(raw.get("iscrowd")),
            _numbers(raw, "keypoints"),
            None if score is None else float(score),
            place,
        )


def _whole(value: Any) -> Any:
    """Return an id that is written as text as a number."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


def _numbers(raw: Any, key: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, raw.get(key) or ()))
    except (TypeError, ValueError):
        raise ValueError(f"its {key} must be a list of numbers, got {str(raw[key])[:80]}") from None


def _with_objects(paths: Sequence[Path]) -> list[Path]:
    """Return the files to import of COCO's own: one per set of images."""
    kept = []
    for path in paths:
        kind, _, rest = path.name.rpartition("_")
        replaced = kind in _SAME_IMAGES and path.with_name(f"instances_{rest}") in paths
        if not replaced and kind not in _WITHOUT_OBJECTS:
            kept.append(path)
    return kept


def is_panoptic(path: Path) -> bool:
    """Return whether the file has segments anywhere."""
    tail = b""
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                if b'"segments_info"' in tail + block:
                    return True
                tail = block[-20:]
    except OSError:  # such as a broken link
        return False
    return False
