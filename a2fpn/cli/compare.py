"""``a2fpn compare`` and ``a2fpn gallery``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer

from a2fpn.cli.format import progress_bar
from a2fpn.cli.options import Device, MaxObjects, Threshold, Tile, build_predictor, load_detector, short_names
from a2fpn.errors import ConfigError

if TYPE_CHECKING:
    from a2fpn.data import CocoFile
    from a2fpn.inference import Predictor
    from a2fpn.report.compare import Comparison

Images = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Image folder. Default: `images` next to the annotation folder; without --annotations, the bundled "
        "nuclei.",
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(help="COCO file with the ground truth to draw and score against.", metavar="JSON"),
]
Count = Annotated[int, typer.Option(min=1, help="Number of images to show.")]
Columns = Annotated[int, typer.Option(min=1, help="Images per row.")]
Among = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Consider only N randomly sampled images; default: all."),
]
Seed = Annotated[int, typer.Option(help="Random seed for choosing images.")]


def compare(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoint folders, or names from `a2fpn list --pretrained`.", metavar="MODEL")
    ],
    *,
    images: Images = None,
    annotations: Annotations = None,
    output: Annotated[Path, typer.Option(help="Output path, without a file extension.", metavar="PAGE")] = Path(
        "comparison"
    ),
    pick: Annotated[
        Literal["disagree", "random", "worst"],
        typer.Option(
            help="Images to show: where the first and last model differ most (half in favor of each), random ones, or "
            "those with the lowest AP."
        ),
    ] = "disagree",
    count: Count = 8,
    among: Among = None,
    columns: Columns = 4,
    score_threshold: Threshold = 0.5,
    max_objects: MaxObjects = None,
    tile: Tile = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Compare several models' detections on the same images: a PNG and PDF figure, and a page with a slider.

    Example: `a2fpn compare runs/fpn/best runs/a2fpn/best --annotations cells/instances_val.json --output figure`

    The figure has one row per model, below a row of ground truth if given, and says how images were chosen. With one
    class, an object has the same color in every row.
    """
    from a2fpn.report.compare import compare as compare_models
    from a2fpn.report.sheet import save_comparison

    if len(models) < 2:
        raise ConfigError("Expected two models or more; a2fpn gallery shows one.")
    folder, files, coco = _images(images, annotations)
    some = _drawn(files, among, seed)
    named = zip(short_names(models), models, strict=True)
    predictors = {name: _predictor(model, device, tile, max_objects) for name, model in named}
    comparison = compare_models(
        predictors,
        some,
        coco=coco,
        folder=folder,
        pick=pick,
        count=count,
        score_threshold=score_threshold,
        seed=seed,
        track=_track,
    )
    comparison = _told(comparison, some, files)
    typer.echo(comparison.note)
    typer.echo(f"Open {save_comparison(comparison, output, columns=columns)[-1]}, or the PNG and PDF beside it")


def gallery(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, or name from `a2fpn list --pretrained`.", metavar="MODEL")
    ],
    *,
    images: Images = None,
    annotations: Annotations = None,
    output: Annotated[Path, typer.Option(help="Output path, without a file extension.", metavar="PAGE")] = Path(
        "gallery"
    ),
    pick: Annotated[
        Literal["random", "worst"],
        typer.Option(help="Images to show: random ones, or those with the lowest AP (needs --annotations)."),
    ] = "random",
    count: Count = 12,
    among: Among = None,
    columns: Columns = 4,
    score_threshold: Threshold = 0.5,
    max_objects: MaxObjects = None,
    tile: Tile = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Show the detections of one model on many images, as a PNG and PDF figure that says how they were chosen.

    Example: `a2fpn gallery runs/htc/best --images photos --output figure`
    """
    from a2fpn.report.compare import compare as compare_models
    from a2fpn.report.sheet import save_gallery

    folder, files, coco = _images(images, annotations)
    some = _drawn(files, among, seed)
    comparison = compare_models(
        {short_names([model])[0]: _predictor(model, device, tile, max_objects)},
        some,
        coco=coco if pick == "worst" else None,
        folder=folder,
        pick=pick,
        count=count,
        score_threshold=score_threshold,
        seed=seed,
        track=_track,
    )
    alone = [dataclasses.replace(column, cells=column.cells[-1:]) for column in comparison.columns]
    shown = _told(dataclasses.replace(comparison, rows=comparison.rows[-1:], columns=tuple(alone)), some, files)
    typer.echo(shown.note)
    typer.echo(f"Open {save_gallery(shown, output, columns=columns)[0]}, or the PDF beside it")


def _images(images: Path | None, annotations: Path | None) -> tuple[Path, list[Path], CocoFile | None]:
    """Folder, files and annotations to choose from."""
    from a2fpn.cli.demo import DEMO_DATA
    from a2fpn.data import read_coco
    from a2fpn.data.images import image_path
    from a2fpn.inference import list_images

    if images is None and annotations is None:
        images, annotations = DEMO_DATA / "images", DEMO_DATA / "annotations.json"
    if annotations is None:
        assert images is not None
        return images, list_images(images), None
    folder = images or annotations.resolve().parent.parent / "images"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of images; give --images.")
    coco = read_coco(annotations)
    return folder, [image_path(folder, entry.file_name) for entry in coco.images.values()], coco


def _drawn(files: list[Path], count: int | None, seed: int) -> list[Path]:
    """So many of the files, drawn at random, in their order; all for None."""
    if count is None or count >= len(files):
        return files
    return [files[position] for position in sorted(np.random.default_rng(seed).permutation(len(files))[:count])]


def _told(comparison: Comparison, some: Sequence[Path], files: Sequence[Path]) -> Comparison:
    """The comparison, whose note tells of images that nobody looked at."""
    if len(some) == len(files):
        return comparison
    drawn = f" These {len(some)} images were drawn at random from {len(files)}."
    return dataclasses.replace(comparison, note=comparison.note + drawn)


def _predictor(model: str, device: str | None, tile: int | None, max_objects: int | None) -> Predictor:
    """A predictor of all that the model finds, since average precision takes objects of all scores."""
    detector = load_detector(model)
    own = detector.rule.score_threshold
    options = {"tile": tile, "score_threshold": own, "max_objects": max_objects}
    return build_predictor(detector, device, optimize=False, dtype="float32", **options)


def _track(paths: Sequence[Path]) -> Iterator[Path]:
    with progress_bar() as progress:
        yield from progress.track(paths, description="predicting")
