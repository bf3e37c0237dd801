"""Evaluation of detections against a COCO ground truth."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2fpn.data.coco_file import Annotation, CocoFile, read_coco
from a2fpn.errors import ConfigError
from a2fpn.evaluation.backends import Backend, load_library
from a2fpn.evaluation.inputs import EvalInputs, truth_keypoints
from a2fpn.evaluation.metrics import IOU_TYPES, BoxMaskMetrics, CocoMetrics, KeypointMetrics

COCO_SIGMAS = tuple(
    tenth / 10
    for tenth in (0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89)
)
"""Standard deviations of the annotation of COCO's 17 keypoints, nose first as in its files; see ``oks_sigmas``."""


def evaluate_coco(
    ground_truth: str | Path | Mapping[str, Any] | CocoFile,
    detections: Iterable[Mapping[str, Any]],
    *,
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_detections: int = 100,
    max_keypoint_detections: int = 20,
    oks_sigmas: Sequence[float] = COCO_SIGMAS,
    backend: Backend = "auto",
) -> CocoMetrics:
    """Evaluate detections against a COCO ground truth.

    All images of the ground truth are evaluated, including those without detections. Annotations that
    :func:`a2fpn.data.read_coco` finds invalid are dropped and logged. Crowds are kept as ignored regions: detections
    matched to them are neither true nor false positives. For masks, so are the boxes of objects without a mask.

    Args:
        ground_truth: A COCO file, its content, or the result of ``read_coco`` (``dataset.coco``),
            which saves reading it again.
        detections: COCO results: dicts of ``image_id``, ``category_id`` (the file's own ids), ``score``,
            ``bbox`` (x, y, width, height in pixels), ``segmentation`` (RLE, as in ``Result.to_coco()``) and
            ``keypoints`` (x, y, visibility of each, concatenated; visibility is ignored).
            Only the fields required by ``iou_types`` are needed; a missing ``bbox`` is computed from the mask. They
            are not modified. All other arguments are checked before the first detection is consumed, so that a
            generator does not predict in vain.
        iou_types: Any of ``"bbox"``, ``"segm"`` and ``"keypoints"``.
        max_detections: Maximum number of detections per image and class, for boxes and masks. COCO uses 100, which is
            too few for images with more objects; state it when publishing results with another value.
        max_keypoint_detections: The same for keypoints; COCO uses 20.
        oks_sigmas: Standard deviation of the annotation of each keypoint, relative to the object's size (the square
            root of its area); None for COCO's 17.
        backend: The evaluation library. Both agree; ``"auto"`` uses hotcoco, or pycocotools with a log line if hotcoco
            can't be imported.

    Raises:
        DataError: If the ground truth is not a COCO file.
        ValueError: If a detection has an unknown image or category or lacks a required value, if masks or
            keypoints are requested and the ground truth has none, if there is not one sigma per keypoint, if
            the backend is not installed, or for an argument out of range.

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
        raise ConfigError(f"iou_types must be some of {', '.join(IOU_TYPES)}, got {list(iou_types)}.")
    for name, limit in {"max_detections": max_detections, "max_keypoint_detections": max_keypoint_detections}.items():
        if limit < 1:
            raise ConfigError(f"{name} must be at least 1, got {limit}.")
    library = load_library(backend)
    coco = read_coco(ground_truth)
    if "segm" in iou_types and not coco.has_masks:
        raise ConfigError(f"{coco.name} has no masks; evaluate boxes only, with iou_types=['bbox'].")
    if "keypoints" in iou_types:
        _check_sigmas(coco, oks_sigmas)
    given = list(detections)
    results: dict[str, Any] = {}
    for kind in dict.fromkeys(iou_types):
        scene = EvalInputs.of(coco, given, kind)
        if kind == "keypoints":
            results[kind] = _keypoint_metrics(scene, library, max_keypoint_detections, oks_sigmas)
        else:
            results[kind] = _box_mask_metrics(scene, library, max_detections)
    return CocoMetrics(results.get("bbox"), results.get("segm"), max_detections, results.get("keypoints"))


def common_iou_types(ground_truth: CocoFile, keys: Collection[str]) -> list[str]:
    """Return the IoU types that can be evaluated: predicted by a detector and annotated in a file.

    Args:
        ground_truth: The file.
        keys: Outputs of the detector, e.g. ``detector.target_keys``.

    Example:
        >>> coco = read_coco({"images": [], "annotations": [], "categories": []})
        >>> common_iou_types(coco, ["boxes", "masks"]), common_iou_types(coco, ["boxes", "keypoints"])
        (['bbox', 'segm'], ['bbox'])
    """
    masks = "masks" in keys and ground_truth.has_masks
    keypoints = "keypoints" in keys and ground_truth.num_keypoints > 0
    return ["bbox"] + ["segm"] * masks + ["keypoints"] * keypoints


def annotations_as_detections(ground_truth: str | Path | Mapping[str, Any] | CocoFile) -> list[dict[str, Any]]:
    """Convert the objects of a ground truth, without crowds, to perfect detections with score 1.

    In a file with keypoints, objects without labeled ones get keypoints at the center of their box, which are ignored.

    Evaluated against the same file they reach AP 1, which checks a data set and its ids end to end.

    Example:
        >>> annotations_as_detections({
        ...     "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}],
        ... })
        [{'image_id': 1, 'category_id': 7, 'bbox': [10.0, 10.0, 20.0, 20.0], 'score': 1.0}]
    """
    coco = read_coco(ground_truth)
    return [
        {
            "image_id": image_id,
            "category_id": annotation.category_id,
            "bbox": list(annotation.bbox),
            "score": 1.0,
            **({"segmentation": annotation.region(coco.images[image_id])} if coco.has_masks else {}),
            **({"keypoints": _perfect_keypoints(annotation, coco)} if coco.num_keypoints else {}),
        }
        for image_id, annotations in coco.annotations.items()
        for annotation in annotations
        if not annotation.iscrowd
    ]


def _check_sigmas(coco: CocoFile, sigmas: Sequence[float]) -> None:
    if not coco.num_keypoints:
        raise ConfigError(f"{coco.name} has no keypoints; evaluate boxes only, with iou_types=['bbox'].")
    if len(sigmas) != coco.num_keypoints:
        raise ConfigError(
            f"{coco.name} has {coco.num_keypoints} keypoints per object, oks_sigmas are {len(sigmas)}; give one sigma "
            f"for each keypoint{' (the default is those of COCO)' if len(sigmas) == len(COCO_SIGMAS) else ''}."
        )
    if not all(sigma > 0 and math.isfinite(sigma) for sigma in sigmas):
        raise ConfigError(f"oks_sigmas must be positive numbers, got {list(sigmas)}.")


def _perfect_keypoints(annotation: Annotation, coco: CocoFile) -> list[float]:
    x, y, width, height = annotation.bbox
    found = truth_keypoints(annotation, coco)
    keypoints: list[float] = found["keypoints"]
    return keypoints if found["num_keypoints"] else [x + width / 2, y + height / 2, 0.0] * coco.num_keypoints


def _box_mask_metrics(scene: EvalInputs, library: tuple[Any, Any], max_detections: int) -> BoxMaskMetrics:
    limits = sorted({min(1, max_detections), min(10, max_detections), max_detections})
    precision, recall = scene.compare(library, limits)
    every, small, medium, large = range(4)
    iou50, iou75 = 0, 5
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
        per_class={label: _mean(precision[:, :, k, every, -1]) for k, label in enumerate(scene.labels)},
    )


def _keypoint_metrics(
    scene: EvalInputs, library: tuple[Any, Any], max_detections: int, sigmas: Sequence[float]
) -> KeypointMetrics:
    precision, recall = scene.compare(library, [max_detections], sigmas)
    every, medium, large = range(3)
    oks50, oks75 = 0, 5
    return KeypointMetrics(
        ap=_mean(precision[..., every, -1]),
        ap50=_mean(precision[oks50, ..., every, -1]),
        ap75=_mean(precision[oks75, ..., every, -1]),
        ap_medium=_mean(precision[..., medium, -1]),
        ap_large=_mean(precision[..., large, -1]),
        ar=_mean(recall[..., every, -1]),
        ar50=_mean(recall[oks50, ..., every, -1]),
        ar75=_mean(recall[oks75, ..., every, -1]),
        ar_medium=_mean(recall[..., medium, -1]),
        ar_large=_mean(recall[..., large, -1]),
        per_class={label: _mean(precision[:, :, k, every, -1]) for k, label in enumerate(scene.labels)},
    )


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the defined values; undefined ones are -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0
