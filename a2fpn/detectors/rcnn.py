"""Two-stage detector: backbone -> neck -> proposals -> RoI heads -> results."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads

from a2fpn.backbones import TimmBackbone
from a2fpn.config import ModelConfig, RCNNConfig
from a2fpn.detectors.detector import Detection, Detector
from a2fpn.heads import Float32BoxPredictor, Float32RPNHead, ProposalNetwork, StrideAnchors, StrideRoIAlign
from a2fpn.heads.postprocess import PostprocessConfig
from a2fpn.heads.roi_heads import DetectionRoIHeads
from a2fpn.necks import Neck
from a2fpn.preprocess import Batch
from a2fpn.pyramid import Features


class RCNN(Detector):
    """Base of the two-stage detectors (Ren et al., NeurIPS 2015; Lin et al., CVPR 2017).

    Anchors and RoI pooling are configured from the neck's pyramid. The background class exists only inside the heads.

    The losses are ``loss_objectness`` and ``loss_rpn_box_reg`` of the proposals, ``loss_classifier`` and
    ``loss_box_reg`` of the box heads, and those of the detector's other branches: ``loss_mask``, ``loss_keypoint``,
    ``loss_semantic``.
    """

    class_dependent: tuple[str, ...] = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

    def __init__(self, config: ModelConfig, backbone: TimmBackbone, neck: Neck) -> None:
        super().__init__(config, backbone, neck)
        heads = self.rcnn
        strides = neck.out_spec.strides
        # Extra levels, which the neck adds by subsampling, are used by the RPN only.
        pooled = {name: neck.out_spec[name].stride for name in neck.roi_levels}
        sizes = heads.anchor_sizes or tuple((8 * stride,) for stride in strides)
        anchors = StrideAnchors(
            sizes, heads.anchor_ratios, strides, rounded=heads.anchor_rounding, legacy=heads.legacy_anchors
        )
        self.rpn = ProposalNetwork(
            anchors,
            Float32RPNHead(neck.out_channels, anchors.num_anchors_per_location()[0], heads.rpn_layers),
            fg_iou_thresh=heads.rpn_fg_iou,
            bg_iou_thresh=heads.rpn_bg_iou,
            batch_size_per_image=heads.rpn_batch_size,
            positive_fraction=heads.rpn_positive_fraction,
            pre_nms_top_n={"training": heads.rpn_pre_nms_top_n_train, "testing": heads.rpn_pre_nms_top_n_test},
            post_nms_top_n={"training": heads.rpn_post_nms_top_n_train, "testing": heads.rpn_post_nms_top_n_test},
            nms_thresh=heads.rpn_nms_threshold,
            score_thresh=heads.rpn_score_threshold,
        )
        self.roi_heads = self.build_roi_heads(pooled)

    @property
    def rcnn(self) -> RCNNConfig:
        """The heads' configuration."""
        return typing.cast(RCNNConfig, self.config.heads)

    @property
    def num_outputs(self) -> int:
        """Outputs of the box predictor: background, the classes, and unused ones."""
        return 1 + self.config.num_classes + self.rcnn.unused_outputs

    @property
    def dense_head(self) -> nn.Module:
        """See :attr:`Detector.dense_head`."""
        head: nn.Module = self.rpn.head
        return head

    @property
    def rule(self) -> PostprocessConfig:
        """See :attr:`Detector.rule`; respects thresholds set on the heads, as with torchvision's."""
        rule: PostprocessConfig = getattr(self.roi_heads, "rule", super().rule)
        return rule

    def build_roi_heads(self, pooled: Mapping[str, int]) -> nn.Module:
        """Build the RoI heads, called like torchvision's ``RoIHeads``; their ``objects`` takes the RoIs of a batch.

        Args:
            pooled: Name and stride of the levels that RoIs are pooled from.
        """
        heads: nn.Module = self.stage(pooled, fg_iou=self.rcnn.box_fg_iou)
        return heads

    def stage(
        self,
        pooled: Mapping[str, int],
        *,
        fg_iou: float,
        box_weights: Sequence[float] | None = None,
        class_agnostic: bool = False,
    ) -> RoIHeads:
        """Build one stage of box (and mask) heads.

        Args:
            pooled: Name and stride of the levels that RoIs are pooled from.
            fg_iou: Minimum IoU of positives.
            box_weights: Weights of dx, dy, dw, dh as regression targets; None for torchvision's.
            class_agnostic: Whether box regression is class-agnostic.
        """
        heads, classes = self.rcnn, self.num_outputs
        return DetectionRoIHeads(
            box_roi_pool=self.roi_pool(pooled, heads.box_pool_size),
            box_head=self.box_head(),
            box_predictor=Float32BoxPredictor(heads.box_channels, classes, class_agnostic=class_agnostic),
            fg_iou_thresh=fg_iou,
            bg_iou_thresh=fg_iou,
            batch_size_per_image=heads.box_batch_size,
            positive_fraction=heads.box_positive_fraction,
            bbox_reg_weights=box_weights,
            score_thresh=heads.score_threshold,
            nms_thresh=heads.nms_threshold,
            detections_per_img=heads.detections_per_image,
            aligned=heads.roi_aligned,
            mask_boundary_weight=heads.mask_boundary_weight,
            **self.branches(pooled),
        )

    def box_head(self) -> nn.Module:
        """Build the module that maps pooled features to ``box_channels`` features per RoI."""
        heads, channels = self.rcnn, self.neck.out_channels
        if not heads.box_layers:
            mlp: nn.Module = TwoMLPHead(channels * heads.box_pool_size**2, heads.box_channels)
            return mlp
        size = (channels, heads.box_pool_size, heads.box_pool_size)
        convolutions: nn.Module = FastRCNNConvFCHead(
            size, [channels] * heads.box_layers, [heads.box_channels], norm_layer=self.norm_layer
        )
        return convolutions

    @property
    def norm_layer(self) -> type[nn.Module] | None:
        """Norm after the convolutions of the box and mask heads."""
        return nn.BatchNorm2d if self.rcnn.head_norm == "bn" else None

    def branches(self, pooled: Mapping[str, int]) -> dict[str, nn.Module]:
        """Modules of the mask or keypoint branch as keyword arguments of torchvision's ``RoIHeads``; none here."""
        return {}

    def roi_pool(self, pooled: Mapping[str, int], output_size: int) -> nn.Module:
        """RoI pooling over the levels with the given strides, as configured."""
        heads = self.rcnn
        return StrideRoIAlign(
            dict(pooled), output_size, sampling_ratio=heads.roi_sampling_ratio, aligned=heads.roi_aligned
        )

    def losses(self, features: Features, batch: Batch, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """See :meth:`Detector.losses`."""
        proposals, rpn_losses = self.rpn(ImageList(batch.tensor, batch.sizes), features, targets)
        _, roi_losses = self.roi_heads(features, proposals, batch.sizes, targets)
        return {**rpn_losses, **roi_losses}

    def objects(self, features: Features, batch: Batch, *, rule: PostprocessConfig) -> Detection:
        """See :meth:`Detector.objects`."""
        rois = self.rpn.rois(ImageList(batch.tensor, batch.sizes), features, candidates=rule.candidates)
        heads: typing.Any = self.roi_heads
        found: Detection = heads.objects(features, rois, batch.sizes, rule)
        if self.rcnn.unused_outputs:
            named = (found["labels"] <= self.config.num_classes).nonzero()[:, 0]
            found = {name: x[named] for name, x in found.items()}
        return {**found, "labels": found["labels"] - 1}

    def _inner_target(self, target: dict[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Tensor]:
        return super()._inner_target({**target, "labels": target["labels"] + 1}, old, new)
