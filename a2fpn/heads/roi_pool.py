"""RoI pooling over a pyramid with declared strides.

torchvision's ``MultiScaleRoIAlign`` infers scales from the first batch and keeps them; they are wrong if an image is
much smaller than its padded canvas. Level assignment follows Lin et al., "Feature Pyramid Networks", CVPR 2017, Eq. 1;
sampling is RoIAlign of He et al., "Mask R-CNN", ICCV 2017.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn import device
from a2fpn.pyramid import Features

_MOST_SAMPLES = 256
"""Maximum samples per bin; boxes far too large for their level use torchvision's kernel, which stores no samples."""


def roi_align(x: Tensor, rois: Tensor, *, output_size: int, stride: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIAlign of one level.

    On the CPU the sampling is computed as a weighted gather over channels-last features, which uses every core;
    torchvision's kernel runs on one. Values are equal up to rounding. With deterministic algorithms the gather is used
    on every device, since torchvision's kernels accumulate gradients in nondeterministic order.

    Args:
        x: Features ``(B, C, H, W)``.
        rois: ``(R, 5)``: image index in the batch, then xyxy in input pixels.
        output_size: Side ``S`` of the output.
        stride: Input pixels per map pixel.
        sampling_ratio: Samples per bin side; 0 for one per map pixel.
        aligned: Whether to shift by half a pixel (detectron2's ``aligned=True``).

    Returns:
        ``(R, C, S, S)``.

    Example:
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> box = torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]])
        >>> roi_align(x, box, output_size=1, stride=4, sampling_ratio=2, aligned=True).item()
        2.5
    """
    scale = 1.0 / stride
    if device.is_traced() or (device.is_on_accelerator(x) and not torch.are_deterministic_algorithms_enabled()):
        pooled: Tensor = torchvision.ops.roi_align(x, rois.to(x.dtype), output_size, scale, sampling_ratio, aligned)
        return pooled
    if sampling_ratio:
        return _gather_roi_align(x, rois, output_size, scale, (sampling_ratio, sampling_ratio), aligned)
    return _adaptive_roi_align(x, rois, output_size, scale, aligned)


def _adaptive_roi_align(x: Tensor, rois: Tensor, size: int, scale: float, aligned: bool) -> Tensor:
    """RoIAlign with one sample per map pixel: RoIs with the same number of samples are pooled together."""
    _, lengths = _on_map(rois, scale, aligned)
    ratios = torch.ceil(lengths / size).long().clamp(min=0)
    # The result of boxes without samples is zero.
    pooled = x.new_zeros(len(rois), size, size, x.shape[1])
    for ratio in torch.unique(ratios[(ratios > 0).all(1)], dim=0):
        rows = torch.where((ratios == ratio).all(1))[0]
        height, width = ratio.tolist()
        if height * width <= _MOST_SAMPLES:
            of_ratio = _gather_roi_align(x, rois[rows], size, scale, (height, width), aligned)
        else:
            of_ratio = torchvision.ops.roi_align(x, rois[rows].to(x.dtype), size, scale, 0, aligned)
        pooled.index_copy_(0, rows, of_ratio.permute(0, 2, 3, 1))
    if x.requires_grad and torch.is_grad_enabled() and not pooled.requires_grad:
        # Nothing was pooled: connects the zeros to the autograd graph of the features.
        pooled = pooled + x[:0].sum()
    return pooled.permute(0, 3, 1, 2)


def _on_map(rois: Tensor, scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Start and lengths of RoIs along y and x in map pixels, ``(R, 2)`` each."""
    corners = rois[:, 1:].float() * scale - (0.5 if aligned else 0.0)
    starts, ends = corners[:, [1, 0]], corners[:, [3, 2]]
    # Unaligned RoIAlign enlarges boxes of less than one map pixel to one pixel.
    return starts, (ends - starts).clamp(min=-math.inf if aligned else 1.0)


def _gather_roi_align(
    x: Tensor, rois: Tensor, size: int, scale: float, ratios: tuple[int, int], aligned: bool
) -> Tensor:
    channels, height, width = x.shape[1:]
    starts, lengths = _on_map(rois, scale, aligned)
    rows, row_weights = _samples(starts[:, 0], lengths[:, 0], size, ratios[0], height)
    columns, column_weights = _samples(starts[:, 1], lengths[:, 1], size, ratios[1], width)
    image = rois[:, 0].long().view(-1, 1, 1, 1, 1) * (height * width)
    index = image + rows[:, :, None, :, None] * width + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    taps = 4 * ratios[0] * ratios[1]
    pooled = F.embedding_bag(
        index.reshape(-1, taps),
        x.permute(0, 2, 3, 1).reshape(-1, channels),
        mode="sum",
        per_sample_weights=weights.reshape(-1, taps).to(x.dtype),
    )
    return pooled.view(len(rois), size, size, channels).permute(0, 3, 1, 2)


def _samples(start: Tensor, length: Tensor, bins: int, ratio: int, limit: int) -> tuple[Tensor, Tensor]:
    """Positions and weights of the bilinear taps along one axis: ``(R, bins, 2 * ratio)`` each."""
    bin_index = torch.arange(bins, dtype=start.dtype, device=start.device)[:, None]
    sample_index = torch.arange(ratio, dtype=start.dtype, device=start.device)
    # Same order of operations as torchvision: rounding decides whether a sample at the border is inside.
    side = length[:, None, None] / bins
    center = (start[:, None, None] + bin_index * side + (sample_index + 0.5) * side / ratio).flatten(1)
    inside = (center >= -1) & (center <= limit)
    center = center.clamp(min=0)
    low = center.floor().long().clamp(max=limit - 1)
    fraction = (center - low).clamp(max=1) * (low < limit - 1)
    taps = torch.stack([low, (low + 1).clamp(max=limit - 1)], -1)
    weights = torch.stack([1 - fraction, fraction], -1) * inside[..., None] / ratio
    return taps.view(len(start), bins, 2 * ratio), weights.view(len(start), bins, 2 * ratio)


class StrideRoIAlign(nn.Module):
    """RoIAlign over a pyramid; drop-in for torchvision's ``MultiScaleRoIAlign`` inside its RoI heads.

    A box is assigned to level ``floor(canonical_level + log2(sqrt(area) / canonical_scale))``, clamped to the levels.

    Args:
        strides: Stride per level name, each twice the previous one.
        output_size: Side of the output.
        sampling_ratio: Samples per bin side.
        aligned: Whether to shift by half a pixel.
        canonical_scale: Side of a box assigned to the canonical level, pixels.
        canonical_level: The canonical level, as log2 of its stride.

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
        self,
        features: Features,
        boxes: Sequence[Tensor] | Tensor,
        image_shapes: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Pool boxes.

        Args:
            features: Maps; levels without a declared stride are ignored.
            boxes: Per image ``(R_i, 4)`` xyxy in input pixels, or RoIs of the whole batch, see :func:`join_rois`.
            image_shapes: Unused; part of torchvision's signature, which guesses scales from it.

        Returns:
            ``(R, C, S, S)``, images in order.
        """
        maps = [features[name] for name in self.strides]
        rois = boxes if isinstance(boxes, Tensor) else join_rois(boxes or [maps[0].new_zeros(0, 4)])
        chosen = self._rows(self.assign_levels(rois[:, 1:]))
        pooled = [
            roi_align(
                x,
                rois[rows],
                output_size=self.output_size[0],
                stride=stride,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
            for x, stride, rows in zip(maps, self.strides.values(), chosen, strict=True)
        ]
        if device.is_traced():
            # The number of boxes per level is unknown to a tracer, unlike their total number.
            rows = torch.cat(chosen)
            places = rows.new_zeros(rois.shape[0]).scatter(0, rows, torch.ones_like(rows).cumsum(0) - 1)
            return torch.cat(pooled)[places]
        return _in_order(pooled, chosen)

    def _rows(self, levels: Tensor) -> list[Tensor]:
        """The rows of each level, ascending."""
        count = len(self.strides)
        if not device.runs_ahead(levels) or device.is_traced():
            return [(levels == level).nonzero()[:, 0] for level in range(count)]
        # Synchronizes with the device once instead of once per level.
        sizes = (levels[:, None] == torch.arange(count, device=levels.device)).sum(0)
        return list(levels.argsort(stable=True).split(sizes.tolist()))

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Index into the levels for each box ``(R, 4)``, ``(R,)`` int64."""
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1).float()
        # Epsilon keeps exact powers of two on their level, as in torchvision and detectron2.
        level = torch.floor(self.canonical_level + torch.log2(area.sqrt() / self.canonical_scale) + 1e-6)
        finest = next(iter(self.strides.values())).bit_length() - 1
        return (level - finest).clamp(0, len(self.strides) - 1).long()


def join_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Concatenate the boxes ``(R_i, 4)`` of each image to RoIs ``(R, 5)``: image index and box.

    Example:
        >>> join_rois([torch.zeros(1, 4), torch.ones(1, 4)])
        tensor([[0., 0., 0., 0., 0.],
                [1., 1., 1., 1., 1.]])
    """
    index = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
    return torch.cat([index, torch.cat(list(boxes))], 1)


def _in_order(parts: list[Tensor], places: list[Tensor]) -> Tensor:
    """Scatter the rows of tensors ``(R_i, C, S, S)`` to one tensor with the memory format of the largest."""
    largest = max(parts, key=len)
    nhwc = largest.is_contiguous(memory_format=torch.channels_last)
    whole = torch.empty(
        (sum(map(len, parts)), *largest.shape[1:]),
        dtype=largest.dtype,
        device=largest.device,
        memory_format=torch.channels_last if nhwc else torch.contiguous_format,
    )
    for part, rows in zip(parts, places, strict=True):
        whole.index_copy_(0, rows, part)
    return whole
