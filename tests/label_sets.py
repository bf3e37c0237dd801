"""Small data sets for tests of importers and exporters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from a2fpn.data import read_coco
from a2fpn.data.exporters import EXPORTERS
from a2fpn.masks.rle import decode_rle, encode_masks
from a2fpn.masks.segmentation import segmentation_to_rle

FORMATS = EXPORTERS.names()
OUTLINE = [5, 5, 20, 5, 20, 20, 5, 20]


def ring_and_parts() -> tuple[dict[str, Any], np.ndarray, list[list[float]]]:
    """A ring with a hole as RLE, and an object of two polygons, apart from each other."""
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:25, 5:30] = True
    mask[10:15, 10:20] = False
    mask[18:20, 12:16] = False
    rle = {**encode_masks(mask[None])[0]}
    parts = [[35.5, 5, 45, 5, 45, 12, 35.5, 12], [48, 20, 58, 20, 55.25, 30]]
    return rle, mask, parts


def write_set(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """A COCO folder with holes, parts, a crowd, sub-folders, a background, and ids that leave gaps."""
    rle, _, parts = ring_and_parts()
    crowd = encode_masks((np.arange(40)[:, None] >= 33).repeat(60, 1)[None])[0]
    categories = [{"id": 3, "name": "cell"}, {"id": 17, "name": "stop sign", "supercategory": "things"}]
    for number, split in enumerate(splits):
        data: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for index in range(3):
            name = f"site_{index}/{split}{index}.png"
            path = root / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(10 * number + index).integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            image_id = 100 * number + index + 1
            data["images"].append({"id": image_id, "file_name": name, "height": 40, "width": 60})
            if index == 2:
                continue
            for category, segmentation, is_crowd in ((17, rle, 0), (3, parts, 0), (3, crowd, 1)):
                full = decode_rle([segmentation_to_rle(segmentation, 40, 60)])[0]
                ys, xs = np.nonzero(full)
                box = [int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
                data["annotations"].append(
                    {
                        "id": len(data["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": box,
                        "area": int(full.sum()),
                        "iscrowd": is_crowd,
                        "segmentation": segmentation,
                    }
                )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


def objects(folder: Path, split: str) -> dict[str, list[tuple[str, bool, np.ndarray]]]:
    """Class, crowd flag and pixels of every object, by file name."""
    coco = read_coco(folder / "annotations" / f"instances_{split}.json", strict=True)
    names = {category.id: category.name for category in coco.categories}
    return {
        entry.file_name: [
            (names[a.category_id], a.iscrowd, decode_rle([a.rle])[0] if a.rle else np.zeros(0))
            for a in coco.annotations[image_id]
        ]
        for image_id, entry in coco.images.items()
    }


def small_set(
    root: Path, names: list[str], entries: list[dict[str, Any]], categories: list[dict[str, Any]] | None = None
) -> Path:
    """A COCO folder of images of 40 x 30 pixels; an entry without image_id belongs to the first."""
    for name in names:
        picture(root / "images" / name, (40, 30))
    data = {
        "images": [{"id": n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(names, 1)],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1, **entry} for n, entry in enumerate(entries, 1)],
        "categories": categories or [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(data))
    return root


def square(image: int = 1, category: int = 1, **entry: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [5, 5, 15, 15], "segmentation": [OUTLINE], **entry}


def yolo(root: Path, labels: dict[str, str | bytes], *, names: str | None = "names: [cat, dog]\n") -> Path:
    """A YOLO folder with an image for each label file."""
    for name, text in labels.items():
        picture(root / "images" / f"{name}.png")
        path = root / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if names is not None:
        (root / "data.yaml").write_text(names)
    return root


def picture(path: Path, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def annotations(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())[
        "annotations"
    ]
    return result


def write_objects(root: Path, categories: list[dict[str, Any]], *annotations: dict[str, Any], **image: Any) -> Path:
    """A COCO folder with one image of 40 x 30 pixels."""
    entry = {"id": 1, "file_name": "a.png", "height": 30, "width": 40} | image
    picture(root / "images" / entry["file_name"], (40, 30))
    listed = [{"id": number, "image_id": 1, "category_id": 1, **raw} for number, raw in enumerate(annotations, 1)]
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": [entry], "annotations": listed, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def datumaro(**annotation: Any) -> str:
    labels = {"label": {"labels": [{"name": "cat"}]}}
    item = {"id": "a", "annotations": [annotation], "image": {"path": "a.png", "size": [40, 60]}}
    return json.dumps({"categories": labels, "items": [item]})
