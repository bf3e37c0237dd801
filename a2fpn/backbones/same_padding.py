"""TensorFlow's padding computed in whole numbers, which a tracer can simplify."""

from __future__ import annotations

from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.device import is_known


class SamePaddedConv(Conv2dSame):
    """timm's ``Conv2dSame`` with the same results."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C_in, H, W)`` to ``(B, C_out, ceil(H / stride), ceil(W / stride))``."""
        edges: list[int] = []
        for side, kernel, stride, dilation in zip(
            reversed(x.shape[2:]), self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            # Not by a ceiling of a quotient: of an image padded to even sizes this is a number, whatever the size.
            lacking = ((side + stride - 1) // stride - 1) * stride + dilation * (kernel - 1) + 1 - side
            total = 0 if is_known(lacking <= 0) else lacking if is_known(lacking >= 0) else max(lacking, 0)
            edges += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, edges), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def pad_in_whole_numbers(body: nn.Module) -> None:
    """Let the convolutions of a network that pad as TensorFlow does be :class:`SamePaddedConv`."""
    for module in body.modules():
        if type(module) is Conv2dSame:
            module.__class__ = SamePaddedConv
