"""Pasting of masks predicted inside boxes into the image.

Shape shorthand: ``N`` objects, ``M`` x ``M`` mask cells inside a box, ``H`` x ``W`` image pixels.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

from a2fpn import device
from a2fpn.errors import ConfigError

PasteRule = Literal["exact", "torchvision"]
PASTE_RULES: tuple[str, ...] = typing.get_args(PasteRule)


def mask_windows(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], *, rule: PasteRule = "exact"
) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the pixels that each mask covers in the image.

    ``"exact"`` samples the mask bilinearly at the centers of the pixels inside the box. ``"torchvision"`` reproduces
    torchvision: it rounds the box down to whole pixels and resizes the mask to them, which shifts edges by up to a
    pixel. For objects of ten pixels that costs several points of AP.

    Args:
        masks: (N, 1, M, M) probabilities inside each box.
        boxes: (N, 4) xyxy, image pixels.
        size: (H, W) of the image.
        rule: The pasting method.

    Yields:
        Probabilities (h, w) inside the image, and the row and column of their first pixel; h or w may be 0.

    Raises:
        ValueError: For an unknown rule, or shapes that don't match.
    """
    _check(masks, boxes, rule)
    if rule == "exact":
        for (mask,), (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
            rows, top = _resample(mask, y0, y1, size[0])
            columns, left = _resample(rows.T, x0, x1, size[1])
            yield columns.T, top, left
    elif len(masks):
        padded, scale = expand_masks(masks, padding=1)
        for (mask,), box in zip(padded, expand_boxes(boxes, scale).to(torch.int64).tolist(), strict=True):
            yield _stretch(mask, box, size)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], *, rule: PasteRule = "exact") -> Tensor:
    """Paste masks into the image, zero outside their boxes.

    Args:
        masks: (N, 1, M, M) probabilities inside each box.
        boxes: (N, 4) xyxy, image pixels.
        size: (H, W) of the image.
        rule: See :func:`mask_windows`.

    Returns:
        (N, 1, H, W) probabilities.

    Example:
        >>> paste_masks(torch.ones(1, 1, 4, 4), torch.tensor([[1.0, 0.6, 3.4, 2.0]]), (3, 4))[0, 0]
        tensor([[0., 0., 0., 0.],
                [0., 1., 1., 0.],
                [0., 0., 0., 0.]])
    """
    if device.runs_ahead(masks):
        return _paste_at_once(masks, boxes, size, rule)
    pasted = masks.new_zeros(len(masks), 1, *size)
    for i, (window, top, left) in enumerate(mask_windows(masks, boxes, size, rule=rule)):
        pasted[i, 0, top : top + window.shape[0], left : left + window.shape[1]] = window
    return pasted


def _check(masks: Tensor, boxes: Tensor, rule: str) -> None:
    if rule not in PASTE_RULES:
        raise ConfigError(f"Unknown rule to paste masks {rule!r}; expected one of {', '.join(PASTE_RULES)}.")
    if masks.ndim != 4 or masks.shape[1] != 1 or boxes.shape != (len(masks), 4):
        raise ConfigError(
            f"masks must be (N, 1, M, M) and boxes (N, 4), got {tuple(masks.shape)} and {tuple(boxes.shape)}."
        )


_PIXELS_AT_ONCE = 2**26
"""Maximum number of pixels that a GPU pastes at once; each takes about 12 bytes in addition to the result."""


def _paste_at_once(masks: Tensor, boxes: Tensor, size: tuple[int, int], rule: PasteRule) -> Tensor:
    """Paste all masks by a few operations on whole images, since small operations per mask underuse a GPU."""
    _check(masks, boxes, rule)
    start, stop = boxes[:, :2], boxes[:, 2:]
    # Pixels whose centers are inside the box.
    first, last = torch.ceil(start - 0.5), torch.ceil(stop - 0.5)
    if rule == "torchvision" and len(masks):
        masks, scale = expand_masks(masks, padding=1)
        corners = expand_boxes(boxes, scale).trunc()
        start, stop = corners[:, :2], torch.maximum(corners[:, 2:] + 1, corners[:, :2] + 1)
        first, last = start, stop
    pasted = masks.new_empty(len(masks), 1, *size)
    step = max(1, _PIXELS_AT_ONCE // max(1, size[0] * size[1]))
    for at in range(0, len(masks), step):
        part = slice(at, at + step)
        x = masks[part, 0]
        for axis in (1, 0):
            begin, end, low, high = (edge[part, axis, None] for edge in (start, stop, first, last))
            x = _spread(x, begin, end, low, high, size[1 - axis]).transpose(1, 2)
        pasted[part, 0] = x
    return pasted


def _spread(x: Tensor, start: Tensor, stop: Tensor, first: Tensor, last: Tensor, limit: int) -> Tensor:
    """Resample masks ``(n, M, L)`` bilinearly to pixels ``(n, limit, L)``; the other tensors are ``(n, 1)``."""
    cells = x.shape[1]
    pixels = torch.arange(limit, dtype=x.dtype, device=x.device)
    positions = ((pixels + 0.5 - start) * (cells / (stop - start)) - 0.5).nan_to_num().clamp(0, cells - 1)
    low = positions.long()
    index = torch.stack([low, (low + 1).clamp(max=cells - 1)])[..., None].expand(-1, -1, -1, x.shape[2])
    spread = torch.lerp(x.gather(1, index[0]), x.gather(1, index[1]), (positions - low)[..., None])
    inside = (pixels >= first) & (pixels < last)
    return torch.where(inside[..., None], spread, 0)


def _resample(mask: Tensor, start: float, stop: float, limit: int) -> tuple[Tensor, int]:
    """Bilinear samples along dim 0 at the centers of the pixels in [start, stop) and [0, limit)."""
    cells = len(mask)
    first, last = max(math.ceil(start - 0.5), 0), min(math.ceil(stop - 0.5), limit)
    if last <= first:
        return mask[:0], first
    centers = torch.arange(first, last, dtype=mask.dtype, device=mask.device) + 0.5
    positions = ((centers - start) * (cells / (stop - start)) - 0.5).clamp(0, cells - 1)
    low = positions.long()
    high = (low + 1).clamp(max=cells - 1)
    return torch.lerp(mask[low], mask[high], (positions - low)[:, None]), first


def _stretch(mask: Tensor, box: list[int], size: tuple[int, int]) -> tuple[Tensor, int, int]:
    """Resize a mask to an inclusive integer box, clipped to the image."""
    x0, y0, x1, y1 = box
    shape = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
    stretched = F.interpolate(mask[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0]
    left, top = max(x0, 0), max(y0, 0)
    right, bottom = max(min(x1 + 1, size[1]), left), max(min(y1 + 1, size[0]), top)
    return stretched[top - y0 : bottom - y0, left - x0 : right - x0], top, left
