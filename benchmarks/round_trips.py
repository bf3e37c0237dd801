"""Round trips of COCO labels through other formats and back, by a2fpn, supervision, Datumaro and PyLabel.

    python -m benchmarks.round_trips                    # made-up labels: a hole, two parts, a crowd
    python -m benchmarks.round_trips --data DIR         # images/ and annotations/instances_val*.json

Each library reads COCO, writes the format and reads that back. Its objects are then compared with those of the COCO
file: an object is back if one of the same class has an IoU of at least 0.995 with its mask. It needs OpenCV; the other
libraries need ``pip install supervision datumaro pylabel``, and those that are not installed are left out.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_utils

from a2fpn.data import convert_data, import_data
from a2fpn.masks.rle import encode_masks
from a2fpn.masks.segmentation import segmentation_to_rle
from benchmarks import _measure as measure
from benchmarks.gpu.record import commit

SAME = 0.995  # IoU
SPLIT = "val"
LIBRARIES = ("a2fpn", "supervision", "datumaro", "pylabel")
KINDS = ("objects", "holes", "parts", "crowds")
HEADINGS = ("format", "library", *KINDS, "median IoU", "ids", "order", "others")


@dataclass(frozen=True)
class Object:
    """Object of an image, as a file or a library has it.

    Args:
        category: Name of its class.
        category_id: Id of its class, if it has one.
        rle: Its mask as RLE, or None.
        box: x, y, width and height.
        crowd: Whether it is a crowd.
        parts: Separate parts of its mask.
        holes: Holes of its mask.
    """

    category: str
    category_id: int | None
    rle: dict[str, Any] | None
    box: tuple[float, ...]
    crowd: bool
    parts: int = 0
    holes: int = 0


@dataclass(frozen=True)
class Labels:
    """Objects of an image.

    Args:
        id: The image's id, if it has one.
        objects: In their order.
    """

    id: int | None
    objects: Sequence[Object]


Found = dict[str, Labels]
"""Labels by the stem of the image's name."""

Trip = Callable[[Path, Path], Found]
"""Takes a COCO folder through a format; also gets an empty folder to write to."""


def main(
    data: Annotated[Path | None, typer.Option(help="COCO folder; by default made-up labels.")] = None,
    formats: Annotated[str, typer.Option(help="Formats with commas between; all by default.")] = "",
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Compare what comes back."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        if data is None:
            make(source)
        else:
            flatten(data, source)
        want = from_coco(source / "annotations" / f"instances_{SPLIT}.json")
        chosen = [name for name in formats.split(",") if name]
        trips = {key: trip for key, trip in all_trips().items() if not chosen or key[0] in chosen}
        for number, ((name, library), trip) in enumerate(trips.items()):
            measure.console().print(f"{name}, {library} ...")
            try:
                with quiet():
                    back = trip(source, Path(folder) / str(number))
                row = compare(want, back)
            except Exception as error:  # libraries raise almost anything
                row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            rows.append({"format": name, "library": library, **row})
    title = f"Objects back with an IoU of {SAME} or more, of those in the COCO file"
    measure.print_table(title, HEADINGS, [cells(row) for row in rows])
    if output:
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)}
        document = {"data": data.name if data else "made up", "commit": commit(), "versions": versions, "rows": rows}
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the table."""
    start = [str(row["format"]), str(row["library"])]
    if "error" in row:
        return [*start, "fails", *[""] * (len(HEADINGS) - len(start) - 1)]
    counts = [f"{row[kind][0]:,} of {row[kind][1]:,}" if row[kind][1] else "" for kind in KINDS]
    ids = " and ".join(name for name in ("image", "class") if row[f"{name}_ids"]) or "no"
    return [*start, *counts, f"{row['iou']:.3f}", ids, "yes" if row["order"] else "no", f"{row['more']:,}"]


def compare(want: Found, back: Found) -> dict[str, Any]:
    """Return how many objects of each kind are back, and whether ids and the order are."""
    counts = {kind: [0, 0] for kind in KINDS}
    order, more, ious = True, 0, []
    for stem, labels in want.items():
        others = list(back[stem].objects) if stem in back else []
        places: list[int] = []
        for wanted in labels.objects:
            likeness = [iou(wanted, other) if i not in places else 0.0 for i, other in enumerate(others)]
            best = max(likeness, default=0.0)
            if best >= SAME:
                places.append(likeness.index(best))
            ious += [] if wanted.crowd else [best]
            members = {"crowds": wanted.crowd, "objects": not wanted.crowd}
            members |= {"holes": not wanted.crowd and wanted.holes > 0, "parts": not wanted.crowd and wanted.parts > 1}
            for kind, member in members.items():
                counts[kind][0] += member and best >= SAME
                counts[kind][1] += member
        order = order and places == sorted(places)
        more += len(others) - len(places)
    pairs = [(labels, back[stem]) for stem, labels in want.items() if stem in back]
    known = {(one.category, one.category_id) for labels, _ in pairs for one in labels.objects}
    class_ids = known >= {(one.category, one.category_id) for _, found in pairs for one in found.objects}
    image_ids = all(labels.id == found.id for labels, found in pairs)
    facts = {"iou": statistics.median(ious), "image_ids": image_ids, "class_ids": class_ids}
    return {**counts, **facts, "order": order, "more": more}


def iou(wanted: Object, other: Object) -> float:
    """IoU of two masks, or of two boxes if neither has a mask; 0 for two classes, and for a crowd and an object."""
    if (wanted.category, wanted.crowd) != (other.category, other.crowd):
        return 0.0
    if wanted.rle is not None and other.rle is not None and wanted.rle["size"] == other.rle["size"]:
        return float(mask_utils.iou([wanted.rle], [other.rle], [0])[0, 0])
    both_boxes = wanted.rle is None and other.rle is None
    return float(mask_utils.iou([wanted.box], [other.box], [0])[0, 0]) if both_boxes else 0.0


def all_trips() -> dict[tuple[str, str], Trip]:
    """Return the trips by format and library, of the libraries that are installed."""
    formats = ("yolo", "voc", "labelme", "cvat", "datumaro", "labelstudio", "panoptic", "labels", "mask_files")
    trips: dict[tuple[str, str], Trip] = {(name, "a2fpn"): _ours(name) for name in formats}
    if importlib.util.find_spec("supervision"):
        trips |= {(name, "supervision"): _supervision(name) for name in ("yolo", "voc")}
    if importlib.util.find_spec("datumaro"):
        names = {"yolo": "yolo_ultralytics", "voc": "voc", "cvat": "cvat", "datumaro": "datumaro"}
        trips |= {(name, "datumaro"): _datumaro(own) for name, own in (names | {"panoptic": "coco_panoptic"}).items()}
    if importlib.util.find_spec("pylabel"):
        trips |= {(name, "pylabel"): _pylabel(name) for name in ("yolo", "voc")}
    return dict(sorted(trips.items(), key=lambda item: formats.index(item[0][0])))


def _ours(name: str) -> Trip:
    def trip(source: Path, folder: Path) -> Found:
        convert_data(source, folder / "there", to=name)
        import_data(folder / "there", folder / "back")
        return from_coco(folder / "back" / "annotations" / f"instances_{SPLIT}.json")

    return trip


def _supervision(name: str) -> Trip:
    def trip(source: Path, folder: Path) -> Found:
        from supervision import DetectionDataset

        images, labels, names = (str(folder / part) for part in ("images", "labels", "data.yaml"))
        file = str(source / "annotations" / f"instances_{SPLIT}.json")
        read = DetectionDataset.from_coco(str(source / "images"), file, force_masks=True)
        if name == "yolo":
            read.as_yolo(images, labels, names)
            back = DetectionDataset.from_yolo(images, labels, names, force_masks=True)
        else:
            read.as_pascal_voc(images, labels)
            back = DetectionDataset.from_pascal_voc(images, labels, force_masks=True)
        found: Found = {}
        for path, _, detections in back:
            crowds = detections.data.get("iscrowd", [0] * len(detections))
            masks = [None] * len(detections) if detections.mask is None else detections.mask
            rows = zip(detections.xyxy, masks, detections.class_id, crowds, strict=True)
            objects = []
            for box, mask, number, crowd in rows:
                rle: Any = None if mask is None else encode_masks(mask[None])[0]
                objects.append(Object(back.classes[number], None, rle, to_xywh(box), bool(crowd)))
            found[Path(path).stem] = Labels(None, objects)
        return found

    return trip


def _datumaro(name: str) -> Trip:
    def trip(source: Path, folder: Path) -> Found:
        from datumaro.components.dataset import Dataset

        for split in ("train", SPLIT):  # its YOLO needs both
            shutil.copytree(source / "images", folder / "source" / "images" / split)
            file = folder / "source" / "annotations" / f"instances_{split}.json"
            file.parent.mkdir(exist_ok=True)
            shutil.copy(source / "annotations" / f"instances_{SPLIT}.json", file)
        options = {"allow_undeclared_attrs": True} if name == "cvat" else {}
        read = Dataset.import_from(str(folder / "source"), "coco_instances")
        if name in ("voc", "coco_panoptic"):  # as its documentation advises
            read = read.transform("polygons_to_masks").transform("merge_instance_segments")
        read.export(str(folder / "there"), name, save_media=True, **options)
        back = Dataset.import_from(str(folder / "there"), "yolo" if name == "yolo_ultralytics" else name)
        names = [label.name for label in next(iter(back.categories().values()))]
        found: Found = {}
        for item in back.get_subset(SPLIT):
            height, width = item.media.size
            groups: dict[object, list[Any]] = {}
            shapes = [one for one in item.annotations if not _is_box(one)]  # the boxes of VOC have other groups
            for number, one in enumerate(shapes or item.annotations):
                groups.setdefault(one.group or f"alone {number}", []).append(one)
            objects = [_of_group(group, names, height, width) for group in groups.values()]
            found[Path(item.id).stem] = Labels(item.attributes.get("id"), objects)
        return found

    return trip


def _is_box(one: Any) -> bool:
    return type(one).__name__ == "Bbox"


def _of_group(group: Sequence[Any], names: Sequence[str], height: int, width: int) -> Object:
    """Return what Datumaro has of one object: polygons, masks, or a box."""
    polygons = [one.points for one in group if type(one).__name__ == "Polygon"]
    masks = [np.asarray(one.image, dtype=bool) for one in group if "Mask" in type(one).__name__]
    rle: Any = segmentation_to_rle(polygons, height, width) if polygons else None
    if masks:
        rle = encode_masks(np.logical_or.reduce(masks)[None])[0]
    crowd = any(str(one.attributes.get("is_crowd", False)).lower() in ("1", "true") for one in group)
    return Object(names[group[0].label], None, rle, tuple(group[0].get_bbox()), crowd)


def _pylabel(name: str) -> Trip:
    def trip(source: Path, folder: Path) -> Found:
        from pylabel import importer

        images, labels = folder / "images", folder / "labels"
        shutil.copytree(source / "images", images)
        file = source / "annotations" / f"instances_{SPLIT}.json"
        read = importer.ImportCoco(str(file), path_to_images=str(images))
        if name == "yolo":
            read.export.ExportToYoloV5(str(labels), segmentation=True)
            names = list(read.analyze.classes)
            back = importer.ImportYoloV5(str(labels), cat_names=names, path_to_images=str(images))
        else:
            read.export.ExportToVoc(str(labels))
            back = importer.ImportVOC(str(labels), path_to_images=str(images))
        back.export.ExportToCoco(str(folder / "back.json"))
        return from_coco(folder / "back.json")

    return trip


def from_coco(path: Path) -> Found:
    """Read a COCO file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    names = {int(entry["id"]): str(entry["name"]) for entry in data["categories"]}
    objects: dict[int, list[Object]] = {entry["id"]: [] for entry in data["images"]}
    sizes = {entry["id"]: (int(entry["height"]), int(entry["width"])) for entry in data["images"]}
    for raw in data["annotations"]:
        height, width = sizes[raw["image_id"]]
        segmentation = raw.get("segmentation")
        rle: Any = segmentation_to_rle(segmentation, height, width) if segmentation else None
        shape = topology(mask_utils.decode(rle)) if rle else (0, 0)
        number, crowd = int(raw["category_id"]), bool(raw.get("iscrowd"))
        one = Object(names[number], number, rle, tuple(map(float, raw["bbox"])), crowd, *shape)
        objects[raw["image_id"]].append(one)
    return {Path(entry["file_name"]).stem: Labels(entry["id"], objects[entry["id"]]) for entry in data["images"]}


def topology(mask: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the number of a mask's parts and holes."""
    import cv2

    parts = cv2.connectedComponents(mask, connectivity=8)[0] - 1
    background = np.pad(1 - mask, 1, constant_values=1)
    return parts, cv2.connectedComponents(background, connectivity=4)[0] - 2


def to_xywh(box: Sequence[float]) -> tuple[float, ...]:
    """Return a box of two corners as a corner and a size."""
    left, top, right, bottom = map(float, box)
    return left, top, right - left, bottom - top


def flatten(data: Path, root: Path) -> None:
    """Copy a COCO folder's validation split, with all images in one folder."""
    (path,) = (data / "annotations").glob(f"instances_{SPLIT}*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    (root / "images").mkdir(parents=True)
    files = {file.name: file for file in (data / "images").rglob("*")}
    for entry in content["images"]:
        entry["file_name"] = Path(entry["file_name"]).name
        shutil.copy(files[entry["file_name"]], root / "images")
    (root / "annotations").mkdir()
    (root / "annotations" / f"instances_{SPLIT}.json").write_text(json.dumps(content), encoding="utf-8")


def make(root: Path) -> None:
    """Write a COCO folder of three images; ids and classes have gaps."""
    height, width = 96, 128
    ring = np.zeros((height, width), dtype=bool)
    ring[10:50, 10:60] = True
    ring[20:30, 20:40] = False
    crowd = np.zeros((height, width), dtype=bool)
    crowd[70:, :] = True
    crowd[80:85, 30:90] = False
    two = [[70.5, 10, 90, 10, 90, 25, 70.5, 25], [100, 40, 120, 40, 110.25, 60]]
    plain = [[5, 55, 30, 55, 30, 65, 5, 65]]
    kinds: list[tuple[int, Any, int]] = [(17, encode_masks(ring[None])[0], 0), (3, two, 0), (3, plain, 0)]
    kinds.append((3, encode_masks(crowd[None])[0], 1))
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for number, image_id in enumerate((7, 9, 12)):
        name = f"{number}.png"
        noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for category, segmentation, is_crowd in kinds if number < 2 else ():
            rle: Any = segmentation_to_rle(segmentation, height, width)
            fields = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": is_crowd}
            box = [float(value) for value in mask_utils.toBbox(rle)]
            fields |= {"segmentation": segmentation, "bbox": box, "area": float(mask_utils.area(rle))}
            annotations.append(fields)
    categories = [{"id": 3, "name": "cell"}, {"id": 17, "name": "stop sign"}]
    (root / "annotations").mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{SPLIT}.json").write_text(json.dumps(content), encoding="utf-8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress and the warnings of libraries."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    typer.run(main)
