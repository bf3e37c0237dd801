"""Convolutions fused with the following activation or residual sum, applied while their output is in the cache."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16)


class ActivatedConv(nn.Module):
    """A convolution fused with its activation.

    Args:
        conv: The convolution.
        activation: A ReLU or ReLU6.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.limit = 6.0 if isinstance(activation, nn.ReLU6) else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        x = x.to(self.weight.dtype)
        padding, stride, dilation, groups = self.geometry
        if x.numel() and _has_fused_convolution(x):
            kind, limits = ("relu", []) if self.limit is None else ("hardtanh", [0.0, self.limit])
            fused: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, padding, stride, dilation, groups, kind, limits, ""
            )
            return fused
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        return y.clamp_(min=0, max=self.limit)


def is_plain(block: nn.Module) -> bool:
    """Return whether a folded residual block consists of convolutions, a sum and a ReLU only."""
    *_, last = (module for module in _body(block) if type(module) is not nn.Identity)
    return (
        block.se is None
        and (block.drop_path is None or isinstance(block.drop_path, DropPath))
        and type(_last_activation(block)) is nn.ReLU
        and is_fusible(last)
    )


def _body(block: Any) -> list[nn.Module]:
    """Return the modules on the main path of a timm residual block, up to the sum."""
    names = ["conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"]
    if isinstance(block, Bottleneck):
        names = ["conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"]
    return [getattr(block, name) for name in names]


def _last_activation(block: Any) -> nn.Module:
    activation: nn.Module = block.act3 if isinstance(block, Bottleneck) else block.act2
    return activation


def is_fusible(conv: nn.Module) -> bool:
    """Return whether oneDNN's fused convolution can replace a module."""
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class ResidualBlock(nn.Module):
    """A timm residual block whose last convolution is fused with the residual sum.

    Args:
        block: The folded block, for which :func:`is_plain` holds.
        own_input: Whether nothing else uses the block's input, which may then be overwritten.
    """

    def __init__(self, block: Any, *, own_input: bool) -> None:
        super().__init__()
        *body, self.last = (module for module in _body(block) if type(module) is not nn.Identity)
        self.body = nn.Sequential(*body)
        self.downsample: nn.Module | None = block.downsample
        self.own_shortcut = own_input or self.downsample is not None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""
        last = self.last
        y = self.body(x).to(last.weight.dtype)
        shortcut = (x if self.downsample is None else self.downsample(x)).to(y.dtype)
        if not self.own_shortcut:
            shortcut = shortcut.clone()
        if not (y.numel() and _has_fused_convolution(y)):
            return shortcut.add_(last(y)).relu_()
        geometry = (last.weight, last.bias, last.padding, last.stride, last.dilation, last.groups)
        added: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, y, *geometry, "add", 1.0, "relu", [], ""
        )
        return added


def _has_fused_convolution(x: Tensor) -> bool:
    """Return whether oneDNN's fused convolution, which torch's compiler uses too, supports a tensor."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (x.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )
