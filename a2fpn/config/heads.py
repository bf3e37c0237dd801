"""Fields that the heads of all detectors have in common."""

from __future__ import annotations

from dataclasses import dataclass

from a2fpn.config.bounds import MOST_BOXES, check_choices, check_range


@dataclass(frozen=True)
class HeadsConfig:
    """Fields that the heads of all detectors have in common.

    Args:
        legacy_anchors: Whether anchors are placed as in torchvision, with ``image size // grid size`` as the stride of
            a level; they drift on sizes that are not a multiple of it. For detectors that were trained so.
        score_threshold: Detections below this score are dropped.
        nms_threshold: IoU threshold of the per-class NMS.
        detections_per_image: Maximum number of detections per image.
    """

    legacy_anchors: bool = False
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(0, 1, score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)
        check_range(1, MOST_BOXES, detections_per_image=self.detections_per_image)
