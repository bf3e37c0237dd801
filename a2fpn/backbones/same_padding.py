"""TensorFlow's "SAME" padding in integer arithmetic, which a tracer can simplify."""

from __future__ import annotations

from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.device import is_known


class SamePaddedConv(Conv2dSame):
    """timm's ``Conv2dSame``, with padding in integer arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, C_in, H, W)`` to ``(B, C_out, ceil(H / stride), ceil(W / stride))``."""
        edges: list[int] = []
        for side, kernel, stride, dilation in zip(
            reversed(x.shape[2:]), self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            # Integer division instead of math.ceil: for images padded to even sizes this simplifies to a constant.
            lacking = ((side + stride - 1) // stride - 1) * stride + dilation * (kernel - 1) + 1 - side
            total = 0 if is_known(lacking <= 0) else lacking if is_known(lacking >= 0) else max(lacking, 0)
            edges += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, edges), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def pad_in_whole_numbers(body: nn.Module) -> None:
    """Convert a network's ``Conv2dSame`` layers to :class:`SamePaddedConv`, in place."""
    for module in body.modules():
        if type(module) is Conv2dSame:
            module.__class__ = SamePaddedConv
