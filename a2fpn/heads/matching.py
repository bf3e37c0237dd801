"""Target assignment for anchors, proposals and FCOS locations, chunked to bound memory.

The rules are torchvision's: IoU with low-quality matches (Ren et al., "Faster R-CNN", NeurIPS 2015) and center
sampling (Tian et al., "FCOS", TPAMI 2020). torchvision builds the IoU matrix of all objects and anchors at once, which
takes 10 GB for 2,000 objects and 250,000 anchors. Above :data:`PAIRS_AT_ONCE` the matrix is computed in chunks of
anchors, with the same results.

Shape shorthand: ``G`` objects and ``N`` anchors, proposals or locations of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

PAIRS_AT_ONCE = 2**23
"""Maximum number of object-anchor pairs per chunk; each takes about 32 bytes."""

BACKGROUND = -1
"""Match index of a negative."""

IGNORED = -2
"""Match index of an ignored anchor (no loss)."""


class BoxPairs(NamedTuple):
    """Boxes to match, passed in place of their IoU matrix.

    Args:
        objects: ``(G, 4)`` xyxy.
        boxes: ``(N, 4)`` xyxy.
    """

    objects: Tensor
    boxes: Tensor


class ChunkedMatcher(Matcher):  # type: ignore[misc]
    """torchvision's ``Matcher``, called with :class:`BoxPairs` instead of a matrix.

    An anchor is matched to the object of the highest IoU if that reaches ``high_threshold``, is background below
    ``low_threshold``, and is ignored in between. With ``allow_low_quality_matches``, an anchor with the highest IoU of
    all anchors for some object is always matched to its own best object.

    Example:
        >>> objects = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 5.0], [20.0, 0.0, 30.0, 9.0]])
        >>> ChunkedMatcher(0.7, 0.3)(BoxPairs(objects, boxes))
        tensor([ 0, -2, -1])
    """

    def __call__(self, pairs: BoxPairs) -> Tensor:
        """Match boxes.

        Args:
            pairs: The boxes; without objects all are background.

        Returns:
            Index of the matched object of each box, :data:`BACKGROUND` or :data:`IGNORED`, ``(N,)`` int64.
        """
        objects, boxes = pairs
        if not len(objects) or not len(boxes):
            return boxes.new_full((len(boxes),), BACKGROUND, dtype=torch.int64)
        if len(objects) * len(boxes) <= PAIRS_AT_ONCE:
            iou = box_iou(objects, boxes)
            value, candidates = iou.max(0)
            unsurpassed = (iou == iou.amax(1)[:, None]).any(0) if self.allow_low_quality_matches else None
            return self._decide(value, candidates, unsurpassed)
        # Preallocated: small tensors allocated between large ones would fragment the allocator's memory.
        highest, value = objects.new_zeros(len(objects)), boxes.new_empty(len(boxes))
        candidates = torch.empty(len(boxes), dtype=torch.int64, device=boxes.device)
        for rows, iou in _iou_chunks(pairs):
            value[rows], candidates[rows] = iou.max(0)
            torch.maximum(highest, iou.amax(1), out=highest)
        if not self.allow_low_quality_matches:
            return self._decide(value, candidates, None)
        unsurpassed = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
        # IoUs are computed twice, since keeping them would take the memory that chunks save.
        for rows, iou in _iou_chunks(pairs):
            unsurpassed[rows] = (iou == highest[:, None]).any(0)
        return self._decide(value, candidates, unsurpassed)

    def _decide(self, value: Tensor, candidates: Tensor, unsurpassed: Tensor | None) -> Tensor:
        """Assign matches by the IoU of each box with its best object, without synchronizing with a device."""
        below = torch.where(value < self.low_threshold, BACKGROUND, IGNORED)
        good = value >= self.high_threshold
        return torch.where(good if unsurpassed is None else good | unsurpassed, candidates, below)


def _iou_chunks(pairs: BoxPairs) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of the boxes and their IoU with all objects, ``(G, n)``."""
    step = max(1, PAIRS_AT_ONCE // len(pairs.objects))
    for start in range(0, len(pairs.boxes), step):
        rows = slice(start, start + step)
        yield rows, box_iou(pairs.objects, pairs.boxes[rows])


def match_locations(objects: Tensor, anchors: Tensor, *, per_level: Sequence[int], radius: float) -> Tensor:
    """Match FCOS locations to objects.

    A location is matched to an object if it is inside its box, at most ``radius`` strides from its center, and the
    farthest side of the box is between 4 and 8 strides away; below 8 on the finest, above 4 on the coarsest level. Of
    several objects the smallest wins. (torchvision compares ``1e8 - area`` in float32, which can't tell areas apart
    that differ by less than 8 square pixels.)

    Args:
        objects: Boxes ``(G, 4)`` xyxy.
        anchors: Squares ``(N, 4)`` xyxy around the locations, as large as the stride, level by level.
        per_level: Number of locations on each level.
        radius: Radius of center sampling, in strides.

    Returns:
        Index of the matched object of each location or :data:`BACKGROUND`, ``(N,)`` int64.

    Example:
        >>> anchors = torch.tensor([[4.0, 4.0, 12.0, 12.0], [28.0, 4.0, 36.0, 12.0]])
        >>> match_locations(torch.tensor([[0.0, 0.0, 20.0, 20.0]]), anchors, per_level=[2], radius=1.5)
        tensor([ 0, -1])
    """
    if not len(objects) or not len(anchors):
        return anchors.new_full((len(anchors),), BACKGROUND, dtype=torch.int64)
    stride = anchors[:, 2] - anchors[:, 0]
    nearest, farthest = stride * 4, stride * 8
    nearest[: per_level[0]] = 0
    farthest[len(anchors) - per_level[-1] :] = torch.inf
    rows = torch.stack([*((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1), stride, nearest, farthest], 1)
    # A pair takes twice as much memory as for the IoU.
    chunks = torch.split(rows, max(1, PAIRS_AT_ONCE // 2 // len(objects)))
    return torch.cat([_match_locations(objects, chunk, radius) for chunk in chunks])


def _match_locations(objects: Tensor, rows: Tensor, radius: float) -> Tensor:
    x, y, stride, nearest, farthest = rows[:, :, None].unbind(1)
    x0, y0, x1, y1 = objects.T[:, None]
    off_center = torch.maximum((x - (x0 + x1) / 2).abs(), (y - (y0 + y1) / 2).abs())
    belongs = off_center < radius * stride
    sides = (x - x0, y - y0, x1 - x, y1 - y)
    belongs &= torch.minimum(torch.minimum(sides[0], sides[1]), torch.minimum(sides[2], sides[3])) > 0
    reach = torch.maximum(torch.maximum(sides[0], sides[1]), torch.maximum(sides[2], sides[3]))
    belongs &= (reach > nearest) & (reach < farthest)
    areas = ((x1 - x0) * (y1 - y0)).expand_as(belongs)
    smallest, index = areas.masked_fill(~belongs, torch.inf).min(1)
    nothing: Tensor = smallest.isinf()
    return torch.where(nothing, BACKGROUND, index)
