"""Convolution, optional normalization, optional activation."""

from __future__ import annotations

from typing import Literal

from timm.layers import get_act_layer, get_norm_layer
from torch import Tensor, nn

from a2fpn.errors import ConfigError


class ConvNormAct(nn.Module):
    """A convolution with "same" padding for odd kernels, then norm, then activation.

    Weights are initialized as in torchvision's FPN (Kaiming uniform with ``a=1``, zero biases), because outputs feed
    linear sums, not ReLUs.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd kernel side.
        stride: Stride of the convolution.
        norm_layer: A timm norm name ("batchnorm2d", "groupnorm", ...) or None for a convolution with bias.
        act_layer: A timm activation name ("relu", "silu", ...) or None.

    Raises:
        ValueError: For an unknown norm or activation name.

    Example:
        >>> import torch
        >>> ConvNormAct(8, 16, 3, stride=2)(torch.zeros(1, 8, 9, 9)).shape
        torch.Size([1, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        norm_layer: str | None = None,
        act_layer: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=norm_layer is None
        )
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm = nn.Identity() if norm_layer is None else resolve_layer("norm_layer", norm_layer)(out_channels)
        self.act = nn.Identity() if act_layer is None else resolve_layer("act_layer", act_layer)()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


def resolve_layer(argument: Literal["norm_layer", "act_layer"], name: str) -> type[nn.Module]:
    """Class of a norm or activation by timm's name.

    Raises:
        ValueError: If timm has none of this name.
    """
    try:
        layer = (get_norm_layer if argument == "norm_layer" else get_act_layer)(name)
    except (KeyError, AssertionError, AttributeError) as error:
        raise ConfigError(f"{argument}={name!r} is not a layer known to timm; try 'batchnorm2d' or 'relu'.") from error
    return layer  # type: ignore[no-any-return]
