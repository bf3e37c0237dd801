"""Objects of all images of a batch in one table, each with the index of its image.

So a batch takes as many operations as an image, and a tracer can record them for any number of images.

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
"""Height and width of each image, or of one where all images have the same."""


_ACROSS = 9
"""Classes that NMS has side by side; more are in several rows."""


def clip(boxes: Tensor, images: Tensor, sizes: Sizes) -> Tensor:
    """Boxes inside their images.

    Args:
        boxes: ``(N, 4)`` xyxy.
        images: ``(N,)`` index of the image of each.
        sizes: Of the images.

    Example:
        >>> clip(torch.tensor([[-1.0, 2.0, 7.0, 9.0]]), torch.tensor([1]), [(3, 3), (5, 6)])
        tensor([[0., 2., 6., 5.]])
    """
    # Filled and not copied there, which a device would be waited for.
    limits = torch.stack([boxes.new_full((), side) for height, width in sizes for side in (width, height)])
    limits = limits if len(sizes) == 1 else limits.view(-1, 1, 2)[images]
    return boxes.reshape(-1, 2, 2).clamp(min=0).minimum(limits).reshape(-1, 4)


def largest(sizes: Sizes) -> tuple[int, int]:
    """Height and width that no image passes."""
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
    """Rows that NMS keeps of each class of each image, best first.

    Args:
        boxes: ``(N, 4)`` xyxy, inside the size.
        scores: ``(N,)``.
        labels: ``(N,)`` in ``0..classes - 1``.
        images: ``(N,)`` index of the image of each.
        iou_threshold: IoU above which a better box removes one.
        classes: Number of classes.
        size: Height and width that no image passes.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(3, 1)
        >>> labels, images = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])
        >>> nms_of_each(boxes, torch.tensor([0.5, 0.6, 0.4]), labels, images, 0.5, classes=2, size=(4, 4))
        tensor([1, 2])
    """
    if not device.runs_ahead(boxes):
        kept: Tensor = batched_nms(boxes, scores, images * classes + labels, iou_threshold)
        return kept
    # A place of its own for each class of each image, on a grid, where coordinates stay small and so exact.
    column, row = labels, images
    if classes > _ACROSS:
        across = math.isqrt(classes - 1) + 1
        column, row = labels % across, images * -(-classes // across) + labels // across
    offset = torch.stack([column * (size[1] + 1), row * (size[0] + 1)], 1).to(boxes.dtype)
    apart: Tensor = nms(boxes + torch.cat([offset, offset], 1), scores, iou_threshold)
    return apart


def first_of_each(images: Tensor, count: int, limit: int) -> Tensor:
    """Rows of the first objects of each image, image by image, in the order they have.

    Args:
        images: ``(N,)`` index of the image of each.
        count: Number of images.
        limit: Most objects of an image.

    Example:
        >>> first_of_each(torch.tensor([1, 0, 1, 1, 0]), 2, 2)
        tensor([1, 4, 0, 2])
    """
    place = torch.arange(images.shape[0], device=images.device)
    # Keys that all differ, since ONNX knows no stable sort.
    order = (images * images.shape[0] + place).argsort()
    numbers = (images[:, None] == torch.arange(count, device=images.device)).sum(0)
    first = numbers.cumsum(0) - numbers
    rank = place - first[images[order]]
    return order[(rank < limit).nonzero()[:, 0]]


def split_images(found: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Per image the table without the column ``images``, which must be in ascending order."""
    columns = dict(found)
    images = columns.pop("images")
    numbers = (images[:, None] == torch.arange(count, device=images.device)).sum(0).tolist()
    parts = zip(*(torch.split(x, numbers) for x in columns.values()), strict=True)
    return [dict(zip(columns, part, strict=True)) for part in parts]
