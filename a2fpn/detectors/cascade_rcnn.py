"""Cascade R-CNN and Cascade Mask R-CNN: Cai & Vasconcelos, CVPR 2018 and TPAMI 2019."""

from __future__ import annotations

import typing
from collections.abc import Mapping

from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads

from a2fpn.backbones import TimmBackbone
from a2fpn.config import CascadeConfig, ModelConfig
from a2fpn.detectors.detector import register_detector
from a2fpn.detectors.mask_rcnn import MaskRCNN
from a2fpn.detectors.rcnn import RCNN
from a2fpn.heads import CascadeRoIHeads, CascadeRules
from a2fpn.necks import Neck


@register_detector("cascadercnn")
class CascadeRCNN(RCNN):
    """Box heads in stages of increasing IoU thresholds, each refining the boxes of the previous one."""

    def __init__(self, config: ModelConfig, backbone: TimmBackbone, neck: Neck) -> None:
        super().__init__(config, backbone, neck)
        predictors = ("box_predictor.cls_score.", "mask_predictor.mask_fcn_logits.")
        stages = range(len(self.cascade.stage_ious))
        self.class_dependent = tuple(f"roi_heads.stages.{i}.{name}" for i in stages for name in predictors)

    @property
    def cascade(self) -> CascadeConfig:
        """The heads' configuration."""
        return typing.cast(CascadeConfig, self.config.heads)

    def build_roi_heads(self, pooled: Mapping[str, int]) -> nn.Module:
        """Build the stages."""
        return CascadeRoIHeads(self.stages(pooled), rules=self.rules)

    @property
    def rules(self) -> CascadeRules:
        """Variant of the cascade."""
        heads = self.cascade
        return CascadeRules(
            loss_weights=heads.stage_loss_weights,
            box_loss_beta=heads.box_loss_beta,
            average=heads.stage_average,
            resample=heads.stage_resampling,
            scale_gradients=heads.scale_gradients,
            aligned=heads.roi_aligned,
            mask_boundary_weight=heads.mask_boundary_weight,
        )

    def stages(self, pooled: Mapping[str, int]) -> list[RoIHeads]:
        """Build heads that differ in IoU threshold and box weights and share no parameters."""
        heads = self.cascade
        stages = [
            self.stage(pooled, fg_iou=iou, box_weights=weights, class_agnostic=True)
            for iou, weights in zip(heads.stage_ious, heads.stage_box_weights, strict=True)
        ]
        if heads.stage_masks == "first":
            for stage in stages[1:]:
                stage.mask_roi_pool = stage.mask_head = stage.mask_predictor = None
        return stages


@register_detector("cascademaskrcnn")
class CascadeMaskRCNN(CascadeRCNN, MaskRCNN):
    """Cascade R-CNN with a mask head per stage, whose masks are averaged, or with a single one."""

    box_only_variant = "cascadercnn"
