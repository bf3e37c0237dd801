"""What torchvision's heads lack: anchors and RoI pooling from declared strides, exact pasting of masks."""

from a2fpn.heads.anchors import StrideAnchors
from a2fpn.heads.paste import mask_windows, paste_masks
from a2fpn.heads.roi_pool import StrideRoIAlign, roi_align

__all__ = ["StrideAnchors", "StrideRoIAlign", "mask_windows", "paste_masks", "roi_align"]
