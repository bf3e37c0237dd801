"""torchvision's box coder, with the same values and without copies of constants to the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection import _utils


class BoxCoder(_utils.BoxCoder):  # type: ignore[misc]
    """Box coder for R-CNN's deltas (Girshick et al., CVPR 2014, Appendix C); arguments as torchvision's.

    Example:
        >>> coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        >>> boxes, anchors = torch.tensor([[2.0, 0.0, 6.0, 8.0]]), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> coder.encode_single(boxes, anchors)
        tensor([[0.5000, 0.5000, 0.0000, 0.6931]])
        >>> coder.decode_single(coder.encode_single(boxes, anchors), anchors)
        tensor([[2., 0., 6., 8.]])
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Encode boxes relative to proposals, both ``(n, 4)`` xyxy, as ``(n, 4)`` dx, dy, dw, dh."""
        sides = proposals[:, 2:] - proposals[:, :2]
        centers = proposals[:, :2] + 0.5 * sides
        own_sides = reference_boxes[:, 2:] - reference_boxes[:, :2]
        own_centers = reference_boxes[:, :2] + 0.5 * own_sides
        wx, wy, ww, wh = self.weights
        moved, grown = (own_centers - centers, own_sides / sides)
        columns = [
            wx * moved[:, 0] / sides[:, 0],
            wy * moved[:, 1] / sides[:, 1],
            ww * torch.log(grown[:, 0]),
            wh * torch.log(grown[:, 1]),
        ]
        return torch.stack(columns, 1)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Decode K deltas per box, ``(n, 4 K)``, relative to boxes ``(n, 4)``, to boxes ``(n, 4 K)`` xyxy."""
        boxes = boxes.to(rel_codes.dtype)[:, None]
        sides = boxes[..., 2:] - boxes[..., :2]
        centers = boxes[..., :2] + 0.5 * sides
        codes = rel_codes.unflatten(1, (-1, 4))
        wx, wy, ww, wh = self.weights
        moved, grown = _divide(codes[..., :2], wx, wy), _divide(codes[..., 2:], ww, wh)
        centers = moved * sides + centers
        half = 0.5 * (torch.exp(grown.clamp(max=self.bbox_xform_clip)) * sides)
        return torch.cat([centers - half, centers + half], 2).flatten(1)


def _divide(x: Tensor, a: float, b: float) -> Tensor:
    """Divide the columns of ``(..., 2)`` by two numbers."""
    if a == b:
        return x / a if a != 1 else x
    return torch.stack([x[..., 0] / a, x[..., 1] / b], -1)
