"""Detectors: torchvision heads wired from the neck's pyramid. Importing this package registers every detector."""

from a2fpn.detectors import cascade_rcnn, faster_rcnn, htc, mask_rcnn
from a2fpn.detectors.rcnn import DETECTORS, RCNN, register_detector

__all__ = ["DETECTORS", "RCNN", "cascade_rcnn", "faster_rcnn", "htc", "mask_rcnn", "register_detector"]
