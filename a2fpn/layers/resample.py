"""Resampling of maps to another stride or size."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.device import is_known
from a2fpn.layers.conv import resolve_layer


def resample(
    channels: int,
    source: int,
    target: int,
    *,
    norm_layer: str | None = "layernorm2d",
    act_layer: str | None = "gelu",
) -> tuple[list[nn.Module], int]:
    """Modules that resample a map from one stride to another, and their output channels.

    Upsampling uses transposed convolutions that halve the channels, with norm and activation between two of them;
    downsampling uses max pooling (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
    ECCV 2022). Sizes are rounded up.

    Args:
        channels: Channels of the map.
        source: Its stride.
        target: The requested stride; both powers of two.
        norm_layer: Norm between two transposed convolutions (timm name), or None.
        act_layer: Activation between them (timm name), or None.

    Example:
        >>> modules, channels = resample(64, 16, 8)
        >>> modules, channels
        ([ConvTranspose2d(64, 32, kernel_size=(2, 2), stride=(2, 2))], 32)
        >>> resample(64, 16, 16)
        ([], 64)
    """
    modules: list[nn.Module] = []
    while source > target:
        halved = max(1, channels // 2)
        modules.append(nn.ConvTranspose2d(channels, halved, 2, stride=2))
        source, channels = source // 2, halved
        if source > target:
            modules += [] if norm_layer is None else [resolve_layer("norm_layer", norm_layer)(channels)]
            modules += [] if act_layer is None else [resolve_layer("act_layer", act_layer)()]
    if source < target:
        # Partial windows are kept, so that odd sizes are rounded up as by strided convolutions.
        modules.append(nn.MaxPool2d(target // source, ceil_mode=True))
    return modules, channels


def average(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average a map ``(B, C, H, W)`` over the pixels of a coarser level, ``(B, C, h, w)``.

    Example:
        >>> import torch
        >>> average(torch.arange(6.0).view(1, 1, 2, 3), (1, 2)).tolist()
        [[[[2.0, 3.0]]]]
    """
    if all(is_known(fine == 2 * coarse) for fine, coarse in zip(x.shape[2:], size, strict=True)):
        return F.avg_pool2d(x, 2)
    return F.adaptive_avg_pool2d(x, size)


def fit_doubled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Fit a map of twice a coarse level's size to the finer level.

    As strides halve from level to level and sizes are rounded up, the finer level has twice the size or one pixel less,
    and the map is cropped; for any other size it is interpolated by nearest neighbor.

    Args:
        x: ``(B, C, 2 h, 2 w)``.
        size: ``(H, W)`` of the finer level.

    Returns:
        ``(B, C, H, W)``, a view if cropped.

    Example:
        >>> import torch
        >>> x = torch.arange(4.0).expand(1, 1, 2, 4)
        >>> fit_doubled(x, (1, 3)).tolist(), fit_doubled(x, (1, 6)).tolist()
        ([[[[0.0, 1.0, 2.0]]]], [[[[0.0, 0.0, 1.0, 2.0, 2.0, 3.0]]]])
    """
    height, width = x.shape[-2:]
    if height - 1 <= size[0] <= height and width - 1 <= size[1] <= width:
        return x[..., : size[0], : size[1]]
    return F.interpolate(x, size=size, mode="nearest")
