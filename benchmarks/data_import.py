"""Importing 10,000 images with 100,000 polygons into a COCO folder: images a second, and memory.

The data are synthetic: JPEGs of 64 x 48 pixels, ten polygons of 8 to 32 points each, as YOLO and as labelme files.
Each import runs in a process of its own, whose peak of resident memory is the kernel's; that of the imports of
modules (torch among them) is printed beside it. Likewise the time for creating as many links by themselves: an ext4
without a journal needs ten times as long for some minutes after many files were deleted.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks import _measure as measure
from benchmarks.gpu.record import circumstances

CLASSES = 10


def main(
    images: int = 10_000,
    objects: int = 10,
    quick: measure.Quick = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Time one import of each format without copying."""
    if quick:
        images = 50
    rows = []
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("yolo", "labelme"):
            source = Path(folder) / name
            write(source, name, images, objects)
            arguments = "--child", str(source), str(Path(folder) / f"{name}_coco")
            command = [sys.executable, "-m", "benchmarks.data_import", *arguments]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            results[name] = result | {"images_per_second": images / result["seconds"]}
            rows.append(
                [
                    name,
                    f"{result['seconds']:.2f} s",
                    f"{result['processor']:.2f} s",
                    f"{images / result['seconds']:,.0f}",
                    f"{result['links']:.2f} s",
                    f"{result['peak'] / 1e6:.0f} MB",
                    f"{result['before'] / 1e6:.0f} MB",
                ]
            )
            assert result["annotations"] == images * objects
    title = f"{images:,} images, {images * objects:,} polygons, linked"
    headings = ["format", "clock", "processor", "images/s", "links alone", "peak memory", "before"]
    measure.print_table(title, headings, rows)
    if output:
        document = {**circumstances(torch.device("cpu")), "images": images, "formats": results}
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def child(source: str, output: str) -> None:
    """Import once; print what it took as JSON."""
    from a2fpn.data.importers import import_data

    before = peak()
    clock, processor = time.perf_counter(), time.process_time()
    report = import_data(source, output)
    took = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
    took |= {"before": before, "peak": peak(), "links": links_alone(Path(output))}
    print(json.dumps(took | {"annotations": report.annotations}))


def links_alone(output: Path) -> float:
    """Seconds for linking the images of a data set again."""
    folder = output / "again"
    folder.mkdir()
    targets = {path.name: os.readlink(path) for path in (output / "images").iterdir()}
    start = time.perf_counter()
    for name, target in targets.items():
        os.symlink(target, folder / name)
    return time.perf_counter() - start


def peak() -> int:
    """Bytes of resident memory at most so far; Linux counts in kilobytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(root: Path, name: str, images: int, objects: int) -> None:
    """Write ellipses as polygons, all inside their images."""
    rng = np.random.default_rng(0)
    width, height = 64, 48
    picture = Path(root, "images", "train")
    labels = Path(root, "labels", "train") if name == "yolo" else picture
    for folder in (picture, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(root / "one.jpg")
    content = (root / "one.jpg").read_bytes()
    (root / "one.jpg").unlink()
    for number in range(images):
        (picture / f"{number:06d}.jpg").write_bytes(content)
        shapes = []
        for _ in range(objects):
            angle = np.linspace(0, 2 * np.pi, int(rng.integers(8, 33)), endpoint=False)
            center, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.2, 2)
            shapes.append(center + radius * np.stack([np.cos(angle), np.sin(angle)], 1))
        if name == "yolo":
            lines = [f"{i % CLASSES} " + " ".join(f"{v:.6f}" for v in s.ravel()) for i, s in enumerate(shapes)]
            (labels / f"{number:06d}.txt").write_text("\n".join(lines) + "\n")
        else:
            record = {
                "version": "5.5.0",
                "imagePath": f"{number:06d}.jpg",
                "imageData": None,
                "imageHeight": height,
                "imageWidth": width,
                "shapes": [
                    {
                        "label": f"class {i % CLASSES}",
                        "points": (s * (width, height)).round(2).tolist(),
                        "group_id": None,
                        "shape_type": "polygon",
                        "flags": {},
                    }
                    for i, s in enumerate(shapes)
                ],
            }
            (labels / f"{number:06d}.json").write_text(json.dumps(record))
    if name == "yolo":
        names = "\n".join(f"  {i}: class {i}" for i in range(CLASSES))
        (root / "data.yaml").write_text(f"train: images/train\nnames:\n{names}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
    else:
        typer.run(main)
