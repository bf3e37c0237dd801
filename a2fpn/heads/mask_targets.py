"""What mask heads learn from: instance masks inside boxes, from the pixels around each object alone.

Shape shorthand: ``N`` objects of an image, ``R`` boxes held against them, ``M`` side of a predicted mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from a2fpn import device
from a2fpn.masks import InstanceMasks

PIXELS_AT_ONCE = 2**27
"""Pixels of an image's masks up to which a GPU makes planes of them; each takes five bytes."""


def mask_targets(masks: InstanceMasks, boxes: Tensor, objects: Tensor, size: int, *, aligned: bool = False) -> Tensor:
    """The parts of the instance masks inside boxes, resized by RoIAlign with as many samples as it has pixels.

    torchvision's targets, which it makes of N full-size planes in float32. Here each object has a plane that covers
    its window and its boxes; the values differ by rounding (coordinates have 24 bits, so by 1e-3 at most in images of
    up to 4096 pixels).

    Args:
        masks: N masks.
        boxes: ``(R, 4)`` xyxy in pixels of the masks.
        objects: ``(R,)`` int64, which mask belongs to each box.
        size: ``M``.
        aligned: Whether to shift by half a pixel; torchvision's targets never are. Shifted features need it.

    Returns:
        ``(R, M, M)`` float32 in [0, 1].

    Example:
        >>> masks = InstanceMasks.from_dense(torch.tensor([[[0, 0, 1, 1]] * 4]))
        >>> mask_targets(masks, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0]), 2)
        tensor([[[0.2500, 1.0000],
                 [0.2500, 1.0000]]])
    """
    targets = boxes.new_zeros(len(boxes), size, size, dtype=torch.float32)
    if not len(boxes):
        return targets
    boxes = boxes.detach().float()
    if device.runs_ahead(boxes) and math.prod(masks.shape) <= PIXELS_AT_ONCE:
        return _from_planes(masks, boxes, objects, size, aligned)
    # A plane begins at or before its boxes, so that taking its corner from theirs is exact, and shows at least one
    # empty pixel around the window, unless that is the image's edge: RoIAlign repeats the outermost pixels.
    lowest = _per_object(boxes[:, :2].floor().long(), objects, len(masks), "amin")
    highest = _per_object(boxes[:, 2:].ceil().long(), objects, len(masks), "amax")
    limit = masks.windows.new_tensor([masks.size[1], masks.size[0]])
    corners = torch.minimum(lowest, masks.windows[:, :2] - 1).clamp(min=0)
    ends = torch.minimum(torch.maximum(highest, masks.windows[:, 2:] + 1), limit)
    used, crops = torch.unique(objects), masks.crops()
    planes = torch.cat([corners, ends - corners, masks.windows[:, :2] - corners], 1)[used].tolist()
    for index, (x, y, width, height, left, top) in zip(used.tolist(), planes, strict=True):
        crop = crops[index]
        plane = targets.new_zeros(1, 1, height, width)
        plane[0, 0, top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        rows = torch.where(objects == index)[0]
        targets[rows] = roi_align(plane, [boxes[rows] - boxes.new_tensor([x, y, x, y])], size, aligned=aligned)[:, 0]
    return targets


def mask_loss(
    logits: Tensor,
    masks: Sequence[InstanceMasks],
    boxes: Sequence[Tensor],
    objects: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    aligned: bool = False,
    binary: bool = False,
) -> Tensor:
    """Mean binary cross entropy of the predicted masks; zero without boxes.

    Args:
        logits: ``(sum R, K + 1, M, M)``.
        masks: Per image N masks.
        boxes: Per image ``(R, 4)`` xyxy.
        objects: Per image ``(R,)``, which mask belongs to each box.
        labels: Per image ``(R,)``, its class from 1.
        aligned: See :func:`mask_targets`.
        binary: Whether targets are 0 and 1, from 0.5 on, as in detectron2 and mmdetection; torchvision leaves them.
    """
    if not len(logits):
        return logits.sum() * 0
    wanted = torch.cat(
        [mask_targets(*image, logits.shape[-1], aligned=aligned) for image in zip(masks, boxes, objects, strict=True)]
    )
    if binary:
        wanted = (wanted >= 0.5).float()
    rows = torch.arange(len(logits), device=logits.device)
    return F.binary_cross_entropy_with_logits(logits[rows, torch.cat(list(labels))], wanted)


def _from_planes(masks: InstanceMasks, boxes: Tensor, objects: Tensor, size: int, aligned: bool) -> Tensor:
    """The same from full planes: memory is what a GPU has, and many small steps are what it lacks."""
    rois = torch.cat([objects[:, None].to(boxes.dtype), boxes], 1)
    # The operator itself: torchvision's function replaces it where algorithms are to be deterministic, for the sake of
    # gradients, which nothing here has.
    pooled: Tensor = torch.ops.torchvision.roi_align(masks.dense()[:, None].float(), rois, 1.0, size, size, -1, aligned)
    return pooled[:, 0]


def _per_object(values: Tensor, objects: Tensor, count: int, reduce: str) -> Tensor:
    """The smallest or largest of the values ``(R, 2)`` of each of ``count`` objects."""
    index = objects[:, None].expand_as(values)
    return values.new_zeros(count, 2).scatter_reduce(0, index, values, reduce, include_self=False)
