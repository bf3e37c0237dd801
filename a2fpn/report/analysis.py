"""Analysis of one model for a report: curves, confusions, groups of objects, errors, calibration, images.

Shape shorthand: N detections, M annotations, K classes, I images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from a2fpn.report.matching import Bools, Floats, Ints, Matches, Scene, match
from a2fpn.report.precision import Precision, interpolated, mean, precision
from a2fpn.report.tide import ErrorTypes, error_types

SIDES = (0.0, 16.0, 32.0, 64.0, 96.0, math.inf)
"""Bounds of the groups by size, the square root of the area in pixels, including COCO's 32 and 96."""
ELONGATIONS = (1.0, 1.25, 1.5, 2.0, 3.0, math.inf)
"""Bounds of the groups by elongation, the long side of the box over the short side."""
CROWDING = (1, 6, 16, 51, 151, math.inf)
"""Bounds of the groups by objects in the image."""
BINS = 10


@dataclass(frozen=True)
class Group:
    """AP of a group of objects.

    Args:
        label: Display text of the range.
        objects: Number of annotations.
        ap: Mean over IoU 0.50 to 0.95.
        ap50: At IoU 0.50.
    """

    label: str
    objects: int
    ap: float
    ap50: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """Matches of detections and annotations at a score threshold and IoU 0.50.

    Args:
        shown: (N,) detections above the threshold that are not in a crowd.
        partner: (N,) row of the annotation that a shown detection is matched to, preferably of its class, or -1.
        finder: (M,) row of that detection, or -1.
    """

    shown: Bools
    partner: Ints
    finder: Ints

    def confusion(self, scene: Scene) -> Ints:
        """Counts (K + 1, K + 1) by annotated class (rows) and detected class; the last is background."""
        background = len(scene.names)
        matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
        rows = np.flatnonzero(self.shown)
        partner = self.partner[rows]
        labels = np.append(scene.truth.label, background)
        places: Any = (labels[partner], scene.found.label[rows])  # partner -1 selects the last
        np.add.at(matrix, places, 1)
        missed = scene.positives & (self.finder < 0)
        matrix[:, -1] += np.bincount(scene.truth.label[missed], minlength=background + 1)
        return matrix


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores against the share of true positives at IoU 0.50.

    Args:
        count: (BINS,) detections with scores in bins of equal width.
        score: (BINS,) their mean score; NaN for an empty bin.
        right: (BINS,) share of true positives; NaN likewise.
        ece: Expected calibration error (Guo et al., ICML 2017): mean difference of the two, weighted by count.
    """

    count: Ints
    score: Floats
    right: Floats
    ece: float


@dataclass(frozen=True, eq=False)
class Operating:
    """Precision and recall of all classes together over the score threshold, at IoU 0.50.

    Args:
        threshold: (N,) scores, descending.
        precision: (N,) precision of detections with at least that score.
        recall: (N,) their recall.
    """

    threshold: Floats
    precision: Floats
    recall: Floats

    @property
    def f1(self) -> Floats:
        """(N,) harmonic mean of both."""
        total = np.maximum(self.precision + self.recall, 1e-12)
        harmonic: Floats = 2 * self.precision * self.recall / total
        return harmonic

    @property
    def best(self) -> int | None:
        """Position of the best F1; None without detections."""
        return int(self.f1.argmax()) if len(self.threshold) else None


@dataclass(frozen=True, eq=False)
class Analysis:
    """Results of the analysis of one model.

    Args:
        scene: The objects.
        matches: Matches at COCO's thresholds.
        precision: Precision-recall curves by class.
        outcome: Matches at the report's score threshold.
        errors: Errors by type.
        calibration: Calibration of the scores.
        operating: Precision and recall by score threshold.
        groups: AP of groups of objects, by criterion.
        image_ap: (I,) AP of each image alone; NaN without objects.
        image_f1: (I,) F1 at the score threshold; 1 for an image without annotations and detections.
    """

    scene: Scene
    matches: Matches
    precision: Precision
    outcome: Outcome
    errors: ErrorTypes
    calibration: Calibration
    operating: Operating
    groups: dict[str, list[Group]]
    image_ap: Floats
    image_f1: Floats


def analyze(scene: Scene, *, score_threshold: float = 0.5) -> Analysis:
    """Analyze a model's detections.

    Args:
        scene: Annotations and detections.
        score_threshold: Detections with a lower score are neither shown nor counted in confusions and per-image F1.
    """
    matches = match(scene)
    outcome = outcomes(scene, matches, score_threshold=score_threshold)
    truth, found = scene.truth, scene.found
    per_image = np.bincount(truth.image[scene.positives], minlength=len(scene.image_ids))
    return Analysis(
        scene=scene,
        matches=matches,
        precision=precision(scene, matches),
        outcome=outcome,
        errors=error_types(scene),
        calibration=calibration(scene, matches),
        operating=operating(scene, matches),
        groups={
            "size": grouped(scene, np.sqrt(truth.area), np.sqrt(found.area), SIDES, unit=" px"),
            "density": _by_image(scene, matches, per_image),
            "aspect": grouped(scene, truth.elongation, found.elongation, ELONGATIONS, unit=" : 1"),
        },
        image_ap=image_ap(scene, matches),
        image_f1=_image_f1(scene, outcome),
    )


def outcomes(scene: Scene, matches: Matches, *, score_threshold: float) -> Outcome:
    """Match detections and annotations; those unmatched within their class may match another class."""
    shown = (scene.found.score >= score_threshold) & ~matches.ignored[0]
    partner = np.where(shown, matches.partner[0], -1)
    finder = np.full(len(scene.truth), -1, dtype=np.int64)
    finder[partner[partner >= 0]] = np.flatnonzero(partner >= 0)
    for found_rows, truth_rows, overlaps in scene.images():
        rows = found_rows.start + np.flatnonzero(shown[found_rows] & (partner[found_rows] < 0))
        columns = truth_rows.start + np.flatnonzero(scene.positives[truth_rows] & (finder[truth_rows] < 0))
        shared = overlaps[np.ix_(rows - found_rows.start, columns - truth_rows.start)]
        for position in np.flatnonzero((shared >= 0.5).any(1) if shared.size else ()).tolist():
            column = int(shared[position].argmax())
            if shared[position, column] >= 0.5:
                partner[rows[position]], finder[columns[column]] = columns[column], rows[position]
                shared[:, column] = 0
    return Outcome(shown, partner, finder)


def calibration(scene: Scene, matches: Matches) -> Calibration:
    """Compare scores with the share of true positives, ignoring detections in crowds."""
    counted = ~matches.ignored[0]
    score, right = scene.found.score[counted], matches.right[0][counted]
    bins = np.minimum((score * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean_score = np.bincount(bins, score, minlength=BINS) / count
        share = np.bincount(bins, right, minlength=BINS) / count
    gap = np.nansum(count * np.abs(mean_score - share)) / max(1, count.sum())
    return Calibration(count, mean_score, share, float(gap))


def operating(scene: Scene, matches: Matches) -> Operating:
    """Compute precision and recall at every score, for all classes together."""
    rows = np.flatnonzero(~matches.ignored[0])
    rows = rows[np.argsort(-scene.found.score[rows], kind="stable")]
    hits = matches.right[0][rows].cumsum()
    last = np.flatnonzero(np.diff(scene.found.score[rows], append=-1.0))  # of equal scores
    return Operating(
        threshold=scene.found.score[rows][last],
        precision=(hits / np.arange(1, len(rows) + 1))[last],
        recall=(hits / max(1, int(scene.positives.sum())))[last],
    )


def grouped(scene: Scene, of_truth: Floats, of_found: Floats, bounds: Sequence[float], *, unit: str) -> list[Group]:
    """AP of the objects in each range of a quantity, like COCO's for small, medium and large objects.

    Annotations outside the range, detections matched to them, and false positives outside it are ignored.

    Args:
        scene: The objects.
        of_truth: (M,) the quantity of annotations.
        of_found: (N,) the same of detections.
        bounds: Bounds of the ranges, ascending.
        unit: Unit after the numbers in a label.
    """
    groups = []
    for low, high in itertools.pairwise(bounds):
        ignored = (of_truth < low) | (of_truth >= high)
        objects = int((scene.positives & ~ignored).sum())
        if objects:
            matches = match(scene, ignored=ignored, outside=(of_found < low) | (of_found >= high))
            measured = precision(scene, matches, ignored=ignored)
            groups.append(Group(_range(low, high, bounds[0], unit), objects, measured.ap, measured.at(0)))
    return groups


def image_ap(scene: Scene, matches: Matches) -> Floats:
    """AP of each image alone, the mean over its classes, (I,); NaN without objects."""
    values = np.full(len(scene.image_ids), np.nan)
    right, wrong = matches.right, matches.wrong
    for image, (found_rows, truth_rows, _) in enumerate(scene.images()):
        own = scene.truth.label[truth_rows][scene.positives[truth_rows]]
        aps = []
        for label, positives in zip(*np.unique(own, return_counts=True), strict=True):
            rows = found_rows.start + np.flatnonzero(scene.found.label[found_rows] == label)
            hits, slips = right[:, rows].cumsum(1), wrong[:, rows].cumsum(1)
            aps.append(np.mean([interpolated(h, s, int(positives)).mean() for h, s in zip(hits, slips, strict=True)]))
        values[image] = mean(np.array(aps))
    return values


def _image_f1(scene: Scene, outcome: Outcome) -> Floats:
    images = len(scene.image_ids)
    same = outcome.shown & (outcome.partner >= 0)
    same[same] = scene.found.label[same] == scene.truth.label[outcome.partner[same]]
    hits = np.bincount(scene.found.image[same], minlength=images)
    total = np.bincount(scene.found.image[outcome.shown], minlength=images)
    total += np.bincount(scene.truth.image[scene.positives], minlength=images)
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def _by_image(scene: Scene, matches: Matches, per_image: Ints) -> list[Group]:
    """AP of the images in each range of the number of objects."""
    groups = []
    for low, high in itertools.pairwise(CROWDING):
        images = (per_image >= low) & (per_image < high)
        if images.any():
            measured = precision(scene, matches, images=images)
            label = f"{low} or more" if math.isinf(high) else f"{low} to {int(high) - 1}"
            label += f" ({int(images.sum())} images)"
            groups.append(Group(label, int(per_image[images].sum()), measured.ap, measured.at(0)))
    return groups


def _range(low: float, high: float, first: float, unit: str) -> str:
    if low == first:
        return f"below {high:g}{unit}"
    return f"{low:g}{unit} and more" if math.isinf(high) else f"{low:g} to {high:g}{unit}"
