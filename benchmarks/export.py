"""Exported detectors in ONNX Runtime and OpenVINO against eager and ``optimize_for_inference``: images to objects.

``python -m benchmarks.export --threads 1 --output FILE`` times the packaged nuclei model on one of its pictures, and
Mask R-CNN with FPN and with A²-FPN on ResNet-50, with random weights, at 480x640 and 800x1088. Masks are left as
probabilities in their boxes on all sides. What a file finds is compared with what the detector finds before it is
timed. Goal: a file in no more time than the optimized detector. With ``--int8 DIR`` the nuclei model in int8,
calibrated on a folder of images, is timed as well (goal: half of float's time on processors with VNNI or AMX), and
measured with ``--annotations FILE`` on ``--images DIR``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import onnx
import torch
import typer
from torch import Tensor

import a2fpn
from a2fpn.data.images import read_image
from a2fpn.detectors import Detector
from a2fpn.evaluation import evaluate_coco
from a2fpn.export import quantize, verify
from a2fpn.inference import list_images
from a2fpn.inference.exported import ExportedDetector, Runtime
from benchmarks import _measure as measure
from benchmarks.export_sweep import make
from benchmarks.gpu.record import circumstances

NUCLEI = "maskrcnn_a2fpn_lite0.nuclei"
PICTURE = Path(a2fpn.__file__).parent / "assets" / "nuclei_demo" / "images" / "0470.jpg"
RANDOM = tuple(f"maskrcnn_{neck}_r50 {size}" for neck in ("fpn", "a2fpn") for size in ("480x640", "800x1088"))
EAGER, OPTIMIZED = "eager", "optimized"
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
CALIBRATED = 40
GOAL = 1.0


def build(case: str, *, quick: bool) -> tuple[Detector, Tensor]:
    """The detector of a case, and an image ``(3, H, W)`` uint8."""
    if case == NUCLEI:
        return a2fpn.from_pretrained(NUCLEI).eval(), read_image(PICTURE).as_subclass(Tensor)
    name, _, size = case.partition(" ")
    height, width = (64, 96) if quick else map(int, size.split("x"))
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 255
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 255)
    return make(name, min(height, width)), image.to(torch.uint8)


def calls(model: Detector, image: Tensor, files: dict[str, ExportedDetector]) -> dict[str, Callable[[], object]]:
    """Return the calls that are timed, by side."""
    optimized = a2fpn.optimize_for_inference(model)

    def run(detector: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return detector([image], paste_masks=False)

        return call

    return {name: run(x) for name, x in {EAGER: model, OPTIMIZED: optimized, **files}.items()}


def report(case: str, *, rounds: int, quick: bool, int8: Path | None, folder: Path) -> dict[str, Any]:
    """Export, compare and time one case, and return its record."""
    model, image = build(case, quick=quick)
    path, seconds = folder / f"{case.replace(' ', '_')}.onnx", None
    if not path.exists():
        start = time.process_time()
        a2fpn.export_model(model, path)
        seconds = time.process_time() - start
    nodes = len(onnx.load(path).graph.node)
    files = {str(runtime): ExportedDetector(path, runtime=runtime) for runtime in RUNTIMES}
    differences = {name: next(verify(model, file, [(case, image)])) for name, file in files.items()}
    if int8 is not None and case == NUCLEI:
        small = quantize(path, map(_read, spread(int8)), folder / "int8.onnx")
        files["onnxruntime, int8"] = ExportedDetector(small)
    timings = measure.time_interleaved(calls(model, image, files), rounds=rounds, title=case)
    rows = []
    for side in timings.seconds:
        ratio, eager = timings.ratio(side, OPTIMIZED), timings.ratio(side, EAGER)
        row: dict[str, Any] = {"side": side, "ms": 1e3 * timings.median(side), "to_eager": eager.value}
        row |= {"to_optimized": ratio.value, "range": [ratio.low, ratio.high]}
        row["goal"] = measure.against(ratio.value, GOAL if side in RUNTIMES else None)
        if side in differences:
            found = differences[side]
            row |= {"objects": found.found, "expected": found.expected, "box": found.box, "score": found.score}
        if side.endswith(", int8"):
            row["to_float"] = timings.ratio(side, side.removesuffix(", int8")).value
        rows.append(row)
    exported = "" if seconds is None else f", exported in {seconds:.0f} s of a processor"
    title = f"{case}, one image of {image.shape[1]}x{image.shape[2]}; {nodes} nodes{exported}"
    columns = ["side", "time", "/ eager", "/ optimized", "goal", "objects", "/ float"]
    measure.print_table(title, columns, [cells(row) for row in rows])
    return {"case": case, "nodes": nodes, "export_s": seconds, "rows": rows}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    objects = f"{row['objects']} of {row['expected']}" if "objects" in row else ""
    low, high = row["range"]
    return [
        row["side"],
        measure.milliseconds(row["ms"] / 1e3),
        f"{row['to_eager']:.2f}",
        str(measure.Ratio(row["to_optimized"], low, high)),
        row["goal"],
        objects,
        f"{row['to_float']:.2f}" if "to_float" in row else "",
    ]


def accuracy(path: Path, images: Path, annotations: Path) -> dict[str, float]:
    """Box and mask AP of a file, 500 objects an image."""
    truth = json.loads(annotations.read_text(encoding="utf-8"))
    predictor = a2fpn.Predictor(path)
    records: list[dict[str, Any]] = []
    with measure.progress() as bar:
        for image in bar.track(truth["images"], description="evaluating"):
            (found,) = predictor.predict([_read(images / image["file_name"])])
            records += found.to_coco(image["id"])
    measured = evaluate_coco(truth, records, max_detections=500).to_dict()
    return {name: measured[name] for name in ("bbox/ap", "segm/ap")}


def spread(folder: Path) -> list[Path]:
    """Some images of a folder, spread over it."""
    paths = list_images(folder)
    count = min(len(paths), CALIBRATED)
    return [paths[i * len(paths) // count] for i in range(count)]


def _read(path: Path) -> Tensor:
    return read_image(path).as_subclass(Tensor)


def main(
    *,
    rounds: measure.Rounds = 7,
    quick: measure.Quick = False,
    threads: measure.Threads = 1,
    only: Annotated[str | None, typer.Option(help="Cases whose names hold this, such as nuclei or 480x640.")] = None,
    int8: Annotated[Path | None, typer.Option(help="Images to calibrate int8 on.", metavar="DIR")] = None,
    images: Annotated[Path | None, typer.Option(help="Images to measure int8 on.", metavar="DIR")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Their annotations.", metavar="FILE")] = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder of the exported files; what it has is not made anew.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; figures of these cases are replaced.")] = None,
) -> None:
    """Time exported detectors, compare what they find, and measure int8."""
    rounds = 1 if quick else rounds
    measure.start(threads, rounds)
    document = json.loads(output.read_text(encoding="utf-8")) if output and output.exists() else {}
    for case in (NUCLEI, *RANDOM):
        if only and only not in case:
            continue
        with tempfile.TemporaryDirectory() as made:
            folder = files or Path(made)
            record = report(case, rounds=rounds, quick=quick, int8=int8, folder=folder)
            if int8 and images and annotations and case == NUCLEI:
                for name in (NUCLEI, "int8"):
                    record[f"{name}_ap"] = accuracy(folder / f"{name}.onnx", images, annotations)
                    measure.console().print(f"{name}: {record[f'{name}_ap']}")
        here = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
        document[f"{case}, threads {here['threads']}"] = {
            **circumstances(torch.device("cpu")),
            **here,
            "rounds": rounds,
            **record,
        }
        if output:
            output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
