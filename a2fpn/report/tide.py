"""Error types and their cost in AP, as defined by TIDE.

Bolya, Foley, Hays, Hoffman, *TIDE: A General Toolbox for Identifying Object Detection Errors*, ECCV 2020. Each
unmatched detection has one type; the cost of a type is the AP gained if an oracle corrects its errors, one type at a
time. Detections in crowds are not errors here.

Merged and split objects are a second classification of the same detections, for images with touching objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from a2fpn.report.matching import Bools, Floats, Ints, Scene, match
from a2fpn.report.precision import interpolated, mean

_RECALLS: Floats = np.arange(101) / 100  # differs from COCO's in the last bits, as in TIDE's own code

TYPES = ("Cls", "Loc", "Both", "Dupe", "Bkg")
"""Types of false positives, in the order of their numbers."""

DESCRIPTIONS: Mapping[str, str] = {
    "Cls": "right place, wrong class",
    "Loc": "right class, badly placed",
    "Both": "wrong class and badly placed",
    "Dupe": "second detection of an object",
    "Bkg": "nothing annotated there",
    "Miss": "annotated, and no detection comes near",
    "Merged": "one detection over several objects",
    "Split": "several detections of parts of one object",
}


@dataclass(frozen=True, eq=False)
class ErrorTypes:
    """Errors of a model by type.

    Args:
        kind: (N,) index in :data:`TYPES`, or -1 for a true positive or an ignored detection.
        missed: (M,) annotations of the type Miss.
        merged: (N,) false positives that cover at least half of two or more objects of their class.
        split: (M,) missed objects with two or more false positives that are at least half inside.
        cost: AP gained by correcting a type, in [0, 1].
        ap: AP at the threshold.
    """

    kind: Ints
    missed: Bools
    merged: Bools
    split: Bools
    cost: Mapping[str, float]
    ap: float

    @property
    def counts(self) -> dict[str, int]:
        """Number of errors of each type."""
        by_type = {name: int((self.kind == number).sum()) for number, name in enumerate(TYPES)}
        others = {"Miss": self.missed, "Merged": self.merged, "Split": self.split}
        return by_type | {name: int(errors.sum()) for name, errors in others.items()}


def error_types(scene: Scene, *, iou: float = 0.5, background: float = 0.1) -> ErrorTypes:
    """Classify all errors and compute their cost.

    Args:
        scene: The objects.
        iou: Minimum IoU of a match.
        background: IoU up to which a detection counts as background.
    """
    found, truth = scene.found, scene.truth
    matches = match(scene, thresholds=np.array([iou]))
    partner, wrong, right = matches.partner[0], matches.wrong[0], matches.right[0]
    used = np.zeros(len(truth), dtype=bool)
    used[partner[right]] = True
    kind, target = np.full(len(found), -1, dtype=np.int64), np.full(len(found), -1, dtype=np.int64)
    for found_rows, truth_rows, overlaps in scene.images():
        real = np.flatnonzero(scene.positives[truth_rows])
        rows = found_rows.start + np.flatnonzero(wrong[found_rows])
        columns = truth_rows.start + real
        shared = overlaps[np.ix_(rows - found_rows.start, real)]
        same = found.label[rows][:, None] == truth.label[columns]
        kind[rows], aim = _classify(shared, same, used[columns], iou=iou, background=background)
        target[rows] = np.where(aim >= 0, columns[aim], -1) if len(columns) else -1
    repaired = _repairs(scene, target, used)
    missed = scene.positives & ~used
    missed[target[target >= 0]] = False
    ap = _ap(scene, right, right | wrong, found.label, scene.positives)
    cost = {}
    for number, name in enumerate(TYPES):
        own = kind == number
        better = own & repaired
        labels = np.where(better, truth.label[target], found.label) if len(truth) else found.label
        cost[name] = _ap(scene, right | better, (right | wrong) & (~own | better), labels, scene.positives)
    cost["Miss"] = _ap(scene, right, right | wrong, found.label, scene.positives & ~missed)
    merged, buried, split, parts = _touching(scene, wrong, scene.positives & ~used)
    cost["Merged"] = _ap(scene, right, (right | wrong) & ~merged, found.label, scene.positives & ~buried)
    cost["Split"] = _ap(scene, right, (right | wrong) & ~parts, found.label, scene.positives & ~split)
    return ErrorTypes(kind, missed, merged, split, {name: max(value - ap, 0.0) for name, value in cost.items()}, ap)


def _classify(shared: Floats, same: Bools, used: Bools, *, iou: float, background: float) -> tuple[Ints, Ints]:
    """Type of each false positive of an image, and the annotation it should have matched, or -1.

    Args:
        shared: (D, G) IoU.
        same: (D, G) whether the classes agree.
        used: (G,) whether an annotation is matched.
        iou: Minimum IoU of a match.
        background: See :func:`error_types`.
    """
    kind = np.full(len(shared), TYPES.index("Bkg"), dtype=np.int64)
    aim = np.full(len(shared), -1, dtype=np.int64)
    if not shared.size:
        return kind, aim
    own, other = shared * same, shared * ~same
    best_own, best_other = own.max(1), other.max(1)
    loc = (best_own >= background) & (best_own <= iou)
    cls = ~loc & (best_other >= iou)
    dupe = ~loc & ~cls & ((own * used).max(1) >= iou)
    both = ~loc & ~cls & ~dupe & (shared.max(1) > background)
    for name, chosen in {"Loc": loc, "Cls": cls, "Dupe": dupe, "Both": both}.items():
        kind[chosen] = TYPES.index(name)
    aim[loc], aim[cls] = own.argmax(1)[loc], other.argmax(1)[cls]
    return kind, aim


def _repairs(scene: Scene, target: Ints, used: Bools) -> Bools:
    """(N,) the best detection of each unmatched object, which is corrected; its others are removed."""
    repaired = np.zeros(len(target), dtype=bool)
    rows = np.flatnonzero(target >= 0)
    rows = rows[~used[target[rows]]]
    rows = rows[np.argsort(-scene.found.score[rows], kind="stable")]
    repaired[rows[np.unique(target[rows], return_index=True)[1]]] = True
    return repaired


def _touching(scene: Scene, wrong: Bools, unfound: Bools) -> tuple[Bools, Bools, Bools, Bools]:
    """Find merged and split objects.

    Args:
        scene: The objects.
        wrong: (N,) false positives.
        unfound: (M,) missed annotations.

    Returns:
        (N,) merged detections, (M,) missed objects under them, (M,) split objects, (N,) false positives in them.
    """
    merged, parts, buried, split = (np.zeros(len(x), dtype=bool) for x in (wrong, wrong, unfound, unfound))
    for found_rows, truth_rows, shared in scene.images():
        found_area, truth_area = scene.found.area[found_rows][:, None], scene.truth.area[truth_rows]
        inside = shared * (found_area + truth_area) / (1 + shared)
        same = scene.found.label[found_rows][:, None] == scene.truth.label[truth_rows]
        pairs = same & wrong[found_rows][:, None] & scene.positives[truth_rows]
        covered, within = pairs & (inside >= 0.5 * truth_area), pairs & (inside >= 0.5 * found_area)
        merged[found_rows] = covered.sum(1) >= 2
        buried[truth_rows] = unfound[truth_rows] & (covered & merged[found_rows][:, None]).any(0)
        split[truth_rows] = unfound[truth_rows] & (within.sum(0) >= 2)
        parts[found_rows] = (within & split[truth_rows]).any(1)
    return merged, buried, split, parts


def _ap(scene: Scene, right: Bools, counted: Bools, labels: Ints, wanted: Bools) -> float:
    """AP, the mean over the classes of the annotations.

    Args:
        scene: The objects.
        right: (N,) true positives.
        counted: (N,) detections that count.
        labels: (N,) their classes.
        wanted: (M,) annotations to find.
    """
    classes = len(scene.names)
    positives = np.bincount(scene.truth.label[wanted], minlength=classes)
    values = np.full(classes, np.nan)
    for label in np.unique(scene.truth.label[scene.positives]).tolist():
        rows = np.flatnonzero(counted & (labels == label))
        rows = rows[np.argsort(-scene.found.score[rows], kind="stable")]
        if positives[label]:
            curve = interpolated(right[rows].cumsum(), (~right[rows]).cumsum(), int(positives[label]), recalls=_RECALLS)
            values[label] = curve.mean()
        elif len(rows):
            values[label] = 0.0
    return mean(values)
