"""Every detector on every neck into ONNX, compared with itself on real images: ``python -m benchmarks.export_sweep``.

Weights are random but for heads that find something. Each line is a model: processor seconds of the export, nodes and
size of the file, objects found, and the largest differences over all images, alone, in batches of two and without
objects. With ``--records`` it is also an entry of a JSON file, which is written after each model; models in it are not
run again.

With random weights all proposals become objects, and rounding decides about some: which is the thousandth of a level,
and which overlaps another by just more than a limit. Therefore a line with differences ends with the same ones between
the detector and itself with slight noise on its weights.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import onnx
import torch
import typer
from torch import Tensor

import a2fpn
from a2fpn.data.images import read_image
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.errors import A2FPNError
from a2fpn.export import Comparison, verify
from a2fpn.export.trace import Stacked
from a2fpn.inference import list_images
from a2fpn.inference.exported import ExportedDetector, Runtime
from a2fpn.training.state import code_version

NECKS = ("fpn", "pafpn", "a2fpn_lite", "a2fpn")
NOISE = 2e-7
"""Relative noise on the weights of the detector that is compared with itself; a float32 is rounded by up to 6e-8."""
OBJECTS = 30
"""Most objects of an image; more would make the masks of a cascade most of the sweep's time."""
_HEADS = ("rpn.", "roi_heads.", "head.")


def make(name: str, min_size: int) -> Detector:
    """A detector with random weights whose heads tell places apart."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = a2fpn.create_model(name, num_classes=3, min_size=min_size, detections_per_image=OBJECTS)
    model.eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.startswith(_HEADS) and parameter.ndim > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        if key.endswith("cls_logits.bias"):
            parameter.fill_(-2)  # one-stage heads start with scores near 0.01, below the threshold
        elif key.endswith("cls_logits.weight"):
            parameter.mul_(5)
    return model


class Noisy:
    """A detector with noise on its weights, run like a file.

    Args:
        model: The detector, which is not changed.
        noise: Standard deviation of the noise, relative to each weight.
    """

    def __init__(self, model: Detector, noise: float = NOISE) -> None:
        generator = torch.Generator().manual_seed(0)
        changed = copy.deepcopy(model)
        for parameter in changed.parameters():
            parameter.mul_(1 + torch.randn(parameter.shape, generator=generator) * noise)
        self.stacked = Stacked(changed)

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`a2fpn.inference.exported.ExportedDetector.run`."""
        return self.stacked(images)


def read(images: Path, most: int) -> Iterator[tuple[str, Tensor]]:
    """Yield names and pixels of some images of a folder, spread over it."""
    paths = list_images(images)
    count = min(len(paths), most)
    for path in (paths[i * len(paths) // count] for i in range(count)):
        yield path.name, read_image(path).as_subclass(Tensor)


def sweep_one(name: str, images: Path, most: int, min_size: int, runtime: Runtime) -> dict[str, Any]:
    """Export and compare a model, and return what was measured."""
    model = make(name, min_size)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        path = a2fpn.export_model(model, Path(folder) / "model.onnx")
        seconds, nodes = time.process_time() - start, len(onnx.load(path).graph.node)
        results = list(verify(model, ExportedDetector(path, runtime=runtime), read(images, most)))
        size = path.stat().st_size
    row = {"model": name, "seconds": round(seconds, 1), "nodes": nodes, "bytes": size, **differences(results)}
    if row["equal"] < row["comparisons"]:
        noisy = verify(model, Noisy(model), read(images, most))
        row["noise"] = {"of_weights": NOISE, **differences(list(noisy))}
    return row


def differences(results: Sequence[Comparison]) -> dict[str, Any]:
    """Return counts and the largest differences of comparisons."""
    ious = [result.mask_iou for result in results if result.mask_iou is not None]
    return {
        "found": sum(result.found for result in results),
        "expected": sum(result.expected for result in results),
        "apart": sum(result.apart for result in results),
        "box": max(result.box for result in results),
        "score": max(result.score for result in results),
        "mask_iou": min(ious, default=None),
        "equal": sum(result.equal for result in results),
        "comparisons": len(results),
    }


def line(row: dict[str, Any]) -> str:
    """Return a model's measurements as a line."""
    if "error" in row:
        return f"{row['model']}: not exported: {row['error']}"
    noise = row.get("noise")
    return (
        f"{row['model']}: {row['seconds']:.0f} s, {row['nodes']} nodes, {row['bytes'] / 1e6:.0f} MB, {_text(row)}"
        + (f"; with noise of {noise['of_weights']:.0e} on the weights {_text(noise)}" if noise else "")
    )


def _text(row: dict[str, Any]) -> str:
    masks = "" if row["mask_iou"] is None else f", mask IoU {row['mask_iou']:.5f}"
    return (
        f"{row['found']} of {row['expected']} objects, {row['apart']} of them others, boxes {row['box']:.1e} px, "
        f"scores {row['score']:.1e}{masks}, {row['equal']} of {row['comparisons']} equal"
    )


def describe(images: Path, most: int, min_size: int, runtime: str) -> dict[str, Any]:
    """Return what the models are compared on, and with."""
    sizes = {tuple(pixels.shape[-2:]) for _, pixels in read(images, most)}
    packages = ("torch", "torchvision", "onnx", "onnxscript", runtime)
    return {
        "commit": code_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "runtime": runtime,
        "images": len(list(read(images, most))),
        "sizes": len(sizes),
        "min_size": min_size,
        "rows": [],
    }


def main(
    *,
    images: Annotated[Path, typer.Option(help="Folder of images.", metavar="DIR")],
    backbone: Annotated[
        list[str] | None, typer.Option(help="Backbones by short name; r18 and lite0 by default.")
    ] = None,
    detector: Annotated[list[str] | None, typer.Option(help="Detectors; all by default.")] = None,
    neck: Annotated[list[str] | None, typer.Option(help="Necks.")] = None,
    most: Annotated[int, typer.Option(help="Most images.", min=1)] = 20,
    min_size: Annotated[int, typer.Option(help="Short side of the network's input, pixels.", min=32)] = 800,
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    records: Annotated[Path | None, typer.Option(help="JSON file to write, or to go on with.")] = None,
) -> None:
    """Export and compare models."""
    document = describe(images, most, min_size, runtime)
    if records is not None and records.exists():
        document = json.loads(records.read_text(encoding="utf-8"))
    done = {row["model"] for row in document["rows"]}
    for kind in detector or DETECTORS:
        for middle in neck or NECKS:
            for body in backbone or ("r18", "lite0"):
                name = f"{kind}_{middle}_{body}"
                if name in done:
                    continue
                try:
                    row = sweep_one(name, images, most, min_size, runtime)  # type: ignore[arg-type]
                except A2FPNError as error:
                    row = {"model": name, "error": str(error)}
                typer.echo(line(row))
                document["rows"].append(row)
                if records is not None:
                    records.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
