"""Predictors with float32 outputs, since boxes decoded in bf16 are off by pixels.

Initialization follows detectron2: small normal weights and zero biases, so that the first losses are those of an
uninformed guess (0.69 for masks). torchvision's mask logits start with a standard deviation near 1 and a loss above 10.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from a2fpn.layers import CARAFE


class Float32RPNHead(RPNHead):  # type: ignore[misc]
    """RPN head with float32 outputs under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness ``(B, A, H, W)`` and deltas ``(B, 4 A, H, W)`` per level, float32."""
        objectness, deltas = super().forward(x)
        return [y.float() for y in objectness], [y.float() for y in deltas]


class Float32BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """Box predictor with float32 outputs under autocast.

    Args:
        in_channels: Channels of the input.
        num_classes: Classes, background included.
        class_agnostic: Whether all classes share one set of deltas.
    """

    def __init__(self, in_channels: int, num_classes: int, *, class_agnostic: bool = False) -> None:
        super().__init__(in_channels, num_classes)
        if class_agnostic:
            self.bbox_pred = nn.Linear(in_channels, 4)
        _start(self.cls_score, std=0.01)
        _start(self.bbox_pred, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits ``(R, K + 1)`` and deltas ``(R, 4 (K + 1))``, or ``(R, 4)`` if class-agnostic, float32."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class Float32MaskPredictor(MaskRCNNPredictor):  # type: ignore[misc]
    """Mask predictor with float32 outputs under autocast."""

    def __init__(self, in_channels: int, hidden_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, hidden_channels, num_classes)
        _start(self.mask_fcn_logits, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Mask logits ``(R, K + 1, M, M)``, float32."""
        logits: Tensor = super().forward(x).float()
        return logits


class CARAFEMaskPredictor(nn.Module):
    """Mask predictor that upsamples by CARAFE, without a subsequent activation.

    Source: Wang et al., "CARAFE", ICCV 2019, and mmdetection's mask head with ``upsample_cfg=dict(type="carafe")``.

    Args:
        in_channels: Channels of the input.
        num_classes: Classes, background included.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.upsample = CARAFE(in_channels)
        self.mask_fcn_logits = nn.Conv2d(in_channels, num_classes, 1)
        _start(self.mask_fcn_logits, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Mask logits ``(R, K + 1, 2 M, 2 M)`` from maps ``(R, C, M, M)``, float32."""
        doubled = self.upsample.upsample(x, (2 * x.shape[-2], 2 * x.shape[-1]))
        logits: Tensor = self.mask_fcn_logits(doubled).float()
        return logits


def _start(layer: nn.Linear | nn.Conv2d, *, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
