"""What torchvision's heads lack: anchors and RoI pooling from declared strides, cascades, exact pasting of masks."""

from a2fpn.heads.anchors import StrideAnchors
from a2fpn.heads.cascade import CascadeRoIHeads
from a2fpn.heads.htc import HTCRoIHeads, SemanticBranch, SemanticRoIPool
from a2fpn.heads.paste import mask_windows, paste_masks
from a2fpn.heads.predictors import Float32BoxPredictor, Float32MaskPredictor, Float32RPNHead
from a2fpn.heads.roi_pool import StrideRoIAlign, roi_align

__all__ = [
    "CascadeRoIHeads",
    "Float32BoxPredictor",
    "Float32MaskPredictor",
    "Float32RPNHead",
    "HTCRoIHeads",
    "SemanticBranch",
    "SemanticRoIPool",
    "StrideAnchors",
    "StrideRoIAlign",
    "mask_windows",
    "paste_masks",
    "roi_align",
]
