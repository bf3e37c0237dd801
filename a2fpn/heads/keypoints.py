"""torchvision's keypoint predictor with float32 outputs, and keypoints from its heatmaps.

Shape shorthand: ``R`` RoIs, ``K`` keypoints of each, ``S`` side of a heatmap.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_inference


class Float32KeypointPredictor(KeypointRCNNPredictor):  # type: ignore[misc]
    """Keypoint predictor with float32 outputs under autocast, since keypoints are the maxima of its heatmaps."""

    def forward(self, x: Tensor) -> Tensor:
        """Heatmaps ``(R, K, S, S)`` from features ``(R, C, S / 4, S / 4)``, float32."""
        logits: Tensor = super().forward(x).float()
        return logits


def find_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Decode keypoints as the maxima of heatmaps resized to their boxes.

    Args:
        heatmaps: ``(R, K, S, S)`` logits.
        boxes: ``(R, 4)`` xyxy, pixels of the network's input.

    Returns:
        ``(R, K, 3)``: x, y and 1, and the values of the maxima, ``(R, K)``.
    """
    (points,), (heights,) = keypointrcnn_inference(heatmaps, [boxes])
    return points, heights
