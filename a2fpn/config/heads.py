"""Fields that the heads of all detectors have in common."""

from __future__ import annotations

from dataclasses import dataclass

from a2fpn.config.bounds import MOST_BOXES, check_choices, check_range


@dataclass(frozen=True)
class HeadsConfig:
    """Fields that the heads of all detectors have in common.

    Args:
        legacy_anchors: Whether anchors lie as in torchvision, which takes ``image size // grid size`` for the stride
            of a level; on sizes that are no multiple of it they drift. For detectors that were trained so.
        score_threshold: Detections below this score are dropped.
        nms_threshold: IoU above which the per-class NMS removes a detection.
        detections_per_image: Most detections returned for an image.
    """

    legacy_anchors: bool = False
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(0, 1, score_threshold=self.score_threshold, nms_threshold=self.nms_threshold)
        check_range(1, MOST_BOXES, detections_per_image=self.detections_per_image)
