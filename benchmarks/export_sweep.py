"""Every detector on every neck into ONNX, compared with itself on real images: ``python -m benchmarks.export_sweep``.

Weights are random but for heads that find something. Each line is a model: seconds of the export, nodes and size of the
file, objects found, and the largest differences over all images, alone, in batches of two and without objects.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import onnx
import torch
import typer
from torch import Tensor

import a2fpn
from a2fpn.data.images import read_image
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.errors import A2FPNError
from a2fpn.export import verify
from a2fpn.inference import list_images
from a2fpn.inference.exported import ExportedDetector, Runtime

NECKS = ("fpn", "pafpn", "a2fpn_lite", "a2fpn")
_HEADS = ("rpn.", "roi_heads.", "head.")


def make(name: str, min_size: int) -> Detector:
    """A detector with random weights whose heads tell places apart."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = a2fpn.create_model(name, num_classes=3, min_size=min_size).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.startswith(_HEADS) and parameter.ndim > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def read(images: Path, most: int) -> Iterator[tuple[str, Tensor]]:
    """Yield names and pixels of some images of a folder, spread over it."""
    paths = list_images(images)
    count = min(len(paths), most)
    for path in (paths[i * len(paths) // count] for i in range(count)):
        yield path.name, read_image(path).as_subclass(Tensor)


def sweep_one(name: str, images: Path, most: int, min_size: int, runtime: Runtime) -> str:
    """Export and compare a model, and return its line."""
    model = make(name, min_size)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = a2fpn.export_model(model, Path(folder) / "model.onnx")
        seconds, nodes = time.perf_counter() - start, len(onnx.load(path).graph.node)
        results = list(verify(model, ExportedDetector(path, runtime=runtime), read(images, most)))
        size = path.stat().st_size / 1e6
    ious = [result.mask_iou for result in results if result.mask_iou is not None]
    return (
        f"{seconds:.0f} s, {nodes} nodes, {size:.0f} MB, {sum(r.found for r in results)} of "
        f"{sum(r.expected for r in results)} objects, boxes {max(r.box for r in results):.1e} px, scores "
        f"{max(r.score for r in results):.1e}{f', mask IoU {min(ious):.5f}' if ious else ''}; "
        f"{sum(r.equal for r in results)} of {len(results)} equal"
    )


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
) -> None:
    """Export and compare models."""
    for kind in detector or DETECTORS:
        for middle in neck or NECKS:
            for body in backbone or ("r18", "lite0"):
                name = f"{kind}_{middle}_{body}"
                try:
                    line = sweep_one(name, images, most, min_size, runtime)  # type: ignore[arg-type]
                except A2FPNError as error:
                    line = f"not exported: {error}"
                typer.echo(f"{name}: {line}")


if __name__ == "__main__":
    typer.run(main)
