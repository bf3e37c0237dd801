"""Mask R-CNN: He et al., ICCV 2017."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from a2fpn.detectors.detector import Detection, register_detector
from a2fpn.detectors.rcnn import RCNN
from a2fpn.heads import CARAFEMaskPredictor, Float32MaskPredictor, paste_masks
from a2fpn.masks.paste import PasteRule


@register_detector("maskrcnn")
class MaskRCNN(RCNN):
    """Faster R-CNN with a mask branch; torchvision's heads on any neck."""

    has_masks = True
    target_keys: tuple[str, ...] = ("boxes", "labels", "masks")

    def branches(self, pooled: Mapping[str, int]) -> dict[str, nn.Module]:
        """RoI pooling, convolutions and predictor of the mask branch."""
        heads, layers = self.rcnn, (self.rcnn.mask_channels,) * self.rcnn.mask_layers
        width = heads.mask_channels if layers else self.neck.out_channels
        predictor = (
            CARAFEMaskPredictor(width, self.num_outputs)
            if heads.mask_upsample == "carafe"
            else Float32MaskPredictor(heads.mask_channels, heads.mask_channels, self.num_outputs)
        )
        return {
            "mask_roi_pool": self.roi_pool(pooled, heads.mask_pool_size),
            "mask_head": MaskRCNNHeads(self.neck.out_channels, layers, 1, norm_layer=self.norm_layer),
            "mask_predictor": predictor,
        }

    @property
    def mask_paste(self) -> PasteRule:
        """See :attr:`~a2fpn.detectors.Detector.mask_paste`."""
        return self.rcnn.mask_paste

    def _result(self, raw: Detection, size: tuple[int, int], original: tuple[int, int], paste: bool) -> Detection:
        result = super()._result(raw, size, original, paste)
        if paste:
            result["masks"] = paste_masks(raw["masks"], result["boxes"], original, rule=self.mask_paste)
        return result
