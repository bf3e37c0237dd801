"""torchvision's region proposals, with matching in little memory and losses that can be shared among processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork

from a2fpn.heads.matching import BoxPairs, ChunkedMatcher
from a2fpn.heads.share import LossShare


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's ``RegionProposalNetwork``; it takes the same arguments and gives the same."""

    proposal_matcher: ChunkedMatcher

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        matcher: Any = self.proposal_matcher
        self.box_similarity = BoxPairs
        self.proposal_matcher = ChunkedMatcher(
            matcher.high_threshold, matcher.low_threshold, allow_low_quality_matches=True
        )
        self.share = LossShare()

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As torchvision's, per sampled anchor.

        Args:
            objectness: ``(B * A, 1)`` logits of all anchors.
            pred_bbox_deltas: ``(B * A, 4)``.
            labels: Per image ``(A,)``: 1 object, 0 background, -1 ignored.
            regression_targets: Per image ``(A, 4)``.
        """
        losses = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        if not self.share.enabled:
            return losses[0], losses[1]
        sampler, sampled = self.fg_bg_sampler, 0
        for label in labels:  # how many the sampler takes; which ones is its secret
            positives = min(int((label >= 1).sum()), int(sampler.batch_size_per_image * sampler.positive_fraction))
            sampled += positives + min(int((label == 0).sum()), sampler.batch_size_per_image - positives)
        return self.share(losses[0], sampled), self.share(losses[1], sampled)
