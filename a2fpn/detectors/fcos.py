"""FCOS: Tian et al., "FCOS: A Simple and Strong Anchor-free Object Detector", TPAMI 2020."""

from __future__ import annotations

import typing

from torch import Tensor

from a2fpn.config import FCOSConfig
from a2fpn.detectors.detector import register_detector
from a2fpn.detectors.one_stage import OneStage
from a2fpn.heads import StrideAnchors
from a2fpn.heads.dense import Float32FCOSHead
from a2fpn.heads.matching import match_locations
from a2fpn.preprocess import Batch
from a2fpn.pyramid import Features


@register_detector("fcos")
class FCOS(OneStage):
    """Anchor-free prediction of boxes, classes and centerness; torchvision's head and losses on any neck.

    The losses are ``loss_classifier`` (focal), ``loss_box_reg`` (GIoU) and ``loss_centerness``. The stride of a level
    is the unit of center sampling, of the level's size range, and of box regression.
    """

    head: Float32FCOSHead
    class_dependent = ("head.classification_head.cls_logits.",)

    @property
    def fcos(self) -> FCOSConfig:
        """The head's configuration."""
        return typing.cast(FCOSConfig, self.config.heads)

    def build_anchors(self) -> StrideAnchors:
        """Build one square per location with the stride as its side, torchvision's form of a point."""
        strides = self.spec.strides
        return StrideAnchors([(stride,) for stride in strides], (1.0,), strides, legacy=self.fcos.legacy_anchors)

    def build_head(self) -> Float32FCOSHead:
        """Torchvision's head."""
        return Float32FCOSHead(self.neck.out_channels, self.config.num_classes, num_layers=self.fcos.head_layers)

    def losses(self, features: Features, batch: Batch, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See :meth:`~a2fpn.detectors.Detector.losses`."""
        outputs, anchors, counts = self.outputs(features, batch)
        matches = [
            match_locations(t["boxes"], a, per_level=counts, radius=self.fcos.center_radius)
            for t, a in zip(targets, anchors, strict=True)
        ]
        losses = self.head.compute_loss(targets, outputs, anchors, matches)
        names = {"classification": "classifier", "bbox_regression": "box_reg", "bbox_ctrness": "centerness"}
        # Counting synchronizes with the device.
        positives = sum(int((match >= 0).sum()) for match in matches) if self.head.normalizer.enabled else 0
        return {f"loss_{ours}": self.head.normalizer(losses[theirs], positives) for theirs, ours in names.items()}

    def scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """See :meth:`OneStage.scores`; the geometric mean of class score and centerness."""
        return (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """See :meth:`OneStage.decode`."""
        boxes: Tensor = self.head.box_coder.decode(deltas, anchors)
        return boxes
