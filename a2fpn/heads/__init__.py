"""What torchvision's heads lack: anchors and RoI pooling from declared strides, float32 outputs."""

from a2fpn.heads.anchors import StrideAnchors
from a2fpn.heads.roi_pool import StrideRoIAlign, roi_align

__all__ = ["StrideAnchors", "StrideRoIAlign", "roi_align"]
