"""Cascaded RoI heads: Cai & Vasconcelos, "Cascade R-CNN", CVPR 2018, with a mask head per stage.

Each stage is a torchvision ``RoIHeads``, whose sampling, box coder and post-processing are used. Box regression is
class-agnostic, and each stage refines the boxes of the previous one. Published implementations differ in the choices of
:class:`CascadeRules`.

Shape shorthand: ``R`` RoIs of the batch, ``K`` classes without background, ``M`` side of a predicted mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from a2fpn.heads.batched import Sizes, clip, split_images
from a2fpn.heads.loss_normalizer import GlobalLossNormalizer
from a2fpn.heads.postprocess import PostprocessConfig, box_detections
from a2fpn.heads.roi_heads import MASKS_AT_ONCE, Samples, in_parts, masks_of_classes, rois_of
from a2fpn.heads.roi_pool import join_rois
from a2fpn.masks.targets import mask_loss
from a2fpn.pyramid import Features

Targets = list[dict[str, Any]]


@dataclass(frozen=True)
class CascadeRules:
    """Choices in which published Cascade R-CNNs differ; defaults follow mmdetection except ``average``.

    Args:
        loss_weights: Loss weight per stage.
        box_loss_beta: Beta of the smooth L1 box loss, in regression targets; 0 is plain L1 (detectron2).
        average: Quantity averaged over the stages at test time: ``"probabilities"`` (the paper's code, detectron2) or
            ``"logits"`` (mmdetection).
        resample: Whether every stage resamples from its input boxes and the ground truth; False keeps the first
            stage's samples, ground truth included, and only relabels them (detectron2).
        scale_gradients: Whether the box heads' gradients into the pyramid are divided by the number of stages
            (detectron2, with loss weights of 1).
        aligned: Whether mask targets are cropped with RoIAlign's shift by half a pixel, as the features are.
        mask_boundary_weight: See :func:`~a2fpn.masks.targets.mask_loss`.
    """

    loss_weights: tuple[float, ...]
    box_loss_beta: float = 1.0
    average: Literal["probabilities", "logits"] = "probabilities"
    resample: bool = True
    scale_gradients: bool = False
    aligned: bool = True
    mask_boundary_weight: float = 1.0


class CascadeRoIHeads(nn.Module):
    """Stages of box heads and optional mask heads, called like torchvision's ``RoIHeads``.

    Losses are summed over the stages. At test time scores and masks are averaged over the stages that have them.

    Args:
        stages: torchvision's heads with class-agnostic box predictors; matchers, box coders and predictors differ, and
            no parameters are shared. All of them, only the first, or none have mask heads.
        rules: Choices in which implementations differ.
    """

    interleaved = False
    """True if a stage's mask head receives the boxes refined by the stage's box head, not its input boxes."""

    stages: Sequence[RoIHeads]

    def __init__(self, stages: Sequence[RoIHeads], *, rules: CascadeRules) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)  # type: ignore[assignment]
        self.rules = rules
        self.normalizer = GlobalLossNormalizer()

    def has_mask(self) -> bool:
        """Return whether the first stage, or every one, has a mask head."""
        return bool(self.stages[0].has_mask())

    @property
    def rule(self) -> PostprocessConfig:
        """Default post-processing: the last stage's."""
        rule: PostprocessConfig = self.stages[-1].rule
        return rule

    @property
    def box_roi_pool(self) -> nn.Module:
        """RoI pooling of the box heads, the same in every stage."""
        pool: nn.Module = self.stages[0].box_roi_pool
        return pool

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_sizes: Sizes,
        targets: Targets | None = None,
        *,
        rule: PostprocessConfig | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detect objects, or compute the losses in training mode.

        Args:
            features: The pyramid.
            proposals: Per image ``(P, 4)`` xyxy in pixels of the batch.
            image_sizes: Per image height and width without padding.
            targets: In training mode per image ``boxes``, ``labels`` from 1 and, with mask heads, ``masks``.
            rule: Post-processing of this call; None for the last stage's.

        Returns:
            Per image ``boxes``, ``scores``, ``labels`` from 1 and ``masks`` (N, 1, M, M), or nothing in training; and
            the losses, none in evaluation.
        """
        if targets is None:
            return self.detect(features, proposals, image_sizes, rule), {}
        return [], self.losses(features, proposals, image_sizes, targets)

    def losses(
        self, features: Features, proposals: list[Tensor], image_sizes: Sizes, targets: Targets
    ) -> dict[str, Tensor]:
        """Compute the weighted sum of the losses of all stages."""
        totals: dict[str, Tensor] = {}
        rules = self.rules
        scale = 1 / len(self.stages) if rules.scale_gradients else 1.0
        for index, (stage, weight) in enumerate(zip(self.stages, rules.loss_weights, strict=True)):
            if rules.resample or index == 0:
                samples = Samples(*stage.select_training_samples(proposals, targets))
            else:
                samples = _label(stage, proposals, targets)
            logits, deltas = _box_outputs(stage, features, samples.boxes, image_sizes, gradient_scale=scale)
            count = sum(map(len, samples.labels))
            losses = {
                name: self.normalizer(loss, count)
                for name, loss in _box_losses(logits, deltas, samples, beta=rules.box_loss_beta).items()
            }
            proposals = _refine_samples(stage, deltas, samples, image_sizes, objects=not rules.resample)
            if stage.has_mask():
                if self.interleaved:
                    samples = Samples(*stage.select_training_samples(proposals, targets))
                losses["loss_mask"] = self._mask_loss(
                    index, features, samples.positives().with_masks(targets), image_sizes, targets
                )
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + weight * loss
        return totals

    def detect(
        self, features: Features, proposals: list[Tensor], image_sizes: Sizes, rule: PostprocessConfig | None = None
    ) -> list[dict[str, Tensor]]:
        """Detect objects per image: boxes of the last stage, with scores and masks averaged over the stages."""
        return split_images(self.objects(features, join_rois(proposals), image_sizes, rule), len(proposals))

    def objects(
        self, features: Features, rois: Tensor, sizes: Sizes, rule: PostprocessConfig | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`~a2fpn.heads.DetectionRoIHeads.objects`."""
        outputs = []
        images = rois[:, 0].long()
        probabilities = self.rules.average == "probabilities"
        for index, stage in enumerate(self.stages):
            logits, deltas = in_parts(functools.partial(_detected, stage, features, sizes), rois)
            outputs.append(logits.softmax(-1) if probabilities else logits)
            boxes = stage.box_coder.decode_single(deltas, rois[:, 1:])
            if index + 1 < len(self.stages):
                rois = torch.cat([rois[:, :1], clip(boxes, images, sizes)], 1)
        mean = torch.stack(outputs).mean(0)
        scores = mean if probabilities else mean.softmax(-1)
        found = box_detections(
            boxes[:, None].expand(-1, scores.shape[1], -1),
            scores,
            images,
            sizes,
            rule or self.rule,
            count=next(iter(features.values())).shape[0],
        )
        if self.has_mask():
            masks = functools.partial(self._masks, features)
            (found["masks"],) = in_parts(masks, rois_of(found), found["labels"], most=MASKS_AT_ONCE)
        return found

    def mask_features(self, index: int, x: Tensor, previous: Tensor | None) -> Tensor:
        """Return the input of a stage's mask predictor, ``(R, C, S, S)``.

        Args:
            index: Index of the stage.
            x: Pooled features of the RoIs.
            previous: Mask features of the previous stage for the same RoIs; unused here.
        """
        y: Tensor = self.stages[index].mask_head(x)
        return y

    def training_mask_features(self, index: int, x: Tensor) -> Tensor:
        """Mask features of a stage in training, ``(R, C, S, S)``."""
        return self.mask_features(index, x, None)

    def _mask_loss(
        self, index: int, features: Features, positives: Samples, image_sizes: Sizes, targets: Targets
    ) -> Tensor:
        stage = self.stages[index]
        x = stage.mask_roi_pool(features, positives.boxes, image_sizes)
        logits = stage.mask_predictor(self.training_mask_features(index, x))
        loss = mask_loss(
            logits,
            [target["masks"] for target in targets],
            positives.boxes,
            positives.objects,
            positives.labels,
            aligned=self.rules.aligned,
            binary=True,
            boundary_weight=self.rules.mask_boundary_weight,
        )
        normalized: Tensor = self.normalizer(loss, sum(map(len, positives.labels)))
        return normalized

    def _masks(self, features: Features, rois: Tensor, labels: Tensor) -> tuple[Tensor]:
        x = self.stages[0].mask_roi_pool(features, rois)
        previous, probabilities = None, []
        for index, stage in enumerate(stage for stage in self.stages if stage.has_mask()):
            previous = self.mask_features(index, x, previous)
            probabilities.append(masks_of_classes(stage.mask_predictor(previous), labels))
        return (torch.stack(probabilities).mean(0),)


def _detected(stage: RoIHeads, features: Features, sizes: Sizes, rois: Tensor) -> tuple[Tensor, Tensor]:
    return _box_outputs(stage, features, rois, sizes)


def _box_outputs(
    stage: RoIHeads, features: Features, boxes: list[Tensor] | Tensor, sizes: Sizes, *, gradient_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Class logits ``(R, K + 1)`` and deltas ``(R, 4)``."""
    pooled: Tensor = stage.box_roi_pool(features, boxes, sizes)
    if gradient_scale != 1 and pooled.requires_grad:
        pooled.register_hook(lambda gradient: gradient * gradient_scale)
    logits, deltas = stage.box_predictor(stage.box_head(pooled))
    return logits, deltas


def _label(stage: RoIHeads, proposals: list[Tensor], targets: Targets) -> Samples:
    """Match all boxes to the ground truth with the stage's IoU threshold, without sampling."""
    boxes = [target["boxes"].to(proposals[0]) for target in targets]
    objects, labels = stage.assign_targets_to_proposals(proposals, boxes, [target["labels"] for target in targets])
    matched = [
        own[index] if len(own) else torch.zeros_like(given)
        for own, index, given in zip(boxes, objects, proposals, strict=True)
    ]
    return Samples(proposals, objects, labels, list(stage.box_coder.encode(matched, proposals)))


def _box_losses(logits: Tensor, deltas: Tensor, samples: Samples, *, beta: float) -> dict[str, Tensor]:
    """Cross-entropy, and smooth L1 over the positives, both normalized by the number of samples; zero without any."""
    labels, wanted = torch.cat(samples.labels), torch.cat(samples.deltas)
    count = max(1, len(labels))
    positive = torch.where(labels > 0)[0]
    return {
        "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / count,
        "loss_box_reg": F.smooth_l1_loss(deltas[positive], wanted[positive], beta=beta, reduction="sum") / count,
    }


def _refine(stage: RoIHeads, deltas: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Refine boxes by a stage's deltas and clip them to their images, without gradient."""
    refined = stage.box_coder.decode_single(deltas.detach(), torch.cat(boxes)).split([len(b) for b in boxes])
    return [clip_boxes_to_image(b, size) for b, size in zip(refined, sizes, strict=True)]


def _refine_samples(stage: RoIHeads, deltas: Tensor, samples: Samples, sizes: Sizes, *, objects: bool) -> list[Tensor]:
    """Refine training boxes; degenerate ones and, by default, ground-truth boxes among the samples are dropped.

    If each stage adds the ground truth to its proposals, refined ground-truth boxes would only add near duplicates.
    """
    proposals = []
    for image, boxes in enumerate(_refine(stage, deltas, samples.boxes, sizes)):
        if not objects:
            is_ground_truth = (samples.labels[image] > 0) & (samples.deltas[image] == 0).all(1)
            boxes = boxes[~is_ground_truth]
        proposals.append(boxes[remove_small_boxes(boxes, min_size=1e-2)])
    return proposals
