"""Hundreds to thousands of objects in large images: found, in which memory, in which time.

``python -m benchmarks.dense --part recall`` puts nuclei side by side, 3 x 3 to 7 x 7 images. The network sees every
pixel at one scale, alone and side by side: the objects that it finds of the whole with ``max_objects=5000`` are to be
at least 0.98 of those that it finds image by image. Memory is that of at most 5,000 objects over that of at most 100 on
the same image; the exponent is the slope of time over objects in logarithms, 1 where time grows with them.

``--part area`` predicts slides from the disk in tiles of 1,024 pixels: time per megapixel and per object, peak memory,
which is to stay flat, and time over that of as many tiles as are predicted one by one from memory, goal 1.15; with the
tiles read by the predicting thread, and by one and two of their own.

``--part torchvision`` sets ``maskrcnn_fpn_r50`` beside torchvision's Mask R-CNN with the same weights, with the masks
of up to 100 and up to 1,000 objects, at the sizes that torchvision can do.

Nuclei and model are those inside the package; ``--data`` names a COCO folder of others.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import a2fpn
from a2fpn import Predictor
from benchmarks import _measure, inference
from benchmarks._nuclei import Scene, exponent, found_objects, load_scenes, mosaic

MODEL = "maskrcnn_a2fpn_lite0.nuclei"
CELL, SCALE = 256, 2.0
MOST, FEW = 5000, 100
TILE = 1024
GOALS = {"recall": 0.98, "memory": 2.0, "time": 1.15}

Part = Literal["recall", "area", "torchvision"]
Numbers = list[dict[str, Any]]


@functools.cache
def predictor() -> Predictor:
    """The packaged model."""
    return Predictor(a2fpn.create_model(MODEL, pretrained=True))


def cells(data: Path | None) -> list[Scene]:
    """Images that fill a square of the mosaic, smallest first."""
    scenes = [scene for scene in load_scenes(data) if min(scene.pixels.shape[1:]) >= CELL]
    return sorted(scenes, key=lambda scene: scene.pixels.shape[1] * scene.pixels.shape[2])


def prepare_whole(across: int, data: Path | None, most: int) -> Callable[[], Any]:
    """Predict a mosaic without tiles."""
    scene = mosaic(cells(data), across, CELL)
    return lambda: predictor().predict([scene.pixels], scale=SCALE, max_objects=most)


def recall(sizes: list[int], data: Path | None) -> Numbers:
    """Objects found of a whole over those found image by image."""
    numbers: Numbers = []
    for across in sizes:
        whole = mosaic(cells(data), across, CELL)
        parts = [mosaic([scene], 1, CELL) for scene in cells(data)]
        shown = [parts[number % len(parts)] for number in range(across**2)]
        alone = 0
        for part in parts:
            (result,) = predictor().predict([part.pixels], scale=SCALE, max_objects=MOST)
            alone += sum(part is other for other in shown) * found_objects(list(result.rles or ()), part.rles)
        start = time.perf_counter()
        (result,) = predictor().predict([whole.pixels], scale=SCALE, max_objects=MOST)
        seconds = time.perf_counter() - start
        found = found_objects(list(result.rles or ()), whole.rles)
        numbers.append(
            {
                "images": across**2,
                "objects": len(whole.rles),
                "detections": len(result),
                "found": found,
                "found_alone": alone,
                "ratio": found / max(1, alone),
                "seconds": seconds,
            }
        )
    few, many = (_measure.peak_memory(prepare_whole, sizes[-1], data, most) for most in (FEW, MOST))
    rows = [
        [
            str(row["images"]),
            str(row["objects"]),
            str(row["detections"]),
            f"{row['found']} / {row['found_alone']}",
            f"{row['ratio']:.3f} >= {GOALS['recall']} {'met' if row['ratio'] >= GOALS['recall'] else 'missed'}",
            f"{row['seconds']:.2f} s",
            _measure.milliseconds(row["seconds"] / row["objects"]),
        ]
        for row in numbers
    ]
    _measure.print_table(
        f"Images of {CELL} x {CELL} pixels side by side, seen at {SCALE:g} x, at most {MOST} objects",
        ["images", "objects", "detections", "found whole / alone", "ratio", "time", "per object"],
        rows,
    )
    slope = exponent([row["objects"] for row in numbers], [row["seconds"] for row in numbers])
    _measure.console().print(
        f"Time grows with the {slope:.2f}th power of objects. Peak memory of at most {MOST} objects "
        f"{_measure.mebibytes(many)}, of at most {FEW} {_measure.mebibytes(few)}: {many / few:.2f} "
        f"{_measure.against(many / few, GOALS['memory'])}"
    )
    return [*numbers, {"exponent": slope, "bytes": many, "bytes_few": few}]


def write_slide(path: Path, across: int, data: Path | None) -> int:
    """Write a mosaic as a tiled TIFF; return the number of its objects."""
    import tifffile

    scene = mosaic(cells(data), across, CELL)
    tifffile.imwrite(path, scene.array, tile=(512, 512), photometric="rgb", compression="zlib")
    return len(scene.rles)


def prepare_slide(path: Path, workers: int) -> Callable[[], Any]:
    """Predict a slide in tiles."""
    return lambda: predictor()(path, tile=TILE, max_objects=MOST, workers=workers, score_threshold=0.5)


def area(sizes: list[int], data: Path | None) -> Numbers:
    """Slides of growing size in tiles."""
    tile = mosaic(cells(data), TILE // CELL, CELL).pixels
    numbers: Numbers = []
    with tempfile.TemporaryDirectory() as folder:
        for megapixels in sizes:
            path = Path(folder) / f"{megapixels}.tif"
            across = round((megapixels * 2**20) ** 0.5 / CELL)
            write_slide(path, across, data)
            with predictor().open(path, tile=TILE) as slide:
                count = len(predictor().windows(slide, tile=TILE))
            one = functools.partial(predictor().predict, [tile], max_objects=MOST, score_threshold=0.5)
            one()
            calls = {f"{workers}": prepare_slide(path, workers) for workers in (0, 1, 2)}
            timings = _measure.time_interleaved({"tile": one, **calls}, rounds=1, warmup=0, title=f"{megapixels} MP")
            objects = len(calls["1"]())
            memory = _measure.peak_memory(prepare_slide, path, 1)
            seconds = {name: timings.median(name) for name in timings.seconds}
            numbers.append(
                {
                    "megapixels": megapixels,
                    "tiles": count,
                    "objects": objects,
                    "seconds": seconds,
                    "ratio": seconds["1"] / (count * seconds["tile"]),
                    "bytes": memory,
                }
            )
    rows = [
        [
            f"{row['megapixels']}",
            f"{row['tiles']}",
            f"{row['objects']}",
            *(f"{row['seconds'][workers]:.2f} s" for workers in ("0", "1", "2")),
            _measure.milliseconds(row["seconds"]["1"] / row["megapixels"]),
            _measure.milliseconds(row["seconds"]["1"] / max(1, row["objects"])),
            f"{row['ratio']:.2f} {_measure.against(row['ratio'], GOALS['time'])}",
            _measure.mebibytes(row["bytes"]),
        ]
        for row in numbers
    ]
    _measure.print_table(
        f"Slides from the disk in tiles of {TILE}",
        [
            "megapixels",
            "tiles",
            "objects",
            "0 workers",
            "1",
            "2",
            "per MP",
            "per object",
            "of the tiles'",
            "peak memory",
        ],
        rows,
    )
    return numbers


def beside_torchvision(sizes: list[int], rounds: int) -> Numbers:
    """Our Mask R-CNN on ResNet-50 and torchvision's with the same weights."""
    numbers: Numbers = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        inference.save_weights((480, 640), weights)
        for side in sizes:
            for most in (FEW, 1000):
                sides = {"torchvision": prepare_torchvision, "a2fpn": prepare_ours}
                calls = {name: make(side, weights, most) for name, make in sides.items()}
                timings = _measure.time_interleaved(calls, rounds=rounds, title=f"{side} x {side}, {most}")
                memory = {name: _measure.peak_memory(make, side, weights, most) for name, make in sides.items()}
                ratio, share = timings.ratio("a2fpn", "torchvision"), memory["a2fpn"] / memory["torchvision"]
                numbers.append({"side": side, "objects": most, "time": ratio.value, "memory": share})
                rows.append(
                    [
                        f"{side} x {side}",
                        str(most),
                        _measure.milliseconds(timings.median("torchvision")),
                        _measure.milliseconds(timings.median("a2fpn")),
                        str(ratio),
                        _measure.mebibytes(memory["torchvision"]),
                        _measure.mebibytes(memory["a2fpn"]),
                        f"{share:.2f}",
                    ]
                )
    _measure.print_table(
        "maskrcnn_fpn_r50 beside torchvision with the same weights, masks as run lengths on either side",
        ["image", "objects", "torchvision", "ours", "time", "torchvision", "ours", "memory"],
        rows,
    )
    return numbers


def prepare_torchvision(side: int, weights: Path, most: int) -> Callable[[], Any]:
    """Detect as many objects as there are proposals for, and encode their masks."""
    from a2fpn.data import encode_masks

    model = inference.make_torchvision((side, side), weights, threshold=0.0)
    model.roi_heads.detections_per_img = most
    image = inference.make_image((side, side))
    plain = torch.inference_mode()(lambda: model([image]))
    return lambda: encode_masks(plain()[0]["masks"][:, 0] > 0.5)


def prepare_ours(side: int, weights: Path, most: int) -> Callable[[], Any]:
    """Detect as many objects, with run lengths."""
    model = inference.make_ours("maskrcnn_fpn_r50", weights, 0.0)
    image = inference.make_image((side, side))
    return lambda: model.predict([image], max_objects=most)


def main(
    *,
    part: Annotated[Part, typer.Option(help="What is measured.")] = "recall",
    data: Annotated[Path | None, typer.Option(help="COCO folder of nuclei; by default the packaged images.")] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="recall: images side by side, e.g. 3,5,7; area: megapixels, e.g. 1,4,16,64; torchvision: pixels, e.g. "
            "512,1024."
        ),
    ] = None,
    rounds: _measure.Rounds = 3,
    threads: _measure.Threads = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    quick: _measure.Quick = False,
) -> None:
    """Measure images of many objects."""
    standard = {"recall": "3,5,7", "area": "1,4,16,64", "torchvision": "512,1024"}
    fast = {"recall": "1,2", "area": "1,2", "torchvision": "128"}
    chosen = [int(text) for text in (sizes or (fast if quick else standard)[part]).split(",")]
    _measure.start(threads, rounds)
    measured = {
        "recall": lambda: recall(chosen, data),
        "area": lambda: area(chosen, data),
        "torchvision": lambda: beside_torchvision(chosen, 1 if quick else rounds),
    }[part]()
    if output is not None:
        output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
