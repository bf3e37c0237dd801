"""Non-maximum suppression of many groups of boxes at once, in Triton.

torchvision's CUDA kernel takes one group, processes its boxes sequentially on a single multiprocessor, and synchronizes
with the host for their number. Here every group has its own multiprocessor, and nothing synchronizes.

Shape shorthand: ``G`` groups, ``n`` boxes of a group, ``W = ceil(n / 32)`` words of 32 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64
"""Boxes of a program, which are compared with 32 others."""


def nms_of_groups(boxes: Tensor, threshold: float) -> Tensor:
    """Run non-maximum suppression within each group.

    Args:
        boxes: ``(G, n, 4)`` float32 xyxy on a CUDA device, by descending score; empty ones suppress nothing.
        threshold: IoU above which a box is suppressed.

    Returns:
        ``(G, n)`` bool, True for kept boxes; the same as :func:`torchvision.ops.nms` for each group.
    """
    groups, n, _ = boxes.shape
    words = triton.cdiv(n, 32)
    boxes = boxes.contiguous()
    overlaps = torch.empty(groups, n, words, dtype=torch.int32, device=boxes.device)
    kept = torch.empty(groups, n, dtype=torch.bool, device=boxes.device)
    with torch.cuda.device_of(boxes):
        _overlaps[(triton.cdiv(n, _ROWS), words, groups)](boxes, overlaps, n, words, threshold, rows=_ROWS)
        _decide[(groups,)](overlaps, kept, n, words, block=triton.next_power_of_2(words), num_warps=1)
    return kept


@triton.jit(do_not_specialize=("n", "words", "threshold"))
def _overlaps(
    boxes: tl.tensor, overlaps: tl.tensor, n: tl.tensor, words: tl.tensor, threshold: tl.tensor, rows: tl.constexpr
) -> None:
    """Compute one word per box: a bit for each of 32 later boxes of its group whose IoU is above the threshold."""
    row, word, group = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1), tl.program_id(2)
    column = word * 32 + tl.arange(0, 32)
    first = boxes + group.to(tl.int64) * n * 4
    x1, y1 = tl.load(first + row * 4, row < n, 0.0), tl.load(first + row * 4 + 1, row < n, 0.0)
    x2, y2 = tl.load(first + row * 4 + 2, row < n, 0.0), tl.load(first + row * 4 + 3, row < n, 0.0)
    u1, v1 = tl.load(first + column * 4, column < n, 0.0), tl.load(first + column * 4 + 1, column < n, 0.0)
    u2, v2 = tl.load(first + column * 4 + 2, column < n, 0.0), tl.load(first + column * 4 + 3, column < n, 0.0)
    width = tl.minimum(x2[:, None], u2[None]) - tl.maximum(x1[:, None], u1[None])
    height = tl.minimum(y2[:, None], v2[None]) - tl.maximum(y1[:, None], v1[None])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    union = ((x2 - x1) * (y2 - y1))[:, None] + ((u2 - u1) * (v2 - v1))[None] - shared
    # Rounded as in torchvision; the IoU of two empty boxes is NaN, which compares as not above.
    over = (tl.div_rn(shared, union) > threshold) & (column[None] > row[:, None])
    bits = tl.sum(tl.where(over, 1 << tl.arange(0, 32)[None], 0), 1)
    tl.store(overlaps + (group.to(tl.int64) * n + row) * words + word, bits, row < n)


@triton.jit(do_not_specialize=("n", "words"))
def _decide(overlaps: tl.tensor, kept: tl.tensor, n: tl.tensor, words: tl.tensor, block: tl.constexpr) -> None:
    """Process the boxes of a group sequentially, by descending score."""
    group = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, block)
    suppressed = tl.zeros((block,), tl.int32)
    for i in range(n):
        row = tl.load(overlaps + (group * n + i) * words + word, word < words, 0)
        own = tl.sum(tl.where(word == i // 32, suppressed, 0), 0)
        keep = ((own >> (i % 32)) & 1) == 0
        suppressed = tl.where(keep, suppressed | row, suppressed)
        tl.store(kept + group * n + i, keep)
