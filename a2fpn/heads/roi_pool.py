"""RoI pooling over a pyramid whose strides are declared, never guessed.

torchvision's ``MultiScaleRoIAlign`` infers scales from the first batch it sees and keeps them; it guesses wrong when
an image is much smaller than its padded canvas. Level assignment is the rule of Lin et al., "Feature Pyramid
Networks", CVPR 2017, Eq. 1; sampling is RoIAlign of He et al., "Mask R-CNN", ICCV 2017.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.pyramid import Features


def roi_align(x: Tensor, rois: Tensor, *, output_size: int, stride: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIAlign of one level.

    On the CPU the same sampling is written as a weighted gather over channels-last features, which uses every core;
    torchvision's kernel runs on one. Values are equal up to rounding.

    Args:
        x: Features ``(B, C, H, W)``.
        rois: ``(R, 5)``: image index in the batch, then xyxy in input pixels.
        output_size: Side ``S`` of the output.
        stride: Input pixels per map pixel.
        sampling_ratio: Samples per bin side; 0 takes one per map pixel, on the CPU with torchvision's slower kernel.
        aligned: Whether to shift by half a pixel (detectron2's ``aligned=True``).

    Returns:
        ``(R, C, S, S)``.

    Example:
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> box = torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]])
        >>> roi_align(x, box, output_size=1, stride=4, sampling_ratio=2, aligned=True).item()
        2.5
    """
    if x.device.type != "cpu" or not sampling_ratio:
        pooled: Tensor = torchvision.ops.roi_align(
            x, rois.to(x.dtype), output_size, 1.0 / stride, sampling_ratio, aligned
        )
        return pooled
    return _gather_roi_align(x, rois, output_size, 1.0 / stride, sampling_ratio, aligned)


def _gather_roi_align(x: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool) -> Tensor:
    channels, height, width = x.shape[1:]
    boxes = rois[:, 1:].float() * scale - (0.5 if aligned else 0.0)
    x0, y0, x1, y1 = boxes.unbind(1)
    # Unaligned RoIAlign treats boxes of less than one map pixel as one pixel.
    floor = -math.inf if aligned else 1.0
    rows, row_weights = _samples(y0, (y1 - y0).clamp(min=floor), size, ratio, height)
    columns, column_weights = _samples(x0, (x1 - x0).clamp(min=floor), size, ratio, width)
    image = rois[:, 0].long().view(-1, 1, 1, 1, 1) * (height * width)
    index = image + rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    taps = (2 * ratio) ** 2
    pooled = F.embedding_bag(
        index.reshape(-1, taps),
        x.permute(0, 2, 3, 1).reshape(-1, channels),
        mode="sum",
        per_sample_weights=weights.reshape(-1, taps).to(x.dtype),
    )
    return pooled.view(len(rois), size, size, channels).permute(0, 3, 1, 2)


def _samples(start: Tensor, length: Tensor, bins: int, ratio: int, limit: int) -> tuple[Tensor, Tensor]:
    """Positions and weights of the bilinear taps along one axis: ``(R, bins, 2 * ratio)`` each."""
    offsets = (torch.arange(bins * ratio, dtype=start.dtype, device=start.device) + 0.5) / (ratio * bins)
    centre = start[:, None] + offsets * length[:, None]
    inside = (centre >= -1) & (centre <= limit)
    centre = centre.clamp(min=0)
    low = centre.floor().long().clamp(max=limit - 1)
    fraction = (centre - low).clamp(max=1) * (low < limit - 1)
    taps = torch.stack([low, (low + 1).clamp(max=limit - 1)], -1)
    weights = torch.stack([1 - fraction, fraction], -1) * inside[..., None] / ratio
    return taps.view(len(start), bins, 2 * ratio), weights.view(len(start), bins, 2 * ratio)


class StrideRoIAlign(nn.Module):
    """RoIAlign over a pyramid; drop-in for torchvision's ``MultiScaleRoIAlign`` inside its RoI heads.

    A box goes to level ``floor(canonical_level + log2(sqrt(area) / canonical_scale))``, clamped to the levels.

    Args:
        strides: Stride per level name, each twice the one before.
        output_size: Side of the output.
        sampling_ratio: Samples per bin side.
        aligned: Whether to shift by half a pixel.
        canonical_scale: Side of the box that goes to the canonical level, pixels.
        canonical_level: Level of that box, as a power of two of its stride.

    Raises:
        ValueError: If strides don't double from level to level.
    """

    def __init__(
        self,
        strides: dict[str, int],
        output_size: int,
        *,
        sampling_ratio: int = 2,
        aligned: bool = False,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        values = list(strides.values())
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(values)):
            raise ValueError(f"Strides must double from level to level to assign boxes by size, got {values}.")
        self.strides = dict(strides)
        # torchvision's heads read the output size as a pair.
        self.output_size = (output_size, output_size)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(
        self, features: Features, boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Pools boxes.

        Args:
            features: Maps; levels without a declared stride here are ignored.
            boxes: Per image ``(R_i, 4)`` xyxy in input pixels.
            image_shapes: Unused; part of torchvision's signature, which guesses scales from it.

        Returns:
            ``(sum R_i, C, S, S)``, images in order.
        """
        maps = [features[name] for name in self.strides]
        index = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(list(boxes))], 1)
        levels = self.assign_levels(rois[:, 1:])
        pooled = maps[0].new_empty(len(rois), *self.output_size, maps[0].shape[1])
        for level, (x, stride) in enumerate(zip(maps, self.strides.values(), strict=True)):
            rows = torch.where(levels == level)[0]
            of_level = roi_align(
                x,
                rois[rows],
                output_size=self.output_size[0],
                stride=stride,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
            pooled.index_copy_(0, rows, of_level.permute(0, 2, 3, 1))
        return pooled.permute(0, 3, 1, 2)

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Index into the levels for each box ``(R, 4)``, ``(R,)`` int64."""
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).float()
        # The small constant keeps exact powers of two on their level, as in torchvision and detectron2.
        level = torch.floor(self.canonical_level + torch.log2(area.sqrt() / self.canonical_scale) + 1e-6)
        finest = next(iter(self.strides.values())).bit_length() - 1
        return (level - finest).clamp(0, len(self.strides) - 1).long()
