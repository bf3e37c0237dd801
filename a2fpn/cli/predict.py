"""``a2fpn predict``."""

from __future__ import annotations

import errno
import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from a2fpn._text import count_of, name_some
from a2fpn.cli.format import progress_bar, say, write_json
from a2fpn.cli.options import (
    Batch,
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
    Output,
    Overlap,
    Precision,
    Quiet,
    RuntimeName,
    Scale,
    SoftNmsKind,
    Threshold,
    Tile,
    Tta,
    Workers,
    build_predictor,
    load_detector,
    parse_channels,
    parse_intensity,
    parse_scale,
    weights_hash,
)
from a2fpn.config import MAX_PIXELS, SCORE_THRESHOLD
from a2fpn.errors import ConfigError, ImageError, MissingFileError

if TYPE_CHECKING:
    from rich.progress import Progress

    from a2fpn.cli.predictions import Job, PredictionFolder
    from a2fpn.inference import Predictor, Result


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files or folders.", metavar="IMAGE_OR_FOLDER")],
    *,
    model: Model,
    output: Output = Path("predictions"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing files of the same names.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in DIR, skipping finished images and tiles.")
    ] = False,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Output formats, repeated or comma-separated: overlay (pictures), coco, coco-dataset, csv, geojson "
            "(QuPath), jsonl, labels; for annotation tools: labelme, cvat, labelstudio, datumaro, voc, yolo.",
            show_default="overlay,coco",
        ),
    ] = None,
    score_threshold: Threshold = SCORE_THRESHOLD,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    batch: Batch = 1,
    workers: Workers = 1,
    scale: Scale = None,
    channels: Channels = None,
    intensity: Intensity = None,
    tta: Tta = False,
    nms_threshold: Nms = None,
    soft_nms: SoftNmsKind = None,
    max_objects: MaxObjects = None,
    optimize: Optimize = False,
    dtype: Precision = "float32",
    max_pixels: MaxPixels = MAX_PIXELS,
    gray_bits: GrayBits = 16,
    runtime: RuntimeName = None,
    device: Device = None,
    quiet: Quiet = False,
    save: Json = None,
) -> None:
    """Detect objects in images; write an overlay per image and all results as COCO JSON, or other formats.

    Example: `a2fpn predict photos/ extra.jpg --model runs/cells/best --output found`

    A slide of any size: `a2fpn predict slide.tif --model runs/cells/best --tile 1024 --max-objects 2000`

    With `--tile`, TIFF (tiled, pyramidal, OME; extra `slides`) and large PNG files are read tile by tile. If a run is
    interrupted or killed, repeat the command with `--resume` to continue after the last finished image or tile.

    For QuPath and spreadsheets: `... --format geojson,csv`

    `predictions.json` is a list of COCO results plus `file_name`, the path as given. Image ids are the file names if
    all are numeric, as in COCO, otherwise they count from 1; see `manifest.json`. `predictions.jsonl` receives each
    image's results as soon as it is done, and survives interruption.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite starts over and --resume continues; give one of them.")
    options: dict[str, Any] = {
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "soft_nms": soft_nms or False,
        "max_objects": max_objects,
        "tile": tile,
        "overlap": overlap,
        "tta": tta,
        "channels": parse_channels(channels),
        "intensity": parse_intensity(intensity),
    }
    chosen = [name for given in formats or ["overlay,coco"] for name in given.split(",")]
    folder: PredictionFolder | None = None
    try:
        from a2fpn.cli.predictions import PredictionFolder  # takes a while, in which Ctrl-C may come

        paths = image_files(images)
        detector = load_detector(model, runtime=runtime)
        options |= parse_scale(scale, detector)
        # As JSON gives them back.
        about = {
            "model": model,
            "weights": weights_hash(detector),
            "optimize": optimize,
            "dtype": dtype,
            "gray_bits": gray_bits,
        }
        settings = json.loads(json.dumps({**about, "optimize": optimize, **options}))
        predictor = build_predictor(
            detector,
            device,
            optimize=optimize,
            dtype=dtype,
            max_pixels=max_pixels,
            gray_bits=gray_bits,
            batch=batch,
            workers=workers,
            **options,
        )
        folder = PredictionFolder(
            output,
            paths,
            settings,
            formats=chosen,
            categories=predictor.categories,
            overwrite=overwrite,
            resume=resume,
            reading=predictor.reading(),
        )
        _run(folder, predictor, quiet=quiet or str(save) == "-", save=save)
    except KeyboardInterrupt:
        typer.echo(_stopped(folder), err=True)
        raise typer.Exit(130) from None  # 128 and the number of the signal
    finally:
        if folder is not None:
            folder.close()


def _stopped(folder: PredictionFolder | None) -> str:
    """Say how far a run came that Ctrl-C has ended."""
    if folder is None or not (folder.objects or folder.journals):
        return "Stopped before the first image; nothing was written."
    done = f"after {len(folder.objects)} of {count_of(len(folder.jobs), 'image')}"
    for path, tiles in folder.journals.items():
        done = f"within {_shown(path.name)}, after {count_of(tiles, 'tile')}"
    return f"Stopped {done}; the results are in {_shown(folder.folder)}. Repeat the command with --resume to continue."


def _run(folder: PredictionFolder, predictor: Predictor, *, quiet: bool, save: Path | None) -> None:
    """Predict what has no results yet; what is found is on the disk whatever happens."""
    before, pending = len(folder.objects), folder.pending
    if before and not quiet:
        typer.echo(f"{count_of(before, 'image')} of {len(folder.jobs)} already done.", err=True)
    if folder.changed:
        typer.echo(f"{count_of(len(folder.changed), 'image')} changed since; their results are replaced.", err=True)
    if folder.edited:
        kept = name_some([_shown(name) for name in folder.edited])
        line = f"Changed since this run wrote them, so kept: {kept}. Delete a file to have it written again."
        typer.echo(line, err=True)
    seconds: list[float] = []
    try:
        with progress_bar(quiet=quiet) as progress:
            for job in progress.track(pending, description="predicting"):
                start = time.perf_counter()
                try:
                    tiled = predictor.options.tile is not None
                    result = _predict_tiles(folder, job, predictor, progress) if tiled else predictor([job.path])[0]
                    seconds.append(time.perf_counter() - start)
                    folder.add(job, result)
                except (ImageError, OSError) as error:
                    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                    if len(folder.jobs) == 1 or full:
                        raise
                    typer.echo(f"a2fpn: skipped {_shown(error)}", err=True)
    finally:
        folder.finish()
    objects = folder.objects
    if not objects:
        raise ConfigError(f"None of the {len(folder.jobs)} images could be read.")
    skipped = len(folder.pending)
    numbers = {
        "images": len(objects),
        "skipped": skipped,
        "objects": sum(objects.values()),
        "ms_per_image": round(1000 * statistics.median(seconds), 1) if seconds else None,
        "results": _shown(folder.results),
    }
    write_json(numbers, save)
    say(
        f"Found {count_of(sum(objects.values()), 'object')} in {count_of(len(objects), 'image')}"
        f"{f' ({skipped} more could not be read)' if skipped else ''}"
        f"{f', {1000 * statistics.median(seconds):.0f} ms per image' if seconds else ''}. "
        f"All results are in {_shown(folder.folder)}\nOpen {_shown(folder.best())}",
        quiet=quiet,
    )


def _predict_tiles(folder: PredictionFolder, job: Job, predictor: Predictor, progress: Progress) -> Result:
    """Predict an image tile by tile; tiles that an earlier run did are taken from the disk."""
    with predictor.open(job.path) as slide:
        windows = predictor.windows(slide)
        if len(windows) == 1:
            return predictor([job.path])[0]
        journal = folder.journal(job, windows)
        task = progress.add_task(f"tiles of {_shown(job.path.name)}", total=len(windows), completed=len(journal.tiles))
        try:
            for number, found in predictor.tiles(slide, skip=journal.tiles.keys()):
                journal.add(number, found)
                progress.advance(task)
        finally:
            progress.remove_task(task)
        result = predictor.join(slide, [journal.tiles[number] for number in range(len(windows))])
        picture = slide.thumbnail() if folder.draws else None
    return replace(result, path=os.fspath(job.path), reading=predictor.reading(), thumbnail=picture)


def _shown(text: object) -> str:
    """Text for people: bytes of file names that are no UTF-8 become question marks."""
    return os.fsencode(str(text)).decode("utf-8", "replace")


def image_files(sources: Sequence[Path]) -> list[Path]:
    """The given files, and the images of the given folders; what is left out of folders is told."""
    from a2fpn.inference import check_source, is_pattern, list_images

    for source in sources:
        check_source(source)
        if not source.exists() and not is_pattern(source):
            raise MissingFileError(f"{_shown(source)}: no such file or folder.")
    groups = []
    for source in sources:
        groups.append(list_images(source) if source.is_dir() or is_pattern(source) else [source])
        if source.is_dir():
            _tell_left_out(source, set(groups[-1]))
    return list(itertools.chain.from_iterable(groups))


def _tell_left_out(folder: Path, taken: set[Path]) -> None:
    """Say what of a folder is not read; hidden files are nobody's images."""
    others = [path for path in folder.iterdir() if path not in taken and not path.name.startswith(".")]
    kinds = Counter("sub-folder" if path.is_dir() else "unsupported file" for path in others)
    if kinds:
        parts = [f"{number} {kind}" if number == 1 else f"{number} {_PLURALS[kind]}" for kind, number in kinds.items()]
        typer.echo(f"{_shown(folder)}: {' and '.join(sorted(parts))} skipped.", err=True)


_PLURALS = {"sub-folder": "sub-folders", "unsupported file": "unsupported files"}
