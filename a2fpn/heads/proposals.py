"""torchvision's region proposal network, with memory-bounded matching and losses normalized over processes.

In evaluation boxes are decoded after the top-k of each level are selected. On a GPU the images of a batch are processed
together, with shapes that do not depend on values: the time of a detector's step is that of launching its kernels, and
every read from the device stalls both.

Shape shorthand: ``B`` images, ``A`` anchors of an image, ``n`` candidates of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import nms

from a2fpn import device
from a2fpn.errors import ConfigError
from a2fpn.heads.batched import clip, first_of_each, nms_of_each, split_images
from a2fpn.heads.box_coder import BoxCoder
from a2fpn.heads.loss_normalizer import GlobalLossNormalizer
from a2fpn.heads.matching import BACKGROUND, BoxPairs, ChunkedMatcher
from a2fpn.heads.roi_pool import join_rois
from a2fpn.heads.sampling import draw
from a2fpn.pyramid import Features

LIKELY = 0.01
"""Minimum objectness of the additional proposals when a limit is raised.

On nine tiled images of nuclei 0.01 and 0.05 find the same 117 of 118 objects, in 11.3 and 9.1 s. The lower value is for
objects that are less similar to the training data.
"""
_BETA = 1 / 9  # beta of torchvision's smooth L1 box loss


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Drop-in replacement of torchvision's ``RegionProposalNetwork`` with the same arguments and results."""

    proposal_matcher: ChunkedMatcher

    box_coder: BoxCoder

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        matcher: Any = self.proposal_matcher
        self.box_coder = BoxCoder(self.box_coder.weights)
        self.box_similarity = BoxPairs
        self.proposal_matcher = ChunkedMatcher(
            matcher.high_threshold, matcher.low_threshold, allow_low_quality_matches=True
        )
        self.normalizer = GlobalLossNormalizer()

    def forward(
        self, images: ImageList, features: Features, targets: list[dict[str, Any]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Compute proposals and, in training mode, losses.

        Args:
            images: The batch, of which only the sizes are used.
            features: The pyramid.
            targets: Per image ``boxes`` (G, 4) xyxy.

        Returns:
            Per image boxes ``(P, 4)`` xyxy, by descending score; the losses, empty in evaluation.
        """
        if device.runs_ahead(images.tensors):
            return self.forward_at_once(images, features, targets)
        if self.training:
            found: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, features, targets)
            return found
        rois = self.rois(images, features)
        table = {"boxes": rois[:, 1:], "images": rois[:, 0].long()}
        return [own["boxes"] for own in split_images(table, len(images.image_sizes))], {}

    def rois(self, images: ImageList, features: Features, *, candidates: int | None = None) -> Tensor:
        """Proposals of all images in evaluation, ``(R, 5)``: image index and box, by image and descending score.

        Args:
            images: The batch; its sizes may be one pair for all images.
            features: The pyramid.
            candidates: Raises the limits per level and per image to this. Additional proposals must have an objectness
                of at least :data:`LIKELY`, so that their number grows with the objects, not with the limit.
        """
        if candidates is None and device.runs_ahead(images.tensors) and not device.is_traced():
            return join_rois(self.forward_at_once(images, features)[0])
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        return self._in_one_table(objectness, deltas, self.anchor_generator.picker(images, maps), images, candidates)

    def _in_one_table(
        self,
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors_of: Callable[[int, Tensor], Tensor],
        images: ImageList,
        candidates: int | None,
    ) -> Tensor:
        columns, numbers = [], []
        pre, post = self.pre_nms_top_n(), self.post_nms_top_n()
        batch, size = objectness[0].shape[0], images.tensors.shape[-2:]
        for level, (logits, offsets) in enumerate(zip(objectness, deltas, strict=True)):
            flat = logits.permute(0, 2, 3, 1).reshape(batch, -1)
            number = device.new_size(torch.sym_min(max(pre, candidates or 0), flat.shape[1]), most=flat.shape[1])
            best, rows = flat.topk(number, 1)
            codes = offsets.permute(0, 2, 3, 1).reshape(batch, -1, 4)
            codes = codes.gather(1, rows[..., None].expand(-1, -1, 4))
            if candidates is not None:
                best[:, pre:].masked_fill_(best[:, pre:].sigmoid() < LIKELY, -math.inf)
            columns.append([best, codes, anchors_of(level, rows)])
            numbers.append(rows.new_full((number,), level))
        scores, codes, anchors = (torch.cat(column, 1) for column in zip(*columns, strict=True))
        levels = torch.cat(numbers)
        owner = torch.arange(batch, device=levels.device)[:, None].expand(batch, levels.shape[0]).reshape(-1)
        scores = scores.reshape(-1).sigmoid()
        boxes = self.box_coder.decode_single(codes.view(-1, 4), anchors.view(-1, 4))
        boxes = clip(boxes, owner, images.image_sizes)
        large = ((boxes[:, 2:] - boxes[:, :2]) >= self.min_size).all(1)
        possible = large & (scores >= self.score_thresh)
        rows = (possible if candidates is None else possible & (scores > 0)).nonzero()[:, 0]
        boxes, owner, scores = boxes[rows], owner[rows], scores[rows]
        levels = levels.expand(batch, -1).reshape(-1)[rows]
        kept = nms_of_each(boxes, scores, levels, owner, self.nms_thresh, classes=len(columns), size=(size[0], size[1]))
        if candidates is not None:
            likely = scores[kept] >= LIKELY
            likely[first_of_each(owner[kept], batch, post)] = True
            kept, post = kept[likely], max(post, candidates)
        kept = kept[first_of_each(owner[kept], batch, post)]
        return torch.cat([owner[kept, None].to(boxes.dtype), boxes[kept]], 1)

    def forward_at_once(
        self, images: ImageList, features: Features, targets: list[dict[str, Any]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run :meth:`forward` for all images in one batch."""
        maps = list(features.values())
        by_level: tuple[list[Tensor], list[Tensor]] = self.head(maps)
        anchors = self.anchor_generator(images, maps)[0]  # the same for every image
        counts = [x[0].numel() for x in by_level[0]]
        flat = concat_box_prediction_layers(*by_level)
        objectness, deltas = flat[0].view(len(images.image_sizes), -1), flat[1].view(len(images.image_sizes), -1, 4)
        proposals = self._best(objectness.detach(), deltas.detach(), anchors, images.image_sizes, counts)
        if not self.training:
            return proposals, {}
        if targets is None:
            raise ConfigError("In training mode targets must be given.")
        return proposals, self._losses(objectness, deltas, anchors, [target["boxes"] for target in targets])

    def _best(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        sizes: Sequence[tuple[int, int]],
        counts: Sequence[int],
    ) -> list[Tensor]:
        widths, columns, first = [min(self.pre_nms_top_n(), count) for count in counts], [], 0
        for width, count in zip(widths, counts, strict=True):
            columns.append(objectness[:, first : first + count].topk(width, 1)[1] + first)
            first += count
        index = torch.cat(columns, 1)
        scores = objectness.gather(1, index).sigmoid()
        chosen = deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = self.box_coder.decode_single(chosen.flatten(0, 1), anchors[index.flatten()]).view(*index.shape, 4)
        boxes = torch.stack([_clip(image, size) for image, size in zip(boxes, sizes, strict=True)])
        # Small and unlikely boxes are kept as empty boxes, which suppress nothing and sort last.
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = (sides >= self.min_size).all(2) & (scores >= self.score_thresh)
        boxes, scores = boxes * valid[..., None], torch.where(valid, scores, -1.0)
        if device.has_triton(boxes):
            kept = valid & self._suppress(boxes, widths)
            best_scores, best = torch.where(kept, scores, -1.0).topk(min(self.post_nms_top_n(), scores.shape[1]), 1)
            boxes, found = boxes.gather(1, best[..., None].expand(-1, -1, 4)), (best_scores >= 0).sum(1).tolist()
            return [b[:number] for b, number in zip(boxes, found, strict=True)]
        levels = [boxes.new_full((width,), level) for level, width in enumerate(widths)]
        apart = boxes + torch.cat(levels)[:, None] * (max(map(max, sizes)) + 1.0)
        rows = [nms(b, s, self.nms_thresh)[: self.post_nms_top_n()] for b, s in zip(apart, scores, strict=True)]
        found = torch.stack([v[k].sum() for v, k in zip(valid, rows, strict=True)]).tolist()
        return [b[k[:number]] for b, k, number in zip(boxes, rows, found, strict=True)]

    def _suppress(self, boxes: Tensor, widths: Sequence[int]) -> Tensor:
        """Non-maximum suppression of boxes ``(B, n, 4)`` within each image and level; ``(B, n)``, True if kept."""
        from a2fpn.heads.nms_triton import nms_of_groups

        most = max(widths)
        levels = [F.pad(level, (0, 0, 0, most - level.shape[1])) for level in boxes.split(list(widths), 1)]
        kept = nms_of_groups(torch.stack(levels, 1).flatten(0, 1), self.nms_thresh).view(len(boxes), len(widths), most)
        return torch.cat([kept[:, level, :width] for level, width in enumerate(widths)], 1)

    def _losses(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, objects: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        matches = torch.stack([self.proposal_matcher(BoxPairs(boxes, anchors)) for boxes in objects])
        labels = (matches >= 0).long() - (matches < BACKGROUND).long()
        sampler = self.fg_bg_sampler
        drawn = draw(labels, size=sampler.batch_size_per_image, positive_fraction=sampler.positive_fraction)
        positive, is_positive = drawn.positive, drawn.is_positive
        own = [
            boxes.float()[match.clamp(min=0)] if len(boxes) else boxes.new_zeros(len(match), 4, dtype=torch.float32)
            for boxes, match in zip(objects, matches.gather(1, positive), strict=True)
        ]
        wanted = self.box_coder.encode_single(torch.cat(own), anchors[positive.flatten()]).view(*positive.shape, 4)
        # Unused slots hold arbitrary values, whose regression targets may be NaN.
        wanted = torch.where(is_positive[..., None], wanted, 0)
        got = deltas.gather(1, positive[..., None].expand(-1, -1, 4))
        sampled = is_positive.sum() + drawn.is_negative.sum()
        box_loss = F.smooth_l1_loss(got, wanted, beta=_BETA, reduction="none").sum(2)
        logits = objectness.gather(1, torch.cat([positive, drawn.negative], 1))
        truth = torch.cat([torch.ones_like(is_positive), torch.zeros_like(drawn.is_negative)], 1).to(logits.dtype)
        counted = torch.cat([is_positive, drawn.is_negative], 1)
        entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        losses = {
            "loss_objectness": (entropy * counted).sum() / sampled,
            "loss_rpn_box_reg": (box_loss * is_positive).sum() / sampled,
        }
        if self.normalizer.enabled:
            losses = {name: self.normalizer(loss, int(sampled)) for name, loss in losses.items()}
        return losses

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute torchvision's losses, normalized by the number of sampled anchors.

        Args:
            objectness: ``(B * A, 1)`` logits of all anchors.
            pred_bbox_deltas: ``(B * A, 4)``.
            labels: Per image ``(A,)``: 1 object, 0 background, -1 ignored.
            regression_targets: Per image ``(A, 4)``.
        """
        losses = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        if not self.normalizer.enabled:
            return losses[0], losses[1]
        sampler, sampled = self.fg_bg_sampler, 0
        for label in labels:  # the sampler's counts; its choice is not exposed
            positives = min(int((label >= 1).sum()), int(sampler.batch_size_per_image * sampler.positive_fraction))
            sampled += positives + min(int((label == 0).sum()), sampler.batch_size_per_image - positives)
        return self.normalizer(losses[0], sampled), self.normalizer(losses[1], sampled)


def _clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes ``(n, 4)`` to an image of a height and width."""
    x, y = boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])
    return torch.stack([x, y], 2).flatten(1)
