"""Extensions of torchvision's heads: anchors and RoI pooling from declared strides, cascades, exact mask pasting."""

from a2fpn.heads.anchors import StrideAnchors
from a2fpn.heads.cascade import CascadeRoIHeads, CascadeRules
from a2fpn.heads.dense import Float32FCOSHead, Float32RetinaNetHead, TopLevels
from a2fpn.heads.htc import HTCRoIHeads, SemanticBranch, SemanticRoIPool
from a2fpn.heads.keypoints import Float32KeypointPredictor
from a2fpn.heads.loss_normalizer import GlobalLossNormalizer, normalize_losses_globally
from a2fpn.heads.matching import BoxPairs, ChunkedMatcher, match_locations
from a2fpn.heads.postprocess import PostprocessConfig, SoftNms, soft_nms, suppress
from a2fpn.heads.predictors import CARAFEMaskPredictor, Float32BoxPredictor, Float32MaskPredictor, Float32RPNHead
from a2fpn.heads.proposals import ProposalNetwork
from a2fpn.heads.roi_heads import DetectionRoIHeads, Samples
from a2fpn.heads.roi_pool import StrideRoIAlign, roi_align
from a2fpn.masks.paste import mask_windows, paste_masks

__all__ = [
    "BoxPairs",
    "CARAFEMaskPredictor",
    "CascadeRoIHeads",
    "CascadeRules",
    "ChunkedMatcher",
    "DetectionRoIHeads",
    "Float32BoxPredictor",
    "Float32FCOSHead",
    "Float32KeypointPredictor",
    "Float32MaskPredictor",
    "Float32RPNHead",
    "Float32RetinaNetHead",
    "GlobalLossNormalizer",
    "HTCRoIHeads",
    "PostprocessConfig",
    "ProposalNetwork",
    "Samples",
    "SemanticBranch",
    "SemanticRoIPool",
    "SoftNms",
    "StrideAnchors",
    "StrideRoIAlign",
    "TopLevels",
    "mask_windows",
    "match_locations",
    "normalize_losses_globally",
    "paste_masks",
    "roi_align",
    "soft_nms",
    "suppress",
]
