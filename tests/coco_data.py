"""A small synthetic COCO data set, written to a folder: bright shapes on a dark ground."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

COLORS = ((220, 60, 60), (60, 220, 60), (80, 100, 240))


def write_coco(
    root: Path,
    *,
    images: int = 4,
    size: tuple[int, int] = (64, 80),
    category_ids: Sequence[int] = (7, 23, 90),
    crowd: bool = True,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Writes PNG images and their annotations; returns the image folder and the JSON file.

    Every image is divided into four cells with one object in most of them: a disc (RLE, compressed and
    uncompressed in turn), a rectangle (polygon), or a pair of rectangles (two polygons), one color and one
    shape per category. Odd images are upright. With more than one image the last has no object; with
    ``crowd`` the first has a crowd in its last cell. Annotation ids start at 0, as some tools write them.
    """
    folder = root / "images"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": f"shape {i}"} for i in category_ids],
    }
    for number in range(images):
        height, width = size if number % 2 == 0 else size[::-1]
        pixels = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
        image_id = 100 + 3 * number
        data["images"].append({"id": image_id, "file_name": f"{number}.png", "height": height, "width": width})
        for cell in range(0 if images > 1 and number == images - 1 else 4):
            label = (cell + number) % len(category_ids)
            is_crowd = crowd and number == 0 and cell == 3
            top, left = cell // 2 * (height // 2), cell % 2 * (width // 2)
            h, w = (int(rng.integers(side // 4, side // 2 - 2)) for side in (height, width))
            mask, segmentation = _shape(label % 3, top + 1, left + 1, h, w, (height, width))
            if is_crowd or (label % 3 == 0 and cell % 2):
                segmentation = {"size": [height, width], "counts": _uncompressed(mask)}
            pixels[mask] = COLORS[label % 3]
            ys, xs = np.nonzero(mask)
            data["annotations"].append(
                {
                    "id": len(data["annotations"]),
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": [float(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)],
                    "area": float(mask.sum()),
                    "iscrowd": int(is_crowd),
                    "segmentation": segmentation,
                }
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
    path = root / "annotations.json"
    path.write_text(json.dumps(data))
    return folder, path


def _shape(kind: int, top: int, left: int, h: int, w: int, size: tuple[int, int]) -> tuple[np.ndarray, Any]:
    """Returns the bool mask (H, W) and the segmentation of a shape in a box."""
    mask = np.zeros(size, dtype=bool)
    if kind == 0:
        ys, xs = np.ogrid[: size[0], : size[1]]
        mask |= ((ys - top - h / 2 + 0.5) / h) ** 2 + ((xs - left - w / 2 + 0.5) / w) ** 2 <= 0.25
        rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
        return mask, {"size": list(size), "counts": rle["counts"].decode()}
    parts = [(left, left + w)] if kind == 1 else [(left, left + w // 3), (left + 2 * w // 3, left + w)]
    for x0, x1 in parts:
        mask[top : top + h, x0:x1] = True
    return mask, [[float(v) for v in (x0, top, x1, top, x1, top + h, x0, top + h)] for x0, x1 in parts]


def _uncompressed(mask: np.ndarray) -> list[int]:
    """Returns the lengths of the runs of 0, 1, 0, ... down the columns."""
    flat = mask.ravel(order="F").astype(np.int8)
    return [int(run) for run in np.diff(np.flatnonzero(np.diff(flat, prepend=0)), prepend=0, append=flat.size)]
