"""Hundreds to thousands of objects in large images: found, in which memory, in which time.

``python -m benchmarks.dense --part recall`` puts nuclei side by side, 3 x 3 to 7 x 7 images. The network sees every
pixel at one scale, alone and side by side: the objects that it finds of the whole with ``max_objects=5000`` are to be
at least 0.98 of those that it finds image by image. Memory is that of at most 5,000 objects over that of at most 100 on
the same image, of any score so that as many are found; the exponent is the slope of time over objects in logarithms, 1
where time grows with them.

``--part area`` predicts slides from the disk in tiles of 1,024 pixels, whose nuclei are three times as large and seen
at the same scale: time per megapixel and per object, peak memory, which is to stay flat, and time over that of the same
tiles predicted one by one from memory, goal 1.15; with the tiles read by the predicting thread, and by one and two of
their own.

``--part torchvision`` sets ``maskrcnn_fpn_r50`` beside torchvision's Mask R-CNN with the same weights, with the masks
of up to 100 and up to 1,000 objects, at the sizes that torchvision can do.

Nuclei and model are those inside the package; ``--data`` names a COCO folder of others, ``--cell`` and ``--scale`` the
square that is taken of each image and the pixels of the network for one of these. ``--output`` keeps what the file
holds of other parts, and is written after each size.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import a2fpn
from a2fpn import Predictor
from benchmarks import _measure, inference
from benchmarks._nuclei import Scene, exponent, found_objects, load_scenes, mosaic
from benchmarks.gpu.record import circumstances

MODEL = "maskrcnn_a2fpn_lite0.nuclei"
CELL, SCALE = 256, 2.0
ENLARGED = 3
MOST, FEW = 5000, 100
TILE = 1024
SLIDE_OPTIONS: dict[str, Any] = {"scale": SCALE / ENLARGED, "max_objects": MOST, "score_threshold": 0.5}
WORKERS = {4: (0, 1, 2), 1 << 30: (1,)}
"""Reading threads that are timed, by the megapixels up to which they are."""
GOALS = {"recall": 0.98, "memory": 2.0, "time": 1.15}

Part = Literal["recall", "area", "torchvision"]
Numbers = list[dict[str, Any]]
Keep = Callable[[Numbers], None]
"""Stores the numbers so far."""


@dataclass(frozen=True)
class Squares:
    """Squares of annotated images that are put side by side.

    Args:
        data: COCO folder; None for the packaged nuclei.
        cell: Pixels of a side.
        scale: Pixels of the network for each.
    """

    data: Path | None = None
    cell: int = CELL
    scale: float = SCALE

    def mosaic(self, across: int) -> Scene:
        """Return ``across`` x ``across`` of them as one image."""
        return mosaic(cells(self.data, self.cell), across, self.cell)

    def parts(self, count: int) -> list[Scene]:
        """Return the first ones alone."""
        return [mosaic([scene], 1, self.cell) for scene in cells(self.data, self.cell)[:count]]


@functools.cache
def predictor() -> Predictor:
    """The packaged model."""
    return Predictor(a2fpn.create_model(MODEL, pretrained=True))


@functools.cache
def cells(data: Path | None, cell: int) -> list[Scene]:
    """Images that fill a square of the mosaic, smallest first."""
    scenes = [scene for scene in load_scenes(data) if min(scene.pixels.shape[1:]) >= cell]
    return sorted(scenes, key=lambda scene: scene.pixels.shape[1] * scene.pixels.shape[2])


def prepare_whole(across: int, squares: Squares, most: int) -> Callable[[], Any]:
    """Predict a mosaic without tiles, objects of any score."""
    scene = squares.mosaic(across)
    return lambda: predictor().predict([scene.pixels], scale=squares.scale, max_objects=most, score_threshold=0.0)


def recall(sizes: list[int], squares: Squares, keep: Keep) -> Numbers:
    """Objects found of a whole over those found image by image."""
    numbers: Numbers = []
    parts = squares.parts(max(sizes) ** 2)
    results = [predictor().predict([part.pixels], scale=squares.scale, max_objects=MOST)[0] for part in parts]
    of_parts = [found_objects(list(result.rles or ()), part.rles) for result, part in zip(results, parts, strict=True)]
    for across in sizes:
        whole = squares.mosaic(across)
        alone = sum(of_parts[number % len(parts)] for number in range(across**2))
        start = time.perf_counter()
        (result,) = predictor().predict([whole.pixels], scale=squares.scale, max_objects=MOST)
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
        keep(numbers)
    across = sizes[len(sizes) // 2]
    few, many = (_measure.peak_memory(prepare_whole, across, squares, most) for most in (FEW, MOST))
    detections = [len(prepare_whole(across, squares, most)()[0]) for most in (FEW, MOST)]
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
        f"Squares of {squares.cell} pixels side by side, seen at {squares.scale:g} x, at most {MOST} objects",
        ["images", "objects", "detections", "found whole / alone", "ratio", "time", "per object"],
        rows,
    )
    slope = exponent([row["objects"] for row in numbers], [row["seconds"] for row in numbers])
    _measure.console().print(
        f"Time grows with the {slope:.2f}th power of objects. Peak memory of {detections[1]} objects "
        f"{_measure.mebibytes(many)}, of {detections[0]} {_measure.mebibytes(few)}: {many / few:.2f} "
        f"{_measure.against(many / few, GOALS['memory'])}"
    )
    facts = {"exponent": slope, "bytes": many, "bytes_few": few, "detections": detections, "images": across**2}
    return [*numbers, {**facts, "cell": squares.cell, "scale": squares.scale}]


def enlarged(side: int, data: Path | None) -> NDArray[np.uint8]:
    """(side, side, 3) pixels of a mosaic that is as fine as a slide."""
    scene = Squares(data).mosaic(math.ceil(side / CELL / ENLARGED))
    image = Image.fromarray(scene.array).resize((ENLARGED * scene.array.shape[1],) * 2, Image.Resampling.BILINEAR)
    return np.asarray(image)[:side, :side]


def prepare_slide(path: Path, workers: int, first: Path | None = None) -> Callable[[], Any]:
    """Predict a slide in tiles; the first call may be of another one, which has all that later ones keep."""
    paths = itertools.chain([first or path], itertools.repeat(path))
    return lambda: predictor()(next(paths), tile=TILE, workers=workers, **SLIDE_OPTIONS)


def area(sizes: list[int], data: Path | None, keep: Keep) -> Numbers:
    """Slides of growing size in tiles."""
    import tifffile

    numbers: Numbers = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{megapixels}.tif" for megapixels in sizes]
        for megapixels, path in zip(sizes, paths, strict=True):
            pixels = enlarged(round((megapixels * 2**20) ** 0.5), data)
            tifffile.imwrite(path, pixels, tile=(512, 512), photometric="rgb", compression="zlib")
            with predictor().open(path, tile=TILE) as slide:
                tiles = [slide.read(window) for window in predictor().windows(slide, tile=TILE)]
            predictor().predict(tiles[:1], **SLIDE_OPTIONS)  # what only the first call does counts for no side
            workers = next(chosen for most, chosen in WORKERS.items() if megapixels <= most)
            found: dict[int, int] = {}

            def run(number: int, path: Path = path, found: dict[int, int] = found) -> None:
                found[number] = len(prepare_slide(path, number)())

            def alone(tiles: list[Tensor] = tiles) -> None:
                for tile in tiles:
                    predictor().predict([tile], **SLIDE_OPTIONS)

            calls = {"tiles": alone} | {str(number): functools.partial(run, number) for number in workers}
            timings = _measure.time_interleaved(calls, rounds=1, warmup=0, title=f"{megapixels} MP")
            seconds = {name: timings.median(name) for name in timings.seconds}
            numbers.append(
                {
                    "megapixels": megapixels,
                    "tiles": len(tiles),
                    "objects": found[1],
                    "same": len(set(found.values())) == 1,
                    "seconds": seconds,
                    "ratio": seconds["1"] / seconds["tiles"],
                    "bytes": _measure.peak_memory(prepare_slide, path, 1, paths[0]),
                }
            )
            keep(numbers)
    rows = [
        [
            f"{row['megapixels']}",
            f"{row['tiles']}",
            f"{row['objects']}",
            *(_seconds(row["seconds"].get(workers)) for workers in ("0", "1", "2")),
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


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def beside_torchvision(sizes: list[int], rounds: int, keep: Keep) -> Numbers:
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
                numbers.append(
                    {
                        "side": side,
                        "objects": most,
                        "seconds": {name: timings.median(name) for name in sides},
                        "time": ratio.value,
                        "range": [ratio.low, ratio.high],
                        "bytes": memory,
                        "memory": share,
                    }
                )
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
                keep(numbers)
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
    part: Annotated[Part | None, typer.Option(help="What is measured; by default all.")] = None,
    data: Annotated[Path | None, typer.Option(help="COCO folder of nuclei; by default the packaged images.")] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="recall: images side by side, e.g. 3,5,7; area: megapixels, e.g. 1,4,16,64; torchvision: pixels, e.g. "
            "512,768."
        ),
    ] = None,
    cell: Annotated[int, typer.Option(help="recall: pixels of a side of the square of each image.", min=32)] = CELL,
    scale: Annotated[float, typer.Option(help="recall: pixels of the network for one of an image.", min=0.1)] = SCALE,
    rounds: _measure.Rounds = 3,
    threads: _measure.Threads = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    quick: _measure.Quick = False,
) -> None:
    """Measure images of many objects."""
    standard = {"recall": "3,5,7", "area": "1,4,16,64", "torchvision": "512,768"}
    fast = {"recall": "1,2", "area": "1,2", "torchvision": "128"}
    squares = Squares(data, cell, scale)
    measures: dict[str, Callable[[list[int], Keep], Numbers]] = {
        "recall": lambda chosen, keep: recall(chosen, squares, keep),
        "area": lambda chosen, keep: area(chosen, data, keep),
        "torchvision": lambda chosen, keep: beside_torchvision(chosen, 1 if quick else rounds, keep),
    }
    if part is None and sizes is not None:
        raise typer.BadParameter("--sizes is of one part; give --part as well.")
    _measure.start(threads, rounds)
    document = json.loads(output.read_text(encoding="utf-8")) if output is not None and output.exists() else {}
    here = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    here |= circumstances(torch.device("cpu"))

    def keep(name: str, numbers: Numbers) -> None:
        document[name] = {**here, "rows": numbers}
        if output is not None:
            output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    for name in measures if part is None else [part]:
        chosen = [int(text) for text in (sizes or (fast if quick else standard)[name]).split(",")]
        keep(name, measures[name](chosen, functools.partial(keep, name)))


if __name__ == "__main__":
    typer.run(main)
