"""Mask R-CNN: He et al., ICCV 2017."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from a2fpn.detectors.rcnn import RCNN, Detection, register_detector
from a2fpn.heads import Float32MaskPredictor, paste_masks


@register_detector("maskrcnn")
class MaskRCNN(RCNN):
    """Faster R-CNN plus a mask for every object; torchvision's heads on any neck."""

    has_masks = True
    target_keys: tuple[str, ...] = ("boxes", "labels", "masks")

    def mask_branch(self, pooled: Mapping[str, int]) -> dict[str, nn.Module]:
        """RoI pooling, convolutions and predictor of the mask branch."""
        heads = self.config.heads
        return {
            "mask_roi_pool": self.roi_pool(pooled, heads.mask_pool_size),
            "mask_head": MaskRCNNHeads(self.neck.out_channels, (heads.mask_channels,) * heads.mask_layers, 1),
            "mask_predictor": Float32MaskPredictor(
                heads.mask_channels, heads.mask_channels, self.config.num_classes + 1
            ),
        }

    def _result(self, raw: Detection, size: tuple[int, int], original: tuple[int, int], paste: bool) -> Detection:
        result = super()._result(raw, size, original, paste)
        result["masks"] = raw["masks"]
        if paste:
            rule = self.config.heads.mask_paste
            result["masks"] = paste_masks(raw["masks"], result["boxes"], original, rule=rule)
        return result
