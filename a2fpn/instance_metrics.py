"""Metrics for counting and segmenting instances (cells, particles, trees) on label images, at one score threshold.

COCO's AP ranks detections and needs no threshold. Here a threshold is chosen first, the objects above it become a
label image, in which each pixel belongs to at most one object, and label images are compared.

A pair of objects *matches* at a threshold ``t`` if its IoU is above ``t``, as in the Data Science Bowl. From 0.5 on,
an object matches at most one other.

Shape shorthand: ``G`` objects of the ground truth and ``P`` predicted ones of an image, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.coco_file import Annotation, CocoFile, read_coco
from a2fpn.errors import ConfigError
from a2fpn.masks.rle import Rle, decode_window
from a2fpn.masks.segmentation import segmentation_to_rle

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""The ten of COCO, of the Data Science Bowl and of Caicedo et al."""


def label_image(
    rles: Sequence[Rle], size: tuple[int, int], *, scores: Sequence[float] | None = None, min_visible: float = 0.0
) -> NDArray[np.int32]:
    """Merge masks into a label image, in which each pixel belongs to at most one object.

    Objects claim their free pixels in order of descending score (without scores, or at equal ones, of ascending
    size). An object with too small a visible share is dropped, the rule of panoptic segmentation (Kirillov et al.,
    "Panoptic segmentation", CVPR 2019, section 7).

    Args:
        rles: ``N`` masks.
        size: (H, W), pixels.
        scores: ``N`` scores.
        min_visible: Minimum share of an object's pixels that are still free, in [0, 1].

    Returns:
        ``(H, W)``, ``i + 1`` for object ``i``, 0 for background. A fully covered object is not in it.

    Raises:
        ValueError: If there is not one score per mask, a mask is of another size, or the share is out of range.

    Example:
        >>> from a2fpn.masks.rle import encode_masks
        >>> rles = encode_masks(np.array([[[1, 1, 0]], [[0, 1, 1]]]))
        >>> label_image(rles, (1, 3), scores=[0.9, 0.4]).tolist()
        [[1, 1, 2]]
        >>> label_image(rles, (1, 3), scores=[0.9, 0.4], min_visible=0.6).tolist()
        [[1, 1, 0]]
    """
    if scores is not None and len(scores) != len(rles):
        raise ConfigError(f"Expected one score per mask, got {len(scores)} for {len(rles)} masks.")
    if not 0 <= min_visible <= 1:
        raise ConfigError(f"min_visible must lie in [0, 1], got {min_visible}.")
    labels = np.zeros(size, np.int32)
    windows = []
    for rle in rles:
        if tuple(rle["size"]) != tuple(size):
            raise ConfigError(f"A mask of {tuple(rle['size'])} pixels does not match a label image of {tuple(size)}.")
        windows.append(decode_window(rle))
    areas = [int(crop.sum()) for crop, _ in windows]
    ranks = [0.0] * len(rles) if scores is None else list(map(float, scores))
    for i in sorted(range(len(rles)), key=lambda i: (-ranks[i], areas[i])):
        crop, (left, top, right, bottom) = windows[i]
        part = labels[top:bottom, left:right]
        free = (crop > 0) & (part == 0)
        if free.sum() >= min_visible * areas[i]:
            part[free] = i + 1
    return labels


@dataclass(frozen=True, eq=False)
class Overlap:
    """Overlaps between the objects of two label images.

    Args:
        truth: ``(G,)`` area of each object of the ground truth, pixels.
        found: ``(P,)`` area of each predicted object, pixels.
        pairs: ``(K, 2)`` indices of the pairs that share pixels, ascending.
        shared: ``(K,)`` pixels that each pair shares.
    """

    truth: NDArray[np.int64]
    found: NDArray[np.int64]
    pairs: NDArray[np.int64]
    shared: NDArray[np.int64]

    @classmethod
    def of(cls, truth: NDArray[Any], found: NDArray[Any]) -> Overlap:
        """Compare two integer label images ``(H, W)``; 0 is background, any other number an object.

        Raises:
            ValueError: If the images are of different sizes.
        """
        if truth.shape != found.shape:
            raise ConfigError(f"Label images must be of one size, got {truth.shape} and {found.shape}.")
        (true_ids, true_index), (found_ids, found_index) = (
            np.unique(labels, return_inverse=True) for labels in (truth, found)
        )
        # Pixels of every pair that occurs, background included, sorted by the ground truth's objects.
        cells, counts = np.unique(true_index.reshape(-1) * len(found_ids) + found_index.reshape(-1), return_counts=True)
        rows, columns = np.divmod(cells, len(found_ids))
        true_sizes, found_sizes = (
            np.bincount(index, weights=counts, minlength=len(ids)).astype(np.int64)[ids != 0]
            for index, ids in ((rows, true_ids), (columns, found_ids))
        )
        objects = (true_ids[rows] != 0) & (found_ids[columns] != 0)
        # Indices of the objects, not counting the background.
        pairs = np.stack([(np.cumsum(ids != 0) - 1)[x] for x, ids in ((rows, true_ids), (columns, found_ids))], 1)
        return cls(true_sizes, found_sizes, pairs[objects], counts[objects])

    @property
    def ious(self) -> NDArray[np.float64]:
        """``(K,)`` IoU of each pair."""
        union = self.truth[self.pairs[:, 0]] + self.found[self.pairs[:, 1]] - self.shared
        ratios: NDArray[np.float64] = self.shared / union
        return ratios

    def matches(self, thresholds: Sequence[float] = IOU_THRESHOLDS) -> list[int]:
        """Number of pairs with an IoU above each threshold.

        Raises:
            ValueError: For a threshold below 0.5, at which an object may match two.
        """
        if not all(0.5 <= threshold <= 1 for threshold in thresholds):
            raise ConfigError(f"IoU thresholds must lie in [0.5, 1], got {list(thresholds)}.")
        ious = self.ious
        return [int((ious > threshold).sum()) for threshold in thresholds]

    def aggregated_jaccard(self) -> float:
        """AJI (Kumar et al., IEEE Transactions on Medical Imaging 2017, Algorithm 1); 1 if both images are empty.

        Each object of the ground truth is matched to the prediction with the highest IoU, which several may share;
        unmatched predictions count toward the union.
        """
        shared, union = 0, 0
        taken = np.zeros(len(self.found), bool)
        ious = self.ious
        starts = np.searchsorted(self.pairs[:, 0], np.arange(len(self.truth) + 1)).tolist()
        for area, start, stop in zip(self.truth.tolist(), starts, starts[1:], strict=False):
            if start == stop:
                union += area
                continue
            row = start + int(ious[start:stop].argmax())
            j, common = int(self.pairs[row, 1]), int(self.shared[row])
            shared, union = shared + common, union + area + int(self.found[j]) - common
            taken[j] = True
        union += int(self.found[~taken].sum())
        return shared / union if union else 1.0


@dataclass(frozen=True)
class InstanceMetrics:
    """Detection, segmentation and counting metrics of one class at one score threshold.

    Metrics per IoU threshold pool the objects of all images. For an image without objects and without predictions,
    ``bowl_score``, ``average_f1`` and ``aji`` are 1. Undefined metrics, such as precision without predictions, are NaN.

    Args:
        images: Number of images.
        objects: Number of objects of the ground truth.
        found: Number of predicted objects.
        precision: By IoU threshold, TP / (TP + FP).
        recall: By IoU threshold, TP / (TP + FN).
        f1: By IoU threshold, 2 TP / (2 TP + FP + FN).
        accuracy: By IoU threshold, TP / (TP + FP + FN); StarDist calls it accuracy, others average precision.
        bowl_score: The Data Science Bowl's score: TP / (TP + FP + FN), mean over the thresholds and images.
        average_f1: F1, mean over the thresholds and images (Caicedo et al., Nature Methods 2019).
        pq: Panoptic quality (Kirillov et al., CVPR 2019), ``sq * rq``.
        sq: Mean IoU of the pairs that match at 0.5.
        rq: F1 at 0.5.
        aji: Aggregated Jaccard index, mean over the images.
        count_bias: Mean of predicted minus true counts per image.
        count_mae: Mean absolute error of the counts.
        count_r2: Coefficient of determination of the predicted counts: 1 if all are right.
    """

    images: int
    objects: int
    found: int
    precision: Mapping[float, float]
    recall: Mapping[float, float]
    f1: Mapping[float, float]
    accuracy: Mapping[float, float]
    bowl_score: float
    average_f1: float
    pq: float
    sq: float
    rq: float
    aji: float
    count_bias: float
    count_mae: float
    count_r2: float

    def to_dict(self) -> dict[str, float]:
        """Return the numbers by name, e.g. ``"pq"`` and ``"f1@0.50"``."""
        flat: dict[str, float] = {}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, Mapping):
                flat |= {f"{name}@{threshold:.2f}": number for threshold, number in value.items()}
            else:
                flat[name] = value
        return flat


def instance_metrics(overlaps: Iterable[Overlap], *, thresholds: Sequence[float] = IOU_THRESHOLDS) -> InstanceMetrics:
    """Aggregate the metrics over the images of a data set.

    Args:
        overlaps: One per image.
        thresholds: Ascending IoU thresholds, from 0.5 on.

    Raises:
        ValueError: Without an image, or for a threshold below 0.5.

    Example:
        >>> truth = np.array([[1, 1, 0, 2]])
        >>> metrics = instance_metrics([Overlap.of(truth, np.array([[5, 5, 5, 0]]))])
        >>> metrics.f1[0.5], metrics.f1[0.7], round(metrics.aji, 3), metrics.count_bias
        (0.6666666666666666, 0.0, 0.5, -1.0)
    """
    images = list(overlaps)
    if not images:
        raise ConfigError("There must be at least one image to compare.")
    hits = np.array([image.matches(thresholds) for image in images], np.float64)
    true = np.array([len(image.truth) for image in images], np.float64)
    found = np.array([len(image.found) for image in images], np.float64)
    either = true[:, None] + found[:, None] - hits  # TP + FP + FN
    tp, all_true, all_found = hits.sum(0), true.sum(), found.sum()
    by_iou = {
        "precision": _ratio(tp, all_found),
        "recall": _ratio(tp, all_true),
        "f1": _ratio(2 * tp, all_true + all_found),
        "accuracy": _ratio(tp, either.sum(0)),
    }
    good = np.concatenate([image.ious[image.ious > 0.5] for image in images])
    matched = float(len(good))
    sq, rq = float(_ratio(good.sum(), matched)), float(_ratio(2 * matched, all_true + all_found))
    errors = found - true
    return InstanceMetrics(
        images=len(images),
        objects=int(all_true),
        found=int(all_found),
        **{name: dict(zip(thresholds, values.tolist(), strict=True)) for name, values in by_iou.items()},
        bowl_score=float(_ratio(hits, either, empty=1.0).mean()),
        average_f1=float(_ratio(2 * hits, (true + found)[:, None], empty=1.0).mean()),
        # Without a match PQ is 0, or undefined if there are no objects either.
        pq=sq * rq if matched else rq,
        sq=sq,
        rq=rq,
        aji=float(np.mean([image.aggregated_jaccard() for image in images])),
        count_bias=float(errors.mean()),
        count_mae=float(np.abs(errors).mean()),
        count_r2=float(1 - _ratio((errors**2).sum(), ((true - true.mean()) ** 2).sum())),
    )


def evaluate_instances(
    ground_truth: str | Path | Mapping[str, Any] | CocoFile,
    detections: Iterable[Mapping[str, Any]],
    *,
    score_threshold: float = 0.5,
    min_visible: float = 0.5,
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> dict[str, InstanceMetrics]:
    """Compare detections with a COCO ground truth as label images, class by class.

    Overlapping detections are resolved by :func:`label_image`, higher scores on top. Crowd annotations are ignored, as
    are detections with more than half their area in them (Kirillov et al., CVPR 2019, on void regions).

    Args:
        ground_truth: See :func:`a2fpn.evaluation.evaluate_coco`.
        detections: COCO results with ``segmentation``.
        score_threshold: Detections with a lower score are dropped.
        min_visible: Minimum visible share of a detection's pixels; others are dropped.
        thresholds: Ascending IoU thresholds, from 0.5 on.

    Returns:
        Metrics by class name, for classes that occur in the ground truth or the detections.

    Raises:
        DataError: If the ground truth is not a COCO file.
        ValueError: If the ground truth has no masks or no image, or a detection lacks a mask or names an unknown
            image or category.
    """
    coco = read_coco(ground_truth)
    if not coco.has_masks:
        raise ConfigError(f"{coco.name} has no masks; instance metrics compare masks.")
    coco = coco.with_all_masks()
    names = {category.id: category.name for category in coco.categories}
    chosen: dict[tuple[int, int], list[tuple[Rle, float]]] = {}
    for number, raw in enumerate(detections):
        image, category = coco.images.get(raw["image_id"]), raw["category_id"]
        if image is None or category not in names or "segmentation" not in raw:
            raise ConfigError(f"Detection {number} must have a known image_id and category_id and a segmentation.")
        if raw["score"] >= score_threshold:
            rle = segmentation_to_rle(raw["segmentation"], image.height, image.width)
            chosen.setdefault((category, image.id), []).append((rle, float(raw["score"])))
    annotated = {a.category_id for annotations in coco.annotations.values() for a in annotations}
    results = {}
    for category, name in names.items():
        if category not in annotated and not any(found == category for found, _ in chosen):
            continue
        overlaps = (
            _compare(
                [a for a in coco.annotations[image.id] if a.category_id == category],
                chosen.get((category, image.id), []),
                (image.height, image.width),
                min_visible,
            )
            for image in coco.images.values()
        )
        key = name if list(names.values()).count(name) == 1 else f"{name} ({category})"
        results[key] = instance_metrics(overlaps, thresholds=thresholds)
    return results


def _compare(
    annotations: Sequence[Annotation], found: Sequence[tuple[Rle, float]], size: tuple[int, int], min_visible: float
) -> Overlap:
    objects = [a.rle for a in annotations if not a.iscrowd and a.rle]
    crowds = [a.rle for a in annotations if a.iscrowd and a.rle]
    truth = label_image(objects, size)
    scores = [score for _, score in found]
    labels = label_image([rle for rle, _ in found], size, scores=scores, min_visible=min_visible)
    if crowds:
        void = (label_image(crowds, size) > 0) & (truth == 0)
        inside = np.bincount(labels[void], minlength=len(found) + 1)
        ignored = 2 * inside > np.bincount(labels.reshape(-1), minlength=len(found) + 1)
        ignored[0] = False
        labels[ignored[labels]] = 0
    return Overlap.of(truth, labels)


def _ratio(numerator: Any, denominator: Any, *, empty: float = math.nan) -> NDArray[np.float64]:
    """Elementwise ratio, ``empty`` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), denominator)
    result = np.full(numerator.shape, empty)
    np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result
