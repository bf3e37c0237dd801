"""``a2fpn evaluate``."""

from __future__ import annotations

import math
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from a2fpn._text import count_of
from a2fpn.cli.format import ap_text, as_text, progress_bar, say, table, write_json
from a2fpn.cli.options import (
    Device,
    GrayBits,
    Json,
    MaxObjects,
    Nms,
    Optimize,
    Overlap,
    Precision,
    Quiet,
    SoftNmsKind,
    Tile,
    Tta,
    build_predictor,
    load_checkpoint,
    load_detector,
    short_names,
)
from a2fpn.cli.report import Reported, write_page
from a2fpn.config import SCORE_THRESHOLD, KeypointRCNNConfig
from a2fpn.errors import ConfigError

if TYPE_CHECKING:
    from a2fpn.data import CocoDataset
    from a2fpn.data.coco_file import CocoFile
    from a2fpn.detectors import Detector
    from a2fpn.evaluation import CocoMetrics
    from a2fpn.inference import Predictor
    from a2fpn.inference.exported import ExportedDetector


METRICS = {
    "ap": "AP, mean of IoU 0.50 to 0.95",
    "ap50": "AP at IoU 0.50",
    "ap75": "AP at IoU 0.75",
    "ap_small": "AP, small objects",
    "ap_medium": "AP, medium objects",
    "ap_large": "AP, large objects",
    "ar1": "AR, 1 detection per image",
    "ar10": "AR, 10 detections per image",
    "ar100": "AR, {max_detections} detections per image",
    "ar": "AR of keypoints, mean of OKS 0.50 to 0.95",
    "ar50": "AR of keypoints at OKS 0.50",
    "ar75": "AR of keypoints at OKS 0.75",
    "ar_small": "AR, small objects",
    "ar_medium": "AR, medium objects",
    "ar_large": "AR, large objects",
}


INSTANCE_METRICS = {
    "objects": "Objects",
    "found": "Found",
    "precision@0.50": "Precision at IoU 0.50",
    "recall@0.50": "Recall at IoU 0.50",
    "f1@0.50": "F1 at IoU 0.50",
    "f1@0.70": "F1 at IoU 0.70",
    "f1@0.90": "F1 at IoU 0.90",
    "average_f1": "F1, mean of images and IoU 0.50 to 0.95",
    "bowl_score": "TP / (TP + FP + FN), the same mean (Data Science Bowl)",
    "pq": "Panoptic quality",
    "sq": "Segmentation quality, mean IoU of matches",
    "aji": "Aggregated Jaccard index",
    "count_bias": "Count per image, bias",
    "count_mae": "Count per image, mean absolute error",
    "count_r2": "Count per image, R²",
}


def evaluate(
    *,
    model: Annotated[
        list[str],
        typer.Option(
            help="Checkpoint folder, or name from `a2fpn list --pretrained`. Repeat with --report to compare two "
            "models.",
            metavar="NAME_OR_PATH",
        ),
    ],
    images: Annotated[Path, typer.Option(help="Image folder.", metavar="DIR")],
    annotations: Annotated[Path, typer.Option(help="COCO file with the ground truth.", metavar="JSON")],
    max_detections: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum detections per image and class; default: 100 as in COCO, or --max-objects if larger.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        Literal["coco", "instances"],
        typer.Option(
            help="Metrics: coco for AP and AR; instances for F1 by IoU, PQ, AJI, count errors and the Data Science "
            "Bowl score, at one confidence threshold and without overlaps."
        ),
    ] = "coco",
    score_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Confidence threshold for --metrics instances.", show_default="0.5"),
    ] = None,
    save: Json = None,
    quiet: Quiet = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML report on errors by type and the worst images.", metavar="HTML"),
    ] = None,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    tta: Tta = False,
    nms_threshold: Nms = None,
    soft_nms: SoftNmsKind = None,
    max_objects: MaxObjects = None,
    gray_bits: GrayBits = 16,
    optimize: Optimize = False,
    dtype: Precision = "float32",
    device: Device = None,
    oks_sigmas: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="OKS sigmas, one per keypoint, relative to the object size; default: those of COCO's 17 keypoints.",
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "hotcoco", "pycocotools"],
        typer.Option(help="Evaluation backend; auto is hotcoco. All agree; pycocotools is the slow reference."),
    ] = "auto",
) -> None:
    """Evaluate a model on annotated images: COCO metrics for boxes, masks and keypoints, and AP per class.

    Example: `a2fpn evaluate --model runs/cells/best --images cells/val --annotations cells/val.json`

    Metrics at a single confidence threshold: `... --metrics instances --score-threshold 0.6`

    Error analysis: `... --report page.html`. Compare two models: `... --model runs/b/best --report page.html`

    Evaluates the outputs that both the model and the annotations have. Categories are matched by id. An unreadable
    image is an error: if skipped, its objects would count as missed.
    """
    from a2fpn.evaluation import COCO_SIGMAS, common_iou_types, evaluate_coco

    if score_threshold is not None and metrics != "instances":
        raise ConfigError("--score-threshold requires --metrics instances; COCO's AP ranks all detections by score.")
    if len(model) > 2 or (len(model) == 2 and report is None):
        raise ConfigError(f"Expected one --model, or two with --report, got {len(model)}.")
    if report is not None and metrics == "instances":
        raise ConfigError("--report supports COCO's metrics only; omit --metrics instances.")
    quiet = quiet or str(save) == "-"
    limit = max(100, max_objects or 0) if max_detections is None else max_detections
    tables: dict[str, CocoMetrics] = {}
    pages: list[Reported] = []
    for name, short in zip(model, short_names(model), strict=True):
        detector = load_detector(name) if report is None else load_checkpoint(name)
        dataset = open_annotated(detector, images, annotations)
        kinds = common_iou_types(dataset.coco, detector.target_keys)
        if "keypoints" in kinds:
            _check_keypoints(detector, dataset)
        if report is not None:
            pages.append(Reported.of(short, typing.cast("Detector", detector)))
        predictor = build_predictor(
            detector,
            device,
            optimize=optimize,
            dtype=dtype,
            nms_threshold=nms_threshold,
            soft_nms=soft_nms or False,
            max_objects=max_objects,
            tile=tile,
            overlap=overlap,
            tta=tta,
            gray_bits=gray_bits,
        )
        title = f"{name} on {count_of(len(dataset), 'image')}"
        if metrics == "coco":
            _tell_uncounted(dataset.coco, limit)
        records = predict_annotated(predictor, dataset, images, quiet=quiet)
        if metrics == "instances":
            threshold = SCORE_THRESHOLD if score_threshold is None else score_threshold
            _evaluate_instances(dataset, records, threshold, title, save, quiet=quiet)
            return
        tables[name] = evaluate_coco(
            dataset.coco,
            records if report is None else pages[-1].keep(records),
            iou_types=kinds,
            max_detections=limit,
            oks_sigmas=COCO_SIGMAS if oks_sigmas is None else _numbers(oks_sigmas),
            backend=backend,
        )
        if not quiet:
            _print_metrics(tables[name], title=title)
    numbers = {name: {"max_detections": limit, **t.to_dict(per_class=True)} for name, t in tables.items()}
    _save(numbers[model[0]] if len(model) == 1 else numbers, save, quiet=quiet)
    if report is not None:
        write_page(report, pages, list(tables.values()), images, annotations, gray_bits=gray_bits)


def open_annotated(detector: Detector | ExportedDetector, images: Path, annotations: Path) -> CocoDataset:
    """Annotated images of a detector's classes.

    Raises:
        ValueError: If model and data mean different things by a category.
    """
    from a2fpn.data import CocoDataset

    dataset = CocoDataset(images, annotations, categories=detector.config.categories or None)
    _check_categories(detector, dataset)
    return dataset


def predict_annotated(
    predictor: Predictor, dataset: CocoDataset, images: Path, *, quiet: bool = False
) -> Iterator[dict[str, Any]]:
    """Predict the images of a data set as COCO results; classes that it lacks are dropped.

    Images that reach the limit of objects are told of at the end.
    """
    from a2fpn.data.images import image_path, read_image

    predictor.categories = dataset.categories
    known = {category.id for category in dataset.coco.categories}
    most, full = predictor.options.max_objects or predictor.model.rule.detections_per_image, 0
    with progress_bar(quiet=quiet) as progress:
        for entry in progress.track(list(dataset.coco.images.values()), description="evaluating"):
            file = image_path(images, entry.file_name)
            size = (entry.height, entry.width)
            (result,) = predictor.predict([read_image(file, size=size, gray_bits=predictor.gray_bits)])
            full += predictor.options.tile is None and len(result) >= most
            yield from (record for record in result.to_coco(entry.id) if record["category_id"] in known)
    if full:
        typer.echo(
            f"{full} of {count_of(len(dataset.coco.images), 'image')} reach the limit of {most} objects; raise "
            "--max-objects.",
            err=True,
        )


def _tell_uncounted(coco: CocoFile, limit: int) -> None:
    """Say so where more objects are annotated than detections count."""
    counts = Counter((image, a.category_id) for image, own in coco.annotations.items() for a in own if not a.iscrowd)
    most = max(counts.values(), default=0)
    if most > limit:
        typer.echo(
            f"{coco.name} has up to {most} objects of a class per image, but only the best {limit} detections are "
            f"evaluated; set --max-detections {most} or more, and --max-objects if the model keeps fewer.",
            err=True,
        )


def _evaluate_instances(
    dataset: CocoDataset,
    records: Iterable[Mapping[str, Any]],
    threshold: float,
    title: str,
    save: Path | None,
    *,
    quiet: bool,
) -> None:
    from a2fpn.instance_metrics import evaluate_instances

    results = evaluate_instances(dataset.coco, records, score_threshold=threshold)
    grid = table("", *map(escape, results))
    for key, label in INSTANCE_METRICS.items():
        values = [result.to_dict()[key] for result in results.values()]
        grid.add_row(label, *("-" if math.isnan(value) else f"{value:.3f}" for value in values))
    if not quiet:
        typer.echo(f"{title}, objects with a score of {threshold} or more")
        Console().print(grid)
    numbers = {f"{name}/{key}": value for name, result in results.items() for key, value in result.to_dict().items()}
    # JSON has no NaN.
    known = {key: None if math.isnan(value) else value for key, value in numbers.items()}
    _save({"score_threshold": threshold, **known}, save, quiet=quiet)


def _save(numbers: Mapping[str, Any], path: Path | None, *, quiet: bool) -> None:
    write_json(numbers, path)
    if path is not None:
        say(f"The numbers are in {path}", quiet=quiet)


def _check_categories(detector: Detector | ExportedDetector, dataset: CocoDataset) -> None:
    """Stop where model and data mean different things by the same category."""
    if not detector.config.categories and detector.config.num_classes != len(dataset.categories):
        raise ConfigError(
            f"The model was saved without categories and has {detector.config.num_classes} classes, "
            f"{dataset.coco.name} has {len(dataset.categories)}; the classes can't be matched."
        )
    names = {category.id: category.name for category in dataset.categories}
    for category in dataset.coco.categories:
        if names.get(category.id, category.name).casefold() != category.name.casefold():
            raise ConfigError(
                f"Category {category.id} is {category.name!r} in {dataset.coco.name} and {names[category.id]!r} for "
                f"the model; give both the same ids and names."
            )


def _check_keypoints(detector: Detector | ExportedDetector, dataset: CocoDataset) -> None:
    """Stop where model and data have other keypoints."""
    heads, coco = detector.config.heads, dataset.coco
    assert isinstance(heads, KeypointRCNNConfig)
    if heads.num_keypoints != coco.num_keypoints:
        raise ConfigError(f"The model gives {heads.num_keypoints} keypoints, {coco.name} has {coco.num_keypoints}.")
    if heads.keypoint_names and coco.keypoint_names and heads.keypoint_names != coco.keypoint_names:
        raise ConfigError(
            f"The model's keypoints are {as_text(heads.keypoint_names)}, those of {coco.name} are "
            f"{as_text(coco.keypoint_names)}; give both the same names in the same order."
        )


def _numbers(text: str) -> list[float]:
    """Numbers of an option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"Expected comma-separated numbers, such as 0.026,0.025, got {text!r}.") from None


def _print_metrics(metrics: CocoMetrics, *, title: str) -> None:
    measured = metrics.measured
    columns = [{"bbox": "boxes", "segm": "masks", "keypoints": "keypoints (OKS)"}[kind] for kind in measured]
    tables = [(title, {label.format(max_detections=metrics.max_detections): key for key, label in METRICS.items()})]
    classes = next(iter(measured.values())).per_class
    if len(classes) > 1:
        tables.append(("AP per class", {name: f"ap/{name}" for name in classes}))
    for heading, keys in tables:
        grid = table("", *columns)
        for label, key in keys.items():
            cells = [ap_text(metrics, kind, key) for kind in measured]
            if any(cells):
                grid.add_row(escape(label), *cells)
        typer.echo(heading)
        Console().print(grid)
