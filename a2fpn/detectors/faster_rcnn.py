"""Faster R-CNN with a feature pyramid: Ren et al., NeurIPS 2015; Lin et al., CVPR 2017."""

from __future__ import annotations

from a2fpn.detectors.detector import register_detector
from a2fpn.detectors.rcnn import RCNN


@register_detector("fasterrcnn")
class FasterRCNN(RCNN):
    """Faster R-CNN: torchvision's RPN and two-layer box head on any neck."""
