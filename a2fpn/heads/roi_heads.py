"""RoI heads of the two-stage detectors: sampling, losses and post-processing around torchvision's ``RoIHeads``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, keypointrcnn_loss, keypoints_to_heatmap

from a2fpn.heads.matching import BACKGROUND, IGNORED, BoxPairs, ChunkedMatcher
from a2fpn.heads.postprocess import DetectionRule, box_detections
from a2fpn.heads.share import LossShare
from a2fpn.masks.targets import mask_loss
from a2fpn.pyramid import Features


class Samples(NamedTuple):
    """What a stage learns from, per image.

    Args:
        boxes: ``(S, 4)`` xyxy.
        objects: ``(S,)`` index of the object that each box is held against.
        labels: ``(S,)`` its class, 0 for background.
        deltas: ``(S, 4)`` regression targets.
    """

    boxes: list[Tensor]
    objects: list[Tensor]
    labels: list[Tensor]
    deltas: list[Tensor]

    def positives(self) -> Samples:
        """The boxes that are held against an object."""
        keep = [torch.where(labels > 0)[0] for labels in self.labels]
        return Samples(*([x[rows] for x, rows in zip(field, keep, strict=True)] for field in self))


class DetectionRoIHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's ``RoIHeads`` with :class:`ChunkedMatcher` and a :class:`DetectionRule` that can be exchanged.

    The thresholds stay where torchvision keeps them.

    Args:
        *args: torchvision's.
        aligned: Whether mask targets are cut out with RoIAlign's shift by half a pixel, as the features are.
        mask_boundary_weight: See :func:`~a2fpn.masks.targets.mask_loss`.
        **kwargs: torchvision's.
    """

    proposal_matcher: ChunkedMatcher

    def __init__(self, *args: Any, aligned: bool = False, mask_boundary_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aligned = aligned
        self.mask_boundary_weight = mask_boundary_weight
        matcher = self.proposal_matcher
        self.proposal_matcher = ChunkedMatcher(matcher.high_threshold, matcher.low_threshold)
        self.rule = DetectionRule(self.score_thresh, self.nms_thresh, self.detections_per_img)
        self.share = LossShare()

    @property
    def rule(self) -> DetectionRule:
        """What makes a detection."""
        return DetectionRule(self.score_thresh, self.nms_thresh, self.detections_per_img, *self._soft_nms)

    @rule.setter
    def rule(self, rule: DetectionRule) -> None:
        self.score_thresh, self.nms_thresh = rule.score_threshold, rule.nms_threshold
        self.detections_per_img = rule.detections_per_image
        self._soft_nms = (rule.soft_nms, rule.soft_nms_sigma)

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Objects and labels for proposals.

        Args:
            proposals: Per image ``(N, 4)`` xyxy.
            gt_boxes: Per image ``(G, 4)`` xyxy.
            gt_labels: Per image ``(G,)`` from 1.

        Returns:
            Per image the index of each proposal's object, 0 where it has none, and its label: 0 is background, -1 is
            ignored; ``(N,)`` int64 both.
        """
        indices, labels = [], []
        for boxes, objects, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            matches = self.proposal_matcher(BoxPairs(objects, boxes))
            index = matches.clamp(min=0)
            label = classes[index] if len(classes) else index.clone()
            label[matches == BACKGROUND] = 0
            label[matches == IGNORED] = -1
            indices.append(index)
            labels.append(label)
        return indices, labels

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's; ``masks`` of a target are :class:`~a2fpn.masks.InstanceMasks`, the losses are the same.

        Args:
            features: The pyramid.
            proposals: Per image ``(P, 4)`` xyxy.
            image_shapes: Per image height and width without padding.
            targets: In training mode per image ``boxes``, ``labels`` from 1 and what the mask or keypoint head needs.
        """
        if targets is None:
            found: tuple[list[dict[str, Tensor]], dict[str, Tensor]] = super().forward(
                features, proposals, image_shapes
            )
            return found
        samples = Samples(*self.select_training_samples(proposals, targets))
        pooled = self.box_head(self.box_roi_pool(features, samples.boxes, image_shapes))
        loss_classifier, loss_box = fastrcnn_loss(*self.box_predictor(pooled), samples.labels, samples.deltas)
        count = sum(map(len, samples.labels))
        losses = {"loss_classifier": self.share(loss_classifier, count), "loss_box_reg": self.share(loss_box, count)}
        positives = samples.positives()
        if self.has_mask():
            pooled = self.mask_head(self.mask_roi_pool(features, positives.boxes, image_shapes))
            loss = mask_loss(
                self.mask_predictor(pooled),
                [target["masks"] for target in targets],
                positives.boxes,
                positives.objects,
                positives.labels,
                aligned=self.aligned,
                boundary_weight=self.mask_boundary_weight,
            )
            losses["loss_mask"] = self.share(loss, sum(map(len, positives.labels)))
        if self.has_keypoint():
            pooled = self.keypoint_head(self.keypoint_roi_pool(features, positives.boxes, image_shapes))
            logits = self.keypoint_predictor(pooled).contiguous()  # torchvision's loss takes views of it
            keypoints = [target["keypoints"] for target in targets]
            loss = keypointrcnn_loss(logits, positives.boxes, keypoints, positives.objects)
            images = zip(keypoints, positives.boxes, positives.objects, strict=True)
            visible = sum(int(keypoints_to_heatmap(k[i], b, logits.shape[-1])[1].sum()) for k, b, i in images)
            losses["loss_keypoint"] = self.share(loss, visible)
        return [], losses

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per image boxes ``(n, 4)``, scores ``(n,)`` descending and labels ``(n,)`` from 1.

        Args:
            class_logits: ``(R, K + 1)``, background first.
            box_regression: ``(R, 4 (K + 1))``.
            proposals: Per image ``(P, 4)`` xyxy.
            image_shapes: Per image height and width without padding.
        """
        counts = [len(boxes) for boxes in proposals]
        boxes = self.box_coder.decode(box_regression, proposals)
        scores = class_logits.softmax(-1)
        rule = self.rule
        results = [
            box_detections(image_boxes, image_scores, size, rule)
            for image_boxes, image_scores, size in zip(
                torch.split(boxes, counts), torch.split(scores, counts), image_shapes, strict=True
            )
        ]
        found, best, labels = (list(column) for column in zip(*results, strict=True))
        return found, best, labels
