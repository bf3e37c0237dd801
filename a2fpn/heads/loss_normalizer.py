"""Losses that do not depend on how a batch is divided among processes."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn


class GlobalLossNormalizer(nn.Module):
    """Turns a loss that is a mean over a process's terms into its part of the mean over the terms of all processes.

    Processes average their gradients. Where a loss is divided by a number that differs from one to the other (of
    positives, of proposals), the average of means is not the mean that one process with all the images would compute.
    With ``enabled`` the number of all processes takes the place of the own one; every process then has to compute the
    same losses at the same time. The usual remedy in detectors (``reduce_mean`` of the average factor in mmdetection).

    Attributes:
        enabled: Off by default: a loss is what torchvision's is.

    Example:
        >>> GlobalLossNormalizer()(torch.tensor(0.5), 3)
        tensor(0.5000)
    """

    enabled = False

    def forward(self, loss: Tensor, count: int) -> Tensor:
        """The loss as this process should have it.

        Args:
            loss: Scalar, a sum divided by ``max(1, count)``.
            count: Terms of this process.
        """
        if not self.enabled or not distributed.is_initialized():
            return loss
        total = torch.tensor(float(count), device=loss.device)
        distributed.all_reduce(total)
        return loss * (max(1, count) * distributed.get_world_size() / total.clamp(min=1))


def normalize_losses_globally(module: nn.Module, *, enabled: bool = True) -> None:
    """Sets ``enabled`` of every :class:`GlobalLossNormalizer` in a module."""
    for part in module.modules():
        if isinstance(part, GlobalLossNormalizer):
            part.enabled = enabled
