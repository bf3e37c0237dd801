"""Preprocessing of images and its inverse for boxes, shared by training, evaluation and inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.config import PreprocessConfig
from a2fpn.device import new_size
from a2fpn.errors import ConfigError, ConfigTypeError

_ROUNDING, _OVERSHOOT = 1e-3, 0.5
"""Tolerance of a float image's value range: as given, and after a bicubic resize."""


@dataclass(frozen=True)
class Batch:
    """Images ready for a backbone.

    Args:
        tensor: ``(B, C, H, W)`` float32, normalized, zero-padded; H and W are multiples of the divisor.
        sizes: Height and width of each image inside the tensor, pixels; a single pair if all images have one size.
        original_sizes: Height and width of each input image, pixels, likewise.
    """

    tensor: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]


class Preprocess(nn.Module):
    """Normalizes, resizes and pads images; stateless.

    Args:
        config: The rule.
        divisor: Padded sizes are multiples of this unless the config names its own.

    Example:
        >>> preprocess = Preprocess(PreprocessConfig(min_size=64, max_size=100), divisor=32)
        >>> preprocess.target_size(32, 48)
        (64, 96)
        >>> batch = preprocess([torch.rand(3, 32, 48), torch.rand(3, 40, 40)])
        >>> tuple(batch.tensor.shape), batch.sizes
        ((2, 3, 64, 96), [(64, 96), (64, 64)])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PreprocessConfig, *, divisor: int) -> None:
        super().__init__()
        self.config = config
        self.divisor = config.size_divisor or divisor
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)

    def target_size(self, height: int, width: int, *, min_size: int | None = None) -> tuple[int, int]:
        """Size an image is resized to, at least one pixel per side.

        Args:
            height: Pixels.
            width: Pixels.
            min_size: Replaces the rule's; the rule's ``max_size`` stays.

        Raises:
            ValueError: For an image without pixels.
        """
        if height < 1 or width < 1:
            raise ConfigError(f"Expected an image with H, W >= 1, got {height} x {width}.")
        if self.config.resize == "none":
            return height, width
        # The only minimum and maximum that symbolic sizes support.
        least, most = torch.sym_min, torch.sym_max
        short, long = least(height, width), most(height, width)

        def scaled(side: int) -> int:
            # Integer arithmetic, since 97 * (800 / 97) is 799.99... in floating point.
            size: Any = side * (min_size or self.config.min_size) // short
            if self.config.resize == "at_least":
                size = most(size, side)
            limited: int = most(1, least(size, side * self.config.max_size // long))
            return limited

        return scaled(height), scaled(width)

    def forward(self, images: Sequence[Tensor], *, resize: bool = True) -> Batch:
        """Make a batch.

        Args:
            images: ``(C, H, W)`` each, float in [0, 1] or uint8 in [0, 255], any sizes.
            resize: Whether to apply the resize rule; False for images that are resized already.

        Raises:
            ValueError: For a wrong number of dimensions or channels, an image without pixels, or a float image with
                values beyond [0, 1].
            TypeError: For a dtype that is neither float nor uint8.
        """
        ready = [self._prepare(image, resize) for image in images]
        sizes = [(int(x.shape[1]), int(x.shape[2])) for x in ready]
        height, width = (-(-max(side) // self.divisor) * self.divisor for side in zip(*sizes, strict=True))
        batch = ready[0].new_zeros(len(ready), len(self.mean), height, width)
        batch = batch.contiguous(memory_format=torch.channels_last)
        for row, x in zip(batch, ready, strict=True):
            row[:, : x.shape[1], : x.shape[2]].copy_(x)
        return Batch(batch, sizes, [(int(image.shape[-2]), int(image.shape[-1])) for image in images])

    def stack(self, images: Tensor) -> Batch:
        """Make a batch of images of one size, by operations that can be traced for any batch and image size.

        Args:
            images: ``(B, C, H, W)``, float in [0, 1] or uint8 in [0, 255]; values are not checked.
        """
        original = (images.shape[-2], images.shape[-1])
        size = self.target_size(*original)
        x = self._normalize(images)
        if self.config.resize != "none":
            x = F.interpolate(x, size=size, mode=self.config.interpolation, align_corners=False)
        # Ceiling division without negative numbers: ONNX rounds toward zero.
        height, width = (new_size((side + self.divisor - 1) // self.divisor) * self.divisor for side in size)
        return Batch(F.pad(x, (0, width - size[1], 0, height - size[0])), [size], [original])

    def _normalize(self, x: Tensor) -> Tensor:
        x = x.float().div(255) if x.dtype == torch.uint8 else x.float()
        return (x - self.mean) / self.std

    def _prepare(self, image: Tensor, resize: bool) -> Tensor:
        channels = len(self.mean)
        if image.ndim != 3 or image.shape[0] != channels or image.numel() == 0:
            raise ConfigError(f"Expected an image ({channels}, H, W) with H, W >= 1, got {tuple(image.shape)}.")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ConfigTypeError(f"Expected a float image in [0, 1] or a uint8 image in [0, 255], got {image.dtype}.")
        if image.is_floating_point():
            low, high = (float(x) for x in image.detach().aminmax())
            slack = _ROUNDING if resize else _OVERSHOOT
            if not (low >= -slack and high <= 1 + slack):  # NaN fails as well
                raise ConfigError(
                    f"Expected a float image in [0, 1] or a uint8 image in [0, 255], got {image.dtype} values from "
                    f"{low:g} to {high:g}. Divide by the largest value of its format (255 for 8 bits), or pass uint8; "
                    "the model normalizes by itself."
                )
        x = self._normalize(image.to(self.mean.device, non_blocking=True))
        size = self.target_size(int(x.shape[1]), int(x.shape[2]))
        if resize and size != tuple(x.shape[1:]):
            x = F.interpolate(x[None], size=size, mode=self.config.interpolation, align_corners=False)[0]
        return x


def resize_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Scale boxes ``(N, 4)`` xyxy from an image of one size (height, width) to another.

    Example:
        >>> resize_boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (10, 10), (20, 10))
        tensor([[1., 4., 3., 8.]])
    """
    x, y = boxes[:, 0::2] * (new[1] / old[1]), boxes[:, 1::2] * (new[0] / old[0])
    return torch.stack([x, y], 2).flatten(1)


def resize_target(target: Mapping[str, Any], old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
    """Resize a training target from one image size (height, width) to another.

    Its ``masks``, if any, are :class:`~a2fpn.masks.InstanceMasks`; they are resized by nearest-neighbor sampling at
    each pixel's upper left corner, as in torchvision.
    """
    if old == new:
        return dict(target)
    resized = dict(target) | {"boxes": resize_boxes(target["boxes"], old, new)}
    if "masks" in target:
        resized["masks"] = target["masks"].resize(new, at=0.0)
    return resized
