"""COCO metrics for boxes and masks, with pycocotools, spared from its traps.

pycocotools takes an annotation with id 0 for unmatched, crashes on an empty list of detections and on a
missing ``iscrowd`` or ``area``, never returns from some broken run lengths, prints to the terminal, and its
summary knows only 100 detections per image. None of this happens here. The matching and the numbers are its
own, but for one thing: whether a detected mask is small or large is decided by the mask, as in detectron2, not
by the box that comes with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from a2fpn.data.coco import CocoFile, read_coco
from a2fpn.data.masks import segmentation_to_rle

IOU_TYPES = ("bbox", "segm")


@dataclass(frozen=True)
class BoxMaskMetrics:
    """The 12 COCO numbers of one kind of IoU, in [0, 1]; -1 where the ground truth has no such object.

    Precision and recall are means over the classes. "Small" objects have an area below 32² pixels, "large"
    ones above 96². All numbers but ``ar1`` and ``ar10`` use the ``max_detections`` best detections per image
    and class (COCO's definition says 100).

    Args:
        ap: Average precision, the mean over the IoU thresholds 0.50, 0.55, ..., 0.95.
        ap50: At IoU 0.50.
        ap75: At IoU 0.75.
        ap_small: As ``ap``, for small objects.
        ap_medium: For medium objects.
        ap_large: For large objects.
        ar1: Average recall with 1 detection per image and class.
        ar10: With 10.
        ar100: With ``max_detections``; 100 in the COCO definition, hence the name.
        ar_small: As ``ar100``, for small objects.
        ar_medium: For medium objects.
        ar_large: For large objects.
        per_class: ``ap`` by class name; names that occur twice are followed by the category id.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: Mapping[str, float]


@dataclass(frozen=True)
class CocoMetrics:
    """The result of an evaluation.

    Args:
        bbox: For boxes, or None if not asked for.
        segm: For masks, or None if not asked for.
        max_detections: How many detections per image and class counted.
    """

    bbox: BoxMaskMetrics | None
    segm: BoxMaskMetrics | None
    max_detections: int

    def to_dict(self, *, per_class: bool = False) -> dict[str, float]:
        """Returns the numbers by name, e.g. ``"segm/ap"``; with ``per_class`` also ``"segm/ap/<class>"``."""
        flat: dict[str, float] = {}
        for kind in IOU_TYPES:
            metrics: BoxMaskMetrics | None = getattr(self, kind)
            if metrics is not None:
                values = dataclasses.asdict(metrics)
                classes = values.pop("per_class")
                flat |= {f"{kind}/{name}": value for name, value in values.items()}
                flat |= {f"{kind}/ap/{name}": value for name, value in classes.items()} if per_class else {}
        return flat


def evaluate_coco(
    ground_truth: str | Path | Mapping[str, Any] | CocoFile,
    detections: Sequence[Mapping[str, Any]],
    *,
    iou_types: Sequence[str] = IOU_TYPES,
    max_detections: int = 100,
) -> CocoMetrics:
    """Compares detections with a COCO ground truth.

    All images of the ground truth count, also those without a detection. Annotations that
    :func:`a2fpn.data.read_coco` finds unusable are left out and logged; crowds stay, as regions in which
    detections count neither for nor against.

    Args:
        ground_truth: A COCO file, its content, or what ``read_coco`` returned for it (``dataset.coco``),
            which saves reading it again.
        detections: COCO results: dicts of ``image_id``, ``category_id`` (the file's own ids), ``score``,
            ``bbox`` (x, y, width, height in pixels) and ``segmentation`` (RLE, as in ``Result.to_coco()``).
            Only what the asked-for ``iou_types`` need; a missing ``bbox`` is taken from the mask. They are
            not changed.
        iou_types: Any of ``"bbox"`` and ``"segm"``.
        max_detections: How many of the best detections per image and class count. COCO says 100, which is
            too few for images with more objects; say so where you publish numbers with another value.

    Raises:
        DataError: If the ground truth is no COCO file.
        ValueError: If a detection names an unknown image or category or lacks a needed value, if masks
            are asked for and the ground truth has none, or for an argument out of its range.

    Example:
        >>> ground_truth = {
        ...     "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 0, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}],
        ... }
        >>> detection = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 15], "score": 0.9}
        >>> metrics = evaluate_coco(ground_truth, [detection], iou_types=["bbox"])
        >>> {name: round(value, 3) for name, value in metrics.to_dict(per_class=True).items() if "ap" in name}
        ...     # doctest: +ELLIPSIS
        {'bbox/ap': 0.6, 'bbox/ap50': 1.0, 'bbox/ap75': 1.0, ..., 'bbox/ap/cat': 0.6}
    """
    if not iou_types or not set(iou_types) <= set(IOU_TYPES):
        raise ValueError(f"iou_types must be some of {', '.join(IOU_TYPES)}, got {list(iou_types)}.")
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}.")
    coco = read_coco(ground_truth)
    if "segm" in iou_types and not coco.has_masks:
        raise ValueError(f"{coco.name} has no masks; evaluate boxes only, with iou_types=['bbox'].")
    truth = [
        {
            "image_id": image_id,
            "category_id": annotation.category_id,
            "bbox": list(annotation.bbox),
            "segmentation": annotation.rle,
            "area": annotation.area,
            "iscrowd": int(annotation.iscrowd),
        }
        for image_id, annotations in coco.annotations.items()
        for annotation in annotations
    ]
    results = {
        kind: _evaluate(coco, truth, _checked_detections(coco, detections, kind), kind, max_detections)
        for kind in dict.fromkeys(iou_types)
    }
    return CocoMetrics(results.get("bbox"), results.get("segm"), max_detections)


def annotations_as_detections(ground_truth: str | Path | Mapping[str, Any] | CocoFile) -> list[dict[str, Any]]:
    """Returns the objects of a ground truth, crowds left out, as perfect detections with score 1.

    Evaluated against the same file they reach AP 1, which checks a data set and its ids from end to end.

    Example:
        >>> annotations_as_detections({
        ...     "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}],
        ... })
        [{'image_id': 1, 'category_id': 7, 'bbox': [10.0, 10.0, 20.0, 20.0], 'score': 1.0}]
    """
    return [
        {
            "image_id": image_id,
            "category_id": annotation.category_id,
            "bbox": list(annotation.bbox),
            "score": 1.0,
            **({"segmentation": annotation.rle} if annotation.rle else {}),
        }
        for image_id, annotations in read_coco(ground_truth).annotations.items()
        for annotation in annotations
        if not annotation.iscrowd
    ]


def _checked_detections(coco: CocoFile, detections: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    category_ids = {category.id for category in coco.categories}
    checked = []
    for position, raw in enumerate(detections):
        try:
            checked.append(_checked_detection(raw, coco, category_ids, kind))
        except (ValueError, TypeError) as error:
            raise ValueError(f"detection {position}: {error}") from None
    return checked


def _checked_detection(raw: Mapping[str, Any], coco: CocoFile, category_ids: set[int], kind: str) -> dict[str, Any]:
    missing = [key for key in ("image_id", "category_id", "score") if key not in raw]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    image_id, category_id, score = raw["image_id"], raw["category_id"], float(raw["score"])
    if image_id not in coco.images:
        raise ValueError(f"its image_id {image_id!r} is not in {coco.name}")
    if category_id not in category_ids:
        raise ValueError(f"its category_id {category_id!r} is not in {coco.name}, which has {sorted(category_ids)}")
    if not math.isfinite(score):
        raise ValueError(f"its score is {score}")
    detection = {"image_id": image_id, "category_id": category_id, "score": score, "iscrowd": 0}
    needs_mask = kind == "segm" or "bbox" not in raw
    if needs_mask and "segmentation" not in raw:
        raise ValueError(f"it has no {'segmentation' if kind == 'segm' else 'bbox'}, which {kind!r} needs")
    if needs_mask:
        image = coco.images[image_id]
        rle = segmentation_to_rle(raw["segmentation"], image.height, image.width)
        bbox = mask_utils.toBbox(rle).tolist()
    else:
        rle = None
        bbox = [float(value) for value in raw["bbox"]]
        if len(bbox) != 4 or not all(map(math.isfinite, bbox)):
            raise ValueError(f"its bbox must be [x, y, width, height], got {raw['bbox']}")
    area = mask_utils.area(rle) if kind == "segm" else bbox[2] * bbox[3]
    return {**detection, "bbox": bbox, "segmentation": rle, "area": float(area)}


def _evaluate(
    coco: CocoFile, truth: list[dict[str, Any]], detections: list[dict[str, Any]], kind: str, max_detections: int
) -> BoxMaskMetrics:
    limits = sorted({min(1, max_detections), min(10, max_detections), max_detections})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_as_coco(coco, truth), _as_coco(coco, detections), kind)
        evaluator.params.maxDets = limits
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"]  # (IoU threshold, recall, class, area, limit)
    recall = evaluator.eval["recall"]  # (IoU threshold, class, area, limit)
    every, small, medium, large = range(4)
    iou50, iou75 = 0, 5

    names = [category.name for category in coco.categories]
    labels = [c.name if names.count(c.name) == 1 else f"{c.name} ({c.id})" for c in coco.categories]
    return BoxMaskMetrics(
        ap=_mean(precision[..., every, -1]),
        ap50=_mean(precision[iou50, ..., every, -1]),
        ap75=_mean(precision[iou75, ..., every, -1]),
        ap_small=_mean(precision[..., small, -1]),
        ap_medium=_mean(precision[..., medium, -1]),
        ap_large=_mean(precision[..., large, -1]),
        ar1=_mean(recall[..., every, 0]),
        ar10=_mean(recall[..., every, limits.index(min(10, max_detections))]),
        ar100=_mean(recall[..., every, -1]),
        ar_small=_mean(recall[..., small, -1]),
        ar_medium=_mean(recall[..., medium, -1]),
        ar_large=_mean(recall[..., large, -1]),
        per_class={label: _mean(precision[:, :, k, every, -1]) for k, label in enumerate(labels)},
    )


def _as_coco(coco: CocoFile, annotations: list[dict[str, Any]]) -> COCO:
    """Returns pycocotools' index of the annotations, numbered anew: it takes id 0 for "no match"."""
    index = COCO()
    index.dataset = {
        "images": [{"id": i.id, "height": i.height, "width": i.width} for i in coco.images.values()],
        "categories": [{"id": c.id, "name": c.name} for c in coco.categories],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
    }
    index.createIndex()
    return index


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Returns the mean over what was measured; pycocotools marks the rest with -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0
