"""torchvision's predictors with float32 outputs: decoded in bf16, boxes are off by pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead


class Float32RPNHead(RPNHead):  # type: ignore[misc]
    """RPN head whose outputs leave autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness ``(B, A, H, W)`` and deltas ``(B, 4 A, H, W)`` per level, float32."""
        objectness, deltas = super().forward(x)
        return [y.float() for y in objectness], [y.float() for y in deltas]


class Float32BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """Box predictor whose outputs leave autocast.

    Args:
        in_channels: Channels of the input.
        num_classes: Classes, background included.
        class_agnostic: Whether there is one set of deltas for all classes.
    """

    def __init__(self, in_channels: int, num_classes: int, *, class_agnostic: bool = False) -> None:
        super().__init__(in_channels, num_classes)
        if class_agnostic:
            self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits ``(R, K + 1)`` and deltas ``(R, 4 (K + 1))``, or ``(R, 4)`` if class-agnostic, float32."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class Float32MaskPredictor(MaskRCNNPredictor):  # type: ignore[misc]
    """Mask predictor whose outputs leave autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Mask logits ``(R, K + 1, M, M)``, float32."""
        logits: Tensor = super().forward(x).float()
        return logits
