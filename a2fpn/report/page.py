"""Report as one self-contained HTML page."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from a2fpn._version import __version__
from a2fpn.data import CocoFile, read_coco, read_image
from a2fpn.data.images import image_path
from a2fpn.errors import ConfigError
from a2fpn.evaluation import CocoMetrics, evaluate_coco
from a2fpn.report import figures
from a2fpn.report.analysis import Analysis, analyze
from a2fpn.report.facts import merged_facts
from a2fpn.report.matching import Floats, Kind, Scene
from a2fpn.report.outlines import data_uri, rings_of, svg_path
from a2fpn.report.precision import interval, mean, resampled_ap, resampling
from a2fpn.report.tide import DESCRIPTIONS

_METRICS = {
    "ap": "AP, mean of IoU 0.50 to 0.95",
    "ap50": "AP at IoU 0.50",
    "ap75": "AP at IoU 0.75",
    "ap_small": "AP, small objects (below 32² px)",
    "ap_medium": "AP, medium objects",
    "ap_large": "AP, large objects (above 96² px)",
    "ar1": "AR, 1 detection per image",
    "ar10": "AR, 10 detections per image",
    "ar100": "AR, {limit} detections per image",
    "ar": "AR of keypoints",
    "ar50": "AR of keypoints at OKS 0.50",
    "ar75": "AR of keypoints at OKS 0.75",
    "ar_small": "AR, small objects",
    "ar_medium": "AR, medium objects",
    "ar_large": "AR, large objects",
}
_KINDS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints (OKS)"}
_DRAWN = 640  # long side of an image in the page, pixels


@dataclass(frozen=True)
class Run:
    """Detections and facts of one model.

    Args:
        name: Name for headings.
        detections: COCO results of all images.
        facts: Facts for a table, see :func:`a2fpn.report.model_facts`.
    """

    name: str
    detections: Sequence[Mapping[str, Any]]
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """Format the number with its sign."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def certain(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def write_report(
    path: str | Path,
    ground_truth: str | Path | Mapping[str, Any] | CocoFile,
    images: str | Path,
    runs: Sequence[Run],
    *,
    iou_types: Sequence[str] | None = None,
    max_detections: int = 100,
    score_threshold: float = 0.5,
    worst: int = 24,
    gray_bits: int = 16,
    resamples: int = 1000,
    data: Mapping[str, str] | None = None,
    metrics: Sequence[CocoMetrics] | None = None,
) -> Path:
    """Write a page that analyzes the errors of one model, or the differences of two.

    Everything but the table of COCO metrics uses masks if annotations and detections have them, else boxes.

    Args:
        path: The HTML file; missing folders are created.
        ground_truth: Annotations, as for :func:`a2fpn.evaluation.evaluate_coco`.
        images: Folder of the images, for the pictures.
        runs: One or two models; the second is compared with the first.
        iou_types: IoU types to evaluate; None for boxes, and masks if the annotations and all detections have them.
        max_detections: Maximum number of detections per image and class; COCO uses 100.
        score_threshold: Detections with a lower score count in curves only.
        worst: Number of images to show.
        gray_bits: Bits used by their gray values, see :func:`a2fpn.data.read_image`.
        resamples: Number of bootstrap resamples of the images, for the intervals.
        data: Facts of the data, see :func:`a2fpn.report.data_facts`.
        metrics: COCO metrics of each run, if already computed.

    Returns:
        The file.

    Raises:
        DataError: If the ground truth is not a COCO file.
        ConfigError: Unless there are one or two runs, or if the data have no images.
        ValueError: If a detection can't be evaluated.
    """
    if len(runs) not in (1, 2):
        raise ConfigError(f"A report supports one or two models, got {len(runs)}.")
    coco = read_coco(ground_truth)
    if not coco.images:
        raise ConfigError(f"{coco.name} has no images to report on.")
    masks = coco.has_masks and all("segmentation" in d for run in runs for d in run.detections)
    kinds = list(iou_types or (["bbox", "segm"] if masks else ["bbox"]))
    measured = metrics or [
        evaluate_coco(coco, run.detections, iou_types=kinds, max_detections=max_detections) for run in runs
    ]
    kind: Kind = "segm" if masks and "segm" in kinds else "bbox"
    analyses = [
        analyze(
            Scene.of(coco, run.detections, kind=kind, max_detections=max_detections), score_threshold=score_threshold
        )
        for run in runs
    ]
    draws = resampling(len(coco.images), resamples=resamples)
    resampled = [resampled_ap(analysis.scene, analysis.matches, draws) for analysis in analyses]
    page = _template().render(
        title=f"{' against '.join(run.name for run in runs)} on {Path(coco.name).name}",
        version=__version__,
        runs=runs,
        colors=figures.MODEL_COLORS,
        kind=_KINDS[kind],
        images=len(coco.images),
        limit=max_detections,
        resamples=resamples,
        threshold=score_threshold,
        sentences=[_sentence(run, analysis, score_threshold) for run, analysis in zip(runs, analyses, strict=True)],
        verdict=_verdict(analyses, resampled) if len(runs) == 2 else "",
        coco_table=_coco_table(measured, max_detections),
        intervals=_intervals(analyses, resampled),
        classes=_class_table(analyses, resampled),
        panels=[_panels(analysis, score_threshold) for analysis in analyses],
        groups={
            name: figures.group_bars([analysis.groups[name] for analysis in analyses])
            for name in analyses[0].groups
            if analyses[0].groups[name]
        },
        error_figure=figures.error_bars(analyses),
        errors=[
            (name, text, [(a.errors.counts[name], a.errors.cost[name]) for a in analyses])
            for name, text in DESCRIPTIONS.items()
        ],
        pictures=[_picture(position, coco, Path(images), analyses, gray_bits) for position in _worst(analyses, worst)],
        model_facts=merged_facts([run.facts for run in runs]),
        data_facts=data or {},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


@functools.cache
def environment() -> jinja2.Environment:
    """Load the packaged templates, with autoescaping."""
    folder = Path(str(resources.files("a2fpn"))) / "assets" / "report"
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    found.filters["number"] = lambda value: "–" if value is None or np.isnan(value) or value < 0 else f"{value:.3f}"
    return found


def _template() -> jinja2.Template:
    return environment().get_template("report.html.j2")


def _sentence(run: Run, analysis: Analysis, threshold: float) -> str:
    """Summarize a model in a sentence."""
    matrix = analysis.outcome.confusion(analysis.scene)
    right, shown = int(matrix.diagonal()[:-1].sum()), int(analysis.outcome.shown.sum())
    objects = int(analysis.scene.positives.sum())
    costliest = max(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), key=lambda name: analysis.errors.cost[name])
    text = (
        f"{run.name} finds {right} of {objects} objects with a score of {threshold:g} or more, "
        f"and {shown - right} of its {shown} detections are wrong. Its costliest type of error is "
        f"{costliest} ({DESCRIPTIONS[costliest]}): {analysis.errors.cost[costliest]:.3f} of AP50."
    )
    best = analysis.operating.best
    if best is not None:
        curve = analysis.operating
        text += (
            f" The best F1, {curve.f1[best]:.3f}, is at a score threshold of {curve.threshold[best]:.2f} (precision "
            f"{curve.precision[best]:.3f}, recall {curve.recall[best]:.3f}). "
        )
    return text + f"The expected calibration error of its scores is {analysis.calibration.ece:.3f}."


def _verdict(analyses: Sequence[Analysis], resampled: Sequence[Floats]) -> str:
    difference = _difference(analyses, resampled, slice(None))
    if difference.certain:
        return f"The second model's AP is {'higher' if difference.value > 0 else 'lower'}: {difference.signed}."
    return f"These images do not tell which model is better: the difference in AP is {difference.signed}."


def _mean_over_classes(values: Floats) -> Floats:
    """Mean of (B, T, K) to (B,), ignoring NaN."""
    return np.array([mean(each) for each in values])


def _single(analysis: Analysis, values: Floats, thresholds: slice) -> Interval:
    value = mean(analysis.precision.per_class[thresholds])
    return Interval(value, *interval(_mean_over_classes(values[:, thresholds])))


def _difference(analyses: Sequence[Analysis], resampled: Sequence[Floats], thresholds: slice) -> Interval:
    """AP of the second model minus that of the first, on the same resamples."""
    first, second = (mean(a.precision.per_class[thresholds]) for a in analyses)
    before, after = (_mean_over_classes(values[:, thresholds]) for values in resampled)
    return Interval(second - first, *interval(after - before))


def _intervals(analyses: Sequence[Analysis], resampled: Sequence[Floats]) -> list[tuple[str, list[str], str, bool]]:
    """Rows of name, values with intervals, difference, and its significance, for AP, AP50 and AP75."""
    rows = []
    for name, thresholds in {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}.items():
        cells = [str(_single(a, values, thresholds)) for a, values in zip(analyses, resampled, strict=True)]
        difference = _difference(analyses, resampled, thresholds) if len(analyses) == 2 else None
        rows.append((name, cells, difference.signed if difference else "", bool(difference and difference.certain)))
    return rows


def _coco_table(measured: Sequence[CocoMetrics], limit: int) -> list[tuple[str, Sequence[str | float | None]]]:
    """Rows of a label and values, one per model and IoU type."""
    tables = [metrics.to_dict() for metrics in measured]
    kinds = list(measured[0].measured)
    rows: list[tuple[str, Sequence[str | float | None]]] = [("", [_KINDS[kind] for _ in tables for kind in kinds])]
    for key, label in _METRICS.items():
        cells = [table.get(f"{kind}/{key}") for table in tables for kind in kinds]
        if any(cell is not None for cell in cells):
            rows.append((label.format(limit=limit), cells))
    return rows


def _class_table(analyses: Sequence[Analysis], resampled: Sequence[Floats]) -> list[dict[str, Any]]:
    """Rows for the classes with objects, the worst first."""
    scene = analyses[0].scene
    objects = np.bincount(scene.truth.label[scene.positives], minlength=len(scene.names))
    rows = []
    for label in np.flatnonzero(objects).tolist():
        cells = [
            (p[:, label].mean(), p[0, label], p[5, label], a.precision.recall[0, label])
            for a in analyses
            for p in [a.precision.per_class]
        ]
        row: dict[str, Any] = {"name": scene.names[label], "objects": int(objects[label]), "cells": cells}
        if len(analyses) == 2:
            before, after = (values[:, :, label].mean(1) for values in resampled)
            difference = Interval(cells[1][0] - cells[0][0], *interval(after - before))
            row |= {"difference": difference.signed, "certain": difference.certain}
        rows.append(row)
    return sorted(rows, key=lambda row: float(np.mean([cell[0] for cell in row["cells"]])))


def _panels(analysis: Analysis, threshold: float) -> dict[str, str]:
    """Figures of a single model, by name."""
    return {
        "curve": figures.precision_recall(analysis),
        "operating": figures.operating_curve(analysis, score_threshold=threshold),
        "confusion": figures.confusion(analysis.outcome.confusion(analysis.scene), analysis.scene.names),
        "reliability": figures.reliability(analysis),
    }


def _worst(analyses: Sequence[Analysis], count: int) -> list[int]:
    """Images with the lowest F1, averaged over the models; ties by more objects first."""
    scene = analyses[0].scene
    objects = np.bincount(scene.truth.image, minlength=len(scene.image_ids))
    score = np.mean([analysis.image_f1 for analysis in analyses], axis=0)
    order = np.lexsort((-objects, score))
    return [position for position in order.tolist() if score[position] < 1][:count]


def _picture(
    position: int, coco: CocoFile, images: Path, analyses: Sequence[Analysis], gray_bits: int
) -> dict[str, Any]:
    """Build an image with each model's hits, misses, misclassifications and false positives, as SVG paths."""
    entry = coco.images[analyses[0].scene.image_ids[position]]
    file = image_path(images, entry.file_name)
    pixels = read_image(file, size=(entry.height, entry.width), gray_bits=gray_bits).permute(1, 2, 0).numpy()
    return {
        "name": entry.file_name,
        "width": entry.width,
        "height": entry.height,
        "uri": data_uri(pixels, longest=_DRAWN),
        "overlays": [_overlay(position, analysis) for analysis in analyses],
    }


def _overlay(position: int, analysis: Analysis) -> dict[str, Any]:
    scene, outcome = analysis.scene, analysis.outcome
    found, truth = scene.found, scene.truth
    groups: dict[str, list[tuple[str, str]]] = {"found": [], "missed": [], "invented": [], "misnamed": []}
    for row in np.flatnonzero(outcome.shown & (found.image == position)).tolist():
        partner = outcome.partner[row]
        label = scene.names[found.label[row]]
        text = f"{label} {found.score[row]:.2f}"
        if partner < 0:
            group = "invented"
        elif truth.label[partner] == found.label[row]:
            group = "found"
        else:
            group, text = "misnamed", f"{text}, annotated as {scene.names[truth.label[partner]]}"
        groups[group].append((svg_path(rings_of(found.box, found.rles, row)), text))
    for row in np.flatnonzero(scene.positives & (outcome.finder < 0) & (truth.image == position)).tolist():
        path = svg_path(rings_of(truth.box, truth.rles, row))
        groups["missed"].append((path, scene.names[truth.label[row]]))
    return {
        "groups": {name: [(Markup(path), text) for path, text in objects] for name, objects in groups.items()},
        "ap": analysis.image_ap[position],
        "f1": analysis.image_f1[position],
    }
