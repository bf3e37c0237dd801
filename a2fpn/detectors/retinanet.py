"""RetinaNet: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017."""

from __future__ import annotations

import typing

from torch import Tensor

from a2fpn.backbones import TimmBackbone
from a2fpn.config import ModelConfig, RetinaNetConfig
from a2fpn.detectors.detector import register_detector
from a2fpn.detectors.one_stage import OneStage
from a2fpn.heads import StrideAnchors
from a2fpn.heads.box_coder import BoxCoder
from a2fpn.heads.dense import Float32RetinaNetHead
from a2fpn.heads.matching import BoxPairs, ChunkedMatcher
from a2fpn.necks import Neck
from a2fpn.preprocess import Batch
from a2fpn.pyramid import Features


@register_detector("retinanet")
class RetinaNet(OneStage):
    """Dense anchor-based prediction of boxes and classes; torchvision's head and losses on any neck.

    The losses are ``loss_classifier`` (focal) and ``loss_box_reg``.
    """

    head: Float32RetinaNetHead
    class_dependent = ("head.classification_head.cls_logits.",)

    def __init__(self, config: ModelConfig, backbone: TimmBackbone, neck: Neck) -> None:
        super().__init__(config, backbone, neck)
        self.matcher = ChunkedMatcher(self.retinanet.fg_iou, self.retinanet.bg_iou, allow_low_quality_matches=True)
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    @property
    def retinanet(self) -> RetinaNetConfig:
        """The head's configuration."""
        return typing.cast(RetinaNetConfig, self.config.heads)

    def build_anchors(self) -> StrideAnchors:
        """Build the anchors, nine per location by default."""
        heads, strides = self.retinanet, self.spec.strides
        sizes = heads.anchor_sizes or [[int(4 * stride * 2 ** (i / 3)) for i in range(3)] for stride in strides]
        return StrideAnchors(sizes, heads.anchor_ratios, strides, legacy=heads.legacy_anchors)

    def build_head(self) -> Float32RetinaNetHead:
        """Torchvision's head."""
        heads = self.retinanet
        return Float32RetinaNetHead(
            self.neck.out_channels,
            self.anchor_generator.num_anchors_per_location()[0],
            self.config.num_classes,
            group_norm=heads.head_norm == "gn",
            box_loss=heads.box_loss,
        )

    def losses(self, features: Features, batch: Batch, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See :meth:`~a2fpn.detectors.Detector.losses`."""
        outputs, anchors, _ = self.outputs(features, batch)
        matches = [self.matcher(BoxPairs(t["boxes"], a)) for t, a in zip(targets, anchors, strict=True)]
        losses = self.head.compute_loss(targets, outputs, anchors, matches)
        return {"loss_classifier": losses["classification"], "loss_box_reg": losses["bbox_regression"]}

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """See :meth:`OneStage.scores`."""
        return outputs["cls_logits"].sigmoid()

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """See :meth:`OneStage.decode`."""
        boxes: Tensor = self.box_coder.decode_single(deltas, anchors)
        return boxes
