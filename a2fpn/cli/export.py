"""``a2fpn export``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from a2fpn._text import count_of
from a2fpn.cli.format import progress_bar
from a2fpn.cli.options import load_checkpoint
from a2fpn.errors import ConfigError, ExistingFileError

if TYPE_CHECKING:
    from torch import Tensor

    from a2fpn.detectors import Detector

MOST_VERIFIED = 20
"""Images of a folder that are compared."""
MOST_CALIBRATED = 40
"""Images of a folder that ranges are taken from."""


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or name from `a2fpn list --pretrained`.")],
    *,
    output: Annotated[Path, typer.Option(help="Output file, .onnx or .pt2.", metavar="FILE")],
    format: Annotated[
        Literal["onnx", "torch"] | None,
        typer.Option(
            help="onnx for ONNX Runtime, OpenVINO and browsers; torch for torch.export.load. Default: by file "
            "extension."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Fixed input size in pixels; default: any size.", metavar="HEIGHTxWIDTH")
    ] = None,
    dtype: Annotated[
        Literal["uint8", "float32"], typer.Option(help="Input type: uint8 in 0-255, or float32 in 0-1.")
    ] = "uint8",
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Compare the file with the model on a folder of images; delete it if they differ.", metavar="DIR"
        ),
    ] = None,
    int8: Annotated[
        Path | None,
        typer.Option(help="Quantize features to int8, calibrated on a folder of images.", metavar="DIR"),
    ] = None,
    weight_bits: Annotated[
        int,
        typer.Option(
            help="Bits of weights with --int8: 7 runs everywhere, 8 is more exact but needs VNNI, AMX or ARM.",
            min=7,
            max=8,
        ),
    ] = 7,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite FILE if it exists.")] = False,
) -> None:
    """Export a model, from resizing to NMS and masks, to a single file that runs without this package.

    Example: `a2fpn export maskrcnn_a2fpn_lite0.nuclei --output nuclei.onnx --verify photos/`

    Input: `images` (N, 3, H, W), RGB, with dynamic N, H and W. Outputs: `image_index`, `boxes` in pixels, `scores`,
    `labels` and `masks` as probabilities within the boxes. Run it with `a2fpn predict --model nuclei.onnx`.
    """
    from a2fpn.export import export_model
    from a2fpn.export.file import check_export

    fixed = _parse_size(size)
    if output.exists() and not overwrite:
        raise ExistingFileError(f"{output} exists; --overwrite replaces it.")
    if int8 is not None and verify is not None:
        raise ConfigError(
            "--verify does not support int8 files, which differ from the model; run `a2fpn evaluate --model FILE`."
        )
    if weight_bits != 7 and int8 is None:
        raise ConfigError("--weight-bits is for int8 files; set --int8, too.")
    images = [] if verify is None else _images(verify, MOST_VERIFIED)
    calibration = [] if int8 is None else _images(int8, MOST_CALIBRATED)
    detector = load_checkpoint(model)
    if check_export(detector, output, format=format, size=fixed, dtype=dtype) != "onnx" and int8 is not None:
        raise ConfigError("--int8 is for ONNX files; use a name that ends in .onnx.")
    try:
        with progress_bar() as progress:
            progress.add_task("exporting", total=None)
            export_model(detector, output, format=format, size=fixed, dtype=dtype)
        if calibration:
            _quantize(output, calibration, fixed, 8 if weight_bits == 8 else 7)
        typer.echo(f"Wrote {output}, {output.stat().st_size / 1e6:.1f} MB.")
        if verify is not None:
            _keep_if_equal(detector, output, images, fixed)
    except KeyboardInterrupt:
        typer.echo(f"Stopped; {output} {'is unchanged' if output.exists() else 'was not written'}.", err=True)
        raise typer.Exit(130) from None  # 128 and the number of the signal


def _keep_if_equal(detector: Detector, path: Path, images: list[Path], size: tuple[int, int] | None) -> None:
    """Compare a file with its model, and delete it if it differs or can't be run."""
    equal = False
    try:
        equal = _verify(detector, path, images, size)
    finally:
        if not equal:
            path.unlink()
    if not equal:
        typer.echo(f"{path} was deleted: it differs from the model.", err=True)
        raise typer.Exit(1)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ConfigError(f"--size: expected HEIGHTxWIDTH in pixels such as 480x640, got {text!r}.")
    return int(found[1]), int(found[2])


def _images(folder: Path, most: int) -> list[Path]:
    from a2fpn.inference import list_images

    paths = list_images(folder)
    # Spread over the folder, since neighbors are often alike.
    count = min(len(paths), most)
    return [paths[i * len(paths) // count] for i in range(count)]


def _quantize(path: Path, images: list[Path], size: tuple[int, int] | None, weight_bits: Literal[7, 8]) -> None:
    """Turn a file into int8; where that fails nothing is left of it."""
    from a2fpn.export import quantize

    try:
        with progress_bar() as progress:
            opened = progress.track(_opened(images, size), total=len(images), description="calibrating")
            quantize(path, (image for _, image in opened), weight_bits=weight_bits)
    except BaseException:
        path.unlink()
        raise


def _verify(detector: Detector, path: Path, images: list[Path], size: tuple[int, int] | None) -> bool:
    """Print how far a file and its model differ on images, and return whether they are equal up to rounding."""
    from a2fpn.export import verify
    from a2fpn.inference.exported import ExportedDetector

    results = []
    with progress_bar() as progress:
        task = progress.add_task("comparing", total=3 * len(images) + 1)
        for result in verify(detector.eval(), ExportedDetector(path), _opened(images, size)):
            results.append(result)
            progress.advance(task)
    for result in itertools.filterfalse(lambda result: result.equal, results):
        typer.echo(
            f"{result.name}: {result.expected} objects expected, {result.found} found; boxes differ by "
            f"{result.box:.3g} px, scores by {result.score:.3g}"
            f"{'' if result.mask_iou is None else f', mask IoU {result.mask_iou:.5f}'}."
        )
    ious = [result.mask_iou for result in results if result.mask_iou is not None]
    typer.echo(
        f"Compared on {count_of(len(images), 'image')}, alone, in batches of 2 and empty: "
        f"{sum(result.found for result in results)} of {sum(result.expected for result in results)} objects, boxes "
        f"within {max(result.box for result in results):.2g} px, scores within "
        f"{max(result.score for result in results):.2g}{f', mask IoU at least {min(ious):.5f}' if ious else ''}."
    )
    return all(result.equal for result in results)


def _opened(images: list[Path], size: tuple[int, int] | None) -> Iterator[tuple[str, Tensor]]:
    import torch

    from a2fpn.data.images import read_image

    for path in images:
        image = read_image(path).as_subclass(torch.Tensor)
        if size is not None:
            image = torch.nn.functional.interpolate(image[None].float(), size=size, mode="bilinear")[0].round().byte()
        yield path.name, image
