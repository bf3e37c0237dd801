"""Average precision of matched detections, over all images, a subset, or resamples.

Interpolated as in COCO: the mean of the best precision at recalls of 0, 0.01, ..., 1.

Shape shorthand: T IoU thresholds, K classes, N detections, I images, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from a2fpn.report.matching import Bools, Floats, Ints, Matches, Scene

RECALLS: Floats = np.linspace(0, 1, 101)
_AT_ONCE = 4_000_000  # values in a block of resamples


@dataclass(frozen=True, eq=False)
class Precision:
    """Precision and recall by threshold and class.

    Args:
        curve: (T, 101, K) precision at each recall of :data:`RECALLS`; NaN for a class without annotations.
        recall: (T, K) recall of all detections; NaN likewise.
    """

    curve: Floats
    recall: Floats

    @property
    def per_class(self) -> Floats:
        """(T, K) average precision."""
        means: Floats = self.curve.mean(1)
        return means

    @property
    def ap(self) -> float:
        """Mean over thresholds and classes; NaN without annotations."""
        return mean(self.per_class)

    def at(self, threshold: int) -> float:
        """Mean over the classes at one of the thresholds, by index."""
        return mean(self.per_class[threshold])


def mean(values: Floats) -> float:
    """Mean ignoring NaN; NaN if there are no other values."""
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if measured.size else float("nan")


def precision(
    scene: Scene, matches: Matches, *, images: Bools | None = None, ignored: Bools | None = None
) -> Precision:
    """Compute precision and recall by descending score.

    Args:
        scene: The objects.
        matches: Their matches.
        images: (I,) mask of the images to use; None for all.
        ignored: (M,) ignored annotations, as given to :func:`a2fpn.report.matching.match`.
    """
    wanted = scene.positives if ignored is None else scene.positives & ~ignored
    chosen = np.ones(len(scene.found), dtype=bool)
    if images is not None:
        wanted, chosen = wanted & images[scene.truth.image], images[scene.found.image]
    thresholds, classes = len(matches.partner), len(scene.names)
    curve = np.full((thresholds, len(RECALLS), classes), np.nan)
    recall = np.full((thresholds, classes), np.nan)
    positives = np.bincount(scene.truth.label[wanted], minlength=classes)
    right, wrong = matches.right, matches.wrong
    for label in np.flatnonzero(positives).tolist():
        rows = np.flatnonzero(chosen & (scene.found.label == label))
        rows = rows[np.argsort(-scene.found.score[rows], kind="stable")]
        hits, slips = right[:, rows].cumsum(1), wrong[:, rows].cumsum(1)
        for threshold in range(thresholds):
            curve[threshold, :, label] = interpolated(hits[threshold], slips[threshold], int(positives[label]))
        recall[:, label] = hits[:, -1] / positives[label] if len(rows) else 0.0
    return Precision(curve, recall)


def interpolated(hits: Ints, slips: Ints, positives: int, *, recalls: Floats = RECALLS) -> Floats:
    """Interpolated precision: the best at each given recall or above, (101,).

    Args:
        hits: Number of true positives among the best 1, 2, ... detections.
        slips: Number of false positives likewise.
        positives: Number of objects to find, at least 1.
        recalls: (101,) recalls; COCO's by default.

    Example:
        >>> curve = interpolated(np.array([1, 1, 2]), np.array([0, 1, 1]), positives=4)
        >>> curve[[0, 25, 26, 50, 51]].round(2).tolist()
        [1.0, 1.0, 0.67, 0.67, 0.0]
    """
    best = hits / np.maximum(hits + slips, 1)
    best = np.append(np.maximum.accumulate(best[::-1])[::-1], 0.0)
    found: Floats = best[np.searchsorted(hits / positives, recalls, side="left")]
    return found


def resampling(images: int, *, resamples: int = 1000, seed: int = 0) -> NDArray[np.int32]:
    """Number of times that each image is drawn in each bootstrap resample, (B, I).

    Args:
        images: I, at least 1.
        resamples: B.
        seed: Seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.int32)


def resampled_ap(scene: Scene, matches: Matches, draws: NDArray[np.int32]) -> Floats:
    """Average precision on resampled images, (B, T, K); NaN if a resample has no object of a class.

    An image that is drawn twice counts as two images with the same objects. For a paired comparison of two models, pass
    the same draws.

    Args:
        scene: The objects.
        matches: Their matches.
        draws: (B, I), see :func:`resampling`.
    """
    found, truth, classes = scene.found, scene.truth, len(scene.names)
    result = np.full((len(draws), len(matches.partner), classes), np.nan)
    right, counted = matches.right, ~matches.ignored
    for label in range(classes):
        rows = np.flatnonzero(found.label == label)
        rows = rows[np.argsort(-found.score[rows], kind="stable")]
        own = scene.positives & (truth.label == label)
        per_image = np.bincount(truth.image[own], minlength=len(scene.image_ids))
        for start in range(0, len(draws), max(1, _AT_ONCE // max(1, len(rows)))):
            some = draws[start : start + max(1, _AT_ONCE // max(1, len(rows)))]
            positives = some @ per_image
            times = some[:, found.image[rows]]
            every = np.cumsum(times, axis=1, dtype=np.int32)
            for threshold in range(len(right)):
                hit = np.flatnonzero(right[threshold, rows])
                full = counted[threshold, rows].all()
                before = every if full else np.cumsum(times * counted[threshold, rows], axis=1, dtype=np.int32)
                hits = np.cumsum(times[:, hit], axis=1, dtype=np.int32)
                values = _resampled(hits, before[:, hit], positives)
                result[start : start + len(some), threshold, label] = values
    return result


def interval(values: Floats, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap values; NaN if there are none."""
    kept = values[~np.isnan(values)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def _resampled(hits: NDArray[np.int32], all_before: NDArray[np.int32], positives: Ints) -> Floats:
    """AP of each resample, (B,), from the cumulative counts at the true positives, (B, P)."""
    if not hits.shape[1]:
        return np.where(positives > 0, 0.0, np.nan)
    best = hits / np.maximum(all_before, 1)
    best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
    # Minimum number of true positives for each recall, with the same arithmetic as `interpolated`.
    safe = np.maximum(positives, 1)[:, None]
    needed = np.ceil(RECALLS * safe - 1e-6).astype(np.int64)
    needed += needed / safe < RECALLS
    # One search for all resamples, which are shifted to disjoint integer ranges.
    step = int(max(hits.max(), needed.max())) + 1
    shift = np.arange(len(hits))[:, None] * step
    flat = (hits + shift).ravel()
    places = np.searchsorted(flat, (needed + shift).ravel(), side="left").reshape(needed.shape)
    places = np.minimum(places - np.arange(len(hits))[:, None] * hits.shape[1], hits.shape[1]).clip(0)
    values = np.take_along_axis(best, places, axis=1).mean(1)
    return np.where(positives > 0, values, np.nan)
