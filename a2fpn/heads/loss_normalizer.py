"""Loss normalization over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn


class GlobalLossNormalizer(nn.Module):
    """Normalizes a loss by the number of terms on all ranks instead of on this one.

    Data-parallel training averages gradients over ranks. If ranks divide their losses by different counts (of
    positives, of proposals), the average of their means is not the mean over the whole batch. With ``enabled`` all
    divide by the average count (mmdetection's ``reduce_mean(avg_factor)``); every rank then has to compute the same
    losses in step.

    Attributes:
        enabled: False by default: losses equal torchvision's.

    Example:
        >>> GlobalLossNormalizer()(torch.tensor(0.5), 3)
        tensor(0.5000)
    """

    enabled = False

    def forward(self, loss: Tensor, count: int) -> Tensor:
        """Return the loss of this rank, normalized over all ranks.

        Args:
            loss: Scalar, a sum divided by ``max(1, count)``.
            count: Terms on this rank.
        """
        if not self.enabled or not distributed.is_initialized():
            return loss
        total = torch.tensor(float(count), device=loss.device)
        distributed.all_reduce(total)
        return loss * (max(1, count) * distributed.get_world_size() / total.clamp(min=1))


def normalize_losses_globally(module: nn.Module, *, enabled: bool = True) -> None:
    """Set ``enabled`` of every :class:`GlobalLossNormalizer` in a module."""
    for part in module.modules():
        if isinstance(part, GlobalLossNormalizer):
            part.enabled = enabled
