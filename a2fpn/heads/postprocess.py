"""Post-processing of candidates to detections: score threshold, NMS and soft-NMS.

Shape shorthand: ``N`` candidates of an image.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from a2fpn import device
from a2fpn.errors import ConfigError
from a2fpn.heads.batched import Sizes, clip, first_of_each, largest, nms_of_each

SoftNms = Literal["linear", "gaussian"]
SOFT_NMS: tuple[str, ...] = typing.get_args(SoftNms)
_SMALLEST = 1e-2  # pixels, as in torchvision


@dataclass(frozen=True)
class PostprocessConfig:
    """Score threshold, NMS and maximum number of detections.

    Args:
        score_threshold: Candidates with a score not above it are dropped, between 0 and 1.
        nms_threshold: IoU above which a candidate is suppressed by a better one of its class, between 0 and 1. With
            linear soft-NMS, the IoU from which its score is lowered; gaussian soft-NMS ignores it.
        detections_per_image: Maximum number of detections per image, at least 1.
        soft_nms: Kind of soft-NMS, which lowers the scores of overlapping candidates; None for plain NMS.
        soft_nms_sigma: Sigma of the gaussian, above 0.
        candidates: Maximum number of candidates before NMS, at least 1: proposals per level and per image, boxes per
            level of a one-stage head. The model's own limits apply if they are higher; None keeps them.

    Raises:
        ValueError: For a value out of range.

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
    candidates: int | None = None

    def __post_init__(self) -> None:
        for name in ("score_threshold", "nms_threshold"):
            # The negation also rejects NaN.
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if self.detections_per_image < 1:
            raise ConfigError(f"detections_per_image must be at least 1, got {self.detections_per_image}.")
        if self.candidates is not None and self.candidates < 1:
            raise ConfigError(f"candidates must be at least 1 or None, got {self.candidates}.")
        if self.soft_nms is not None and self.soft_nms not in SOFT_NMS:
            raise ConfigError(f"soft_nms must be one of {', '.join(SOFT_NMS)} or None, got {self.soft_nms!r}.")
        if not self.soft_nms_sigma > 0:
            raise ConfigError(f"soft_nms_sigma must be above 0, got {self.soft_nms_sigma}.")


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, rule: PostprocessConfig) -> tuple[Tensor, Tensor]:
    """Apply NMS or soft-NMS per class to the candidates of an image.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)`` above the rule's threshold.
        labels: ``(N,)``.
        rule: The post-processing.

    Returns:
        Rows of the detections, and their scores in descending order, lowered by soft-NMS.
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

    Repeatedly selects the best box and lowers the scores of the others of its class by their IoU with it. ``"linear"``
    (Eq. 2) multiplies by :math:`1 - IoU` from the threshold on, ``"gaussian"`` (Eq. 3) by :math:`e^{-IoU^2 / \sigma}`.

    Args:
        boxes: ``(N, 4)`` xyxy.
        scores: ``(N,)``, 0 or more.
        labels: ``(N,)``.
        kind: Decay function of the scores.
        iou_threshold: IoU from which scores decay, for ``"linear"``.
        sigma: Sigma of the gaussian.
        score_threshold: Boxes whose score does not stay above it are dropped.
        limit: Maximum number of boxes; None for all.

    Returns:
        Rows of the selected boxes, and their new scores, descending.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [9.0, 9.0, 10.0, 10.0]])
        >>> soft_nms(boxes, torch.tensor([0.8, 0.4, 0.3]), torch.zeros(3), kind="linear")
        (tensor([0, 2, 1]), tensor([0.8000, 0.3000, 0.1000]))
    """
    device = boxes.device
    # Many small sequential steps, which are slower on a GPU.
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


def suppress_each(
    found: dict[str, Tensor], rule: PostprocessConfig, *, classes: int, count: int, sizes: Sizes
) -> dict[str, Tensor]:
    """Apply NMS or soft-NMS to the candidates of a batch; detections are grouped by image, by descending score.

    Args:
        found: ``boxes`` (N, 4) xyxy, ``scores`` (N,) above the rule's threshold, ``labels`` (N,) in
            ``0..classes - 1`` and ``images`` (N,), the image index of each.
        rule: The post-processing.
        classes: Number of classes.
        count: Number of images.
        sizes: Height and width of the images.
    """
    images = found["images"]
    if rule.soft_nms is None:
        boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
        kept = nms_of_each(boxes, scores, labels, images, rule.nms_threshold, classes=classes, size=largest(sizes))
        kept = kept[first_of_each(images[kept], count, rule.detections_per_image)]
        return {name: x[kept] for name, x in found.items()}
    parts = []
    for image in range(count):
        rows = torch.where(images == image)[0]
        own = {name: x[rows] for name, x in found.items()}
        kept, scores = suppress(own["boxes"], own["scores"], own["labels"], rule)
        parts.append({name: x[kept] for name, x in own.items()} | {"scores": scores})
    return {name: torch.cat([part[name] for part in parts]) for name in found}


def is_large(boxes: Tensor) -> Tensor:
    """Return a mask ``(N,)`` of boxes ``(N, 4)`` that are not degenerate; others lie outside the image."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST).all(1)


def box_detections(
    boxes: Tensor, scores: Tensor, images: Tensor, sizes: Sizes, rule: PostprocessConfig, *, count: int
) -> dict[str, Tensor]:
    """Detections of a batch, grouped by image, by descending score; labels start at 1.

    Args:
        boxes: ``(R, K + 1, 4)`` of each RoI and class, background first.
        scores: ``(R, K + 1)``.
        images: ``(R,)`` image index of each RoI.
        sizes: Height and width of the images.
        rule: The post-processing.
        count: Number of images.

    Returns:
        ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and ``images`` (N,).
    """
    classes = scores.shape[1] - 1
    flat, every = scores[:, 1:].flatten(), boxes[:, 1:].flatten(0, 1)
    if device.runs_ahead(scores) and not device.is_traced():
        # One synchronization with the device instead of two.
        clipped = clip(every, images.repeat_interleave(classes), sizes)
        rows = torch.where((flat > rule.score_threshold) & is_large(clipped))[0]
        found = clipped[rows]
    else:
        # The score threshold comes first, since it leaves few boxes for the following steps.
        rows = (flat > rule.score_threshold).nonzero()[:, 0]
        found = clip(every[rows], images[rows // classes], sizes)
        large = is_large(found).nonzero()[:, 0]
        rows, found = rows[large], found[large]
    candidates = {
        "boxes": found,
        "scores": flat[rows],
        "labels": rows % classes,
        "images": images[rows // classes],
    }
    kept = suppress_each(candidates, rule, classes=classes, count=count, sizes=sizes)
    return kept | {"labels": kept["labels"] + 1}
