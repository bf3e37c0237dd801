"""``a2fpn predict``."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from a2fpn.cli.format import count_of, progress_bar
from a2fpn.cli.options import (
    Device,
    Model,
    MostObjects,
    Nms,
    Optimize,
    Output,
    Overlap,
    Precision,
    SoftNmsKind,
    Threshold,
    Tile,
    Tta,
    build_predictor,
    load_detector,
)
from a2fpn.errors import ConfigError, MissingFileError

if TYPE_CHECKING:
    pass


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files and folders of images.", metavar="IMAGE_OR_FOLDER")],
    *,
    model: Model,
    output: Output = Path("predictions"),
    score_threshold: Threshold = 0.5,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    tta: Tta = False,
    nms_threshold: Nms = None,
    soft_nms: SoftNmsKind = None,
    detections_per_image: MostObjects = None,
    optimize: Optimize = False,
    dtype: Precision = "float32",
    device: Device = None,
) -> None:
    """Find objects in images: a picture for each, and all results as COCO JSON.

    Example: `a2fpn predict photos/ extra.jpg --model runs/cells --output found`

    A slide of many thousand pixels: `a2fpn predict slide.png --model runs/cells --tile 1024`

    The file `predictions.json` is a list of COCO results, to which `file_name` is added. Where all file names are
    numbers, as in COCO, these are the image ids; otherwise images count from 1.
    """
    from a2fpn.data import ImageError

    paths = image_files(images)
    if output.resolve() in {path.resolve().parent for path in paths}:
        raise ConfigError(f"--output {output} is a folder that images are read from; choose another one.")
    predictor = build_predictor(
        load_detector(model),
        device,
        optimize=optimize,
        dtype=dtype,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        soft_nms=soft_nms or False,
        detections_per_image=detections_per_image,
        tile=tile,
        overlap=overlap,
        tta=tta,
    )
    output.mkdir(parents=True, exist_ok=True)
    jobs = list(zip(paths, _image_ids(paths), _picture_files(paths, output), strict=True))

    records: list[dict[str, Any]] = []
    found: dict[Path, int] = {}
    seconds: list[float] = []
    with progress_bar() as progress:
        for path, image_id, picture in progress.track(jobs, description="predicting"):
            start = time.perf_counter()
            try:
                (result,) = predictor([path])
            except ImageError as error:
                if len(jobs) == 1:
                    raise
                typer.echo(f"a2fpn: skipped {error}", err=True)
                continue
            seconds.append(time.perf_counter() - start)
            records += [record | {"file_name": path.name} for record in result.to_coco(image_id)]
            result.plot(score_threshold=0).save(picture)
            found[picture] = len(result)
    if not found:
        raise ConfigError(f"None of the {len(jobs)} images could be read.")
    results = output / "predictions.json"
    results.write_text(json.dumps(records), encoding="utf-8")
    skipped = len(jobs) - len(found)
    typer.echo(
        f"Found {count_of(len(records), 'object')} in {count_of(len(found), 'image')}"
        f"{f' ({skipped} more could not be read)' if skipped else ''}, "
        f"{1000 * statistics.median(seconds):.0f} ms per image. All results are in {results}\n"
        f"Open {max(found, key=lambda picture: found[picture])}"
    )


def image_files(sources: Sequence[Path]) -> list[Path]:
    """The given files, and the images of the given folders."""
    from a2fpn.inference import list_images

    for source in sources:
        if not source.exists():
            raise MissingFileError(f"{source}: no such file or folder.")
    groups = [list_images(source) if source.is_dir() else [source] for source in sources]
    return list(itertools.chain.from_iterable(groups))


def _image_ids(paths: Sequence[Path]) -> list[int]:
    """COCO image ids: the file names where they are different numbers, else 1, 2, ..."""
    numbers = {int(path.stem) for path in paths if path.stem.isdecimal()}
    return [int(path.stem) for path in paths] if len(numbers) == len(paths) else list(range(1, len(paths) + 1))


def _picture_files(paths: Sequence[Path], output: Path) -> list[Path]:
    """Return the paths of the pictures: named as the images, numbered where names repeat."""
    names: dict[str, str] = {}  # by lower case: some file systems take both for one
    for path in paths:
        numbered = (f"{path.stem}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([path.stem], numbered) if name.lower() not in names)
        names[name.lower()] = name
    return [output / f"{name}.png" for name in names.values()]
