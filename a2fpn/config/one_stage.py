"""Configurations of the heads of one-stage detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from a2fpn.config.bounds import (
    LARGEST_WEIGHT,
    MOST_BOXES,
    MOST_TOP_LEVELS,
    check_anchors,
    check_layers,
    check_range,
    check_thresholds,
)
from a2fpn.config.heads import HeadsConfig


@dataclass(frozen=True)
class OneStageConfig(HeadsConfig):
    """Fields common to the heads of one-stage detectors, besides those of :class:`HeadsConfig`.

    Args:
        top_levels: Number of coarser levels added by strided convolutions, p6 and p7 on a pyramid that ends at p5.
        top_source: Source of the first of them: the neck's coarsest level, or the backbone's.
        candidates_per_level: Maximum number of detections per level before NMS.

    Raises:
        ValueError: For a negative number of levels.
    """

    top_levels: int = 2
    top_source: Literal["neck", "backbone"] = "neck"
    candidates_per_level: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, MOST_TOP_LEVELS, top_levels=self.top_levels)
        check_range(1, MOST_BOXES, candidates_per_level=self.candidates_per_level)


@dataclass(frozen=True)
class RetinaNetConfig(OneStageConfig):
    """Head of RetinaNet; the defaults are torchvision's.

    torchvision's second version has ``top_source="backbone"``, ``head_norm="gn"`` and ``box_loss="giou"``. The fields
    of :class:`OneStageConfig`, and:

    Args:
        anchor_sizes: One tuple of anchor sizes in pixels per pyramid level; None for 4 x stride times 1,
            ``2**(1/3)`` and ``2**(2/3)``, in whole pixels.
        anchor_ratios: Height / width of the anchors, the same on every level.
        fg_iou: Minimum IoU of positive anchors.
        bg_iou: IoU below which an anchor is negative.
        head_norm: ``"gn"`` adds group norm after the head's convolutions.
        box_loss: Kind of the box loss.
    """

    anchor_sizes: tuple[tuple[int, ...], ...] | None = None
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    fg_iou: float = 0.5
    bg_iou: float = 0.4
    detections_per_image: int = 300
    head_norm: Literal["none", "gn"] = "none"
    box_loss: Literal["l1", "smooth_l1", "giou", "diou", "ciou"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_anchors(self.anchor_sizes, self.anchor_ratios)
        check_thresholds(**{"": (self.fg_iou, self.bg_iou)})


@dataclass(frozen=True)
class FCOSConfig(OneStageConfig):
    """Head of FCOS; the defaults are torchvision's.

    The fields of :class:`OneStageConfig`, and:

    Args:
        center_radius: Radius of center sampling, in strides.
        head_layers: Number of 3x3 convolutions of each branch.
    """

    center_radius: float = 1.5
    head_layers: int = 4
    score_threshold: float = 0.2
    nms_threshold: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(head_layers=self.head_layers)
        check_range(0, LARGEST_WEIGHT, center_radius=self.center_radius)
