"""Checking the annotations of a data set as large as COCO's training set, against only parsing its JSON.

The data are synthetic: 118,287 images, 860,001 objects of 80 classes, each a polygon of 8 to 39 points, 450 MB of JSON.
Processor seconds are printed beside the clock's: on a shared machine they tell more.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import typer

from a2fpn.config import PreprocessConfig
from a2fpn.data import check_data
from a2fpn.preprocess import Preprocess
from benchmarks import _measure as measure


def main(images: int = 118_287, objects: int = 860_001, quick: measure.Quick = False) -> None:
    """Times parsing and checking once each."""
    if quick:
        images, objects = 100, 700
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(synthetic(images, objects)))
        rule = Preprocess(PreprocessConfig(), divisor=1)
        anchors = [[32], [64], [128], [256], [512]]
        calls: dict[str, Callable[[], Any]] = {
            "json.loads": lambda: json.loads(path.read_bytes()),
            "check_data": lambda: check_data(
                None, path, target_size=rule.target_size, anchor_sizes=anchors, anchor_ratios=(0.5, 1, 2)
            ),
        }
        rows = []
        for name, call in calls.items():
            clock, processor = time.perf_counter(), time.process_time()
            call()
            rows.append([name, f"{time.perf_counter() - clock:.1f} s", f"{time.process_time() - processor:.1f} s"])
        title = f"{images:,} images, {objects:,} objects, {path.stat().st_size / 1e6:.0f} MB"
    measure.print_table(title, ["what", "clock", "processor"], rows)


def synthetic(images: int, objects: int) -> dict[str, Any]:
    """Ellipses as polygons, all inside their images."""
    rng = np.random.default_rng(0)
    sides = np.array([(640, 480), (480, 640), (500, 375), (427, 640)])[rng.integers(0, 4, images)]
    owner = rng.integers(0, images, objects)
    size = (0.02 + 0.37 * rng.random((objects, 2))) * sides[owner]
    corner = rng.random((objects, 2)) * (sides[owner] - size)
    annotations = []
    for index, (image, box, points) in enumerate(
        zip(owner.tolist(), np.concatenate([corner, size], 1).round(2), rng.integers(8, 40, objects), strict=True)
    ):
        angle = np.linspace(0, 2 * np.pi, points)
        outline = box[:2] + box[2:] * (1 + np.stack([np.cos(angle), np.sin(angle)], 1)) / 2
        annotations.append(
            {
                "id": index + 1,
                "image_id": image,
                "category_id": 1 + index % 80,
                "bbox": box.tolist(),
                "segmentation": [outline.round(2).ravel().tolist()],
                "area": float(box[2:].prod()),
                "iscrowd": 0,
            }
        )
    return {
        "images": [
            {"id": index, "file_name": f"{index:012d}.jpg", "width": width, "height": height}
            for index, (width, height) in enumerate(sides.tolist())
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, 81)],
    }


if __name__ == "__main__":
    typer.run(main)
