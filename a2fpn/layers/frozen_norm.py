"""Frozen batch norms that keep the dtype of a map, in a single pass under autocast.

torchvision's and timm's multiply and add float32 vectors, so that under autocast each allocates two float32 maps.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torchvision.ops import FrozenBatchNorm2d


class FrozenNorm2d(FrozenBatchNorm2d):  # type: ignore[misc]
    """torchvision's ``FrozenBatchNorm2d``; the result has the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)``."""
        return frozen_norm(x, self)


class FrozenNormAct2d(FrozenBatchNormAct2d):
    """timm's ``FrozenBatchNormAct2d``; the result has the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)`` and apply the activation."""
        result: Tensor = self.act(self.drop(frozen_norm(x, self)))
        return result


def fuse_frozen_norms(module: nn.Module) -> nn.Module:
    """Replace a network's frozen norms by those of this file, in place.

    Args:
        module: The network; it is modified.

    Returns:
        The network.
    """
    for norm in module.modules():
        if type(norm) is FrozenBatchNorm2d:
            norm.__class__ = FrozenNorm2d
        elif type(norm) is FrozenBatchNormAct2d:
            norm.__class__ = FrozenNormAct2d
    return module


def frozen_norm(x: Tensor, norm: Any) -> Tensor:
    """Apply a frozen batch norm; computed in float32, returned in the dtype of the map.

    Args:
        x: ``(B, C, H, W)``.
        norm: torchvision's or timm's module with the statistics and weights.

    Returns:
        ``(B, C, H, W)``.
    """
    scale: Tensor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    if x.dtype == scale.dtype or torch.compiler.is_compiling():
        # Bitwise equal to torchvision.
        shift: Tensor = norm.bias - norm.running_mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
    result: Tensor = _FrozenNorm.apply(x, scale, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return result


class _FrozenNorm(torch.autograd.Function):
    """``torch.batch_norm`` that saves no map for the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        scale: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(scale)
        return _affine(x, weight, bias, mean, var, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors  # type: ignore[attr-defined]
        zeros = torch.zeros_like(scale)
        return _affine(grad, scale, zeros, zeros, zeros + 1, 0.0), None, None, None, None, None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    # torch.nn.functional refuses an eps of 0, which the frozen norms of torchvision's COCO models have.
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
