"""COCO metrics for boxes, masks and keypoints, fast, and spared from pycocotools' traps.

pycocotools takes an annotation with id 0 for unmatched, crashes on an empty list of detections and on a
missing ``iscrowd`` or ``area``, never returns from some broken run lengths, prints to the terminal, and its
summary knows only 100 detections per image. None of this happens here. The matching and the numbers are its
own, but for one thing: whether a detected mask is small or large is decided by the mask, as in detectron2, not
by the box that comes with it.

Two libraries count alike, to the last bits of a float64: hotcoco is the default and many times as fast,
pycocotools the reference. Whichever counts, the order in which the images' detections come does not matter:
equal scores count in the order of the image ids and, within an image, in the order given.
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
