"""Random samples of anchors and boxes for all images of a batch at once, in shapes that depend on no value.

torchvision's ``BalancedPositiveNegativeSampler`` asks, image by image, how many there are to choose from; each time a
GPU is waited for. Here every candidate draws a number and the highest are taken, which is the same distribution.

Shape shorthand: ``B`` images, ``N`` candidates of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Sampled(NamedTuple):
    """Candidates of a batch that were drawn.

    Args:
        positive: ``(B, P)`` int64, indices of those that are matched to an object.
        negative: ``(B, Q)`` int64, of background.
        is_positive: ``(B, P)`` bool, which of them are meant: there may be fewer than P.
        is_negative: ``(B, Q)`` bool.
    """

    positive: Tensor
    negative: Tensor
    is_positive: Tensor
    is_negative: Tensor

    def rows(self) -> list[Tensor]:
        """Per image the indices, positives first; the device is waited for once."""
        counts = torch.stack([self.is_positive.sum(1), self.is_negative.sum(1)], 1).tolist()
        return [
            torch.cat([positive[:p], negative[:n]])
            for positive, negative, (p, n) in zip(self.positive, self.negative, counts, strict=True)
        ]


def draw(labels: Tensor, *, size: int, positive_fraction: float) -> Sampled:
    """Samples of every image.

    Args:
        labels: ``(B, N)``; from 1 on positive, 0 negative, less is not drawn.
        size: Most samples of an image.
        positive_fraction: Most positives among them, as a share of the size.

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
    """Per image the rows that :func:`draw` takes; images may have different numbers of candidates."""
    padded = pad_sequence(labels, batch_first=True, padding_value=-1.0)
    return draw(padded, size=size, positive_fraction=positive_fraction).rows()
