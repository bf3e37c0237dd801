"""Detectors: torchvision heads configured from the neck's pyramid. Importing this package registers every detector."""

from a2fpn.detectors import cascade_rcnn, faster_rcnn, fcos, htc, keypoint_rcnn, mask_rcnn, retinanet
from a2fpn.detectors.detector import DETECTORS, Detector, register_detector
from a2fpn.detectors.one_stage import OneStage
from a2fpn.detectors.rcnn import RCNN

__all__ = [
    "DETECTORS",
    "RCNN",
    "Detector",
    "OneStage",
    "cascade_rcnn",
    "faster_rcnn",
    "fcos",
    "htc",
    "keypoint_rcnn",
    "mask_rcnn",
    "register_detector",
    "retinanet",
]
