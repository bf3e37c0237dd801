"""COCO metrics by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

IOU_TYPES = ("bbox", "segm", "keypoints")


@dataclass(frozen=True)
class BoxMaskMetrics:
    """The 12 COCO metrics of one IoU type, in [0, 1]; -1 if the ground truth has no such objects.

    Precision and recall are means over the classes. "Small" objects have an area below 32² pixels, "large"
    ones above 96². All metrics but ``ar1`` and ``ar10`` use the ``max_detections`` best detections per image
    and class (100 in COCO's definition).

    Args:
        ap: Average precision, the mean over the IoU thresholds 0.50, 0.55, ..., 0.95.
        ap50: At IoU 0.50.
        ap75: At IoU 0.75.
        ap_small: As ``ap``, for small objects.
        ap_medium: For medium objects.
        ap_large: For large objects.
        ar1: Average recall with 1 detection per image and class.
        ar10: With 10.
        ar100: With ``max_detections``, which is 100 in COCO's definition, hence the name.
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
class KeypointMetrics:
    """The 10 COCO metrics of keypoints, in [0, 1]; -1 if the ground truth has no such objects.

    The object keypoint similarity (OKS) replaces the IoU: the mean over an object's labeled keypoints
    of ``exp(-d² / (8 area sigma²))``, d the distance in pixels. Objects without labeled keypoints and small
    objects are ignored.

    Args:
        ap: Average precision, the mean over the OKS thresholds 0.50, 0.55, ..., 0.95.
        ap50: At OKS 0.50.
        ap75: At OKS 0.75.
        ap_medium: As ``ap``, for objects with an area of 32² to 96² pixels.
        ap_large: For larger ones.
        ar: Average recall, the mean over the thresholds.
        ar50: At OKS 0.50.
        ar75: At OKS 0.75.
        ar_medium: As ``ar``, for medium objects.
        ar_large: For large objects.
        per_class: ``ap`` by class name; names that occur twice are followed by the category id.
    """

    ap: float
    ap50: float
    ap75: float
    ap_medium: float
    ap_large: float
    ar: float
    ar50: float
    ar75: float
    ar_medium: float
    ar_large: float
    per_class: Mapping[str, float]


@dataclass(frozen=True)
class CocoMetrics:
    """The result of an evaluation.

    Args:
        bbox: For boxes, or None if not requested.
        segm: For masks, or None if not requested.
        max_detections: Maximum number of detections per image and class, for boxes and masks.
        keypoints: For keypoints, or None if not requested.
    """

    bbox: BoxMaskMetrics | None
    segm: BoxMaskMetrics | None
    max_detections: int
    keypoints: KeypointMetrics | None = None

    @property
    def measured(self) -> dict[str, BoxMaskMetrics | KeypointMetrics]:
        """Requested metrics, by IoU type."""
        found = {kind: getattr(self, kind) for kind in IOU_TYPES}
        return {kind: metrics for kind, metrics in found.items() if metrics is not None}

    def to_dict(self, *, per_class: bool = False) -> dict[str, float]:
        """Return the metrics by name, e.g. ``"segm/ap"``; with ``per_class`` also ``"segm/ap/<class>"``."""
        flat: dict[str, float] = {}
        for kind, metrics in self.measured.items():
            values = dataclasses.asdict(metrics)
            classes = values.pop("per_class")
            flat |= {f"{kind}/{name}": value for name, value in values.items()}
            flat |= {f"{kind}/ap/{name}": value for name, value in classes.items()} if per_class else {}
        return flat
