"""torchvision's keypoint predictor with float32 outputs."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor


class Float32KeypointPredictor(KeypointRCNNPredictor):  # type: ignore[misc]
    """Keypoint predictor with float32 outputs under autocast: keypoints are positions of heatmap maxima."""

    def forward(self, x: Tensor) -> Tensor:
        """Heatmaps ``(R, P, 4 S, 4 S)`` of ``P`` keypoints from features ``(R, C, S, S)``, float32."""
        logits: Tensor = super().forward(x).float()
        return logits
