"""Batched operations on the objects of all images in one table, each with its image index.

A batch takes as many operations as a single image, and they can be traced for any batch size.

Shape shorthand: ``N`` objects of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from a2fpn import device

Sizes = Sequence[tuple[int, int]]
"""Height and width of each image, or a single pair if all images have one size."""


_ACROSS = 9
"""Maximum number of classes that NMS offsets along x alone; more are arranged in rows."""

_TOGETHER = 25_000
"""Boxes up to which a GPU runs one NMS for all classes and images, whose time grows with the square of their number."""

_MOST_TRACED = 2**31
"""Maximum number of objects in a batch that a tracer assumes."""


def clip(boxes: Tensor, images: Tensor, sizes: Sizes) -> Tensor:
    """Clip boxes to their images.

    Args:
        boxes: ``(N, 4)`` xyxy.
        images: ``(N,)`` image index of each.
        sizes: Sizes of the images.

    Example:
        >>> clip(torch.tensor([[-1.0, 2.0, 7.0, 9.0]]), torch.tensor([1]), [(3, 3), (5, 6)])
        tensor([[0., 2., 6., 5.]])
    """
    # new_full instead of a copy from the host, which would synchronize.
    limits = torch.stack([boxes.new_full((), side) for height, width in sizes for side in (width, height)])
    limits = limits if len(sizes) == 1 else limits.view(-1, 1, 2)[images]
    return boxes.reshape(-1, 2, 2).clamp(min=0).minimum(limits).reshape(-1, 4)


def largest(sizes: Sizes) -> tuple[int, int]:
    """Maximum height and width of the images."""
    return sizes[0] if len(sizes) == 1 else (max(height for height, _ in sizes), max(width for _, width in sizes))


def nms_of_each(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    images: Tensor,
    iou_threshold: float,
    *,
    classes: int,
    size: tuple[int, int],
) -> Tensor:
    """Rows kept by NMS within each class of each image, by descending score.

    Args:
        boxes: ``(N, 4)`` xyxy, inside the size.
        scores: ``(N,)``.
        labels: ``(N,)`` in ``0..classes - 1``.
        images: ``(N,)`` image index of each.
        iou_threshold: IoU above which a box is suppressed by one with a higher score.
        classes: Number of classes.
        size: Maximum height and width of the images.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)
        >>> labels, images = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])
        >>> nms_of_each(boxes, torch.tensor([0.5, 0.6, 0.4]), labels, images, 0.5, classes=2, size=(4, 4))
        tensor([1, 2])
    """
    if not device.runs_ahead(boxes) or (not device.is_traced() and len(boxes) > _TOGETHER):
        kept: Tensor = batched_nms(boxes, scores, images * classes + labels, iou_threshold)
        return kept
    # Boxes of each class and image are offset to their own cell of a grid, which keeps coordinates small and so exact.
    column, row = labels, images
    if classes > _ACROSS:
        across = math.isqrt(classes - 1) + 1
        column, row = labels % across, images * -(-classes // across) + labels // across
    offset = torch.stack([column * (size[1] + 1), row * (size[0] + 1)], 1).to(boxes.dtype)
    apart: Tensor = nms(boxes + torch.cat([offset, offset], 1), scores, iou_threshold)
    return apart


def first_of_each(images: Tensor, count: int, limit: int) -> Tensor:
    """Rows of the first objects of each image, grouped by image, in their given order.

    Args:
        images: ``(N,)`` image index of each.
        count: Number of images.
        limit: Maximum number of objects per image.

    Example:
        >>> first_of_each(torch.tensor([1, 0, 1, 1, 0]), 2, 2)
        tensor([1, 4, 0, 2])
    """
    place = torch.arange(images.shape[0], device=images.device)
    # Unique keys, since ONNX has no stable sort.
    order = (images * images.shape[0] + place).argsort()
    numbers = (images[:, None] == torch.arange(count, device=images.device)).sum(0)
    first = numbers.cumsum(0) - numbers
    rank = place - first[images[order]]
    kept = (rank < limit).nonzero()[:, 0]
    if device.is_traced():  # or a tracer's bounds of sizes computed from this one exceed an int64
        torch._check(kept.shape[0] <= _MOST_TRACED)
    return order[kept]


def split_images(found: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Split a table by its column ``images``, which must be ascending."""
    columns = dict(found)
    images = columns.pop("images")
    numbers = (images[:, None] == torch.arange(count, device=images.device)).sum(0).tolist()
    parts = zip(*(torch.split(x, numbers) for x in columns.values()), strict=True)
    return [dict(zip(columns, part, strict=True)) for part in parts]
