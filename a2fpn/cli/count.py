"""``a2fpn count`` and ``a2fpn calibrate``."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from a2fpn._text import count_of
from a2fpn.cli.evaluate import open_annotated, predict_annotated
from a2fpn.cli.format import progress_bar, say, table, write_json
from a2fpn.cli.options import (
    Channels,
    Device,
    GrayBits,
    Intensity,
    Json,
    MaxObjects,
    MaxPixels,
    Model,
    Nms,
    Optimize,
    Overlap,
    Precision,
    Quiet,
    Scale,
    Tile,
    Workers,
    build_predictor,
    load_checkpoint,
    load_detector,
    parse_channels,
    parse_intensity,
    parse_scale,
)
from a2fpn.cli.predict import image_files
from a2fpn.config import MAX_PIXELS


def count(
    images: Annotated[list[Path], typer.Argument(help="Image files or folders.", metavar="IMAGE_OR_FOLDER")],
    *,
    model: Model,
    output: Annotated[Path | None, typer.Option(help="Write the counts to a CSV file.", metavar="CSV")] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Confidence threshold for counting; default: the one stored by `a2fpn calibrate`, else 0.5.",
        ),
    ] = None,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    workers: Workers = 1,
    scale: Scale = None,
    channels: Channels = None,
    intensity: Intensity = None,
    nms_threshold: Nms = None,
    max_objects: MaxObjects = None,
    optimize: Optimize = False,
    dtype: Precision = "float32",
    max_pixels: MaxPixels = MAX_PIXELS,
    gray_bits: GrayBits = 16,
    device: Device = None,
    quiet: Quiet = False,
    save: Json = None,
) -> None:
    """Count objects per image and class; print a table and optionally write a CSV file.

    Example: `a2fpn count photos/ --model runs/cells/best --output counts.csv`

    A slide: `a2fpn count slide.tif --model runs/cells --tile 1024 --scale 0.5um --max-objects 2000`

    An unreadable image is an error: if skipped, its objects would be missing from the counts.
    """
    paths = image_files(images)
    threshold, source = _threshold(model, score_threshold)
    detector = load_detector(model)
    predictor = build_predictor(
        detector,
        device,
        optimize=optimize,
        dtype=dtype,
        score_threshold=threshold,
        nms_threshold=nms_threshold,
        max_objects=max_objects,
        tile=tile,
        overlap=overlap,
        workers=workers,
        channels=parse_channels(channels),
        intensity=parse_intensity(intensity),
        max_pixels=max_pixels,
        gray_bits=gray_bits,
        **parse_scale(scale, detector),
    )
    names = [category.name for category in predictor.categories]
    rows: list[tuple[str, str, int]] = []
    quiet = quiet or str(save) == "-"
    with progress_bar(quiet=quiet) as progress:
        for path in progress.track(paths, description="counting"):
            (result,) = predictor([path])
            rows += [(str(path), name, result.counts.get(name, 0)) for name in names]
    records = [dict(zip(("image", "class", "count"), row, strict=True)) for row in rows]
    write_json({"score_threshold": threshold, "counts": records}, save)
    grid = table("image", "class", "count")
    for file_name, name, number in rows:
        grid.add_row(escape(file_name), escape(name), str(number))
    if not quiet:
        Console().print(grid)
    say(
        f"{count_of(sum(number for *_, number in rows), 'object')} in {count_of(len(paths), 'image')}, "
        f"with a score of {threshold:.3f} or more ({source})",
        quiet=quiet,
    )
    if output is not None:
        with output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "class", "count"), *rows])
        say(f"The counts are in {output}", quiet=quiet)


def calibrate(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.", metavar="MODEL")],
    *,
    images: Annotated[Path, typer.Option(help="Folder of annotated images.", metavar="DIR")],
    annotations: Annotated[Path, typer.Option(help="COCO file with the ground truth.", metavar="JSON")],
    tile: Tile = None,
    overlap: Overlap = 0.2,
    nms_threshold: Nms = None,
    max_objects: MaxObjects = None,
    gray_bits: GrayBits = 16,
    device: Device = None,
) -> None:
    """Find the confidence threshold with the lowest count error and store it in config.json for `a2fpn count`.

    Example: `a2fpn calibrate runs/cells/best --images cells/val --annotations cells/val.json`

    Use images that the model was not trained on, and pass the same options to `a2fpn count`.
    """
    from a2fpn.counting import calibrate_counts
    from a2fpn.pretrained.checkpoint import add_metadata, read_checkpoint

    read_checkpoint(model)
    detector = load_checkpoint(str(model))
    dataset = open_annotated(detector, images, annotations)
    predictor = build_predictor(
        detector,
        device,
        optimize=False,
        dtype="float32",
        nms_threshold=nms_threshold,
        max_objects=max_objects,
        tile=tile,
        overlap=overlap,
        gray_bits=gray_bits,
    )
    scores: dict[tuple[int, int], list[float]] = defaultdict(list)
    for record in predict_annotated(predictor, dataset, images):
        scores[record["image_id"], record["category_id"]].append(record["score"])
    coco = dataset.coco
    keys = [(image_id, category.id) for image_id in coco.images for category in coco.categories]
    truth = [sum(a.category_id == kind and not a.iscrowd for a in coco.annotations[image]) for image, kind in keys]
    best = calibrate_counts([scores[key] for key in keys], truth)
    add_metadata(model, count_threshold=best.threshold)
    typer.echo(
        f"Count error of {count_of(len(coco.images), 'image')}: {best.mae:.2f} on average at a score threshold of "
        f"{best.threshold:.3f} (bias {best.bias:+.2f}); {best.mae_at_half:.2f} at 0.5 (bias "
        f"{best.bias_at_half:+.2f}).\nThe threshold is stored in {model / 'config.json'}; a2fpn count uses it."
    )


def _threshold(model: str, wanted: float | None) -> tuple[float, str]:
    """The score from which objects count, and who says so."""
    from a2fpn.pretrained.catalog import EmbeddedWeights, find_weights
    from a2fpn.pretrained.checkpoint import read_checkpoint

    if wanted is not None:
        return wanted, "as asked for"
    found = find_weights(model)
    known = (
        found[1].folder
        if found is not None and isinstance(found[1], EmbeddedWeights)
        else Path(model.removeprefix("local-dir:"))
    )
    stored = read_checkpoint(known).facts.count_threshold if known.is_dir() else None
    return (0.5, "no threshold is stored with the model") if stored is None else (stored, "calibrated")
