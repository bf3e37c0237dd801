"""Targets of mask heads: instance masks cropped to boxes, without full-size planes.

Shape shorthand: ``N`` objects of an image, ``R`` boxes matched to them, ``M`` side of a predicted mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from a2fpn import device
from a2fpn.masks import InstanceMasks

PIXELS_AT_ONCE = 2**27
"""Pixels of an image's masks up to which a GPU uses full planes; each takes five bytes."""

_CELLS = 2**22
"""Pixels of planes in memory at once, unless a single object takes more."""


def mask_targets(masks: InstanceMasks, boxes: Tensor, objects: Tensor, size: int, *, aligned: bool = False) -> Tensor:
    """Crop instance masks to boxes and resize them by RoIAlign with one sample per pixel.

    These are torchvision's targets, which it computes from N full-size float32 planes. Here each object has a plane
    that covers its window and its boxes; the values differ by rounding (coordinates have 24 bits, so by 1e-3 at most in
    images of up to 4096 pixels).

    Args:
        masks: N masks.
        boxes: ``(R, 4)`` xyxy in pixels of the masks.
        objects: ``(R,)`` int64, index of the mask of each box.
        size: ``M``.
        aligned: Whether to shift by half a pixel, as for features pooled with a shift; torchvision never does.

    Returns:
        ``(R, M, M)`` float32 in [0, 1].

    Example:
        >>> masks = InstanceMasks.from_dense(torch.tensor([[[0, 0, 1, 1]] * 4]))
        >>> mask_targets(masks, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0]), 2)
        tensor([[[0.2500, 1.0000],
                 [0.2500, 1.0000]]])
    """
    return _targets([masks], [boxes], [objects], size, aligned)


def _targets(
    masks: Sequence[InstanceMasks], boxes: Sequence[Tensor], objects: Sequence[Tensor], size: int, aligned: bool
) -> Tensor:
    """Targets of all images' boxes, ``(sum R, M, M)``; the number of operations doesn't grow with the objects."""
    rois = torch.cat(list(boxes)).detach().float()
    targets = rois.new_zeros(len(rois), size, size)
    if not len(rois):
        return targets
    if device.runs_ahead(rois) and all(math.prod(image.shape) <= PIXELS_AT_ONCE for image in masks):
        return torch.cat([_from_planes(*own, size, aligned) for own in zip(masks, boxes, objects, strict=True)])
    firsts = itertools.accumulate(map(len, masks), initial=0)
    index = torch.cat([own + first for own, first in zip(objects, firsts, strict=False)])
    windows = torch.cat([image.windows for image in masks])
    limits = torch.cat([own.windows.new_tensor(own.size[::-1]).expand(len(own), 2) for own in masks])
    # A plane starts at or before its boxes, so that subtracting its corner from theirs is exact, and has at least one
    # empty pixel around the window, except at the image's edge, where RoIAlign repeats the outermost pixels.
    lowest = _per_object(rois[:, :2].floor().long(), index, len(windows), "amin")
    highest = _per_object(rois[:, 2:].ceil().long(), index, len(windows), "amax")
    corners = torch.minimum(lowest, windows[:, :2] - 1).clamp(min=0)
    ends = torch.minimum(torch.maximum(highest, windows[:, 2:] + 1), limits)
    areas = (windows[:, 2:] - windows[:, :2]).prod(1)
    table = torch.cat([corners, ends, windows, (areas.cumsum(0) - areas)[:, None]], 1)
    pixels = torch.cat([*(image.pixels for image in masks), masks[0].pixels.new_zeros(1)])
    used = torch.unique(index)
    slots = torch.full_like(areas, -1)
    for group, width, height in _groups((ends - corners)[used].tolist()):
        chosen = used[torch.tensor(group, device=used.device)]
        slots.fill_(-1)[chosen] = torch.arange(len(group), device=used.device)
        rows = torch.where(slots[index] >= 0)[0]
        of_rows = index[rows]
        origins = ends[of_rows] - ends.new_tensor([width, height])
        placed = torch.cat([slots[of_rows, None], rois[rows] - origins.repeat(1, 2)], 1)
        planes = _planes(pixels, table[chosen], width, height)
        targets[rows] = roi_align(planes[:, None], placed, size, aligned=aligned)[:, 0]
    return targets


def _from_planes(masks: InstanceMasks, boxes: Tensor, objects: Tensor, size: int, aligned: bool) -> Tensor:
    """Compute the same from full planes, which takes more memory but fewer operations on a GPU."""
    boxes = boxes.detach().float()
    rois = torch.cat([objects[:, None].to(boxes.dtype), boxes], 1)
    # Calls the operator directly: with deterministic algorithms torchvision's function replaces it for the sake of
    # gradients, which are not needed here.
    pooled: Tensor = torch.ops.torchvision.roi_align(masks.dense()[:, None].float(), rois, 1.0, size, size, -1, aligned)
    return pooled[:, 0]


def _groups(sizes: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], int, int]]:
    """Group objects by similar size of their planes (width, height), each group with its maximum sides."""
    order = sorted(range(len(sizes)), key=lambda i: -max(sizes[i]))
    group: list[int] = []
    width = height = 0
    for i in order:
        wider, higher = max(width, sizes[i][0]), max(height, sizes[i][1])
        if group and (2 * max(sizes[i]) < max(sizes[group[0]]) or (len(group) + 1) * wider * higher > _CELLS):
            yield group, width, height
            group, wider, higher = [], *sizes[i]
        group.append(i)
        width, height = wider, higher
    if group:
        yield group, width, height


def _planes(pixels: Tensor, table: Tensor, width: int, height: int) -> Tensor:
    """Build the planes around objects, ``(U, height, width)`` float32, each aligned to the lower right.

    The end of a plane is the limit of RoIAlign. Before its corner the first pixels are repeated, as by RoIAlign.

    Args:
        pixels: Pixels of all windows, and a zero.
        table: ``(U, 9)`` corner and end of each plane, its window, and the index of the window's first pixel.
        width: Side of the planes.
        height: Side of the planes.
    """
    (places, inside), (rows, in_rows) = (
        _places(table[:, axis], table[:, axis + 2], table[:, axis + 4], table[:, axis + 6], side)
        for axis, side in ((0, width), (1, height))
    )
    stride = (table[:, 6] - table[:, 4])[:, None]
    index = (table[:, 8:] + rows * stride)[:, :, None] + places[:, None, :]
    filled = in_rows[:, :, None] & inside[:, None, :]
    return pixels[index.where(filled, len(pixels) - 1)].float()


def _places(corner: Tensor, end: Tensor, start: Tensor, stop: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Position of each cell of the planes in its window along one axis, ``(U, side)``, and whether it is inside."""
    cells = torch.maximum(end[:, None] - side + torch.arange(side, device=end.device), corner[:, None])
    return cells - start[:, None], (cells >= start[:, None]) & (cells < stop[:, None])


def mask_loss(
    logits: Tensor,
    masks: Sequence[InstanceMasks],
    boxes: Sequence[Tensor],
    objects: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    aligned: bool = False,
    binary: bool = False,
    boundary_weight: float = 1.0,
) -> Tensor:
    """Mean binary cross-entropy of the predicted masks; zero without boxes.

    Args:
        logits: ``(sum R, K + 1, M, M)``.
        masks: Per image N masks.
        boxes: Per image ``(R, 4)`` xyxy.
        objects: Per image ``(R,)``, index of the mask of each box.
        labels: Per image ``(R,)``, class from 1.
        aligned: See :func:`mask_targets`.
        binary: Whether to binarize targets at 0.5, as in detectron2 and mmdetection; torchvision does not.
        boundary_weight: Weight of cells at the edge of their object relative to the others, 1 or more. Edge weights
            follow U-Net (Ronneberger et al., MICCAI 2015, Eq. 2), here for the object's own edge.
    """
    if not len(logits):
        return logits.sum() * 0
    wanted = _targets(masks, boxes, objects, logits.shape[-1], aligned)
    if binary:
        wanted = (wanted >= 0.5).float()
    rows = torch.arange(len(logits), device=logits.device)
    own = logits[rows, torch.cat(list(labels))]
    if boundary_weight == 1:
        return F.binary_cross_entropy_with_logits(own, wanted)
    weights = 1 + (boundary_weight - 1) * at_edge(wanted).float()
    return F.binary_cross_entropy_with_logits(own, wanted, weights, reduction="sum") / weights.sum()


def at_edge(targets: Tensor) -> Tensor:
    """Mark cells whose binarized value (at 0.5) differs from a neighbor's, diagonals included.

    Args:
        targets: ``(R, M, M)`` in [0, 1].

    Returns:
        ``(R, M, M)`` bool.

    Example:
        >>> at_edge(torch.tensor([[[0.0, 0.0, 0.0, 1.0]] * 4]))[0, 0].tolist()
        [False, False, True, True]
    """
    inside = (targets >= 0.5).float()[:, None]
    highest, lowest = (F.max_pool2d(x, 3, stride=1, padding=1) for x in (inside, 1 - inside))
    return (highest + lowest > 1)[:, 0]


def _per_object(values: Tensor, objects: Tensor, count: int, reduce: str) -> Tensor:
    """Minimum or maximum of the values ``(R, 2)`` of each of ``count`` objects."""
    index = objects[:, None].expand_as(values)
    return values.new_zeros(count, 2).scatter_reduce(0, index, values, reduce, include_self=False)
