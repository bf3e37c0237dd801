"""The two-stage detector: backbone -> neck -> proposals -> RoI heads -> results.

Shape shorthand: ``B`` images, ``N`` objects of an image, ``M`` side of a predicted mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from a2fpn._registry import Registry
from a2fpn.backbones import TimmBackbone
from a2fpn.config import ModelConfig
from a2fpn.heads import Float32BoxPredictor, Float32RPNHead, StrideAnchors, StrideRoIAlign
from a2fpn.necks import Neck
from a2fpn.preprocess import Batch, Preprocess, resize_boxes, resize_target
from a2fpn.pyramid import Features

Detection = dict[str, Tensor]


class RCNN(nn.Module):
    """Base of the two-stage detectors (Ren et al., NeurIPS 2015; Lin et al., CVPR 2017).

    Anchors, RoI pooling and the size divisor come from the neck's pyramid. Labels are ``0..num_classes - 1`` in
    training and in results; the background class exists only inside the heads.

    Args:
        config: What was built, kept for saving.
        backbone: Features.
        neck: Pyramid.

    Attributes:
        preprocess: The resize, normalisation and padding rule.
        has_masks: Whether it trains on masks and predicts them.
        box_detector: The registered detector of its kind that needs no masks.
        target_keys: What it reads of a target.
        class_dependent: How the names of the tensors begin that depend on the number of classes.
    """

    has_masks = False
    box_detector = "fasterrcnn"
    target_keys: tuple[str, ...] = ("boxes", "labels")
    class_dependent: tuple[str, ...] = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

    def __init__(self, config: ModelConfig, backbone: TimmBackbone, neck: Neck) -> None:
        super().__init__()
        self.config = config
        heads = config.heads
        strides = neck.out_spec.strides
        # The coarsest level only serves the RPN when the neck added it by subsampling.
        pooled = {name: neck.out_spec[name].stride for name in neck.roi_levels}
        self.preprocess = Preprocess(config.preprocess, divisor=max(pooled.values()))
        self.backbone = backbone
        self.neck = neck
        sizes = heads.anchor_sizes or tuple((8 * stride,) for stride in strides)
        anchors = StrideAnchors(sizes, heads.anchor_ratios, strides)
        self.rpn = RegionProposalNetwork(
            anchors,
            Float32RPNHead(neck.out_channels, anchors.num_anchors_per_location()[0]),
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

    def build_roi_heads(self, pooled: Mapping[str, int]) -> nn.Module:
        """What turns proposals into detections or losses; called like torchvision's ``RoIHeads``.

        Args:
            pooled: Name and stride of the levels that RoIs are pooled from.
        """
        heads: nn.Module = self.stage(pooled, fg_iou=self.config.heads.box_fg_iou)
        return heads

    def stage(
        self,
        pooled: Mapping[str, int],
        *,
        fg_iou: float,
        box_weights: Sequence[float] | None = None,
        class_agnostic: bool = False,
    ) -> RoIHeads:
        """One round of box (and mask) heads.

        Args:
            pooled: Name and stride of the levels that RoIs are pooled from.
            fg_iou: IoU from which a box is positive.
            box_weights: Factors of dx, dy, dw, dh as regression targets; None takes torchvision's.
            class_agnostic: Whether boxes are regressed once for all classes.
        """
        heads, classes = self.config.heads, self.config.num_classes + 1
        return RoIHeads(
            box_roi_pool=self.roi_pool(pooled, heads.box_pool_size),
            box_head=TwoMLPHead(self.neck.out_channels * heads.box_pool_size**2, heads.box_channels),
            box_predictor=Float32BoxPredictor(heads.box_channels, classes, class_agnostic=class_agnostic),
            fg_iou_thresh=fg_iou,
            bg_iou_thresh=fg_iou,
            batch_size_per_image=heads.box_batch_size,
            positive_fraction=heads.box_positive_fraction,
            bbox_reg_weights=box_weights,
            score_thresh=heads.score_threshold,
            nms_thresh=heads.nms_threshold,
            detections_per_img=heads.detections_per_image,
            **self.mask_branch(pooled),
        )

    def mask_branch(self, pooled: Mapping[str, int]) -> dict[str, nn.Module]:
        """Modules of the mask branch as keyword arguments of torchvision's ``RoIHeads``; none here."""
        return {}

    def roi_pool(self, pooled: Mapping[str, int], output_size: int) -> nn.Module:
        """RoI pooling over the levels with the given strides, as configured."""
        heads = self.config.heads
        return StrideRoIAlign(
            dict(pooled), output_size, sampling_ratio=heads.roi_sampling_ratio, aligned=heads.roi_aligned
        )

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Any]] | None = None,
        *,
        resize: bool = True,
        paste_masks: bool = True,
    ) -> dict[str, Tensor] | list[Detection]:
        """Detects objects, or computes the losses in training mode.

        Args:
            images: ``(C, H, W)`` each, float in [0, 1] or uint8 in [0, 255], any sizes.
            targets: In training mode, per image ``boxes`` (N, 4) float xyxy pixels, ``labels`` (N,) int64 in
                ``0..num_classes - 1``, for mask detectors ``masks`` (N, H, W) in {0, 1}, optionally ``image_id``.
            resize: Whether images (and targets) are resized by the model's rule; False when they come resized.
            paste_masks: Whether masks are pasted into the image, ``(N, 1, H, W)``, or returned as they were
                predicted inside each box, ``(N, 1, M, M)``.

        Returns:
            In training mode a dict of scalar losses, with the same keys on every step. Otherwise per image
            ``boxes`` (N, 4) float32 xyxy in the image's own pixels, ``scores`` (N,) descending, ``labels`` (N,)
            and, for mask detectors, ``masks`` as float32 probabilities.

        Raises:
            ValueError: For images, boxes, labels or masks that break the contract.
        """
        if not images:
            raise ValueError("Expected at least one image, got none.")
        if self.training:
            if targets is None:
                raise ValueError("In training mode targets must be given; call model.eval() to detect.")
            return self._losses(images, targets, resize)
        return self._detect(images, resize, paste_masks)

    def features(self, batch: Batch) -> Features:
        """The neck's pyramid for a batch."""
        pyramid: Features = self.neck(self.backbone(batch.tensor), batch.sizes)
        return pyramid

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], resize: bool
    ) -> dict[str, Tensor]:
        self._check_targets(images, targets)
        batch = self.preprocess(images, resize=resize)
        inner = []
        for target, old, new in zip(targets, batch.original_sizes, batch.sizes, strict=True):
            tensors = {key: target[key].as_subclass(Tensor).to(batch.tensor.device) for key in self.target_keys}
            tensors["boxes"] = tensors["boxes"].float()
            tensors["labels"] = tensors["labels"] + 1
            inner.append(resize_target(tensors, old, new))
        features = self.features(batch)
        image_list = ImageList(batch.tensor, batch.sizes)
        proposals, rpn_losses = self.rpn(image_list, features, inner)
        _, roi_losses = self.roi_heads(features, proposals, batch.sizes, inner)
        return {**rpn_losses, **roi_losses, **self.neck.losses()}

    def _check_targets(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> None:
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images came with {len(targets)} targets.")
        for index, (image, target) in enumerate(zip(images, targets, strict=True)):
            where = place(target, index)
            if "boxes" not in target or "labels" not in target:
                raise ValueError(f"{where}: a target needs boxes and labels, got {', '.join(sorted(target))}.")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
                raise ValueError(
                    f"{where}: expected boxes (N, 4) and labels (N,), got {tuple(boxes.shape)}, {tuple(labels.shape)}."
                )
            # Written so that NaN is bad as well.
            bad = torch.where(~(boxes[:, 2:] > boxes[:, :2]).all(1))[0]
            if len(bad):
                raise ValueError(
                    f"{where}: box {int(bad[0])} {boxes[bad[0]].tolist()} has no positive width and height."
                )
            wrong = torch.where((labels < 0) | (labels >= self.config.num_classes))[0]
            if len(wrong):
                raise ValueError(
                    f"{where}: label {int(labels[wrong[0]])} is out of 0..{self.config.num_classes - 1}; labels are "
                    "contiguous and there is no background class."
                )
            if self.has_masks and ("masks" not in target or target["masks"].shape != (len(boxes), *image.shape[1:])):
                got = tuple(target["masks"].shape) if "masks" in target else "none"
                raise ValueError(
                    f"{where}: {self.config.detector} trains on masks (N, H, W) = {(len(boxes), *image.shape[1:])}, "
                    f"got {got}. Without masks use {self.box_detector}."
                )

    def _detect(self, images: Sequence[Tensor], resize: bool, paste_masks: bool) -> list[Detection]:
        results: list[Detection] = [{}] * len(images)
        for group in self._groups(images, resize):
            batch = self.preprocess([images[i] for i in group], resize=resize)
            features = self.features(batch)
            proposals, _ = self.rpn(ImageList(batch.tensor, batch.sizes), features)
            detections, _ = self.roi_heads(features, proposals, batch.sizes)
            for i, raw, size, original in zip(group, detections, batch.sizes, batch.original_sizes, strict=True):
                results[i] = self._result(raw, size, original, paste_masks)
        return results

    def _groups(self, images: Sequence[Tensor], resize: bool) -> Iterator[list[int]]:
        """Indices of images that pad to the same size.

        Images of different padded sizes never share a batch: padding beyond the divisor would reach the features
        through convolutions, and a prediction would depend on its neighbours in the batch.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            size = (int(image.shape[-2]), int(image.shape[-1]))
            target = self.preprocess.target_size(*size) if resize else size
            groups.setdefault(tuple(-(-side // self.preprocess.divisor) for side in target), []).append(index)
        yield from groups.values()

    def _result(self, raw: Detection, size: tuple[int, int], original: tuple[int, int], paste: bool) -> Detection:
        boxes = resize_boxes(raw["boxes"], size, original)
        return {"boxes": boxes, "scores": raw["scores"], "labels": raw["labels"] - 1}


def place(target: Mapping[str, Any], index: int) -> str:
    """How messages name an image of a batch."""
    return f"image_id {target['image_id']}" if "image_id" in target else f"image {index} of the batch"


DETECTORS: Registry[Callable[[ModelConfig, TimmBackbone, Neck], RCNN]] = Registry("detector")
register_detector = DETECTORS.register
