"""``a2fpn predict``."""

from __future__ import annotations

import errno
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from a2fpn.cli.format import count_of, progress_bar, say, write_json
from a2fpn.cli.options import (
    Device,
    GrayBits,
    Json,
    MaxPixels,
    Model,
    MostObjects,
    Nms,
    Optimize,
    Output,
    Overlap,
    Precision,
    Quiet,
    RuntimeName,
    SoftNmsKind,
    Threshold,
    Tile,
    Tta,
    build_predictor,
    load_detector,
)
from a2fpn.cli.predictions import PredictionFolder
from a2fpn.config import MAX_PIXELS, SCORE_THRESHOLD
from a2fpn.errors import ConfigError, ImageError, MissingFileError

if TYPE_CHECKING:
    from a2fpn.inference import Predictor


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files and folders of images.", metavar="IMAGE_OR_FOLDER")],
    *,
    model: Model,
    output: Output = Path("predictions"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names in DIR.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that DIR holds: what is done is skipped.")
    ] = False,
    score_threshold: Threshold = SCORE_THRESHOLD,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    tta: Tta = False,
    nms_threshold: Nms = None,
    soft_nms: SoftNmsKind = None,
    detections_per_image: MostObjects = None,
    optimize: Optimize = False,
    dtype: Precision = "float32",
    max_pixels: MaxPixels = MAX_PIXELS,
    gray_bits: GrayBits = 16,
    runtime: RuntimeName = None,
    device: Device = None,
    quiet: Quiet = False,
    save: Json = None,
) -> None:
    """Find objects in images: a picture for each, and all results as COCO JSON.

    Example: `a2fpn predict photos/ extra.jpg --model runs/cells --output found`

    A slide of many thousand pixels: `a2fpn predict slide.png --model runs/cells --tile 1024`

    The file `predictions.json` is a list of COCO results, to which `file_name` is added, the path as given. Where all
    file names are numbers, as in COCO, these are the image ids; otherwise images count from 1; `manifest.json` holds
    the table. Results are in `predictions.jsonl` as soon as an image is done, and stay there after Ctrl-C.
    """
    if overwrite and resume:
        raise ConfigError("--overwrite starts anew and --resume continues; give one of them.")
    options = {
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "soft_nms": soft_nms or False,
        "detections_per_image": detections_per_image,
        "tile": tile,
        "overlap": overlap,
        "tta": tta,
    }
    settings = {"model": model, "optimize": optimize, "dtype": dtype, "gray_bits": gray_bits, **options}
    folder: PredictionFolder | None = None
    try:
        paths = image_files(images)
        predictor = build_predictor(
            load_detector(model, runtime=runtime),
            device,
            optimize=optimize,
            dtype=dtype,
            max_pixels=max_pixels,
            gray_bits=gray_bits,
            **options,
        )
        folder = PredictionFolder(output, paths, settings, overwrite=overwrite, resume=resume)
        _run(folder, predictor, quiet=quiet or str(save) == "-", save=save)
    except KeyboardInterrupt:
        if folder is None or not folder.objects:
            typer.echo("Stopped before the first image; nothing was written.", err=True)
        else:
            typer.echo(
                f"Stopped after {len(folder.objects)} of {count_of(len(folder.jobs), 'image')}; their results are in "
                f"{_shown(folder.folder)}. The same command with --resume does the others.",
                err=True,
            )
        raise typer.Exit(130) from None  # 128 and the number of the signal


def _run(folder: PredictionFolder, predictor: Predictor, *, quiet: bool, save: Path | None) -> None:
    """Predict what has no results yet; what is found is on the disk whatever happens."""
    before, pending = len(folder.objects), folder.pending
    if before and not quiet:
        typer.echo(f"{count_of(before, 'image')} of {len(folder.jobs)} done before.", err=True)
    seconds: list[float] = []
    try:
        with progress_bar(quiet=quiet) as progress:
            for job in progress.track(pending, description="predicting"):
                start = time.perf_counter()
                try:
                    (result,) = predictor([job.path])
                    seconds.append(time.perf_counter() - start)
                    folder.add(job, result.to_coco(job.image_id), result.plot(score_threshold=0))
                except (ImageError, OSError) as error:
                    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                    if len(folder.jobs) == 1 or full:
                        raise
                    typer.echo(f"a2fpn: skipped {_shown(error)}", err=True)
    finally:
        results = folder.finish()
    objects = folder.objects
    if not objects:
        raise ConfigError(f"None of the {len(folder.jobs)} images could be read.")
    skipped = len(folder.pending)
    numbers = {
        "images": len(objects),
        "skipped": skipped,
        "objects": sum(objects.values()),
        "ms_per_image": round(1000 * statistics.median(seconds), 1) if seconds else None,
        "results": _shown(results),
    }
    write_json(numbers, save)
    say(
        f"Found {count_of(sum(objects.values()), 'object')} in {count_of(len(objects), 'image')}"
        f"{f' ({skipped} more could not be read)' if skipped else ''}"
        f"{f', {1000 * statistics.median(seconds):.0f} ms per image' if seconds else ''}. "
        f"All results are in {_shown(results)}\nOpen {_shown(folder.folder / max(objects, key=objects.__getitem__))}",
        quiet=quiet,
    )


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
    kinds = Counter("sub-folder" if path.is_dir() else "file of another kind" for path in others)
    if kinds:
        parts = [f"{number} {kind}" if number == 1 else f"{number} {_PLURALS[kind]}" for kind, number in kinds.items()]
        verb = "is" if len(others) == 1 else "are"
        typer.echo(f"{_shown(folder)}: {' and '.join(sorted(parts))} {verb} left out.", err=True)


_PLURALS = {"sub-folder": "sub-folders", "file of another kind": "files of other kinds"}
