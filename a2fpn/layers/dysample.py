"""Upsampling by learned sampling points: Liu et al., "Learning to Upsample by Learning to Sample", ICCV 2023.

Shape shorthand: ``B`` batch, ``C`` channels, ``g`` groups, ``(h, w)`` coarse map, ``(H, W)`` fine map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.layers.checkpointing import maybe_checkpoint
from a2fpn.layers.precision import autocast_off
from a2fpn.layers.resample import fit_doubled

_SCOPE = 0.25
"""Static scope factor, which keeps the sampling points of neighbors from overlapping (section 3.2)."""


class DySample(nn.Module):
    """Bilinear upsampling at content-dependent sampling points, then addition.

    In the paper's terms: linear + pixel shuffle ("LP"), static scope factor 0.25, scale 2. A 1x1 convolution of the
    coarse map predicts an offset in coarse pixels per fine pixel and group of channels; at initialization the result
    is close to bilinear interpolation. A fine map of twice the size, or one pixel less, is handled by cropping; for
    any other size positions are spread evenly and offsets are those of the nearest sub-position.

    Args:
        channels: Channels of both maps, a multiple of ``groups``.
        groups: Groups of channels that share their sampling points.

    Raises:
        ValueError: If the groups do not divide the channels.

    Example:
        >>> DySample(16)(torch.randn(1, 16, 5, 5), torch.randn(1, 16, 9, 10)).shape
        torch.Size([1, 16, 9, 10])
    """

    def __init__(self, channels: int, *, groups: int = 4) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels; take a multiple of the groups.")
        self.groups = groups
        self.offset = nn.Conv2d(channels, 2 * groups * 4, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    def forward(self, coarse: Tensor, fine: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merge ``(B, C, h, w)`` into ``(B, C, H, W)``; ``valid`` is unused, for a common signature of fusions."""
        return maybe_checkpoint(self, self._merge, coarse, fine)

    def _merge(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return fine + self.upsample(coarse, (fine.shape[-2], fine.shape[-1]))

    def upsample(self, coarse: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps ``(B, C, h, w)`` to ``(B, C, H, W)``, without the addition."""
        batch, channels, height, width = coarse.shape
        offset = fit_doubled(F.pixel_shuffle(self.offset(coarse), 2), size)
        # Positions in half precision would be off by whole pixels on a large map.
        with autocast_off(coarse):
            x = coarse if coarse.dtype == torch.float64 else coarse.float()
            shift = offset.to(x.dtype).reshape(batch, 2, self.groups, *size) * _SCOPE
            column = (_centers(size[1], width, x) + shift[:, 0]) * (2 / width) - 1
            row = (_centers(size[0], height, x)[:, None] + shift[:, 1]) * (2 / height) - 1
            sampled = F.grid_sample(
                x.reshape(batch * self.groups, channels // self.groups, height, width),
                torch.stack([column, row], -1).flatten(0, 1),
                mode="bilinear",
                padding_mode="border",
                align_corners=False,
            )
            return sampled.view(batch, channels, *size).to(coarse.dtype)


def _centers(target: int, source: int, like: Tensor) -> Tensor:
    """Centers of fine pixels along one axis in coarse pixels, ``(target,)``; the first coarse center is at 0.5."""
    doubled = 2 * source - 1 <= target <= 2 * source
    return (torch.arange(target, dtype=like.dtype, device=like.device) + 0.5) * (0.5 if doubled else source / target)
