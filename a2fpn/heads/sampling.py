"""Random sampling of anchors and boxes for all images of a batch at once, with static shapes.

torchvision's ``BalancedPositiveNegativeSampler`` counts positives and negatives image by image, which synchronizes with
the GPU each time. Here every candidate gets a random number and the top-k are taken, which has the same distribution.

Shape shorthand: ``B`` images, ``N`` candidates of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Sampled(NamedTuple):
    """Sampled candidates of a batch.

    Args:
        positive: ``(B, P)`` int64, indices of positives.
        negative: ``(B, Q)`` int64, indices of negatives.
        is_positive: ``(B, P)`` bool, which of them are valid: there may be fewer than P.
        is_negative: ``(B, Q)`` bool.
    """

    positive: Tensor
    negative: Tensor
    is_positive: Tensor
    is_negative: Tensor

    def rows(self) -> list[Tensor]:
        """Indices per image, positives first, with one synchronization."""
        counts = torch.stack([self.is_positive.sum(1), self.is_negative.sum(1)], 1).tolist()
        return [
            torch.cat([positive[:p], negative[:n]])
            for positive, negative, (p, n) in zip(self.positive, self.negative, counts, strict=True)
        ]


def draw(labels: Tensor, *, size: int, positive_fraction: float) -> Sampled:
    """Draw samples for every image.

    Args:
        labels: ``(B, N)``; 1 and up is positive, 0 negative, below is ignored.
        size: Maximum number of samples per image.
        positive_fraction: Maximum share of positives in the size.

    Example:
        >>> drawn = draw(torch.tensor([[1, 0, 0, -1, 1], [0, 0, -1, -1, -1]]), size=4, positive_fraction=0.25)
        >>> [len(rows) for rows in drawn.rows()], drawn.is_positive.tolist()
        ([3, 2], [[True], [False]])
    """
    candidates = labels.shape[1]
    noise = torch.rand(labels.shape, device=labels.device)
    values, positive = torch.where(labels >= 1, noise, -1.0).topk(min(int(size * positive_fraction), candidates), 1)
    is_positive = values >= 0
    values, negative = torch.where(labels == 0, noise, -1.0).topk(min(size, candidates), 1)
    room = size - is_positive.sum(1, keepdim=True)
    is_negative = (values >= 0) & (torch.arange(values.shape[1], device=labels.device) < room)
    return Sampled(positive, negative, is_positive, is_negative)


def draw_rows(labels: list[Tensor], *, size: int, positive_fraction: float) -> list[Tensor]:
    """Rows drawn by :func:`draw` per image, for images with different numbers of candidates."""
    padded = pad_sequence(labels, batch_first=True, padding_value=-1.0)
    return draw(padded, size=size, positive_fraction=positive_fraction).rows()
