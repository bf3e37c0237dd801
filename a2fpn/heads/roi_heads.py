"""RoI heads of the two-stage detectors: sampling, losses and post-processing around torchvision's ``RoIHeads``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    keypointrcnn_loss,
    keypoints_to_heatmap,
)

from a2fpn import device
from a2fpn.heads.batched import Sizes, split_images
from a2fpn.heads.box_coder import BoxCoder
from a2fpn.heads.loss_normalizer import GlobalLossNormalizer
from a2fpn.heads.matching import IGNORED, BoxPairs, ChunkedMatcher
from a2fpn.heads.postprocess import PostprocessConfig, box_detections
from a2fpn.heads.roi_pool import join_rois
from a2fpn.heads.sampling import draw_rows
from a2fpn.masks.targets import mask_loss
from a2fpn.pyramid import Features

BOXES_AT_ONCE, MASKS_AT_ONCE = 4096, 1024
"""Maximum number of RoIs whose pooled features are in memory at once: 200 MB with 256 channels."""


class Samples(NamedTuple):
    """Sampled boxes of a stage and their targets, per image.

    Args:
        boxes: ``(S, 4)`` xyxy.
        objects: ``(S,)`` index of the ground-truth object that each box is matched to.
        labels: ``(S,)`` class, 0 for background.
        deltas: ``(S, 4)`` regression targets.
    """

    boxes: list[Tensor]
    objects: list[Tensor]
    labels: list[Tensor]
    deltas: list[Tensor]

    def positives(self) -> Samples:
        """Select the boxes that are matched to an object."""
        keep = positive_rows(self.labels)
        return self._rows(keep)

    def with_masks(self, targets: Sequence[Mapping[str, Any]]) -> Samples:
        """Select positives whose objects have masks; see ``has_mask`` of the targets."""
        if not any("has_mask" in target for target in targets):
            return self
        every = zip(targets, self.objects, strict=True)
        return self._rows([own["has_mask"][x] if "has_mask" in own else x >= 0 for own, x in every])

    def _rows(self, rows: Sequence[Tensor]) -> Samples:
        return Samples(*([x[own] for x, own in zip(field, rows, strict=True)] for field in self))


def positive_rows(labels: Sequence[Tensor]) -> list[Tensor]:
    """Rows of the boxes that are matched to an object, per image, ascending.

    Args:
        labels: Per image ``(S,)``.
    """
    if not device.runs_ahead(labels[0]):
        return [torch.where(own > 0)[0] for own in labels]
    # Synchronizes with the device once instead of once per image.
    counts = torch.stack([(own > 0).sum() for own in labels]).tolist()
    order = [(own > 0).to(torch.uint8).argsort(descending=True, stable=True) for own in labels]
    return [rows[:count] for rows, count in zip(order, counts, strict=True)]


class DetectionRoIHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's ``RoIHeads`` with :class:`ChunkedMatcher` and a :class:`PostprocessConfig` per call.

    Calls without one use the thresholds in torchvision's attributes.

    Args:
        *args: torchvision's arguments.
        aligned: Whether mask targets are cropped with RoIAlign's shift by half a pixel, as the features are.
        mask_boundary_weight: See :func:`~a2fpn.masks.targets.mask_loss`.
        **kwargs: torchvision's arguments.
    """

    box_coder: BoxCoder
    proposal_matcher: ChunkedMatcher

    def __init__(self, *args: Any, aligned: bool = False, mask_boundary_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aligned = aligned
        self.mask_boundary_weight = mask_boundary_weight
        matcher = self.proposal_matcher
        self.box_coder = BoxCoder(self.box_coder.weights)
        self.proposal_matcher = ChunkedMatcher(matcher.high_threshold, matcher.low_threshold)
        self.normalizer = GlobalLossNormalizer()

    @property
    def rule(self) -> PostprocessConfig:
        """Default post-processing."""
        return PostprocessConfig(self.score_thresh, self.nms_thresh, self.detections_per_img)

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match proposals to objects.

        Args:
            proposals: Per image ``(N, 4)`` xyxy.
            gt_boxes: Per image ``(G, 4)`` xyxy.
            gt_labels: Per image ``(G,)`` from 1.

        Returns:
            Per image the index of each proposal's matched object, 0 if unmatched, and its label: 0 is background, -1
            is ignored; ``(N,)`` int64 both.
        """
        indices, labels = [], []
        for boxes, objects, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            matches = self.proposal_matcher(BoxPairs(objects, boxes))
            index = matches.clamp(min=0)
            label = classes[index] if len(classes) else index.clone()
            label = torch.where(matches >= 0, label, (matches == IGNORED) * -1)
            indices.append(index)
            labels.append(label)
        return indices, labels

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """Sample proposals for the losses and return their rows.

        Args:
            labels: Per image ``(N,)``: 1 and up is the object's class, 0 background, -1 ignored.
        """
        if not device.runs_ahead(labels[0]):
            rows: list[Tensor] = super().subsample(labels)
            return rows
        sampler = self.fg_bg_sampler
        return draw_rows(labels, size=sampler.batch_size_per_image, positive_fraction=sampler.positive_fraction)

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
        *,
        rule: PostprocessConfig | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detect objects or compute losses as in torchvision; ``masks`` are :class:`~a2fpn.masks.InstanceMasks`.

        Args:
            features: The pyramid.
            proposals: Per image ``(P, 4)`` xyxy.
            image_shapes: Per image height and width without padding.
            targets: In training mode per image ``boxes``, ``labels`` from 1 and targets of the mask or keypoint head.
            rule: Post-processing of this call; None for torchvision's attributes.
        """
        if targets is None:
            return self.detect(features, proposals, image_shapes, rule), {}
        samples = Samples(*self.select_training_samples(proposals, targets))
        pooled = self.box_head(self.box_roi_pool(features, samples.boxes, image_shapes))
        logits, deltas = self.box_predictor(pooled)
        loss_classifier, loss_box = _box_losses(logits, deltas, samples)
        count = sum(map(len, samples.labels))
        losses = {
            "loss_classifier": self.normalizer(loss_classifier, count),
            "loss_box_reg": self.normalizer(loss_box, count),
        }
        positives = samples.positives()
        if self.has_mask():
            masked = positives.with_masks(targets)
            pooled = self.mask_head(self.mask_roi_pool(features, masked.boxes, image_shapes))
            loss = mask_loss(
                self.mask_predictor(pooled),
                [target["masks"] for target in targets],
                masked.boxes,
                masked.objects,
                masked.labels,
                aligned=self.aligned,
                boundary_weight=self.mask_boundary_weight,
            )
            losses["loss_mask"] = self.normalizer(loss, sum(map(len, masked.labels)))
        if self.has_keypoint():
            pooled = self.keypoint_head(self.keypoint_roi_pool(features, positives.boxes, image_shapes))
            logits = self.keypoint_predictor(pooled).contiguous()  # torchvision's loss calls view()
            keypoints = [target["keypoints"] for target in targets]
            loss = keypointrcnn_loss(logits, positives.boxes, keypoints, positives.objects)
            visible = 0
            if self.normalizer.enabled:  # counting synchronizes with the device
                images = zip(keypoints, positives.boxes, positives.objects, strict=True)
                visible = sum(int(keypoints_to_heatmap(k[i], b, logits.shape[-1])[1].sum()) for k, b, i in images)
            losses["loss_keypoint"] = self.normalizer(loss, visible)
        return [], losses

    def detect(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        rule: PostprocessConfig | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detect objects: per image ``boxes``, ``scores``, ``labels`` from 1, and masks or keypoint heatmaps.

        Args:
            features: The pyramid.
            proposals: Per image ``(P, 4)`` xyxy.
            image_shapes: Per image height and width without padding.
            rule: As in :meth:`forward`.
        """
        return split_images(self.objects(features, join_rois(proposals), image_shapes, rule), len(proposals))

    def objects(
        self, features: Features, rois: Tensor, sizes: Sizes, rule: PostprocessConfig | None = None
    ) -> dict[str, Tensor]:
        """Detect objects in a batch, grouped by image, by descending score.

        Args:
            features: The pyramid.
            rois: ``(R, 5)``: image index and box.
            sizes: Height and width of the images without padding, a single pair if all have one size.
            rule: As in :meth:`forward`.

        Returns:
            ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) from 1, ``images`` (N,), and masks or keypoint heatmaps.
        """
        logits, deltas = in_parts(
            lambda part: self.box_predictor(self.box_head(self.box_roi_pool(features, part, sizes))), rois
        )
        boxes = self.box_coder.decode_single(deltas, rois[:, 1:]).unflatten(1, (-1, 4))
        count = next(iter(features.values())).shape[0]
        found = box_detections(boxes, logits.softmax(-1), rois[:, 0].long(), sizes, rule or self.rule, count=count)
        if self.has_mask():

            def masks(part: Tensor, labels: Tensor) -> tuple[Tensor]:
                return (self.mask_probabilities(self.mask_head(self.mask_roi_pool(features, part, sizes)), labels),)

            (found["masks"],) = in_parts(masks, rois_of(found), found["labels"], most=MASKS_AT_ONCE)
        if self.has_keypoint():

            def heatmaps(part: Tensor) -> tuple[Tensor]:
                return (self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, part, sizes))),)

            (found["heatmaps"],) = in_parts(heatmaps, rois_of(found), most=MASKS_AT_ONCE)
        return found

    def mask_probabilities(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mask probabilities ``(N, 1, M, M)`` of the given classes ``(N,)``, from the mask head's output."""
        return masks_of_classes(self.mask_predictor(x), labels)


def in_parts(
    compute: Callable[..., tuple[Tensor, ...]], rois: Tensor, *columns: Tensor, most: int = BOXES_AT_ONCE
) -> tuple[Tensor, ...]:
    """Compute outputs of many RoIs in chunks, which bounds the memory of pooled features.

    Args:
        compute: Maps the RoIs and columns of a chunk to ``(R, ...)`` tensors.
        rois: ``(R, 5)``.
        *columns: ``(R, ...)`` further arguments.
        most: Maximum number of RoIs in a chunk.
    """
    if device.is_traced() or len(rois) <= most:
        return compute(rois, *columns)
    parts = [compute(*part) for part in zip(*(x.split(most) for x in (rois, *columns)), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def rois_of(found: Mapping[str, Tensor]) -> Tensor:
    """RoIs ``(N, 5)`` from a batch's detections."""
    boxes = found["boxes"]
    return torch.cat([found["images"][:, None].to(boxes.dtype), boxes], 1)


def masks_of_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities ``(N, 1, M, M)`` of the given classes ``(N,)``, from logits ``(N, K + 1, M, M)``."""
    rows = torch.arange(labels.shape[0], device=labels.device) * logits.shape[1] + labels
    return logits.flatten(0, 1).index_select(0, rows).sigmoid()[:, None]


def _box_losses(logits: Tensor, deltas: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Compute torchvision's losses; on a GPU without synchronizing for the positives."""
    if not device.runs_ahead(logits):
        losses: tuple[Tensor, Tensor] = fastrcnn_loss(logits, deltas, samples.labels, samples.deltas)
        return losses
    return _box_losses_at_once(logits, deltas, samples)


def _box_losses_at_once(logits: Tensor, deltas: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    labels, wanted = torch.cat(samples.labels), torch.cat(samples.deltas)
    positive = (labels > 0)[:, None]
    own = (labels.clamp(min=0)[:, None, None]).expand(-1, 1, 4)
    chosen = deltas.view(len(labels), -1, 4).gather(1, own)[:, 0]
    # Regression targets of negatives are arbitrary and may be NaN.
    wanted = torch.where(positive, wanted, 0)
    loss = F.smooth_l1_loss(chosen, wanted, beta=1 / 9, reduction="none")
    return F.cross_entropy(logits, labels), (loss * positive).sum() / labels.numel()
