"""Candidates to detections of an image: score threshold, NMS and soft-NMS.

Shape shorthand: ``N`` candidates of an image.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from a2fpn import device
from a2fpn.errors import ConfigError

SoftNms = Literal["linear", "gaussian"]
SOFT_NMS: tuple[str, ...] = typing.get_args(SoftNms)
_SMALLEST = 1e-2  # pixels, as in torchvision


@dataclass(frozen=True)
class PostprocessConfig:
    """Score threshold, NMS and maximum number of detections.

    Args:
        score_threshold: Candidates that do not score more are dropped, between 0 and 1.
        nms_threshold: IoU above which a better candidate of the same class removes one, between 0 and 1. With linear
            soft-NMS, the IoU from which it lowers its score; gaussian soft-NMS doesn't read it.
        detections_per_image: Most detections of an image, at least 1.
        soft_nms: Lowers the scores of candidates that overlap instead of removing them; None removes.
        soft_nms_sigma: Width of the gaussian, above 0.

    Raises:
        ValueError: For a value out of its range.

    Example:
        >>> PostprocessConfig(soft_nms="gauss")
        Traceback (most recent call last):
        ...
        a2fpn.errors.ConfigError: soft_nms must be one of linear, gaussian or None, got 'gauss'.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    soft_nms: SoftNms | None = None
    soft_nms_sigma: float = 0.5

    def __post_init__(self) -> None:
        for name in ("score_threshold", "nms_threshold"):
            # Written so that NaN is bad as well.
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if self.detections_per_image < 1:
            raise ConfigError(f"detections_per_image must be at least 1, got {self.detections_per_image}.")
        if self.soft_nms is not None and self.soft_nms not in SOFT_NMS:
            raise ConfigError(f"soft_nms must be one of {', '.join(SOFT_NMS)} or None, got {self.soft_nms!r}.")
        if not self.soft_nms_sigma > 0:
            raise ConfigError(f"soft_nms_sigma must be above 0, got {self.soft_nms_sigma}.")


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, rule: PostprocessConfig) -> tuple[Tensor, Tensor]:
    """The detections among the candidates of an image that score more than the threshold, class by class.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)`` above the rule's threshold.
        labels: ``(N,)``.
        rule: What makes a detection.

    Returns:
        Their rows, and their scores in descending order, which soft-NMS has lowered.
    """
    if rule.soft_nms is None:
        kept = batched_nms(boxes, scores, labels, rule.nms_threshold)[: rule.detections_per_image]
        return kept, scores[kept]
    return soft_nms(
        boxes,
        scores,
        labels,
        kind=rule.soft_nms,
        iou_threshold=rule.nms_threshold,
        sigma=rule.soft_nms_sigma,
        score_threshold=rule.score_threshold,
        limit=rule.detections_per_image,
    )


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    kind: SoftNms,
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Soft-NMS per class (Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", ICCV 2017).

    The best box is taken, the scores of the others of its class fall with their IoU, and so on. ``"linear"`` (Eq. 2)
    multiplies by :math:`1 - IoU` from the threshold on, ``"gaussian"`` (Eq. 3) by :math:`e^{-IoU^2 / \sigma}`.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)``, 0 or more.
        labels: ``(N,)``.
        kind: How scores fall.
        iou_threshold: IoU from which they do, for ``"linear"``.
        sigma: Width of the gaussian.
        score_threshold: Boxes whose score does not stay above it are dropped.
        limit: Most boxes taken; None takes all.

    Returns:
        Rows of the boxes taken, and their new scores, descending.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [9.0, 9.0, 10.0, 10.0]])
        >>> soft_nms(boxes, torch.tensor([0.8, 0.4, 0.3]), torch.zeros(3), kind="linear")
        (tensor([0, 2, 1]), tensor([0.8000, 0.3000, 0.1000]))
    """
    device = boxes.device
    # One small step after the other: a GPU would only wait.
    boxes, remaining, labels = boxes.detach().float().cpu(), scores.detach().float().cpu().clone(), labels.cpu()
    kept: list[int] = []
    lowered: list[float] = []
    for _ in range(len(boxes) if limit is None else min(limit, len(boxes))):
        best = int(remaining.argmax())
        score = float(remaining[best])
        if not score > score_threshold:
            break
        kept.append(best)
        lowered.append(score)
        iou = box_iou(boxes[best, None], boxes)[0]
        factor = torch.exp(-iou.square() / sigma) if kind == "gaussian" else 1 - iou * (iou >= iou_threshold)
        remaining *= torch.where(labels == labels[best], factor, 1.0)
        remaining[best] = -1
    return torch.tensor(kept, dtype=torch.int64, device=device), scores.new_tensor(lowered)


def box_detections(
    boxes: Tensor, scores: Tensor, size: tuple[int, int], rule: PostprocessConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``(P, K + 1, 4)`` boxes and ``(P, K + 1)`` scores, the background first."""
    scores = scores[:, 1:].flatten()
    labels = torch.arange(1, boxes.shape[1], device=boxes.device).repeat(len(boxes))
    if device.runs_ahead(scores):
        # One wait for the device instead of two.
        found = clip_boxes_to_image(boxes[:, 1:].reshape(-1, 4), size)
        large = ((found[:, 2:] - found[:, :2]) >= _SMALLEST).all(1)
        rows = torch.where((scores > rule.score_threshold) & large)[0]
        found, scores, labels = found[rows], scores[rows], labels[rows]
    else:
        # The threshold first of all, since few are left: what comes later is then done for them alone.
        rows = torch.where(scores > rule.score_threshold)[0]
        found = clip_boxes_to_image(boxes[:, 1:].reshape(-1, 4)[rows], size)
        scores, labels = scores[rows], labels[rows]
        large = remove_small_boxes(found, min_size=_SMALLEST)
        found, scores, labels = found[large], scores[large], labels[large]
    kept, scores = suppress(found, scores, labels, rule)
    return found[kept], scores, labels[kept]
