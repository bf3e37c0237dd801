"""Fast COCO metrics for boxes, masks and keypoints, without the pitfalls of pycocotools.

pycocotools treats a match with annotation id 0 as unmatched, crashes on an empty list of detections and on a
missing ``iscrowd`` or ``area``, never returns on some broken run lengths, prints to the terminal, and its
summary supports only 100 detections per image. None of this happens here. Matching and metrics are those of
pycocotools, with one exception: the size of a detected mask (small, medium, large) is its area, as in
detectron2, not that of its box.

Two backends agree to the last bits of a float64: hotcoco is the default and many times as fast, pycocotools is
the reference. With both, the order of the images does not matter: detections with equal scores are sorted by
image id and, within an image, keep their order.
"""

from __future__ import annotations

from a2fpn.evaluation.backends import BACKENDS, Backend
from a2fpn.evaluation.coco import COCO_SIGMAS, annotations_as_detections, common_iou_types, evaluate_coco
from a2fpn.evaluation.metrics import BoxMaskMetrics, CocoMetrics, KeypointMetrics

__all__ = [
    "BACKENDS",
    "COCO_SIGMAS",
    "Backend",
    "BoxMaskMetrics",
    "CocoMetrics",
    "KeypointMetrics",
    "annotations_as_detections",
    "common_iou_types",
    "evaluate_coco",
]
